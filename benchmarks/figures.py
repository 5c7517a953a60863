"""What the benchmarks print: medians with their range, as Markdown, and the files that hold them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import rich.box
from rich.console import Console
from rich.table import Table

from opd_agents.report.groups import mean_over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def as_text(values: Mapping[str, float], digits: int = 2) -> str:
    """A spread for a person."""
    middle, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half of its 95 % t-interval over seeds; those that lack the figure (NaN) are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": None, "half": None, "seeds": 0}
    found = mean_over_seeds(known)
    return {"mean": found.value, "half": found.half, "seeds": len(known)}


def verdict(differences: Sequence[float]) -> dict[str, Any]:
    """What becomes of the claim that paired differences are above 0: reproduced if their whole interval is,
    contradicted if it is below, else undecided."""
    found = over_seeds(differences)
    middle, half = found["mean"], found["half"]
    if middle is None or half is None or abs(middle) <= half:
        return found | {"verdict": "undecided"}
    return found | {"verdict": "reproduced" if middle > 0 else "contradicted"}


def plus_minus(found: Mapping[str, Any], digits: int = 2) -> str:
    """A mean over seeds for a person; a dash where there is none."""
    if found["mean"] is None:
        return "-"
    half = "" if found["half"] is None else f" ± {found['half']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{half}"


def markdown(about: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """The table of ``rows``, all with the same columns, and below which figures it is: the plain values among
    ``facts``. The column of names alone stands to the left."""
    view = Table(box=rich.box.MARKDOWN)
    for column in rows[0]:
        view.add_column(column, justify="left" if column in ("arm", "part") else "right", no_wrap=True)
    for row in rows:
        view.add_row(*row.values())
    known = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    told = ", ".join(f"{key} {value}" for key, value in known.items())
    console = Console(width=240)  # of the table; the text is wrapped earlier
    with console.capture() as captured:
        console.print(f"{about} One run: {told}.", width=120)
        console.print(view)
    return "\n".join(line.strip() for line in captured.get().strip().splitlines()) + "\n"


def write(out: Path, name: str, result: Mapping[str, Any], page: str, as_json: bool) -> None:
    """Figures and table into the folder ``out``; one of them is printed."""
    keep(out, name, result, page)
    print(json.dumps(result, indent=1) + "\n" if as_json else page, end="")


def keep(out: Path, name: str, result: Mapping[str, Any], page: str) -> None:
    """Figures and table into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(page, encoding="utf-8")


def svg(figure: Figure, name: str) -> str:
    """Of the same figures the same text; ``name`` keeps its ids apart from another's on one page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
