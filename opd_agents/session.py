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
from opd_agents.config import (
    EVALUATION_METRICS,
    FLOP_PARTS,
    RunConfig,
    SignedScheduled,
)
from opd_agents.correction import Alternatives, Repair, act_otherwise
from opd_agents.curriculum import PassRates
from opd_agents.discriminator import Discriminator
from opd_agents.distributed import World
from opd_agents.episode import Limits
from opd_agents.errors import CheckpointError, ConfigError, RunFolderError
from opd_agents.judging import (
    NOT_ASKED,
    NOT_COMPARED,
    Compared,
    Judged,
    Practised,
    judge_corrections,
    judge_episodes,
    judge_key_steps,
    judge_preferences,
)
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies import ExpertPolicy, MixturePolicy, Policy
from opd_agents.policies.base import Sampler
from opd_agents.policies.mixture import TokenMixture
from opd_agents.policies.models import n_parameters, save_checkpoint
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.recordings import Recordings, tools_of
from opd_agents.references import References
from opd_agents.runs import RunFolder
from opd_agents.schedules import Clock, adapt, adaptive_schedules, reached, schedules_in, value_at, watch
from opd_agents.sharding import Trained, trained_weights, whole_state
from opd_agents.teachers import Teacher, TeacherSignal
from opd_agents.teachers.local import ModelTeacher
from opd_agents.types import Trajectory, from_dict, to_json

