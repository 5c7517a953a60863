"""Episodes as rows of TRL's datasets, read by TRL itself; and back, as episodes to train on."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from rolling import Scripted, desk_episodes, rolled
from test_cli import refused
from test_cli import run as command

from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.config import load_config
from opd_agents.episode import Limits
from opd_agents.errors import ConfigError, DataError
from opd_agents.messages import read_conversation
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model, save_checkpoint
from opd_agents.recordings import texts
from opd_agents.rows import read_rows, sided
from opd_agents.runs import trajectory_row
from opd_agents.stored import recordings_of
from opd_agents.traces import export_messages, import_messages
from opd_agents.trainer import train
from opd_agents.types import Actor, Branch, KeyStep, Trajectory, from_dict, to_json

trl = pytest.importorskip("trl")
LIMITS = Limits(max_tokens_per_turn=64, max_context_tokens=2000)
WRONG = '{"name":"close_ticket","arguments":{}}'  # too early


class Desk(NamedTuple):
    """A student's ``file`` of episodes on the desk, two of a task, of which the first succeeds, and it."""

    file: Path
    episodes: list[Trajectory]
    chat: Chat
    model: Path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    asked = desk_episodes(6, group_size=2)
    experts = rolled(asked, ExpertPolicy())
    told = written(folder / "experts.jsonl", experts)
    export_messages(told, folder / "messages.jsonl")
    chat = Chat(build_word_tokenizer([*texts(read_rows(folder / "messages.jsonl")), WRONG]))
    script = {(t.uid, n): turn.action for t in experts for n, turn in enumerate(t.turns)}

    def acts(history: Any) -> str:
        number, fails = len(history.turns), int(history.uid.removeprefix("e")) % 2
        return WRONG if fails and number else script[history.uid, number]

    played = rolled(asked, Scripted(acts, chat=chat), chat, limits=LIMITS)
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
    save_checkpoint(
        folder / "model", build_model("llama", fields, chat.tokenizer, 0), chat.tokenizer, chat.settings
    )
    return Desk(written(folder / "played.jsonl", played), played, chat, folder / "model")


def written(file: Path, episodes: list[Trajectory]) -> Path:
    file.write_text("".join(to_json(trajectory_row(one)) + "\n" for one in episodes), encoding="utf-8")
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ids_of(trajectory: Trajectory) -> list[tuple[int, ...]]:
    return [ids for turn in trajectory.turns for ids in (turn.context_ids, turn.action_ids)]


def test_the_desk_is_as_it_is_meant(desk: Desk) -> None:
    assert [one.success for one in desk.episodes] == [True, False] * 3
    assert all(len(one.turns) > 1 and one.turns[0].calls for one in desk.episodes)


# ---- to TRL ----


