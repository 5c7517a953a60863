"""Objectives: pure tensor functions that never see a trajectory, an environment or the name of a method.

`token_terms` turns hidden states into per-token divergence, log-prob and entropy; `ppo_surrogate` turns
log-probs and advantages into a per-token loss; `token_coefficients` says how much each token's loss counts. A
loss is their product, summed.
"""

from opd_agents.objectives.divergence import DIVERGENCES, Kind, divergence
from opd_agents.objectives.policy_gradient import Normalise, Surrogate, group_advantages, ppo_surrogate
from opd_agents.objectives.reduction import Denominator, token_coefficients
from opd_agents.objectives.terms import CHUNK_ELEMENTS, Head, TokenTerms, token_terms

__all__ = [
    "CHUNK_ELEMENTS",
    "DIVERGENCES",
    "Denominator",
    "Head",
    "Kind",
    "Normalise",
    "Surrogate",
    "TokenTerms",
    "divergence",
    "group_advantages",
    "ppo_surrogate",
    "token_coefficients",
    "token_terms",
]
