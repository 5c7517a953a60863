"""Code of the user's by ``module:name``: rewards, credit functions, teachers."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from rolling import trajectory, turn
from test_task_files import sums, write
from torch import Tensor

from opd_agents.batch import Packed, pack
from opd_agents.composition import reward_advantages
from opd_agents.config import RewardPart, RunConfig, Select, load_config
from opd_agents.credit import assign_credit, factors, with_factors
from opd_agents.envs import import_plugins
from opd_agents.errors import AlignmentError, ConfigError, RunFolderError, UserError
from opd_agents.plugins import load_credit, load_object, load_reward
from opd_agents.runs import newest_checkpoint
from opd_agents.session import Session
from opd_agents.teachers import Capability, HiddenStates
from opd_agents.teachers.local import LocalTeacher
from opd_agents.trainer import train
from opd_agents.types import Credit, Outcome, Trajectory

HERE = "test_plugins"
PROMPTS = "opd_agents/PromptTask-v0"


# ---- a user's code ----


def short(trajectory: Trajectory) -> float:
    return -float(trajectory.n_action_tokens)


def surprising(trajectory: Trajectory, credits: Sequence[Credit]) -> list[float]:
    """Weighs an action by how far the teacher is from it."""
    return [1.0 + (credit.kl_mean or 0.0) for credit in credits]


def last_only(trajectory: Trajectory, credits: Sequence[Credit]) -> list[float]:
    return [0.0] * (len(trajectory.turns) - 1) + [2.0]


def nothing(trajectory: Trajectory, credits: Sequence[Credit]) -> list[float]:
    return [0.0] * len(trajectory.turns)


def not_a_number(trajectory: Trajectory, *credits: Any) -> Any:
    return [math.nan] * len(trajectory.turns) if credits else math.nan


def too_many(trajectory: Trajectory, credits: Sequence[Credit]) -> list[float]:
    return [1.0] * (len(trajectory.turns) + 1)


def broken(trajectory: Trajectory, *credits: Any) -> Any:
    raise KeyError("price")


class Scaled(LocalTeacher):
    """A teacher that is surer of itself than its checkpoint."""

    def __init__(self, path: str, chat: Any, *, sharpness: float = 1.0, **settings: Any) -> None:
        super().__init__(path, chat, **settings)
        self.sharpness = sharpness

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> HiddenStates:
        signal = super().score(packed, max_tokens, keep)
        return HiddenStates(signal.hidden * self.sharpness, signal.head)


class Wrapped:
    """Not derived from anything: another teacher, whose words it passes on."""

    can: ClassVar = frozenset({Capability.HIDDEN_STATES, Capability.ACT})

    def __init__(self, path: str | None, chat: Any, *, dtype: str, temperature: float, within: str) -> None:
        assert path is None
        self.inner = LocalTeacher(within, chat, dtype=dtype, temperature=temperature)
        self.act, self.score, self.greedy = self.inner.act, self.inner.score, self.inner.greedy
        self.tokens = self.flops = 0


class Actor(Scaled):
    can: ClassVar = frozenset({Capability.ACT})

    def score(self, *arguments: Any) -> HiddenStates:
        raise AssertionError("a teacher that gives nothing is not asked")


class Scorer:
    """Has no more than scoring takes."""

    can: ClassVar = frozenset({Capability.HIDDEN_STATES})

    def __init__(self, path: str, chat: Any, **settings: Any) -> None:
        self.score = LocalTeacher(path, chat, **settings).score
        self.tokens = self.flops = 0


class Misaligned(Scaled):
    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> HiddenStates:
        signal = super().score(packed, max_tokens, keep)
        return HiddenStates(signal.hidden[1:], signal.head)


class Mute:
    can: ClassVar = frozenset({Capability.HIDDEN_STATES, Capability.ACT})

    def __init__(self, path: str, chat: Any, **settings: Any) -> None:
        self.tokens = 0


# ---- load_object ----


def test_objects_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_object("math:isfinite", "x") is math.isfinite
    (tmp_path / "my_rewards_here.py").write_text("def exact(t):\n    return 1.0\n")
    with pytest.raises(
        UserError, match=r"my_rewards_here cannot be imported.*name its file under `imports:`"
    ):
        load_object("my_rewards_here:exact", "x")
    monkeypatch.setattr("sys.path", list(sys.path))
    import_plugins([str(tmp_path / "my_rewards_here.py")])
    assert load_reward("my_rewards_here:exact", "x")(trajectory([])) == 1.0


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("math", "function", "loss: 'math' is no 'module:name'"),
        ("math:", "function", "'math:' is no 'module:name'"),
        ("math:is.finite", "function", "is no 'module:name'"),
        ("math:isfinit", "function", "loss: module math has no function isfinit"),
        ("math:pi", "function", "math:pi is no function but float 3.14"),
        ("math:isfinite", "class", "math:isfinite is no class but builtin_function"),
        ("no_such_module.deep:f", "function", "no_such_module.deep cannot be imported.*Install it"),
        ("broken_on_import:f", "function", "cannot be imported: ZeroDivisionError: division by zero.$"),
    ],
)
def test_what_cannot_be_loaded_is_explained(
    reference: str, kind: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        load_object(reference, "loss", kind)


# ---- rewards and credit ----


def episodes() -> list[Trajectory]:
    """Two episodes of one group, of one and two turns."""
    first, second = turn([1], [2, 3]), turn([4], [5])
    one = trajectory([first, second], uid="one", group="g", reward=1.0, outcome=Outcome.SUCCESS)
    return [one, trajectory([turn([1], [2])], uid="two", group="g", reward=0.0)]


def test_a_reward_replaces_the_environments_in_the_advantages() -> None:
    part = RewardPart(normalise="none")
    assert reward_advantages(episodes(), part, Select()).tolist() == [0.5, -0.5]
    reward = load_reward(f"{HERE}:short", "k")
    assert reward_advantages(episodes(), part, Select(), reward).tolist() == [-1.0, 1.0]  # -3 and -1 tokens


def test_a_credit_function_weighs_every_turn() -> None:
    packed = pack(episodes())
    plain = assign_credit(packed, episodes(), None, {}, {})
    credits = with_factors(packed, episodes(), plain, {"c": load_credit(f"{HERE}:last_only", "k")})
    assert [[credit.factors for credit in own] for own in credits] == [[{"c": 0.0}, {"c": 2.0}], [{"c": 2.0}]]
    assert factors(packed, credits, "c").tolist() == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_reward, "not_a_number", "gave nan for trajectory one; it must be finite"),
        (load_reward, "broken", "failed on trajectory one: KeyError: 'price'"),
        (load_credit, "not_a_number", "gave nan for trajectory one"),
        (load_credit, "broken", "failed on trajectory one: KeyError"),
        (load_credit, "too_many", "gave 3 weights for trajectory one, which has 2 turns"),
        (load_credit, "short", "failed on trajectory one: TypeError"),
    ],
)
def test_results_that_cannot_be_used_name_the_function(
    load: Callable[..., Any], name: str, message: str
) -> None:
    function = load(f"{HERE}:{name}", "loss.components.c.credit")
    with pytest.raises(UserError, match=rf"loss.components.c.credit \({HERE}:{name}\) {message}"):
        function(episodes()[0], *([[Credit(), Credit()]] if load is load_credit else []))


# ---- in a run ----


def run(tmp_path: Path, checkpoint: Path, *overrides: str, **changes: Any) -> RunConfig:
    """Prompts with a custom reward, credit function and teacher."""
    tasks = write(tmp_path / "sums.jsonl", [row | {"prompt": f"Say {i}."} for i, row in enumerate(sums(7))])
    options = {"tasks": tasks, "verifier": f"{HERE}:even"}
    components = {
        "distill": tiny.DISTILL | {"credit": f"{HERE}:surprising"},
        "verifier": {"kind": "policy", "rewards": {"brief": {"reward": f"{HERE}:short"}}},
    }
    raw = {
        "environments": [{"id": PROMPTS, "options": options}],
        "loss": {"components": components},
        "teacher": {"kind": f"{HERE}:Scaled", "model": str(checkpoint), "options": {"sharpness": 1.5}},
        "correction": None,
    }
    made = tiny.mix(tmp_path / "run", checkpoint, **raw | changes)
    return load_config(made.model_dump(mode="json", exclude_unset=True), "trainer.steps=3", *overrides)


def even(answer: str, row: Any) -> bool:
    return len(answer) % 2 == 0


def test_a_run_with_custom_code_and_its_resume(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first checkpoint, the run ends as the uninterrupted one does, bit for bit."""
    straight = train(run(tmp_path, tiny_teacher))
    rows = tiny.metrics(straight)
    assert len(rows) == 3 and all(math.isfinite(row["loss/distill"]) for row in rows)
    state = tiny.final_state(straight)
    lines = [json.loads(line) for text in state["trajectories"].values() for line in text.splitlines()]
    assert len(lines) == 24 and len({line["trajectory"]["task"]["id"] for line in lines}) == 6  # of 7 tasks
    credits = [credit for line in lines for credit in line["credit"]]
    assert all(credit["factors"] == {"distill": 1 + credit["kl_mean"]} for credit in credits)

    config = run(tmp_path, tiny_teacher, f"output={tmp_path}/resumed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "advance", interrupted_at_step_3)
        train(config)
    assert tiny.final_state(train(config, resume=True)) == state
    write(tmp_path / "sums.jsonl", sums(8))
    (tmp_path / "resumed" / "summary.json").unlink()  # as if it were not finished
    with pytest.raises(RunFolderError, match=r"data of \[7\] tasks.*now has \[8\]"):
        train(config, resume=True)


ADVANCE = Session.advance


def interrupted_at_step_3(session: Session, **tokens: int) -> None:
    if session.step == 2:  # its checkpoint is the newest
        raise KeyboardInterrupt
    ADVANCE(session, **tokens)


def test_a_teacher_of_ones_own_class_teaches_as_the_one_within(tmp_path: Path, tiny_teacher: Path) -> None:
    checkpoint = newest_checkpoint(str(tiny_teacher))
    wrapped = {"kind": f"{HERE}:Wrapped", "options": {"within": checkpoint}}
    local = {"kind": "local", "model": str(tiny_teacher)}
    first, second = (
        tiny.metrics(train(run(tmp_path, tiny_teacher, f"output={tmp_path}/{name}", teacher=teacher)))
        for name, teacher in (("wrapped", wrapped), ("local", local))
    )
    assert [row["loss/distill"] for row in first] == [row["loss/distill"] for row in second]


def test_a_teacher_that_only_acts(tmp_path: Path, tiny_teacher: Path) -> None:
    acts = {"kind": f"{HERE}:Actor", "model": str(tiny_teacher)}
    imitate = {"components": {"imitate": {"kind": "ce"}}}
    rollout = {"source": "teacher", "episodes_per_step": 4, "group_size": 1, **tiny.LIMITS}
    changes = {"teacher": acts, "loss": imitate, "rollout": rollout}
    folder = train(run(tmp_path, tiny_teacher, "trainer.steps=1", **changes))
    assert tiny.metrics(folder)[0]["loss/imitate"] > 0
    with pytest.raises(ConfigError, match=r"Actor.*it has `act`. Take `kind: local`"):
        train(run(tmp_path, tiny_teacher, f"output={tmp_path}/other", teacher=acts))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("rollout.source", {"rollout": {"source": {"student": 0.5, "teacher": 0.5}, **tiny.LIMITS}}),
        (
            "rollout.demonstrations",
            {"rollout": {"demonstrations": {"actor": "teacher"}, **tiny.LIMITS}},
        ),
        ("correction", {"correction": {}}),
    ],
)
def test_a_teacher_that_only_scores_takes_no_turns(
    key: str, changes: dict[str, Any], tmp_path: Path, tiny_teacher: Path
) -> None:
    scores = {"kind": f"{HERE}:Scorer", "model": str(tiny_teacher)}
    changes = {"loss": {"components": {"distill": tiny.DISTILL}}} | changes
    folder = train(run(tmp_path, tiny_teacher, "trainer.steps=1", teacher=scores))
    assert tiny.metrics(folder)[0]["loss/distill"] > 0
    with pytest.raises(
        ConfigError, match=rf"{key} asks teacher .*Scorer.* `act`, but it has `hidden_states`"
    ):
        train(run(tmp_path, tiny_teacher, f"output={tmp_path}/other", teacher=scores, **changes))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ({"kind": f"{HERE}:Missing"}, UserError, "teacher.kind: module test_plugins has no class Missing"),
        ({"kind": f"{HERE}:short"}, UserError, "is no class but function"),
        ({"kind": "pathlib:Path"}, ConfigError, "pathlib:Path lacks `can`"),
        ({"kind": f"{HERE}:Wrapped", "options": {"wihtin": "x"}}, ConfigError, "cannot be made with.*wihtin"),
        ({"kind": f"{HERE}:Mute"}, ConfigError, "lacks act, greedy, score, flops"),
        ({"kind": f"{HERE}:Misaligned"}, AlignmentError, "hidden states for .* action tokens"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(
    teacher: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    settings = {"model": str(tiny_teacher)} | teacher
    with pytest.raises(error, match=message):
        train(run(tmp_path, tiny_teacher, teacher=settings))


def test_plugins_are_resolved_before_a_folder_is_made(tmp_path: Path, tiny_teacher: Path) -> None:
    missing = f"{HERE}:missing"
    for key, own in {
        "rewards.brief.reward": {"rewards": {"brief": {"reward": missing}}},
        "credit": {"rewards": {"brief": {}}, "credit": missing},
    }.items():
        components = {"c": {"kind": "policy", **own}}
        with pytest.raises(
            UserError, match=f"loss.components.c.{key}: module {HERE} has no function missing"
        ):
            train(run(tmp_path, tiny_teacher, loss={"components": components}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"unknown key `loss\.components\.c\.reward`"):
        run(tmp_path, tiny_teacher, loss={"components": {"c": tiny.DISTILL | {"reward": f"{HERE}:short"}}})
    with pytest.raises(ConfigError, match="reward"):
        run(
            tmp_path,
            tiny_teacher,
            loss={"components": {"c": tiny.POLICY | {"rewards": {"brief": {"reward": "short"}}}}},
        )


def test_a_step_that_a_credit_function_silences_changes_nothing(tmp_path: Path, tiny_teacher: Path) -> None:
    components = {"distill": tiny.DISTILL | {"credit": f"{HERE}:nothing"}}
    config = run(tmp_path, tiny_teacher, "trainer.steps=1", loss={"components": components})
    folder = train(config)
    assert "loss/distill" not in tiny.metrics(folder)[0]
    assert math.isclose(tiny.metrics(folder)[0]["rollout/episodes"], 8)
