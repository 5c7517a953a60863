"""check_agent_env accepts sound environments and names what is broken in others."""

from typing import Any, ClassVar

import pytest
from toy_envs import Counter, ReplayedCounter

from opd_agents.errors import EnvironmentContractError
from opd_agents.testing import check_agent_env
from opd_agents.types import Task

NOISE = iter(range(10**9))


class Unforkable(Counter):
    fork_mode: ClassVar = "none"


class Solved(Counter):
    has_expert: ClassVar = True

    def expert_action(self) -> str:
        missing = self.target - self.value
        if missing > 0:
            return f'{{"name":"add","arguments":{{"number":{missing}}}}}'
        return '{"name":"stop","arguments":{}}'


@pytest.mark.parametrize("cls", [Counter, ReplayedCounter, Unforkable, Solved])
def test_sound_environments_pass(cls: type[Counter]) -> None:
    check_agent_env(cls(), n_tasks=3)


def test_ids_and_arguments_are_accepted() -> None:
    check_agent_env("opd_agents/OrderDesk-v0", level="easy", timeout_rate=0.3, n_tasks=3)


class WorldNoise(Counter):
    """Random, but not through np_random."""

    def roll(self) -> dict[str, int]:
        """Add noise from elsewhere."""
        return self.add(next(NOISE) + 1)


class NoisyPrompt(Counter):
    def begin(self, task: Task) -> str:
        return super().begin(task) + f" Ticket {next(NOISE)}."


class SharedState(Counter):
    """Its state belongs to all of its copies."""

    shared: ClassVar[list[int]] = []

    def begin(self, task: Task) -> str:
        self.shared.clear()
        return super().begin(task)

    def add(self, number: int) -> dict[str, int]:
        self.shared.append(number)
        return super().add(number)

    def digest_text(self) -> str:
        return f"{self.shared} {self.target}"


class SelfFork(Counter):
    """Its fork is itself."""

    def fork(self, reseed: int | None = None) -> "SelfFork":
        return self


class Forgetful(Counter):
    """A part of its state is not saved."""

    def begin(self, task: Task) -> str:
        self.calls = 0
        return super().begin(task)

    def add(self, number: int) -> dict[str, int]:
        self.calls += 1
        return super().add(number) | {"calls": self.calls}


class Unrestoring(Counter):
    def set_state(self, state: Any) -> None:
        self.target = state["target"]


class Remembering(Counter):
    """What was added in a turn once is added in it ever after, whatever was restored."""

    def __init__(self) -> None:
        super().__init__()
        self.added: dict[int, int] = {}

    def begin(self, task: Task) -> str:
        self.added.clear()
        return super().begin(task)

    def add(self, number: int) -> dict[str, int]:
        return super().add(self.added.setdefault(self.turn, number))

    def roll(self) -> dict[str, int]:
        return self.add(1)

    def stop(self) -> str:
        return "no"


class Unfinished(Counter):
    """Says that it can be copied, and cannot."""

    get_state = Counter.__mro__[1].get_state  # type: ignore[attr-defined]

    def digest_text(self) -> str:
        return f"{self.value}/{self.target}"


class Unpicklable(Counter):
    def get_state(self) -> Any:
        return lambda: self.value

    def digest_text(self) -> str:
        return f"{self.value}/{self.target}"


class CountingDigest(Counter):
    def digest_text(self) -> str:
        return f"{self.turn} {self.value}/{self.target}"


class BlindDigest(Counter):
    """Neither its digest nor its observations show the state."""

    def add(self, number: int) -> dict[str, int]:
        super().add(number)
        return {}

    def roll(self) -> dict[str, int]:
        return self.add(1)

    def digest_text(self) -> str:
        return str(self.target)


class Crashing(Counter):
    def add(self, number: int) -> dict[str, int]:
        raise KeyError(number)


class OverlappingSplits(Counter):
    def begin(self, task: Task) -> str:
        self.value, self.target = 0, int(task.id)
        return f"Reach {self.target}."


class Terminating(Counter):
    """Calls the turn limit an end."""

    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, False, info


class Weak(Solved):
    def expert_action(self) -> str:
        return '{"name":"stop","arguments":{}}'


class Empty(Counter):
    split_sizes: ClassVar = {"train": 0}


class Nowhere(Counter):
    runs_in: ClassVar = "proces"


class Never(Counter):
    max_live: ClassVar = 0


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WorldNoise, "two environments with equal seed, task and actions differ"),
        (NoisyPrompt, "two resets with equal seed and task gave"),
        (SharedState, "two environments with equal seed, task and actions differ"),
        (SelfFork, "stepping a fork changed the environment"),
        (Forgetful, r"raised AttributeError|differ after the same actions|lead elsewhere"),
        (Unrestoring, "differ after the same actions|does not lead back"),
        (Remembering, "other actions lead elsewhere than in a new environment"),
        (Unfinished, "has nothing in self.state"),
        (Unpicklable, r"get_state\(\) of Unpicklable cannot be pickled"),
        (CountingDigest, "must hold neither counters nor noise"),
        (BlindDigest, "negative control"),
        (Crashing, "raised KeyError"),
        (OverlappingSplits, "also occurs in split"),
        (Terminating, "must truncate, not terminate"),
        (Weak, "the expert fails task '0' of split 'train'"),
        (Empty, "split 'train' has 0 tasks"),
        (Nowhere, "runs_in is 'proces'"),
        (Never, "max_live is 0"),
    ],
)
def test_broken_environments_are_told_what_is_broken(cls: type[Counter], message: str) -> None:
    with pytest.raises(EnvironmentContractError, match=message):
        check_agent_env(cls(), n_tasks=5)
