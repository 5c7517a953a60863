"""The student as its own teacher: which weights it has when, and that a resume leaves them as they were."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rolling import desk_episodes, rolled, sampler

from opd_agents.batch import pack
from opd_agents.config import Lora, Self, load_config
from opd_agents.errors import AlignmentError, CheckpointError, ConfigError
from opd_agents.policies.adapters import add_adapter
from opd_agents.policies.models import load_model, save_checkpoint
from opd_agents.teachers import Capability, HiddenStates, SampledLogprobs, TeacherTopK
from opd_agents.teachers.base import check_acts, check_aligned, check_serves
from opd_agents.teachers.self_teacher import CopyTeacher, SameModelTeacher, self_teacher
from opd_agents.trainer import train


def settings(weights: str, **fields: Any) -> Self:
    return Self(kind="self", weights=weights, **fields)  # type: ignore[arg-type]


COPY, PREVIOUS = settings("copy", every=2), settings("previous", every=2)
EMA, FROZEN, LIVE = settings("ema", rate=0.25), settings("frozen"), settings("live")


@pytest.fixture
def pupil(tiny_llama: Any) -> Any:
    """A small model whose weights a test may change."""
    return tiny_llama(seed=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2)


def made(model: Any, chat: Any, one: Self, fresh_adapter: bool = False) -> Any:
    return self_teacher(one, model, chat, 1.0, fresh_adapter=fresh_adapter)


def trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def move(model: Any, seed: int) -> None:
    """Something like an update."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- whose weights ----


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (FROZEN, [0, 0, 0, 0, 0, 0, 0]),
        (COPY, [0, 0, 2, 2, 4, 4, 6]),
        (PREVIOUS, [0, 0, 0, 0, 2, 2, 4]),
        (settings("copy", every=1), [0, 1, 2, 3, 4, 5, 6]),
        (settings("previous", every=1), [0, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_copies_are_the_student_of_an_earlier_step(
    one: Self, expected: list[int], pupil: Any, desk_chat: Any
) -> None:
    teacher, history, seen = made(pupil, desk_chat, one), [weights(pupil)], []
    for step in range(1, 8):
        seen.append(next(i for i, old in enumerate(history) if same(weights(teacher.model), old)))
        move(pupil, step)
        history.append(weights(pupil))
        teacher.after_step(trained(pupil), step)
    assert seen == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_moving_average_is_that_of_all_updates(dtype: torch.dtype, pupil: Any, desk_chat: Any) -> None:
    pupil = pupil.to(dtype)
    teacher = made(pupil, desk_chat, EMA)
    expected = {name: weight.double() for name, weight in weights(pupil).items()}
    for update in range(5):
        move(pupil, update)
        teacher.after_update(trained(pupil))
        teacher.after_step(trained(pupil), update + 1)  # which changes nothing
        for name, weight in weights(pupil).items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight.double()
    tolerance = 1e-14 if dtype is torch.float64 else 1e-6
    for name, average in teacher.kept.items():
        assert average.dtype is (torch.float32 if dtype is torch.bfloat16 else dtype)
        torch.testing.assert_close(average.double(), expected[name], atol=tolerance, rtol=tolerance)
        assert torch.equal(dict(teacher.model.named_parameters())[name], average.to(dtype))


def test_an_average_of_bfloat16_weights_moves_by_less_than_their_spacing(pupil: Any, desk_chat: Any) -> None:
    pupil = pupil.to(torch.bfloat16)
    teacher = made(pupil, desk_chat, settings("ema", rate=0.01))
    move(pupil, 0)
    name, weight = next(trained(pupil))
    for _ in range(500):
        teacher.after_update([(name, weight)])
    assert float((weight.float() - teacher.kept[name]).abs().max()) < 0.01  # averaged in bfloat16: 0.2


def test_only_what_is_trained_is_held_twice(tiny_llama: Any, desk_chat: Any) -> None:
    model = tiny_llama(seed=4).requires_grad_(False)
    add_adapter(model, Lora(rank=2, alpha=4.0), seed=0)
    teacher = made(model, desk_chat, EMA)
    assert isinstance(teacher, CopyTeacher)
    student = dict(model.named_parameters())
    for name, parameter in teacher.model.named_parameters():
        assert not parameter.requires_grad
        assert (parameter is student[name]) == ("lora_" not in name)
    assert set(teacher.own) == {name for name in student if "lora_" in name}
    before = weights(teacher.model)
    move(model, 1)
    teacher.after_update(trained(model))
    changed = {
        name for name, weight in weights(teacher.model).items() if not torch.equal(weight, before[name])
    }
    assert changed == set(teacher.own)


def test_tied_weights_stay_tied(pupil: Any, desk_chat: Any) -> None:
    teacher = made(pupil, desk_chat, COPY)
    assert teacher.model.get_output_embeddings().weight is teacher.model.get_input_embeddings().weight
    assert teacher.model.get_output_embeddings().weight is not pupil.get_output_embeddings().weight


def test_frozen_is_the_very_model_where_an_adapter_began_as_nothing(
    tmp_path: Path, desk_chat: Any, student: Any
) -> None:
    save_checkpoint(tmp_path, student, desk_chat.tokenizer, {})
    model = load_model(str(tmp_path), "float32")
    add_adapter(model, Lora(rank=2, alpha=4.0), seed=0)
    one = made(model, desk_chat, FROZEN, fresh_adapter=True)
    assert isinstance(one, SameModelTeacher) and one.model is model
    assert isinstance(
        made(model, desk_chat, FROZEN), CopyTeacher
    )  # an adapter of an earlier stage is no base
    packed = pack(rolled(desk_episodes(2, max_turns=2), sampler(model, desk_chat), desk_chat))
    before = one.score(packed, 400).hidden
    move(model, 1)
    assert torch.equal(one.score(packed, 400).hidden, before)


# ---- what it says ----


@pytest.fixture
def packed(pupil: Any, desk_chat: Any) -> Any:
    return pack(rolled(desk_episodes(3, max_turns=2), sampler(pupil, desk_chat), desk_chat))


def said(teacher: Any, packed: Any) -> torch.Tensor:
    signal = teacher.score(packed, 400)
    return torch.log_softmax(signal.head(signal.hidden), -1)


@pytest.mark.parametrize("one", [FROZEN, COPY, PREVIOUS, EMA, LIVE])
def test_at_first_each_says_what_the_student_says_and_without_gradient(
    one: Self, pupil: Any, packed: Any, desk_chat: Any
) -> None:
    teacher = made(pupil, desk_chat, one)
    with torch.no_grad():
        row = packed.rows[0]
        mine = packed.row == 0
        expected = torch.log_softmax(pupil(row[None]).logits[0][packed.position[mine] - 1], -1)
    found = said(teacher, packed)
    assert not found.requires_grad
    torch.testing.assert_close(found[mine], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("one", [FROZEN, COPY, PREVIOUS, EMA, LIVE])
def test_what_was_said_stays_while_the_student_is_updated(
    one: Self, pupil: Any, packed: Any, desk_chat: Any
) -> None:
    """Several updates use one signal; its head must be that of its hidden states."""
    teacher = made(pupil, desk_chat, one)
    signal = teacher.score(packed, 400)
    before = signal.head(signal.hidden)
    move(pupil, 1)
    if isinstance(teacher, CopyTeacher) and teacher.follows_updates:
        teacher.after_update(trained(pupil))
    assert torch.equal(signal.head(signal.hidden), before)
    again = said(teacher, packed)
    moved = not torch.allclose(again, torch.log_softmax(before, -1), atol=1e-3)
    assert moved == (one in (EMA, LIVE))


def test_a_live_teacher_acts_as_the_student_is_now(pupil: Any, desk_chat: Any) -> None:
    teacher, episodes = made(pupil, desk_chat, LIVE), desk_episodes(3, max_turns=2)
    for seed in (1, 2):
        mine = rolled(episodes, sampler(pupil, desk_chat), desk_chat)
        theirs = rolled(episodes, teacher, desk_chat)
        assert [t.action_ids for e in mine for t in e.turns] == [
            t.action_ids for e in theirs for t in e.turns
        ]
        move(pupil, seed)
        teacher.after_step()
    assert teacher.tokens > 0 and teacher.flops > 0


# ---- state ----


@pytest.mark.parametrize("one", [FROZEN, COPY, PREVIOUS, EMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_is_all_that_a_resume_needs(
    one: Self, dtype: torch.dtype, pupil: Any, desk_chat: Any
) -> None:
    def step(teacher: Any, number: int) -> None:
        move(pupil, number)
        if teacher.follows_updates:
            teacher.after_update(trained(pupil))
        teacher.after_step(trained(pupil), number)

    pupil = pupil.to(dtype)
    first = made(pupil, desk_chat, one)
    for number in (1, 2, 3):
        step(first, number)
    state = {key: weight.clone() for key, weight in first.state().items()}
    second = made(pupil, desk_chat, one)
    second.load(state)
    for number in (4, 5, 6):
        saved = weights(pupil)
        step(first, number)
        pupil.load_state_dict(saved, strict=False)
        step(second, number)
        assert same(weights(first.model), weights(second.model))
        assert same(first.kept, second.kept)


# ---- runs ----


def run(output: Path, base: Path, teacher: dict[str, Any], *overrides: str, **changes: Any) -> Any:
    student = {"model": str(base)}
    loss = {"components": {"distill": {"kind": "distill"}}}
    rollout = {"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS}
    return tiny.mix(
        output, base, *overrides, **{"student": student, "rollout": rollout, "loss": loss, "correction": None}
        | {"teacher": {"kind": "self"} | teacher} | changes,
    )  # fmt: skip


RUNS: dict[str, dict[str, Any]] = {
    "copy": {"weights": "copy", "every": 2},
    "previous": {"weights": "previous", "every": 1},
    "ema": {"weights": "ema", "rate": 0.3},
    "frozen": {"weights": "frozen"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, tiny_teacher: Path, tmp_path: Path, dies_after: Any
) -> None:
    teacher = RUNS[kind]
    whole = train(run(tmp_path / "whole", tiny_teacher, teacher))
    again = run(tmp_path / "again", tiny_teacher, teacher)
    with dies_after(3):
        train(again)
    resumed = train(again, resume=True)
    one, other = tiny.final_state(whole), tiny.final_state(resumed)
    one["summary"].pop("name"), other["summary"].pop("name")
    assert one == other
    assert "teachers/weights.safetensors" in one
    kl = [row["distill/kl"] for row in tiny.metrics(whole)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    apart = {"copy": [1, 3], "previous": [1, 2, 3, 4], "ema": [1, 2, 3, 4], "frozen": [1, 2, 3, 4]}[kind]
    assert all(kl[step] > 1e-6 for step in apart)
    if kind == "copy":
        assert kl[2] == pytest.approx(0, abs=1e-6) and kl[4] == pytest.approx(0, abs=1e-6)


def test_a_checkpoint_without_the_teachers_weights_is_told(tiny_teacher: Path, tmp_path: Path) -> None:
    config = run(tmp_path / "run", tiny_teacher, RUNS["ema"], "trainer.steps=2")
    folder = train(config)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-2" / "teachers" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="step-2 is not whole"):
        train(config, resume=True)


def test_a_reference_beside_the_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    """Both are scored and saved; the reference alone follows."""
    part = {"reference": "anchor", "coef": 0.5}
    components = {
        "distill": {"kind": "distill"},
        "anchored": {"kind": "policy", "references": {"anchor": part}},
    }
    config = run(
        tmp_path / "run", tiny_teacher, {"kind": "local", "model": str(tiny_teacher)}, "trainer.steps=2",
        references={"anchor": {"kind": "self"} | RUNS["ema"]}, loss={"components": components},
    )  # fmt: skip
    folder = train(config)
    saved = folder / "checkpoints" / "step-2"
    assert (saved / "teachers" / "weights.safetensors").is_file()
    rows = tiny.metrics(folder)
    assert rows[0]["total/teacher_tokens"] > 0
    assert json.loads((saved / "trainer.json").read_text())["totals"]["teacher_tokens"] > 0


# ---- what a teacher must be able to ----

EVERYTHING = frozenset({"full", "student_top_k", "teacher_top_k", "sampled"})
SERVED = {
    Capability.HIDDEN_STATES: EVERYTHING,
    Capability.TEACHER_TOP_K: frozenset({"teacher_top_k", "sampled"}),
    Capability.SAMPLED_LOGPROBS: frozenset({"sampled"}),
}


@pytest.mark.parametrize("able", SERVED)
@pytest.mark.parametrize("need", sorted(EVERYTHING))
def test_a_signal_serves_what_it_holds(able: Capability, need: Any) -> None:
    if need in SERVED[able]:
        check_serves("x", {able}, {need})
    else:
        with pytest.raises(ConfigError, match=rf"needs of x .*takes the capability .*it has `{able}`\."):
            check_serves("x", {able}, {need})
    with pytest.raises(ConfigError, match=r"it has `act`\..*rollout.source: teacher"):
        check_serves("x", {Capability.ACT}, {need})
    check_serves("x", set(), set())


def test_of_several_signals_one_that_serves_is_enough() -> None:
    several = {Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K, Capability.ACT}
    check_serves("x", several, {"teacher_top_k", "sampled"})
    with pytest.raises(ConfigError, match="it has `sampled_logprobs`, `teacher_top_k` and `act`"):
        check_serves("x", several, {"full"})


def test_who_takes_turns_must_be_able_to_act() -> None:
    check_acts("teacher", {Capability.ACT}, "correction")
    with pytest.raises(ConfigError, match=r"correction asks teacher .* `act`, but it has `hidden_states`"):
        check_acts("teacher", {Capability.HIDDEN_STATES}, "correction")
    with pytest.raises(ConfigError, match="but it has no capability"):
        check_acts("teacher", set(), "correction")


def test_signals_have_a_row_for_each_token() -> None:
    ids, values = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    can = frozenset(SERVED)
    good = TeacherTopK(ids, values, torch.zeros(3))
    check_aligned("teacher", good, can, {"teacher_top_k"}, 3)
    for bad in (
        TeacherTopK(ids, values, torch.zeros(2)),
        SampledLogprobs(torch.zeros(2)),
        HiddenStates(torch.zeros(2, 8), lambda x: x),
    ):
        with pytest.raises(AlignmentError, match=r"teacher gave 2 .* for 3 action tokens"):
            check_aligned("teacher", bad, can, set(), 3)
    with pytest.raises(AlignmentError, match="gave a TeacherTopK"):
        check_aligned("teacher", good, {Capability.HIDDEN_STATES}, set(), 3)
    with pytest.raises(ConfigError, match="the TeacherTopK that it gave, its full distributions"):
        check_aligned("teacher", good, can, {"full"}, 3)


def test_a_self_teacher_says_which_weights(tmp_path: Path, tiny_teacher: Path) -> None:
    assert run(tmp_path, tiny_teacher, {}).teacher.weights == "frozen"
    for broken in ({"weights": "copy"}, {"weights": "ema", "rate": 0.1, "every": 2}, {"weights": "old"}):
        with pytest.raises(ConfigError):
            run(tmp_path, tiny_teacher, broken)
    assert load_config(run(tmp_path, tiny_teacher, RUNS["copy"]).model_dump(mode="json"))
