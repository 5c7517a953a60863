"""The model card of a trained model: what its run folder tells of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from opd_agents.config import list_methods
from opd_agents.evaluation.results import versions
from opd_agents.lineage import Measured, Trained, lineage, read_json
from opd_agents.policies.models import CHAT_FILE

TAGS = ("opd-agents", "on-policy-distillation", "agent", "tool-use")
RATES = {  # of an evaluation: what it is called, where its interval stands, and of how many episodes it is
    "success": ("success, sampled", "interval", "episodes"),
    "success_greedy": ("success, greedy", "interval_greedy", "tasks"),
    "recovery": ("success after an error", "interval_recovery", "with_error"),
}
EXPORTS = ("python", "opd-agents", "torch", "transformers")
MEANS = {
    "reward": "reward", "turns": "turns of an episode", "invalid_calls": "invalid calls of an episode",
    "refused_calls": "refused calls of an episode", "tokens_per_episode": "tokens of an episode",
}  # fmt: skip


def model_card(checkpoint: Path, folder: str) -> ModelCard | None:
    """Of the model in ``folder`` that was exported from a run's checkpoint; None for one that is in no run.

    Metadata are what a hub reads: base model and licence only where the config names a model of the hub, or
    the weights that training began with have a card that says so; evaluations of exactly these weights.
    """
    runs = lineage(checkpoint)
    if not runs:
        return None
    last, first = runs[-1], runs[0].config["student"]
    base, start, measured = _base(first), _start(first), list(last.measured())
    known = _card_of(first["model"]) if first["model"] else {}
    licence = {key: known[key] for key in ("license", "license_name", "license_link") if known.get(key)}
    name, text = last.config["name"], yaml.safe_dump(dict(last.config), sort_keys=False, allow_unicode=True)
    results = [result for one in measured for result in _results(one)]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=[*TAGS], base_model=base,
        model_name=name, eval_results=results or None, **licence,
    )  # fmt: skip
    settings = read_json(checkpoint / CHAT_FILE)
    card: ModelCard = ModelCard.from_template(
        data, template_str=files("opd_agents").joinpath("model_card.jinja").read_text(encoding="utf-8"),
        name=name, start=start, base_model=base, license=known.get("license"), folder=folder,
        runs=[_run(run) for run in runs], evaluations=[(one, [*_figures(one)]) for one in measured],
        **_asked(settings), syntax=settings.get("syntax"), versions=_listed(last.summary.get("versions", {})),
        exported=_listed({name: one for name, one in versions().items() if name in EXPORTS}),
        config=text, fence=_fence(text),
    )  # fmt: skip
    return card


def _run(run: Trained) -> dict[str, Any]:
    config = run.config
    method = next((row for row in list_methods() if row["name"] == config["method"]), None)
    paper = method and re.sub(
        r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", method["paper"]
    )
    return {
        "name": config["name"], "steps": run.step, "seed": config["seed"], "totals": run.totals,
        "method": method and method | {"paper": paper}, "told": [*_told(config)],
    }  # fmt: skip


def _told(config: Mapping[str, Any]) -> Iterator[str]:
    """What it learned from, a line each."""
    for one in config["environments"]:
        options = f", {json.dumps(one['options'])}" if one["options"] else ""
        limit = f", its first {one['limit']} tasks" if one["limit"] else ""
        yield f"Environment: `{one['id']}`, split `{one['split']}`{limit}{options}"
    match config["rollout"]["source"]:
        case {"dataset": path, "split": split}:
            yield f"Conversations: `{Path(path).name}`, split `{split}`"
        case {"trajectories": path}:
            yield f"Episodes of before: `{Path(path).name}`"
        case str() | dict() as source:
            yield f"Acts: {source if isinstance(source, str) else ', '.join(source)}"
    sections = {
        "Teacher": config["teacher"],
        **{f"Reference `{k}`": v for k, v in config["references"].items()},
    }
    for role, section in sections.items():
        if section is not None:
            models = ", ".join(f"`{_short(model)}`" for model in _models(section))
            yield f"{role}: {section['kind']}" + (f", {models}" if models else "")
    if lora := config["student"]["lora"]:
        yield f"Trained as an adapter (LoRA, rank {lora['rank']}), which is merged here"


def _models(section: Any) -> Iterator[str]:
    """The checkpoints and API models that a teacher's section names, at any depth."""
    if isinstance(section, Mapping):
        if isinstance(section.get("model"), str):
            yield section["model"]
        for value in section.values():
            yield from _models(value)
    elif isinstance(section, list):
        for value in section:
            yield from _models(value)


def _base(student: Mapping[str, Any]) -> str | None:
    """The model of the hub that training began with."""
    model = student["model"]
    return model if model and not Path(model).exists() and not Path(model).is_absolute() else None


def _start(student: Mapping[str, Any]) -> str | None:
    """The same for a person, a local folder by its name."""
    if student["build"]:
        return f"random weights ({student['build']['model_type']})"
    return student["model"] and f"`{_short(student['model'])}`"


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def _card_of(model: str) -> dict[str, Any]:
    """Metadata of the card of a checkpoint that is here, or in the hub's cache; no hub is asked."""
    path: Any = Path(model) / "README.md"
    path = path if path.is_file() else None if Path(model).exists() else _cached(model)
    return {} if path is None else ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()


def _cached(model: str) -> Path | None:
    if model.count("/") > 1 or Path(model).is_absolute():
        return None
    found = try_to_load_from_cache(model, "README.md")
    return Path(found) if isinstance(found, str) else None


def _results(measured: Measured) -> Iterator[EvalResult]:
    """As a hub's metadata have them."""
    for key, (name, interval, of_how_many) in RATES.items():
        if (value := measured.figures.get(key)) is not None:
            of = {"episodes": measured.figures[of_how_many], "interval_95": measured.figures.get(interval)}
            yield EvalResult(
                task_type="text-generation", dataset_type=measured.suite, dataset_name=measured.suite,
                dataset_split=measured.split, metric_type=key, metric_name=name, metric_value=value,
                metric_args=of,
            )  # fmt: skip


def _figures(measured: Measured) -> Iterator[dict[str, str]]:
    for figures, when in ((measured.figures, ""), (measured.before, ", before training")):
        for key, (name, interval, _) in RATES.items():
            if figures.get(key) is not None:
                between = " to ".join(f"{100 * end:.1f}" for end in figures.get(interval) or ())
                yield {"name": name + when, "value": f"{100 * figures[key]:.1f} %", "interval": between}
    for key, name in MEANS.items():
        if measured.figures.get(key) is not None:
            yield {"name": name, "value": f"{measured.figures[key]:.2f}", "interval": ""}


def _asked(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the chat's settings add to the lines that show how to ask."""
    system, kwargs = settings.get("system"), settings.get("kwargs") or {}
    message = json.dumps({"role": "system", "content": system}, ensure_ascii=False) + ", " if system else ""
    return {"system": message, "template_kwargs": "".join(f", {key}={kwargs[key]!r}" for key in kwargs)}


def _listed(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _fence(text: str) -> str:
    """Longer than any of the text's own."""
    return "`" * max(3, *(len(found) + 1 for found in re.findall("`+", text)), 3)
