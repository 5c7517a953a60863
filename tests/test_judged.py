"""What is made of a judge's words: rewards, weights, rejected episodes, credit, and pairs of actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine import assert_same, assigned_to, component, engine, experience_of, in_float64, moved, plain
from judging import Answers, scores
from rolling import trajectory, turn
from test_demonstrations import config as shown_config
from test_redraws import Playing

from opd_agents.batch import pack
from opd_agents.composition import action_advantages, reward_advantages, scores_of_actions
from opd_agents.config import RewardPart, Select, load_config
from opd_agents.config.judge import Judge
from opd_agents.errors import ConfigError
from opd_agents.experience import Experience
from opd_agents.frozen import FrozenTerms
from opd_agents.judging import Judged, Opinions, judge_episodes
from opd_agents.loss import _pairs
from opd_agents.playing import play_step
from opd_agents.report.examples import _turns
from opd_agents.types import ActionFeedback, Actor, Branch, Credit, Outcome, Trajectory, Verdict

SKIP, WEAK, STRONG = Verdict


def group(*lengths: int, name: str = "g") -> list[Trajectory]:
    """Episodes of one group, of so many turns of one token."""
    return [
        trajectory([turn([1], [2]) for _ in range(n)], uid=f"{name}{i}", group=name, reward=float(i))
        for i, n in enumerate(lengths)
    ]


def experience(trajectories: Sequence[Trajectory], feedback: Sequence[ActionFeedback] = ()) -> Experience:
    packed = pack(trajectories)
    size = len(packed.target)
    nothing = torch.zeros(size)
    return Experience(
        tuple(trajectories), packed, {}, {}, FrozenTerms(nothing, nothing, {}), nothing == 0,
        feedback=tuple(feedback),
    )  # fmt: skip


def said(*items: tuple[str, int | None, Any]) -> list[ActionFeedback]:
    """Scores, or verdicts."""
    return [
        ActionFeedback(uid, number, **{"verdict" if isinstance(one, Verdict) else "score": one})
        for uid, number, one in items
    ]


# ---- rewards ----


def test_an_episodes_score_is_its_reward() -> None:
    """9 is 1; what has no score has no advantage and is in no mean; scores of actions are averaged."""
    episodes = group(1, 1, 2, 1)
    given = said(("g0", None, 9), ("g1", None, 0), ("g2", 0, 9), ("g2", 1, 0))
    made = experience(episodes, given)
    rubric = component(
        kind="policy", rewards={"rubric": {"verbal": "episode", "normalise": "none"}}, coef=1.0
    )
    assigned = assigned_to(made, {"judged": rubric})
    assert assigned.composed["judged"].rewards["rubric"].tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])
    assert assigned.composed["judged"].advantage.tolist() == pytest.approx([0.5, -0.5, 0, 0, 0])


def test_actions_are_compared_with_all_those_of_their_group() -> None:
    episodes = [*group(2, 2), *group(1, name="h")]
    given = said(("g0", 0, 9), ("g0", 1, 3), ("g1", 1, 0), ("h0", 0, 9))
    part = RewardPart(verbal="action", normalise="none")
    found = action_advantages(
        pack(episodes), episodes, part, Select(), scores_of_actions(part, Opinions(given))
    )
    assert found.tolist() == pytest.approx([5 / 9, -1 / 9, 0.0, -4 / 9, 0.0])
    rubric = component(kind="policy", rewards={"rubric": {"verbal": "action"}}, denominator="turn")
    credits = assigned_to(experience(episodes, given), {"judged": rubric}).credits
    scaled = found[:4] / (torch.tensor([9.0, 3, 0]).div(9).std() + 1e-4)
    assert [c.advantage["judged.rubric"] for c in credits[0] + credits[1]] == pytest.approx(scaled.tolist())
    assert [c.score for c in credits[0] + credits[1]] == [9, 3, None, 0]


def test_without_a_baseline_a_score_is_the_advantage_itself() -> None:
    part = RewardPart(verbal="action", baseline="none", normalise="none")
    alone = dataclasses.replace(group(2)[0], group="")
    found = action_advantages(
        pack([alone]), [alone], part, Select(), scores_of_actions(part, Opinions(said(("g0", 1, 9))))
    )
    assert found.tolist() == [0.0, 1.0]


def test_what_a_demonstration_replaced_is_compared_with_nothing_and_selected_by_none() -> None:
    one, two, out = group(1, 1, 1)
    out = dataclasses.replace(out, replaced=True, reward=100.0)
    part = RewardPart(normalise="none")
    assert reward_advantages([one, two, out], part, Select()).tolist() == [-0.5, 0.5, 0.0]
    assigned = assigned_to(experience([one, two, out]), {"ce": component(kind="ce")})
    assert assigned.weights["ce"].tolist() == [1, 1, 0]


# ---- weights ----

WEIGHTS = [
    ({"kind": "verbal_score", "at_least": 5}, [1, 0, 1, 1, 0]),
    ({"kind": "verbal_score", "at_least": 9, "unjudged": 0.25}, [1, 0, 0.25, 0, 0]),
    ({"kind": "verdict"}, [0, 0.5, 1, 1, 1]),
    ({"kind": "verdict", "skip": 2, "weak": 3, "strong": 4, "unjudged": 5}, [2, 3, 5, 4, 4]),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "expected"), WEIGHTS)
def test_a_judgement_weighs_its_action(weight: dict[str, Any], expected: list[float]) -> None:
    """The third action was not judged; the second episode as a whole but for its first action."""
    given = [
        ActionFeedback("g0", 0, 9, SKIP), ActionFeedback("g0", 1, 4, WEAK),
        ActionFeedback("g1", 0, 7, STRONG), ActionFeedback("g1", None, 2, STRONG),
    ]  # fmt: skip
    made = experience(group(3, 2), given)
    found = assigned_to(made, {"ce": component(kind="ce", weights=[weight])}).weights["ce"]
    assert found.tolist() == pytest.approx(expected)


# ---- episodes that are replaced ----


def rejecting(**changes: Any) -> Any:
    raw = shown_config().model_dump(mode="json", exclude_unset=True)
    raw |= {
        "judge": {"ask": ["score"], "by": "judge"},
        "references": {"judge": {"kind": "api", "model": "m"}},
    }
    raw["rollout"]["demonstrations"] = {"actor": "expert", "when": "rejected", "at_least": 5} | changes
    return load_config(raw)


def played(made: Any, judge: Callable[[Sequence[Trajectory]], Judged], expert: Playing) -> Any:
    student = Playing(lambda e: 0.0)
    return play_step(made, 3, [20], student, expert, judge=judge)


def test_episodes_of_a_low_score_give_way_to_demonstrations() -> None:
    made, expert = rejecting(), Playing(lambda e: 1.0)
    marks = [9, 4, 5, None, 0, 0, 7, 8]

    def judge(episodes: Sequence[Trajectory]) -> Judged:
        pairs = zip(episodes, marks, strict=True)
        given = said(*((e.uid, None, mark) for e, mark in pairs if mark is not None))
        return Judged(tuple(given), 8, 1)

    step = played(made, judge, expert)
    out = [mark is not None and mark < 5 for mark in marks]
    assert [t.replaced for t in step.trajectories] == [*out, False, False, False]
    (asked,) = expert.calls
    assert [e.group[-2:] for e in asked] == ["00", "02", "02"] and all(e.demonstration for e in asked)
    assert len({e.seed for e in asked}) == len({e.stream for e in asked}) == 3
    row = step.metrics(made)
    assert (row["demonstrations/rejected"], row["demonstrations/episodes"], row["judge/failed"]) == (3, 3, 1)


def test_where_no_answer_could_be_had_all_stay() -> None:
    expert = Playing(lambda e: 1.0)
    step = played(rejecting(), lambda episodes: Judged((), 8, 8), expert)
    assert not any(t.replaced for t in step.trajectories) and expert.calls == [[]]


def test_the_judge_sees_the_students_episodes_once() -> None:
    answers = Answers(scores(1, 1, 1))
    settings = Judge(ask=["score"])

    def judge(episodes: Sequence[Trajectory]) -> Judged:
        acted = [dataclasses.replace(e, turns=(turn([1], [2]),)) for e in episodes]
        return judge_episodes(answers, settings, acted, lambda one: (), (0, 3))

    step = played(rejecting(), judge, Playing(lambda e: 1.0))
    assert len(answers.asked) == 8 and sum(t.replaced for t in step.trajectories) == 8


def test_the_report_shows_what_was_said_beside_the_action() -> None:
    (one,) = group(1)
    (view,) = _turns(one, [Credit(score=3, verdict=WEAK, reason="slow")])
    assert view.flags == (("score 3", "slow"), ("verdict weak", "slow"))


# ---- pairs of actions ----


def beside(parent: Trajectory, number: int) -> Trajectory:
    """Another's action at a turn of an episode."""
    before = [dataclasses.replace(one, weight=0.0) for one in parent.turns[:number]]
    other = dataclasses.replace(parent.turns[number], action_ids=(5, 6), logprobs=None, actor=Actor.TEACHER)
    return dataclasses.replace(
        parent, uid=f"{parent.uid}-other{number}", turns=(*before, other), group="",
        branch=Branch(parent.uid, number, tried=False), outcome=Outcome.UNFINISHED,
    )  # fmt: skip


