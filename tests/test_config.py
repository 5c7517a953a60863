"""The config: precedence, overrides, paths, and messages that name the key."""

import importlib.resources
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from opd_agents.config import EXPERIMENTS, RunConfig, Self, list_methods, load_config, merge, method_text
from opd_agents.errors import ConfigError, UnknownName

DESK = {"id": "opd_agents/OrderDesk-v0"}
CE = {"kind": "ce"}
DISTILL = {"kind": "distill"}
POLICY = {"kind": "policy", "rewards": {"verifier": {}}}
PAIRS = {
    "kind": "preference", "form": "orpo", "chosen": {"outcome": "success"}, "rejected": {"outcome": "failure"}
}  # fmt: skip


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "student": {"model": "m"},
        "environments": [DESK],
        "loss": {"components": {"ce": CE}},
    } | changes


def refused(config: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, *overrides)
    return str(caught.value)


# ---- precedence ----


def test_a_default_yields_to_the_preset_the_file_and_the_command_line() -> None:
    assert load_config(raw()).rollout.group_size == 1
    preset = raw(method="grpo", loss={})
    assert load_config(preset).rollout.group_size == 8
    file = preset | {"rollout": {"group_size": 4}}
    assert load_config(file).rollout.group_size == 4
    assert load_config(file).rollout.episodes_per_step == 64  # the preset's other keys stay
    assert load_config(file, "rollout.group_size=2").rollout.group_size == 2


def staged(**changes: Any) -> dict[str, Any]:
    return (
        raw(
            teacher={"model": "t"},
            trainer={"steps": 7, "warmup_steps": 1},
            stages={
                "cold_start": {"method": "sft", "trainer": {"steps": 3}},
                "opd": {"method": "gkd", "trainer": {"warmup_steps": 2}},
            },
            loss={},
        )
        | changes
    )


def test_a_stage_lies_between_file_and_command_line() -> None:
    config = load_config(staged(), "trainer.warmup_steps=9")
    cold, opd = config.stages["cold_start"].trainer, config.stages["opd"].trainer
    assert (cold.steps, opd.steps) == (3, 7)
    assert (cold.warmup_steps, opd.warmup_steps) == (9, 9)
    assert load_config(staged()).stages["opd"].trainer.warmup_steps == 2


def test_an_override_of_one_stage_is_the_last_word() -> None:
    stages = load_config(staged(), "trainer.steps=5", "stages.opd.trainer.steps=6").stages
    assert (stages["cold_start"].trainer.steps, stages["opd"].trainer.steps) == (5, 6)


def test_each_stage_has_the_components_of_its_own_method() -> None:
    stages = load_config(staged(method="grpo")).stages
    assert list(stages["cold_start"].loss.components) == ["ce"]
    assert list(stages["opd"].loss.components) == ["distill"]
    overridden = load_config(staged(), "stages.opd.method=sft").stages["opd"]
    assert (overridden.method, list(overridden.loss.components)) == ("sft", ["ce"])


def test_the_file_wins_over_a_stages_preset() -> None:
    config = load_config(staged(rollout={"episodes_per_step": 16}), "stages.opd.method=grpo")
    assert config.stages["opd"].rollout.episodes_per_step == 16


def test_stages_have_names_and_folders_of_their_own() -> None:
    config = load_config(staged(), "output=out/y")
    assert [s.folder for s in config.stages.values()] == [Path("out/y/cold_start"), Path("out/y/opd")]
    assert [s.name for s in config.stages.values()] == ["x-cold_start", "x-opd"]
    assert load_config(staged()).stages["opd"].folder == Path("runs/x/opd")


def test_the_command_line_can_name_the_method() -> None:
    config = load_config(raw(loss={}), "method=sft")
    assert (config.method, list(config.loss.components)) == ("sft", ["ce"])


def test_mappings_merge_and_lists_replace() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 1}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    config = load_config(raw(method="gkd", teacher={"model": "t"}))
    assert list(config.loss.components) == ["distill", "ce"]
    assert (
        len(load_config(raw(environments=[DESK, DESK]), f"environments=[{{id: {DESK['id']}}}]").environments)
        == 1
    )


# ---- overrides ----


def test_overrides_are_yaml_and_floats_need_no_point() -> None:
    config = load_config(
        raw(chat={"system": "old"}),
        "trainer.learning_rate=1e-4",
        "chat.system=",
        "trainer.tensorboard=false",
        "chat.kwargs={a: [1, 2]}",
        "trainer.learning_rate={kind: linear, start: 1, end: 0}",
    )
    assert config.chat.system is None
    assert not config.trainer.tensorboard
    assert config.chat.kwargs == {"a": [1, 2]}
    assert config.trainer.learning_rate.model_dump() == {
        "kind": "linear",
        "start": 1.0,
        "end": 0.0,
        "until": 1.0,
    }
    assert load_config(raw(), "trainer.learning_rate=1e-4").trainer.learning_rate == 1e-4


