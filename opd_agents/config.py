"""The typed configuration of a run: YAML in, frozen pydantic models out, unknown keys refused.

Precedence: defaults, method preset, file, stage, command line. Mappings merge, lists replace. Relative
input paths in a file count from that file's folder; those on the command line, and ``output``, from the
working folder.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opd_agents.errors import ConfigError, UnknownName
from opd_agents.types import Actor, Outcome

METHODS = importlib.resources.files("opd_agents.configs.methods")
EXPERIMENTS = importlib.resources.files("opd_agents.configs.experiments")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Section):
    """A coefficient over the run: ``kind`` from ``start`` to ``end`` as the run's progress goes 0 to 1."""

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)


Scheduled: TypeAlias = Annotated[float, Field(ge=0)] | Schedule


class Build(Section):
    """A fresh, randomly initialised model: ``config`` are the fields of a transformers config class."""

    model_type: str = "llama"
    config: dict[str, Any]
    tokenizer: str | None = None  # checkpoint whose tokenizer is shared; else one is made of expert episodes


class Student(Section):
    model: str | None = None
    build: Build | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Teacher(Section):
    kind: Literal["local"] = "local"
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"


class Sampler(Section):
    kind: Literal["transformers"] = "transformers"


class ChatSettings(Section):
    """``history: append`` keeps the sampled ids of all turns as one growing row."""

    history: Literal["append"] = "append"
    template: str | None = None
    kwargs: dict[str, Any] = {}
    system: str | None = None  # replaces the environment's system prompt, also by the empty string


class EnvironmentSource(Section):
    id: str
    split: str = "train"
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, gt=0)  # only the first tasks of the split: a fixed, small data set
    options: dict[str, Any] = {}


class Rollout(Section):
    """Where experience comes from. ``source``: one actor, or a mixture drawn per turn."""

    source: Literal["student", "teacher", "expert"] | dict[Literal["student", "teacher", "expert"], float] = (
        "student"
    )
    episodes_per_step: int = Field(32, gt=0)
    group_size: int = Field(1, gt=0)
    max_turns: int | None = Field(None, gt=0)  # on top of the environment's own limit
    temperature: float = Field(1.0, gt=0)
    max_tokens_per_turn: int = Field(256, gt=0)
    max_context_tokens: int = Field(8192, gt=0)
    step_timeout: float | None = Field(None, gt=0)  # seconds of wall clock for one environment step

    @model_validator(mode="after")
    def _whole_groups(self) -> Rollout:
        if self.episodes_per_step % self.group_size:
            raise ValueError(
                f"episodes_per_step {self.episodes_per_step} is no multiple of group_size {self.group_size}"
            )
        return self


class Select(Section):
    """Which action tokens a component sees; an empty field selects all."""

    actor: Actor | None = None
    source: Literal["rollout", "correction"] | None = None
    outcome: Outcome | None = None


class Component(Section):
    """One term of the loss: ``coef * sum_t w_t l_t / denominator``."""

    kind: Literal["distill", "policy", "ce"]
    coef: Scheduled = 1.0
    select: Select = Select()
    denominator: Literal["token", "turn", "episode", "constant"] = "token"
    constant: float | None = Field(None, gt=0)  # the denominator when `denominator: constant`
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    beta: float = Field(0.5, gt=0, lt=1)  # of jsd
    ratio_clip: float | None = Field(None, gt=1)  # distill: weight by the detached, clipped importance ratio
    normalise: Literal["std", "none"] = "std"  # policy: of the group's rewards
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)

    @model_validator(mode="after")
    def _constant_given(self) -> Component:
        if (self.denominator == "constant") != (self.constant is not None):
            raise ValueError("`constant` is needed with `denominator: constant`, and only there")
        return self


class Loss(Section):
    components: dict[str, Component] = {}

    @model_validator(mode="after")
    def _one_divergence(self) -> Loss:
        distills = [c for c in self.components.values() if c.kind == "distill"]
        if len({(c.divergence, c.beta if c.divergence == "jsd" else None) for c in distills}) > 1:
            raise ValueError("`distill` components must share `divergence` and `beta`: a pass computes one")
        return self


