"""The white-box presets, from their YAML to loss and gradient, against the formulas of their papers, written
out in float64; what each becomes at its ends; and where its gradient vanishes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import papers
import pytest
import torch
from engine import (
    T,
    assert_same,
    chosen,
    component,
    config_of,
    engine,
    experience_of,
    in_float64,
    log_probs,
    moved,
    plain,
    preset,
)
from papers import Formula, Seen, entropy, kl
from rolling import LIMITS, desk_episodes, rolled, sampler
from torch import Tensor

from opd_agents.policies.mixture import TokenMixture
from opd_agents.schedules import Clock, value_at
from opd_agents.types import Actor, Outcome, Trajectory

OUTCOMES = {"s": Outcome.SUCCESS, "f": Outcome.FAILURE, "u": Outcome.UNFINISHED}


@pytest.fixture(scope="module")
def model(student: Any) -> Any:
    return moved(student)


@pytest.fixture(scope="module")
def sharp(teacher: Any) -> Any:
    """A teacher that is sure of some tokens and not of others."""
    model = copy.deepcopy(teacher)
    model.lm_head.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def judge(sharp: Any) -> Any:
    return in_float64(sharp)


@pytest.fixture(scope="module")
def mild(teacher: Any) -> Any:
    return in_float64(teacher)


@pytest.fixture(scope="module")
def sampling(student: Any) -> Any:
    return in_float64(student)


@pytest.fixture(scope="module")
def graded(sampled: Sequence[Trajectory]) -> list[Trajectory]:
    """The beginnings of two groups of the student's episodes, one better than the other."""
    pairs = zip(sampled[:8], "sffussuf", strict=True)
    begun = ((dataclasses.replace(t, turns=t.turns[:2]), o) for t, o in pairs)
    return [dataclasses.replace(t, outcome=OUTCOMES[o], reward=float(o == "s")) for t, o in begun]


@pytest.fixture(scope="module")
def mixed(student: Any, sharp: Any, desk_chat: Any) -> list[Trajectory]:
    """Episodes drawn as minillm's rollout section says."""
    share = config_of("minillm").rollout.teacher_share
    own, theirs = (sampler(one, desk_chat, temperature=T) for one in (student, sharp))
    episodes = desk_episodes(8, max_turns=3)
    return rolled(episodes, TokenMixture(own, theirs, share), desk_chat, temperature=T)


@pytest.fixture(scope="module")
def contrasted(graded: list[Trajectory], sharp: Any, desk_chat: Any) -> list[Trajectory]:
    """The student's episodes, and one of the teacher's for each group."""
    policy = sampler(sharp, desk_chat, temperature=T, actor=Actor.TEACHER)
    theirs = rolled(desk_episodes(2, max_turns=2), policy, desk_chat, temperature=T)
    return [*graded, *(dataclasses.replace(t, uid=f"d{t.uid}", demonstration=True) for t in theirs)]


class Case(NamedTuple):
    """Trajectories, and what is compared on them."""

    loss: Callable[..., tuple[float, Tensor]]
    formula: Callable[[Formula], tuple[float, Tensor]]


@pytest.fixture(scope="module")
def case(model: Any, sampling: Any, judge: Any, desk_chat: Any) -> Callable[..., Case]:
    """A batch, and a student that is not the one that sampled, unless ``model`` says so."""

    known: dict[tuple[int, ...], tuple[Any, ...]] = {}  # most tests are of one batch: scored once

    def scored(trajectories: Sequence[Trajectory], judge: Any) -> tuple[Any, ...]:
        if (key := (id(trajectories), id(judge))) not in known:
            experience = experience_of(sampling, trajectories, {"teacher": judge})
            with torch.no_grad():
                p, old = (log_probs(one, experience.packed) for one in (judge, sampling))
            known[key] = (experience, p, old, trajectories, judge)  # which keeps the ids theirs
        return known[key][:3]

    def make(trajectories: Sequence[Trajectory], *, model: Any = model, judge: Any = judge) -> Case:
        experience, p, old = scored(trajectories, judge)
        packed = experience.packed

        def loss(components: Any, progress: float = 0.0) -> tuple[float, Tensor]:
            return engine(model, experience, components, chat=desk_chat, progress=progress)

        def formula(written: Formula) -> tuple[float, Tensor]:
            return plain(model, written(Seen(log_probs(model, packed), p, old, packed, trajectories)))

        return Case(loss, formula)

    return make