def test_a_float_without_a_point_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(raw()) + "trainer: {learning_rate: 1e-4}\n", encoding="utf-8")
    assert load_config(file).trainer.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["trainer.steps", "=5", "chat.system={"])
def test_an_override_that_cannot_be_read(text: str) -> None:
    assert text in refused(raw(), text)


# ---- what is refused, and how ----


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"traner": {}}, ["`traner`", "`trainer`"]),
        ({"trainer": {"step": 5}}, ["`trainer.step`", "`steps`"]),
        (
            {"loss": {"components": {"a": {"kind": "ce", "coeff": 1}}}},
            ["`loss.components.a.coeff`", "`coef`"],
        ),
        ({"environments": [{"idd": "a"}]}, ["`environments.0.idd`", "`id`"]),
        (
            {"student": {"build": {"config": {}, "tokeniser": "x"}}},
            ["student.build.tokeniser", "`tokenizer`"],
        ),
        ({"trainer": {"steps": "many"}}, ["`trainer.steps`", "integer"]),
        ({"trainer": {"steps": 0}}, ["`trainer.steps`", "greater than 0"]),
        ({"trainer": {"learning_rate": "fast"}}, ["`trainer.learning_rate"]),
        ({"trainer": {"optimizer": "adam"}}, ["`trainer.optimizer`", "adamw", "muon"]),
        ({"trainer": 5}, ["`trainer`"]),
        ({"rollout": {"source": "student", "temperature": 0}}, ["`rollout.temperature`"]),
        ({"rollout": {"source": "nobody"}}, ["`rollout.source"]),
        ({"rollout": {"episodes_per_step": 10, "group_size": 4}}, ["episodes_per_step", "group_size"]),
        ({"environments": []}, ["`environments`"]),
        ({"student": None}, ["`student`"]),
        ({"student": {}}, ["student", "model", "build"]),
        ({"student": {"model": "m", "build": {"config": {}}}}, ["student", "model", "build"]),
        ({"seed": -1}, ["`seed`"]),
        ({"stages": [1]}, ["`stages`"]),
        ({"stages": {"a": 5}}, ["`stages`"]),
        ({"stages": {"a": {"stages": {"b": {}}}}}, ["stages"]),
        ({"stages": {"a": {"trainer": {"step": 5}}}}, ["stage 'a'", "`trainer.step`", "`steps`"]),
    ],
)
def test_a_mistake_is_told_with_its_key(change: dict[str, Any], parts: list[str]) -> None:
    message = refused(raw(**change))
    assert all(part in message for part in parts), message


def test_a_missing_key_is_named() -> None:
    assert "`name`" in refused({key: value for key, value in raw().items() if key != "name"})


def test_a_stage_that_does_not_exist_is_named() -> None:
    message = refused(staged(), "stages.odp.trainer.steps=5")
    assert "stages.odp" in message
    assert "cold_start, opd" in message
    assert "stages.opd" in refused(raw(), "stages.opd.trainer.steps=5")
    assert "`stages`" in refused(staged(), "stages.opd=5")


@pytest.mark.parametrize("change", [{"method": "gkdd"}, {"stages": {"a": {"method": "gkdd"}}}])
def test_an_unknown_method_shows_the_nearest(change: dict[str, Any]) -> None:
    with pytest.raises(UnknownName, match=r"gkdd.*'gkd'.*opd-agents methods"):
        load_config(raw(**change))


JSD = {"kind": "distill", "divergence": "jsd", "beta": 0.5}


def of(**components: Any) -> dict[str, Any]:
    return {"loss": {"components": components}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (of(), ["loss.components", "method"]),
        (of(ce=CE | {"coef": 0}), ["coefficient"]),
        (of(d=DISTILL), ["teacher"]),
        ({"rollout": {"source": {"student": 0.5, "teacher": 0.5}}}, ["teacher"]),
        ({"correction": {}}, ["teacher"]),
        ({"environments": [DESK | {"split": "test"}]}, ["test", "evaluate"]),
        ({"evaluation": {"suite": "orderdesk", "split": "test"}}, ["test", "evaluate"]),
        (of(p=POLICY), ["rollout.group_size"]),
        (of(p=POLICY) | {"rollout": {"source": "expert", "group_size": 2}}, ["source"]),
        (of(a=CE | {"denominator": "constant"}), ["loss.components.a", "constant"]),
        (of(a=CE | {"constant": 5}), ["loss.components.a", "constant"]),
        (of(d=DISTILL | {"signal": "sampled", "ratio_clip": 2.0}), ["loss.components.d", "ratio_clip"]),
        (
            of(p=PAIRS | {"chosen": {"source": "correction"}}),
            ["loss.components.p", "repairs are of no group"],
        ),
        (of(p=PAIRS) | {"rollout": {"source": {"dataset": "x"}}}, ["group_size must be >= 2"]),
    ],
)
def test_an_impossible_combination_is_refused(change: dict[str, Any], parts: list[str]) -> None:
    message = refused(raw(**change))
    assert all(part in message for part in parts), message


