"""Fill in what the documents take from the presets and from the docstrings of the config.

    python docs/build_methods.py

What stands between ``<!-- from ... -->`` and ``<!-- end -->`` in README.md and docs/methods.md is written
here; the rest of the two is written by hand. A test compares them with what this would write.
"""

from __future__ import annotations

import ast
import enum
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from opd_agents import config
from opd_agents.config import (
    base,
    correction,
    endpoint,
    judge,
    list_methods,
    loss,
    sections,
    serving,
    teachers,
    weights,
)

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "methods.md")
BLOCK = re.compile(r"(<!-- from (\w+) ?([\w.]*) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 124
WORDS = {
    "float": "number", "int": "whole number", "str": "text", "bool": "true or false", "Any": "anything",
    "PlugIn": "`module:name`", "KeyVariable": "text", "Component": "[component](#components)",
    "Weight": "[weight](#weights-and-gates)", "Scheduled": "number >= 0 or [schedule](#schedules)",
    "SignedScheduled": "number or [schedule](#schedules)", "Weights": "by name: number >= 0",
    "Member": "one of these", "Asked": "one of kind `local` or `vllm`",
}  # fmt: skip
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def build(text: str) -> str:
    """The document with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        start, writer, argument, end = match.groups()
        return start + WRITERS[writer](argument).strip() + "\n" + end

    return BLOCK.sub(block, text)


# ---- the presets ----


def families() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for family, rows in groupby(list_methods(), key=lambda row: row["family"]):
        yield family, list(rows)


def names(_: str) -> str:
    lines = []
    for family, rows in families():
        links = (f"[`{row['name']}`](docs/methods.md#{row['name']})" for row in rows)
        lines.append(f"- {family}: {', '.join(links)}")
    return "\n".join(lines)


def overview(_: str) -> str:
    lines = ["| method | what it is | signal | cost beside the student's own |", "|---|---|---|---|"]
    for family, rows in families():
        lines.append(f"| **{family}** | | | |")
        for row in rows:
            cells = (f"[`{row['name']}`](#{row['name']})", row["title"], row["signal"], row["cost"])
            lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def methods(_: str) -> str:
    parts = []
    for family, rows in families():
        parts.append(f"### {family[0].upper()}{family[1:]}")
        for row in rows:
            preset = f"[Preset](../configs/methods/{row['name']}.yaml)"
            parts.append(f"#### {row['name']}")
            parts.append(paragraph(f"{row['title']}. Paper: {row['paper']}. {preset}."))
            parts.append(f"```text\n{wrapped(row['formula'])}\n```")
            parts.append(paragraph(f"**Verified:** {row['verified'].replace('Departs:', '**Departs:**')}"))
    return "\n\n".join(parts)


# ---- the config ----


class Key(NamedTuple):
    """One field of a section; ``default`` is None where it has to be given."""

    name: str
    values: str
    default: str | None
    comment: str


def section(name: str) -> str:
    """The docstring of a section of the config, and a table of the keys that it adds."""
    found = section_class(name)
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for key in keys(found):
        default = "" if key.default is None else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {cell(key.values)} | {cell(default)} | {cell(key.comment)} |")
    return f"{document(inspect.cleandoc(found.__doc__ or ''))}\n\n" + (
        "\n".join(lines) if len(lines) > 2 else ""
    )


def kinds(name: str) -> str:
    """A row for each member of a union that is told apart by ``kind``."""
    lines = ["| kind | keys | |", "|---|---|---|"]
    for member in members(name):
        literals = typing.get_args(member.model_fields["kind"].annotation) or (teachers.OWN,)
        kind = ", ".join(f"`{one}`" for one in literals)
        said = " ".join(document(inspect.cleandoc(member.__doc__ or "")).split())
        lines.append(f"| {kind} | {cell('<br>'.join(map(told, keys(member))))} | {cell(said)} |")
    return "\n".join(lines)


def told(key: Key) -> str:
    default = "" if key.default is None else f" = `{key.default}`"
    values = f": {key.values}" if "`" in key.values or "[" in key.values else ""
    return f"`{key.name}`{default}{values}"


def estimators(_: str) -> str:
    """Which pairs of estimator and ratio have the gradient of what."""
    lines = ["| estimator | ratio `live` | ratio `detached` |", "|---|---|---|"]
    for estimator, gives in loss.ESTIMATES.items():
        shown = [
            f"`{gives[ratio]}`" if gives[ratio].isidentifier() else f"refused: {loss.GRADIENTS[gives[ratio]]}"
            for ratio in ("live", "detached")
        ]
        lines.append(f"| `{estimator}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def section_class(name: str) -> type[base.Section]:
    for module in (loss, weights, base, sections, correction, teachers, endpoint, judge, serving):
        if name in vars(module):
            return typing.cast(type[base.Section], vars(module)[name])
    raise KeyError(name)


def members(name: str) -> tuple[type[base.Section], ...]:
    """Of ``Annotated[A | B, ...]``, each perhaps annotated itself."""
    union, *_ = typing.get_args(getattr(config, name))
    found = (getattr(one, "__origin__", one) for one in typing.get_args(union))
    return typing.cast(tuple[type[base.Section], ...], tuple(found))


def keys(found: type[base.Section]) -> Iterator[Key]:
    """The fields that a class itself declares, as its source has them, with the comments beside them."""
    source, module = inspect.getsource(found), sys.modules[found.__module__]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != "kind":
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            comment = " ".join(comments[line] for line in lines if line in comments)
            default, bounds = given(node.value)
            values = " or ".join(alternatives(node.annotation, module)) + bounds
            yield Key(node.target.id, values, default, comment)


def given(value: ast.expr | None) -> tuple[str | None, str]:
    """The default of a field, in YAML, and the bounds that it names."""
    match value:
        case None:
            return None, ""
        case ast.Call(func=ast.Name("Field"), args=args, keywords=keywords):
            limits = [
                f"{BOUNDS[word.arg]} {ast.unparse(word.value)}" for word in keywords if word.arg in BOUNDS
            ]
            bounds = f" {' and '.join(limits)}" if limits else ""
            return (given(args[0])[0] if args else None), bounds
        case ast.Call():  # a section whose keys all have defaults
            return "{}", ""
    return json.dumps(ast.literal_eval(value)).strip('"'), ""


def alternatives(annotation: ast.expr, module: ModuleType) -> list[str]:
    """The values that an annotation allows, in words; ``null`` aside, which the default tells."""
    match annotation:
        case ast.BinOp(left=left, right=right):
            return alternatives(left, module) + alternatives(right, module)
        case ast.Constant(None):
            return []
        case ast.Subscript(ast.Name("Literal"), choice):
            chosen = choice.elts if isinstance(choice, ast.Tuple) else [choice]
            return [f"`{ast.literal_eval(one)}`" for one in chosen]
        case ast.Subscript(ast.Name("list"), item):
            return [f"list of {' / '.join(alternatives(item, module))}"]
        case ast.Subscript(ast.Name("dict"), ast.Tuple([_, item])):
            return [f"by name: {' or '.join(alternatives(item, module))}"]
        case ast.Subscript(ast.Name("Annotated")):  # a text with a pattern
            return [WORDS["PlugIn"]]
        case ast.Name(name):
            return [WORDS[name]] if name in WORDS else named(vars(module)[name])
    raise TypeError(ast.unparse(annotation))


def named(value: Any) -> list[str]:
    """An enum or an alias of literals by its values, a section by a link to its place."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return [f"`{one.value}`" for one in value]
    if isinstance(value, type) and issubclass(value, base.Section):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", value.__name__).lower()
        return [f"[{words.replace('-', ' ')}](#{words})"]
    return [f"`{one}`" for one in typing.get_args(value)]


# ---- docstrings of the objectives, read without importing torch ----


def objective(place: str) -> str:
    """The list in a docstring: ``module.function`` of `opd_agents.objectives`."""
    module, function = place.split(".")
    tree = ast.parse((ROOT / "opd_agents" / "objectives" / f"{module}.py").read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    blocks = (ast.get_docstring(found) or "").split("\n\n")
    return document("\n\n".join(text for text in blocks if text.startswith("- ")))


# ---- text ----


def document(docstring: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r":\w+:`(\w+)`", r"`\1`", docstring.replace("``", "`"))
    parts = []
    for block in text.split("\n\n"):
        items = re.split(r"\n(?=- )", block)
        parts.append("\n".join(paragraph(" ".join(item.split())) for item in items))
    return "\n\n".join(parts)


def paragraph(text: str) -> str:
    return wrapped(linked(text), "  " if text.startswith("- ") else "")


def wrapped(text: str, indent: str = "") -> str:
    """Lines; none begins with an operator, which Markdown would take for the mark of a list."""
    glued = re.sub(r" ([-+*=<>]|\|\|) ", "\0\\1\0", text).replace("[arXiv ", "[arXiv\0")
    lines = textwrap.fill(
        glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\0", " ")


def linked(text: str) -> str:
    return re.sub(r"(?<!\[)arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


WRITERS: Mapping[str, Callable[[str], str]] = {
    writer.__name__: writer for writer in (names, overview, methods, section, kinds, estimators, objective)
}

if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(build(path.read_text(encoding="utf-8")), encoding="utf-8")
