"""The presets of teachers that act and judge in words, from their YAML to loss and gradient, against the
formulas of their papers in float64; and what each becomes at its ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine import assert_same, config_of, engine, log_probs, preset
from papers import entropy, kl
from rewarded import Rewarded, turns_of_both
from torch import Tensor

from opd_agents.experience import Experience
from opd_agents.schedules import Clock, value_at
from opd_agents.types import ActionFeedback, Actor, Outcome, Trajectory, Verdict

VALUES = {Verdict.SKIP: 0.0, Verdict.WEAK: 0.5, Verdict.STRONG: 1.0}


def with_feedback(experience: Experience, feedback: Sequence[ActionFeedback]) -> Experience:
    return dataclasses.replace(experience, feedback=tuple(feedback))


def verdicts(episodes: Sequence[Trajectory]) -> list[ActionFeedback]:
    """Of every turn but each episode's third."""
    kinds = list(Verdict)
    return [
        ActionFeedback(t.uid, number, verdict=kinds[(number + len(t.uid) + place) % 3])
        for place, t in enumerate(episodes)
        for number in range(len(t.turns))
        if number != 2
    ]


def test_ovd_is_the_policy_gradient_of_outcomes_on_what_is_left_and_what_was_put_there(
    rewarded: Rewarded,
) -> None:
    """The scores that rejected an episode are nowhere in the loss."""
    out = dataclasses.replace(rewarded.episodes[4], replaced=True, reward=50.0)
    left = [t for t in rewarded.episodes if t.uid != out.uid]
    kept = [*left, rewarded.shown]
    s = rewarded.seen(kept)
    expected = rewarded.plain(-(s.verified * s.new).mean())
    batch = [*kept, out]
    experience = with_feedback(rewarded.experience(batch), [ActionFeedback(t.uid, None, 3) for t in batch])
    value, gradient = engine(rewarded.model, experience, preset("ovd"))
    assert float((gradient - expected[1]).norm()) <= 1e-5 * float(expected[1].norm())
    assert value == pytest.approx(float(-s.verified.mean()), rel=1e-5)


def test_ovd_without_rejections_begins_as_grpo(rewarded: Rewarded) -> None:
    experience = rewarded.experience(rewarded.episodes)
    ours, theirs = (engine(rewarded.past, experience, preset(name)) for name in ("ovd", "grpo"))
    assert_same((0.0, ours[1]), (0.0, theirs[1]), rtol=1e-5)


def test_ovds_threshold_rejects_what_is_scored_below_it() -> None:
    extra = config_of("ovd").rollout.demonstrations
    assert extra is not None and (extra.when, extra.at_least, extra.actor) == ("rejected", 5, "teacher")


def sage(rewarded: Rewarded, feedback: Sequence[ActionFeedback]) -> tuple[float, Tensor]:
    """sum w KL(q || p) / sum w, w = v(turn) exp(-mean H(p) of the turn); 1 for v where nothing was said."""
    experience = rewarded.experience(rewarded.episodes)
    packed = experience.packed
    p, q = log_probs(rewarded.judge, packed).detach(), log_probs(rewarded.model, packed)
    said = {(one.trajectory, one.turn): VALUES[one.verdict] for one in feedback if one.verdict}
    weights = torch.zeros(len(packed.target), dtype=torch.float64)
    for number, (episode, turn) in enumerate(packed.turns):
        own = packed.turn == number
        trust = (-entropy(p[own]).mean()).exp()
        weights[own] = said.get((rewarded.episodes[episode].uid, turn), 1.0) * trust
    return rewarded.plain((weights * kl(q, p)).sum() / weights.sum())


def test_sage_weighs_the_divergence_by_verdict_and_confidence(rewarded: Rewarded, desk_chat: Any) -> None:
    feedback = verdicts(rewarded.episodes)
    experience = with_feedback(rewarded.experience(rewarded.episodes), feedback)
    ours = engine(rewarded.model, experience, preset("sage_opd"), chat=desk_chat)
    assert_same(ours, sage(rewarded, feedback), rtol=1e-5)


DISTILL = "loss.components.distill"


