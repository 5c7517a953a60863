"""Run policies on a suite."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opd_agents import envs
from opd_agents.config import Endpoint, EnvironmentSource
from opd_agents.distributed import ALONE, World
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError, UserError
from opd_agents.evaluation.comparing import Entry, Played
from opd_agents.evaluation.contestants import (
    DEFAULT,
    Contestant,
    check_experts,
    identity,
    load_contestant,
    on_vllm,
    runs_of,
)
from opd_agents.evaluation.gates import parse_gate
from opd_agents.evaluation.records import Records, begin, stem
from opd_agents.evaluation.results import summary, versions
from opd_agents.evaluation.suites import Suite, load_suite
from opd_agents.rollout import rollout
from opd_agents.runs import write_whole
from opd_agents.tasks import split_sizes
from opd_agents.types import Task, Trajectory

ANSWERS = "answers.sqlite"


@dataclass(frozen=True, slots=True)
class Plan:
    """What each policy plays: ``sampled`` and ``greedy`` episodes, one greedy for each task."""

    suite: Suite
    sampled: Sequence[Episode]
    greedy: Sequence[Episode]

    def rollout(
        self,
        contestant: Contestant,
        greedy: bool,
        on_finished: Callable[[Trajectory], None] = lambda trajectory: None,
    ) -> Callable[[Sequence[Episode]], list[Trajectory]]:
        """Plays episodes of one of the two kinds."""
        return partial(
            rollout, policy=contestant.greedy if greedy else contestant.sampled, make=envs.launch,
            chat=contestant.chat, limits=self.suite.rollout_limits(),
            temperature=0.0 if greedy else self.suite.temperature, on_finished=on_finished,
        )  # fmt: skip


def plan(suite: Suite, split: str, limit: int | None, seed: int, samples: int | None = None) -> Plan:
    """``samples`` of None: the suite's, and one where a ``limit`` makes it short. Raises as
    :meth:`Suite.chosen`."""
    many = samples or (suite.samples if limit is None else 1)
    return Plan(suite, suite.episodes(split, limit, seed, many), suite.episodes(split, limit, seed))


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
    """The sampled and the greedy episodes, shared out among the processes of ``world``."""
    asked = plan(suite, split, limit, seed)
    sampled = world.shared(asked.sampled, asked.rollout(contestant, False, on_finished))
    return sampled, world.shared(asked.greedy, asked.rollout(contestant, True, on_finished))


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
    samples: int | None = None,
    temperature: float | None = None,
    concurrency: int | None = None,
    sampler: str = "transformers",
    servers: Sequence[str] = (),
    gates: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate ``policies`` on the test tasks of a suite, or of an environment made with ``options``; the
    command line's ``evaluate``.

    Every policy plays the same tasks, ``samples`` times (None: the suite's number, 1 with a ``limit``) at
    ``temperature`` and once greedily. The first policy is the baseline that others are compared with and
    that ``gates`` may name. A folder of seeds stands for its runs. With ``out`` every episode is written
    there as it ends, an equal call goes on from them, and a model behind ``endpoint`` (``api:MODEL``) is paid
    once for an answer. Raises UserError for unknown names before anything runs.
    """
    loaded = _asked(load_suite(suite, options), temperature, concurrency)
    entries = [Entry(name, runs_of(name)) for name in dict.fromkeys(policies)]
    if not entries:
        raise ConfigError("No policy was given. Name one or more, such as expert, random, or a run folder.")
    everyone = list(dict.fromkeys(policy for entry in entries for policy in entry.policies.values()))
    vllm = on_vllm(sampler, servers, everyone, loaded.limits.max_context_tokens)
    asked = plan(loaded, split, limit, seed, samples)
    many = len(asked.sampled) // len(asked.greedy)
    check_experts(everyone, asked.greedy)
    conditions = [parse_gate(gate, len(entries), many) for gate in gates]
    who = {name: identity(name, endpoint) for name in everyone}
    how = {
        "suite": loaded.model_dump(mode="json"), "split": split, "limit": limit, "seed": seed,
        "samples": many, "sampler": sampler,
    }  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None:
        begin(folder, how, who)
    store = folder and folder / ANSWERS
    played = {
        name: _play_all(
            asked, partial(load_contestant, name, loaded.temperature, endpoint, store, vllm),
            folder and folder / f"eval-{stem(name)}",
        )
        for name in everyone
    }  # fmt: skip
    result = summary(loaded, entries, played, conditions) | {
        "split": split, "how": how | {"policies": who, "versions": versions()}
    }  # fmt: skip
    if folder is not None:
        write_whole(folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def _asked(suite: Suite, temperature: float | None, concurrency: int | None) -> Suite:
    """The suite with what the call changes."""
    limits = suite.limits.model_dump() | ({"concurrency": concurrency} if concurrency else {})
    changes = {"limits": limits} | ({} if temperature is None else {"temperature": temperature})
    try:
        return Suite.model_validate(suite.model_dump() | changes)
    except ValueError as error:
        raise ConfigError(f"--temperature or --concurrency cannot be used: {error}") from None


def _play_all(asked: Plan, load: Callable[[], Contestant], stem: Path | None) -> Played:
    """All episodes of a policy; those that ``stem``.jsonl and ``stem``.greedy.jsonl hold are not played
    again, and a policy with nothing left to play is not loaded."""
    contestant = cache(load)
    results, spent = [], dict[str, float]()
    for greedy, episodes, ending in ((False, asked.sampled, ".jsonl"), (True, asked.greedy, ".greedy.jsonl")):
        records = Records(stem and stem.with_name(stem.name + ending))
        missing = [episode for episode in episodes if episode.uid not in records.done]
        if missing:
            who = contestant()
            keep = partial(_keep, records, who, time.perf_counter(), who.spent())
            asked.rollout(who, greedy, keep)(missing)
        results.append(records.finish([episode.uid for episode in episodes]))
        spent = {key: spent.get(key, 0) + records.spent.get(key, 0) for key in (*spent, *records.spent)}
    return Played(results[0], results[1], spent)


def _keep(
    records: Records, who: Contestant, started: float, before: Mapping[str, float], trajectory: Trajectory
) -> None:
    """Record an episode, with what has been spent since the first began."""
    since = {key: value - before.get(key, 0) for key, value in who.spent().items()}
    records.add(trajectory, {"seconds": round(time.perf_counter() - started, 3)} | since)


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
    check_experts([policy], requests)
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
