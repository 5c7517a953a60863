"""The student and a teacher on real vLLM servers: the same tokens, the same log-probs, the same weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from rolling import desk_episodes, rolled
from vllm_servers import HEAD, TOKENS, Served, serving

from opd_agents.batch import Packed, pack
from opd_agents.chat import Chat
from opd_agents.config import Lora, RunConfig, Server, Vllm, load_config
from opd_agents.episode import Limits
from opd_agents.errors import AlignmentError, ConfigError, ServerError
from opd_agents.export import export
from opd_agents.frozen import frozen_terms
from opd_agents.policies import transfer
from opd_agents.policies.adapters import add_adapter
from opd_agents.policies.base import History
from opd_agents.policies.models import build_model, load_model, save_checkpoint
from opd_agents.policies.probe import Probe
from opd_agents.policies.transfer import Reload
from opd_agents.policies.vllm import VllmSampler
from opd_agents.policies.vllm_client import VllmClient
from opd_agents.teachers import SampledLogprobs, TeacherTopK
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teachers.vllm import VllmTeacher
from opd_agents.trainer import train
from opd_agents.types import Actor, StopReason, Trajectory

pytestmark = [pytest.mark.real("vllm"), pytest.mark.timeout(360)]  # the first test starts the servers

SAMPLES = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
LIMITS = Limits(max_tokens_per_turn=8, max_context_tokens=TOKENS, max_turns=4)


class Pair(NamedTuple):
    """A server that samples from the student, and one that was started as anybody would."""

    student: Served
    teacher: Served


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, desk_chat: Chat) -> Iterator[Pair]:
    """Of a student whose head is its embeddings and a teacher of another architecture, both exported."""
    folder = tmp_path_factory.mktemp("vllm")
    fields = {"num_hidden_layers": 2, "initializer_range": 0.3, "max_position_embeddings": 512} | HEAD
    models = {
        "student": ("qwen3", {"hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": True}),
        "teacher": ("llama", {"hidden_size": 48, "intermediate_size": 64, "tie_word_embeddings": False}),
    }
    for seed, (name, (kind, own)) in enumerate(models.items()):
        model = build_model(kind, fields | own, desk_chat.tokenizer, seed)
        save_checkpoint(folder / f"{name}-trained", model, desk_chat.tokenizer, desk_chat.settings)
        export(folder / f"{name}-trained", folder / name)
    student = (folder / "student", {"VLLM_SERVER_DEV_MODE": "1"}, SAMPLES)
    with serving(folder / "log", student, (folder / "teacher", {}, [])) as (one, other):
        yield Pair(one, other)


@pytest.fixture
def learner(pair: Pair) -> Any:
    """As the server began; a test may change its weights."""
    return load_model(pair.student.model, "float32")


@pytest.fixture
def sampler(pair: Pair, learner: Any, desk_chat: Chat, tmp_path: Path) -> Callable[..., VllmSampler]:
    client = VllmClient(Server(urls=[pair.student.url]), "sampler")

    def make(model: Any = learner, **changes: Any) -> VllmSampler:
        settings: dict[str, Any] = {
            "temperature": 1.0, "dtype": "float32", "max_tokens": TOKENS,
            "transfer": Reload(client, model, tmp_path),
        }  # fmt: skip
        return VllmSampler(client, desk_chat, model, **settings | changes)

    return make


@pytest.fixture
def scorer(pair: Pair, desk_chat: Chat) -> Callable[..., VllmTeacher]:
    settings = Vllm(kind="vllm", model=pair.teacher.model, urls=[pair.teacher.url])

    def make(**changes: Any) -> VllmTeacher:
        given: dict[str, Any] = {"temperature": 1.0, "scores": True, "max_tokens": TOKENS} | changes
        return VllmTeacher(settings, "teacher", settings.model, desk_chat, **given)

    return make


@pytest.fixture
def packed(sampled: list[Trajectory]) -> Packed:
    return pack([one for one in sampled if max(len(row) for row in pack([one]).rows) <= TOKENS])


def disturb(model: Any, scale: float = 0.05) -> None:
    """A change of every weight, as large as many updates."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def gap(model: Any, trajectories: list[Trajectory], temperature: float) -> float:
    """Between the recorded log-probs and those of the model's own forward pass, in nats, at most."""
    table = pack(trajectories)
    scored = frozen_terms(model, table, {}, temperature, 4096).logprob
    return float((scored - table.behaviour).abs().max())


