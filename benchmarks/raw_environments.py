"""The packages behind the adapters, as their own users step them: the same actions as ours get."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from opd_agents.envs import parse_action


class Raw(Protocol):
    """One environment. ``actions`` are what ours was sent in the episode of task ``number``."""

    def reset(self, number: int) -> None: ...

    def play(self, actions: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class Discrete:
    """``gymnasium.make`` with all its wrappers; the words of ours are the numbers of its actions."""

    def __init__(self, id: str, words: Sequence[str]) -> None:
        import gymnasium

        if id.startswith("BabyAI-"):
            __import__("minigrid")
        self.env, self.words = gymnasium.make(id), words

    def reset(self, number: int) -> None:
        self.env.reset(seed=number)

    def play(self, actions: Sequence[str]) -> None:
        for action in actions:
            for call in parse_action(action):
                self.env.step(self.words.index(call.name))

    def close(self) -> None:
        self.env.close()


class ScienceWorld:
    """Its Python class, whose every step lists all valid actions too."""

    def __init__(self) -> None:
        from scienceworld import ScienceWorldEnv

        from opd_agents.envs.adapters.scienceworld_tasks import VARIATIONS, variations

        self.tasks = variations(tuple(VARIATIONS), "train")
        self.env = ScienceWorldEnv()

    def reset(self, number: int) -> None:
        self.env.load(*self.tasks[number])
        self.env.reset()

    def play(self, actions: Sequence[str]) -> None:
        for command in _commands(actions):
            self.env.step(command)

    def close(self) -> None:
        self.env.close()


class TextWorld:
    """The same games by its generator and interpreter, asked for as much as ours asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.game = folder, None

    def reset(self, number: int) -> None:
        import textworld

        from opd_agents.envs.adapters.textworld import ASKED

        file = self.folder / f"raw-{number}.z8"
        if not file.exists():
            options = textworld.GameOptions()
            options.seeds = random.Random(f"TextWorld-v0/train/{number}").randrange(2**31)
            options.nb_rooms, options.nb_objects, options.quest_length = 3, 6, 4  # ours by default
            options.path = str(file)
            textworld.generator.compile_game(textworld.generator.make_game(options), options)
        self.close()
        self.game = textworld.start(str(file), textworld.EnvInfos(**dict.fromkeys(ASKED.split(), True)))
        self.game.reset()

    def play(self, actions: Sequence[str]) -> None:
        assert self.game is not None
        for command in _commands(actions):
            state, _, _ = self.game.step(command)
        assert state["won"], "not the same game"

    def close(self) -> None:
        if self.game is not None:
            self.game.close()


class Bfcl:
    """The executor of its official multi-turn run. It judges nothing; ours judges every request."""

    def __init__(self) -> None:
        from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

        from opd_agents.envs.adapters.bfcl_data import rows

        self.execute: Callable[..., Any] = execute_multi_turn_func_call
        self.tasks, self.names = rows("multi_turn_base"), 0

    def reset(self, number: int) -> None:
        self.task, self.names = self.tasks[number], self.names + 1  # by a new name it is a new world
        self._run([])

    def play(self, actions: Sequence[str]) -> None:
        for action in actions:
            calls = [(call.name, call.arguments.items()) for call in parse_action(action)]
            if calls:
                self._run([f"{name}({', '.join(f'{k}={v!r}' for k, v in given)})" for name, given in calls])

    def _run(self, calls: Sequence[str]) -> None:
        task = self.task
        self.execute(
            list(calls), task["initial_config"], task["involved_classes"], f"run{self.names}", task["id"]
        )

    def close(self) -> None:
        pass


class ReasoningGym:
    """Its generator and its verifier."""

    def __init__(self) -> None:
        import reasoning_gym

        self.data = reasoning_gym.create_dataset("chain_sum", size=1000, seed=0)

    def reset(self, number: int) -> None:
        self.item = self.data[number]

    def play(self, actions: Sequence[str]) -> None:
        for _ in actions:
            assert self.data.score_answer(self.item["answer"], self.item) == 1

    def close(self) -> None:
        pass


class MiniWob:
    """Its environment, which drives a Chromium of its own by Selenium: the one click of click-test."""

    def __init__(self) -> None:
        for variable, program in (("CHROME_BINARY", "chromium"), ("CHROMEDRIVER", "chromedriver")):
            os.environ[f"MINIWOB_{variable}"] = str(shutil.which(program))
        import gymnasium
        import miniwob
        from miniwob.action import ActionTypes

        gymnasium.register_envs(miniwob)
        self.env, self.click = gymnasium.make("miniwob/click-test-v1"), ActionTypes.CLICK_ELEMENT

    def reset(self, number: int) -> None:
        seen, _ = self.env.reset(seed=number)
        self.button = next(part["ref"] for part in seen["dom_elements"] if part["tag"] == "button")

    def play(self, actions: Sequence[str]) -> None:
        world: Any = self.env.unwrapped
        for _ in actions:
            self.env.step(world.create_action(self.click, ref=self.button))

    def close(self) -> None:
        self.env.close()


BABYAI = ("left", "right", "forward", "pickup", "drop", "toggle")
RAW: dict[str, Callable[[Path], Raw]] = {
    "BabyAI": lambda folder: Discrete("BabyAI-GoToLocal-v0", BABYAI),
    "GymText": lambda folder: Discrete("Blackjack-v1", ("stick", "hit")),
    "ScienceWorld": lambda folder: ScienceWorld(),
    "TextWorld": TextWorld,
    "BfclMultiTurn": lambda folder: Bfcl(),
    "ReasoningGym": lambda folder: ReasoningGym(),
    "MiniWoB.click-test": lambda folder: MiniWob(),
}


def _commands(actions: Sequence[str]) -> list[str]:
    return [call.arguments["command"] for action in actions for call in parse_action(action)]
