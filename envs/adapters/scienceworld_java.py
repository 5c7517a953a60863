"""ScienceWorld's simulator in a Java machine of its own."""

from __future__ import annotations

import gc
import logging
import shutil
import subprocess
import threading
import weakref
from typing import Any

from opd_agents.errors import MissingPart
from opd_agents.plugins import need
from opd_agents.tools import ToolError

TIMEOUT = 30.0  # seconds for one answer, which takes milliseconds
GOLD_TIMEOUT = 900.0  # where plants must grow, the search for a solution takes half a minute of an idle core
MAX_LIVE = 8  # machines of up to half a gibibyte each
SPARE = MAX_LIVE  # all are kept for the next episodes: one takes two seconds of a core to start
JAVA = (
    *("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),  # quick to start
    # Objects are listed in the order of identity hashes, which are random. All equal, they come in the order
    # in which they were made: an observation is then the same in every process.
    *("-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"),
)
DIED = "the simulator stopped answering"

_spare: list[Simulator] = []
_live: weakref.WeakSet[Simulator] = weakref.WeakSet()


class Simulator:
    """One simulator. Its machine ends with this object, with ``close``, and with Python, killed or not."""

    def __init__(self) -> None:
        """Raises MissingPart as ``require``."""
        py4j, constants = require()
        if len(_live) >= MAX_LIVE:
            gc.collect()  # environments that nobody closed are held by cycles
        port, token, process = py4j.launch_gateway(
            classpath=constants.JAR_PATH,
            javaopts=list(JAVA),
            die_on_exit=True,
            enable_auth=True,
            cwd=constants.BASEPATH,
            return_proc=True,
        )
        self.process: subprocess.Popen[bytes] = process
        reach = py4j.GatewayParameters(auto_field=True, port=port, auth_token=token)
        gateway = py4j.JavaGateway(gateway_parameters=reach, java_process=process)
        self._stop = weakref.finalize(self, _end, process, gateway)
        self._interface = gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface
        self._server = self._interface()
        _live.add(self)

    @property
    def alive(self) -> bool:
        return self._stop.alive and self.process.poll() is None

    def ask(self, method: str, *arguments: Any, timeout: float = TIMEOUT) -> Any:
        """The answer of a method. Raises ToolError if the machine is dead, dies or does not answer within
        ``timeout`` seconds; it is then ended."""
        if not self.alive:
            self.close()
            raise ToolError(DIED)
        watchdog = threading.Timer(timeout, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            return getattr(self._server, method)(*arguments)
        except Exception as error:  # py4j's errors are of many kinds, and a simulator that raised is broken
            self.close()
            raise ToolError(DIED) from error
        finally:
            watchdog.cancel()

    def gold_path(self, task: str, variation: int, simplifications: str) -> list[str]:
        """The simulator's own solution. What is loaded must be loaded again: simulators of one machine share
        state. One that looked for a solution looks again at every reset, so another is asked here. Raises
        ToolError as ``ask``."""
        usual, self._server = self._server, self._interface()
        try:
            self.ask("load", task, variation, simplifications, True, timeout=GOLD_TIMEOUT)
            return list(self.ask("getGoldActionSequence"))
        finally:
            self._server = usual

    def close(self) -> None:
        self._stop()


def take() -> Simulator:
    """A simulator, a spare one if there is one."""
    while _spare:
        if (simulator := _spare.pop()).alive:
            return simulator
    return Simulator()


def give_back(simulator: Simulator) -> None:
    """Keep it for the next episode, or end it."""
    if simulator.alive and len(_spare) < SPARE:
        _spare.append(simulator)
    else:
        simulator.close()


def require() -> tuple[Any, Any]:
    """py4j's and ScienceWorld's modules. Raises MissingPart without them or without Java."""
    py4j = need("py4j.java_gateway", "scienceworld", "ScienceWorld")
    constants = need("scienceworld.constants", "scienceworld", "ScienceWorld")
    if not shutil.which("java"):
        raise MissingPart("ScienceWorld needs Java: install a JRE, such as Debian's default-jre-headless.")
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it has to say of a dead machine is ToolError
    return py4j, constants


def _end(process: subprocess.Popen[bytes], gateway: Any) -> None:
    process.kill()
    gateway.close()
    process.wait()
