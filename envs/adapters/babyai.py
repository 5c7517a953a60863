"""BabyAI and MiniGrid in words: what the agent sees of a grid world, actions as tools, the bot as expert."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import gymnasium

from opd_agents.envs.actions import format_calls
from opd_agents.envs.adapters.babyai_view import in_view, name_of
from opd_agents.envs.adapters.gym_text import GymText
from opd_agents.errors import UnknownName
from opd_agents.plugins import need
from opd_agents.tools import to_json
from opd_agents.types import ToolCall

WORDS = ("left", "right", "forward", "pickup", "drop", "toggle")  # the seventh, done, does nothing
UNLIMITED = 1_000_000  # the world's own step limit; max_turns is ours
# Levels that minigrid's bot does not always solve: it cannot begin with full hands, does not look into boxes,
# and opens doors out of order.
UNSOLVED = ("Carrying", "KeyInBox", "Debug")
SYSTEM = (
    "You are in a grid world and see what is in front of you. 2 forward 1 left: two cells ahead, then one to "
    "your left. left and right turn you, forward moves you one cell; pickup, drop and toggle (open, unlock) "
    "act on the cell 1 forward. Reach the goal."
)


class BabyAI(GymText):
    """A level of BabyAI, or another world of minigrid, by what its agent sees in its partial view."""

    fork_mode: ClassVar[Any] = "snapshot"
    has_expert: ClassVar[bool] = True
    extra: ClassVar[str | None] = "minigrid"
    licence: ClassVar[str] = "MIT (minigrid)"

    def __init__(self, level: str = "GoToLocal", max_turns: int = 64) -> None:
        """``level``: such as GoToLocal, PickupLoc, BossLevel (which needs 250 turns), or a whole id such as
        MiniGrid-DoorKey-5x5-v0, which has no expert. Raises UnknownName, and MissingPart without minigrid."""
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        levels = need("minigrid.envs.babyai.core.roomgrid_level", "minigrid", "BabyAI")
        vars(levels)["print"] = lambda *_: None  # it tells standard output of every layout that it rejects
        super().__init__(
            _full_id(level), actions=WORDS, max_turns=max_turns, env_options={"max_steps": UNLIMITED}
        )
        self.world: Any
        self.system_prompt = SYSTEM
        solved = self.world.spec.id.startswith("BabyAI-") and not any(word in level for word in UNSOLVED)
        self.has_expert = solved  # type: ignore[misc]  # a matter of the level here
        self._bot: Any = None
        self._advice: int | None = None

    def begin(self, task: Any) -> str:
        self._bot = None
        return f"goal: {super().begin(task)}"

    def describe(self, observation: Any) -> str:
        seen = in_view(self.world)
        carried = self.world.carrying
        goal = f"{self.world.mission}\n" if self.world.step_count == 0 else ""
        hands = f"; you carry {name_of(carried)}" if carried else ""
        return f"{goal}you see {', '.join(seen) or 'nothing'}{hands}"

    def content(self) -> str:
        return self.digest_text()

    def digest_text(self) -> str:
        world = self.world
        place = [int(i) for i in (*world.agent_pos, world.agent_dir)]
        carried = name_of(world.carrying) if world.carrying else None
        done = _progress(world.instrs) if "instrs" in vars(world) else None
        return to_json([world.mission, world.grid.encode().tolist(), place, carried, done, self._ended])

    def expert_action(self) -> str:
        if not self.has_expert:
            return super().expert_action()
        if self._bot is None:
            self._advise(None)
        return format_calls([ToolCall(WORDS[self._advice or 0], {})])

    def get_state(self) -> Any:
        return self.world, self._shown, self._last_reward, self._ended, self._bot, self._advice

    def set_state(self, state: Any) -> None:
        self.world, self._shown, self._last_reward, self._ended, self._bot, self._advice = state

    def _move(self, number: int) -> str:
        text = super()._move(number)
        if self._bot is not None and not self._ended:
            self._advise(number)
        return text

    def _advise(self, taken: int | None) -> None:
        """The bot's next action. It remembers what it saw, so it is told of every action since it was first
        asked; where another's actions confuse it, a new one starts from what there is."""
        bot = need("minigrid.utils.baby_ai_bot", "minigrid", "BabyAI").BabyAIBot
        for fresh in (self._bot is None, True):
            try:
                if fresh:
                    self._bot, taken = bot(self.world), None
                advice = self._bot.replan(taken)
            except Exception:  # whatever its assertions and searches raise in a world that it did not foresee
                continue
            self._advice = int(advice) if advice < len(WORDS) else None
            return
        self._advice = None


def _progress(instruction: Any) -> list[Any]:
    """Which parts of an instruction with several are done."""
    parts = vars(instruction)
    if "instr_a" not in parts:
        return []
    done = [parts.get("a_done"), parts.get("b_done")]
    return [done, _progress(parts["instr_a"]), _progress(parts["instr_b"])]


def _full_id(level: str) -> str:
    known = {name: id for id in gymnasium.registry if (name := _level(id))}
    if level not in known and level not in known.values():
        raise UnknownName("BabyAI level", level, known, "opd-agents envs opd_agents/BabyAI-v0")
    return known.get(level, level)


def _level(id: str) -> str | None:
    """BabyAI-GoToLocal-v0 is the level GoToLocal; MiniGrid's worlds keep their ids."""
    if id.startswith("BabyAI-"):
        return id.removeprefix("BabyAI-").rpartition("-v")[0]
    return id if id.startswith("MiniGrid-") else None
