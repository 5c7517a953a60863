"""Short trainings of tiny models: what a run leaves, and that every part of the loop is alive."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from opd_agents import updates
from opd_agents.config import load_config
from opd_agents.errors import (
    AlignmentError,
    CheckpointError,
    ConfigError,
    EnvironmentContractError,
    RunFolderError,
    UnknownName,
)
from opd_agents.progress import Interrupted, StopSignal
from opd_agents.runs import checkpoints_in, latest_checkpoint
from opd_agents.starting import load_session
from opd_agents.teachers import Capability, SampledLogprobs
from opd_agents.teachers.local import LocalTeacher
from opd_agents.trainer import train, train_seeds
from opd_agents.types import Actor, Credit, Outcome, Trajectory, from_dict, to_dict


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run with distillation, verifier's reward, correction, evaluation and TensorBoard."""
    evaluation = {"suite": tiny.SUITE, "limit": 6, "every": 2}
    output = tmp_path_factory.mktemp("mixed") / "run"
    return train(tiny.mix(output, tiny_teacher, "trainer.tensorboard=true", evaluation=evaluation))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All trajectory lines, in the order of steps."""
    files = sorted((run / "trajectories").glob("step-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


# ---- what is learned ----


def test_sft_lowers_its_loss(tiny_teacher: Path) -> None:
    losses = [row["loss"] for row in tiny.metrics(tiny_teacher)]
    assert losses[-1] < losses[0] / 2
    assert all(row["rollout/success"] == 1 for row in tiny.metrics(tiny_teacher))  # the expert's


def test_a_mixture_may_lack_one_of_its_actors_in_a_step(tmp_path: Path, tiny_teacher: Path) -> None:
    components = {"likelihood": {"kind": "ce", "select": {"actor": "expert"}}}
    rollout = {"episodes_per_step": 1, "source": {"student": 0.9, "expert": 0.1}, **tiny.LIMITS}
    mixture = tiny.mix(
        tmp_path / "run", tiny_teacher, "trainer.steps=8", loss={"components": components}, rollout=rollout,
        correction=None, teacher=None,
    )  # fmt: skip
    taught = ["loss" in row for row in tiny.metrics(train(mixture))]
    assert len(taught) == 8 and {True, False} == set(taught)


def test_a_step_may_lack_what_the_loss_looks_for(tmp_path: Path, tiny_teacher: Path) -> None:
    """As rejection sampling does, where no episode of a step succeeds; a loss that could never see a token is
    refused."""
    components = {"likelihood": {"kind": "ce", "select": {"outcome": "success"}}}
    rollout = {"episodes_per_step": 4, "max_action_tokens": 1, **tiny.LIMITS}  # none is finished
    short = tiny.mix(
        tmp_path / "run", tiny_teacher, "trainer.steps=2", loss={"components": components}, rollout=rollout,
        correction=None, teacher=None,
    )  # fmt: skip
    rows = tiny.metrics(train(short))
    assert [row["rollout/unfinished"] for row in rows] == [1, 1] and not any("loss" in row for row in rows)
    components = {"likelihood": {"kind": "ce", "select": {"spans": ["call"], "outcome": "success"}}}
    never = tiny.mix(
        tmp_path / "never", tiny_teacher, loss={"components": components}, correction=None, teacher=None
    )
    with pytest.raises(ConfigError, match="no loss component selects any"):
        train(never)


class Speechless(LocalTeacher):
    """Gives no token any probability."""

    can = frozenset({Capability.SAMPLED_LOGPROBS, Capability.ACT})

    def score(self, packed: Any, max_tokens: int, keep: Any = None) -> Any:
        return SampledLogprobs(torch.full((len(packed.target),), -math.inf))


def test_an_infinite_divergence_stops_the_run(tmp_path: Path, tiny_teacher: Path) -> None:
    """It has no gradient, so that the run would go on and learn nothing."""
    distill = {"kind": "distill", "signal": "sampled"}
    config = tiny.mix(
        tmp_path / "run", tiny_teacher, loss={"components": {"distill": distill}}, correction=None,
        teacher={"kind": "test_trainer:Speechless", "model": str(tiny_teacher)},
    )  # fmt: skip
    with pytest.raises(AlignmentError, match="infinite divergence means a token"):
        train(config, probes=False)


def test_distillation_lowers_the_divergence(tmp_path: Path, tiny_teacher: Path) -> None:
    distill = {"components": {"distill": tiny.DISTILL}}
    config = tiny.mix(
        tmp_path / "run", tiny_teacher, "trainer.learning_rate=0.02", loss=distill, correction=None
    )
    rows = tiny.metrics(train(config))
    assert rows[-1]["distill/kl"] < rows[0]["distill/kl"] / 1.5
    assert "groups/total" not in rows[0]


def test_grpo_needs_no_teacher_and_raises_the_reward(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny.mix(
        tmp_path / "run", tiny_teacher, "trainer.steps=12", "trainer.learning_rate=0.03",
        "rollout.episodes_per_step=32", "rollout.group_size=8", "teacher=",
        loss={"components": {"verifier": tiny.POLICY}}, correction=None,
    )  # fmt: skip
    rows = tiny.metrics(train(config))
    assert sum(row["groups/nonzero"] for row in rows) > 0
    assert sum(row["rollout/reward"] for row in rows[-3:]) > 1.2 * sum(
        row["rollout/reward"] for row in rows[:3]
    )
    assert rows[-1]["total/teacher_tokens"] == 0
    assert "distill/kl" not in rows[0]


def test_the_desk_is_learned_by_the_same_loop(tmp_path: Path) -> None:
    brief = {"episodes_per_step": 4, "max_tokens_per_turn": 12, "max_context_tokens": 160}
    sft = tiny.sft(tmp_path / "sft", environments=[tiny.DESK], rollout={"source": "expert", **brief})
    teacher = train(load_config(sft, "trainer.steps=3"))
    config = tiny.mix(
        tmp_path / "opd", teacher, "trainer.steps=2",
        environments=[tiny.DESK], rollout={"group_size": 2, **brief},
        evaluation={"suite": "orderdesk", "limit": 2, "every": 2, "at_start": False},
    )  # fmt: skip
    rows = tiny.metrics(train(config))
    assert [row["rollout/errors"] for row in rows] == [0, 0]
    assert 0 <= rows[-1]["eval/success"] <= 1
    assert {row["trajectory"]["env_kwargs"]["level"] for row in rows_of(tmp_path / "opd")} == {"easy"}


# ---- what a run leaves ----


def test_metrics_are_one_flat_line_a_step(mixed: Path) -> None:
    text = (mixed / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    rows = tiny.metrics(mixed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(type(row["step"]) is int for row in rows)
    for row in rows:
        for key, value in row.items():
            assert isinstance(value, (int, float, type(None))), key
            assert value is None or math.isfinite(value), key


def test_no_part_is_inert(mixed: Path) -> None:
    rows = tiny.metrics(mixed)
    assert sum(row["correction/accepted"] for row in rows) > 0
    assert sum(row["groups/nonzero"] for row in rows) > 0
    shares = [row for row in rows if "grad_share/distill" in row]
    assert len(shares) == 3  # steps 1, 3, 5: every second
    for name in ("distill", "verifier", "correction"):
        assert sum(row[f"grad_share/{name}"] for row in shares) > 0
    for row in shares:
        assert sum(value for key, value in row.items() if key.startswith("grad_share/")) == pytest.approx(1)
    for row in rows:
        parts = [value for key, value in row.items() if key.startswith("loss/")]
        assert row["loss"] == pytest.approx(sum(parts))


def test_totals_add_up(mixed: Path) -> None:
    rows = tiny.metrics(mixed)
    assert rows[-1]["total/generated_tokens"] == sum(row["rollout/generated_tokens"] for row in rows)
    for key in ("total/generated_tokens", "total/correction_tokens", "total/teacher_tokens", "total/flops"):
        values = [row[key] for row in rows]
        assert values == sorted(values)
        assert values[-1] > 0
        assert type(values[-1]) is int
    students = [t for t in trajectories(mixed) if t.branch is None]
    rolled_out = sum(t.n_action_tokens for t in students)
    assert rows[-1]["total/generated_tokens"] - rows[-1]["total/correction_tokens"] == rolled_out


def test_evaluation_rows(mixed: Path) -> None:
    rows = tiny.metrics(mixed)
    assert [row["step"] for row in rows if "eval/success" in row] == [2, 4]
    for row in rows[1::2]:
        assert 0 <= row["eval/success_low"] <= row["eval/success"] <= row["eval/success_high"] <= 1
        assert 0 <= row["eval/success_greedy"] <= 1
    summary = json.loads((mixed / "summary.json").read_text())
    assert summary["evaluation"]["success"] == rows[3]["eval/success"]
    assert summary["evaluation"]["episodes"] == 6


def test_the_summary_and_the_board(mixed: Path) -> None:
    summary, last = json.loads((mixed / "summary.json").read_text()), tiny.metrics(mixed)[-1]
    assert (summary["name"], summary["steps"]) == ("tiny", 5)
    assert summary["seconds"] > 0
    assert summary["total/flops"] == last["total/flops"]
    assert summary["total/teacher_tokens"] == last["total/teacher_tokens"]
    assert list((mixed / "tensorboard").glob("events.*"))
    assert [path.name for path in checkpoints_in(mixed)] == ["step-4", "step-5"]


def trajectories(run: Path) -> list[Trajectory]:
    return [from_dict(Trajectory, row["trajectory"]) for row in rows_of(run)]


def test_trajectories_are_read_as_they_were_written(mixed: Path) -> None:
    rows = rows_of(mixed)
    assert len(rows) >= 40
    for row in rows:
        trajectory = from_dict(Trajectory, row["trajectory"])
        assert to_dict(trajectory) == row["trajectory"]
        assert type(trajectory.outcome) is Outcome
        assert all(type(turn.actor) is Actor for turn in trajectory.turns)
        versions = {turn.policy_version for turn in trajectory.turns if turn.actor is Actor.STUDENT}
        assert versions <= {int(trajectory.uid[:6])}  # the step that it was rolled out in
        assert hash(trajectory.turns[0].action_ids) == hash(
            tuple(row["trajectory"]["turns"][0]["action_ids"])
        )
        assert [to_dict(from_dict(Credit, credit)) for credit in row["credit"]] == row["credit"]
        assert len(row["credit"]) == len(trajectory.turns)


def test_repairs_are_told_on_the_failed_parent_and_their_branches_stored(mixed: Path) -> None:
    rows = rows_of(mixed)
    repaired = [row for row in rows if row["repair"] and row["repair"]["accepted"]]
    branches = {
        (branch["parent"], branch["turn"]): row for row in rows if (branch := row["trajectory"]["branch"])
    }
    assert repaired
    assert len(branches) == len(repaired)
    for row in repaired:
        turn = row["repair"]["turn"]
        assert row["trajectory"]["outcome"] != "success"
        assert row["repair"]["student_action"] == row["trajectory"]["turns"][turn]["action"]
        assert row["repair"]["evidence"]["repair"] > row["repair"]["evidence"]["own"]
        assert row["credit"][turn]["correction"] == "accepted"
        branch = branches[row["trajectory"]["uid"], turn]["trajectory"]
        assert branch["outcome"] == "success"
        assert branch["turns"][turn]["action"] == row["repair"]["teacher_action"]
        assert branch["turns"][turn]["actor"] == "teacher"
        assert [t["weight"] for t in branch["turns"][:turn]] == [0.0] * turn


def test_a_run_can_be_started_again_from_its_config(mixed: Path, tmp_path: Path) -> None:
    again = train(load_config(mixed / "config.yaml", f"output={tmp_path / 'again'}"))
    assert tiny.final_state(again) == tiny.final_state(mixed)


def test_a_config_without_a_chat_takes_the_checkpoints_also_when_written_out(
    mixed: Path, tmp_path: Path, tiny_teacher: Path
) -> None:
    config = tiny.mix(
        tmp_path / "a",
        tiny_teacher,
        "trainer.steps=1",
        student={"model": str(mixed)},
        chat={},
        evaluation=None,
    )
    run = train(config)
    again = train(load_config(run / "config.yaml", f"output={tmp_path / 'b'}"))
    assert tiny.final_state(again) == tiny.final_state(run)
    chats = [latest_checkpoint(folder) / "opd_agents_chat.json" for folder in (mixed, run)]
    assert chats[0].read_text() == chats[1].read_text()


# ---- the same config, the same run ----


def test_a_config_gives_the_same_run_bit_for_bit(tmp_path: Path, tiny_teacher: Path) -> None:
    first, second, other = (
        tiny.final_state(train(tiny.mix(tmp_path / name, tiny_teacher, f"seed={seed}")))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


# ---- how a run ends and goes on ----


def test_a_budget_of_flops_stops_the_run(tmp_path: Path, tiny_teacher: Path) -> None:
    spent = [row["total/flops"] for row in tiny.metrics(tiny_teacher)]
    config = load_config(tiny.sft(tmp_path / "run"), f"trainer.flops={spent[4] - 1}", "trainer.steps=100")
    rows = tiny.metrics(train(config))
    assert [row["total/flops"] for row in rows] == spent[:5]
    assert rows[-1]["progress"] == 1
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step-5"]


def test_an_update_costs_what_its_passes_cost(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by hand: a forward and twice as much backward, over all tokens of the rows passed. Where shares
    of the gradient are measured, each component has passes of its own; they are paid as well."""
    passes: list[tuple[int, int, int]] = []
    spent: list[float] = []
    losses, accumulate = updates.micro_losses, updates.accumulate

    def counting(*given: Any, micro: Any, plan: Any, **others: Any) -> Any:
        passes.append((micro.n_tokens, micro.ids.shape[1], len(plan.parts)))
        return losses(*given, micro=micro, plan=plan, **others)

    def costing(session: Any, *given: Any, **options: Any) -> Any:
        before = session.totals["flops"]
        measured = accumulate(session, *given, **options)
        spent.append(session.totals["flops"] - before)
        spent.append(by_hand(session, passes))
        components = 1 if options["shares"] else len(session.config.loss.components)
        assert passes and all(count == components for *_, count in passes)
        passes.clear()
        return measured

    def by_hand(session: Any, passes: list[tuple[int, int, int]]) -> float:
        layer = 4 * 16 * 16 + 3 * 16 * 32  # attention's four matrices, the three of the MLP: tiny.BUILD
        weights = 2 * layer + 16 * len(session.tokenizer)
        attention = (
            2 * 2 * 2 * 16
        )  # layers, two products of 2 FLOPs each, all heads' width; times the context
        return sum(3 * n * (2 * weights + attention * width / 2) for n, width, _ in passes)

    monkeypatch.setattr(updates, "micro_losses", counting)
    monkeypatch.setattr(updates, "accumulate", costing)
    config = tiny.mix(tmp_path / "run", tiny_teacher, "trainer.micro_batch_tokens=100", "trainer.steps=2")
    train(config)
    assert len(spent) == 2 * 2 * 2  # steps, updates, pairs; shares are measured in the first of the four
    assert spent[::2] == pytest.approx(spent[1::2])
    assert spent[0] > 1.5 * max(spent[2::2])