class Correction(Section):
    """Earliest-error correction at the action level (after SCoRe, 2509.14257), verified by re-rollouts."""

    propose_below: float = Field(-2.3, lt=0)  # teacher's log-prob of the action (nats) that marks an error
    episodes_per_step: int = Field(8, gt=0)
    trials: int = Field(4, gt=0)  # fresh student re-rollouts per arm (after the repair; after the own action)
    min_gain: float = Field(0.5, gt=0, le=1)  # success rate gained by the repair for it to be accepted
    token_share: float = Field(0.18, gt=0, lt=1)  # of all generated tokens, spent on repairs and their proof


class TrainerSettings(Section):
    steps: int = Field(100, gt=0)
    flops: float | None = Field(None, gt=0)  # stop after the step that reaches this many FLOPs
    updates_per_step: int = Field(1, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Scheduled = 1e-4
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(16384, gt=0)
    gradient_shares_every: int = Field(10, gt=0)  # steps between measurements of each component's gradient
    checkpoint_every: int = Field(10, gt=0)
    keep_last: int = Field(2, gt=0)
    tensorboard: bool = True
    threads: int | None = Field(None, gt=0)  # of torch on the CPU; a tiny model is fastest with one


class EvaluationSettings(Section):
    suite: str
    split: str = "validation"
    limit: int | None = Field(None, gt=0)
    every: int = Field(25, gt=0)
    at_start: bool = True


class RunConfig(Section):
    """One run. A run with ``stages`` trains them in order, each from the last weights."""

    name: str
    output: str | None = None
    seed: int = Field(0, ge=0)
    imports: list[str] = []
    method: str | None = None
    student: Student
    teacher: Teacher | None = None
    sampler: Sampler = Sampler()
    chat: ChatSettings = ChatSettings()
    environments: list[EnvironmentSource] = Field(min_length=1)
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    correction: Correction | None = None
    trainer: TrainerSettings = TrainerSettings()
    evaluation: EvaluationSettings | None = None
    stages: dict[str, RunConfig] = {}

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.stages:
            if any(stage.stages for stage in self.stages.values()):
                raise ValueError("stages: a stage cannot have stages of its own")
            return self
        if (self.student.model is None) == (self.student.build is None):
            raise ValueError("student: give either `model` (a checkpoint) or `build` (a fresh model)")
        if not self.loss.components:
            raise ValueError("loss.components is empty: give some, or a `method` (`opd-agents methods`)")
        if all(component.coef == 0 for component in self.loss.components.values()):
            raise ValueError("every loss coefficient is zero: nothing would be learned")
        splits = [source.split for source in self.environments]
        if "test" in splits or (self.evaluation and self.evaluation.split == "test"):
            raise ValueError("split: `test` is for `opd-agents evaluate` alone; neither train nor tune on it")
        kinds = {component.kind for component in self.loss.components.values()}
        sources = {self.rollout.source} if isinstance(self.rollout.source, str) else set(self.rollout.source)
        if self.teacher is None and ("distill" in kinds or self.correction or "teacher" in sources):
            raise ValueError("this loss, source or correction needs a `teacher: {model: PATH}`")
        if "policy" in kinds and self.rollout.group_size < 2:
            raise ValueError("a `policy` component compares episodes: rollout.group_size must be >= 2")
        if "policy" in kinds and sources != {"student"}:
            raise ValueError("a `policy` component needs rollout.source: student")
        return self


def load_config(source: str | Path | Mapping[str, Any], *overrides: str) -> RunConfig:
    """Read a config from a YAML file, the name of a shipped experiment, or a mapping.

    ``overrides`` are ``dotted.key=value`` strings, values in YAML. Raises ConfigError naming the key, and
    UnknownName for a method or experiment that does not exist.
    """
    if isinstance(source, Mapping):
        raw, label = dict(source), "config"
    else:
        path = find_experiment(source)
        raw, label = absolute_inputs(read_yaml(path), path.parent), str(path)
    given = absolute_inputs(_parse_overrides(overrides), Path.cwd())
    stages, given_stages = _pop_stages(raw, label), _pop_stages(given, "command line")
    if unknown := given_stages.keys() - stages.keys():
        known = ", ".join(stages) or "no stages"
        raise ConfigError(f"command line: unknown stage `stages.{min(unknown)}`; {label} has {known}.")
    base = _layered(raw, given)
    if not stages:
        return _validate(base, label)
    folder = Path(base.get("output") or f"runs/{base.get('name')}")
    resolved = {}
    for name, stage in stages.items():
        own = {"name": f"{base.get('name')}-{name}", "output": str(folder / name)}
        resolved[name] = _layered(merge(raw, stage), merge(given, given_stages.get(name, {}))) | own
        _validate(resolved[name], f"{label}, stage {name!r}")
    return _validate(base | {"stages": resolved}, label)


def _layered(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Method preset, then file, then command line; any of the last two may name the method."""
    own = merge(file, given)
    return merge(_preset(own), own)


def _pop_stages(raw: dict[str, Any], label: str) -> dict[str, dict[str, Any]]:
    """Take ``stages`` out of ``raw``."""
    stages = raw.pop("stages", None) or {}
    if not isinstance(stages, Mapping) or not all(isinstance(s, Mapping | None) for s in stages.values()):
        raise ConfigError(f"{label}: `stages` must map the name of each stage to its settings.")
    return {str(name): dict(stage or {}) for name, stage in stages.items()}


def find_experiment(source: str | Path) -> Path:
    """The path of a config file, or of a shipped experiment by its name."""
    path = Path(source)
    if path.is_file():
        return path
    files = [Path(str(entry)) for entry in EXPERIMENTS.iterdir()]
    shipped = {file.stem: file for file in files if file.suffix == ".yaml"}
    if str(source) in shipped:
        return shipped[str(source)]
    if path.suffix in (".yaml", ".yml"):
        names = ", ".join(sorted(shipped))
        raise ConfigError(f"No config file {source}. Give the path of a YAML file, or one of: {names}.")
    raise UnknownName("experiment", str(source), shipped, "opd-agents train --help")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(raw).__name__}.")
    return raw


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def absolute_inputs(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Checkpoints and files that exist below ``folder`` made absolute; other strings may be ids or names."""
    return {key: _absolute(key, value, folder) for key, value in raw.items()}


def _absolute(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return absolute_inputs(value, folder)
    if isinstance(value, list):
        return [_absolute(key, item, folder) for item in value]
    is_input = isinstance(value, str) and (
        (key in ("model", "tokenizer") and value) or value.endswith((".jinja", ".py", ".yaml", ".yml"))
    )
    return str((folder / value).resolve()) if is_input and (folder / value).exists() else value


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in overrides:
        dotted, sign, text = item.partition("=")
        if not sign or not dotted:
            raise ConfigError(f"Cannot read {item!r}: write overrides as key=value, such as trainer.steps=5.")
        try:
            value: Any = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            raise ConfigError(f"Cannot read {item!r}: the value of `{dotted}` is no valid YAML.") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        for key in reversed(dotted.split(".")):
            value = {key: value}
        result = merge(result, value)
    return result


def _preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    method = raw.get("method")
    return dict(yaml.safe_load(method_text(str(method))).get("config", {})) if method else {}


def _validate(raw: Mapping[str, Any], label: str) -> RunConfig:
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{label}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Mapping[str, Any]) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _keys_at(item["loc"][:-1]), n=1, cutoff=0.5)
        return f"unknown key `{location}`" + (f", did you mean `{near[0]}`?" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    return f"`{location}`: {message}" if location else message


def _keys_at(location: Sequence[Any]) -> list[str]:
    """The keys that the section at ``location`` has, for the nearest name."""
    section: type[BaseModel] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))
        if field is not None:
            nested = _sections_in(field.annotation)
            section = nested[0] if nested else section
    return list(section.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _sections_in(argument)]


def method_text(name: str) -> str:
    """The YAML of a shipped method preset."""
    known = _method_names()
    if name not in known:
        raise UnknownName("method", name, known, "opd-agents methods")
    return METHODS.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def list_methods() -> list[dict[str, Any]]:
    """The shipped presets: name, title, paper, family, signal, verified."""
    keys, rows = ("title", "paper", "family", "signal", "verified"), []
    for name in _method_names():
        raw = yaml.safe_load(method_text(name))
        rows.append({"name": name} | {key: raw[key] for key in keys})
    return rows


def _method_names() -> list[str]:
    return sorted(Path(entry.name).stem for entry in METHODS.iterdir() if entry.name.endswith(".yaml"))
