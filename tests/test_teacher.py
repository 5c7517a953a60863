import pytest
import torch
from rolling import LIMITS, desk_episodes, rolled, sampler

from opd_agents.batch import pack
from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.errors import CheckpointError, ConfigError
from opd_agents.policies import History
from opd_agents.policies.models import build_model, forward_flops, save_checkpoint
from opd_agents.teachers.local import LocalTeacher
from opd_agents.types import Actor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher, desk_chat):
    path = tmp_path_factory.mktemp("teacher")
    save_checkpoint(
        path, teacher, desk_chat.tokenizer, {"kwargs": desk_chat.kwargs, "system": desk_chat.system}
    )
    return str(path)


@pytest.fixture
def local(folder, desk_chat):
    return LocalTeacher(folder, desk_chat)


@pytest.mark.parametrize("max_tokens", [1, 200, 10_000])
def test_scores_are_the_models_own_logits_before_each_action_token(local, sampled, max_tokens):
    packed = pack(sampled)
    signal = local.score(packed, max_tokens)
    assert signal.hidden.shape == (len(packed.target), 24)
    assert not signal.hidden.requires_grad and not any(p.requires_grad for p in local.model.parameters())
    with torch.no_grad():
        ours = signal.head(signal.hidden)
        for number, row in enumerate(packed.rows):
            mine = packed.row == number
            expected = local.model(row[None]).logits[0][packed.position[mine] - 1]
            torch.testing.assert_close(ours[mine], expected, atol=1e-4, rtol=1e-4)


def test_scoring_counts_every_token_once(local, sampled):
    packed = pack(sampled)
    local.score(packed, 10_000)
    assert local.tokens == packed.n_tokens == sum(len(row) for row in packed.rows)
    widest = max(len(row) for row in packed.rows)
    assert local.flops == pytest.approx(forward_flops(local.model, packed.n_tokens, widest / 2))
    first = local.flops
    local.score(packed, 10_000)
    assert local.tokens == 2 * packed.n_tokens and local.flops == pytest.approx(2 * first)


def test_acting_counts_what_it_writes(local, desk_chat):
    trajectories = rolled(desk_episodes(3, max_turns=3), local, desk_chat, limits=LIMITS)
    turns = [turn for t in trajectories for turn in t.turns]
    assert {turn.actor for turn in turns} == {Actor.TEACHER}
    written = sum(len(turn.action_ids) for turn in turns)
    assert local.tokens == written > 0 and local.flops == local.sampler.flops > 0
    history = History("x", (0, 0, 0), tuple(range(20, 30)), (), 5, None)
    written += len(local.greedy.act([history])[0].ids)
    assert local.tokens == written
    assert local.flops == local.sampler.flops + local.greedy.flops


def test_it_acts_like_its_model(local, teacher, desk_chat):
    history = History("x", (1, 2, 3), tuple(range(20, 30)), (), 12, None)
    plain = sampler(teacher, desk_chat, actor=Actor.TEACHER).act([history])
    assert [a.ids for a in local.act([history])] == [a.ids for a in plain]


def test_a_temperature_for_its_own_actions(folder, desk_chat, teacher):
    history = History("x", (1, 2, 3), tuple(range(20, 30)), (), 12, None)
    hot = LocalTeacher(folder, desk_chat, temperature=1.7).act([history])[0]
    expected = sampler(teacher, desk_chat, actor=Actor.TEACHER, temperature=1.7).act([history])[0]
    assert hot.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_another_vocabulary_is_refused(tmp_path, desk_chat):
    words = build_word_tokenizer(["another desk with other words"])
    save_checkpoint(tmp_path, build_model("llama", TINY, words, 0), words, {})
    with pytest.raises(ConfigError, match="another vocabulary"):
        LocalTeacher(str(tmp_path), desk_chat)


TINY = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def speaks_otherwise(tmp_path, desk_chat, teacher):
    """A teacher of the student's vocabulary with another template and another eos_token."""
    words = desk_chat.tokenizer
    own, end = words.chat_template, words.eos_token
    try:
        words.chat_template = own.replace("<|im_start|>' + message.role", "<|im_start|>' + 'the '")
        words.eos_token = words.pad_token
        save_checkpoint(tmp_path, teacher, words, {})
    finally:
        words.chat_template, words.eos_token = own, end
    return str(tmp_path)


def test_another_template_is_refused_unless_the_run_gives_one_for_both(speaks_otherwise, desk_chat, teacher):
    with pytest.raises(ConfigError, match=r"another chat template.*chat\.template"):
        LocalTeacher(speaks_otherwise, desk_chat)
    given = Chat(desk_chat.tokenizer, template=desk_chat.template, system=desk_chat.system)
    history = History("x", (1, 2, 3), tuple(range(20, 30)), (), 12, None)
    expected = sampler(teacher, given, actor=Actor.TEACHER, temperature=1.0).act([history])[0]
    action = LocalTeacher(speaks_otherwise, given).act([history])[0]
    assert action.ids == expected.ids


def test_a_teacher_speaks_with_the_students_settings(folder, desk_chat):
    """Those that it was saved with do not count: it scores the student's prompts."""
    assert LocalTeacher(folder, Chat(desk_chat.tokenizer, system="Be brief.")).tokens == 0


def test_a_missing_teacher_is_told(tmp_path, desk_chat):
    with pytest.raises(CheckpointError, match="nowhere"):
        LocalTeacher(str(tmp_path / "nowhere"), desk_chat)