def test_warmup_and_schedule_set_the_learning_rate(tmp_path: Path) -> None:
    schedule = "trainer.learning_rate={kind: linear, start: 0.04, end: 0}"
    rows = tiny.metrics(
        train(load_config(tiny.sft(tmp_path), schedule, "trainer.steps=4", "trainer.warmup_steps=1"))
    )
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.02, 0.03, 0.02, 0.01])


def staged(output: Path, teacher: Path) -> dict[str, Any]:
    raw = tiny.mix(output, teacher).model_dump(mode="json", exclude_unset=True)
    loss = raw.pop("loss")
    correction = raw.pop("correction")
    cold = {"method": "sft", "rollout": {"source": "expert"}, "trainer": {"steps": 3}}
    return raw | {"stages": {"warm": cold, "improve": {"loss": loss, "correction": correction}}}


def test_stages_start_from_the_last_weights_with_a_fresh_optimizer(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def spy(*arguments: Any) -> Any:
        session = load_session(*arguments)
        weights = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
        started.append(
            (weights, [dict(o.state) for o in session.optimizer.optimizers], session.totals["flops"])
        )
        return session

    monkeypatch.setattr("opd_agents.trainer.load_session", spy)
    run = train(load_config(staged(tmp_path / "run", tiny_teacher)))
    assert {path.parent.name for path in run.glob("*/config.yaml")} == {"warm", "improve"}
    left = load_file(latest_checkpoint(run / "warm") / "model.safetensors")
    weights, optimizers, flops = started[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in left.items())
    assert all(not state for state in optimizers)
    assert flops == 0
    summary = json.loads((run / "summary.json").read_text())
    assert {name: stage["steps"] for name, stage in summary["stages"].items()} == {"warm": 3, "improve": 5}
    assert latest_checkpoint(run) == run / "improve/checkpoints/step-5"
    assert "stages" not in json.loads((run / "warm/summary.json").read_text())


def test_seeds_have_a_folder_each(tmp_path: Path) -> None:
    config = load_config(tiny.sft(tmp_path / "run"), "trainer.steps=2")
    runs = train_seeds(config, [0, 3])
    assert runs == [tmp_path / "run/seed-0", tmp_path / "run/seed-3"]
    a, b = (load_file(latest_checkpoint(run) / "model.safetensors") for run in runs)
    assert not torch.equal(a["model.norm.weight"], b["model.norm.weight"])
    with pytest.raises(RunFolderError, match="seed-0"):
        train_seeds(config, [0, 4])
    assert not (tmp_path / "run/seed-4").exists()
    assert train_seeds(config, [0, 4], resume=True)[1] == tmp_path / "run/seed-4"
    assert (tmp_path / "run/seed-4/summary.json").is_file()


# ---- mistakes ----


def test_another_vocabulary_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny.mix(tmp_path / "run", tiny_teacher, "student.build.tokenizer=", environments=[tiny.DESK])
    with pytest.raises(ConfigError, match="vocabulary"):
        train(config)
    train(tiny.mix(tmp_path / "run", tiny_teacher))  # the corrected run is not told that there is one


def test_a_step_whose_episodes_all_fail_stops_the_run(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: tiny.Parity, task: Any) -> str:
        raise OSError("no database")

    config = tiny.mix(tmp_path / "run", tiny_teacher)
    monkeypatch.setattr(tiny.Parity, "begin", broken)
    with pytest.raises(EnvironmentContractError, match=r"All \d+ episodes of step 1 .* OSError: no database"):
        train(config)


def test_the_configs_number_of_threads_is_set(tmp_path: Path, tiny_teacher: Path) -> None:
    before = torch.get_num_threads()
    try:
        train(tiny.mix(tmp_path / "run", tiny_teacher, "trainer.threads=2", "trainer.steps=1"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("override", "error", "part"),
    [
        ("teacher.model=no/such/teacher", CheckpointError, "no/such/teacher"),
        ("student={model: no/such/student}", CheckpointError, "no/such/student"),
        ("environments=[{id: tiny/Party-v0}]", UnknownName, "tiny/Parity-v0"),
        ("environments=[{id: tiny/Parity-v0, split: trian}]", UnknownName, "train"),
        ("environments=[{id: tiny/Parity-v0, limit: 21}]", ConfigError, "20 tasks"),
        ("evaluation={suite: orderdsk}", UnknownName, "orderdesk"),
        ("evaluation={suite: tiny/Parity-v0, split: valdation}", UnknownName, "validation"),
        ("imports=[no_such_module]", ValueError, "no_such_module"),
    ],
)
def test_what_does_not_exist_is_named(
    tmp_path: Path, tiny_teacher: Path, override: str, error: type[Exception], part: str
) -> None:
    extra = ["student.build="] if override.startswith("student") else []
    with pytest.raises(error, match=part):
        train(tiny.mix(tmp_path / "run", tiny_teacher, override, *extra))
    assert not (tmp_path / "run").exists()  # so that the mistake can be put right with the same output


def test_a_mistake_in_a_later_stage_is_told_before_the_first_is_trained(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    with pytest.raises(CheckpointError, match="no/such/teacher"):
        train(
            load_config(
                staged(tmp_path / "run", tiny_teacher), "stages.improve.teacher.model=no/such/teacher"
            )
        )
    assert not (tmp_path / "run").exists()


def test_other_weights_than_the_samplers_are_noticed(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_agents.policies.sampler import TransformersSampler

    act = TransformersSampler.act

    def act_and_change(self: Any, histories: Any) -> Any:
        actions = act(self, histories)
        with torch.no_grad():
            self.model.get_input_embeddings().weight.mul_(1.05)
        return actions

    monkeypatch.setattr(TransformersSampler, "act", act_and_change)
    with pytest.raises(AlignmentError, match="re-scores"):
        train(tiny.mix(tmp_path / "run", tiny_teacher))


# ---- Ctrl-C ----


def test_the_first_ctrl_c_asks_and_the_second_stops(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt, match="checkpoint"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Finishing this step" in capsys.readouterr().err


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_agents.trainer import train_step

    def interrupted(session: Any) -> Any:
        if session.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(session)

    monkeypatch.setattr("opd_agents.trainer.train_step", interrupted)
    with pytest.raises(Interrupted, match=r"step 3.*--resume"):
        train(tiny.mix(tmp_path / "run", tiny_teacher))
    assert checkpoints_in(tmp_path / "run")[-1].name == "step-3"
    assert tiny.metrics(tmp_path / "run")[-1]["step"] == 3
    assert not (tmp_path / "run/summary.json").exists()
