"""Policy gradients of the field that no preset is named for: components of a config against plain formulas in
float64, and against TRL's own loss."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import assert_same, component
from rewarded import REWARDS, Rewarded, Seen, deviation, mean, surrogate, unlike, without_own
from torch import Tensor

from opd_agents.types import Outcome


def dapo(s: Seen) -> Tensor:
    """Unfinished episodes are neither learned from nor compared with."""
    finished = [t for t in s.trajectories if t.outcome is not Outcome.UNFINISHED]
    groups = {t.group: [one.reward for one in finished if one.group == t.group] for t in finished}
    advantage = s.per_token(
        [(t.reward - mean(groups[t.group])) / (deviation(groups[t.group]) + 1e-4) for t in s.trajectories]
    )
    counted = s.per_token([float(t in finished) for t in s.trajectories]) == 1
    return surrogate(s.r, advantage, high=0.28)[counted].mean()


def of_units(s: Seen, units: Callable[[Tensor], list[Tensor]], low: float, high: float) -> Tensor:
    """The surrogate of whole turns or episodes, whose ratio is the geometric mean of their tokens'."""
    ratio = torch.stack([one.mean().exp() for one in units(s.new - s.old)])
    advantage = torch.stack([one[0] for one in units(s.verified)])
    return surrogate(ratio, advantage, low, high).mean()


def reinforce(s: Seen, advantage: Tensor) -> Tensor:
    """A log q of whole episodes, their mean; its value is that of ratios of 1."""
    return -(advantage * (s.new - s.new.detach()).exp()).sum() / len(s.trajectories)


def grpo(s: Seen) -> Tensor:
    return surrogate(s.r, s.verified).mean()


def verifier(**fields: Any) -> dict[str, Any]:
    return {"kind": "policy", "rewards": {"verifier": fields}}


