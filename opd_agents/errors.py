"""The errors of opd-agents.

    OpdError
    |-- UserError(ValueError)         the user's mistake: message says what, where, what to do; exit code 2
    |   |-- ConfigError               a config file, key, value or combination
    |   |-- UnknownName(LookupError)  an environment, method, suite, tool or policy that does not exist
    |   |-- DataError                 a file of tasks or conversations that cannot be read, or one of its rows
    |   |-- MissingPart               an optional package or a program (Docker, a browser) that is not there
    |   |-- CheckpointError           missing, unreadable, or of another vocabulary
    |   `-- RunFolderError            the output folder holds another run, or a resume would change it
    |-- EnvironmentContractError      an environment breaks the contract (its author's mistake)
    |   |-- NotForkable               snapshot or fork asked of an environment with fork_mode "none"
    |   `-- ReplayDivergence          replayed actions did not lead to the recorded state
    |-- ServerError                   a server that a run needs does not answer, or refuses a request
    |-- BudgetSpent                   what an endpoint may cost is spent; the run stops, and can go on
    |-- EnvironmentCrashed            the process of an environment ended; its episode is lost, no other is
    `-- AlignmentError                tokens, histories, temperatures or masks do not match: refuse to train

A failure inside one episode never surfaces as an exception: ``episode.py`` records it in the trajectory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OpdError(Exception):
    """Base of all errors raised by opd-agents."""


class UserError(OpdError, ValueError):
    """The user's mistake; the command line prints the message without a traceback and exits with 2."""


class ConfigError(UserError):
    """A config file, key, value or combination of values that cannot work."""


class UnknownName(UserError, LookupError):
    """A name that is not known; the message holds the nearest names and the command that lists them."""

    def __init__(self, kind: str, name: str, known: Iterable[str], command: str) -> None:
        self.kind, self.name, self.known, self.command = kind, name, tuple(known), command
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"Unknown {kind} {name!r}.{hint} `{command}` lists what there is.")

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, str, tuple[str, ...], str]]:
        return UnknownName, (self.kind, self.name, self.known, self.command)


class DataError(UserError):
    """Data of the user's that cannot be read or used; the message names the file, the row and the field."""


class MissingPart(UserError):
    """An optional package, or a program such as Docker or a browser, that is not there; the message says how
    to get it."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or does not fit the model it is used with."""


class RunFolderError(UserError):
    """An output folder that holds another run, or a resume that would change the run."""


class EnvironmentContractError(OpdError):
    """An environment breaks the AgentEnv contract."""


class NotForkable(EnvironmentContractError):
    """Snapshot, restore or fork asked of an environment that cannot."""


class ReplayDivergence(EnvironmentContractError):
    """Replaying the recorded actions led to another state than the recorded one."""


class ServerError(OpdError):
    """A server that a run needs does not answer, after all retries, or refuses a request."""


class BudgetSpent(OpdError):
    """What the config lets an endpoint cost is spent; no further request was made."""


class EnvironmentCrashed(OpdError):
    """The process that an environment runs in ended by itself or was killed."""


class AlignmentError(OpdError):
    """Tokens, histories, temperatures or masks that should agree do not; training must not go on."""
