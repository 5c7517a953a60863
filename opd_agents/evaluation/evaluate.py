"""Run policies on a suite."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opd_agents import envs
from opd_agents.chat import Chat
from opd_agents.config import Endpoint, EnvironmentSource
from opd_agents.distributed import ALONE, World
from opd_agents.episode import Episode, Limits
from opd_agents.errors import UnknownName, UserError
from opd_agents.evaluation.metrics import summarise
from opd_agents.evaluation.suites import Suite, load_suite
from opd_agents.policies.base import ExpertPolicy, Policy, RandomPolicy
from opd_agents.rollout import rollout
from opd_agents.runs import latest_checkpoint, trajectory_row, write_whole
from opd_agents.tasks import split_sizes
from opd_agents.types import Actor, Task, Trajectory, to_json

if TYPE_CHECKING:
    from opd_agents.api import ApiClient

SCRIPTED: dict[str, Callable[[], Policy]] = {"expert": ExpertPolicy, "random": RandomPolicy}
DEFAULT = Endpoint()  # where the environment's variables say
ANSWERS = "answers.sqlite"
API = "api:"  # before the name of a model behind an endpoint


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy under evaluation; ``chat`` is None for one that does not sample tokens, ``client`` is that
    of a model behind an API."""

    name: str
    sampled: Policy
    greedy: Policy
    chat: Chat | None
    client: ApiClient | None = None


def load_contestant(
    name: str, temperature: float, endpoint: Endpoint = DEFAULT, store: Path | None = None
) -> Contestant:
    """``expert``, ``random``, ``api:MODEL`` (at ``endpoint``, its answers kept in ``store``), a checkpoint
    directory, or a run folder (its newest checkpoint); a model acts in the dtype of its weights."""
    if name in SCRIPTED:
        policy = SCRIPTED[name]()
        return Contestant(name, policy, policy, None)
    if name.startswith(API):
        return _api_contestant(name, temperature, endpoint, store)
    if not Path(name).exists():
        raise UnknownName("policy", name, SCRIPTED, "opd-agents evaluate --help")
    from opd_agents.policies.models import fit_vocabulary, load_chat, load_model, load_tokenizer, saved_dtype

    path = str(latest_checkpoint(Path(name)))
    tokenizer = load_tokenizer(path)
    model = load_model(path, saved_dtype(Path(path)) or "float32")
    fit_vocabulary(model, tokenizer, path)
    return model_contestant(name, model, load_chat(path, tokenizer), temperature, Actor.STUDENT)


def _api_contestant(name: str, temperature: float, endpoint: Endpoint, store: Path | None) -> Contestant:
    from opd_agents.api import ApiClient
    from opd_agents.policies.api import ApiPolicy

    client = ApiClient(name.removeprefix(API), endpoint, store=store)
    sampled, greedy = (ApiPolicy(client, actor=Actor.STUDENT, temperature=t) for t in (temperature, 0.0))
    return Contestant(name, sampled, greedy, None, client)


def model_contestant(name: str, model: Any, chat: Chat, temperature: float, actor: Actor) -> Contestant:
    from opd_agents.policies.sampler import TransformersSampler

    sampled, greedy = (
        TransformersSampler(model, chat.end_ids, actor=actor, temperature=t, thinking=chat.thinking)
        for t in (temperature, 0.0)
    )
    return Contestant(name, sampled, greedy, chat)


def run_suite(
    contestant: Contestant,
    suite: Suite,
    *,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    on_finished: Callable[[Trajectory], None] = lambda trajectory: None,
    world: World = ALONE,
) -> tuple[list[Trajectory], list[Trajectory]]:
    """One sampled and one greedy episode per task, shared out among the processes of ``world``."""
    results = []
    for policy, temperature in ((contestant.sampled, suite.temperature), (contestant.greedy, 0.0)):
        play = partial(
            rollout, policy=policy, make=envs.launch, chat=contestant.chat, limits=suite.rollout_limits(),
            temperature=temperature, on_finished=on_finished,
        )  # fmt: skip
        results.append(world.shared(suite.episodes(split, limit, seed), play))
    return results[0], results[1]


def evaluate(
    suite: str,
    policies: Sequence[str],
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    split: str = "test",
    seed: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
    endpoint: Endpoint = DEFAULT,
) -> dict[str, Any]:
    """Evaluate ``policies`` on the test tasks of a suite, or of an environment made with ``options``; the
    command line's ``evaluate``.

    With ``out`` the figures and all trajectories are written there, and the answers of models at ``endpoint``
    (``api:MODEL``), which are then paid for once. Raises UserError for unknown names before anything runs.
    """
    loaded = load_suite(suite, options)
    store = Path(out) / ANSWERS if out is not None else None
    contestants = [load_contestant(name, loaded.temperature, endpoint, store) for name in policies]
    rows = []
    for contestant in contestants:
        sampled, greedy = run_suite(contestant, loaded, split=split, limit=limit, seed=seed)
        rows.append({"policy": contestant.name} | summarise(sampled, greedy))
        if contestant.client is not None:
            rows[-1]["api"] = {key: value for key, value in contestant.client.counts.items() if value}
        if out is not None:
            folder = Path(out)
            folder.mkdir(parents=True, exist_ok=True)
            stem = contestant.name.strip("/").replace("/", "-")
            lines = (to_json(trajectory_row(t)) for t in sampled)
            write_whole(folder / f"eval-{stem}.jsonl", "\n".join(lines) + "\n")
    result = {"suite": loaded.name, "split": split, "policies": rows}
    if out is not None:
        write_whole(Path(out) / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def play(
    env_id: str,
    policy: str,
    *,
    episodes: int = 1,
    seed: int = 0,
    split: str = "train",
    options: Mapping[str, Any] = MappingProxyType({}),
    watch: Callable[[Trajectory], None] | None = None,
    endpoint: Endpoint = DEFAULT,
) -> list[Trajectory]:
    """Roll out ``policy`` on tasks 0, 1, ... of an environment's split; ``watch`` sees each as it ends."""
    contestant = load_contestant(policy, 1.0, endpoint)
    requests = [
        Episode(
            uid=str(i),
            env_id=env_id,
            seed=seed + i,
            task=Task(str(i), split),
            stream=(seed, 2**61, i),
            env_kwargs=dict(options),
        )
        for i in range(episodes)
    ]
    # an unknown environment or task is the user's mistake, not a failed episode
    source = EnvironmentSource(id=env_id, split=split, options=dict(options))
    if episodes > (size := split_sizes([source])[0]):
        raise UserError(
            f"{env_id} has {size} tasks in split {split!r}, but {episodes} episodes were asked for."
        )
    return rollout(
        requests,
        contestant.sampled,
        make=envs.launch,
        chat=contestant.chat,
        limits=Limits(),
        temperature=1.0,
        on_finished=watch or (lambda trajectory: None),
    )
