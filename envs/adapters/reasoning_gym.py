"""reasoning-gym: its generators as environments of one or several attempts."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

from opd_agents.envs.adapters.formulas import is_list, is_polynomial
from opd_agents.envs.adapters.splits import split_of
from opd_agents.envs.base import AgentEnv
from opd_agents.errors import UnknownName, UserError
from opd_agents.plugins import need
from opd_agents.types import Task

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LONGEST = 50_000  # characters of an answer
DRAWS = 500  # until a question of the wanted split is found
# These verifiers run the answer as Python: what is no list, or no formula, must not reach them.
LISTS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
FORMULAS = ("countdown", "puzzle24", "simple_integration")
NO_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")  # none is stored
UNFIT = dict.fromkeys(
    (
        *("isomorphic_strings", "knight_swap", "list_functions"),
        *("polynomial_multiplication", "ransom_note", "word_ladder"),
    ),
    "its questions differ from process to process",
) | {"intermediate_integration": "its verifier runs whatever it is sent, without end for some answers"}


class ReasoningGym(AgentEnv):
    """One generated question, answered by a text; after a wrong answer, the next attempt if there is one.

    The reward is the generator's score of the last answer, which for some generators is partial. A split has
    the questions that their hash puts there, so that no question is in two.
    """

    family: ClassVar[str] = "reasoning"
    extra: ClassVar[str | None] = "reasoning"
    text_only: ClassVar[bool] = True
    split_sizes = MappingProxyType({"train": 100_000, "validation": 1000, "test": 1000})
    system_prompt = "Give the answer alone, or think first and give it as <answer>...</answer>."

    def __init__(
        self,
        dataset: str = "chain_sum",
        config: Mapping[str, Any] = MappingProxyType({}),
        attempts: int = 1,
    ) -> None:
        """``dataset``: a generator of reasoning-gym, ``config``: its settings. Raises MissingPart, and
        UserError for settings that it refuses."""
        super().__init__([])
        if attempts < 1:
            raise UserError(f"ReasoningGym: attempts must be at least 1, got {attempts}.")
        try:
            self._source = (dataset, json.dumps(dict(config), sort_keys=True))
        except (TypeError, ValueError) as error:
            raise UserError(f"ReasoningGym: config must be plain data by name ({error}).") from error
        # The import takes seconds, which a list of all environments must not: the default needs no check.
        if dataset != "chain_sum" or config or importlib.util.find_spec("reasoning_gym") is None:
            generator(*self._source)
        self.max_turns = attempts
        self.has_expert = dataset not in NO_ANSWER  # type: ignore[misc]  # a matter of the instance
        self._item: dict[str, Any] = {}
        self._used, self._score = 0, 0.0

    def begin(self, task: Task) -> str:
        self._item = drawn(*self._source, task.split, task.id)
        self._used, self._score = 0, 0.0
        return str(self._item["question"])

    def on_text(self, text: str) -> str:
        self._used += 1
        self._score = self._judge(text)
        if self._score == 1 or self._used == self.max_turns:
            self.finish()
            return ""
        return f"Wrong. Attempts left: {self.max_turns - self._used}."

    def _judge(self, text: str) -> float:
        tagged = ANSWER.findall(text)
        answer = str(tagged[-1] if tagged else text).strip()
        dataset = self._source[0]
        if len(answer) > LONGEST:
            return 0.0
        if (dataset in LISTS and not is_list(answer)) or (dataset in FORMULAS and not is_polynomial(answer)):
            return 0.0
        try:
            return min(max(float(generator(*self._source).score_answer(answer, self._item)), 0.0), 1.0)
        except Exception:  # a verifier that trips over an answer which is none
            return 0.0

    def success(self) -> float:
        return self._score

    def expert_action(self) -> str:
        return f"<answer>{self._item['answer']}</answer>"

    def get_state(self) -> Any:
        return self._used, self._score

    def set_state(self, state: Any) -> None:
        self._item = drawn(*self._source, self.task.split, self.task.id)
        self._used, self._score = state


@lru_cache(maxsize=64)
def generator(dataset: str, config: str, seed: int = 0) -> Any:
    """The generator of ``dataset`` with ``config``, a JSON object."""
    gym = need("reasoning_gym", "reasoning", "ReasoningGym")
    known = need("reasoning_gym.factory", "reasoning", "ReasoningGym").DATASETS
    if dataset not in known:
        raise UnknownName("dataset of ReasoningGym", dataset, known, "opd-agents envs")
    if dataset in UNFIT:
        raise UserError(f"ReasoningGym: {dataset} cannot be used: {UNFIT[dataset]}.")
    try:
        return gym.create_dataset(dataset, **{"seed": seed, "size": 1} | json.loads(config))
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"ReasoningGym: {dataset} refuses the config {config}: {error}") from error


@lru_cache(maxsize=256)
def drawn(dataset: str, config: str, split: str, id: str) -> dict[str, Any]:
    """The question of a task, with its answer. Raises UserError where the split has none."""
    rng = random.Random(f"{dataset}/{split}/{id}")
    for _ in range(DRAWS):
        number = rng.randrange(2**31)
        try:
            item = generator(dataset, config)[number]
        except IndexError:  # of those that make all questions beforehand
            item = generator.__wrapped__(dataset, config, number)[0]
        if split_of(str(item["question"])) == split:
            return dict(item)
    raise UserError(f"ReasoningGym: {dataset} has too few different questions for a split {split!r}.")
