"""The client of vLLM servers, against one that answers as told, or misbehaves."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from opd_agents.config import Lora, Server, load_config
from opd_agents.errors import ConfigError, ServerError
from opd_agents.policies import transfer, vllm_client
from opd_agents.policies.adapters import add_adapter
from opd_agents.policies.vllm_client import VllmClient


class Fake(ThreadingHTTPServer):
    """Answers completions by ``answer(number of the request, body)``: a choice, a status, bytes that are sent
    as they are, or None to hang up. It serves the models ``served`` and reads any text as ``words``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[int, dict[str, Any]], Any] = lambda number, body: {}) -> None:
        self.answer, self.seen, self.headers = answer, list[dict[str, Any]](), list[dict[str, str]]()
        self.served, self.words, self.length, self.busy, self.most = ["tiny"], [7, 8], 4096, 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        if self.path == "/get_world_size":
            return self.send({"world_size": 2})
        self.send({"data": [{"id": n, "max_model_len": self.server.length} for n in self.server.served]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            return self.send({"tokens": self.server.words})
        with self.server.lock:
            self.server.seen.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.seen)
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        answer = self.server.answer(number, body)
        with self.server.lock:
            self.server.busy -= 1
        if answer is None:
            self.connection.close()
        elif isinstance(answer, int):
            self.send({"error": "told to"}, answer)
        elif isinstance(answer, bytes):
            self.send(answer)
        else:
            self.send({"choices": [{"prompt_token_ids": body["prompt"]} | answer]})

    def send(self, answer: Any, status: int = 200) -> None:
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(*arguments: Any) -> Fake:
        made.append(Fake(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "BACKOFF", 0.01)


def client(*fakes: Fake, **settings: Any) -> VllmClient:
    return VllmClient(Server(urls=[one.url for one in fakes], **settings), "teacher")


def asked(number: int) -> dict[str, Any]:
    return {"prompt": [number, 2, 3], "max_tokens": 1}


def test_answers_stand_in_the_order_of_their_requests(fake: Callable[..., Fake]) -> None:
    def slow_first(number: int, body: dict[str, Any]) -> Any:
        time.sleep(0.2 if body["prompt"][0] == 0 else 0.0)
        return {"told": body["prompt"][0]}

    server = fake(slow_first)
    given = client(server).complete([asked(i) for i in range(20)], [str(i) for i in range(20)])
    assert [choice["told"] for choice in given] == list(range(20))
    sent = server.seen[0]
    assert sent["return_token_ids"] and sent["top_p"] == 1.0 and sent["top_k"] == 0 and sent["ignore_eos"]


@pytest.mark.parametrize("trouble", [429, 500, 503, None, b'{"choices": [', b"<html>"])
def test_what_may_pass_is_asked_again(fake: Callable[..., Fake], trouble: Any) -> None:
    server = fake(lambda number, body: trouble if number <= 2 else {"told": 5})
    assert client(server, retries=2).complete([asked(0)], ["a"])[0]["told"] == 5
    assert len(server.seen) == 3
    with pytest.raises(ServerError, match="teacher: http"):
        client(fake(lambda number, body: trouble), retries=1).complete([asked(0)], ["a"])


def test_a_slow_answer_is_given_up_and_asked_again(fake: Callable[..., Fake]) -> None:
    def answer(number: int, body: dict[str, Any]) -> Any:
        if number == 1:
            time.sleep(1.0)
        return {"told": number}

    assert client(fake(answer), timeout=0.3).complete([asked(0)], ["a"])[0]["told"] == 2


def test_a_refusal_is_not_asked_again(fake: Callable[..., Fake]) -> None:
    server = fake(lambda number, body: 400)
    with pytest.raises(ServerError, match=r"answered 400.*told to"):
        client(server, retries=5).complete([asked(0)], ["a"])
    assert len(server.seen) == 1


def test_an_answer_about_other_tokens_is_refused(fake: Callable[..., Fake]) -> None:
    server = fake(lambda number, body: {"prompt_token_ids": [9, 2, 3]})
    with pytest.raises(ServerError, match="other token ids"):
        client(server).complete([asked(0)], ["a"])


def test_a_server_that_fails_is_left_alone_while_another_works(fake: Callable[..., Fake]) -> None:
    broken, works = fake(lambda number, body: 500), fake(lambda number, body: {"told": 1})
    both = client(broken, works, concurrency=1)
    for i in range(40):
        both.complete([asked(i)], [str(i)])
    assert len(works.seen) == 40 and len(broken.seen) == 1


def test_a_conversation_stays_with_its_server_and_load_is_shared(fake: Callable[..., Fake]) -> None:
    servers = [fake(lambda number, body: time.sleep(0.05) or {}) for _ in range(2)]
    both = client(*servers)
    for _ in range(3):  # turns of 24 episodes
        both.complete([asked(i) for i in range(24)], [f"episode-{i}" for i in range(24)])
    turns = [Counter(body["prompt"][0] for body in server.seen) for server in servers]
    assert all(set(count.values()) == {3} for count in turns)
    assert min(len(count) for count in turns) >= 8
    skewed = [fake(lambda number, body: time.sleep(0.2) or {}) for _ in range(2)]
    client(*skewed).complete([asked(i) for i in range(40)], ["one"] * 40)  # all at home on one of them
    assert min(len(server.seen) for server in skewed) >= 10


def test_concurrency_bounds_what_is_under_way(fake: Callable[..., Fake]) -> None:
    server = fake(lambda number, body: time.sleep(0.02) or {})
    client(server, concurrency=3).complete([asked(i) for i in range(20)], ["a"] * 20)
    assert server.most == 3


def test_the_key_comes_from_the_environment(
    fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake()
    monkeypatch.delenv("MY_VLLM_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.key: the environment variable MY_VLLM_KEY is not set"):
        client(server, key="MY_VLLM_KEY")
    monkeypatch.setenv("MY_VLLM_KEY", "secret-17")
    client(server, key="MY_VLLM_KEY").complete([asked(0)], ["a"])
    headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["authorization"] == "Bearer secret-17"


def test_the_check_names_what_does_not_fit(fake: Callable[..., Fake], desk_chat: Any) -> None:
    server = fake()
    server.words = desk_chat.tokenizer.encode(vllm_client.TEXT, add_special_tokens=False)
    client(server).check(desk_chat, 4096)
    with pytest.raises(ConfigError, match=r"reads 4096 tokens.* may have 4096 and its answer 1 more.* 4097"):
        client(server).check(desk_chat, 4096, beyond=1)
    server.served = ["one", "two"]
    with pytest.raises(ConfigError, match=r"served_as: .* has several models; name one of one, two"):
        client(server).check(desk_chat, 1)
    with pytest.raises(ConfigError, match="has no 'three'"):
        client(server, served_as="three").check(desk_chat, 1)
    two = client(server, served_as="two")
    two.check(desk_chat, 1)
    two.complete([asked(0)], ["a"])
    assert server.seen[-1]["model"] == "two"
    server.words = [1, 2, 3]
    with pytest.raises(ConfigError, match="another tokenizer than the student"):
        two.check(desk_chat, 1)
    server.server_close()
    nobody = VllmClient(Server(urls=["http://127.0.0.1:9"]), "sampler")
    with pytest.raises(ConfigError, match=r"sampler\.urls: .*does not answer as a vLLM server.*vllm serve"):
        nobody.check(desk_chat, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampler": {"kind": "vllm", "urls": []}}, r"`sampler\.urls`.*at least 1"),
        ({"sampler": {"kind": "vllm", "urls": ["localhost:8000"]}}, "no address such as http"),
        ({"sampler": {"kind": "vllm", "urls": ["http://a", "http://a/v1/"]}}, "the same server .* twice"),
        ({"sampler": {"kind": "vllm", "urls": ["http://a"], "key": "sk-123"}}, r"sampler\.key.*never a key"),
        ({"sampler": {"kind": "sglang"}}, r"unknown kind 'sglang'; known are transformers, vllm"),
        ({"teacher": {"kind": "vllm", "urls": ["http://a"]}}, r"`teacher\.model`"),
        ({"teacher": {"kind": "vllm", "model": "m", "urls": ["http://a"], "k": 5}}, r"`teacher\.k`"),
    ],
)
def test_sections_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny.mix(tmp_path, tmp_path / "teacher", **change)


def test_what_a_server_cannot_is_refused_with_the_config(tmp_path: Path) -> None:
    server = {"kind": "vllm", "urls": ["http://127.0.0.1:9"]}
    share = tiny.mix(tmp_path, tmp_path / "teacher").model_dump(mode="json")
    share["correction"], share["rollout"]["teacher_share"], share["sampler"] = None, 0.5, server
    share["loss"]["components"].pop("correction")
    with pytest.raises(ConfigError, match=r"teacher_share.*sampler\.kind: transformers"):
        load_config(share)
    thinking = {"chat": tiny.BRIEF | {"thinking_budget": 4}}
    with pytest.raises(ConfigError, match=r"thinking_budget.*sampler\.kind: transformers"):
        tiny.mix(tmp_path, tmp_path / "teacher", sampler=server, **thinking)
    with pytest.raises(ConfigError, match=r"thinking_budget.*teacher\.kind: local"):
        tiny.mix(tmp_path, tmp_path / "teacher", teacher=server | {"model": "m"}, **thinking)


def test_weights_go_from_gpu_to_gpu_through_vllms_own_sender(
    fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]
) -> None:
    """A stand-in for vLLM's sender, which announces all weights and then sends what was announced."""
    told: list[Any] = []

    class Sender:
        def __init__(self, info: SimpleNamespace, client: Any, source: Any) -> None:
            self.client, self.source = client, source
            told.append(info)

        def send_weights(self) -> None:
            self.client.start_weight_update()
            names = [weight.name for weight in self.source.metadata()]
            self.client.update_weights({"names": names})
            for weight, (name, tensor) in zip(self.source.metadata(), self.source, strict=True):
                assert weight == (name, tensor.dtype, tuple(tensor.shape))
            self.client.finish_weight_update()

    vllm = SimpleNamespace(
        NCCLTrainerInitInfo=lambda **given: SimpleNamespace(**given),
        NCCLTrainerWeightTransferEngine=SimpleNamespace(trainer_init=Sender),
    )
    monkeypatch.setattr(transfer, "need", lambda module, extra, what: vllm)
    server = fake(lambda number, body: b"{}")
    way = transfer.Nccl(client(server), tiny_llama(seed=4))
    assert told[0].world_size == 3 and told[0].rank == 0 and told[0].master_address == "127.0.0.1"
    way.send()
    assert next(body for body in server.seen if body)["update_info"]["names"][-1] == "lm_head.weight"


def test_what_is_served_of_a_model_is_whole(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(seed=4)  # its head is its embeddings
    weights = transfer.served_weights(model)
    assert set(weights) == set(model.state_dict()) and "lm_head.weight" in weights
    add_adapter(model, Lora(rank=2, alpha=4.0), seed=0)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=drawn)
    served = transfer.served_weights(model)
    assert set(served) == set(weights)
    whole = tiny_llama(seed=4)
    ids = torch.arange(20)[None]
    before = whole(ids).logits.detach()
    whole.load_state_dict(served)
    with torch.no_grad():
        assert (model(ids).logits - before).abs().max() > 0.01  # the adapter does something
        torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