PAIRED = {
    "kind": "preference", "pairs": "actions", "chosen": {"source": "alternative"},
    "rejected": {"actor": "student", "source": "rollout"},
}  # fmt: skip


def test_an_alternative_is_paired_with_the_students_own_action_there() -> None:
    one, two = group(3, 2)
    batch = [one, two, beside(one, 1), beside(two, 0)]
    packed = pack(batch)
    made = component(form="orpo", **PAIRED)
    assert made.kind == "preference"
    own = torch.tensor([batch[e].branch is None for e, _ in packed.turns])[packed.turn]
    units, pairs = _pairs(made, packed, batch, ~own, own)
    places = [(packed.turns[a], packed.turns[b]) for a, b in pairs]
    assert places == [((2, 1), (0, 1)), ((3, 0), (1, 0))] and torch.equal(units, packed.turn)


def test_alternatives_are_seen_only_where_they_are_named() -> None:
    one, two = group(2, 2)
    batch = experience([one, two, beside(one, 1)])
    parts = {"all": component(kind="ce"), "other": component(kind="ce", select={"source": "alternative"})}
    weights = assigned_to(batch, parts).weights
    assert weights["all"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert weights["other"].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_the_loss_on_pairs_of_actions_is_dpo_of_their_log_probs(student: Any, teacher: Any) -> None:
    now, anchor = moved(student), in_float64(teacher)
    random = torch.Generator().manual_seed(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 30, (n,), generator=random).tolist())

    turns = [turn(ids(4), ids(3)), turn(ids(2), ids(2))]
    one = trajectory(turns, uid="a")
    other = dataclasses.replace(
        one, uid="b", turns=(dataclasses.replace(turns[0], weight=0.0), turn(turns[1].context_ids, ids(4))),
        branch=Branch("a", 1, tried=False),
    )  # fmt: skip
    batch = experience_of(student, [one, other], {"base": anchor}, temperature=1.0)
    ours = engine(
        now, batch, {"pairs": component(form="dpo", beta=0.5, reference="base", **PAIRED)}, temperature=1.0
    )

    def log_prob(model: Any, context: tuple[int, ...], action: tuple[int, ...]) -> Any:
        logits = model(torch.tensor([[*context, *action]])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(action)[:, None]).sum()

    start = (*turns[0].context_ids, *turns[0].action_ids, *turns[1].context_ids)
    chosen, rejected = other.turns[1].action_ids, turns[1].action_ids
    with torch.no_grad():
        before = log_prob(anchor, start, chosen) - log_prob(anchor, start, rejected)
    margin = log_prob(now, start, chosen) - log_prob(now, start, rejected) - before
    loss = -torch.nn.functional.logsigmoid(0.5 * margin)
    assert_same(ours, plain(now, loss), rtol=1e-5)


