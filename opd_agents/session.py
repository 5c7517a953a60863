"""What a training stage holds (models, optimizers, task counts, totals), and its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_agents import envs
from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import EnvironmentSource, Recorded, RunConfig, SignedScheduled, Trajectories
from opd_agents.config.needs import weights_of
from opd_agents.config.weights import WithoutTokens
from opd_agents.correction import Alternatives, act_otherwise
from opd_agents.discriminator import Discriminator, make_discriminator
from opd_agents.distributed import ALONE, World
from opd_agents.episode import Episode, Limits
from opd_agents.errors import CheckpointError, ConfigError, RunFolderError
from opd_agents.evaluation import load_suite
from opd_agents.judging import NOT_ASKED, Judged, judge_corrections, judge_episodes, judge_preferences
from opd_agents.optimizers import ModelOptimizer
from opd_agents.plugins import load_object
from opd_agents.policies import ExpertPolicy, MixturePolicy, Policy
from opd_agents.policies.base import Sampler
from opd_agents.policies.mixture import TokenMixture
from opd_agents.policies.models import check_projection, load_tokenizer, save_checkpoint
from opd_agents.policies.recomputation import prepare_recomputation
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.recordings import Recordings, read_conversations, refuse_bad, tools_of
from opd_agents.references import References
from opd_agents.rollout import check_conversation
from opd_agents.rows import read_rows
from opd_agents.runs import RunFolder, checkpoints_in, newest_checkpoint
from opd_agents.schedules import Clock, adapt, adaptive_schedules, schedules_in, value_at
from opd_agents.sharding import Trained, shard, trained_weights, whole_state
from opd_agents.stored import recordings_of
from opd_agents.student import load_student, make_sampler
from opd_agents.tasks import check_experts, draw_episodes, split_sizes
from opd_agents.teachers import Teacher, TeacherSignal
from opd_agents.teachers.local import ModelTeacher
from opd_agents.teaching import check_references
from opd_agents.types import SpanKind, Trajectory, to_json

TOTALS = ("generated_tokens", "correction_tokens", "teacher_tokens", "teacher_seconds", "flops", "seconds")
EVALUATION_METRICS = ("eval/success", "eval/success_low", "eval/success_high", "eval/success_greedy")


@dataclass
class Session:
    config: RunConfig
    folder: RunFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    references: References
    task_counts: list[int]
    optimizer: ModelOptimizer
    student_sampler: Sampler
    recordings: Recordings | None
    trained: Trained  # what the updates change: ``model`` itself, or its copy divided among the ranks
    world: World
    discriminator: Discriminator | None  # on the main rank alone it reads and learns
    step: int = 0
    updates: int = 0
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    evaluation_at_start: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None  # the newest
    adapted: dict[str, float] = field(default_factory=dict)  # see Clock

    def __post_init__(self) -> None:
        self.policies = self._policies()
        self._schedules, self._adaptive = schedules_in(self.config), adaptive_schedules(self.config)
        # of the counters below, in the totals already
        nothing: dict[str, float] = {"teacher_tokens": 0, "teacher_seconds": 0, "flops": 0}
        self._counted = nothing | dict.fromkeys(self.references.api_counts, 0)
        self.totals |= dict.fromkeys(self.references.api_counts, 0)

    def _policies(self) -> dict[str, Policy]:
        """Who acts, by the names of `rollout.source`."""
        policies: dict[str, Policy] = {"student": self.student_sampler, "expert": ExpertPolicy()}
        if self.teacher is not None:
            policies["teacher"] = self.teacher
        if share := self.config.rollout.teacher_share:
            policies["student"] = self._helped(share)
        return policies

    @property
    def behaviour(self) -> Policy:
        """Who acts for ``rollout.source``, at this step's shares."""
        source = self.config.rollout.source
        if isinstance(source, dict):
            return MixturePolicy({str(n): (self.policies[n], self.at(share)) for n, share in source.items()})
        return self.policies[source] if isinstance(source, str) else self.student_sampler

    @property
    def demonstrator(self) -> Policy:
        """Who acts for ``rollout.demonstrations``."""
        extra = self.config.rollout.demonstrations
        return self.policies[extra.actor if extra else "expert"]

    def alternatives(self, trajectories: Sequence[Trajectory]) -> Alternatives:
        """What another would do at some of the states that the student came to in this step."""
        extra, stream = self.config.rollout.alternatives, (self.config.seed, self.step)
        if extra is None:
            return Alternatives()
        found = act_otherwise(
            trajectories, extra.states, self.policies[extra.actor], stream=stream, make=envs.launch,
            chat=self.chat, limits=self.limits, samples=extra.samples, world=self.world,
        )  # fmt: skip
        settings = self.config.judge
        if extra.preferred_by != "judge" or settings is None:
            return found
        asks, episodes = self.references.asks(settings.by), {one.uid: one for one in trajectories}

        def parent_of(other: Trajectory) -> Trajectory:
            return episodes[other.branch.parent if other.branch else other.uid]

        return found.judged(
            self.world.from_main(
                lambda: judge_preferences(asks, settings, found.trajectories, parent_of, tools_of)
            )
        )

    def judge(self, trajectories: Sequence[Trajectory]) -> Judged:
        """What the judge says of the student's episodes in this step, if there is one."""
        settings, stream = self.config.judge, (self.config.seed, self.step)
        if settings is None:
            return NOT_ASKED
        return judge_episodes(self.references.asks(settings.by), settings, trajectories, tools_of, stream)

    def judge_errors(self, trajectories: Sequence[Trajectory]) -> Judged:
        """What the judge would have done instead, once in each of these episodes."""
        settings = self.config.judge
        if settings is None:
            return NOT_ASKED
        return judge_corrections(self.references.asks(settings.by), settings, trajectories, tools_of)

    def _helped(self, share: float) -> Policy:
        student = self.student_sampler
        if not (isinstance(self.teacher, ModelTeacher) and isinstance(student, TransformersSampler)):
            raise ConfigError(
                "rollout.teacher_share reads the teacher's distribution of every token as it is written: it"
                " needs a teacher of kind local or self, or one derived from ModelTeacher."
            )
        return TokenMixture(student, self.teacher.sampler, share)

    @property
    def limits(self) -> Limits:
        """Of this step's episodes."""
        rollout = self.config.rollout
        turns, action_tokens = (
            None if most is None else int(self.at(most))
            for most in (rollout.max_turns, rollout.max_action_tokens)
        )
        return Limits(
            rollout.max_tokens_per_turn, rollout.max_context_tokens, turns, rollout.step_timeout,
            rollout.max_observation_tokens, action_tokens, rollout.episode_timeout, rollout.max_live,
        )  # fmt: skip

    @property
    def teacher(self) -> Teacher | None:
        """The one that acts, with its context where it has one; the loss may compare with it, too."""
        return self.references.teachers.get("teacher")

    def score(
        self, packed: Packed, trajectories: Sequence[Trajectory], owned: Tensor
    ) -> tuple[dict[str, TeacherSignal], dict[str, Tensor]]:
        """What the references say of finished trajectories; see :meth:`References.score`."""
        tokens = self.config.trainer.micro_batch_tokens
        return self.references.score(packed, trajectories, owned, tokens)

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by FLOPs, whichever ends it first."""
        trainer = self.config.trainer
        by_flops = self.totals["flops"] / trainer.flops if trainer.flops else 0.0
        return max(self.step / trainer.steps, by_flops)

    @property
    def clock(self) -> Clock:
        return Clock(self.progress, self.adapted)

    def at(self, schedule: SignedScheduled) -> float:
        """A coefficient's value at this step."""
        return value_at(schedule, self.clock)

    def scheduled(self) -> dict[str, float]:
        """What every schedule of the config gives this step, as metrics by its place there."""
        return {f"scheduled/{place}": self.at(schedule) for place, schedule in self._schedules.items()}

    @property
    def learning_rate(self) -> float:
        return self.warmed_up(self.config.trainer.learning_rate)

    def warmed_up(self, rate: SignedScheduled) -> float:
        """A learning rate at this step."""
        return min(1.0, (self.step + 1) / (self.config.trainer.warmup_steps + 1)) * self.at(rate)

    def optimizer_step(self) -> None:
        self.optimizer.step(self.learning_rate)
        self.updates += 1
        self.references.after_update(partial(trained_weights, self.model, self.trained))

    def advance(self, generated_tokens: int, correction_tokens: int) -> None:
        """To the next step, with a new policy version; adds the step's tokens and FLOPs to the totals (those
        of scoring and updates were added where they were spent)."""
        self.step += 1
        self.student_sampler.reset(self.step)
        self.references.after_step(self.model, self.step)
        self.totals["generated_tokens"] += generated_tokens + correction_tokens
        self.totals["correction_tokens"] += correction_tokens
        self.count()

    def count(self) -> None:
        """Add to the totals what the models were used for since the last time."""
        for key, value in (spent := self._spent()).items():
            self.totals[key] += self.world.total(value - self._counted[key])
        self._counted = spent

    def _spent(self) -> dict[str, float]:
        flops = self.student_sampler.flops + self.references.flops
        flops += self.discriminator.flops if self.discriminator else 0
        scoring = {"teacher_tokens": self.references.tokens, "teacher_seconds": self.references.seconds}
        return {**scoring, "flops": flops} | self.references.api_counts

    def leave_out(self) -> None:
        """What the models were used for since the last step was no training, and counts nowhere."""
        self._counted = self._spent()

    def adapt(self, row: Mapping[str, Any]) -> None:
        """Let the adaptive schedules follow the metrics of the step that was made; the same on every rank,
        also where the metrics are not, as a rank's seconds."""
        if self._adaptive:
            later = EVALUATION_METRICS if self.config.evaluation else ()
            self.adapted = self.world.from_main(lambda: adapt(self._adaptive, self.adapted, row, later))

    def evaluation_row(self) -> dict[str, float]:
        result = self.evaluation or {}
        low, high = result["interval"]
        values = (result["success"], low, high, result["success_greedy"])
        return dict(zip(EVALUATION_METRICS, values, strict=True))

    def save_weights(self, folder: Path) -> None:
        """A Hugging Face checkpoint with the chat that it speaks."""
        self.tokenizer.chat_template = self.chat.template  # also when the config gave another one
        save_checkpoint(folder, self.model, self.tokenizer, self.chat.settings)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's as one process would have it; on ranks that write nothing without its tensors."""
        state, world = self.optimizer.state_dict(), self.world
        return state if world.size == 1 else whole_state(state, kept=world.is_main)

    @property
    def data_sizes(self) -> list[int]:
        """Tasks of each environment; with recordings, then their conversations."""
        return self.task_counts + ([len(self.recordings.rows)] if self.recordings else [])

    def save(self, folder: Path, optimizer_state: Mapping[str, Any]) -> None:
        """The weights plus what a resume needs, in a world of whatever size."""
        self.save_weights(folder)
        with (folder / "optimizer.pt").open("wb") as file:  # a file, so that a full disk is told as one
            torch.save(optimizer_state, file)
        self.references.save(folder)
        if self.discriminator is not None:
            self.discriminator.save(folder)
        counts = {"step": self.step, "updates": self.updates, "totals": self.totals}
        state = counts | {"evaluation_at_start": self.evaluation_at_start, "evaluation": self.evaluation}
        state |= {"data_sizes": self.data_sizes, "adapted": self.adapted}
        (folder / "trainer.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises CheckpointError for a folder that is not whole, RunFolderError for data that changed."""
        try:
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            optimizer_state = torch.load(folder / "optimizer.pt", map_location="cpu")
            self.references.load(folder)
            if self.discriminator is not None:
                self.discriminator.load(folder)
        except Exception as error:  # of torch, pickle and json: whatever a broken file makes them raise
            raise CheckpointError(
                f"{folder} is not whole ({type(error).__name__}), so the run cannot go on from it. Remove it "
                "to go on from the checkpoint before, or start another run."
            ) from error
        if state["data_sizes"] != self.data_sizes:  # its epochs would skip some rows and repeat others
            raise RunFolderError(
                f"{folder}: the run drew from data of {state['data_sizes']} tasks or conversations, which "
                f"now has {self.data_sizes}. Put the files back as they were, or start another run."
            )
        self.step, self.updates = state["step"], state["updates"]
        self.totals |= state["totals"]  # of a run of before, some counters are missing
        self.evaluation_at_start, self.evaluation = state["evaluation_at_start"], state["evaluation"]
        self.adapted = state["adapted"]
        self.optimizer.load_state_dict(optimizer_state)


def check_inputs(config: RunConfig) -> None:
    """Raise UserError for what a stage names and does not exist, before a folder is made or a step taken."""
    _check_plugins(config)
    split_sizes(config.environments)
    match config.rollout.source:
        case Recorded() as recorded:
            rows = read_rows(recorded.dataset, recorded.split)
            refuse_bad(read_conversations(rows), len(rows))
        case Trajectories() as stored:
            read_rows(stored.trajectories)
    if config.evaluation:
        split, suite = config.evaluation.split, load_suite(config.evaluation.suite)
        split_sizes([EnvironmentSource(id=e.id, options=e.options, split=split) for e in suite.environments])
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
    if recordings is not None:
        references.fill_caches(recordings, config.trainer.micro_batch_tokens, world)
        session.count()
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
