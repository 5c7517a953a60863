"""A teacher that is told more: what it is told, where that stands, and that nothing else changes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from families import chat as family
from hypothesis import given, settings
from hypothesis import strategies as st
from rolling import LIMITS, Scripted, desk_episodes, rolled, sampler
from toy_envs import Counter

import opd_agents as opd
from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.config import Conditioning
from opd_agents.episode import Episode, Limits
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.messages import read_conversation
from opd_agents.policies import Action, ExpertPolicy, History
from opd_agents.recordings import to_trajectory
from opd_agents.teachers.conditioning import ConditionedPolicy, Conditioner
from opd_agents.teachers.local import ModelTeacher
from opd_agents.trainer import train
from opd_agents.types import Actor, Outcome, StopReason, Task, Trajectory

WIDE = dataclasses.replace(LIMITS, max_context_tokens=8000, max_tokens_per_turn=400)


class Noisy(Counter):
    """The target is noise, which only an expert with the same seed can know."""

    has_expert: ClassVar = True
    played: ClassVar[list[int]] = []  # by experts

    def __init__(self, offset: int = 3, lost: bool = False) -> None:
        super().__init__(offset)
        self.lost = lost

    def begin(self, task: Task) -> str:
        super().begin(task)
        self.target = int(self.np_random.integers(10**9))
        return "Reach it."

    def expert_action(self) -> str:
        if self.value == self.target or (self.lost and self.value):
            return call("stop")
        self.played.append(self.target)
        return call("add", number=self.target - self.lost)


class Unaided(Noisy):
    has_expert: ClassVar = False


opd.register("conditioning/Noisy-v0", "test_conditioning:Noisy")
opd.register("conditioning/Unaided-v0", "test_conditioning:Unaided")


def told(*sources: str, **fields: Any) -> Conditioning:
    if "text" in sources:
        fields = {"text": "Be brief."} | fields
    return Conditioning(sources=list(sources), **fields)  # type: ignore[arg-type]


def conditioner(chat: Chat, *sources: str, **fields: Any) -> Conditioner:
    return Conditioner(told(*sources, **fields), chat, Limits())


def noisy(n: int = 2, id: str = "conditioning/Noisy-v0", group: str = "", **options: Any) -> list[Episode]:
    return [
        Episode(
            f"n{i}", id, seed=i, task=Task("0", "train"), stream=(0, 0, i), env_kwargs=options, group=group
        )
        for i in range(n)
    ]


def tries(chat: Chat, episodes: Sequence[Episode], *actions: str) -> list[Trajectory]:
    """The student's, by a script that knows no target."""
    calls = actions or (call("roll"), call("add", number=1), call("stop"))

    def choose(history: History) -> str:
        return calls[len(history.turns)]

    return rolled(episodes, Scripted(choose, chat=chat), chat, limits=WIDE)


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))


def rendered(
    chat: Chat, one: Trajectory, context: str, place: str = "user", turns: int = 0
) -> tuple[int, ...]:
    """The conditioned prompt after some turns, written out."""
    messages = chat.opening(one.messages[1:], one.messages[0].content)
    index = [m.role for m in messages].index(place)
    content = f"{messages[index].content}\n\n{context}"
    messages[index] = dataclasses.replace(messages[index], content=content)
    for turn in one.turns[:turns]:
        said = chat.read_message(turn.action_ids, ended=True, context_ids=turn.context_ids)
        messages += [said, *turn.messages]
    return chat.written_ids(messages, envs.make(one.env_id, **one.env_kwargs).tools)


def check_same_actions(before: Any, after: Any, taught: torch.Tensor) -> None:
    """The rows end alike, and every action token stands where the table says."""
    for name in ("row", "target", "behaviour", "turn", "episode", "kind"):
        assert torch.equal(getattr(before, name).nan_to_num(), getattr(after, name).nan_to_num())
    assert before.turns == after.turns and taught.shape == before.target.shape
    for number, (old, new) in enumerate(zip(before.rows, after.rows, strict=True)):
        mine = before.row == number
        first = int(before.position[mine].min())
        shift = len(new) - len(old)
        assert torch.equal(new[first + shift :], old[first:])
        assert torch.equal(after.position[mine], before.position[mine] + shift)
        assert torch.equal(new[after.position[mine]], before.target[mine])
        assert bool(taught[mine].all()) == (shift > 0)


# ---- where it stands ----