def loaded(file: Path, folder: Path) -> Any:
    """As a user of TRL loads it."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))


def test_completions_are_the_tokens_of_the_episodes(desk: Desk, tmp_path: Path) -> None:
    from trl.data_utils import _tokenize, is_conversational

    told = export_messages(desk.file, tmp_path / "sft.jsonl", str(desk.model), form="completions")
    assert (told.rows, told.kind, told.skipped) == (6, "conversations", ())
    assert told.tokens == sum(len(turn.action_ids) for one in desk.episodes for turn in one.turns)
    for row, one in zip(loaded(tmp_path / "sft.jsonl", tmp_path), desk.episodes, strict=True):
        assert is_conversational(row) and row["success"] == one.success and row["reward"] == one.reward
        prompt = _tokenize(
            desk.chat.tokenizer, row["prompt"], tools=json.loads(row["tools"]), add_generation_prompt=True
        )["input_ids"]
        assert tuple(prompt) == one.turns[0].context_ids
        whole = _tokenize(
            desk.chat.tokenizer, row["prompt"] + row["completion"], tools=json.loads(row["tools"])
        )["input_ids"]
        mine = [i for ids in ids_of(one) for i in ids]
        assert whole[: len(mine)] == mine
        assert [message["role"] for message in row["completion"][:2]] == ["assistant", "tool"]
        assert isinstance(row["completion"][0]["tool_calls"][0]["function"]["arguments"], dict)


def test_preferences_are_read_by_trl(desk: Desk, tmp_path: Path) -> None:
    from trl.data_utils import apply_chat_template, maybe_extract_prompt, unpair_preference_dataset

    told = export_messages(desk.file, tmp_path / "dpo.jsonl", str(desk.model), form="preferences")
    assert (told.rows, told.kind) == (3, "pairs")
    data = loaded(tmp_path / "dpo.jsonl", tmp_path)
    for row, one, other in zip(data, desk.episodes[::2], desk.episodes[1::2], strict=True):
        assert row["id"] == f"{one.uid} / {other.uid}"
        assert maybe_extract_prompt(row) == row  # all that they have in common is in the prompt
        assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "tool"]
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert row["rejected"][0]["tool_calls"][0]["function"]["name"] == "close_ticket"
        keys = ("prompt", "chosen", "rejected")
        text = apply_chat_template(
            {key: row[key] for key in keys}, desk.chat.tokenizer, tools=json.loads(row["tools"])
        )
        ids = [i for ids in ids_of(one) for i in ids]
        whole = desk.chat.tokenizer.encode(text["prompt"] + text["chosen"], add_special_tokens=False)
        assert whole[: len(ids)] == ids
    unpaired = unpair_preference_dataset(data)
    assert unpaired["label"] == [True] * 3 + [False] * 3
    assert unpaired[3]["completion"] == data[0]["rejected"]


def branch_of(parent: Trajectory, source: Trajectory, turn: int, uid: str, **branch: Any) -> Trajectory:
    """``parent`` up to ``turn``, then ``source``."""
    inherited = [dataclasses.replace(one, weight=0.0) for one in parent.turns[:turn]]
    turns = (*inherited, *source.turns[turn:])
    named = Branch(parent.uid, turn, **branch)
    return dataclasses.replace(source, uid=uid, turns=turns, group="", branch=named)


def test_an_accepted_repair_stands_against_what_was_repaired(desk: Desk, tmp_path: Path) -> None:
    good, bad = desk.episodes[:2]
    repair = branch_of(bad, good, 1, "e1-repair")
    untried = branch_of(bad, good, 1, "e1-other", tried=False, better=False)
    last = dataclasses.replace(untried.turns[1], messages=(), observation="")
    untried = dataclasses.replace(untried, turns=(*untried.turns[:1], last))
    practised = [
        dataclasses.replace(one, group="p", branch=dataclasses.replace(one.branch, key=KeyStep.OTHER))
        for one in (branch_of(bad, good, 1, "p0"), branch_of(bad, bad, 1, "p1"))
    ]
    (folder := tmp_path / "run/trajectories").mkdir(parents=True)
    written(folder / "step-000001.jsonl", [bad, repair, untried, *practised])
    written(folder / "step-000002.jsonl", [repair, *practised])  # kept for a further step
    told = export_messages(tmp_path / "run", tmp_path / "dpo.jsonl", str(desk.model), form="preferences")
    grouped, repaired, preferred = rows_of(tmp_path / "dpo.jsonl")
    assert told.rows == 3 and told.turns == 4 + len(good.turns) + len(bad.turns) - 2
    assert grouped["id"] == "p0 / p1" and len(grouped["chosen"]) > 1
    assert repaired["id"] == "e1-repair / e1" and preferred["id"] == "e1 / e1-other"
    assert repaired["prompt"] == preferred["prompt"] == grouped["prompt"]
    assert repaired["chosen"] == grouped["chosen"][:1] == preferred["rejected"]
    assert repaired["rejected"] == grouped["rejected"][:1] == preferred["chosen"]
    export_messages(
        written(tmp_path / "one.jsonl", [repair]), tmp_path / "sft.jsonl", str(desk.model), form="completions"
    )
    (row,) = rows_of(tmp_path / "sft.jsonl")
    assert row["prompt"] == repaired["prompt"] and row["completion"][0] == repaired["chosen"][0]


def test_what_the_rows_cannot_say_is_refused(desk: Desk, tmp_path: Path) -> None:
    good, bad = desk.episodes[:2]
    middle = [dataclasses.replace(turn, weight=float(n != 1)) for n, turn in enumerate(good.turns)]
    source = written(tmp_path / "one.jsonl", [dataclasses.replace(good, turns=tuple(middle))])
    to, model = tmp_path / "out.jsonl", str(desk.model)
    with pytest.raises(DataError, match=r"one\.jsonl, line 1: an action after others is not to be learned"):
        export_messages(source, to, model, form="completions")
    with pytest.raises(DataError, match="There are no pairs to write"):
        export_messages(
            written(source, [bad, dataclasses.replace(bad, uid="x")]), to, model, form="preferences"
        )
    message = refused(
        "export-messages", str(source), "--format", "preferences", "--only-success", "--out", str(to)
    )
    assert "--only-success: `preferences` looks at failures" in message and not to.exists()


def test_prompts_of_an_environment(desk: Desk, tmp_path: Path) -> None:
    played = [*desk.episodes, dataclasses.replace(desk.episodes[0], uid="d", demonstration=True)]
    source, to = written(tmp_path / "played.jsonl", played), tmp_path / "grpo.jsonl"
    result = command("export-messages", str(source), "--format", "prompts", "--out", str(to))
    assert result.exit_code == 0 and "3 prompts; 0 skipped." in result.stdout
    for number, row in enumerate(loaded(to, tmp_path)):
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert (row["environment"], row["split"], row["task"]) == (tiny.DESK["id"], "train", str(number))
        assert json.loads(row["options"]) == {"level": "easy"}
        assert (row["seed"], row["episodes"], row["success"]) == (2 * number, 2, 0.5)
        (again,) = rolled(
            [dataclasses.replace(desk_episodes(6, group_size=2)[2 * number], seed=row["seed"])],
            ExpertPolicy(),
        )
        assert [m.content for m in again.messages] == [m["content"] for m in row["prompt"]]


# ---- and back ----


def imported(desk: Desk, file: Path, to: Path) -> list[Trajectory]:
    assert import_messages(file, to, str(desk.model)).skipped == ()
    return [from_dict(Trajectory, row["trajectory"]) for row in rows_of(to)]


@pytest.mark.parametrize("form", ["messages", "completions"])
def test_episodes_come_back_token_by_token(desk: Desk, tmp_path: Path, form: Any) -> None:
    export_messages(desk.file, tmp_path / "rows.jsonl", str(desk.model), form=form)
    back = imported(desk, tmp_path / "rows.jsonl", tmp_path / "back.jsonl")
    for one, other in zip(desk.episodes, back, strict=True):
        assert ids_of(one) == ids_of(other)
        assert (one.success, one.reward, one.task.id) == (other.success, other.reward, other.task.id)
        assert [turn.weight for turn in other.turns] == [1.0] * len(one.turns)


def test_preferences_come_back_as_two_episodes(desk: Desk, tmp_path: Path) -> None:
    rows, again = tmp_path / "dpo.jsonl", tmp_path / "again.jsonl"
    export_messages(desk.file, rows, str(desk.model), form="preferences")
    back = imported(desk, rows, tmp_path / "back.jsonl")
    assert [ids_of(one) for one in back] == [ids_of(one) for one in desk.episodes]
    assert [one.success for one in back] == [True, False] * 3
    assert all([turn.weight for turn in one.turns] == [0.0] + [1.0] * (len(one.turns) - 1) for one in back)
    export_messages(tmp_path / "back.jsonl", again, str(desk.model), form="preferences")
    for first, second in zip(rows_of(rows), rows_of(again), strict=True):
        assert {**first, "id": ""} == {**second, "id": ""}
    implicit = [
        {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "tools": row["tools"],
        }
        for row in rows_of(rows)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in implicit), encoding="utf-8")
    assert [ids_of(one) for one in imported(desk, rows, tmp_path / "more.jsonl")] == [
        ids_of(one) for one in back
    ]


def preferring(desk: Desk, dataset: Path, output: Path, *overrides: str) -> Any:
    sides = {"chosen": {"outcome": "success"}, "rejected": {"outcome": "failure"}}
    dpo = {"kind": "preference", "form": "dpo", "beta": 1.0, "reference": "start"} | sides
    raw = {
        "name": "prefer", "output": str(output), "student": {"model": str(desk.model)},
        "references": {"start": {"kind": "self"}}, "loss": {"components": {"dpo": dpo}},
        "rollout": {"source": {"dataset": str(dataset)}, "episodes_per_step": 4, "group_size": 2},
        "trainer": {"steps": 3, "learning_rate": 0.01, "tensorboard": False, "gradient_shares_every": 100},
    }  # fmt: skip
    return load_config(raw, *overrides)


def test_a_run_learns_from_preferences(desk: Desk, tmp_path: Path) -> None:
    export_messages(desk.file, tmp_path / "dpo.jsonl", str(desk.model), form="preferences")
    config = preferring(desk, tmp_path / "dpo.jsonl", tmp_path / "run")
    recordings = recordings_of(config, desk.chat)
    assert recordings is not None
    drawn = [one for step in range(3) for one in recordings.draw(step)]
    assert [one.success for one in drawn] == [True, False] * 6
    assert [one.group for one in drawn[::2]] == [one.group for one in drawn[1::2]]
    assert len({one.group for one in drawn}) == 6 and all(one.turns[1].actor is Actor.CORPUS for one in drawn)
    tasks = [one.task.id for one in drawn]
    assert tasks[::2] == tasks[1::2] and all(tasks.count(task) == 4 for task in tasks)  # two epochs
    losses = [row["loss"] for row in tiny.metrics(train(config))]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5


def test_data_that_cannot_be_compared_is_refused(desk: Desk, tmp_path: Path) -> None:
    conversations, rows = tmp_path / "sft.jsonl", tmp_path / "dpo.jsonl"
    export_messages(desk.file, conversations, str(desk.model), form="completions")
    export_messages(desk.file, rows, str(desk.model), form="preferences")
    with pytest.raises(DataError, match=r"holds conversations, .*of no group.*`chosen` and `rejected`"):
        train(preferring(desk, conversations, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"two episodes each: take rollout\.group_size: 2, not 4"):
        train(preferring(desk, rows, tmp_path / "run", "rollout.group_size=4"))
    rows.write_text(rows.read_text() + conversations.read_text(), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 4: `chosen` and `rejected` must be lists of messages"):
        train(preferring(desk, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    both = sided(read_rows(conversations))
    assert len(both) == 6 and read_conversation(both[0], both.where(0)).success
