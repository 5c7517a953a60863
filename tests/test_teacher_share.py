"""Teacher-mixed sampling: every token is drawn from (1 - a) q + a p, and scored as such."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from rolling import desk_episodes, rolled, sampler
from scipy.stats import chisquare
from test_sampler import converse, ended_by_many, history, sampler_without_end
from thinking import byte_tokenizer, chat_of

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.config import Lora
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.frozen import FrozenTerms, check_behaviour
from opd_agents.objectives import ReferenceTerms
from opd_agents.policies import Action, History
from opd_agents.policies.adapters import adapter_off, add_adapter
from opd_agents.policies.mixture import TokenMixture, log_mixture
from opd_agents.policies.models import build_model
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.teachers import Capability
from opd_agents.trainer import train
from opd_agents.types import Actor

SHARE = 0.3
CONTEXTS = [tuple(range(20, 25 + 3 * e)) for e in range(4)]


def helped(student: Any, teacher: Any, share: float = SHARE, temperature: float = 1.0, **options: Any) -> Any:
    """The mixture, and the two samplers that it is of."""
    own = ended_by_many(student, temperature, **options)
    theirs = ended_by_many(teacher, temperature, **options)
    return TokenMixture(own, theirs, share), own, theirs


def log_probs(model: Any, context: Sequence[int], action: Sequence[int], temperature: float) -> torch.Tensor:
    """Of each token of an action [n, V], in float64, from one forward pass of all ids."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *action]])).logits[0].double() / temperature
    return logits[len(context) - 1 : -1].log_softmax(-1)


def expected(
    student: Any,
    teacher: Any,
    context: Sequence[int],
    action: Sequence[int],
    share: float,
    temperature: float,
) -> list[float]:
    """log((1 - a) q + a p) of the action's tokens, by the definition."""
    q, p = (log_probs(model, context, action, temperature).exp() for model in (student, teacher))
    mixed = (1 - share) * q + share * p
    return [math.log(float(mixed[i, token])) for i, token in enumerate(action)]


@pytest.mark.parametrize(("share", "temperature"), [(0.2, 1.0), (0.9, 0.7)])
def test_log_probs_are_those_of_the_mixture_of_two_full_forward_passes(
    student: Any, teacher: Any, share: float, temperature: float
) -> None:
    policy, own, _ = helped(student, teacher, share, temperature)
    own.policy_version = 5
    actions = policy.act([history(c, stream=(0, 0, i), uid=str(i)) for i, c in enumerate(CONTEXTS)])
    assert len({len(action.ids) for action in actions}) > 1
    for context, action in zip(CONTEXTS, actions, strict=True):
        wanted = expected(student, teacher, context, action.ids, share, temperature)
        assert action.logprobs == pytest.approx(wanted, abs=1e-4)
        assert (action.actor, action.policy_version) == (Actor.STUDENT, 5)
    alone = own.act([history(c, stream=(0, 0, i), uid=str(i)) for i, c in enumerate(CONTEXTS)])
    assert [a.ids for a in alone] != [a.ids for a in actions]