# ---- what is refused when the config loads ----


def judged_config(*overrides: str, **changes: Any) -> Any:
    raw = {
        "name": "x", "student": {"model": "s"}, "teacher": {"kind": "api", "model": "m"},
        "environments": [{"id": "e"}], "rollout": {"group_size": 2, "episodes_per_step": 4},
        "judge": {"ask": ["score"]},
        "loss": {"components": {"p": {"kind": "policy", "rewards": {"r": {"verbal": "action"}}}}},
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


PAIRS = "loss.components.q={kind: preference, form: orpo, pairs: actions, chosen: %s, rejected: {}}"
REFUSED: list[tuple[list[str], str]] = [
    (["judge="], r"rewards\.r\.verbal needs a judge"),
    (["judge.ask=[verdict]"], "needs the judge's score: add it"),
    (["judge.ask=[]"], "judge.ask is empty"),
    (["judge.ask=[score, score]"], "twice"),
    (["judge.per=episode"], "verbal: action needs `judge.per: action`"),
    (["judge.by=other"], "judge.by is `other`, but there is only teacher"),
    (["teacher="], "needs a `teacher"),
    (["rollout.redraws=1"], "redraws looks at rewards before the judge"),
    (["rollout.source=expert", "loss.components.p=", "loss.components.c={kind: ce}"], "let the student act"),
    (["loss.components.p.rewards.r.reward=m:f"], "rewards of their own"),
    (["loss.components.p.weights=[{kind: verdict}]"], "weight verdict needs the judge's verdict"),
    (["loss.components.p.weights=[{kind: verdict, weak: 0, strong: 0}]"], "are all 0"),
    (["rollout.demonstrations={when: rejected}"], "`at_least` is needed"),
    (["rollout.demonstrations={when: always, at_least: 3}"], "`at_least` is needed"),
    (["rollout.demonstrations={when: rejected, at_least: 3, per_group: 2}"], "per_group 1"),
    (["correction={propose: {by: judge}}", "judge="], "needs a judge"),
    ([PAIRS % "{source: alternative}"], "source `alternative` would select nothing.*rollout.alternatives"),
    ([PAIRS % "{}"], "goes with `chosen"),
    (["rollout.source={student: {kind: linear, start: 1, end: 0}}"], "nobody would act"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judged_config(*overrides)


def test_shares_of_a_mixture_may_change_as_long_as_somebody_acts() -> None:
    falling: dict[str, Any] = {"kind": "cosine", "start": 1, "end": 0, "until": 0.8}
    rising = falling | {"start": 0, "end": 1}
    off = {"kind": "switch", "start": 1, "end": 0, "at": 0.5}
    on = {"kind": "switch", "start": 0, "end": 1}
    alone = {"components": {"c": {"kind": "ce"}}}
    shares: dict[str, Any]
    for shares in ({"teacher": falling, "student": rising}, {"teacher": off, "student": on | {"at": 0.4}}):
        made = judged_config(rollout={"source": shares}, loss=alone)
        assert made.rollout.actors == {"student", "teacher"}
    for shares in (
        {"teacher": falling}, {"student": rising}, {"student": 0, "teacher": 0},
        {"teacher": off, "student": on | {"at": 0.6}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="nobody would act"):
            judged_config(rollout={"source": shares}, loss=alone)


def test_a_null_component_takes_a_presets_out() -> None:
    given = {"method": "guided_opd", "loss": {"components": {"student": None}}, "judge": None}
    made = judged_config(rollout={}, **given)
    assert made.loss.components.keys() == {"teacher"}
