"""Policies by name: who they are, and how they act."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from opd_agents import envs
from opd_agents.chat import Chat
from opd_agents.config import Endpoint, Engine, Server
from opd_agents.episode import Episode
from opd_agents.errors import ConfigError, UnknownName
from opd_agents.policies.base import ExpertPolicy, Policy, RandomPolicy
from opd_agents.runs import latest_checkpoint
from opd_agents.tools import to_json
from opd_agents.types import Actor

if TYPE_CHECKING:
    from opd_agents.api import ApiClient
    from opd_agents.policies.vllm import Completes

SCRIPTED: dict[str, Callable[[], Policy]] = {"expert": ExpertPolicy, "random": RandomPolicy}
DEFAULT = Endpoint()  # where the environment's variables say
API = "api:"  # before the name of a model behind an endpoint
SEED_FOLDER = re.compile(r"seed-(\d+)")
ENGINES_MEMORY = 0.85  # of the GPU's, for all engines together


class Counted(Protocol):
    """A policy that says what it has computed so far."""

    generated_tokens: int

    @property
    def flops(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy under evaluation; ``chat`` is None for one that does not sample tokens, ``client`` is that
    of a model behind an API, ``counted`` are the samplers of another."""

    name: str
    sampled: Policy
    greedy: Policy
    chat: Chat | None
    client: ApiClient | None = None
    counted: tuple[Counted, ...] = ()

    def spent(self) -> dict[str, float]:
        """So far: of a model here or on vLLM ``generated_tokens`` and ``flops``, of one behind an API its
        client's counts, which are above 0."""
        if self.client is not None:
            return {key: value for key, value in self.client.counts.items() if value}
        if not self.counted:
            return {}
        return {
            "generated_tokens": sum(one.generated_tokens for one in self.counted),
            "flops": sum(one.flops for one in self.counted),
        }


@dataclass(frozen=True, slots=True)
class OnVllm:
    """Models act on vLLM: on the servers at ``urls``, which serve the weights under evaluation, or, without
    any, in an engine in this process, to which ``memory`` (a share of the GPU's) belongs. ``max_tokens``: of
    a whole conversation."""

    urls: tuple[str, ...]
    memory: float
    max_tokens: int


def is_model(name: str) -> bool:
    """Whether a policy's name is that of weights on disk."""
    return name not in SCRIPTED and not name.startswith(API)


def runs_of(name: str) -> dict[int | None, str]:
    """The runs of a folder that `train --seeds` wrote, by seed; any other policy is its own, without one."""
    if not is_model(name) or not Path(name).is_dir():
        return {None: name}
    found = [(SEED_FOLDER.fullmatch(child.name), child) for child in Path(name).iterdir() if child.is_dir()]
    seeds = sorted((int(match[1]), str(child)) for match, child in found if match)
    return {seed: run for seed, run in seeds} or {None: name}


def identity(name: str, endpoint: Endpoint) -> dict[str, Any]:
    """What tells a policy from another of its name: of weights their checkpoint and fingerprint. Raises
    UnknownName for a policy that does not exist, CheckpointError where a folder holds none."""
    if name in SCRIPTED:
        return {"kind": "scripted"}
    if name.startswith(API):
        from opd_agents.api.connection import base_url_of

        place = re.sub("//[^/@]*@", "//", base_url_of(endpoint))  # a password may stand there
        return {"kind": "api", "model": name.removeprefix(API), "base_url": place}
    if not Path(name).exists():
        raise UnknownName("policy", name, SCRIPTED, "opd-agents evaluate --help")
    from opd_agents.policies.fingerprint import fingerprint

    checkpoint = str(latest_checkpoint(Path(name)))
    return {"kind": "model", "checkpoint": checkpoint, "weights": fingerprint(checkpoint)}


def check_experts(policies: Iterable[str], episodes: Iterable[Episode]) -> None:
    """Raises ConfigError where the scripted expert is to play and an environment has none."""
    if "expert" not in policies:
        return
    worlds = {(one.env_id, to_json(one.env_kwargs)): one.env_kwargs for one in episodes}
    without = [id for (id, _), options in worlds.items() if not envs.has_expert(id, options)]
    if without:
        raise ConfigError(
            f"No scripted expert in {', '.join(without[:5])}{', ...' if without[5:] else ''}, so the policy"
            " `expert` cannot play there. Leave it out, or take environments that have one."
        )


