"""What the benchmark of teachers shows: a table a part, and what its figures are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from figures import as_text, markdown

ABOUT = {
    "scoring": """\
Scored tokens/s, whole histories counted, until the log-probs of the action tokens (top k 0) or of each one's
top k are here; and per second of a core's time, of client and server together, to which other work on the
machine matters less.""",
    "api": """\
Answered requests/s, of all turns of episodes, asked for in one call, and a core's time that the client takes
for one. No model is behind this API but the test server, on the same cores: these are figures of the
client.""",
    "tokens": """\
Teacher tokens of an episode, as a multiple of its own tokens, by Qwen3's template without thought. A teacher
that acts behind an API reads the whole conversation before every turn (counted as the student's tokenizer
counts; an endpoint may discount what it has read before).""",
    "step": """\
A training step, on episodes that it plays or that were played before the run, as the trainer logs it: its
seconds, and those of them that the teacher's scoring takes.""",
}
PARTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {
    "scoring": lambda row: {
        "top k": str(row["top k"]), "tokens/s": as_text(row["tokens_per_second"], digits=0),
        "times local": _times(row),
        "tokens/s of a core": as_text(row["tokens_per_core_second"], digits=0),
    },
    "api": lambda row: {
        "requests": str(row["requests"]), "requests/s": as_text(row["requests_per_second"], digits=0),
        "client, ms of a core": as_text(row["cpu_ms"], digits=1), "times the first": _times(row),
    },
    "tokens": lambda row: {
        "level": row["level"], "turns": f"{row['turns']:.1f}", "tokens of an episode": f"{row['tokens']:.0f}",
        "teacher tokens, times that": as_text(row["times"]),
    },
    "step": lambda row: {
        "seconds": as_text(row["seconds"]), "of the teacher": as_text(row["teacher_seconds"]),
        "share": as_text({key: 100 * value for key, value in row["share"].items()}, digits=0) + " %",
    },
}  # fmt: skip


def _times(row: Mapping[str, Any]) -> str:
    return as_text(row["times_the_first"]) if "times_the_first" in row else ""


def page(result: Mapping[str, Any]) -> str:
    """A table a part."""
    parts = []
    for name, part in result.items():
        table = [{"arm": row["arm"]} | PARTS[name](row) for row in part["rows"]]
        about = ABOUT[name].replace("\n", " ")
        parts.append(markdown(f"{about} Median (min to max).", part, table))
    return "\n".join(parts)