@pytest.mark.parametrize("verdict", [None, Verdict.STRONG, Verdict.WEAK])
def test_sage_with_one_verdict_for_all_and_no_confidence_is_gkd(
    verdict: Verdict | None, rewarded: Rewarded, desk_chat: Any
) -> None:
    """Divided by the weights, the loss keeps its scale; so it does where no judge could be reached."""
    feedback = [ActionFeedback(t.uid, None, verdict=verdict) for t in rewarded.episodes if verdict]
    experience = with_feedback(rewarded.experience(rewarded.episodes), feedback)
    alone = config_of("sage_opd", f"{DISTILL}.weights=[{{kind: verdict}}]").loss.components
    ours = engine(rewarded.model, experience, alone, chat=desk_chat)
    assert_same(ours, engine(rewarded.model, experience, preset("gkd")), rtol=1e-5)


def test_sage_learns_nothing_where_every_turn_is_sound(rewarded: Rewarded, desk_chat: Any) -> None:
    feedback = [ActionFeedback(t.uid, None, verdict=Verdict.SKIP) for t in rewarded.episodes]
    experience = with_feedback(rewarded.experience(rewarded.episodes), feedback)
    value, gradient = engine(rewarded.model, experience, preset("sage_opd"), chat=desk_chat)
    assert value == 0 and float(gradient.norm()) == 0


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.2, 0.853553), (0.4, 0.5), (0.8, 0.0), (1.0, 0.0)]
)
def test_guided_opd_imitates_the_teachers_turns_and_distils_the_students(
    progress: float, share: float, rewarded: Rewarded
) -> None:
    mixed = turns_of_both(rewarded)
    s = rewarded.seen(mixed)
    own = torch.tensor([mixed[e].turns[t].actor is Actor.STUDENT for e, t in s.packed.turns])[s.packed.turn]
    expected = rewarded.plain(
        share * -s.new[~own].mean() + (1 - share) * -((s.new - s.old).exp() * s.d)[own].mean()
    )
    assert_same(rewarded.trained(preset("guided_opd"), mixed, progress=progress), expected, rtol=1e-5)
    source = config_of("guided_opd").rollout.source
    assert isinstance(source, dict)
    shares = {name: value_at(one, Clock(progress, {})) for name, one in source.items()}
    assert shares["teacher"] == pytest.approx(share, abs=1e-6)
    assert shares["student"] == pytest.approx(1 - share, abs=1e-6)


def test_guided_opd_begins_as_sft_and_ends_as_thinking_machines(rewarded: Rewarded) -> None:
    theirs = [
        dataclasses.replace(t, turns=tuple(dataclasses.replace(one, actor=Actor.TEACHER) for one in t.turns))
        for t in rewarded.episodes
    ]
    guided = preset("guided_opd")
    assert_same(rewarded.trained(guided, theirs), rewarded.trained(preset("sft"), theirs))
    alone, last = rewarded.episodes, {"progress": 1.0}
    parent = rewarded.trained(preset("thinking_machines"), alone)
    assert_same(rewarded.trained(guided, alone, **last), parent)


def test_orpo_distill_is_likelihood_and_odds_ratio(rewarded: Rewarded) -> None:
    """Of the teacher's success against all of the student's in the group that it was shown to, all of which
    failed or did not come to an end."""
    batch = [*rewarded.episodes, rewarded.shown]
    s = rewarded.seen(batch)
    mean = [own.mean() for own in s.episodes(s.new)]
    odds = [one - torch.log(-torch.expm1(one)) for one in mean]
    wrong = [i for i, t in enumerate(batch) if t.group == "g1" and not t.success]
    assert len(wrong) == 4 and batch[-1].group == "g1" and batch[-1].success
    ratio = torch.stack([-torch.nn.functional.logsigmoid(odds[-1] - odds[i]) for i in wrong]).mean()
    expected = rewarded.plain(-mean[-1] + 0.1 * ratio)
    assert_same(rewarded.trained(preset("orpo_distill"), batch), expected, rtol=1e-5)


def test_orpo_distill_without_the_ratio_is_sft_on_the_teachers_successes(rewarded: Rewarded) -> None:
    lost = dataclasses.replace(rewarded.shown, uid="l", outcome=Outcome.FAILURE)
    batch = [*rewarded.episodes, rewarded.shown, lost]
    plainly = config_of("orpo_distill", "loss.components.odds.coef=0").loss.components
    assert_same(
        rewarded.trained(plainly, batch), rewarded.trained(preset("sft"), [rewarded.shown]), rtol=1e-5
    )