def load_contestant(
    name: str,
    temperature: float,
    endpoint: Endpoint = DEFAULT,
    store: Path | None = None,
    vllm: OnVllm | None = None,
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
    if vllm is not None:
        return _vllm_contestant(name, path, load_chat(path, tokenizer), temperature, vllm)
    model = load_model(path, saved_dtype(Path(path)) or "float32")
    fit_vocabulary(model, tokenizer, path)
    return model_contestant(name, model, load_chat(path, tokenizer), temperature, Actor.STUDENT)


def _api_contestant(name: str, temperature: float, endpoint: Endpoint, store: Path | None) -> Contestant:
    from opd_agents.api import ApiClient
    from opd_agents.policies.api import ApiPolicy

    client = ApiClient(name.removeprefix(API), endpoint, store=store)
    sampled, greedy = (ApiPolicy(client, actor=Actor.STUDENT, temperature=t) for t in (temperature, 0.0))
    return Contestant(name, sampled, greedy, None, client)


def _vllm_contestant(name: str, path: str, chat: Chat, temperature: float, vllm: OnVllm) -> Contestant:
    from opd_agents.policies.models import load_outline
    from opd_agents.policies.vllm import VllmPolicy

    if chat.thinking is not None:
        raise ConfigError(
            f"{name} has a thinking budget, which is not to be had from vLLM token by token: leave out "
            "--sampler vllm."
        )
    client, outline = _completes(path, chat, vllm), load_outline(path)
    sampled, greedy = (
        VllmPolicy(client, chat, outline, actor=Actor.STUDENT, temperature=t) for t in (temperature, 0.0)
    )
    return Contestant(name, sampled, greedy, chat, counted=(sampled, greedy))


def _completes(path: str, chat: Chat, vllm: OnVllm) -> Completes:
    from opd_agents.policies.models import saved_dtype
    from opd_agents.policies.vllm_client import VllmClient
    from opd_agents.policies.vllm_engine import VllmEngine

    if vllm.urls:
        client = VllmClient(Server(urls=list(vllm.urls)), "sampler")
        client.check(chat, vllm.max_tokens)
        return client
    return VllmEngine(
        Engine(memory=vllm.memory), "sampler", path, dtype=saved_dtype(Path(path)) or "float32",
        max_tokens=vllm.max_tokens, k=0, ranks=1,
    )  # fmt: skip


def on_vllm(sampler: str, servers: Sequence[str], policies: Sequence[str], max_tokens: int) -> OnVllm | None:
    """Where models act: None for this process. Raises ConfigError for what cannot be."""
    if sampler not in ("transformers", "vllm"):
        raise ConfigError(f"--sampler is transformers or vllm, not {sampler!r}.")
    models = [name for name in policies if is_model(name)]
    if servers and sampler != "vllm":
        raise ConfigError("--server is of vLLM's servers: add --sampler vllm.")
    if servers and len(models) > 1:
        raise ConfigError(
            f"--server serves one model, but {' and '.join(models[:2])} are to be played. Evaluate them one "
            "after the other with the same --out: what is finished is not played again."
        )
    if sampler != "vllm" or not models:
        return None
    try:
        urls = tuple(Server(urls=list(servers)).urls) if servers else ()
    except ValueError as error:
        raise ConfigError(f"--server: {error}") from None
    return OnVllm(urls, ENGINES_MEMORY / len(models), max_tokens)


def model_contestant(name: str, model: Any, chat: Chat, temperature: float, actor: Actor) -> Contestant:
    """A model in this process."""
    from opd_agents.policies.sampler import TransformersSampler

    sampled, greedy = (
        TransformersSampler(model, chat.end_ids, actor=actor, temperature=t, thinking=chat.thinking)
        for t in (temperature, 0.0)
    )
    return Contestant(name, sampled, greedy, chat, counted=(sampled, greedy))
