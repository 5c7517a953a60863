"""The presets whose teacher is the student itself: from their YAML to loss and gradient against the formulas
of their papers; then whole steps of runs, the teacher's weights and prompts made anew by the test."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from engine import (
    assert_same,
    chosen,
    config_of,
    engine,
    experience_of,
    gradient_of,
    in_float64,
    log_probs,
    plain,
    preset,
)
from rewarded import Rewarded, mean
from torch import Tensor

from opd_agents import trainer
from opd_agents.batch import Packed, pack
from opd_agents.config import load_config
from opd_agents.experience import Experience
from opd_agents.optimizers import ModelOptimizer
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.trainer import train_step
from opd_agents.types import Outcome, Trajectory


class Told(NamedTuple):
    """Log-probs [N, V] of the student (differentiable) and of the teacher that is told more, as a batch holds
    them; the student's tokens were sampled with log-probs ``old``."""

    packed: Packed
    q: Tensor
    p: Tensor
    old: Tensor
    taught: Tensor

    @property
    def d(self) -> Tensor:
        return chosen(self.p, self.packed) - self.old

    @property
    def r(self) -> Tensor:
        return (chosen(self.q, self.packed) - self.old).exp()


def opsd(s: Told) -> Tensor:
    """The mean over episodes of the mean over tokens of sum_v min(p log(p / q), 0.05)."""
    terms = (s.p.exp() * (s.p - s.q)).clamp(max=0.05).sum(-1)
    return torch.stack([terms[s.packed.episode == e].mean() for e in s.packed.episode.unique()]).mean()


def crisp(s: Told) -> Tensor:
    return (s.q.exp() * (s.q - s.p)).sum(-1).mean()


def jsd(log_p: Tensor, log_q: Tensor, ids: Tensor) -> Tensor:
    """Of beta 0.5, over some tokens and the rest as one more."""
    heads = [one.exp().gather(1, ids) for one in (log_p, log_q)]
    p, q = (torch.cat([head, 1 - head.sum(-1, keepdim=True)], 1) for head in heads)
    middle = (p + q) / 2
    return 0.5 * (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1)


def sdpo(s: Told) -> Tensor:
    """min(r, 2) JSD over the student's top 100 and the rest, the mean over taught tokens."""
    best = s.q.detach().topk(min(100, s.q.shape[1] - 1)).indices
    return (s.r.detach().clamp(max=2) * jsd(s.p, s.q, best))[s.taught].mean()


def sdpo_env_feedback(s: Told) -> Tensor:
    """min(r, 2) KL(q || p) over the student's top 100 and the rest."""
    best = s.q.detach().topk(min(100, s.q.shape[1] - 1)).indices
    heads = [one.exp().gather(1, best) for one in (s.p, s.q)]
    p, q = (torch.cat([head, 1 - head.sum(-1, keepdim=True)], 1) for head in heads)
    return (s.r.detach().clamp(max=2) * torch.xlogy(q, q / p).sum(-1))[s.taught].mean()


# ---- the formulas, at a student that has moved on since it sampled ----


def seen(rewarded: Rewarded, now: Any, teacher: Any, taught: Tensor) -> Told:
    packed = pack(rewarded.episodes)
    log_p = log_probs(teacher, packed).detach()
    return Told(packed, log_probs(now, packed), log_p, packed.behaviour.double(), taught)


FORMULAS: dict[str, Callable[[Told], Tensor]] = {
    "opsd": opsd, "crisp": crisp, "sdpo": sdpo, "sdpo_env_feedback": sdpo_env_feedback,
}  # fmt: skip


@pytest.mark.parametrize(("method", "formula"), FORMULAS.items())
def test_a_preset_is_its_formula(method: str, formula: Callable[[Told], Tensor], rewarded: Rewarded) -> None:
    """And where the teacher is the student nothing is left to learn."""
    episodes = rewarded.episodes
    taught = (
        pack(episodes).episode % 3 != 0 if "sdpo" in method else torch.ones(len(pack(episodes).target)) > 0
    )
    expected = rewarded.plain(formula(seen(rewarded, rewarded.model, rewarded.judge, taught)))
    assert expected[0] > 0.01
    experience = experience_of(rewarded.student, episodes, {"teacher": rewarded.judge}, {"teacher": taught})
    assert_same(engine(rewarded.model, experience, preset(method), tokens=300), expected, rtol=1e-5)
    itself = experience_of(rewarded.student, episodes, {"teacher": rewarded.past})
    assert float(engine(rewarded.past, itself, preset(method))[1].norm()) < 1e-9


