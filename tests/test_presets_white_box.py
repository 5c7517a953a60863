"""The white-box presets, from their YAML to loss and gradient, against the formulas of their papers, written
out in float64; what each becomes at its ends; and where its gradient vanishes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from rolling import LIMITS, desk_episodes, rolled, sampler
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.policies.mixture import TokenMixture
from opd_agents.schedules import Clock, value_at
from opd_agents.types import Actor, Outcome, Trajectory

OUTCOMES = {"s": Outcome.SUCCESS, "f": Outcome.FAILURE, "u": Outcome.UNFINISHED}


class Seen(NamedTuple):
    """A batch as a paper sees it: log-probs [N, V] of the student (differentiable), of the teacher and of the
    student that sampled, and for each of the E episodes its tokens, in order of time."""

    q: Tensor
    p: Tensor
    old: Tensor
    packed: Packed
    trajectories: Sequence[Trajectory]

    @property
    def episodes(self) -> list[Tensor]:
        return [(self.packed.episode == e).nonzero()[:, 0] for e in range(len(self.trajectories))]

    @property
    def d(self) -> Tensor:
        """log p - log q of the sampled tokens, at the student that sampled."""
        return chosen(self.p, self.packed) - chosen(self.old, self.packed)

    @property
    def ratio(self) -> Tensor:
        return (chosen(self.q, self.packed) - self.packed.behaviour.double()).exp()

    def where(self, *outcomes: Outcome) -> list[int]:
        return [e for e, t in enumerate(self.trajectories) if t.outcome in outcomes]


Formula = Callable[[Seen], Tensor]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def entropy(log_a: Tensor) -> Tensor:
    return -(log_a.exp() * log_a).sum(-1)


def renormalised(log_a: Tensor, ids: Tensor) -> Tensor:
    head = log_a.gather(1, ids)
    return head - head.logsumexp(-1, keepdim=True)


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def gkd(seen: Seen) -> Tensor:
    return kl(seen.q, seen.p).mean()


def jsd(beta: float) -> Formula:
    def formula(seen: Seen) -> Tensor:
        m = (beta * seen.p.exp() + (1 - beta) * seen.q.exp()).log()
        return (beta * kl(seen.p, m) + (1 - beta) * kl(seen.q, m)).mean()

    return formula


def gkd_by_episode(seen: Seen) -> Tensor:
    return torch.stack([kl(seen.q, seen.p)[own].mean() for own in seen.episodes]).mean()


def distillm(seen: Seen) -> Tensor:
    return kl(seen.q, (0.1 * seen.q.exp() + 0.9 * seen.p.exp()).log()).mean()


def distillm2(seen: Seen) -> Tensor:
    """SKL(p || q) on the teacher's text and SRKL(q || p) on the student's, means of episodes' means."""
    skl = kl(seen.p, (0.1 * seen.p.exp() + 0.9 * seen.q.exp()).log())
    srkl = kl(seen.q, (0.1 * seen.q.exp() + 0.9 * seen.p.exp()).log())
    by_teacher = [t.turns[0].actor is Actor.TEACHER for t in seen.trajectories]
    assert 0 < sum(by_teacher) < len(by_teacher)
    paths: dict[bool, list[Tensor]] = {True: [], False: []}
    for own, theirs in zip(seen.episodes, by_teacher, strict=True):
        paths[theirs].append((skl if theirs else srkl)[own].mean())
    return torch.stack(paths[True]).mean() + torch.stack(paths[False]).mean()


