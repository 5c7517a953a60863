import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine import (
    T,
    assert_same,
    chosen,
    component,
    engine,
    experience_of,
    gradient_of,
    in_float64,
    log_probs,
    moved,
    plain,
    planned,
    preset,
)
from rolling import LIMITS, desk_episodes, rolled

from opd_agents.batch import pack
from opd_agents.composition import selected
from opd_agents.config import Select, load_config
from opd_agents.config.base import Ramp
from opd_agents.distributed import ALONE
from opd_agents.loss import Plan, micro_losses
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies import ExpertPolicy
from opd_agents.sharding import Trained
from opd_agents.types import Actor, Branch, Outcome
from opd_agents.updates import accumulate, minibatches

VERIFIER = {"verifier": {}}


@pytest.fixture(scope="module")
def model(student):
    return moved(student)


@pytest.fixture(scope="module")
def judge(teacher):
    return in_float64(teacher)


@pytest.fixture(scope="module")
def experts(desk_chat):
    return rolled(desk_episodes(2), ExpertPolicy(), desk_chat, limits=LIMITS)


@pytest.fixture(scope="module")
def mixed(sampled, experts):
    """Student episodes with rewards, a repaired one, and the expert's, whose tokens have no log-probs."""
    random = np.random.default_rng(0)
    outcomes = [Outcome.SUCCESS, Outcome.FAILURE]
    rewarded = [
        dataclasses.replace(t, reward=float(random.random()), outcome=outcomes[i % 2])
        for i, t in enumerate(sampled)
    ]
    past, repaired, *rest = sampled[3].turns
    turns = (dataclasses.replace(past, weight=0.0), dataclasses.replace(repaired, actor=Actor.TEACHER), *rest)
    branch = dataclasses.replace(
        sampled[3], uid="r", turns=turns, branch=Branch("e3", 1), group="", outcome=outcomes[0]
    )
    return [*rewarded, branch, *experts]


@pytest.fixture(scope="module")
def seen(student, judge):
    """Trajectories as an experience of the policy that sampled."""
    return lambda trajectories, judged=True: experience_of(
        student, trajectories, {"teacher": judge} if judged else {}
    )


@pytest.mark.parametrize("temperature", [1.0, T])
def test_sft_is_the_mean_negative_log_likelihood_of_the_action_tokens(model, experts, temperature, seen):
    packed = pack(experts)
    expected = plain(model, -chosen(log_probs(model, packed, temperature), packed).mean())
    assert_same(engine(model, seen(experts, False), preset("sft"), temperature=temperature), expected)


