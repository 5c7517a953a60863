"""Losses that cannot work are refused when the config loads or at the first batch: with what is wrong, where,
and what to do, and on the command line with exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import yaml
from test_cli import refused
from torch import Tensor
from typer.testing import CliRunner

from opd_agents.batch import Packed
from opd_agents.cli import app
from opd_agents.config import list_methods, load_config, method_text
from opd_agents.errors import ConfigError
from opd_agents.teachers import Capability, SampledLogprobs, TeacherTopK
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teaching import check_references
from opd_agents.trainer import train

HERE = "test_bad_losses"
ALL = [row["name"] for row in list_methods()]
SELF_TAUGHT = {name for name in ALL if "teacher" in yaml.safe_load(method_text(name))["config"]}
# What an API gives is enough for these: they ask no more of the teacher than sampled tokens, or nothing.
BY_SAMPLED = {
    *("fast_opd", "g_opd", "grpo", "hdpo_gate", "kdrl", "kdrl_annealed", "kdrl_mask", "lightning_opd"),
    *("luffy", "ema_anchor", "opd_then_rl", "rlad", "scope", "sft", "srpo", "thinking_machines"),
    *("guided_opd", "orpo_distill", "gad", "dagger", "sod", "atod", "tcod", "tcod_backward"),
    *("score_verified", "student_retry", "teacher_continues"),
}
JUDGED = {"ovd", "sage_opd", "score"}  # they ask for words, too
BY_TOP_K = {*BY_SAMPLED, "revisiting_opd"}


class Sampled(LocalTeacher):
    """Tells of each action token how probable it is, as any serving API does."""

    can: ClassVar = frozenset({Capability.SAMPLED_LOGPROBS, Capability.ACT})

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> Any:
        return SampledLogprobs(self._chosen(self._log_p(packed, max_tokens, keep), packed))

    def _log_p(self, packed: Packed, max_tokens: int, keep: Tensor | None) -> Tensor:
        states = super().score(packed, max_tokens, keep)
        with torch.no_grad():
            return states.head(states.hidden).log_softmax(-1)

    def _chosen(self, log_p: Tensor, packed: Packed) -> Tensor:
        return log_p.gather(1, packed.target[:, None])[:, 0]


class TopFour(Sampled):
    can: ClassVar = frozenset({Capability.TEACHER_TOP_K, Capability.ACT})

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> Any:
        log_p = self._log_p(packed, max_tokens, keep)
        top = log_p.topk(4)
        return TeacherTopK(top.indices, top.values, self._chosen(log_p, packed))


class Half(Sampled):
    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> Any:
        return SampledLogprobs(super().score(packed, max_tokens, keep).logprobs.bfloat16())


def described(output: Path, teacher: Path, /, **changes: Any) -> dict[str, Any]:
    """Of a tiny run, to be written to a file."""
    return {
        "name": "tiny", "output": str(output), "imports": ["tiny"], "chat": tiny.BRIEF,
        "student": {"build": tiny.BUILD | {"tokenizer": str(teacher)}}, "teacher": {"model": str(teacher)},
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS},
        "trainer": {"steps": 2, "tensorboard": False},
    } | changes  # fmt: skip


def of(**components: Any) -> dict[str, Any]:
    return {"loss": {"components": components}}


def by(kind: str, teacher: Path) -> dict[str, Any]:
    return {"teacher": {"kind": f"{HERE}:{kind}", "model": str(teacher)}}


# ---- what a teacher can tell ----


@pytest.mark.parametrize("method", [name for name in ALL if name not in SELF_TAUGHT | JUDGED])
@pytest.mark.parametrize(("kind", "served"), [("Sampled", BY_SAMPLED), ("TopFour", BY_TOP_K)])
def test_a_method_takes_a_teacher_that_tells_enough_and_no_other(
    method: str, kind: str, served: set[str], tmp_path: Path, tiny_teacher: Path
) -> None:
    raw = described(tmp_path / "run", tiny_teacher, method=method, **by(kind, tiny_teacher))
    raw["rollout"] = {}
    config = load_config(raw)
    if method in served:
        check_references(config)
        return
    given = {"Sampled": "sampled_logprobs", "TopFour": "teacher_top_k"}[kind]
    with pytest.raises(ConfigError) as caught:
        check_references(config)
    message = str(caught.value)
    assert f"needs of teacher (kind {HERE}:{kind})" in message and f"it has `{given}` and" in message
    assert "Take `kind: local`" in message


@pytest.mark.parametrize("kind", ["Sampled", "TopFour"])
def test_what_a_teacher_of_log_probs_tells_is_learned_from(
    kind: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    """The policy gradient from an API's log-probs is that from the whole model."""
    rows = []
    for name, teacher in {kind: by(kind, tiny_teacher), "local": {}}.items():
        raw = described(tmp_path / name, tiny_teacher, method="thinking_machines", **teacher)
        rows.append(tiny.metrics(train(load_config(raw))))
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert rows[0][0]["loss"] > 0.1


