"""The model that learns: a fresh one, a checkpoint, or an adapter of one, with the chat that it speaks."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_agents import envs
from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.config import ChatSettings, Recorded, RunConfig, Student, VllmSampling
from opd_agents.episode import Limits
from opd_agents.errors import ConfigError
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.adapters import adapter_base, add_adapter, train_adapter
from opd_agents.policies.base import Sampler
from opd_agents.policies.models import (
    build_model,
    fit_vocabulary,
    load_chat,
    load_merged,
    load_model,
    load_tokenizer,
)
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.policies.transfer import Nccl, Reload
from opd_agents.policies.vllm import Transfer, VllmSampler
from opd_agents.policies.vllm_client import VllmClient
from opd_agents.recordings import texts
from opd_agents.rollout import rollout
from opd_agents.rows import read_rows, sided
from opd_agents.runs import newest_checkpoint
from opd_agents.tasks import draw_episodes, split_sizes
from opd_agents.types import Actor


def load_student(
    config: RunConfig, checkpoint: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Chat]:
    """As the config begins it, or from a ``checkpoint`` of the run.

    Raises UserError for a checkpoint that is no model, and for an adapter of a fresh model.
    """
    chat = config.chat
    settings = chat.model_dump()
    build = config.student.build
    if checkpoint is None and build is not None:
        if config.student.lora is not None:
            raise ConfigError(
                "student.lora trains an adapter of a frozen model, and a fresh one (student.build) knows "
                "nothing: give the checkpoint to adapt as student.model."
            )
        shared = build.tokenizer
        tokenizer = (
            load_tokenizer(newest_checkpoint(shared))
            if shared
            else _fresh_tokenizer(config, build.tokenizer_episodes)
        )
        model = build_model(build.model_type, build.config, tokenizer, config.seed, config.student.dtype)
        return model, tokenizer, Chat(tokenizer, **settings)
    path = checkpoint or newest_checkpoint(str(config.student.model))
    tokenizer, model = load_tokenizer(path), _weights(path, config.student, config.seed)
    fit_vocabulary(model, tokenizer, path)
    return model, tokenizer, load_chat(path, tokenizer, settings if chat != ChatSettings() else None)


def make_sampler(config: RunConfig, model: PreTrainedModel, chat: Chat, *, sends: bool) -> Sampler:
    """Who acts as the student. ``sends``: this process brings its weights to the servers where there are any.
    Raises ConfigError for servers that cannot be used."""
    rollout, settings = config.rollout, config.sampler
    if not isinstance(settings, VllmSampling):
        return TransformersSampler(
            model, chat.end_ids, actor=Actor.STUDENT, temperature=rollout.temperature, thinking=chat.thinking
        )
    client = VllmClient(settings, "sampler")
    folder = Path(settings.folder) if settings.folder else config.folder / "sampler"
    transfer: Transfer | None = None
    if sends:
        reload = settings.weights == "reload"
        transfer = Reload(client, model, folder) if reload else Nccl(client, model)
    return VllmSampler(
        client, chat, model, temperature=rollout.temperature, dtype=config.student.dtype,
        max_tokens=rollout.max_context_tokens, transfer=transfer,
    )  # fmt: skip


def _weights(path: str, student: Student, seed: int) -> PreTrainedModel:
    """The weights of a checkpoint, all of them or those of an adapter to be trained. An adapter of an earlier
    stage is trained further, or becomes part of a model that is trained whole."""
    if student.lora is None:
        return load_merged(path, student.dtype)
    model = load_model(path, student.dtype)
    if adapter_base(path) is None:
        add_adapter(model, student.lora, seed)
    else:
        train_adapter(model, student.lora, path)
    return model


def _fresh_tokenizer(config: RunConfig, episodes: int) -> PreTrainedTokenizerBase:
    """A word-level tokenizer read off the recordings and off training episodes of the scripted experts."""
    samples: list[str] = []
    if isinstance(source := config.rollout.source, Recorded):
        samples += texts(sided(read_rows(source.dataset, source.split)))
        experts = [e for e in config.environments if envs.has_expert(e.id, e.options)]
        config = config.model_copy(update={"environments": experts})
    return build_word_tokenizer(samples + _expert_texts(config, episodes))


def _expert_texts(config: RunConfig, episodes: int) -> list[str]:
    sizes = split_sizes(config.environments)
    many = {"episodes_per_step": episodes, "group_size": 1, "source": "expert"}
    draw = config.model_copy(update={"rollout": config.rollout.model_copy(update=many)})
    drawn = draw_episodes(draw, 0, sizes)
    trajectories = rollout(
        drawn, ExpertPolicy(), make=envs.launch, chat=None, limits=Limits(), temperature=1.0
    )
    prompts = [m.content for t in trajectories for m in t.messages if m.role == "user"]
    return prompts + [x for t in trajectories for turn in t.turns for x in (turn.action, turn.observation)]
