"""What a teacher costs: how fast it scores, how often it is asked, what it reads, what it takes of a step.

    python benchmarks/teachers.py [scoring|api|tokens|step ...] [--episodes 32] [--repeats 5] [--json]

The shipped student of OrderDesk has played all episodes before anything is timed. One teacher of random
weights scores them in this process, on a vLLM server (tests/vllm_servers.py; left out where vLLM is not
installed), and out of a cache; the log-probs of all three must agree. Every repeat has episodes of its own,
the arms alternate, and ratios are of neighbours. The model behind the API is the scripted expert of the test
server, in a process of its own, so that part times the client. Parts that are not named keep their figures of
the last run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from figures import keep, spread
from teacher_tables import PARTS, page

from opd_agents import envs
from opd_agents.api import ApiClient, Reply, Request
from opd_agents.batch import pack
from opd_agents.config import Endpoint, Vllm, load_config
from opd_agents.episode import Episode, Limits, segment_ids
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.api import ApiPolicy
from opd_agents.policies.base import Policy
from opd_agents.policies.models import build_model, load_chat, load_model, load_tokenizer, save_checkpoint
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder, trajectory_row
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.teachers import Teacher
from opd_agents.teachers.cache import Index, open_cache
from opd_agents.teachers.cached import CachedTeacher
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teachers.log_probs import log_probs
from opd_agents.teachers.vllm import VllmTeacher
from opd_agents.trainer import train_step
from opd_agents.types import Actor, Task, Trajectory, to_json

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))  # its servers and chat templates

DESK = "opd_agents/OrderDesk-v0"
SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
CONTEXT = 384  # tokens of an episode, at most
LIMITS = Limits(max_tokens_per_turn=16, max_context_tokens=CONTEXT)
WIDE = Limits(max_tokens_per_turn=256, max_context_tokens=8192)
MICRO = 8192  # tokens of a forward pass
TOP = 8
TOLERANCE = 1e-3  # nats between two teachers' log-probs
CONCURRENCY = 16


class Bench:
    """The student, what it has played, and the teacher's checkpoint. ``url``: a vLLM server that has it."""

    def __init__(self, folder: Path, episodes: int, repeats: int, shape: Mapping[str, Any] = SHAPE) -> None:
        self.folder, self.episodes, self.repeats = folder, episodes, repeats
        self.path = str(load_config("orderdesk_opd").student.model)
        self.chat = load_chat(self.path, load_tokenizer(self.path))
        self.student = load_model(self.path, "float32")
        self.teacher = folder / "teacher"
        model = build_model("llama", dict(shape), self.chat.tokenizer, seed=1)
        save_checkpoint(self.teacher, model, self.chat.tokenizer, self.chat.settings)
        self.url: str | None = None
        self.facts = {
            "teacher parameters": model.num_parameters(),
            "student parameters": self.student.num_parameters(),
            "episodes": episodes, "repeats": repeats, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        }  # fmt: skip

    def play(self, number: int) -> list[Trajectory]:
        """The student's episodes of repeat ``number``; no two repeats share a task."""
        sampler = TransformersSampler(self.student, self.chat.end_ids, actor=Actor.STUDENT, temperature=1.0)
        first = number * self.episodes
        return _played(sampler, self.chat, range(first, first + self.episodes), LIMITS, level="easy")

    def teachers(self, batches: Sequence[Sequence[Trajectory]], k: int) -> dict[str, Teacher]:
        """By arm, of ``k`` most probable tokens each; the cache holds all ``batches``."""
        local = LocalTeacher(str(self.teacher), self.chat)
        wanted = Index("the teacher", self.chat.fingerprint, 1.0, k)
        cached = CachedTeacher(open_cache(self.folder / f"cache-{k}", wanted), k)
        everything = [one for batch in batches for one in batch]
        cached.fill(local, everything, len(everything), MICRO)
        arms: dict[str, Teacher] = {"local": local}
        if self.url is not None:
            settings = Vllm(kind="vllm", model=str(self.teacher), urls=[self.url])
            arms["vLLM"] = VllmTeacher(
                settings, "teacher", settings.model, self.chat, temperature=1.0, scores=True, k=k,
                max_tokens=CONTEXT,
            )  # fmt: skip
        return arms | {"cached": cached}


def _played(policy: Policy, chat: Any, tasks: range, limits: Limits, **options: Any) -> list[Trajectory]:
    episodes = [Episode(f"e{n}", DESK, n, Task(str(n), "train"), (0, 0, n), options) for n in tasks]
    return rollout(episodes, policy, make=envs.make, chat=chat, limits=limits, temperature=1.0)


