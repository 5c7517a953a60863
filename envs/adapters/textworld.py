"""TextWorld: text adventures that are generated, compiled and played by the package textworld."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.errors import UserError
from opd_agents.plugins import need
from opd_agents.tools import ToolError, to_json
from opd_agents.types import Task, ToolCall

COMMAND = re.compile(r"[A-Za-z][A-Za-z0-9' -]{0,119}")  # no full stop or comma: they would join two commands
# The interpreter's own commands, such as save and restart, are none of the game's; neither is "then", which
# would join two.
VERBS = (
    *("chop", "close", "cook", "dice", "drink", "drop", "eat", "examine", "go", "insert", "inventory"),
    *("lock", "look", "open", "prepare", "put", "slice", "take", "unlock"),
)
SYSTEM = (
    "You play a text adventure. Act with do(command). Commands: look, inventory, go north (south, east, "
    "west), examine THING, open THING, close THING, unlock THING with KEY, lock THING with KEY, take THING, "
    "take THING from THING, drop THING, put THING on THING, insert THING into THING, eat THING."
)
SIZES = {"train": 100_000, "validation": 1_000, "test": 1_000}
ASKED = "feedback description facts admissible_commands policy_commands won lost score max_score objective"


class TextWorld(AgentEnv):
    """Games with a quest in a house, drawn by the task; the reward is the part of the quests that is done.

    A game is compiled when it is first played, in about a second, and kept in ``cache``. The expert is the
    game's own policy from any state; where the quest can no longer be done, it looks around.
    """

    fork_mode: ClassVar[Any] = "replay"
    has_expert: ClassVar[bool] = True
    family: ClassVar[str] = "worlds"
    extra: ClassVar[str | None] = "textworld"
    licence: ClassVar[str] = "MIT; GPL-2.0+ (jericho)"
    runs_in: ClassVar[Any] = "process"  # the interpreter of the games is C
    max_live: ClassVar[int | None] = 8  # processes of about 90 MiB each
    split_sizes = SIZES
    system_prompt = SYSTEM

    def __init__(
        self,
        rooms: int = 3,
        objects: int = 6,
        quest_length: int = 4,
        *,
        show_commands: bool = False,
        cache: str | None = None,
        max_turns: int = 30,
    ) -> None:
        """``show_commands`` appends what can be done to every observation; ``cache``: the folder of the
        games, by default opd-agents/textworld in the user's cache folder. Raises UserError, and MissingPart
        without textworld."""
        sizes = {"rooms": rooms, "objects": objects, "quest_length": quest_length, "max_turns": max_turns}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"TextWorld: {name} must be at least 1, got {value}.")
        self._textworld = need("textworld", "textworld", "TextWorld")
        self.rooms, self.objects, self.quest_length = rooms, objects, quest_length
        self.show_commands, self.max_turns = show_commands, max_turns
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = Path(cache).expanduser() if cache else caches / "opd-agents" / "textworld"
        self._game: Any = None
        self._playing: str | None = None
        self._state: Any = None
        super().__init__([self.do])

    def begin(self, task: Task) -> str:
        file = str(self._file(task))
        if self._playing != file:  # to load a game takes much longer than to begin it again
            self.close()
            asked = self._textworld.EnvInfos(**dict.fromkeys(ASKED.split(), True))
            self._game, self._playing = self._textworld.start(file, asked), file
        self._state = self._game.reset()
        return f"{self._state['objective']}\n{self._said(self._state['description'])}"

    def do(self, command: str) -> str:
        """Do one thing in the world."""
        command = command.strip()
        words = command.lower().split()
        if not COMMAND.fullmatch(command) or "then" in words:
            raise ToolError("a command is one line of at most 120 letters, such as: take key from box")
        if words[0] not in VERBS:
            raise ToolError(f"unknown verb {words[0]!r}; verbs: {', '.join(VERBS)}")
        self._state, _, done = self._game.step(command)
        if done:
            self.finish()
        return self._said(self._state["feedback"])

    def on_text(self, text: str) -> str:
        return "Act with do(command)."

    def success(self) -> float:
        return float((self._state["score"] or 0) / self._state["max_score"])

    def digest_text(self) -> str:
        state = self._state
        return to_json([sorted(map(str, state["facts"])), state["score"], state["won"], state["lost"]])

    def expert_action(self) -> str:
        plan = self._state["policy_commands"] or ["look"]
        return format_calls([ToolCall("do", {"command": plan[0]})])

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = self._playing = None

    def _said(self, text: str) -> str:
        """The game's words without prompt, status line and ending, which count turns, and empty lines."""
        text = re.split(r"\n>|\*\*\* The End", text)[0]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if self.show_commands and not self._state["won"]:
            lines.append(f"commands: {', '.join(self._state['admissible_commands'])}")
        return "\n".join(lines)

    def _file(self, task: Task) -> Path:
        seed = random.Random(f"TextWorld-v0/{task.split}/{task.id}").randrange(2**31)
        package = self._textworld.version.__version__
        recipe = f"{package} {self.rooms} {self.objects} {self.quest_length} {seed}"
        file = self.cache / f"{hashlib.blake2b(recipe.encode(), digest_size=12).hexdigest()}.z8"
        if not file.exists():
            self._make(file, seed)
        return file

    def _make(self, file: Path, seed: int) -> None:
        """Generate and compile a game; it appears whole or not at all, for others may want it at once."""
        generator = need("textworld.generator", "textworld", "TextWorld")
        options = self._textworld.GameOptions()
        options.seeds, options.nb_rooms, options.nb_objects = seed, self.rooms, self.objects
        options.quest_length, options.force_recompile = self.quest_length, True
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            options.path = str(Path(folder) / file.name)
            generator.compile_game(generator.make_game(options), options)
            for suffix in (".json", ".z8"):  # the latter, which is looked for, last
                shutil.move((Path(folder) / file.name).with_suffix(suffix), file.with_suffix(suffix))
