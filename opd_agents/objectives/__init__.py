"""Objectives: pure tensor functions that never see a trajectory, an environment or the name of a method.

`token_terms` turns hidden states into per-token log-probs, entropies and divergences, each a `Measure` of a
`Target`; `surrogate` turns a ratio of log-probs and an advantage into a per-token loss; `token_coefficients`
says how much each token's loss counts. A loss is their product, summed.
"""

from opd_agents.objectives.advantages import (
    Baseline,
    Normalise,
    group_advantages,
    reference_advantages,
    whitened,
)
from opd_agents.objectives.divergence import DIVERGENCES, Kind, divergence
from opd_agents.objectives.fused import FusedDivergence, fused_divergence
from opd_agents.objectives.measures import Measure
from opd_agents.objectives.policy_gradient import (
    Mismatch,
    Surrogate,
    mismatch_weights,
    no_ratio,
    shaped_ratio,
    surrogate,
    token_ratio,
    trrd_ratio,
    unit_log_ratios,
    unit_ratio,
)
from opd_agents.objectives.preference import (
    Form,
    PreferenceSlopes,
    bradley_terry,
    episode_pairs,
    preference_loss,
    token_slopes,
)
from opd_agents.objectives.reduction import Denominator, token_coefficients
from opd_agents.objectives.targets import FullTarget, Head, SampledTarget, Target, TopKTarget
from opd_agents.objectives.terms import CHUNK_ELEMENTS, ReferenceTerms, TokenTerms, token_terms

__all__ = [
    "CHUNK_ELEMENTS",
    "DIVERGENCES",
    "Baseline",
    "Denominator",
    "Form",
    "FullTarget",
    "FusedDivergence",
    "Head",
    "Kind",
    "Measure",
    "Mismatch",
    "Normalise",
    "PreferenceSlopes",
    "ReferenceTerms",
    "SampledTarget",
    "Surrogate",
    "Target",
    "TokenTerms",
    "TopKTarget",
    "bradley_terry",
    "divergence",
    "episode_pairs",
    "fused_divergence",
    "group_advantages",
    "mismatch_weights",
    "no_ratio",
    "preference_loss",
    "reference_advantages",
    "shaped_ratio",
    "surrogate",
    "token_coefficients",
    "token_ratio",
    "token_slopes",
    "token_terms",
    "trrd_ratio",
    "unit_log_ratios",
    "unit_ratio",
    "whitened",
]
