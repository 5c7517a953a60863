"""A white-box teacher on vLLM servers: log-probs of the student's tokens, or its top k, and whole actions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Vllm
from opd_agents.distributed import join_world
from opd_agents.errors import ConfigError, ServerError
from opd_agents.policies.base import Action, History, Policy
from opd_agents.policies.models import forward_flops, load_outline
from opd_agents.policies.vllm import Completes, VllmPolicy
from opd_agents.policies.vllm_client import TEXT, VllmClient
from opd_agents.policies.vllm_engine import VllmEngine
from opd_agents.teachers.base import Capability, SampledLogprobs, TeacherTopK
from opd_agents.teachers.conditioning import ConditionedPolicy, Conditioner
from opd_agents.teachers.local import check_same_chat
from opd_agents.types import Actor, Message

ROUNDING = 0.01  # of the mass of some tokens


class VllmTeacher:
    """The checkpoint ``path`` on the servers of ``settings``, or in their engine; with ``k`` it gives its top
    k, else the log-probs of the sampled tokens. Each row of a packed table is one request.

    With a ``conditioner`` it acts on histories that tell it more; what it scores, the caller has conditioned.
    """

    can: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K, Capability.ACT}
    )

    def __init__(
        self,
        settings: Vllm,
        place: str,
        path: str,
        chat: Chat,
        *,
        temperature: float,
        scores: bool,
        k: int = 0,
        max_tokens: int,
        dtype: str = "float32",
        conditioner: Conditioner | None = None,
    ) -> None:
        """``max_tokens``: of a whole conversation; ``dtype``: of an engine whose settings name none. Raises
        UserError for a checkpoint of another chat, for servers that cannot be used (another tokenizer,
        another temperature, too few tokens or log-probs), and for an engine that cannot be had."""
        check_same_chat(path, chat)
        self.k, self.temperature = k, temperature
        self.client: Completes
        if settings.engine is None:
            self.client = client = VllmClient(settings, place)
            client.check(chat, max_tokens, beyond=1)
        else:
            self.client = VllmEngine(
                settings.engine, place, path, dtype=settings.engine.dtype or dtype, max_tokens=max_tokens + 1,
                k=k, ranks=join_world().size,
            )  # fmt: skip
        if scores:
            self._check_scores(chat.prompt_ids([Message("user", TEXT)], (), ""))
        self.model = load_outline(path)
        self._hot, self._best = (
            VllmPolicy(self.client, chat, self.model, actor=Actor.TEACHER, temperature=t)
            for t in (temperature, 0.0)
        )
        self.acting: Policy = self._hot
        self.greedy: Policy = self._best
        if conditioner is not None:
            self.acting = ConditionedPolicy(self._hot, conditioner)
            self.greedy = ConditionedPolicy(self._best, conditioner)
        self.scored_tokens = 0
        self._scoring_flops = 0

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        return self.scored_tokens + self._hot.generated_tokens + self._best.generated_tokens

    @property
    def flops(self) -> int:
        return self._scoring_flops + self._hot.flops + self._best.flops

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self.acting.act(histories)

    def score(
        self, packed: Packed, max_tokens: int, keep: Tensor | None = None
    ) -> SampledLogprobs | TeacherTopK:
        """Log-probs of the action tokens that ``keep`` (bool [N]) names, of each row once, as far as its last
        one; the servers choose their batches, whatever ``max_tokens`` says. Raises ServerError."""
        self._hot.release()
        self._best.release()
        tokens = torch.arange(len(packed.target)) if keep is None else keep.nonzero().squeeze(1)
        rows = {row: tokens[packed.row[tokens] == row] for row in packed.row[tokens].unique().tolist()}
        ends = {row: int(packed.position[own].max()) + 1 for row, own in rows.items()}
        prompts = {row: packed.rows[row][:end].tolist() for row, end in ends.items()}
        bodies = [self._body(p, k=self.k, temperature=self.temperature) for p in prompts.values()]
        choices = self.client.complete(bodies, [str(row) for row in rows])
        size = len(packed.target)
        sampled = torch.zeros(size)
        ids = torch.arange(self.k).repeat(size, 1)
        logprobs = torch.full((size, self.k), -float(max(self.k, 1)))  # finite, of less mass than 1
        for (row, own), choice in zip(rows.items(), choices, strict=True):
            given = self._read(prompts[row], choice)
            places = packed.position[own].tolist()
            sampled[own] = torch.tensor([given[at][str(prompts[row][at])]["logprob"] for at in places])
            if self.k:
                best = [_best(given[at], self.k) for at in places]
                ids[own] = torch.tensor([[token for token, _ in top] for top in best])
                logprobs[own] = torch.tensor([[value for _, value in top] for top in best])
        self._count([len(prompt) for prompt in prompts.values()])
        return TeacherTopK(ids, logprobs, sampled) if self.k else SampledLogprobs(sampled)

    def _body(self, ids: Sequence[int], *, k: int, temperature: float) -> dict[str, Any]:
        return {"prompt": list(ids), "max_tokens": 1, "temperature": temperature, "prompt_logprobs": k}

    def _read(self, ids: Sequence[int], choice: Mapping[str, Any]) -> list[Given]:
        """What is said of every position, nothing of the first. Raises ServerError unless its tokens are
        ``ids``, one by one."""
        given = [place or {} for place in choice["prompt_logprobs"]]
        named = len(given) == len(ids) and all(str(i) in g for i, g in list(zip(ids, given, strict=True))[1:])
        if not named:
            raise ServerError(f"{self.client.place}: a prompt's log-probs are not those of its tokens.")
        return given

    def _count(self, lengths: Sequence[int]) -> None:
        self.scored_tokens += sum(lengths)
        for length in lengths:
            self._scoring_flops += forward_flops(self.model, length, length / 2)

    def _check_scores(self, ids: Sequence[int]) -> None:
        """Raise ConfigError for servers that give too few log-probs, or none, or of another temperature."""
        place, k = self.client.place, max(self.k, 2)
        try:
            plain, heated = (
                self.client.complete_on_each(self._body(ids, k=k, temperature=t))
                for t in (1.0, self.temperature)
            )
        except ServerError as error:
            raise ConfigError(
                f"{place}: a prompt's log-probs, with the top {k} at every token, are refused. Start the "
                f"server with --max-logprobs {k}, or take a smaller `k` in the loss. {error}"
            ) from None
        for url in plain:
            ours, theirs = self._read(ids, plain[url])[1:], self._read(ids, heated[url])[1:]
            if max(sum(math.exp(one["logprob"]) for one in given.values()) for given in ours) > 1 + ROUNDING:
                raise ConfigError(
                    f"{place}: {url} gives logits, not log-probs. Start it with --logprobs-mode raw_logprobs"
                )
            if self.temperature != 1 and not _follows(ours, theirs, self.temperature):
                raise ConfigError(
                    f"{place}: {url} gives a prompt's log-probs at temperature 1 alone, but "
                    f"rollout.temperature is {self.temperature:g}, and a loss compares distributions of one "
                    "temperature. Take rollout.temperature: 1, or a teacher of kind local."
                )


Given: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What a server says of one position: by the token's id its log-prob and its rank."""


def _best(given: Given, k: int) -> list[tuple[int, float]]:
    """The ids of the top k and their log-probs, the most probable first. The prompt's own token stands among
    them, or behind them with a rank above k."""
    ranked = sorted(given.items(), key=lambda item: int(item[1]["rank"]))
    return [(int(token), float(told["logprob"])) for token, told in ranked[:k]]


def _follows(plain: Sequence[Given], heated: Sequence[Given], temperature: float) -> bool:
    """Whether log-probs are nearer to those of ``plain`` (temperature 1) at ``temperature`` than to ``plain``
    itself. Their differences at one position tell, which normalisation leaves out."""
    as_asked = as_plain = 0.0
    for one, other in zip(plain, heated, strict=True):
        tokens = sorted(one.keys() & other.keys())
        first, then = (torch.tensor([given[t]["logprob"] for t in tokens]) for given in (one, other))
        first, then = first - first.mean(), then - then.mean()
        as_asked += float((then - first / temperature).abs().sum())
        as_plain += float((then - first).abs().sum())
    return as_asked < as_plain
