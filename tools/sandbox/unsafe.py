"""No sandbox at all: commands run with all rights of this process. For trusted tests."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import cast

from opd_agents.tools.sandbox import inside
from opd_agents.tools.sandbox.base import Ran, Sandbox, Stopped


class UnsafeSandbox(Sandbox):
    """Commands as this process's own, in a temporary folder, with time-outs and an output limit only."""

    def _execute(self, command: list[str], stdin: bytes, timeout: float) -> Ran:
        limits = self.limits
        prepare = None if limits.cpu_seconds is None else partial(inside.limit_cpu, limits.cpu_seconds)
        with tempfile.TemporaryDirectory() as folder:
            inside.write_files(folder, self._files)
            output, exit_code, stopped = inside.execute(
                command, folder, stdin, timeout, limits.output_bytes, alone=False, prepare=prepare
            )
            files = inside.read_files(folder, self._files, limits.files, limits.files_mb << 20)
        return output, exit_code, cast("Stopped | None", stopped), files
