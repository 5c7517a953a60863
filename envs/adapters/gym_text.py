"""Any gymnasium environment with discrete actions in words: one tool an action, the observation as text."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import gymnasium
import pydantic

from opd_agents.envs.adapters.gym_words import ACTIONS, FIELDS, numbers_of, plain
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.splits import SPLIT_SIZES, draw_from_split
from opd_agents.errors import UserError
from opd_agents.tools import Tool, to_json
from opd_agents.types import Task, ToolSpec

Goal = Literal["reward", "end", "survive"]
NO_PARAMETERS = {"type": "object", "properties": {}}
NO_ARGUMENTS = pydantic.create_model(
    "no_arguments", __config__=pydantic.ConfigDict(extra="forbid", strict=True)
)
MAX_DRAWS = 1000


class GymText(AgentEnv):
    """An environment of gymnasium's registry with a Discrete action space, played in words.

    A text rendering, where there is one, is the observation, ``[red:X]`` for a coloured X; else its numbers
    as JSON. The task seeds the world, the seed its later noise. A subclass may put other words into
    ``describe``, and another verdict into ``success``.
    """

    fork_mode: ClassVar[Any] = "replay"  # not every environment can be pickled or copied as it stands
    family: ClassVar[str] = "worlds"
    licence: ClassVar[str] = "MIT (gymnasium)"
    split_sizes = SPLIT_SIZES

    def __init__(
        self,
        gym_id: str = "Blackjack-v1",
        *,
        actions: Sequence[str] = (),
        fields: Sequence[str] = (),
        goal: Goal = "reward",
        prompt: str = "",
        splits: Literal["content", "seeds"] = "content",
        max_turns: int = 64,
        env_options: Mapping[str, Any] | None = None,
    ) -> None:
        """``actions``: a tool's name for each action, from 0; fewer leave the last ones out. ``fields`` name
        the numbers of an observation. ``goal``: the last reward is positive, the world ends the episode, or
        it does not within ``max_turns``. ``splits="seeds"``: for a world that begins in few ways, so that
        splits cannot differ in content. Raises UserError for what does not fit."""
        self.world = _open(gym_id, dict(env_options or {}))
        self._name = self.world.spec.name if self.world.spec else gym_id
        count = int(self.world.action_space.n)  # type: ignore[attr-defined]  # _open checked that it is Discrete
        words = tuple(actions or ACTIONS.get(self._name, [f"action_{i}" for i in range(count)]))
        if len(words) > count or len({*words}) < len(words) or not all(map(str.isidentifier, words)):
            what = f"up to {count} different words without spaces"
            raise UserError(f"GymText: actions must be {what}, one an action of {gym_id}, not {words}.")
        if goal not in get_args(Goal) or splits not in ("content", "seeds") or max_turns < 1:
            raise UserError(
                f"GymText: goal is one of {', '.join(get_args(Goal))}, splits content or seeds, max_turns at "
                f"least 1; got {goal!r}, {splits!r}, {max_turns!r}."
            )
        self.words, self.fields = words, tuple(fields) or FIELDS.get(self._name, ())
        self.goal, self.prompt, self.splits, self.max_turns = goal, prompt, splits, max_turns
        self.system_prompt = f"Play {self._name}. Act by calling one tool at a time."
        self.stream = f"GymText-v0/{gym_id}/{sorted((env_options or {}).items())}"
        self._last_reward, self._ended = 0.0, False
        self._shown = ""
        tools = [
            Tool(ToolSpec(word, "", NO_PARAMETERS), functools.partial(self._move, number), NO_ARGUMENTS)
            for number, word in enumerate(words)
        ]
        super().__init__(tools)

    def begin(self, task: Task) -> str:
        self._last_reward, self._ended = 0.0, False
        if self.splits == "seeds":
            self._start(random.Random(f"{self.stream}/{task.split}/{task.id}"))
        else:
            tries = iter(range(MAX_DRAWS))
            draw_from_split(self.stream, task.split, task.id, lambda rng: self._draw(rng, tries), str)
        return "\n".join(filter(None, [self.prompt, self._shown]))

    def describe(self, observation: Any) -> str:
        """The observation in words."""
        if self.world.render_mode == "ansi":
            return plain(str(self.world.render()))
        numbers = numbers_of(observation)
        if isinstance(numbers, list) and len(numbers) == len(self.fields):
            return to_json(dict(zip(self.fields, numbers, strict=True)))
        return to_json(numbers)

    def content(self) -> str:
        """All of the world as it begins, as text; worlds that differ here may be in different splits."""
        return self._shown

    def on_text(self, text: str) -> str:
        return f"Call a tool: {', '.join(self.words)}."

    def success(self) -> float:
        if self.goal == "survive":
            return float(not self._ended)
        return float(self._ended and (self.goal == "end" or self._last_reward > 0))

    def digest_text(self) -> str:
        return to_json([self._shown, self._last_reward, self._ended])

    def close(self) -> None:
        self.world.close()

    def _start(self, rng: random.Random) -> str:
        observation, _ = self.world.reset(seed=rng.randrange(2**31))
        self._shown = self.describe(observation)
        return self.content()

    def _draw(self, rng: random.Random, tries: Iterator[int]) -> str:
        if next(tries, None) is None:
            raise UserError(
                f"GymText: {self._name} begins alike in {MAX_DRAWS} draws, so its splits cannot differ in "
                'content. Give splits="seeds" to let them differ in their seeds only.'
            )
        return self._start(rng)

    def _move(self, number: int) -> str:
        self.world.np_random = (
            self.np_random
        )  # so that the seed of the episode, not of the task, is its noise
        observation, reward, terminated, truncated, _ = self.world.step(number)
        self._last_reward, self._ended = float(reward), terminated
        if terminated or truncated:
            self.finish()
        self._shown = self.describe(observation)
        return self._shown


def _open(gym_id: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        # Without the wrappers: a TimeLimit would count on in restored episodes, max_turns does not.
        world = gymnasium.make(gym_id, disable_env_checker=True, **options).unwrapped
        if "ansi" in world.metadata.get("render_modes", ()):
            world.close()
            world = gymnasium.make(gym_id, disable_env_checker=True, **options, render_mode="ansi").unwrapped
    except (gymnasium.error.Error, TypeError) as error:
        raise UserError(f"GymText: {gym_id!r} with {options} cannot be made: {error}") from error
    if not isinstance(world.action_space, gymnasium.spaces.Discrete) or world.action_space.start:
        raise UserError(f"GymText: {gym_id} has no Discrete actions from 0 but {world.action_space}.")
    return world