@pytest.mark.parametrize(
    ("method", "changed", "parent"),
    [
        ("opsd", ["clip=1e9"], ["divergence=forward_kl", "denominator=episode"]),
        ("sdpo", ["k=160", "ratio_clip=null"], ["divergence=jsd", "beta=0.5"]),
        ("sdpo_env_feedback", ["k=160", "ratio_clip=null"], []),
        ("crisp", [], []),
    ],
)
def test_at_its_end_a_preset_is_a_whole_divergence(
    method: str, changed: list[str], parent: list[str], rewarded: Rewarded
) -> None:
    ours, theirs = (
        rewarded.trained(
            config_of(name, *(f"loss.components.distill.{one}" for one in overrides)).loss.components,
            rewarded.episodes,
        )
        for name, overrides in ((method, changed), ("gkd", parent))
    )
    assert_same(ours, theirs, rtol=1e-7)


# ---- whole steps ----


class Step(NamedTuple):
    """What one step of a run learned from: its models in float64, the rollouts, the loss and its gradient."""

    start: Any
    before: Any
    session: Session
    experience: Experience
    loss: float
    gradient: Tensor


def second_step(folder: Path, method: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    """The first has changed the student, so that a teacher may have other weights."""
    size = 2 if method == "hdpo" else 4
    config = load_config(
        {
            "name": "tiny",
            "seed": 3, "output": str(folder), "imports": ["tiny"], "method": method,
            "student": {"build": tiny.BUILD | {"tokenizer": str(tokenizer)}}, "chat": tiny.BRIEF,
            "environments": [{"id": "tiny/Parity-v0"}],
            "rollout": {"episodes_per_step": 16, "group_size": size} | tiny.LIMITS,
            "trainer": {"steps": 4, "learning_rate": 0.02, "tensorboard": False},
        }
    )  # fmt: skip
    known: dict[str, Any] = {}
    update, clip = trainer.update, ModelOptimizer.clip

    def updating(session: Session, experience: Experience, assigned: Any) -> dict[str, float]:
        known.update(before=in_float64(session.model), experience=experience)
        return update(session, experience, assigned)

    def clipping(optimizer: ModelOptimizer, most: float) -> float:
        if most == config.trainer.clip_norm:
            known["gradient"] = gradient_of(session.model).double()
        return clip(optimizer, most)

    monkeypatch.setattr(trainer, "update", updating)
    monkeypatch.setattr(ModelOptimizer, "clip", clipping)
    session = load_session(config, RunFolder(folder, config.model_dump(mode="json"), resume=False))
    start = in_float64(session.model)
    train_step(session)
    return Step(start, session=session, loss=train_step(session)["loss"], **known)


def retold(
    step: Step, trajectories: Sequence[Trajectory], told: Callable[[Trajectory], str | None], place: str
) -> tuple[Packed, Tensor]:
    """The batch with what each episode's teacher is told, rendered by the tokenizer's own template."""
    packed, tokenizer = pack(trajectories), step.session.tokenizer
    rows, shift = [], []
    for trajectory, row in zip(trajectories, packed.rows, strict=True):
        more, (asked,) = told(trajectory), (m.content for m in trajectory.messages if m.role == "user")
        messages = [{"role": "user", "content": asked}]
        if more is not None and place == "system":
            messages = [{"role": "system", "content": more}, *messages]
        elif more is not None:
            messages = [{"role": "user", "content": f"{asked}\n\n{more}"}]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, include_tools=False
        )
        assert isinstance(text, str)
        # What the teacher is told is plain text, whatever the student wrote into it.
        before, _, after = text.partition(more) if more is not None else (text, "", "")
        inserted = tokenizer(more or "", split_special_tokens=True)["input_ids"]
        prompt = tokenizer(before)["input_ids"] + inserted + tokenizer(after)["input_ids"]
        plain_prompt = trajectory.turns[0].context_ids
        assert more is not None or tuple(prompt) == plain_prompt
        rows.append(torch.tensor([*prompt, *row[len(plain_prompt) :].tolist()]))
        shift.append(len(prompt) - len(plain_prompt))
    moved = dataclasses.replace(
        packed, rows=tuple(rows), position=packed.position + torch.tensor(shift)[packed.row]
    )
    return moved, torch.tensor([told(t) is not None for t in trajectories])[packed.episode]


SOLUTION = (
    "Here is a reference solution:\nyes, sir\nyes, sir\nAfter understanding it, articulate your own steps."
)


FEEDBACK = "The following is feedback from your unsuccessful earlier attempt:"


def solution(trajectory: Trajectory) -> str:
    """What the expert of the environment does, whatever the task."""
    return SOLUTION


def brevity(trajectory: Trajectory) -> str:
    return (
        "Solve the task concisely and correctly. Take no step that is not needed. A correct outcome comes"
        " before brevity."
    )


