"""The shape of the engine: imports run down the layers, and no method is known by name."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opd_agents"

# From the bottom to the top. A module may import its own layer and those before it.
LAYERS = (
    ("types", "errors"),
    # what a run is asked to do, read by all layers that it configures; the user's data and code
    ("config", "configs", "schedules", "rows", "messages", "plugins"),
    ("tools", "api"),
    ("envs", "testing", "fuzzing"),
    ("chat",),
    ("policies",),
    ("hosting", "episode", "rollout", "recordings", "stored", "batch", "distributed", "sharding"),
    ("teachers",),
    ("correction", "judging", "frozen", "weighting", "composition", "credit", "objectives"),
    (
        *("loss", "optimizers", "runs", "tasks", "playing", "progress", "teaching", "references", "student"),
        *("discriminator", "session", "starting", "curriculum"),
        *(
            "step_metrics",
            "token_metrics",
            "episode_metrics",
            "alarms",
            "experience",
            "repairing",
            "updates",
            "probing",
            "trainer",
            "evaluation",
            "diagnostics",
        ),
        *("estimate", "checking", "intervals", "questions", "recommending"),
        *("export", "traces", "trl_rows", "trackers", "model_card", "lineage"),
    ),
    (
        *("cli", "cli_evaluate", "cli_files", "cli_options", "cli_rollout", "cli_sandbox"),
        *("terminal", "report", "watching", "quickstart", "scaling", "cli_scaling"),
        *("explaining", "explained", "__main__", "__init__"),
    ),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = {  # dotted module name -> file; the symlinked folders included
    ".".join(("opd_agents", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder in (PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_dir()))
    for path in (folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


def part(module: str) -> str:
    """The name of the layer table that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.Module) -> Iterator[str]:
    """Project modules imported anywhere in a file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in SOURCES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def edges() -> Iterator[tuple[str, str]]:
    for module, tree in TREES.items():
        yield from ((module, name) for name in imported(tree) if name.split(".")[0] == "opd_agents")


def test_every_module_has_a_layer() -> None:
    assert {part(module) for module in SOURCES} <= set(LEVEL)


def test_imports_run_down_the_layers() -> None:
    upwards = [f"{a} -> {b}" for a, b in edges() if LEVEL[part(b)] > LEVEL[part(a)]]
    assert not upwards


def test_imports_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for module, name in edges():
        graph[module].add(name)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules
    assert set(order) >= set(SOURCES)


def test_imports_are_absolute_and_name_no_top_level_folder() -> None:
    wrong = [
        f"{module}: {ast.unparse(node)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.level)
        or any(name.split(".")[0] in {"envs", "tools", "teachers", "configs"} for name in imported_by(node))
    ]
    assert not wrong


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def decided_on(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """String literals that a program may branch on: in comparisons, match cases and dict keys."""
    for node in ast.walk(tree):
        places: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.MatchMapping | ast.Dict):
            places = [*node.keys]
        for place in filter(None, places):
            for leaf in ast.walk(place):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.lineno, leaf.value


def test_the_engine_decides_on_no_method_name() -> None:
    presets = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert "score" in presets
    presets -= {"score"}  # is also what a judge gives
    found = [
        f"{module}:{line} {text!r}"
        for module, tree in TREES.items()
        for line, text in decided_on(tree)
        if text in presets
    ]
    assert not found


def test_the_search_for_names_sees_every_form() -> None:
    code = 'a == "p"\nb in ("q", "r")\nd = {"s": 1}\nprint("w")\n'
    code += 'match c:\n    case "t" | "u": pass\n    case {"v": 1}: pass'
    assert {text for _, text in decided_on(ast.parse(code))} == set("pqrstuv")


HEAVY = ("torch", "transformers", "gymnasium", "matplotlib", "scipy", "datasets", "openai", "docker")


def loaded_after(code: str, *names: str) -> set[str]:
    """Which of the modules ``names`` a fresh interpreter has loaded after ``code``."""
    probe = f"import sys\n{code}\nprint('loaded:', *(set({list(names)}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_import_of_the_package_is_light() -> None:
    assert loaded_after("import opd_agents; dir(opd_agents)", *HEAVY, "typer", "pydantic", "numpy") == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["envs"], ["methods"], ["methods", "sft"]]
)
def test_quick_commands_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"from opd_agents.cli import app\napp({arguments}, standalone_mode=False)"
    heavy = [name for name in HEAVY if name != "gymnasium" or arguments != ["envs"]]
    assert loaded_after(code, *heavy) == set()


def test_making_an_environment_needs_no_torch() -> None:
    code = "import opd_agents as opd\nopd.make('opd_agents/OrderDesk-v0').reset(seed=0)"
    assert loaded_after(code, "torch", "transformers") == set()