@pytest.mark.parametrize("edited", [None, 1])
def test_both_caches_are_kept_in_lock_step_across_turns(
    student: Any, teacher: Any, edited: int | None
) -> None:
    """Episodes come, go and change places; one gets another past: nothing changes but the cost."""
    keeping, own, theirs = helped(student, teacher)
    feeding, *fresh = helped(student, teacher, reuse=False)
    kept, _ = converse(keeping, edited)
    fed, _ = converse(feeding, edited)
    assert [a.ids for a in kept] == [a.ids for a in fed]
    for one, other in zip(kept, fed, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert own.flops < 0.8 * fresh[0].flops and theirs.flops < 0.8 * fresh[1].flops


def test_the_flops_of_both_are_counted_each_with_its_own(student: Any, teacher: Any) -> None:
    policy, own, theirs = helped(student, teacher)
    histories = [history(c, stream=(0, 0, i), uid=str(i)) for i, c in enumerate(CONTEXTS)]
    actions = policy.act(histories)
    read = [(h.ids, a.ids) for h, a in zip(histories, actions, strict=True)]
    for one, model in ((own, student), (theirs, teacher)):
        again = ended_by_many(model)
        again.act_from(Dictated(again.reader, read), histories)
        assert one.flops == again.flops > 0
    assert (own.generated_tokens, theirs.generated_tokens) == (sum(len(a.ids) for a in actions), 0)


class Dictated:
    """A reader whose next token is always the one that stands in ``read``."""

    def __init__(self, reader: Any, read: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.reader, self.read, self.place = reader, read, 0

    def begin(self, histories: Sequence[History]) -> torch.Tensor:
        return self._only(self.reader.begin(histories))

    def follow(self, tokens: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        self.place += 1
        return self._only(self.reader.follow(tokens, alive))

    def end(self, histories: Sequence[History], actions: Sequence[Action]) -> None:
        assert [a.ids for a in actions] == [ids for _, ids in self.read]
        self.reader.end(histories, actions)

    def _only(self, logprobs: torch.Tensor) -> torch.Tensor:
        tokens = [ids[min(self.place, len(ids) - 1)] for _, ids in self.read]
        nothing = torch.full_like(logprobs, -torch.inf)
        return nothing.scatter(1, torch.tensor(tokens)[:, None], 0.0)


def test_tokens_are_drawn_with_the_probabilities_of_the_mixture(student: Any, teacher: Any) -> None:
    n, context = 3000, tuple(range(20, 24))
    histories = [history(context, uid=str(e), stream=(11, 2, e), max_tokens=1) for e in range(n)]
    policy = TokenMixture(sampler_without_end(student, 1.0), sampler_without_end(teacher, 1.0), SHARE)
    drawn = [action.ids[0] for action in policy.act(histories)]
    counts = np.bincount(drawn, minlength=student.config.vocab_size)
    q, p = (log_probs(model, context, [0], 1.0)[0].exp().numpy() for model in (student, teacher))

    def p_value(share: float) -> float:
        frequent = n * ((1 - share) * q + share * p)
        rare = frequent < 5
        mine, wanted = (np.append(v[~rare], v[rare].sum()) for v in (counts, frequent))
        return float(chisquare(mine, wanted).pvalue)

    assert p_value(SHARE) > 0.01
    assert p_value(0.0) < 1e-6 and p_value(0.6) < 1e-6  # the test would notice another share


def test_a_share_of_almost_nothing_or_all_leaves_one_of_the_two(student: Any, teacher: Any) -> None:
    """The draws are the student's own, so that the same tokens come of the same distribution."""
    histories = [history(c, stream=(0, 0, i), uid=str(i)) for i, c in enumerate(CONTEXTS)]
    for share, model in ((1e-9, student), (1 - 1e-9, teacher)):
        mixed, alone = helped(student, teacher, share)[0].act(histories), ended_by_many(model).act(histories)
        assert [a.ids for a in mixed] == [a.ids for a in alone]
        for one, other in zip(mixed, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_thinking_budget_holds_and_forced_ids_are_in_both_contexts() -> None:
    chat = chat_of("qwen3_5_think", thinking_budget=5)
    fields = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
    }  # fmt: skip
    student, teacher = (build_model("llama", fields, byte_tokenizer(), seed=s) for s in (3, 4))
    own, theirs = (
        TransformersSampler(
            m, chat.end_ids, actor=Actor.STUDENT, temperature=1.0, thinking=chat.thinking
        )
        for m in (student, teacher)
    )  # fmt: skip
    text = "<|im_start|>assistant\n<think>\n"
    asked = [
        history(chat.tokenizer.encode(e + text), uid=e, stream=(7, 1, i), max_tokens=24)
        for i, e in enumerate("ab")
    ]
    policy, closing = TokenMixture(own, theirs, SHARE), tuple(chat.tokenizer.encode("\n</think>\n\n"))
    for _ in range(2):  # the second turn goes on from both caches
        actions = policy.act(asked)
        for one, action in zip(asked, actions, strict=True):
            ((start, stop),) = action.forced
            assert (start, action.ids[start:stop]) == (5, closing)
            wanted = expected(student, teacher, one.ids, action.ids, SHARE, 1.0)
            wanted[start:stop] = [0.0] * (stop - start)
            assert action.logprobs == pytest.approx(wanted, abs=1e-4)
        after = tuple(chat.tokenizer.encode("<|im_end|>\n" + text))
        asked = [
            dataclasses.replace(h, ids=h.ids + a.ids + after) for h, a in zip(asked, actions, strict=True)
        ]


def test_an_adapter_is_mixed_with_its_own_base(tiny_llama: Callable[..., Any]) -> None:
    """Of a self teacher both are one model, whose adapter is switched for each pass."""
    model = tiny_llama(seed=4)
    add_adapter(model, Lora(rank=4, alpha=8.0), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    own, theirs = ended_by_many(model), ended_by_many(model, weights=lambda: adapter_off(model))
    (action,) = TokenMixture(own, theirs, SHARE).act([history(CONTEXTS[2])])
    mine = log_probs(model, CONTEXTS[2], action.ids, 1.0)
    with adapter_off(model):
        base = log_probs(model, CONTEXTS[2], action.ids, 1.0)
    assert float((mine - base).abs().max()) > 0.1
    both = ((1 - SHARE) * mine.exp() + SHARE * base.exp()).log()
    wanted = [float(both[i, token]) for i, token in enumerate(action.ids)]
    assert action.logprobs == pytest.approx(wanted, abs=1e-4)
    assert own.flops > theirs.flops > 0  # the base alone has fewer weights


def test_what_one_never_says_has_the_others_share_alone() -> None:
    never = -torch.inf
    log_q, log_p = torch.tensor([0.0, never, never]), torch.tensor([never, 0.0, never])
    wanted = torch.tensor([math.log(0.7), math.log(0.3), never])
    torch.testing.assert_close(log_mixture(log_q, log_p, 0.3), wanted)
    torch.testing.assert_close(log_mixture(log_q, log_q, 0.3), log_q, atol=1e-7, rtol=0)


def test_whole_episodes_record_the_mixture_as_their_behaviour(
    student: Any, teacher: Any, desk_chat: Chat
) -> None:
    own, theirs = (
        TransformersSampler(m, desk_chat.end_ids, actor=a, temperature=1.3)
        for m, a in ((student, Actor.STUDENT), (teacher, Actor.TEACHER))
    )
    policy = TokenMixture(own, theirs, SHARE)
    packed = pack(rolled(desk_episodes(4, max_turns=3), policy, desk_chat, temperature=1.3))
    assert len(packed.target) > 50 and len(packed.turns) > 4
    for row, ids in enumerate(packed.rows):
        q, p = (log_probs(m, ids[:1].tolist(), ids[1:].tolist(), 1.3).exp() for m in (student, teacher))
        mixed = ((1 - SHARE) * q + SHARE * p).log().float()
        mine = packed.row == row
        place, target = packed.position[mine] - 1, packed.target[mine]
        torch.testing.assert_close(packed.behaviour[mine], mixed[place, target], atol=1e-4, rtol=0)


# ---- in a run ----


def minillm(output: Path, teacher: Path, *overrides: str) -> Any:
    """The exact single-step term, and the later tokens' returns by a ratio to the mixture."""
    later = {"reference": "teacher", "discount": 0.95, "include_now": False, "length_normalise": True}
    long = {"kind": "policy", "references": {"later": later}, "select": {"actor": "student"}}
    loss = {"components": {"now": {"kind": "distill"}, "long": long}, "both_kl_legs": True}
    fixed = ("rollout.teacher_share=0.3", "trainer.steps=2", *overrides)
    return tiny.mix(output, teacher, *fixed, loss=loss, correction=None)


def test_a_run_re_scores_the_mixture_that_it_sampled(tmp_path: Path, tiny_teacher: Path) -> None:
    run = train(minillm(tmp_path / "run", tiny_teacher, "rollout.max_action_tokens=5"))
    rows = tiny.metrics(run)
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    for file in (run / "trajectories").iterdir():
        for line in file.read_text().splitlines():
            turns = json.loads(line)["trajectory"]["turns"]
            assert {turn["actor"] for turn in turns} == {"student"}
            assert sum(len(turn["action_ids"]) for turn in turns) <= 5


def test_another_share_than_was_sampled_is_noticed(student: Any, teacher: Any, desk_chat: Chat) -> None:
    policy = TokenMixture(
        sampler(student, desk_chat), sampler(teacher, desk_chat, actor=Actor.TEACHER), SHARE
    )  # fmt: skip
    trajectories = rolled(desk_episodes(3, max_turns=2), policy, desk_chat)
    packed = pack(trajectories)
    logprob, theirs = torch.zeros(len(packed.target)), torch.zeros(len(packed.target))
    for number, ids in enumerate(packed.rows):
        mine = packed.row == number
        for model, into in ((student, logprob), (teacher, theirs)):
            scored = log_probs(model, ids[:1].tolist(), ids[1:].tolist(), 1.0).float()
            into[mine] = scored[packed.position[mine] - 1, packed.target[mine]]
    frozen = FrozenTerms(logprob, logprob, {"teacher": ReferenceTerms(theirs, None, None, None)})
    assert check_behaviour(packed, trajectories, frozen, 0, 1e-3, teacher_share=SHARE) < 1e-4
    for share in (0.0, 0.5):
        with pytest.raises(AlignmentError, match="re-scores"):
            check_behaviour(packed, trajectories, frozen, 0, 1e-3, teacher_share=share)


def test_what_cannot_be_mixed_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    for override in ("rollout.source=teacher", "correction={}", "teacher.conditioning={sources: [expert]}"):
        with pytest.raises(ConfigError, match="teacher_share mixes"):
            minillm(tmp_path / "run", tiny_teacher, override)
    elsewhere = minillm(tmp_path / "run", tiny_teacher, "teacher.kind=test_teacher_share:Elsewhere")
    with pytest.raises(ConfigError, match="of kind local or self"):
        train(elsewhere)


class Elsewhere:
    """A teacher whose distributions are not at hand while a token is drawn."""

    can = frozenset({Capability.HIDDEN_STATES, Capability.ACT})
    greedy = tokens = flops = None

    def __init__(self, path: str, chat: Chat, *, dtype: str, temperature: float) -> None:
        pass

    def act(self, histories: Sequence[History]) -> list[Action]:
        raise NotImplementedError

    score = act


@pytest.mark.parametrize("key", ["max_action_tokens", "max_turns"])
@pytest.mark.parametrize("value", ["0", "0.5", "{kind: linear, start: 0, end: 9}"])
def test_no_room_for_an_action_is_refused(tmp_path: Path, tiny_teacher: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* below 1"):
        minillm(tmp_path / "run", tiny_teacher, f"rollout.{key}={value}")


def test_a_growing_budget_lets_episodes_grow(tmp_path: Path, tiny_teacher: Path) -> None:
    growing = "rollout.max_action_tokens={kind: linear, start: 2, end: 10}"
    run = train(minillm(tmp_path / "run", tiny_teacher, growing, "trainer.steps=4"))
    for number, most in enumerate((2, 4, 6, 8), start=1):
        file = run / "trajectories" / f"step-{number:06d}.jsonl"
        lines = [json.loads(line)["trajectory"] for line in file.read_text().splitlines()]
        written = [sum(len(turn["action_ids"]) for turn in line["turns"]) for line in lines]
        reached = [line["exhausted"] == "actions" for line in lines]
        assert max(written) == most and any(reached)
        assert all(one == most for one, full in zip(written, reached, strict=True) if full)