FORMULAS: dict[str, Formula] = {
    "gkd": papers.gkd,
    "distillm": papers.distillm,
    "tip": papers.tip,
    "scope": papers.scope,
    "entropy_aware": papers.entropy_aware,
    "rethinking_opd": papers.rethinking_opd,
    "fast_opd": papers.fast_opd,
    "lightning_opd": papers.fast_opd,
    "paced": papers.paced,
    "temperature_aware": papers.temperature_aware,
    "thinking_machines": papers.thinking_machines,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_presets_are_their_formulas(name: str, case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    assert_same(seen.loss(preset(name)), seen.formula(FORMULAS[name]))


def test_minillm_is_its_formula_on_what_the_mixture_sampled(case: Any, mixed: list[Trajectory]) -> None:
    seen = case(mixed)
    assert_same(seen.loss(preset("minillm")), seen.formula(papers.minillm), rtol=1e-5)  # float32 log-probs


def test_distillm2_is_its_formula_on_both_texts(case: Any, contrasted: list[Trajectory]) -> None:
    seen = case(contrasted)
    assert_same(seen.loss(preset("distillm2")), seen.formula(papers.distillm2))


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_veto_is_its_formula_all_the_way(progress: float, case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    assert_same(seen.loss(preset("veto"), progress), seen.formula(papers.veto(progress)))


def test_revisiting_opd_is_its_formula(case: Any, sampled: list[Trajectory], desk_chat: Any) -> None:
    seen = case(sampled)
    assert_same(seen.loss(preset("revisiting_opd")), seen.formula(papers.revisiting_opd(desk_chat.end_ids)))


def changed(name: str, *overrides: str) -> Any:
    return config_of(name, *overrides).loss.components


DISTILL = "loss.components.distill"
# What a preset becomes at the end of its parameters: (preset, changes, another's formula, up to a factor).
ENDS: list[tuple[str, list[str], Formula, float]] = [
    ("gkd", ["divergence=jsd", "beta=0.3"], papers.jsd(0.3), 1.0),
    ("gkd", ["divergence=jsd", "beta=1e-8"], lambda seen: kl(seen.p, seen.q).mean(), 1e-8),
    ("gkd", ["divergence=jsd", "beta=0.99999999"], papers.gkd, 1e-8),
    ("gkd", ["denominator=episode"], papers.gkd_by_episode, 1.0),
    ("temperature_aware", [f"temperature_teacher={T}"], lambda seen: kl(seen.p, seen.q).mean(), 1.0),
    ("veto", ["geometric=0"], papers.gkd_by_episode, 1.0),
    ("distillm", ["alpha=1e-8"], papers.gkd, 1.0),
    ("paced", ["weights=[{kind: pass_rate, alpha: 0, beta: 0}]"], papers.gkd, 1.0),
    ("tip", ["weights=[{kind: top_tokens, share: 1}]"], papers.gkd, 1.0),
    ("revisiting_opd", ["k=1000", "weights=[]"], papers.gkd, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "parent", "scale"), ENDS)
def test_at_its_end_a_preset_is_its_parent(
    name: str,
    changes: list[str],
    parent: Formula,
    scale: float,
    case: Any,
    graded: list[Trajectory],
    mild: Any,
) -> None:
    seen = case(graded, judge=mild)  # where log p / q is above -log beta, a mixture would cut it
    value, gradient = seen.loss(changed(name, *(f"{DISTILL}.{change}" for change in changes)))
    assert_same((value / scale, gradient / scale), seen.formula(parent), rtol=1e-5)


def test_of_all_tokens_the_candidates_have_the_gradient_of_the_reverse_kl(
    case: Any, graded: list[Trajectory]
) -> None:
    """Its value is a surrogate's."""
    seen = case(graded)
    value, gradient = seen.loss(changed("rethinking_opd", f"{DISTILL}.k=1000"))
    expected = seen.formula(papers.gkd)
    assert_same((expected[0], gradient), expected)
    assert value != pytest.approx(expected[0], rel=0.1)


def test_a_sharpened_teacher_teaches_what_it_was(case: Any, graded: list[Trajectory], teacher: Any) -> None:
    """Its logits are 1.5 times, at the sampler's temperature, those of the student, which then stays."""
    calm, sharpened = in_float64(teacher), in_float64(teacher)
    sharpened.lm_head.weight.data *= 1.5 / T
    seen = case(graded, model=calm, judge=sharpened)
    assert float(seen.loss(preset("temperature_aware"))[1].norm()) < 1e-9
    plain_kl = changed("temperature_aware", f"{DISTILL}.temperature_teacher={T}")
    assert float(seen.loss(plain_kl)[1].norm()) > 1e-2  # without it the student is sharpened, too


def test_an_open_gate_over_all_tokens_adds_the_whole_forward_kl(case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    forward = "loss.components.forward"
    both = changed(
        "entropy_aware", f"{forward}.k=1000", f"{forward}.weights=[{{kind: teacher_entropy, above: 0}}]"
    )
    expected = seen.formula(lambda seen: papers.fast_opd(seen) + kl(seen.p, seen.q).mean())
    assert_same(seen.loss(both), expected)


def test_scope_with_the_other_sign_is_its_release(case: Any, graded: list[Trajectory]) -> None:
    """softmax of the mean log-prob: own successes that the student finds LIKELY weigh more."""
    seen, likely = case(graded), []
    weight = "{kind: perplexity, of: student, prefer: low, temperature: 1}"
    success = {"success": changed("scope", f"loss.components.success.weights=[{weight}]")["success"]}

    def released(seen: Seen) -> Tensor:
        right, logprob = seen.where(Outcome.SUCCESS), chosen(seen.old, seen.packed)
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for group in {seen.trajectories[e].group for e in right}:
            mine = [seen.episodes[e] for e in right if seen.trajectories[e].group == group]
            means = torch.stack([logprob[own].mean() for own in mine])
            for share, own in zip(means.softmax(0) * len(mine), mine, strict=True):
                total = total - share * chosen(seen.q, seen.packed)[own].sum()
                tokens += len(own)
            likely.append(float(means.max() - means.min()))
        return total / tokens

    assert_same(seen.loss(success), seen.formula(released))
    assert max(likely) > 0.1  # the signs differ


def test_scope_weighs_the_likelihood_of_successes_as_its_paper_the_ratio(
    case: Any, graded: list[Trajectory], sampling: Any
) -> None:
    """At the weights that sampled -w log q and -w q / q_old have one gradient."""
    seen = case(graded, model=sampling)
    success = {"success": preset("scope")["success"]}
    as_ratio = component(
        kind="policy", clip_low=None, clip_high=None,
        select={"outcome": "success"}, weights=success["success"].model_dump()["weights"],
        rewards={"one": {"baseline": "none", "normalise": "none"}},
    )  # fmt: skip
    ours, paper = seen.loss(success), seen.loss({"success": as_ratio})
    assert_same((0.0, ours[1]), (0.0, paper[1]), rtol=1e-5)  # recorded log-probs are float32


def test_vetos_gradient_is_that_of_its_stated_advantage(
    case: Any, graded: list[Trajectory], sampling: Any
) -> None:
    """Sum over the vocabulary of q A grad log q, A = log p - (1 - beta) log q."""
    seen = case(graded)

    def stated(seen: Seen) -> Tensor:
        advantage = (seen.p - 0.2 * seen.q).detach()
        each = -(seen.q.exp() * advantage).sum(-1)
        return torch.stack([each[own].mean() for own in seen.episodes]).mean()

    assert_same((0.0, seen.loss(preset("veto"))[1]), (0.0, seen.formula(stated)[1]))


def test_at_the_weights_that_sampled_no_ratio_is_clipped(
    case: Any, graded: list[Trajectory], sampling: Any
) -> None:
    seen = case(graded, model=sampling)
    one = seen.loss(preset("thinking_machines"))
    reverse = {"reverse": preset("entropy_aware")["reverse"]}
    for other in (preset("fast_opd"), preset("lightning_opd"), reverse):
        assert_same(seen.loss(other), one, rtol=1e-5)


MORE = {"scope", "entropy_aware", "temperature_aware"}  # than to be the teacher
EQUAL = sorted({*FORMULAS, "minillm", "distillm2", "revisiting_opd"} - MORE)


@pytest.mark.parametrize("name", EQUAL)
def test_a_student_that_is_its_teacher_has_no_gradient(
    name: str, case: Any, contrasted: list[Trajectory], sampling: Any
) -> None:
    """veto: once its target is the teacher."""
    seen = case(contrasted, model=sampling, judge=sampling)
    away = case(contrasted, model=sampling)
    value, gradient = seen.loss(preset(name))
    assert abs(value) < 1e-6 and float(gradient.norm()) < 2e-5
    assert float(away.loss(preset(name))[1].norm()) > 1e-3


def test_veto_leaves_its_teacher_until_its_end(case: Any, graded: list[Trajectory], sampling: Any) -> None:
    """The target of q = p is p^(1 + beta), sharper than the teacher."""
    seen = case(graded, model=sampling, judge=sampling)
    assert float(seen.loss(preset("veto"), 0.0)[1].norm()) > 0.1
    assert float(seen.loss(preset("veto"), 1.0)[1].norm()) < 1e-6


def test_entropy_aware_leaves_its_teacher_for_what_it_truncates(
    case: Any, graded: list[Trajectory], sampling: Any
) -> None:
    """At q = p only the gated leg is left, which is -log of the mass of the teacher's top 16."""
    seen = case(graded, model=sampling, judge=sampling)

    def mass(seen: Seen) -> Tensor:
        ids = seen.p.topk(16).indices
        return ((entropy(seen.p) > 0.8) * -seen.q.gather(1, ids).logsumexp(-1)).mean()

    assert_same(seen.loss(preset("entropy_aware")), seen.formula(mass), rtol=1e-4)


def test_scopes_failures_have_nothing_to_learn_from_their_equal(
    case: Any, graded: list[Trajectory], sampling: Any
) -> None:
    seen = case(graded, model=sampling, judge=sampling)
    value, gradient = seen.loss({"rest": preset("scope")["rest"]})
    assert abs(value) < 1e-6 and float(gradient.norm()) < 2e-5


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.FAILURE])
def test_paced_takes_nothing_from_groups_that_agree(
    outcome: Outcome, case: Any, graded: list[Trajectory]
) -> None:
    agreed = [dataclasses.replace(t, outcome=outcome) for t in graded[:4]]
    assert float(case(agreed).loss(preset("paced"))[1].norm()) == 0
    some = case([*agreed, *graded[4:]])
    assert_same(some.loss(preset("paced")), some.formula(papers.paced))


def test_fast_opd_stops_sampling_where_a_prefix_would_only_mask(
    student: Any, desk_chat: Any, case: Any
) -> None:
    """On the same draws the loss of episodes that end after k tokens is that of the first k of whole ones."""
    schedule = config_of("fast_opd").rollout.max_action_tokens
    assert schedule is not None
    assert [value_at(schedule, Clock(at, {})) for at in (0.0, 0.5, 1.0)] == [32, 272, 512]
    policy = sampler(student, desk_chat, temperature=T)
    episodes = desk_episodes(4, max_turns=3)
    whole = rolled(episodes, policy, desk_chat, temperature=T)
    limits = dataclasses.replace(LIMITS, max_action_tokens=6)
    cut = rolled(episodes, policy, desk_chat, temperature=T, limits=limits)
    lengths = [t.n_action_tokens for t in cut]
    assert max(lengths) == 6 < max(t.n_action_tokens for t in whole)
    assert all(t.outcome is Outcome.UNFINISHED for t in cut if t.n_action_tokens == 6)
    seen = case(cut)
    assert_same(seen.loss(preset("fast_opd")), seen.formula(papers.fast_opd))
    masked = component(
        kind="policy", references={"teacher": {}}, weights=[{"kind": "prefix", "tokens": 6}],
        denominator="selected",
    )  # fmt: skip
    assert_same(case(whole).loss({"distill": masked}), seen.loss(preset("fast_opd")))


def test_where_the_teacher_gives_the_student_no_mass_the_tail_bucket_teaches(
    case: Any, graded: list[Trajectory]
) -> None:
    """A bucket of the rest makes the partial reverse KL a KL of k + 1 categories."""
    seen = case(graded)
    bucket = changed(
        "revisiting_opd", f"{DISTILL}.tail=bucket", f"{DISTILL}.renormalise=none", f"{DISTILL}.weights=[]"
    )

    def coarse(seen: Seen) -> Tensor:
        ids = seen.p.topk(32).indices
        q, p = (x.exp().gather(1, ids) for x in (seen.q, seen.p))
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).log() for x in (q, p))
        return kl(q, p).mean()

    assert_same(seen.loss(bucket), seen.formula(coarse))