@pytest.mark.parametrize("place", ["user", "system"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "glm4moe", "gptoss"])
def test_only_the_opening_of_a_published_template_changes(name: str, place: str) -> None:
    chat = family(name)
    trajectories = tries(chat, noisy())
    packed = pack(trajectories)
    after, taught = conditioner(chat, "text", place=place).condition(packed, trajectories)
    check_same_actions(packed, after, taught)
    for row, old, one in zip(after.rows, packed.rows, trajectories, strict=True):
        prompt = rendered(chat, one, "Be brief.", place)
        assert tuple(row[: len(prompt)].tolist()) == prompt
        assert torch.equal(row[len(prompt) :], old[len(one.turns[0].context_ids) :])


class Written(Scripted):
    """Texts token for token, as if they had been sampled."""

    def _action(self, text: str) -> Action:
        assert self.chat is not None
        tokenizer = self.chat.tokenizer
        ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
        return Action(self.actor, StopReason.END, ids, (-0.5,) * len(ids))


HERMES = [
    f"<think>\nHm {n}.\n</think>\n\n<tool_call>\n{text}\n</tool_call>"
    for n, text in enumerate([call("add", number=1), "{add}", call("add", number=2), call("stop")])
]


@pytest.mark.parametrize("place", ["user", "system"])
@pytest.mark.parametrize(
    ("name", "kwargs"), [("qwen3", {}), ("qwen3", {"enable_thinking": False}), ("qwen2_5", {})]
)
def test_where_prompts_are_rendered_anew_every_segment_is_told(
    name: str, kwargs: dict[str, Any], place: str
) -> None:
    chat = family(name, history="template", kwargs=kwargs)
    writes = Written(lambda history: HERMES[len(history.turns)], chat=chat)
    (one,) = rolled(noisy(1), writes, chat, limits=WIDE)
    packed = pack([one])
    after, taught = conditioner(chat, "text", place=place).condition(packed, [one])
    check_same_actions(packed, after, taught)
    starts = [start for start, _ in one.segments()]
    assert len(starts) > 1 and bool(taught.all())
    for row, start in zip(after.rows, starts, strict=True):
        prompt = rendered(chat, one, "Be brief.", place, start)
        assert tuple(row[: len(prompt)].tolist()) == prompt


@pytest.mark.parametrize("own", [None, "", "Obey."])
def test_the_system_prompt_is_the_chats_own_where_it_has_one(own: str | None) -> None:
    chat = family("qwen3", system=own)
    (one,) = tries(chat, noisy(1))
    packed = pack([one])
    after, taught = conditioner(chat, "text", place="system").condition(packed, [one])
    check_same_actions(packed, after, taught)
    text = chat.tokenizer.decode(after.rows[0])
    kept = "Reach the target." if own is None else own
    assert text.startswith(f"<|im_start|>system\n{kept}\n\nBe brief.".replace("\n\n\nBe", "\nBe"))
    assert ("Reach the target." in text) == (own is None)


TEXT = st.text(st.sampled_from("ab {}\n.<|im_end|>é"), min_size=1, max_size=12)
PARTS = st.lists(
    TEXT | st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "{context}", "</think>"]), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, place=st.sampled_from(["user", "system"]))
def test_whatever_the_text_says_it_stays_text(parts: list[str], place: str) -> None:
    chat, text = family("qwen3"), "".join(parts)
    trajectories = tries(chat, noisy(1), call("stop"))
    packed = pack(trajectories)
    after, taught = conditioner(chat, "text", text=text, place=place).condition(packed, trajectories)
    check_same_actions(packed, after, taught)
    for token in ("<|im_end|>", "<|im_start|>"):
        id = chat.tokenizer.convert_tokens_to_ids(token)
        assert int((after.rows[0] == id).sum()) == int((packed.rows[0] == id).sum())
    assert chat.tokenizer.decode(after.rows[0]).count(text.strip()) >= 1


def test_a_recorded_conversation_is_told_too() -> None:
    chat = family("qwen3")
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    used = {"name": "add", "arguments": {}}
    row = {
        "messages": [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "", "tool_calls": [{"function": used}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"type": "function", "function": tool}],
    }  # fmt: skip
    one = to_trajectory(read_conversation(row, "row"), chat, uid="r", task=Task("0", "train"))
    packed = pack([one])
    after, taught = conditioner(chat, "expert", "peer", "text").condition(packed, [one])
    check_same_actions(packed, after, taught)
    assert "Go.\n\nBe brief.<|im_end|>" in chat.tokenizer.decode(after.rows[0])