# ---- the sampler ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_the_trainers(
    sampler: Callable[..., VllmSampler], learner: Any, desk_chat: Chat, temperature: float
) -> None:
    policy = sampler(temperature=temperature)
    policy.reset(3)
    episodes = desk_episodes(12, group_size=4)
    played = rolled(episodes, policy, desk_chat, limits=LIMITS, temperature=temperature)
    turns = [turn for one in played for turn in one.turns]
    assert len(turns) > 24 and gap(learner, played, temperature) < 1e-3
    assert gap(learner, played, 1.0 if temperature == 0.7 else 0.7) > 0.1
    assert {(turn.actor, turn.policy_version) for turn in turns} == {(Actor.STUDENT, 3)}
    for turn in turns:
        assert turn.action_ids and len(turn.action_ids) <= LIMITS.max_tokens_per_turn
        ended = turn.action_ids[-1] in desk_chat.end_ids
        assert ended == (turn.stop_reason is StopReason.END)
        assert not set(turn.action_ids[:-1]) & desk_chat.end_ids
    assert policy.generated_tokens == sum(len(turn.action_ids) for turn in turns)
    assert len({turn.action_ids for turn in turns}) > len(turns) // 2  # episodes of a group differ
    again = rolled(episodes, policy, desk_chat, limits=LIMITS, temperature=temperature)
    same = [a.turns[0].action_ids == b.turns[0].action_ids for a, b in zip(played, again, strict=True)]
    assert sum(same) >= 11  # the same seeds, though another rounding may tip a draw


def test_an_update_arrives_whole(sampler: Callable[..., VllmSampler], learner: Any, desk_chat: Chat) -> None:
    policy = sampler()
    policy.reset(0)
    before = rolled(desk_episodes(4), policy, desk_chat, limits=LIMITS)
    disturb(learner)
    policy.reset(1)
    after = rolled(desk_episodes(4), policy, desk_chat, limits=LIMITS)
    assert gap(learner, after, 1.0) < 1e-3 < 0.1 < gap(learner, before, 1.0)
    assert {turn.policy_version for one in after for turn in one.turns} == {1}