KEPT = "kept.jsonl"  # of a checkpoint
TOTALS = (
    *("generated_tokens", "correction_tokens", "teacher_tokens", "teacher_seconds"),
    *("flops", *(f"flops/{part}" for part in FLOP_PARTS), "seconds"),
)


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
    watched: dict[str, list[float]] = field(default_factory=dict)  # see schedules.watch
    kept: dict[int, list[Trajectory]] = field(default_factory=dict)  # what came of repairs, by their step

    def __post_init__(self) -> None:
        settings = self.config.rollout.curriculum
        self.known = None if settings is None else PassRates(settings)
        self.policies = self._policies()
        self._schedules, self._adaptive = schedules_in(self.config), adaptive_schedules(self.config)
        # of the counters below, in the totals already
        self._counted: dict[str, float] = dict.fromkeys(self._spent(), 0)
        self.totals |= dict.fromkeys((*self.references.api_counts, *self.references.uncounted), 0)

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

    @property
    def beginner(self) -> Policy:
        """Who plays ``rollout.beginning``; a teacher what it finds best."""
        beginning = self.config.rollout.beginning
        if beginning and beginning.actor == "teacher" and self.teacher is not None:
            return self.teacher.greedy
        return self.policies["expert"]

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

    def judge_key_steps(self, repairs: Sequence[Repair]) -> Compared:
        """What the judge finds of the key steps that carrying them out leaves open."""
        settings = self.config.judge
        if settings is None:
            return NOT_COMPARED
        cases = [Practised(one.parent, one.turn, one.teacher_action, one.practised) for one in repairs]
        return judge_key_steps(self.references.asks(settings.by), settings, cases, tools_of)

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
        of updates were added where they were spent, those of rollouts before repairs were looked for)."""
        self.step += 1
        self.student_sampler.reset(self.step)
        self.references.after_step(self.model, self.step)
        self.totals["generated_tokens"] += generated_tokens + correction_tokens
        self.totals["correction_tokens"] += correction_tokens
        self.count(sampled_for="teacher")

    def count(self, sampled_for: str) -> None:
        """Add to the totals what the models were used for since the last time.

        FLOPs are of one of three ``FLOP_PARTS``. Those of the references are of ``teacher``, whether they
        scored, acted or judged. A discriminator's, and the student's own passes over finished episodes with
        and without gradient (see :meth:`spend`), are of ``update``. What the student sampled was
        ``sampled_for`` the step's episodes, ``rollout``, or to find and prove repairs, which is what a
        teacher's correction costs: ``teacher``.
        """
        parts = {"sampler": sampled_for, "references": "teacher", "discriminator": "update"}
        for key, value in (spent := self._spent()).items():
            new = self.world.total(value - self._counted[key])
            if key in parts:
                self.spend(parts[key], new)
            else:
                self.totals[key] += new
        self._counted = spent

    def spend(self, part: str, flops: float) -> None:
        """Add FLOPs, of all ranks together, to the totals: to their part and to the sum of all."""
        self.totals[f"flops/{part}"] += flops
        self.totals["flops"] += flops

    def _spent(self) -> dict[str, float]:
        references, discriminator = self.references, self.discriminator
        flops = {"sampler": self.student_sampler.flops, "references": references.flops}
        flops |= {"discriminator": discriminator.flops if discriminator else 0}
        scoring = {"teacher_tokens": references.tokens, "teacher_seconds": references.seconds}
        return flops | scoring | references.api_counts | references.uncounted

    def leave_out(self) -> None:
        """What the models were used for since the last step was no training, and counts nowhere."""
        self._counted = self._spent()

    def keep(self, repaired: Sequence[Trajectory], steps: int) -> list[Trajectory]:
        """What came of this step's repairs and of those of up to ``steps`` before it, the oldest first."""
        recent = {step: old for step, old in self.kept.items() if self.step - steps <= step < self.step}
        self.kept = recent | {self.step: [*repaired]}
        return [one for of_step in self.kept.values() for one in of_step]

    @property
    def parameters(self) -> dict[str, int]:
        """Weights of the student, and of the references whose models are known here, by their names."""
        return {"student": n_parameters(self.model)} | self.references.parameters

    @property
    def _keeps(self) -> bool:
        return self.config.correction is not None and self.config.correction.kept > 0

    def remember(self, played: Sequence[Trajectory]) -> dict[str, float]:
        """Let the curriculum know of a step's episodes; what it knows then, as metrics."""
        if self.known is None:
            return {}
        self.known = self.known.after(played)
        return self.known.metrics(self.config.environments)

    def adapt(self, row: Mapping[str, Any]) -> None:
        """Let the adaptive schedules and the early ends follow the metrics of the step that was made; the
        same on every rank, also where the metrics are not, as a rank's seconds."""
        later, ends = EVALUATION_METRICS if self.config.evaluation else (), self.config.trainer.until
        if self._adaptive:
            self.adapted = self.world.from_main(lambda: adapt(self._adaptive, self.adapted, row, later))
        if ends:
            self.watched = self.world.from_main(lambda: watch(ends, self.watched, row, later))

    @property
    def end(self) -> str | None:
        """Why the run is over, by the key that ends it; None while it goes on."""
        trainer = self.config.trainer
        if found := reached(trainer.until, self.watched):
            return f"trainer.until, {found}"
        if trainer.flops is not None and self.totals["flops"] >= trainer.flops:
            return "trainer.flops"
        return "trainer.steps" if self.step >= trainer.steps else None

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
        if self.known is not None:
            self.known.save(folder)
        if self._keeps:
            pairs = [(step, one) for step, of_step in self.kept.items() for one in of_step]
            lines = (to_json({"step": step, "trajectory": one}) + "\n" for step, one in pairs)
            (folder / KEPT).write_text("".join(lines), encoding="utf-8")
        counts = {"step": self.step, "updates": self.updates, "totals": self.totals}
        state = counts | {"evaluation_at_start": self.evaluation_at_start, "evaluation": self.evaluation}
        state |= {"data_sizes": self.data_sizes, "adapted": self.adapted, "watched": self.watched}
        (folder / "trainer.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises CheckpointError for a folder that is not whole, RunFolderError for data that changed."""
        try:
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            optimizer_state = torch.load(folder / "optimizer.pt", map_location="cpu")
            lines = (folder / KEPT).read_text(encoding="utf-8").splitlines() if self._keeps else []
            kept = [json.loads(line) for line in lines]
            self.references.load(folder)
            if self.discriminator is not None:
                self.discriminator.load(folder)
            if self.known is not None:
                self.known = self.known.loaded(folder)
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
        self.adapted, self.watched = state["adapted"], state["watched"]
        for one in kept:
            self.kept.setdefault(one["step"], []).append(from_dict(Trajectory, one["trajectory"]))
        self.optimizer.load_state_dict(optimizer_state)