def _alternating(arms: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Every arm in every repeat, and in one before them for warming up; the arm that begins changes."""
    for repeat in range(repeats + 1):
        for arm in arms[:: -1 if repeat % 2 else 1]:
            yield repeat, arm


# ---- the parts ----


def scoring(bench: Bench) -> list[dict[str, Any]]:
    """Tokens per second of whole histories until the log-probs of the action tokens are here; asserts that
    all arms tell the same, and read every token of an episode once."""
    batches = [bench.play(number) for number in range(bench.repeats + 1)]
    rows: list[dict[str, Any]] = []
    for k in (0, TOP):
        arms, told = bench.teachers(batches, k), dict[int, torch.Tensor]()
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        of_a_core: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat, arm in _alternating([*arms], bench.repeats):
            packed, before = pack(batches[repeat]), arms[arm].tokens
            served, worked, begun = seconds_of_children(), time.process_time(), time.perf_counter()
            found = log_probs(arms[arm].score(packed, MICRO), packed.target, 1.0, k)["logprobs"]
            rates[arm].append(packed.n_tokens / (time.perf_counter() - begun))
            core = time.process_time() - worked + seconds_of_children() - served
            of_a_core[arm].append(packed.n_tokens / core)
            assert float((found - told.setdefault(repeat, found)).abs().max()) < TOLERANCE, (arm, k)
            read = arms[arm].tokens - before
            assert read == (0 if arm == "cached" else packed.n_tokens), (arm, read, packed.n_tokens)
        rows += [
            row | {"tokens_per_core_second": spread(of_a_core[row["arm"]][1:])}
            for row in _rates(rates, "tokens_per_second", {"top k": k})
        ]
    return rows


def seconds_of_children() -> float:
    """A core's time that the processes below this one took so far, as Linux counts it."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(file.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    above, taken = {os.getpid()}, 0
    while below := {pid for pid, parent in parents.items() if parent in above and pid not in above}:
        above |= below
        taken += sum(ticks[pid] for pid in below)
    return taken / os.sysconf("SC_CLK_TCK")


def _rates(rates: Mapping[str, Sequence[float]], key: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row an arm, each but the first with its ratio to it."""
    first = next(iter(rates))
    rows = []
    for arm, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(values[1:], rates[first][1:], strict=True)]
        row = {"arm": arm, **fields, key: spread(values[1:])}
        rows.append(row | ({} if arm == first else {"times_the_first": spread(ratios)}))
    return rows


class Noting(ApiClient):
    """Keeps what it was asked."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.noted: list[Request] = []

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        self.noted += requests
        return super().ask(requests)


def api(bench: Bench, url: str) -> list[dict[str, Any]]:
    """Answered requests per second, and the client's milliseconds of a core for one: the turns of episodes
    that the expert plays, all asked for at once."""
    numbered = count()

    def client(concurrency: int = CONCURRENCY, *, store: Path | None = None) -> Noting:
        settings = Endpoint(base_url=url, key=None, concurrency=concurrency)
        return Noting("expert", settings, store=store or bench.folder / f"answers-{next(numbered)}.sqlite")

    with closing(client()) as asked:
        policy = ApiPolicy(asked, actor=Actor.TEACHER, temperature=0.0)
        _played(policy, None, range(bench.episodes), LIMITS, level="easy")
        requests = asked.noted
    some, one_by_one, stored = f"asked, {CONCURRENCY} at once", "asked, one by one", "stored"
    rates: dict[str, list[float]] = {some: [], one_by_one: [], stored: []}
    cpu: dict[str, list[float]] = {arm: [] for arm in rates}
    kept = bench.folder / "kept.sqlite"
    for _, arm in _alternating([*rates], bench.repeats):
        made = {some: client, one_by_one: lambda: client(1), stored: lambda: client(store=kept)}[arm]()
        with closing(made) as asked:
            begun, worked = time.perf_counter(), time.process_time()
            replies = asked.ask(requests)
            answered = asked.counts["requests"]
            rates[arm].append(answered / (time.perf_counter() - begun))
            cpu[arm].append(1000 * (time.process_time() - worked) / answered)
        assert all(reply.failure is None for reply in replies)
    rows = _rates(rates, "requests_per_second", {"requests": len(requests)})
    return [row | {"cpu_ms": spread(cpu[row["arm"]][1:])} for row in rows]


def tokens(bench: Bench) -> list[dict[str, Any]]:
    """Teacher tokens of an episode over its own, by the template and the special tokens of Qwen3."""
    from families import chat

    off = {"enable_thinking": False}
    rows = []
    for level in ("easy", "hard"):
        played = {
            history: _played(
                ExpertPolicy(), chat("qwen3", kwargs=off, history=history), range(bench.episodes), WIDE,
                level=level,
            )
            for history in ("append", "template")
        }  # fmt: skip
        own = [len(segment_ids(one.turns)) for one in played["append"]]
        read = {
            "scores, history: append": [pack([one]).n_tokens for one in played["append"]],
            "scores, history: template": [pack([one]).n_tokens for one in played["template"]],
            "acts behind an API": [_asked_in_full(one) for one in played["append"]],
        }
        turns = mean(len(one.turns) for one in played["append"])
        for arm, counts in read.items():
            times = spread([teacher / student for teacher, student in zip(counts, own, strict=True)])
            rows.append({"arm": arm, "level": level, "turns": turns, "tokens": mean(own), "times": times})
    return rows


def _asked_in_full(one: Trajectory) -> int:
    """Every turn's prompt is the whole conversation before it."""
    return sum(len(segment_ids(one.turns[: number + 1])) for number in range(len(one.turns)))


def step(bench: Bench) -> list[dict[str, Any]]:
    """Steps of training by the sampled-token reverse KL, of runs that play and of runs on stored episodes,
    with what the trainer logs of them."""
    stored = bench.folder / "episodes.jsonl"
    stored.write_text("".join(to_json(trajectory_row(one)) + "\n" for one in bench.play(0)))
    local = {"model": str(bench.teacher)}
    teachers: dict[str, Any] = {"local": local}
    if bench.url is not None:
        teachers["vLLM"] = {"kind": "vllm", "urls": [bench.url]} | local
    cached = {"kind": "cached", "cache": str(bench.folder / "cache"), "of": local}
    sessions = {("played", arm): _session(bench, teacher, {}) for arm, teacher in teachers.items()}
    source = {"source": {"trajectories": str(stored)}}
    sessions |= {
        ("stored", arm): _session(bench, teacher, source)
        for arm, teacher in (teachers | {"cached": cached}).items()
    }
    lines: dict[str, list[dict[str, float]]] = {f"{arm}, {how}": [] for how, arm in sessions}
    named = dict(zip(lines, sessions.values(), strict=True))
    for _, arm in _alternating([*lines], bench.repeats):
        lines[arm].append(train_step(named[arm]))
    return [
        {
            "arm": arm, "seconds": spread([row["seconds"] for row in logged[1:]]),
            "teacher_seconds": spread([row["teacher_seconds"] for row in logged[1:]]),
            "share": spread([row["teacher_seconds"] / row["seconds"] for row in logged[1:]]),
        }
        for arm, logged in lines.items()
    ]  # fmt: skip


def _session(bench: Bench, teacher: Mapping[str, Any], source: Mapping[str, Any]) -> Session:
    played = {} if source else {"environments": [{"id": DESK, "options": {"level": "easy"}}]}
    config = load_config(
        {
            "name": "bench",
            "output": tempfile.mkdtemp(dir=bench.folder),
            "method": "thinking_machines",
            "student": {"model": bench.path},
            "teacher": dict(teacher),
            "rollout": {"episodes_per_step": bench.episodes, "group_size": 1, "max_tokens_per_turn": 16}
            | {"max_context_tokens": CONTEXT, **source},
            "trainer": {"steps": 1000, "learning_rate": 1e-9, "micro_batch_tokens": MICRO}
            | {"tensorboard": False, "gradient_shares_every": 1000},
        }
        | played
    )
    return load_session(config, RunFolder(config.folder, config.model_dump(mode="json"), resume=False))


# ---- servers ----


@contextmanager
def expert_server() -> Iterator[str]:
    """The test server of OrderDesk's expert in a process of its own."""
    command = [sys.executable, str(TESTS / "api_server.py"), DESK, "level=easy", "port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip().partition("=")[2]
    finally:
        process.kill()
        process.wait()


@contextmanager
def vllm_server(bench: Bench) -> Iterator[str | None]:
    """The teacher on vLLM, with a thread as here; None where there is no vLLM."""
    from vllm_servers import serving, vllm_python

    if vllm_python() is None:
        yield None
        return
    options = ["--max-model-len", str(CONTEXT + 1), "--max-logprobs", str(TOP)]
    with serving(bench.folder / "log", (bench.teacher, {}, options)) as [served]:
        yield served.url


# ---- the program ----


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """One part, with the machine's load before and after."""
    load = os.getloadavg()[0]
    match name:
        case "scoring":
            rows = scoring(bench)
        case "step":
            rows = step(bench)
        case "tokens":
            rows = tokens(bench)
        case _:
            with expert_server() as url:
                rows = api(bench, url)
    loads = {"load before": round(load, 2), "load after": round(os.getloadavg()[0], 2)}
    return bench.facts | loads | {"rows": rows}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}; all.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of a repeat.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Of each arm.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where teachers.json and .md go.")] = Path("benchmarks/results"),
) -> None:
    """Speed and cost of teachers: in this process, on vLLM, cached, behind an API."""
    torch.set_num_threads(threads)
    file = out / "teachers.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        bench = Bench(Path(folder), episodes, repeats)
        for name in parts or PARTS:  # each is kept at once
            if name in ("scoring", "step") and bench.url is None:
                bench.url = servers.enter_context(vllm_server(bench))
            result[name] = measure(bench, name)
            result = {name: result[name] for name in PARTS if name in result}
            keep(out, "teachers", result, page(result))
    print(json.dumps(result, indent=1) if as_json else page(result))


if __name__ == "__main__":
    typer.run(main)