def test_gkd_is_the_mean_kl_from_student_to_teacher(model, judge, sampled, seen):
    packed = pack(sampled)
    log_q, log_p = log_probs(model, packed), log_probs(judge, packed).detach()
    expected = plain(model, (log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert_same(engine(model, seen(sampled), preset("gkd")), expected)


def test_gkd_is_the_mean_divergence_over_all_actions_but_inherited_ones(model, judge, mixed, seen):
    packed = pack(mixed)
    mine = torch.tensor([mixed[e].turns[t].weight > 0 for e, t in packed.turns])[packed.turn]
    assert {mixed[e].turns[t].actor for e, t in packed.turns} > {Actor.STUDENT} and not mine.all()
    log_q, log_p = log_probs(model, packed), log_probs(judge, packed).detach()
    expected = plain(model, (log_q.exp() * (log_q - log_p)).sum(-1)[mine].mean())
    assert_same(engine(model, seen(mixed), preset("gkd")), expected)


def test_grpo_is_the_clipped_surrogate_over_standardised_group_rewards(model, mixed, seen):
    trajectories = mixed[:12]
    packed = pack(trajectories)
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64).reshape(3, 4)
    standardised = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantage = standardised.flatten()[packed.episode]
    ratio = (chosen(log_probs(model, packed), packed) - packed.behaviour).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    clipped = float((surrogate != ratio * advantage).double().mean())
    assert 0.05 < clipped < 0.95
    expected = plain(model, -surrogate.mean())
    assert_same(engine(model, seen(trajectories, False), preset("grpo")), expected, rtol=1e-5)
    assert_same(
        engine(model, seen(mixed, False), preset("grpo")), expected, rtol=1e-5
    )  # repaired and expert episodes left out


def random_components(seed):
    random = np.random.default_rng(seed)

    def pick(*options):
        return options[random.integers(len(options))]

    components = {}
    for number in range(random.integers(2, 5)):
        denominator = pick("token", "turn", "episode", "constant")
        kind, divergence = pick("distill", "distill", "policy", "ce"), pick("forward_kl", "reverse_kl", "jsd")
        own = {
            "distill": {
                "divergence": divergence, "beta": pick(0.2, 0.7) if divergence == "jsd" else None,
                "ratio_clip": pick(None, 1.5),
            },
            "policy": {"rewards": {"verifier": {"normalise": pick("std", "none")}}},
            "ce": {},
        }[kind]  # fmt: skip
        components[f"c{number}"] = component(
            kind=kind,
            coef=float(random.uniform(0.1, 2)),
            select=Select(
                actor=pick(None, Actor.STUDENT, Actor.EXPERT),
                source=pick(None, "rollout"),
                outcome=pick(None, Outcome.SUCCESS),
            ),
            denominator=denominator,
            constant=50.0 if denominator == "constant" else None,
            **own,
        )
    return components | {"always": component(kind="ce", coef=0.3)}


@pytest.mark.parametrize("seed", range(4))
def test_any_split_into_micro_batches_gives_the_same_gradient(model, mixed, seed, seen):
    components = random_components(seed)
    whole = engine(model, seen(mixed), components)
    assert torch.isfinite(whole[1]).all()
    for tokens in (1, 500):
        assert_same(engine(model, seen(mixed), components, tokens=tokens), whole, rtol=1e-10)


def test_the_split_does_not_matter_in_float32(student, teacher, mixed):
    components = random_components(0)
    seen = experience_of(student, mixed, {"teacher": teacher})
    whole = engine(student, seen, components)
    assert_same(engine(student, seen, components, tokens=200), whole, rtol=1e-5)
    student.zero_grad()


def test_two_divergences_in_one_loss_are_each_their_own(model, judge, sampled, seen):
    components = {
        "reverse": component(kind="distill", coef=0.5),
        "forward": component(kind="distill", coef=2.0, divergence="forward_kl"),
        "ce": component(kind="ce", coef=0.1),
    }
    packed = pack(sampled)
    log_q, log_p = log_probs(model, packed), log_probs(judge, packed).detach()
    reverse, forward = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = 0.5 * reverse.mean() + 2 * forward.mean() - 0.1 * chosen(log_q, packed).mean()
    assert_same(engine(model, seen(sampled), components), plain(model, loss))


@pytest.mark.parametrize("denominator", ["token", "turn", "episode", "constant"])
def test_denominators_count_what_is_selected(model, mixed, denominator, seen):
    constant = 40.0 if denominator == "constant" else None
    select = Select(actor=Actor.STUDENT, outcome=Outcome.SUCCESS)
    one = component(kind="ce", select=select, denominator=denominator, constant=constant)
    packed = pack(mixed)
    nll = -chosen(log_probs(model, packed), packed)
    turns = [
        (episode, nll[packed.turn == number])
        for number, (episode, index) in enumerate(packed.turns)
        if mixed[episode].success and mixed[episode].turns[index].actor is Actor.STUDENT
        and mixed[episode].turns[index].weight
    ]  # fmt: skip
    episodes = {e: torch.cat([values for other, values in turns if other == e]) for e, _ in turns}
    expected = {
        "token": lambda: torch.cat([v for _, v in turns]).mean(),
        "turn": lambda: torch.stack([v.mean() for _, v in turns]).mean(),
        "episode": lambda: torch.stack([v.mean() for v in episodes.values()]).mean(),
        "constant": lambda: torch.cat([v for _, v in turns]).sum() / 40,
    }[denominator]()
    assert_same(engine(model, seen(mixed, False), {"ce": one}), plain(model, expected))


@pytest.mark.parametrize(
    "select",
    [
        Select(),
        Select(actor=Actor.EXPERT),
        Select(actor=Actor.TEACHER, source="correction"),
        Select(source="rollout"),
        Select(source="correction"),
        Select(outcome=Outcome.FAILURE),
        Select(actor=Actor.RANDOM),
    ],
)
def test_a_component_sees_what_it_selects_and_no_inherited_turn(mixed, select, seen):
    packed = pack(mixed)
    weights = selected(packed, mixed, select)
    for n, weight in enumerate(weights.tolist()):
        episode, index = packed.turns[packed.turn[n]]
        one, turn = mixed[episode], mixed[episode].turns[index]
        wanted = (
            select.actor in (None, turn.actor)
            and select.source in (None, "correction" if one.branch else "rollout")
            and select.outcome in (None, one.outcome)
        )
        assert weight == (turn.weight if wanted else 0.0)
    todo = planned(seen(mixed, False), {"c": component(kind="ce", select=select)})
    coefficients = todo.parts["c"].coefficients
    assert float(coefficients.sum()) == pytest.approx(1.0 if select.actor is not Actor.RANDOM else 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_only_states_that_predict_a_selected_token_get_a_gradient(model, mixed, seed, seen):
    packed = pack(mixed)
    components = {n: c for n, c in random_components(seed).items() if n != "always"}
    experience = seen(mixed)
    todo = planned(experience, components)
    assert bool(todo.keep.any()) and not bool(todo.keep.all())
    states = []
    hook = model.model.norm.register_forward_hook(
        lambda module, args, out: (out.retain_grad(), states.append(out))[1]
    )
    touched = 0
    for micro in packed.micro_batches(500):  # unneeded tokens included
        states.clear()
        sum(micro_losses(model, packed, micro, todo, experience.signals, T).values()).backward()
        expected = torch.zeros(micro.ids.shape, dtype=torch.bool)
        needed = todo.keep[micro.tokens]
        expected[micro.row[needed], micro.column[needed]] = True
        reached = states[0].grad.ne(0).any(-1)
        assert not bool(
            (reached & ~expected).any()
        )  # no state before an environment's token, or an inherited one
        touched += int(reached.sum())
    hook.remove()
    assert touched > 20


def test_the_importance_ratio_is_clipped_and_detached(model, judge, sampled, seen):
    packed = pack(sampled)
    log_q, log_p = log_probs(model, packed), log_probs(judge, packed).detach()
    ratio = (chosen(log_q, packed).detach() - packed.behaviour).exp()
    assert float(ratio.max()) > 1.2 > float(ratio.min())
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = plain(model, (ratio.clamp(max=1.2) * kl).mean())
    components = {"distill": component(kind="distill", ratio_clip=1.2)}
    assert_same(engine(model, seen(sampled), components), expected, rtol=1e-5)


def test_tokens_that_were_not_sampled_have_ratio_one(model, judge, mixed, seen):
    packed = pack(mixed)
    assert packed.behaviour.isnan().any()
    log_q, log_p = log_probs(model, packed), log_probs(judge, packed).detach()
    ratio = (chosen(log_q, packed).detach() - packed.behaviour).exp().clamp(max=1.5).nan_to_num(1.0)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    weight = torch.tensor([mixed[e].turns[t].weight for e, t in packed.turns])[packed.turn]
    expected = plain(model, (weight * ratio * kl).sum() / weight.sum())
    components = {"distill": component(kind="distill", ratio_clip=1.5)}
    assert_same(engine(model, seen(mixed), components), expected, rtol=1e-5)


def test_unselected_expert_tokens_change_nothing(model, mixed, seen):
    """Their log-probs are NaN: 0 * NaN would be NaN."""
    mine = Select(actor=Actor.STUDENT, source="rollout")
    components = {
        "distill": component(kind="distill", ratio_clip=2.0, select=mine),
        "verifier": component(kind="policy", rewards=VERIFIER, select=mine),
    }
    alone = engine(model, seen(mixed[:12]), components)
    assert_same(engine(model, seen(mixed), components), alone, rtol=1e-10)
    policy = engine(model, seen(mixed, False), {"verifier": component(kind="policy", rewards=VERIFIER)})
    assert math.isfinite(policy[0]) and bool(torch.isfinite(policy[1]).all())


@pytest.mark.parametrize(
    "policy",
    [
        {"references": {"teacher": {"baseline": "closed_form"}}},
        {"rewards": VERIFIER, "ratio": "trrd", "trrd_alpha": 0.5, "trrd_reference": "teacher"},
    ],
)
def test_what_a_reference_says_of_unselected_tokens_is_not_looked_at(model, mixed, policy, seen):
    """Also where it is infinite, as of tokens that it does not have."""
    whole = seen(mixed)
    mine = {
        "c": component(kind="policy", select=Select(outcome=Outcome.SUCCESS, actor=Actor.STUDENT), **policy)
    }
    counted = planned(whole, mine).parts["c"].coefficients != 0
    assert bool(counted.any()) and not bool(counted.all())
    told = whole.frozen.references["teacher"]
    spoilt = told._replace(
        logprob=torch.where(counted, told.logprob, -math.inf), kl=torch.where(counted, told.kl, math.inf)
    )
    frozen = dataclasses.replace(whole.frozen, references={"teacher": spoilt})
    other = dataclasses.replace(whole, frozen=frozen)
    assert_same(engine(model, other, mine), engine(model, whole, mine), rtol=1e-10)


def test_coefficients_follow_their_schedule(sampled, seen):
    for kind, middle in (("linear", 0.75), ("cosine", 1.0 - 0.5 * (1 - math.cos(math.pi / 4)))):
        one = component(kind="ce", coef=Ramp(kind=kind, start=1.0, end=0.0))
        sums = [
            float(planned(seen(sampled, False), {"c": one}, progress=at).parts["c"].coefficients.sum())
            for at in (0.0, 0.25, 1.0, 2.0)
        ]
        assert sums == pytest.approx([1.0, middle, 0.0, 0.0], abs=1e-5)


MIX = {
    "distill": {"kind": "distill", "ratio_clip": 2.0, "select": {"actor": "student"}},
    "verifier": {
        "kind": "policy",
        "coef": 0.3,
        "select": {"actor": "student", "source": "rollout"},
        "rewards": VERIFIER,
    },
    "correction": {"kind": "ce", "coef": 0.05, "select": {"actor": "teacher", "source": "correction"}},
}


def session(model, **trainer):
    config = load_config(
        {
            "name": "x", "student": {"model": "s"}, "teacher": {"model": "t"}, "environments": [{"id": "e"}],
            "loss": {"components": MIX}, "trainer": {"micro_batch_tokens": 300} | trainer,
            "rollout": {"group_size": 4, "temperature": T}, "correction": {},
        }
    )  # fmt: skip
    return SimpleNamespace(
        config=config, model=model, trained=Trained(model), optimizer=ModelOptimizer(model, "adamw", 0.0),
        world=ALONE, spend=lambda part, flops: None, step=0,
    )  # fmt: skip


def test_measuring_gradient_shares_changes_no_gradient(model, mixed, seen):
    mine, experience = session(model), seen(mixed)
    todo = planned(experience, mine.config.loss.components)

    def measure(shares):
        model.zero_grad()
        losses = accumulate(mine, experience, todo, shares=shares)
        return losses, gradient_of(model)

    plainly, measured = measure(False), measure(True)
    torch.testing.assert_close(measured[1], plainly[1], rtol=1e-9, atol=1e-12)
    shares = {key: value for key, value in measured[0].items() if key.startswith("grad_share/")}
    assert {k: v for k, v in measured[0].items() if k.startswith("loss")} == pytest.approx(plainly[0])
    assert plainly[0]["loss"] == pytest.approx(sum(plainly[0][f"loss/{name}"] for name in MIX))
    norms = {}
    for name, part in todo.parts.items():  # each component alone
        model.zero_grad()
        accumulate(mine, experience, Plan({name: part}), shares=False)
        norms[name] = float(gradient_of(model).norm())
        assert measured[0][f"grad_norm/{name}"] == pytest.approx(norms[name])
    assert shares == pytest.approx({f"grad_share/{n}": v / sum(norms.values()) for n, v in norms.items()})
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0


def test_minibatches_deal_out_every_trajectory_once(model, mixed, seen):
    experience = seen(mixed, False)
    packed = experience.packed
    masks = list(minibatches(session(model, updates_per_step=3), experience))
    assert torch.stack(masks).sum(0).tolist() == [1] * len(packed.target)
    owners = [set(packed.episode[mask].tolist()) for mask in masks]
    assert sum(map(len, owners)) == len(mixed) and max(map(len, owners)) - min(map(len, owners)) <= 2
    again = list(minibatches(session(model, updates_per_step=3), experience))
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    shown = {1, 4, 6}  # of the sources each update gets its share
    some = [dataclasses.replace(t, demonstration=i in shown) for i, t in enumerate(mixed)]
    for mask in minibatches(session(model, updates_per_step=3), seen(some, False)):
        assert len(shown & set(packed.episode[mask].tolist())) == 1
