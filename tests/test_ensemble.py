"""Several teachers as one: against the mixture of their distributions, written out; routing; who acts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from opd_agents.batch import pack
from opd_agents.config.loading import RunConfig
from opd_agents.errors import ConfigError
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.teachers import SampledLogprobs, TeacherTopK
from opd_agents.teachers.ensemble import MixtureHead
from opd_agents.trainer import train
from opd_agents.types import Trajectory, from_dict

HERE = "test_ensemble"
DISTILLED = {"components": {"distill": tiny.DISTILL}}


@pytest.fixture
def make(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> Callable[..., RunConfig]:
    """A run with two teachers: one that was trained for longer, and the student's start."""

    def made(
        *overrides: str, run: str = "run", members: Any = None, loss: Any = DISTILLED, **ensemble: Any
    ) -> RunConfig:
        both = {"strong": {"model": str(tiny_teacher)}, "weak": {"model": str(tiny_student)}}
        teacher = {"kind": "ensemble", "members": members or both} | ensemble
        return tiny.mix(
            tmp_path / run, tiny_teacher, "trainer.steps=2", *overrides, correction=None,
            teacher=teacher, loss=loss, student={"model": str(tiny_student)},
        )  # fmt: skip

    return made


def played(folder: Path, step: int = 1) -> list[Trajectory]:
    lines = (folder / "trajectories" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [from_dict(Trajectory, json.loads(line)["trajectory"]) for line in lines]


def distribution(signal: Any, temperature: float) -> Tensor:
    return (signal.head(signal.hidden).double() / temperature).softmax(-1)


def test_distributions_are_mixed_in_probability_space() -> None:
    """Also of states of half the precision, whose own projection they reach as they were."""
    random = torch.Generator().manual_seed(0)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    states = [
        torch.randn(3, width, generator=random).to(kind)
        for width, kind in ((4, torch.bfloat16), (6, torch.float32))
    ]
    heads = [torch.nn.Linear(s.shape[-1], 11, dtype=s.dtype).requires_grad_(False) for s in states]
    for temperature in (1.0, 0.7):
        head = MixtureHead(tuple(heads), (4, 6), (torch.bfloat16, torch.float32), temperature)
        hidden = torch.cat([*states, weights.log()], -1)
        expected = sum(
            weights[:, i : i + 1] * (heads[i](states[i]).double() / temperature).softmax(-1) for i in range(2)
        )
        torch.testing.assert_close(
            (head(hidden).double() / temperature).softmax(-1), expected, atol=1e-6, rtol=1e-4
        )


@pytest.fixture
def scored(make: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[Session, Any]]:
    """A run's first episodes, and what is said of them."""
    episodes = played(train(make("trainer.steps=1", run="played")))

    def made(*overrides: str, run: str = "scored", **changes: Any) -> tuple[Session, Any]:
        session = load_session(
            make(*overrides, run=run, **changes), RunFolder(tmp_path / run, {}, resume=False)
        )
        packed = pack(episodes)
        everywhere = torch.ones(len(packed.target), dtype=torch.bool)
        return session, session.score(packed, episodes, everywhere)

    return made


def test_the_run_sees_the_mixture_of_what_its_members_say(scored: Callable[..., Any]) -> None:
    _, (signals, taught) = scored(weights={"strong": 3, "weak": 1})
    assert set(signals) == {"teacher", "teacher.strong", "teacher.weak"}
    strong, weak, both = (distribution(signals[f"teacher{n}"], 1.0) for n in (".strong", ".weak", ""))
    torch.testing.assert_close(both, 0.75 * strong + 0.25 * weak, atol=1e-6, rtol=1e-4)
    assert float((strong - weak).abs().max()) > 0.01
    assert all(bool(one.all()) for one in taught.values())


def test_log_probs_mix_to_the_same(scored: Callable[..., Any], make: Callable[..., RunConfig]) -> None:
    """Of a member that tells log-probs only the mixture has those of the action tokens."""
    _, (whole, _) = scored(weights={"strong": 3, "weak": 1})
    said = make().teacher.members
    members = {
        "strong": {"kind": "test_bad_losses:TopFour", "model": said["strong"].model},
        "weak": said["weak"].model_dump(),
    }
    loss = {"components": {"distill": {"kind": "policy", "references": {"teacher": {}}}}}
    weights = {"strong": 3, "weak": 1}
    session, (signals, _) = scored(run="mixed", loss=loss, members=members, weights=weights)
    assert isinstance(signals["teacher"], SampledLogprobs) and isinstance(
        signals["teacher.strong"], TeacherTopK
    )
    target = pack(played(session.folder.path.with_name("played"))).target
    expected = distribution(whole["teacher"], 1.0).gather(1, target[:, None])[:, 0].log()
    torch.testing.assert_close(signals["teacher"].logprobs.double(), expected, atol=1e-5, rtol=1e-4)


def test_members_teach_the_episodes_that_they_are_routed(scored: Callable[..., Any], tmp_path: Path) -> None:
    """Each is asked for its own alone."""
    episodes = played(tmp_path / "played")
    task = episodes[0].task.id
    routes = [{"task": task, "weights": {"weak": 1}}, {"environment": "tiny/*", "weights": {"strong": 2}}]
    session, (signals, taught) = scored(routes=routes)
    packed = pack(episodes)
    ones = torch.tensor([one.task.id == task for one in episodes])[packed.episode]
    assert bool(ones.any()) and not bool(ones.all())
    assert taught["teacher.weak"].equal(ones) and taught["teacher.strong"].equal(~ones)
    own = torch.where(
        ones[:, None],
        distribution(signals["teacher.weak"], 1.0),
        distribution(signals["teacher.strong"], 1.0),
    )
    torch.testing.assert_close(distribution(signals["teacher"], 1.0), own, atol=1e-6, rtol=1e-4)
    rows = sum(len(ids) for ids in packed.rows)
    assert session.references.tokens == rows  # and not twice as many


def test_alone_a_member_is_the_teacher(make: Callable[..., RunConfig], tiny_teacher: Path) -> None:
    """A run with all the weight on one has the losses of a run with it."""
    all_on_one = train(make(run="one", routes=[{"weights": {"strong": 1}}]))
    itself = make(run="itself").model_copy(update={"teacher": tiny.mix(Path("x"), tiny_teacher).teacher})
    losses = [[row["loss"] for row in tiny.metrics(run)] for run in (all_on_one, train(itself))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_metrics_tell_the_teachers_apart(make: Callable[..., RunConfig]) -> None:
    row = tiny.metrics(train(make("trainer.steps=1")))[0]
    assert row["kl/teacher.weak"] < 1e-6 < row["distill/kl"] < row["kl/teacher.strong"]
    routed = tiny.metrics(train(make("trainer.steps=1", run="r", routes=[{"weights": {"strong": 1}}])))[0]
    assert routed["kl/teacher.weak"] is None
    assert routed["kl/teacher.strong"] == pytest.approx(routed["distill/kl"], rel=1e-4)


def test_a_turn_is_taken_by_a_member_that_is_drawn(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    members = {name: {"kind": f"{HERE}:Says", "options": {"word": name}} for name in ("yes", "no")}
    imitate = {"components": {"c": {"kind": "ce", "select": {"actor": "teacher"}}}}
    for weights, expected in (({"yes": 1, "no": 1}, {"yes", "no"}), ({"yes": 1, "no": 1e-9}, {"yes"})):
        config = make(
            "rollout.source=teacher", "trainer.steps=1", run=str(weights["no"]), members=members,
            weights=weights, loss=imitate,
        )  # fmt: skip
        assert {turn.action for one in played(train(config)) for turn in one.turns} == expected


class Says:
    """Always the same word."""

    can = frozenset({"act"})
    tokens = flops = 0

    def __init__(self, path: str | None, chat: Any, *, dtype: str, temperature: float, word: str) -> None:
        self.word, self.greedy = word, self

    def act(self, histories: Any) -> Any:
        from opd_agents.policies.base import Action
        from opd_agents.types import Actor, StopReason

        return [Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=self.word) for _ in histories]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"strnog": 1}}, "`weights` names strnog, and `members` has no such"),
        ({"weights": {"strong": 0, "weak": 0}}, "`weights` are all 0"),
        ({"weights": {"strong": 1}}, r"`members\.weak` has no weight anywhere"),
        ({"routes": [{"task": "1", "weights": {"x": 1}}]}, r"`routes\[0\]\.weights` names x"),
        ({"members": {"one": {"model": "m"}}}, "at least 2"),
        ({"members": {"a": {"model": "m"}, "b": {"kind": "local"}}}, r"teacher\.members\.b\.model missing"),
    ],
)
def test_what_cannot_teach_together_is_refused(
    changes: dict[str, Any], message: str, make: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_an_ensemble_can_what_its_members_can(make: Callable[..., RunConfig], tiny_teacher: Path) -> None:
    members = {
        "a": {"model": str(tiny_teacher)},
        "b": {"kind": "test_bad_losses:Sampled", "model": str(tiny_teacher)},
    }
    with pytest.raises(
        ConfigError, match=r"\(kind ensemble\) its full distributions.* it has `sampled_logprobs` and `act`"
    ):
        train(make(members=members))
    scorer = {"kind": "test_plugins:Scorer", "model": str(tiny_teacher)}
    with pytest.raises(ConfigError, match=r"rollout.source asks teacher \(kind ensemble\) for actions"):
        train(make("rollout.source={student: 1, teacher: 1}", members={"a": members["a"], "b": scorer}))