def test_a_head_that_stays_behind_stops_the_run(
    sampler: Callable[..., VllmSampler], learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the head is the embeddings, a checkpoint names it once, and reloading one leaves the old head."""
    policy = sampler()
    policy.reset(0)
    whole = transfer.served_weights
    as_saved = lambda model: {n: w for n, w in whole(model).items() if n != "lm_head.weight"}  # noqa: E731
    monkeypatch.setattr(transfer, "served_weights", as_saved)
    disturb(learner, 0.005)
    with pytest.raises(AlignmentError, match=r"sampler\.urls: .* has not the trainer's weights.*not arrive"):
        policy.reset(1)
    monkeypatch.undo()
    policy.reset(2)


def test_weights_that_were_not_sent_stop_the_run(sampler: Callable[..., VllmSampler], learner: Any) -> None:
    class Forgets:
        def send(self) -> None:
            pass

    sampler().reset(0)
    disturb(learner, 0.005)
    with pytest.raises(AlignmentError, match="has not the trainer's weights"):
        sampler(transfer=Forgets()).reset(1)


def test_an_adapter_is_sent_with_its_base(
    sampler: Callable[..., VllmSampler], learner: Any, desk_chat: Chat
) -> None:
    add_adapter(learner, Lora(rank=4, alpha=8.0), seed=0)
    disturb(learner)
    policy = sampler()
    policy.reset(1)
    assert gap(learner, rolled(desk_episodes(4), policy, desk_chat, limits=LIMITS), 1.0) < 1e-3


def test_servers_that_cannot_sample_for_a_run_are_refused(
    pair: Pair, sampler: Callable[..., VllmSampler], desk_chat: Chat, tmp_path: Path
) -> None:
    plain = VllmClient(Server(urls=[pair.teacher.url]), "sampler")
    model = load_model(pair.teacher.model, "float32")
    with pytest.raises(ConfigError, match=r"has no /collective_rpc.*VLLM_SERVER_DEV_MODE=1"):
        Reload(plain, model, tmp_path)
    with pytest.raises(
        ConfigError, match=rf"reads {TOKENS + 1} tokens, .* may have 4096.*max_context_tokens"
    ):
        sampler(max_tokens=4096)
    ids = desk_chat.tokenizer.encode("the order of the client 17")
    with pytest.raises(ConfigError, match=r"log-probs of temperature 1.*--logprobs-mode processed_logprobs"):
        Probe(plain, model, 0.7, "float32").check(ids)


# ---- the teacher ----


def test_scores_are_a_local_teachers(
    pair: Pair, scorer: Callable[..., VllmTeacher], desk_chat: Chat, packed: Packed
) -> None:
    local = LocalTeacher(pair.teacher.model, desk_chat)
    hidden = local.score(packed, 4096)
    with torch.no_grad():
        expected = hidden.head(hidden.hidden).log_softmax(-1)
    one = scorer()
    signal = one.score(packed, 4096)
    assert isinstance(signal, SampledLogprobs)
    own = expected.gather(1, packed.target[:, None]).squeeze(1)
    torch.testing.assert_close(signal.logprobs, own, atol=1e-3, rtol=0)
    last = [int(packed.position[packed.row == row].max()) + 1 for row in range(len(packed.rows))]
    assert one.tokens == sum(last) <= local.tokens and 0.8 * local.flops < one.flops <= local.flops
    top = scorer(k=6).score(packed, 4096)
    assert isinstance(top, TeacherTopK)
    best, ids = expected.topk(6)
    assert torch.equal(top.ids, ids)
    torch.testing.assert_close(top.logprobs, best, atol=1e-3, rtol=0)
    torch.testing.assert_close(top.sampled, own, atol=1e-3, rtol=0)


def test_only_what_is_asked_is_scored(scorer: Callable[..., VllmTeacher], packed: Packed) -> None:
    keep = (packed.row == 2) & (packed.position <= packed.position[packed.row == 2].median())
    one = scorer(k=4)
    part, whole = one.score(packed, 4096, keep), scorer(k=4).score(packed, 4096)
    assert one.tokens == int(packed.position[keep].max()) + 1
    for name in ("ids", "logprobs", "sampled"):
        assert torch.equal(getattr(part, name)[keep], getattr(whole, name)[keep])
    assert bool(part.logprobs.logsumexp(-1).isfinite().all() and (part.logprobs.logsumexp(-1) <= 0).all())


def test_a_temperature_or_a_k_that_the_server_has_not_is_refused(
    scorer: Callable[..., VllmTeacher],
) -> None:
    with pytest.raises(
        ConfigError, match=r"at temperature 1 alone.*rollout\.temperature is 0\.7.*kind local"
    ):
        scorer(temperature=0.7)
    with pytest.raises(ConfigError, match=r"top 50 .*refused.*--max-logprobs 50, or take a smaller `k`"):
        scorer(k=50)
    assert scorer(temperature=0.7, scores=False).act([]) == []


def test_it_acts(pair: Pair, scorer: Callable[..., VllmTeacher], desk_chat: Chat) -> None:
    one, local = scorer(temperature=0.7, scores=False), load_model(pair.teacher.model, "float32")
    raw = rolled(desk_episodes(6), one, desk_chat, limits=LIMITS, temperature=0.7)
    assert {turn.actor for t in raw for turn in t.turns} == {Actor.TEACHER}
    assert gap(local, raw, 1.0) < 1e-3  # a teacher's server may say what it likes of its own actions
    history = History("x", (0, 0, 0), raw[0].turns[0].context_ids, (), 6, None)  # type: ignore[arg-type]
    action = one.greedy.act([history])[0]
    assert action.logprobs == (0.0,) * len(action.ids)
    ids = list(history.ids)
    for token in action.ids:
        with torch.no_grad():
            assert int(local(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    assert one.tokens == sum(len(t.action_ids) for r in raw for t in r.turns) + len(action.ids)


# ---- a run ----

TOP = {"kind": "distill", "divergence": "forward_kl", "signal": "teacher_top_k", "k": 8, "tail": "bucket"}


def config(pair: Pair, output: Path, *overrides: str, **changes: Any) -> RunConfig:
    """Sampler and teacher both on vLLM, by default the forward KL on the teacher's top k."""
    raw: dict[str, Any] = {
        "name": "vllm",
        "output": str(output),
        "student": {"model": pair.student.model},
        "teacher": {"kind": "vllm", "model": pair.teacher.model, "urls": [pair.teacher.url]},
        "sampler": {"kind": "vllm", "urls": [pair.student.url]},
        "environments": [{"id": "opd_agents/OrderDesk-v0", "options": {"level": "easy"}}],
        "rollout": {
            "episodes_per_step": 8, "group_size": 2, "max_turns": 2, "max_tokens_per_turn": 8,
            "max_context_tokens": TOKENS,
        },
        "loss": {"components": {"distill": TOP}},
        "trainer": {
            "steps": 8, "learning_rate": 0.06, "optimizer": "muon", "checkpoint_every": 2,
            "tensorboard": False,
        },
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


def test_a_distillation_with_both_on_vllm(pair: Pair, tmp_path: Path, dies_after: Any) -> None:
    whole = tiny.metrics(train(config(pair, tmp_path / "run")))
    assert [row["step"] for row in whole] == [*range(1, 9)]
    ratios = [row["distill/log_ratio"] for row in whole]
    assert sum(ratios[-2:]) < 0.75 * sum(ratios[:2])
    assert all(row["total/teacher_tokens"] > 0 and row["total/flops"] > 0 for row in whole)
    with dies_after(3):
        train(config(pair, tmp_path / "cut"))
    resumed = tiny.metrics(train(config(pair, tmp_path / "cut"), resume=True))
    assert [row["step"] for row in resumed] == [*range(1, 9)]
    again = [row["distill/log_ratio"] for row in resumed]
    assert again[:4] == pytest.approx(ratios[:4], abs=0.2)  # a draw may tip where servers round otherwise
    assert sum(again[-2:]) < 0.75 * sum(again[:2])


def test_the_sampled_reverse_kl_with_both_on_vllm(pair: Pair, tmp_path: Path) -> None:
    method = {"loss": {}, "method": "thinking_machines"}
    rows = tiny.metrics(train(config(pair, tmp_path, "trainer.steps=2", **method)))
    assert len(rows) == 2 and rows[0]["distill/log_ratio"] > 0


@pytest.mark.parametrize("within", ["ensemble", "cache", "other words"])
def test_a_server_teaches_from_within_as_a_local_teacher_does(
    within: str, pair: Pair, tmp_path: Path
) -> None:
    local = {"kind": "local", "model": pair.teacher.model}
    served = local | {"kind": "vllm", "urls": [pair.teacher.url]}

    def said(teacher: dict[str, Any], run: str, **changes: Any) -> float:
        """The mean of log q - log p."""
        plain = {"method": "thinking_machines", "loss": {}, "sampler": {"kind": "transformers"}} | changes
        given = config(pair, tmp_path / run, "trainer.steps=1", teacher=teacher, **plain)
        return float(tiny.metrics(train(given))[0]["loss"])

    wrapped: list[dict[str, Any]] = [local, served]
    again: dict[str, Any] = {}
    if within == "ensemble":
        wrapped = [{"kind": "ensemble", "members": {"it": one, "start": {"kind": "self"}}} for one in wrapped]
    elif within == "other words":
        wrapped = [one | {"align": "bytes"} for one in wrapped]
    else:
        said(local, "played")
        episodes = tmp_path / "played" / "trajectories" / "step-000001.jsonl"
        stored = {"source": {"trajectories": str(episodes)}, "group_size": 1, "max_context_tokens": TOKENS}
        again = {"rollout": stored | {"episodes_per_step": 8}}
        wrapped[1] = {"kind": "cached", "cache": str(tmp_path / "cache"), "of": served}
    expected = said(wrapped[0], "local", **again)
    assert said(wrapped[1], "served", **again) == pytest.approx(expected, abs=1e-3) and expected > 0.01


def test_a_server_that_is_gone_ends_the_run_with_its_name(pair: Pair, tmp_path: Path) -> None:
    gone = "sampler.urls=[http://127.0.0.1:9]"
    with pytest.raises(ConfigError, match=r"sampler\.urls: http://127\.0\.0\.1:9 does not answer as a vLLM"):
        train(config(pair, tmp_path, gone))
    client = VllmClient(Server(urls=["http://127.0.0.1:9"], retries=0), "teacher")
    with pytest.raises(ServerError, match=r"teacher: http://127\.0\.0\.1:9/v1/completions did not answer"):
        client.complete([{"prompt": [1]}], ["a"])
