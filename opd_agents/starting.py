"""What a stage names, looked at before anything is lost; and a session at its start, or as it was left."""

from __future__ import annotations

from pathlib import Path

from opd_agents import envs
from opd_agents.chat import Chat
from opd_agents.config import Recorded, RunConfig, Trajectories
from opd_agents.config.needs import weights_of
from opd_agents.config.weights import WithoutTokens
from opd_agents.discriminator import make_discriminator
from opd_agents.distributed import ALONE, World
from opd_agents.episode import Episode
from opd_agents.errors import ConfigError, DataError
from opd_agents.evaluation import load_suite
from opd_agents.optimizers import ModelOptimizer
from opd_agents.plugins import load_object
from opd_agents.policies.models import check_projection, load_tokenizer
from opd_agents.policies.recomputation import prepare_recomputation
from opd_agents.recordings import read_conversations, refuse_bad
from opd_agents.references import References
from opd_agents.rollout import check_conversation
from opd_agents.rows import Pairs, Rows, read_rows, sided
from opd_agents.runs import RunFolder, checkpoints_in, newest_checkpoint
from opd_agents.session import Session
from opd_agents.sharding import shard
from opd_agents.stored import recordings_of
from opd_agents.student import load_student, make_sampler
from opd_agents.tasks import check_experts, draw_episodes, split_sizes
from opd_agents.teaching import check_references
from opd_agents.trackers import check_trackers
from opd_agents.types import SpanKind, to_json


def check_inputs(config: RunConfig) -> None:
    """Raise UserError for what a stage names and does not exist, before a folder is made or a step taken."""
    _check_plugins(config)
    check_trackers(config.trainer.trackers)
    split_sizes(config.environments)
    match config.rollout.source:
        case Recorded() as recorded:
            rows = sided(read_rows(recorded.dataset, recorded.split))
            refuse_bad(read_conversations(rows), len(rows))
            _check_groups(config, rows)
        case Trajectories() as stored:
            read_rows(stored.trajectories)
    if config.evaluation:
        split, suite = config.evaluation.split, load_suite(config.evaluation.suite)
        suite.chosen(split, config.evaluation.limit)  # raises for what does not exist
        budget, most = config.chat.thinking_budget, suite.limits.max_tokens_per_turn
        if budget is not None and budget >= most:
            raise ConfigError(
                f"evaluation.suite: chat.thinking_budget {budget} leaves no room for an action, as "
                f"{suite.name} plays with {most} tokens per action; raise limits.max_tokens_per_turn in a "
                "suite file."
            )
    check_experts(config)
    check_references(config)
    if config.discriminator and config.discriminator.model:
        load_tokenizer(newest_checkpoint(config.discriminator.model))
    student = config.student
    path = student.build.tokenizer if student.build else student.model
    if path and not checkpoints_in(config.folder):
        load_tokenizer(newest_checkpoint(path))


def _check_groups(config: RunConfig, rows: Rows) -> None:
    """The two sides of a preference are a group, and other rows are of none."""
    rollout, components = config.rollout, config.loss.components.values()
    if isinstance(rows, Pairs) and rollout.group_size != 2:
        raise ConfigError(
            f"{rows.path} holds preferences, two episodes each: take rollout.group_size: 2, not"
            f" {rollout.group_size}."
        )
    if (
        not isinstance(rows, Pairs)
        and not rollout.actors
        and any(one.kind == "preference" for one in components)
    ):
        raise DataError(
            f"{rows.path} holds conversations, which are of no group, and a `preference` compares: give rows"
            " with `prompt`, `chosen` and `rejected`, or let the student roll out groups"
            " (rollout.source.student > 0)."
        )


def _check_plugins(config: RunConfig) -> None:
    for name, component in config.loss.components.items():
        named = {"credit": component.credit}
        if component.kind == "policy":
            named |= {f"rewards.{part}.reward": own.reward for part, own in component.rewards.items()}
        for key, reference in named.items():
            if reference is not None:
                load_object(reference, f"loss.components.{name}.{key}")


def load_session(config: RunConfig, folder: RunFolder, world: World = ALONE) -> Session:
    """Everything a stage needs, from its start or from the folder's newest checkpoint."""
    checkpoints = folder.checkpoints()
    model, tokenizer, chat = load_student(config, str(checkpoints[-1]) if checkpoints else None)
    check_projection(model, config.student.dtype)
    _check_spans(config, chat)
    _check_texts(config, chat)
    if config.trainer.gradient_checkpointing:
        prepare_recomputation(model)
    references = References(config, model, chat)
    recordings = recordings_of(config, chat)
    trained = shard(model, world)
    session = Session(
        config, folder, model, tokenizer, chat, references, split_sizes(config.environments),
        ModelOptimizer(trained.model, config.trainer.optimizer, config.trainer.weight_decay),
        make_sampler(config, model, chat, sends=world.is_main), recordings, trained, world,
        make_discriminator(config, model, chat),
    )  # fmt: skip
    _check_conversations(session)
    if checkpoints:
        session.load(checkpoints[-1])
    elif session.known is not None and config.student.model:
        session.known = session.known.before(Path(newest_checkpoint(config.student.model)))
    if recordings is not None:
        references.fill_caches(recordings, config.trainer.micro_batch_tokens, world)
        session.count(sampled_for="rollout")
    session.student_sampler.reset(session.step)
    world.wait()  # nobody acts before the weights are where they act
    return session


def _check_conversations(session: Session) -> None:
    """Begin an episode of each environment, so that a template that cannot carry it is refused now."""
    first: dict[str, Episode] = {}
    for episode in draw_episodes(session.config, 0, session.task_counts):
        first.setdefault(to_json([episode.env_id, episode.env_kwargs]), episode)
    for episode in first.values():
        check_conversation(episode, make=envs.launch, chat=session.chat, limits=session.limits)
    session.references.check(first.values())


def _check_texts(config: RunConfig, chat: Chat) -> None:
    for name, component in config.loss.components.items():
        texts = [w.tokens for w in weights_of(component) if isinstance(w, WithoutTokens)]
        for text in sorted({text for tokens in texts for text in tokens} - {"end"}):
            try:
                chat.token_id(text)
            except ConfigError as error:
                raise ConfigError(f"loss.components.{name}: a weight `without_tokens`: {error}") from None


def _check_spans(config: RunConfig, chat: Chat) -> None:
    for name, component in config.loss.components.items():
        if component.select.spans == [SpanKind.THINK] and chat.thought is None:
            raise ConfigError(
                f"loss.components.{name}.select.spans: think alone, but the chat template marks no thought,"
                " so that the component would see nothing; leave it out."
            )