# ---- files ----


def test_no_yaml_and_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: [", encoding="utf-8")
    assert "x.yaml" in refused(file)
    file.write_text("- a\n", encoding="utf-8")
    assert "mapping" in refused(file)
    file.write_text("", encoding="utf-8")
    assert "mapping" in refused(file)


def test_unknown_files_and_experiments() -> None:
    assert "no/such.yaml" in refused("no/such.yaml")
    with pytest.raises(UnknownName, match="orderdesk_opd"):
        load_config("orderdesk_opdd")


def test_inputs_count_from_the_files_folder_and_output_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there/teacher").mkdir(parents=True)
    (tmp_path / "there/desk.py").touch()
    (tmp_path / "there/suite.yaml").touch()
    (tmp_path / "there/chat.jinja").touch()
    (tmp_path / "here/student").mkdir(parents=True)
    file = tmp_path / "there/x.yaml"
    config = raw(
        student={"model": "student"},
        teacher={"model": "teacher"},
        imports=["desk.py", "json"],
        evaluation={"suite": "suite.yaml"},
        chat={"template": "chat.jinja"},
        output="out",
        stages={"a": {"student": {"model": "teacher"}}},
    )
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_config("../there/x.yaml", "student.model=student")
    there = tmp_path / "there"
    assert loaded.student.model == str(tmp_path / "here/student")
    assert loaded.teacher is not None
    assert loaded.teacher.model == str(there / "teacher")
    assert loaded.imports == [str(there / "desk.py"), "json"]
    assert loaded.evaluation is not None
    assert loaded.evaluation.suite == str(there / "suite.yaml")
    assert loaded.chat.template == str(there / "chat.jinja")
    assert loaded.folder == Path("out")
    assert loaded.stages["a"].student.model == str(tmp_path / "here/student")
    assert load_config(file).stages["a"].student.model == str(there / "teacher")
    assert load_config(file).student.model == "student"  # not below the file's folder: may be an id


# ---- what is shipped ----


def shipped() -> list[str]:
    return [e.name.removesuffix(".yaml") for e in EXPERIMENTS.iterdir() if e.name.endswith(".yaml")]


MODELS = ("student.model=s", "teacher.model=t")
GIVEN = {
    "hf_local": MODELS,
    "api_teacher": MODELS,
    "qwen3_api": MODELS[1:],
}  # what shipped experiments leave to the user


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ((), "student.model and teacher.model missing"),
        (("teacher.model=t",), "student.model missing"),
        (("student.model=s",), "teacher.model missing"),
    ],
)
def test_an_experiment_without_its_models_says_which(given: tuple[str, ...], missing: str) -> None:
    assert f": {missing}" in refused("hf_local", *given)


def test_a_local_experiment_takes_its_own_base_as_teacher_or_trains_all_weights() -> None:
    own = load_config("hf_local", "student.model=s", "teacher.kind=self")
    assert isinstance(own.teacher, Self) and own.student.lora is not None
    assert load_config("hf_local", *GIVEN["hf_local"], "student.lora=null").student.lora is None


@pytest.mark.parametrize("name", shipped())
def test_shipped_experiments_load_and_can_be_written_and_read(name: str) -> None:
    config = load_config(name, *GIVEN.get(name, ()))
    assert (
        load_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))) == config
    )


def test_a_staged_config_can_be_written_and_read() -> None:
    config = load_config(staged())
    stored = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(stored) == config
    assert list(load_config(stored).stages) == ["cold_start", "opd"]


def test_methods_are_presets_with_papers() -> None:
    rows = list_methods()
    assert {"sft", "gkd", "grpo"} <= {row["name"] for row in rows}
    for row in rows:
        own = "teacher" in yaml.safe_load(method_text(row["name"]))["config"]
        given = {"teacher": tiny.members(row["config"], "t", "u") if own else {"model": "t"}}
        if row["config"].get("judge", {}).get("by") == "judge":
            given["references"] = {
                "judge": {"kind": "api", "model": "j", "endpoint": {"base_url": "http://j"}}
            }
        config = load_config(raw(method=row["name"], loss={}) | given)
        assert config.loss.components
        assert len(method_text(row["name"]).splitlines()) <= 30
        assert re.search(r"\d{4}\.\d{4,5}|none|Thinking Machines", row["paper"])


def test_a_config_is_frozen() -> None:
    config = load_config(raw())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    assert isinstance(config, RunConfig)
    assert importlib.resources.files("opd_agents.configs").joinpath("experiments").is_dir()