@pytest.mark.parametrize("change", ["chat", "row"])
def test_a_prompt_that_the_chat_does_not_render_is_refused(change: str) -> None:
    chat, other = family("qwen3"), family("qwen3", system="Another.")
    (one,) = tries(chat, noisy(1))
    if change == "row":
        first = one.turns[0]
        moved = dataclasses.replace(first, context_ids=first.context_ids[1:])
        one, other = dataclasses.replace(one, turns=(moved, *one.turns[1:])), chat
    with pytest.raises(AlignmentError, match=r"n0.*prompt does not begin as the chat renders"):
        conditioner(other, "text").condition(pack([one]), [one])


# ---- what is told ----


def contexts(chat: Chat, trajectories: Sequence[Trajectory], *sources: str) -> list[str | None]:
    """The context of each, read off its conditioned row."""
    packed = pack(trajectories)
    marked = conditioner(chat, *sources, template="[[{context}]]")
    after, taught = marked.condition(packed, trajectories)
    check_same_actions(packed, after, taught)
    texts = [chat.tokenizer.decode(row) for row in after.rows]
    return [text.partition("[[")[2].partition("]]")[0] if "[[" in text else None for text in texts]


def test_the_expert_plays_the_same_episode_once() -> None:
    chat = family("qwen3")
    trajectories = tries(chat, noisy(3))
    packed, knows = pack(trajectories), conditioner(chat, "expert", template="[[{context}]]")
    Noisy.played.clear()
    rows = [knows.condition(packed, trajectories)[0].rows for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    targets = []
    for one in trajectories:
        env = envs.make(one.env_id)
        env.reset(seed=one.seed, options={"task_id": one.task.id, "split": one.task.split})
        targets.append(env.target)
    assert Noisy.played == targets and len(set(targets)) == 3
    for row, target in zip(rows[0], targets, strict=True):
        actions = [call("add", number=target), call("stop")]
        assert "[[" + "\n".join(actions) + "]]" in chat.tokenizer.decode(row)


def test_an_expert_that_fails_or_is_not_there_says_nothing() -> None:
    chat = family("qwen3")
    for episodes in (noisy(lost=True), noisy(id="conditioning/Unaided-v0")):
        trajectories = tries(chat, episodes)
        assert contexts(chat, trajectories, "expert") == [None, None]
        assert contexts(chat, trajectories, "expert", "text") == ["Be brief."] * 2


def group(chat: Chat, *outcomes: Outcome, **fields: Any) -> list[Trajectory]:
    """Episodes of a group, each with an action of its own."""
    made = []
    for number, outcome in enumerate(outcomes):
        (one,) = tries(chat, noisy(1, group="g"), call("add", number=number), call("stop"))
        made.append(dataclasses.replace(one, uid=f"u{number}", outcome=outcome, **fields))
    return made


def test_a_peer_is_the_first_other_success_of_the_group() -> None:
    chat, (good, bad) = family("qwen3"), (Outcome.SUCCESS, Outcome.FAILURE)
    shown = [f"{call('add', number=n)}\n{call('stop')}" for n in range(4)]
    assert contexts(chat, group(chat, bad, good, good, bad), "peer") == [
        shown[1],
        shown[2],
        shown[1],
        shown[1],
    ]
    assert contexts(chat, group(chat, bad, good), "peer") == [shown[1], None]
    assert contexts(chat, group(chat, bad, bad), "peer") == [None, None]
    alone = group(chat, good, good, group="")
    assert contexts(chat, alone, "peer") == [None, None]
    others = group(chat, bad, good)
    elsewhere = dataclasses.replace(others[1], group="h")
    assert contexts(chat, [others[0], elsewhere], "peer") == [None, None]
    shown_how = dataclasses.replace(others[1], demonstration=True)
    assert contexts(chat, [others[0], shown_how], "peer") == [None, None]


def test_feedback_is_the_last_word_to_an_episode_that_failed() -> None:
    chat = family("qwen3")
    good, bad, cut, broken = group(chat, Outcome.SUCCESS, Outcome.FAILURE, Outcome.UNFINISHED, Outcome.ERROR)
    quiet = (cut.turns[0], dataclasses.replace(cut.turns[1], observation=""))
    cut = dataclasses.replace(cut, turns=quiet)
    assert contexts(chat, [good, bad, cut, broken], "feedback") == [None, "stopped", '{"value":2}', None]


def test_the_first_source_that_has_something_speaks() -> None:
    chat = family("qwen3")
    both = group(chat, Outcome.SUCCESS, Outcome.FAILURE)
    peer = f"{call('add', number=0)}\n{call('stop')}"
    assert contexts(chat, both, "peer", "feedback") == [None, peer]
    assert contexts(chat, both, "feedback", "peer") == [None, "stopped"]
    assert contexts(chat, both, "peer", "text") == ["Be brief.", peer]


def test_untaught_episodes_and_those_without_a_turn_stay_as_they_are() -> None:
    chat = family("qwen3")
    both = group(chat, Outcome.FAILURE, Outcome.SUCCESS)
    nothing = dataclasses.replace(both[0], uid="x", turns=(), outcome=Outcome.ERROR)
    packed = pack([both[0], nothing, both[1]])
    after, taught = conditioner(chat, "peer").condition(packed, [both[0], nothing, both[1]])
    check_same_actions(packed, after, taught)
    assert torch.equal(taught, packed.episode == 0) and after.rows[1] is packed.rows[1]
    none, taught = conditioner(chat, "peer").condition(pack([]), [])
    assert none.rows == () and taught.shape == (0,)


# ---- scoring and acting ----


def test_it_scores_the_students_tokens_after_the_told_prompt(
    teacher: Any, student: Any, desk_chat: Chat
) -> None:
    episodes = desk_episodes(4)
    trajectories = rolled(episodes, sampler(student, desk_chat), desk_chat)
    packed = pack(trajectories)
    after, taught = conditioner(desk_chat, "expert").condition(packed, trajectories)
    assert bool(taught.all())
    signal = ModelTeacher(teacher, desk_chat, 1.0).score(after, 500)
    for number, one in enumerate(trajectories):
        (expert,) = rolled([episodes[number]], ExpertPolicy())
        prompt = rendered(desk_chat, one, "\n".join(turn.action for turn in expert.turns))
        rest = [i for turn in one.turns for i in (*turn.context_ids, *turn.action_ids)]
        ids = torch.tensor([*prompt, *rest[len(one.turns[0].context_ids) :]])
        mine = packed.row == number
        with torch.no_grad():
            logits = teacher(ids[None]).logits[0]
        places = packed.position[mine] + len(prompt) - len(one.turns[0].context_ids) - 1
        torch.testing.assert_close(signal.head(signal.hidden)[mine], logits[places], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["text", "expert"])
def test_it_acts_on_the_told_prompt_and_is_recorded_without(
    source: str, teacher: Any, desk_chat: Chat
) -> None:
    knows = conditioner(desk_chat, source)
    episodes = desk_episodes(3)
    acting = ModelTeacher(teacher, desk_chat, 1.0, conditioner=knows)
    played = rolled(episodes, acting, desk_chat)
    again, taught = knows.condition(pack(played), played)
    assert bool(taught.all()) and {turn.actor for one in played for turn in one.turns} == {Actor.TEACHER}
    # its log-probs are those of a model that reads the told rows
    signal = ModelTeacher(teacher, desk_chat, 1.0).score(again, 500)
    logprobs = torch.log_softmax(signal.head(signal.hidden), -1)
    found = logprobs.gather(1, again.target[:, None]).squeeze(1)
    torch.testing.assert_close(found, again.behaviour, atol=1e-4, rtol=1e-4)
    plain = rolled(episodes, ModelTeacher(teacher, desk_chat, 1.0), desk_chat)
    for one, other in zip(played, plain, strict=True):
        assert one.turns[0].context_ids == other.turns[0].context_ids
    assert any(a.turns[0].action_ids != b.turns[0].action_ids for a, b in zip(played, plain, strict=True))


def test_its_best_action_is_told_too(teacher: Any, desk_chat: Chat) -> None:
    one = ModelTeacher(teacher, desk_chat, 1.0, conditioner=conditioner(desk_chat, "text"))
    episodes = desk_episodes(2, max_turns=1)
    (played, _) = rolled(episodes, one.greedy, desk_chat)
    prompt = torch.tensor(rendered(desk_chat, played, "Be brief."))
    with torch.no_grad():
        best = int(teacher(prompt[None]).logits[0, -1].argmax())
    assert played.turns[0].action_ids[0] == best
    assert one.tokens > 0


def test_in_rendered_histories_it_acts_on_the_told_conversation() -> None:
    chat, seen = family("qwen3", history="template"), list[History]()

    class Spy(Written):
        def act(self, histories: Sequence[History]) -> Any:
            seen.extend(histories)
            return super().act(histories)

    spy = Spy(lambda history: HERMES[len(history.turns)], Actor.TEACHER, chat)
    (one,) = rolled(noisy(1), ConditionedPolicy(spy, conditioner(chat, "text")), chat, limits=WIDE)
    assert len(seen) == len(one.turns) == 4
    after, _ = conditioner(chat, "text").condition(pack([one]), [one])
    for number, (start, stop) in enumerate(one.segments()):
        row = tuple(after.rows[number].tolist())
        for history in seen[start:stop]:
            assert row[: len(history.ids)] == history.ids
        assert "Reach it.\n\nBe brief.<|im_end|>" in chat.tokenizer.decode(row)


def test_no_expert_can_play_from_a_state_that_no_seed_leads_to() -> None:
    env = envs.make("conditioning/Noisy-v0")
    env.reset(seed=5, options={"task_id": "0", "split": "train"})
    assert env.reset_seed == 5
    chat = family("qwen3")
    messages = rolled(noisy(1), Scripted(lambda _: call("stop")))[0].messages
    history = History("x", (0, 0, 0), (), messages, 5, env)
    assert conditioner(chat, "expert").told(history) is not None
    with pytest.raises(AlignmentError, match="no seed leads to"):
        conditioner(chat, "expert").told(dataclasses.replace(history, env=env.fork(reseed=1)))


# ---- runs ----


def run(output: Path, base: Path, sources: dict[str, Any], *overrides: str, **changes: Any) -> Any:
    loss = {"components": {"distill": {"kind": "distill"}}}
    rollout = {"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS}
    teacher = {"kind": "self", "weights": "live", "conditioning": sources}
    return tiny.mix(
        output, base, "trainer.steps=2", *overrides, **{"student": {"model": str(base)}, "rollout": rollout}
        | {"loss": loss, "correction": None, "teacher": teacher} | changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sources",
    [
        {"sources": ["text"], "text": "yes", "place": "system"},
        {"sources": ["expert"], "template": "Say {context}"},
        {"sources": ["peer", "feedback"]},
    ],
)
def test_a_live_teacher_that_is_told_more_differs_from_the_student(
    sources: dict[str, Any], tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = train(run(tmp_path / "run", tiny_teacher, sources))
    for row in tiny.metrics(folder):
        assert row["distill/kl"] > 1e-6 and row["loss/distill"] > 1e-6


def test_a_teacher_that_is_told_the_solution_repairs_and_demonstrates(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    sources = {"sources": ["expert"], "template": "Say {context}"}
    components = tiny.MIX["loss"]["components"] | {
        "distill": {"kind": "distill", "select": {"actor": "student"}}
    }
    shown = {"actor": "teacher", "when": "always"}
    rollout = {"episodes_per_step": 4, "group_size": 2, "demonstrations": shown, **tiny.LIMITS}
    changes = {"correction": tiny.MIX["correction"], "loss": {"components": components}, "rollout": rollout}
    folder = train(run(tmp_path / "run", tiny_teacher, sources, **changes))
    rows = tiny.metrics(folder)
    assert sum(row["correction/proposed"] for row in rows) > 0
    assert all(row["distill/kl"] > 1e-6 for row in rows)


def test_a_template_that_cannot_carry_the_context_is_refused() -> None:
    mute = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    )
    mute += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = Chat(family("qwen3").tokenizer, template=mute, system="", syntax="hermes")
    conditioner(chat, "text", place="user").check(noisy(1)[0])
    with pytest.raises(ConfigError, match="drops a system message"):
        conditioner(chat, "text", place="system").check(noisy(1)[0])


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        (["peer"], {"group_size": 1}, "peer is of a group"),
        (["feedback"], {"source": "teacher"}, "a teacher that acts knows neither"),
        (["feedback"], {"demonstrations": {"actor": "teacher"}}, "a teacher that acts knows neither"),
    ],
)
def test_contexts_that_never_come_are_refused(
    sources: list[str], changes: dict[str, Any], message: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    rollout = {"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS} | changes
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", tiny_teacher, {"sources": sources}, rollout=rollout)


def test_an_expert_where_there_is_none_is_refused_before_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    environments = [{"id": "conditioning/Unaided-v0"}]
    config = run(tmp_path / "run", tiny_teacher, {"sources": ["expert"]}, environments=environments)
    with pytest.raises(ConfigError, match=r"teacher\.conditioning\.sources: expert, but none"):
        train(config)
    assert not (tmp_path / "run").exists()
