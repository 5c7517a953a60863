"""Where the compute goes: the runs of scaling.yaml, and what `opd-agents scaling` finds of them.

    python benchmarks/scaling.py

Writes results/scaling.json, .md and .svg; what is finished is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from sweep import load_sweep

from opd_agents.config import load_config
from opd_agents.scaling.shown import terminal, write
from opd_agents.scaling.study import study
from opd_agents.trainer import train

HERE = Path(__file__).parent
SWEEP, TEACHER = HERE / "scaling.yaml", str(HERE / "scaling_teacher.yaml")
ABOUT = """# Success against compute: a small sweep

```bash
python benchmarks/scaling.py        # trains what is missing, then seconds
```
LockChain of 8 locks; a student of 98,752 weights, teachers of as many and of 209,568 that solve 98 and 100 %
of the validation tasks; three seeds an arm. The arms, and **what was predicted before the runs**, stand in
[scaling.yaml](../scaling.yaml); what is counted and how the curves are fitted, in
[scaling.md](../../docs/scaling.md). A small world: what large models do is not known from here. A first try
on OrderDesk was given up for its cost; its `base` and `updates_2` on one seed were seen before prediction 1
was written.

"""
PREDICTED = {"updates_2": "below"}  # of the others: not told apart
COLD_START = "cold_start"  # the run that all others begin with
SMALL = [f"student.build.config.{key}" for key in ("hidden_size=64", "intermediate_size=128", "head_dim=16")]


def teachers(folder: Path) -> None:
    """The teacher, and one of the students' size."""
    large, small = (f"output={folder / name}" for name in ("teacher", "small_teacher"))
    train(load_config(TEACHER, large), resume=True)
    tokenizer = f"student.build.tokenizer={folder / 'teacher'}"
    train(load_config(TEACHER, tokenizer, *SMALL, small), resume=True)


def ends(found: Mapping[str, Any]) -> Iterator[str]:
    """What became of the predictions, by the rule in the YAML; Markdown."""
    yield "| arm | predicted | found |\n|---|---|---|\n"
    for one in found["comparisons"]:
        side = "above" if one["difference"][0] > 0 else "below"
        predicted = PREDICTED.get(one["arm"], "undecided")
        yield f"| {one['arm']} | {predicted} | **{side if one['told_apart'] else 'undecided'}** |\n"


def main(
    out: Annotated[Path, typer.Option(help="Where scaling.json, .md and .svg go.")] = HERE / "results",
) -> None:
    """Train what is missing, in this process, and say what was found."""
    teachers(Path("runs/scaling"))
    sweep, cells = load_sweep(SWEEP)
    for cell in cells:
        train(cell.config, resume=True, probes=False)
    found = study([sweep.folder / label for label in sweep.runs if label != COLD_START])
    write(found, out)
    page = (out / "scaling.md").read_text(encoding="utf-8").partition("\n\n")[2]
    (out / "scaling.md").write_text(ABOUT + page + "\n" + "".join(ends(found)), encoding="utf-8")
    Console(width=140).print(terminal(found))


if __name__ == "__main__":
    typer.run(main)