def tip(seen: Seen) -> Tensor:
    """Soft-OR of scaled entropy and scaled reverse KL, the best half of every rollout."""
    h, d = entropy(seen.old), kl(seen.old, seen.p)
    h = h.clamp(max=float(torch.quantile(h, 0.98)))
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (h, d))
    score = h + d - h * d
    kept = torch.cat([own[score[own].topk(max(1, len(own) // 2)).indices] for own in seen.episodes])
    return kl(seen.q, seen.p)[kept].mean()


def scope(seen: Seen) -> Tensor:
    """Per group: own successes by PPL_S^(1/tau), the others' reverse KL by PPL_T^(-1/tau), tau = 1."""

    def path(episodes: list[int], exponent: Tensor, loss: Tensor) -> Tensor:
        sums, tokens = [], 0
        for group in sorted({seen.trajectories[e].group for e in episodes}):
            mine = [e for e in episodes if seen.trajectories[e].group == group]
            shares = torch.stack([exponent[seen.episodes[e]].mean() for e in mine]).softmax(0) * len(mine)
            sums += [share * loss[seen.episodes[e]].sum() for share, e in zip(shares, mine, strict=True)]
            tokens += sum(len(seen.episodes[e]) for e in mine)
        return torch.stack(sums).sum() / tokens

    right, wrong = seen.where(Outcome.SUCCESS), seen.where(Outcome.FAILURE, Outcome.UNFINISHED)
    likelihood = path(right, -chosen(seen.old, seen.packed), -chosen(seen.q, seen.packed))
    return likelihood + path(wrong, chosen(seen.p, seen.packed), -seen.ratio * seen.d)


def veto(progress: float) -> Formula:
    def formula(seen: Seen) -> Tensor:
        beta = 0.8 * (1 - progress)
        target = (seen.p + beta * seen.q.detach()).log_softmax(-1)
        return torch.stack([kl(seen.q, target)[own].mean() for own in seen.episodes]).mean()

    return formula


def entropy_aware(seen: Seen) -> Tensor:
    unsure = entropy(seen.p) > 0.8
    assert 0.1 < float(unsure.double().mean()) < 0.9, unsure.double().mean()
    ids = seen.p.topk(16).indices
    head = renormalised(seen.p, ids)
    forward = (head.exp() * (head - seen.q.gather(1, ids))).sum(-1)
    return (clipped(seen.ratio, seen.d) + unsure * forward).mean()


def revisiting_opd(end_ids: frozenset[int]) -> Formula:
    def formula(seen: Seen) -> Tensor:
        ids = seen.p.topk(32).indices
        taught = torch.tensor([id_ not in end_ids for id_ in seen.packed.target.tolist()])
        assert 0 < int(taught.sum()) < len(taught)
        return kl(renormalised(seen.q, ids), renormalised(seen.p, ids))[taught].mean()

    return formula


def rethinking_opd(seen: Seen) -> Tensor:
    ids = seen.q.topk(16).indices
    weight = renormalised(seen.q, ids).exp()
    advantage = (seen.p - seen.q).gather(1, ids)
    return -((weight * advantage).detach() * seen.q.gather(1, ids)).sum(-1).mean()


def fast_opd(seen: Seen) -> Tensor:
    return clipped(seen.ratio, seen.d).mean()


def paced(seen: Seen) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for own, trajectory in zip(seen.episodes, seen.trajectories, strict=True):
        group = [t for t in seen.trajectories if t.group == trajectory.group]
        p = sum(t.outcome is Outcome.SUCCESS for t in group) / len(group)
        total = total + p * (1 - p) * kl(seen.q, seen.p)[own].sum()
    return total / len(seen.q)


def thinking_machines(seen: Seen) -> Tensor:
    return -(seen.ratio * seen.d).mean()


def minillm(seen: Seen) -> Tensor:
    """The long-term part R_(t+1), over the tokens that are left and whitened, beside the exact single step;
    the ratio is to the mixture that sampled."""
    advantage = torch.zeros(len(seen.q), dtype=torch.float64)
    for own in seen.episodes:
        d = seen.d[own].tolist()
        for t, token in enumerate(own.tolist()):
            later = [0.95 ** (k - t) * d[k] for k in range(t + 1, len(d))]
            advantage[token] = sum(later) / max(len(later), 1)
    advantage = (advantage - advantage.mean()) / advantage.std()
    return (clipped(seen.ratio, advantage) + kl(seen.q, seen.p)).mean()


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
    """The student's episodes, some groups better than others."""
    pairs = zip(sampled, "sffussufsssf", strict=True)
    return [dataclasses.replace(t, outcome=OUTCOMES[o], reward=float(o == "s")) for t, o in pairs]


@pytest.fixture(scope="module")
def mixed(student: Any, sharp: Any, desk_chat: Any) -> list[Trajectory]:
    """Episodes drawn as minillm's rollout section says."""
    share = config_of("minillm").rollout.teacher_share
    own, theirs = (sampler(one, desk_chat, temperature=T) for one in (student, sharp))
    episodes = desk_episodes(10, max_turns=4)
    return rolled(episodes, TokenMixture(own, theirs, share), desk_chat, temperature=T)


@pytest.fixture(scope="module")
def contrasted(graded: list[Trajectory], sharp: Any, desk_chat: Any) -> list[Trajectory]:
    """The student's episodes, and one of the teacher's for each group."""
    policy = sampler(sharp, desk_chat, temperature=T, actor=Actor.TEACHER)
    theirs = rolled(desk_episodes(3, max_turns=3), policy, desk_chat, temperature=T)
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
    "gkd": gkd,
    "distillm": distillm,
    "tip": tip,
    "scope": scope,
    "entropy_aware": entropy_aware,
    "rethinking_opd": rethinking_opd,
    "fast_opd": fast_opd,
    "paced": paced,
    "thinking_machines": thinking_machines,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_presets_are_their_formulas(name: str, case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    assert_same(seen.loss(preset(name)), seen.formula(FORMULAS[name]))


def test_minillm_is_its_formula_on_what_the_mixture_sampled(case: Any, mixed: list[Trajectory]) -> None:
    seen = case(mixed)
    assert_same(seen.loss(preset("minillm")), seen.formula(minillm))


def test_distillm2_is_its_formula_on_both_texts(case: Any, contrasted: list[Trajectory]) -> None:
    seen = case(contrasted)
    assert_same(seen.loss(preset("distillm2")), seen.formula(distillm2))


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_veto_is_its_formula_all_the_way(progress: float, case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    assert_same(seen.loss(preset("veto"), progress), seen.formula(veto(progress)))


def test_revisiting_opd_is_its_formula(case: Any, graded: list[Trajectory], desk_chat: Any) -> None:
    seen = case(graded)
    assert_same(seen.loss(preset("revisiting_opd")), seen.formula(revisiting_opd(desk_chat.end_ids)))


def changed(name: str, *overrides: str) -> Any:
    return config_of(name, *overrides).loss.components


DISTILL = "loss.components.distill"
# What a preset becomes at the end of its parameters: (preset, changes, another's formula, up to a factor).
ENDS: list[tuple[str, list[str], Formula, float]] = [
    ("gkd", ["divergence=jsd", "beta=0.3"], jsd(0.3), 1.0),
    ("gkd", ["divergence=jsd", "beta=1e-8"], lambda seen: kl(seen.p, seen.q).mean(), 1e-8),
    ("gkd", ["divergence=jsd", "beta=0.99999999"], gkd, 1e-8),
    ("gkd", ["denominator=episode"], gkd_by_episode, 1.0),
    ("veto", ["geometric=0"], gkd_by_episode, 1.0),
    ("distillm", ["alpha=1e-8"], gkd, 1.0),
    ("paced", ["weights=[{kind: pass_rate, alpha: 0, beta: 0}]"], gkd, 1.0),
    ("tip", ["weights=[{kind: top_tokens, share: 1}]"], gkd, 1.0),
    ("revisiting_opd", ["k=1000", "weights=[]"], gkd, 1.0),
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
    expected = seen.formula(gkd)
    assert_same((expected[0], gradient), expected)
    assert value != pytest.approx(expected[0], rel=0.1)


def test_an_open_gate_over_all_tokens_adds_the_whole_forward_kl(case: Any, graded: list[Trajectory]) -> None:
    seen = case(graded)
    forward = "loss.components.forward"
    both = changed(
        "entropy_aware", f"{forward}.k=1000", f"{forward}.weights=[{{kind: teacher_entropy, above: 0}}]"
    )
    expected = seen.formula(lambda seen: fast_opd(seen) + kl(seen.p, seen.q).mean())
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
    for other in (preset("fast_opd"), {"reverse": preset("entropy_aware")["reverse"]}):
        assert_same(seen.loss(other), one, rtol=1e-5)


EQUAL = sorted({*FORMULAS, "minillm", "distillm2", "revisiting_opd"} - {"scope", "entropy_aware"})


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
    assert_same(some.loss(preset("paced")), some.formula(paced))


def test_fast_opd_stops_sampling_where_a_prefix_would_only_mask(
    student: Any, desk_chat: Any, case: Any
) -> None:
    """On the same draws the loss of episodes that end after k tokens is that of the first k of whole ones."""
    schedule = config_of("fast_opd").rollout.max_action_tokens
    assert schedule is not None
    assert [value_at(schedule, Clock(at, {})) for at in (0.0, 0.5, 1.0)] == [32, 272, 512]
    policy = sampler(student, desk_chat, temperature=T)
    episodes = desk_episodes(4, max_turns=4)
    whole = rolled(episodes, policy, desk_chat, temperature=T)
    limits = dataclasses.replace(LIMITS, max_action_tokens=6)
    cut = rolled(episodes, policy, desk_chat, temperature=T, limits=limits)
    lengths = [t.n_action_tokens for t in cut]
    assert max(lengths) == 6 < max(t.n_action_tokens for t in whole)
    assert all(t.outcome is Outcome.UNFINISHED for t in cut if t.n_action_tokens == 6)
    seen = case(cut)
    assert_same(seen.loss(preset("fast_opd")), seen.formula(fast_opd))
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