def peers(trajectories: Sequence[Trajectory]) -> Callable[[Trajectory], str | None]:
    """The first other success of the group, or else what a failed episode was last told."""

    def told(mine: Trajectory) -> str | None:
        group = [t for t in trajectories if t.group == mine.group and t.uid != mine.uid]
        others = ["\n".join(turn.action for turn in t.turns) for t in group if t.success]
        found = others[0] if others else None if mine.success else mine.turns[-1].observation
        return found and f"Correct solution or feedback:\n{found}\nCorrectly solve the original task."

    return told


def feedback(trajectory: Trajectory) -> str | None:
    """What a failed episode was last told."""
    said = trajectory.turns[-1].observation
    return None if trajectory.success else f"{FEEDBACK}\n{said}\nCorrectly solve the original task."


def averaged(start: Any, now: Any) -> Any:
    """The moving average after one update."""
    average = copy.deepcopy(start)
    with torch.no_grad():
        for old, new in zip(average.parameters(), now.parameters(), strict=True):
            old.mul_(0.95).add_(0.05 * new)
    return average


def grpo(s: Told, trajectories: Sequence[Trajectory], leave_one_out: bool) -> Tensor:
    """The advantages of groups [N]; at the first update the surrogate's ratio is 1."""
    groups = {t.group: [one.reward for one in trajectories if one.group == t.group] for t in trajectories}
    advantages = []
    for t in trajectories:
        group = torch.tensor(groups[t.group], dtype=torch.float64)
        size = len(group)
        centred = t.reward - mean(groups[t.group])
        advantages.append(
            centred * size / (size - 1) if leave_one_out else centred / (float(group.std()) + 1e-4)
        )
    return torch.tensor(advantages, dtype=torch.float64)[s.packed.episode]


def rlsd(s: Told, trajectories: Sequence[Trajectory]) -> Tensor:
    """At a quarter of the run, which has taken a quarter of 0.5 off lambda."""
    verified = grpo(s, trajectories, leave_one_out=False)
    shift = (verified.sign() * s.d).exp().clamp(0.8, 1.2)
    return -(s.r * verified * (1 - 0.375 + 0.375 * shift)).mean()


def told_of(step: Step, trajectories: Sequence[Trajectory], teacher: Any, told: Any, place: str) -> Told:
    packed = pack(trajectories)
    asked, taught = retold(step, trajectories, told, place)
    log_p = log_probs(teacher, asked, temperature=1.0).detach()
    log_q = log_probs(step.before, packed, temperature=1.0)
    return Told(packed, log_q, log_p, chosen(log_q, packed).detach(), taught)


def assert_learned(step: Step, loss: Tensor) -> None:
    """The run computes in float32."""
    value, gradient = plain(step.before, loss)
    assert step.loss == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert float((step.gradient - gradient).norm()) <= 2e-4 * float(gradient.norm())
    assert float(gradient.norm()) > 1e-3


@pytest.mark.parametrize("method", ["opsd", "crisp", "sdpo", "sdpo_env_feedback", "rlsd"])
def test_a_step_of_a_run_is_the_formula_on_prompts_that_tell_more(
    method: str, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = second_step(tmp_path / "run", method, tiny_teacher, monkeypatch)
    episodes = step.experience.trajectories
    assert 0 < sum(t.success for t in episodes) < len(episodes)
    by_outcome = {"sdpo": peers(episodes), "sdpo_env_feedback": feedback}
    told, place = {"crisp": (brevity, "system")}.get(method, (by_outcome.get(method, solution), "user"))
    average = averaged(step.start, step.before)
    teacher = {"rlsd": step.before}.get(method, average if method in by_outcome else step.start)
    s = told_of(step, episodes, teacher, told, place)
    assert bool(s.taught.all()) == (method not in by_outcome)
    assert_learned(step, FORMULAS[method](s) if method in FORMULAS else rlsd(s, episodes))
    other = told_of(step, episodes, step.before if method in ("opsd", "crisp") else step.start, told, place)
    with pytest.raises(AssertionError):  # with other weights of the teacher it is another
        assert_learned(step, FORMULAS[method](other) if method in FORMULAS else rlsd(other, episodes))


def test_a_step_of_hdpo_learns_from_privileged_episodes_of_failed_groups(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = second_step(tmp_path / "run", "hdpo", tiny_teacher, monkeypatch)
    own, shown = step.experience.rollouts, step.experience.demonstrations
    failed = {t.group for t in own} - {t.group for t in own if t.success}
    assert {t.group for t in shown} == failed and any(t.success for t in shown)
    s = told_of(step, own, step.before, solution, "user")
    privileged = [t for t in shown if t.outcome is Outcome.SUCCESS]
    lesson = told_of(step, privileged, step.before, solution, "user")
    best = lesson.p.topk(64).indices
    verified = -(s.r * grpo(s, own, leave_one_out=True)).mean()
    assert_learned(step, verified + 0.01 * jsd(lesson.p, lesson.q, best).mean())