# ---- refused before a folder is made ----

DISTILL, CE = {"kind": "distill"}, {"kind": "ce"}
OPD = {"kind": "policy", "references": {"teacher": {}}}
VERIFIER = {"kind": "policy", "rewards": {"verifier": {}}}
NOTHING = {"kind": "linear", "start": 0, "end": 0}
ADAPTIVE = {"kind": "adaptive", "metric": "loss", "target": 1, "start": 1, "rate": 0.1, "low": 0.1, "high": 2}


def weighed(*weights: Any, **changes: Any) -> dict[str, Any]:
    return of(d=DISTILL | {"weights": list(weights)}) | changes


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        # coefficients
        (of(d=DISTILL | {"coef": 0}), ["every loss coefficient is zero", "another `coef`"]),
        (of(d=DISTILL | {"coef": NOTHING}, c=CE | {"coef": 0}), ["every loss coefficient is zero"]),
        (
            of(d=DISTILL | {"coef": {"kind": "switch", "start": 0, "end": 0, "at": 0.5}}),
            ["every loss coefficient is zero"],
        ),
        (of(p=OPD | {"references": {"teacher": {"coef": 0}}}), ["every loss coefficient is zero"]),
        (
            of(
                p=VERIFIER
                | {"references": {"teacher": {"coef": NOTHING}}, "rewards": {"verifier": {"coef": 0}}}
            ),
            ["every loss coefficient is zero", "`references` or `rewards`"],
        ),
        (of(d=DISTILL | {"coef": -1}), ["`loss.components.d.coef`: Input should be greater than or equal"]),
        # parameters of a divergence
        *[
            (
                of(d=DISTILL | {"divergence": "jsd", "beta": beta}),
                [f"`loss.components.d`: `beta` is {beta:g}", "forward_kl` at 0 and `reverse_kl` at 1"],
            )
            for beta in (0, 1, 1.5, -0.1)
        ],
        (of(d=DISTILL | {"divergence": "jsd"}), ["`loss.components.d`: `beta` is missing"]),
        (of(d=DISTILL | {"beta": 0.5}), ["`beta` has no use", "of divergence jsd"]),
        (of(d=DISTILL | {"divergence": "skew_kl", "alpha": 1.0}), ["`loss.components.d.alpha`"]),
        (of(d=DISTILL | {"signal": "teacher_top_k", "k": 4}), ["`tail` is missing"]),
        (
            of(d=DISTILL | {"signal": "sampled", "estimator": "k1", "ratio": "detached"}),
            ["an expected gradient of zero", "take k1 or k3 live or k2 detached"],
        ),
        (of(d=DISTILL, p=OPD), ["`loss`: the reference `teacher`", "count twice", "`both_kl_legs: true`"]),
        # references
        (of(d=DISTILL | {"reference": "base"}), ["with `base`", "`references` has no such: teacher"]),
        (
            of(p=VERIFIER | {"ratio": "trrd", "trrd_alpha": 0.5, "trrd_reference": "old"}),
            ["compares with `old`", "no such"],
        ),
        (weighed({"kind": "accepted", "reference": "bse"}), ["compares with `bse`", "no such"]),
        (of(d=DISTILL) | {"references": {"base": {"kind": "self"}}}, ["references.base: nothing"]),
        (of(d=DISTILL) | {"references": {"teacher": {"kind": "self"}}}, ["references.teacher", "taken"]),
        (of(d=DISTILL) | {"teacher": None}, ["needs a `teacher: {model: PATH}`"]),
        # whom a component looks for
        (
            of(d=DISTILL, c=CE | {"select": {"actor": "expert"}}),
            ["loss.components.c: actor `expert` would select nothing: this run has student"],
        ),
        (
            of(d=DISTILL, c=CE | {"select": {"source": "correction"}}),
            ["loss.components.c: source `correction` would select nothing: this run has rollout"],
        ),
        (
            of(d=DISTILL | {"signal": "sampled"}) | {"rollout": {"source": {"student": 0.5, "expert": 0.5}}},
            ["components.d: `sampled` estimates", "of the expert were not", "`select: {actor: student}`"],
        ),
        # weights and their inputs
        (
            weighed({"kind": "pass_rate"}, rollout={"group_size": 1}),
            ["a weight by the group's episodes needs rollout.group_size >= 2"],
        ),
        (
            weighed({"kind": "likelihood_shift"}),
            ["`loss.components.d`: `weights`: likelihood_shift", "a gate of `rewards`"],
        ),
        (weighed({"kind": "top_token"}), ["`loss.components.d.weights.0`: unknown kind", "top_tokens"]),
        (weighed({"kind": "prefix"}), ["weights.0`: give either `tokens` or `turns`"]),
        (
            weighed({"kind": "outcome", "success": 0, "otherwise": 0}),
            ["weights.0`: `success` and `otherwise` are both 0"],
        ),
        # schedules
        (
            of(d=DISTILL | {"coef": ADAPTIVE | {"rate": 0}}),
            ["`loss.components.d.coef`: needs a rate other than 0"],
        ),
        (of(d=DISTILL | {"coef": ADAPTIVE | {"start": 5}}), ["low <= start <= high"]),
        (of(d=DISTILL | {"coef": ADAPTIVE | {"metric": None}}), ["`loss.components.d.coef.metric`"]),
        (
            of(d=DISTILL | {"coef": {"kind": "linear", "start": 1, "ent": 2}}),
            ["`loss.components.d.coef.ent`, did you mean `end`?"],
        ),
        (of(d=DISTILL | {"coef": {"start": 1, "end": 2}}), ["`loss.components.d.coef`: `kind` is missing"]),
        (
            of(d=DISTILL | {"coef": {"kind": "lineer", "start": 1, "end": 2}}),
            ["`loss.components.d.coef`: unknown kind 'lineer'; known are linear, cosine, switch, adaptive"],
        ),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_work_is_refused_when_the_config_loads(
    change: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(described(Path("run"), Path("teacher")) | change)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            of(d=DISTILL | {"coef": {"kind": "linear", "start": 1, "ent": 2}}),
            "`loss.components.d.coef.end`: Field required; unknown key `loss.components.d.coef.ent`, did you"
            " mean `end`?",
        ),
        (
            of(d=DISTILL | {"coef": -1}),
            "`loss.components.d.coef`: Input should be greater than or equal to 0",
        ),
        (
            of(p=OPD | {"references": {"teacher": {"coef": {"kind": "cosine", "start": 1}}}}),
            "`loss.components.p.references.teacher.coef.end`: Field required",
        ),
        (
            of(distill=OPD | {"clip_lo": 1}),
            "unknown key `loss.components.distill.clip_lo`, did you mean `clip_low`?",
        ),
        (
            of(ce={"kind": "cee"}),
            "`loss.components.ce`: unknown kind 'cee'; known are distill, policy, ce, entropy, preference",
        ),
        (
            {"rollout": {"source": "studnt"}},
            "`rollout.source`: Input should be 'student', 'teacher' or 'expert'",
        ),
        (
            {"rollout": {"source": {"dataset": "x", "studnt": 0.5}}},
            "unknown key `rollout.source.studnt`, did you mean `student`?",
        ),
        (
            {"rollout": {"source": {"studnt": 1}}},
            "`rollout.source.studnt`: Input should be 'student', 'teacher' or 'expert'",
        ),
    ],
)  # fmt: skip
def test_only_what_was_meant_is_explained(change: dict[str, Any], message: str) -> None:
    """Not the other types that would do in this place, and under the keys as they stand in the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(described(Path("run"), Path("teacher")) | of(d=DISTILL) | change)
    assert str(caught.value) == f"config: {message}"


# ---- on the command line ----


def mistaken(tmp_path: Path, raw: dict[str, Any]) -> str:
    """What `opd-agents train` says of it, in one line."""
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return refused("train", str(file))


def test_a_signal_that_the_teacher_cannot_give(tmp_path: Path, tiny_teacher: Path) -> None:
    raw = described(tmp_path / "run", tiny_teacher, method="gkd", **by("Sampled", tiny_teacher))
    message = mistaken(tmp_path, raw)
    assert f"The loss needs of teacher (kind {HERE}:Sampled) its full distributions" in message
    assert "the capability `hidden_states`, but it has `sampled_logprobs` and `act`. Take" in message
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary(tmp_path: Path, tiny_teacher: Path) -> None:
    raw = described(tmp_path / "run", tiny_teacher, method="gkd", student={"build": tiny.BUILD})
    raw["environments"] = [tiny.DESK]  # whose words a fresh tokenizer is made of
    message = mistaken(tmp_path, raw)
    assert f"The teacher {tiny_teacher}" in message and "another vocabulary than the student" in message
    assert "`student.build.tokenizer`" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            of(c=CE | {"select": {"spans": ["call"]}}),
            ["The first step has", "no loss component selects any", "check the `select.spans` of c"],
        ),
        (
            of(d=DISTILL | {"coef": ADAPTIVE | {"metric": "distil/kl"}}),
            ["adaptive follows the metric 'distil/kl'", "first step does not have", "distill/kl"],
        ),
        (
            weighed({"kind": "without_tokens", "tokens": ["yes sir"]}),
            ["loss.components.d: a weight `without_tokens`: 'yes sir' is no single token", "'yes'"],
        ),
    ],
)
def test_a_loss_that_finds_nothing_to_do(
    change: dict[str, Any], parts: list[str], tmp_path: Path, tiny_teacher: Path
) -> None:
    message = mistaken(tmp_path, described(tmp_path / "run", tiny_teacher) | change)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("kind", "component", "parts"),
    [
        ("Half", OPD, ["teacher gave torch.bfloat16 log-probs", "log-softmax in float32"]),
        (
            "TopFour",
            DISTILL | {"signal": "teacher_top_k", "k": 5, "tail": "bucket"},
            ["d: k is 5, but 'teacher' gives only its top 4"],
        ),
        (
            "TopFour",
            DISTILL | {"signal": "teacher_top_k", "k": 4, "tail": "bucket", "temperature_teacher": 2.0},
            ["at temperature 1", "Leave temperature_teacher out"],
        ),
        (
            "TopFour",
            OPD | {"weights": [{"kind": "teacher_entropy"}]},
            ["its full distributions", "it has `teacher_top_k` and `act`. Take `kind: local`"],
        ),
        (
            "Sampled",
            OPD | {"references": {"teacher": {"baseline": "closed_form"}}},
            ["its full distributions", "it has `sampled_logprobs` and `act`"],
        ),
    ],
)
def test_a_teacher_that_tells_less_than_the_loss_asks(
    kind: str, component: dict[str, Any], parts: list[str], tmp_path: Path, tiny_teacher: Path
) -> None:
    raw = described(tmp_path / "run", tiny_teacher, **of(d=component), **by(kind, tiny_teacher))
    message = mistaken(tmp_path, raw)
    assert all(part in message for part in parts), message


def test_a_refused_run_can_be_put_right_and_started(tmp_path: Path, tiny_teacher: Path) -> None:
    """Also where the mistake showed only at the first batch, and the folder was there."""
    wrong = described(tmp_path / "run", tiny_teacher) | of(c=CE | {"select": {"actor": "expert"}})
    mistaken(tmp_path, wrong)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(wrong | of(c=CE)), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "x.yaml")])
    assert done.exit_code == 0, done.output
    assert len(tiny.metrics(tmp_path / "run")) == 2
