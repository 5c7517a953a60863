"""The models that a run compares its student with: the teacher, and the references of the config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.api.client import COUNTS, ApiClient
from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import (
    Ensemble,
    RunConfig,
    conditioning_of,
)
from opd_agents.config.base import bounds
from opd_agents.config.needs import Need
from opd_agents.distributed import World
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError
from opd_agents.judging.judge import Asks, Judging
from opd_agents.policies.models import n_parameters
from opd_agents.recordings import Recordings
from opd_agents.teachers import Teacher, TeacherSignal
from opd_agents.teachers.aligned import AlignedTeacher
from opd_agents.teachers.api import ApiTeacher
from opd_agents.teachers.base import check_aligned
from opd_agents.teachers.cached import CachedTeacher
from opd_agents.teachers.conditioning import Conditioner
from opd_agents.teachers.debate import Debaters
from opd_agents.teachers.ensemble import EnsembleTeacher
from opd_agents.teachers.local import ModelTeacher
from opd_agents.teachers.self_teacher import CopyTeacher, SameModelTeacher
from opd_agents.teachers.vllm import VllmTeacher
from opd_agents.teaching import make_single, needs_of, parts_of, place, settings_of
from opd_agents.types import Trajectory

# Of self teachers, in a checkpoint. Not beside the model's: some programs load all that they find there.
FILE = Path("teachers") / "weights.safetensors"


class References:
    """``teachers`` by name, `teacher` first among them; ``needs``: what the loss needs of which. ``singles``
    are the same with the members of ensembles in their place, as `teacher.NAME`. ``seconds``: spent on
    scoring, so far.

    Self teachers follow the student: see :meth:`after_update` and :meth:`after_step`. Raises UserError for a
    model that cannot be loaded or does not fit the ``student`` and its ``chat``.
    """

    def __init__(self, config: RunConfig, student: PreTrainedModel, chat: Chat) -> None:
        self.needs = needs_of(config)
        self.seconds = 0.0
        self.teachers: dict[str, Teacher] = {}
        self.singles: dict[str, Teacher] = {}
        self.conditioners: dict[str, Conditioner] = {}
        self.debates: dict[str, Debaters] = {}
        rollout, most = config.rollout, config.rollout.max_turns
        limits = Limits(
            max_turns=None if most is None else int(bounds(most)[1]), step_timeout=rollout.step_timeout,
            episode_timeout=rollout.episode_timeout, max_live=rollout.max_live,
        )  # fmt: skip
        for name, settings in settings_of(config).items():
            for part, section in parts_of(name, settings).items():
                if (conditioning := conditioning_of(section)) is not None:
                    self.conditioners[part] = Conditioner(conditioning, chat, limits)
                self.singles[part] = make_single(
                    part, section, config, student, chat, self.conditioners.get(part)
                )
            if isinstance(settings, Ensemble):
                members = {n: self.singles[f"{name}.{n}"] for n in settings.members}
                self.teachers[name] = EnsembleTeacher(settings, members, rollout.temperature)
                if settings.debate is not None:
                    speaking = {member: teacher.greedy for member, teacher in members.items()}
                    self.debates[name] = Debaters(settings.debate, chat, speaking, limits)
            else:
                self.teachers[name] = self.singles[name]

    def score(
        self,
        packed: Packed,
        trajectories: Sequence[Trajectory],
        owned: Tensor,
        max_tokens: int,
        asked: Mapping[str, frozenset[Need]] | None = None,
    ) -> tuple[dict[str, TeacherSignal], dict[str, Tensor]]:
        """The signal of every reference that the loss needs, or that is ``asked``, and of each member of an
        ensemble, filled where ``owned`` (bool [N]); and of those with conditioning or weights the tokens
        (bool [N], the same on every rank) that they had something to say about: on others there is no signal.
        Raises AlignmentError for a signal of other tokens or another type."""
        started = time.perf_counter()
        signals: dict[str, TeacherSignal] = {}
        taught: dict[str, Tensor] = {}

        def ask(
            name: str, needs: frozenset[Need], where: Tensor | None = None, rows: Packed = packed
        ) -> None:
            keep, teacher = owned, self.singles[name]
            if where is not None:
                taught[name] = where
            if name in self.conditioners:
                rows, heard = self.conditioners[name].condition(packed, trajectories)
                taught[name] = heard & taught.get(name, heard)
            if name in taught:
                keep = owned & taught[name]
            if isinstance(teacher, AlignedTeacher):
                signals[name], taught[name] = teacher.score_episodes(packed, trajectories, max_tokens, keep)
            else:
                signals[name] = teacher.score(rows, max_tokens, keep)
            check_aligned(place(name), signals[name], teacher.can, needs, len(packed.target))

        for name, needs in (self.needs if asked is None else asked).items():
            if not isinstance(ensemble := self.teachers[name], EnsembleTeacher):
                ask(name, needs)
                continue
            members = {member: f"{name}.{member}" for member in ensemble.members}
            shares, told_rows = ensemble.weights(trajectories), packed
            if name in self.debates:
                told_rows, confident = self.debates[name].condition(packed, trajectories)
                shares = shares * confident
            weights = shares[packed.episode]
            for index, member in enumerate(members.values()):
                ask(member, frozenset({"sampled"}), weights[:, index] > 0, told_rows)
            weights = weights * torch.stack([taught[member] for member in members.values()], -1)
            told = {member: signals[part] for member, part in members.items()}
            signals[name], taught[name] = ensemble.mixed(told, weights, packed.target), weights.sum(-1) > 0
            check_aligned(place(name), signals[name], ensemble.can, needs, len(packed.target))
        self.seconds += time.perf_counter() - started
        return signals, taught

    def fill_caches(self, recordings: Recordings, max_tokens: int, world: World) -> None:
        """Ask once for what caches do not know of the experience of all the run, on the main rank. Raises
        ConfigError where there is nobody to ask."""
        for name, teacher in self.singles.items():
            if isinstance(teacher, CachedTeacher):
                world.from_main(partial(self._fill, name, teacher, recordings, max_tokens))
                teacher.reopen()

    def _fill(self, name: str, teacher: CachedTeacher, recordings: Recordings, max_tokens: int) -> None:
        lacking = sum(map(teacher.lacks, recordings))
        if lacking and teacher.behind is None:
            raise ConfigError(
                f"{place(name)}: the cache {teacher.cache.folder} is incomplete: it lacks {lacking} of"
                f" {len(recordings.rows)} episodes. Name with `of` the teacher to be asked for them."
            )
        if lacking and teacher.behind is not None:
            teacher.fill(teacher.behind(), recordings, len(recordings.rows), max_tokens)

    def after_update(self, student: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Follow an optimizer step; ``student`` gives the trained weights by name (and is asked by every rank
        where it is asked by one)."""
        for teacher in self._copies().values():
            if teacher.follows_updates:
                teacher.after_update(student())

    def after_step(self, student: PreTrainedModel, step: int) -> None:
        """Follow a training step, the ``step``-th (from 1)."""
        for teacher in self.singles.values():
            if isinstance(teacher, SameModelTeacher):
                teacher.after_step()
            elif isinstance(teacher, CopyTeacher):
                teacher.after_step(((n, p) for n, p in student.named_parameters() if p.requires_grad), step)

    @property
    def tokens(self) -> int:
        """Scored plus written by all of them, so far."""
        return sum(teacher.tokens for teacher in self.teachers.values())

    @property
    def flops(self) -> int:
        """Of those that know theirs."""
        return sum(one.flops or 0 for one in self.singles.values())

    @property
    def uncounted(self) -> dict[str, float]:
        """The tokens of those that do not know their FLOPs, as `uncounted_tokens`; nothing where all do."""
        unknown = [one.tokens for one in self.singles.values() if one.flops is None]
        return {"uncounted_tokens": sum(unknown)} if unknown else {}

    @property
    def parameters(self) -> dict[str, int]:
        """How many weights those have whose model is known here."""
        found = {}
        for name, single in self.singles.items():
            one = single.teacher if isinstance(single, AlignedTeacher) else single
            if isinstance(one, ModelTeacher | VllmTeacher):
                found[name] = n_parameters(one.model)
        return found

    def asks(self, name: str) -> Asks:
        """Who answers what is asked of one that can judge."""
        return cast(Judging, self.teachers[name]).client

    @property
    def clients(self) -> list[ApiClient]:
        """Of the teachers behind an API."""
        return [one.client for one in self.teachers.values() if isinstance(one, ApiTeacher)]

    @property
    def api_counts(self) -> dict[str, float]:
        """What their clients count, together, as `api/requests` and so on; nothing where there are none."""
        counts = [client.counts for client in self.clients]
        return {f"api/{key}": sum(one[key] for one in counts) for key in COUNTS} if counts else {}

    def close(self) -> None:
        """The connections of those that have any."""
        for client in self.clients:
            client.close()

    def check(self, episodes: Iterable[Episode]) -> None:
        """Raise ConfigError where the template cannot carry a teacher's context into these episodes."""
        for episode in episodes:
            debates = [debate.conditioner for debate in self.debates.values()]
            for conditioner in (*self.conditioners.values(), *debates):
                conditioner.check(episode)

    def save(self, checkpoint: Path) -> None:
        """The weights of self teachers that no other file of a checkpoint has."""
        copies = self._copies().items()
        state = {f"{name}/{key}": weight for name, copy in copies for key, weight in copy.state().items()}
        if state:
            (checkpoint / FILE).parent.mkdir()
            save_file(state, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """What :meth:`save` wrote, bit for bit. Raises whatever a broken file makes safetensors raise."""
        if not (copies := self._copies()):
            return
        saved = load_file(checkpoint / FILE)
        for name, copy in copies.items():
            prefix = f"{name}/"
            copy.load({k.removeprefix(prefix): w for k, w in saved.items() if k.startswith(prefix)})

    def _copies(self) -> dict[str, CopyTeacher]:
        return {name: one for name, one in self.singles.items() if isinstance(one, CopyTeacher)}