UNCLIPPED: dict[str, Any] = {"clip_low": None, "clip_high": None}
AGREED = {"kind": "sigmoid", "slope": 5.0}
BASE = {"base": {"reference": "base", "coef": 0.1}}
ON_POLICY = UNCLIPPED | {"ratio": "none", "denominator": "constant", "constant": 12.0}
METHODS: dict[str, tuple[dict[str, Any], Callable[[Seen], Tensor]]] = {
    "Dr. GRPO": (
        verifier(normalise="none") | {"denominator": "constant", "constant": 384.0},
        lambda s: surrogate(s.r, s.advantage(lambda r, group: r - mean(group))).sum() / 384,
    ),
    "DAPO": (
        verifier(unfinished="masked") | {"clip_high": 0.28, "select": {"outcome": ["success", "failure"]}},
        dapo,
    ),
    "GSPO": (
        verifier() | {"ratio": "sequence", "denominator": "episode", "clip_low": 3e-4, "clip_high": 4e-4},
        lambda s: of_units(s, s.episodes, 3e-4, 4e-4),
    ),
    "turns": (
        verifier() | {"ratio": "turn", "denominator": "turn"},
        lambda s: of_units(s, s.turns, 0.2, 0.2),
    ),
    "RLOO": (
        verifier(baseline="leave_one_out", normalise="none") | ON_POLICY,
        lambda s: reinforce(s, s.advantage(without_own)),
    ),
    "REINFORCE": (
        verifier(baseline="none", normalise="none") | ON_POLICY,
        lambda s: reinforce(s, s.advantage(lambda reward, _: reward)),
    ),
    "deviation of the batch": (
        verifier(normalise="batch_std"),
        lambda s: surrogate(
            s.r, s.advantage(lambda r, group: (r - mean(group)) / (deviation(REWARDS) + 1e-4))
        ).mean(),
    ),
    "several references": (
        verifier() | {"references": BASE | {"teacher": {"coef": 0.01, "gates": [AGREED]}}},
        lambda s: surrogate(
            s.r, s.verified + 0.1 * (s.base - s.old) + 0.01 * (5 * s.d).sigmoid() * s.d
        ).mean(),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_component_is_a_method_of_the_field(name: str, rewarded: Rewarded) -> None:
    fields, formula = METHODS[name]
    ours = rewarded.trained({"p": component(**fields)}, rewarded.episodes, tokens=200)
    assert_same(ours, rewarded.plain(formula(rewarded.seen(rewarded.episodes))), rtol=2e-5)


def truncated(w: Tensor) -> Tensor:
    return w.clamp(max=2.0)


def masked(w: Tensor) -> Tensor:
    return w * ((w >= 0.5) & (w <= 2.0))


@pytest.mark.parametrize(
    ("mismatch", "kept"),
    [
        ({"mismatch": "tis", "mismatch_high": 2.0}, truncated),
        ({"mismatch": "icepop", "mismatch_low": 0.5, "mismatch_high": 2.0}, masked),
    ],
)
def test_a_correction_of_the_sampler_stands_beside_the_clip(
    mismatch: dict[str, Any], kept: Callable[[Tensor], Tensor], rewarded: Rewarded
) -> None:
    off = unlike(rewarded.episodes)
    s = rewarded.seen(off)
    weight = (s.old - s.packed.behaviour.double()).exp()
    assert 0.1 < float((kept(weight) != weight).double().mean()) < 0.9
    expected = rewarded.plain((kept(weight) * surrogate(s.r, s.verified)).mean())
    ours = rewarded.trained({"p": component(**verifier(), **mismatch)}, off)
    assert_same(ours, expected, rtol=1e-5)


def test_leaving_one_out_is_the_baseline_of_the_group_scaled(rewarded: Rewarded) -> None:
    group, others = (
        rewarded.trained(
            {"p": component(**verifier(baseline=baseline, normalise="none"), **UNCLIPPED)}, rewarded.episodes
        )
        for baseline in ("group", "leave_one_out")
    )
    assert_same(others, (4 / 3 * group[0], 4 / 3 * group[1]), rtol=1e-6)


# ---- TRL ----

TRL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss_type": "grpo"}, {"denominator": "episode"}),
    ({"loss_type": "bnpo"}, {"denominator": "token"}),
    ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_high": 0.28}),
    ({"loss_type": "dr_grpo"}, {"denominator": "constant", "constant": 12 * 40.0}),
    (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
        {"ratio": "sequence", "denominator": "episode", "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    ({"loss_type": "dapo", "use_vllm": True}, {"mismatch": "tis", "mismatch_high": 2.0}),
]


@pytest.mark.parametrize(("theirs", "ours"), TRL)
def test_the_loss_is_that_of_trl(theirs: dict[str, Any], ours: dict[str, Any], rewarded: Rewarded) -> None:
    """GRPOTrainer's own, of the same log-probs and advantages: value and gradient."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    s = rewarded.seen(unlike(rewarded.episodes) if "mismatch" in ours else rewarded.episodes)
    sampled = s.packed.behaviour.double()
    old = rewarded.experience(s.trajectories).frozen.logprob.double() if "mismatch" in ours else sampled

    def padded(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(s.episodes(values), batch_first=True)

    mask = padded(torch.ones_like(s.new)).long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask.new_zeros(mask.shape),
        "completion_mask": mask, "advantages": padded(s.verified)[:, 0],
        "old_per_token_logps": padded(old), "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": padded((old - sampled).exp().clamp(max=2.0)),
    }  # fmt: skip
    if theirs["loss_type"] == "dr_grpo":
        inputs["advantages"] = padded(s.advantage(lambda r, group: r - mean(group)))[:, 0]
    assert not mask.all()
    loss = trainer._compute_loss(
        trl_settings(padded(s.new), **theirs), SimpleNamespace(training=True), inputs
    )
    normalise = "none" if theirs["loss_type"] == "dr_grpo" else "std"
    one = component(**verifier(normalise=normalise) | ours)
    assert_same(rewarded.trained({"p": one}, s.trajectories), rewarded.plain(loss), rtol=1e-6)


def trl_settings(logps: Tensor, **changes: Any) -> SimpleNamespace:
    """What the trainer's loss reads of it."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x)
    defaults: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "beta": 0.0, "aux_loss_enabled": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False, "vllm_importance_sampling_correction": True, "max_completion_length": 40,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "accelerator": accelerator,
        "args": SimpleNamespace(delta=None, steps_per_generation=1),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logps, torch.zeros_like(logps), None),
    }  # fmt: skip
    metrics: dict[str, dict[str, list[float]]] = {"train": _Lists()}
    return SimpleNamespace(**defaults | changes, _metrics=metrics, model=SimpleNamespace(training=True))


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])
