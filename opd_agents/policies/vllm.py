"""Acting on vLLM servers; and the student there, its weights sent after every step, and probed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from opd_agents.chat import Chat
from opd_agents.errors import ConfigError, ServerError
from opd_agents.policies.base import Action, History
from opd_agents.policies.models import forward_flops
from opd_agents.policies.probe import Probe
from opd_agents.policies.vllm_client import TEXT, VllmClient
from opd_agents.types import Actor, Message, StopReason

TRIES = 50  # a tenth of a second apart
PROBED = 512  # tokens of a conversation at most


class Completes(Protocol):
    """A model that answers completion requests in the form of vLLM's servers: token ids and log-probs."""

    place: str

    def complete(self, bodies: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
        """The choice that answers each, in order; one key, one conversation. Raises ServerError."""
        ...

    def complete_on_each(self, body: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The choice of each that answers in its place, by their names. Raises ServerError."""
        ...


class VllmPolicy:
    """Acts at ``temperature`` (0: greedy), one request an episode, each with its own seed.

    ``model`` is what FLOPs are counted of, on any device, `meta` included: each token as read once, though
    what several episodes begin with may be read less often, and what a full cache drops more often.
    """

    def __init__(
        self, client: Completes, chat: Chat, model: PreTrainedModel, *, actor: Actor, temperature: float
    ) -> None:
        self.client, self.model, self.actor, self.temperature = client, model, actor, temperature
        self.policy_version = 0
        self.generated_tokens = 0
        self.flops = 0
        self._end_ids = sorted(chat.end_ids)
        self._vocabulary = max(chat.tokenizer.get_vocab().values()) + 1
        self._read: dict[str, tuple[int, ...]] = {}  # ids of each episode that a server has read

    def release(self) -> None:
        """The episodes have ended."""
        self._read = {}

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Raises ServerError where no server answers."""
        choices = self.client.complete([self._body(h) for h in histories], [h.uid for h in histories])
        actions = [self._action(h, choice) for h, choice in zip(histories, choices, strict=True)]
        self._count(histories, actions)
        return actions

    def _body(self, history: History) -> dict[str, Any]:
        return {
            "prompt": history.ids, "max_tokens": history.max_tokens, "temperature": self.temperature,
            "seed": int(history.random().integers(2**63)), "stop_token_ids": self._end_ids, "logprobs": 0,
        }  # fmt: skip

    def _action(self, history: History, choice: Mapping[str, Any]) -> Action:
        ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        ended = bool(ids) and ids[-1] in self._end_ids
        if len(ids) != len(logprobs) or not (ended or len(ids) == history.max_tokens):
            raise ServerError(
                f"{self.client.place}: an action broke off after {len(ids)} of {history.max_tokens} tokens, "
                f"with {len(logprobs)} log-probs (finish_reason {choice['finish_reason']})."
            )
        if max(ids) >= self._vocabulary:
            raise ServerError(
                f"{self.client.place}: the token {max(ids)} is only padding of the model's vocabulary; the "
                f"tokenizer has {self._vocabulary} tokens."
            )
        if self.temperature == 0:
            logprobs = (0.0,) * len(ids)
        reason = StopReason.END if ended else StopReason.LENGTH
        return Action(self.actor, reason, ids, logprobs, policy_version=self.policy_version)

    def _count(self, histories: Sequence[History], actions: Sequence[Action]) -> None:
        if not histories:
            return
        written = sum(len(action.ids) for action in actions)
        new = sum(len(h.ids) - self._known(h) for h in histories) + written - len(actions)
        context = sum(len(h.ids) for h in histories) / len(histories)
        self.flops += forward_flops(self.model, new, context)
        self.generated_tokens += written
        for history, action in zip(histories, actions, strict=True):
            self._read[history.uid] = history.ids + action.ids[:-1]

    def _known(self, history: History) -> int:
        read = self._read.get(history.uid, ())
        return len(read) if history.ids[: len(read)] == read else 0


class Transfer(Protocol):
    """Brings the weights of the model that is trained to its servers."""

    def send(self) -> None:
        """As they are now. Raises ServerError."""
        ...


class VllmSampler(VllmPolicy):
    """The student on vLLM servers: a :class:`Sampler` whose log-probs are those that it sampled with.

    ``transfer`` is of the main rank alone, else None: it sends the weights for all ranks, and probes them.
    """

    client: VllmClient

    def __init__(
        self,
        client: VllmClient,
        chat: Chat,
        model: PreTrainedModel,
        *,
        temperature: float,
        dtype: str,
        max_tokens: int,
        transfer: Transfer | None,
    ) -> None:
        """``max_tokens``: of a whole conversation. Raises ConfigError for servers that cannot be used."""
        if chat.thinking is not None:
            raise ConfigError(f"{client.place}: a thinking budget is not to be had from vLLM token by token.")
        super().__init__(client, chat, model, actor=Actor.STUDENT, temperature=temperature)
        client.check(chat, max_tokens)
        self.transfer = transfer
        self._probe = Probe(client, model, temperature, dtype)
        self._longest = min(PROBED, max_tokens - 1)  # a server answers with one token more
        self._probed = chat.prompt_ids([Message("user", TEXT)], (), "")[: self._longest]

    def act(self, histories: Sequence[History]) -> list[Action]:
        actions = super().act(histories)
        if histories:
            self._probed = (histories[0].ids + actions[0].ids)[: self._longest]
        return actions

    def reset(self, policy_version: int) -> None:
        """The weights have changed. Raises AlignmentError where a server's log-probs are not the trainer's
        afterwards, ConfigError where that is how it was started."""
        self.policy_version = policy_version
        self.release()
        if self.transfer is not None:
            self.transfer.send()
            self._forget()
            self._probe.check(self._probed)

    def _forget(self) -> None:
        """Keys and values of the old weights are of no use any more. A server may need a moment to let go of
        those of the last requests."""
        for _ in range(TRIES):
            answers = self.client.post_to_each("/reset_prefix_cache", {})
            kept = [url for url, answer in answers.items() if not answer["success"]]
            if not kept:
                return
            time.sleep(0.1)
        raise ServerError(f"{self.client.place}: {kept[0]} keeps the cache of the old weights.")
