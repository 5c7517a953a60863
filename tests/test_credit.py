import dataclasses

import pytest
import torch
from rolling import trajectory, turn

from opd_agents.batch import pack
from opd_agents.composition import Composed, reward_advantages
from opd_agents.config import RewardPart, Select
from opd_agents.credit import assign_credit, with_tokens
from opd_agents.frozen import FrozenTerms, frozen_terms
from opd_agents.objectives import ReferenceTerms
from opd_agents.policies.models import head, hidden_states
from opd_agents.teachers import HiddenStates
from opd_agents.types import Branch, Credit, Outcome, Span, SpanKind

T = 1.3  # the temperature that `sampled` was sampled at


def log_probs(model, packed):
    """Full next-token log-probs at T before every action token, [N, V] in float64, by model(...)."""
    with torch.no_grad():
        logits = [model(row[None]).logits[0].double() for row in packed.rows]
    return torch.stack(
        [logits[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)]
    ).div(T).log_softmax(-1)  # fmt: skip


def signal_of(model, packed):
    """The signal computed row by row."""
    with torch.no_grad():
        states = [hidden_states(model, row[None])[0] for row in packed.rows]
    hidden = [states[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)]
    return HiddenStates(torch.stack(hidden), head(model))


@pytest.mark.parametrize("max_tokens", [50, 500])
def test_kl_and_log_probs_are_those_of_the_full_distributions(student, teacher, sampled, max_tokens):
    packed = pack(sampled)
    frozen = frozen_terms(student, packed, {"teacher": signal_of(teacher, packed)}, T, max_tokens)
    log_q, log_p = log_probs(student, packed), log_probs(teacher, packed)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    at_token = packed.target[:, None]
    torch.testing.assert_close(frozen.references["teacher"].kl.double(), kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(frozen.logprob.double(), log_q.gather(1, at_token)[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        frozen.references["teacher"].logprob.double(), log_p.gather(1, at_token)[:, 0], atol=1e-4, rtol=0
    )

    credits = assign_credit(packed, sampled, frozen, {}, {})
    assert [len(of_one) for of_one in credits] == [len(one.turns) for one in sampled]
    for number, (episode, index) in enumerate(packed.turns):
        credit, mine = credits[episode][index], packed.turn == number
        assert credit.kl_sum == pytest.approx(float(kl[mine].sum()), rel=1e-4)
        assert credit.kl_mean == pytest.approx(float(kl[mine].mean()), rel=1e-4)
        assert credit.teacher_logprob == pytest.approx(float(log_p.gather(1, at_token)[mine].sum()), rel=1e-4)


def test_without_a_teacher_there_are_log_probs_only(student, sampled):
    packed = pack(sampled)
    frozen = frozen_terms(student, packed, {}, T, 500)
    assert not frozen.references and not frozen.logprob.requires_grad
    credit = assign_credit(packed, sampled, frozen, {}, {})[0][0]
    assert (credit.kl_sum, credit.kl_mean, credit.teacher_logprob) == (None, None, None)
    assert assign_credit(packed, sampled, None, {}, {})[0][0] == credit


def test_terms_of_further_trajectories_are_appended(student, teacher, sampled):
    whole, first, rest = pack(sampled), pack(sampled[:5]), pack(sampled[5:])
    parts = [
        frozen_terms(student, part, {"teacher": signal_of(teacher, part)}, T, 500) for part in (first, rest)
    ]
    together, joined = (
        frozen_terms(student, whole, {"teacher": signal_of(teacher, whole)}, T, 500),
        parts[0].extended(parts[1]),
    )
    for one, other in zip(terms_of(joined), terms_of(together), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def terms_of(frozen):
    return frozen.logprob, frozen.entropy, *frozen.references["teacher"]


def test_a_reference_that_had_nothing_to_say_agrees_with_the_student():
    entropy, rank, overlap = torch.tensor([1.5, 1.25]), torch.tensor([3.0, 2.0]), torch.tensor([0.25, 0.5])
    terms = ReferenceTerms(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.7]), entropy, rank, overlap)
    single = ReferenceTerms(terms.logprob, None, None, None)
    told = {"teacher": terms, "api": single, "other": terms}
    frozen = FrozenTerms(torch.tensor([-3.0, -4.0]), torch.tensor([0.75, 0.5]), told)
    said = torch.tensor([True, False])
    heard = frozen.where_taught({"teacher": said, "api": said}).references
    assert [column.tolist() for column in heard["teacher"]] == [
        [-1.0, -4.0],
        [0.5, 0.0],
        [1.5, 0.5],
        [3.0, 0.0],
        [0.25, 1.0],
    ]
    assert heard["api"].logprob.tolist() == [-1.0, -4.0] and heard["api"][1:] == (None, None, None, None)
    assert heard["other"] is terms


def advantages(trajectories, normalise, **select):
    return reward_advantages(trajectories, RewardPart(normalise=normalise), Select(**select))


def episode(uid, group, reward, **fields):
    return trajectory([turn([1], [2])], uid=uid, group=group, reward=reward, **fields)


def test_advantages_are_relative_to_the_group():
    values = advantages(
        [episode(str(i), "ab"[i % 2], r) for i, r in enumerate([1.0, 0.5, 0.0, 0.5, 1.0, 0.5])], "none"
    )
    assert values.tolist() == pytest.approx([1 / 3, 0, -2 / 3, 0, 1 / 3, 0])
    values = advantages([episode("a", "g", 1.0), episode("b", "g", 0.0)], "std")
    deviation = 2**-0.5  # of 1 and 0, ddof 1
    assert values.tolist() == pytest.approx([0.5 / (deviation + 1e-4), -0.5 / (deviation + 1e-4)])


def test_branches_failed_environments_and_single_episodes_have_no_part_in_a_group():
    members = [episode("a", "g", 1.0), episode("b", "g", 0.0, outcome=Outcome.UNFINISHED)]
    others = [
        episode("c", "", 1.0, branch=Branch("b", 0)),
        episode("d", "g", 1.0, outcome=Outcome.ERROR),
        episode("e", "", 1.0),
        episode("f", "", 0.0),
    ]
    values = advantages([others[0], members[0], *others[1:], members[1]], "none").tolist()
    assert values == [0.0, 0.5, 0.0, 0.0, 0.0, -0.5]
    assert advantages(others, "std").tolist() == [0.0] * 4
    assert advantages([], "std").tolist() == []


def test_credit_holds_each_actions_parts():
    plain = trajectory([turn([1], [2]), turn([3], [4, 5])], uid="a")
    branch = trajectory([dataclasses.replace(plain.turns[0], weight=0.0), turn([3], [6])], uid="b")
    none = trajectory([], uid="c")
    packed = pack([plain, none, branch])
    terms = ReferenceTerms(-torch.arange(5.0), torch.arange(5.0), None, None)
    frozen = FrozenTerms(torch.zeros(5), torch.zeros(5), {"teacher": terms})
    parts = {"verifier": torch.full((5,), 0.5), "judge": torch.tensor([1.0, -1.0, -3.0, 0.0, 0.0])}
    composed = {"joint": Composed(torch.zeros(5), parts, {})}
    credits = assign_credit(packed, [plain, none, branch], frozen, composed, {("a", 1): "accepted"})
    assert [len(of_one) for of_one in credits] == [2, 0, 2]
    first, second = credits[0]
    assert (second.kl_sum, second.kl_mean, second.teacher_logprob) == (3.0, 1.5, -3.0)
    assert (first.correction, second.correction) == (None, "accepted")
    assert second.advantage == {"joint.verifier": 0.5, "joint.judge": -2.0}
    assert [c.weight for c in credits[2]] == [0.0, 1.0] and credits[2][1].correction is None


def test_credit_by_token_has_an_entry_for_each_id_and_says_where_nothing_is_learned():
    forced = (Span(SpanKind.THINK, 0, 1), Span(SpanKind.FORCED, 1, 3), Span(SpanKind.TEXT, 3, 4))
    first = trajectory([turn([1], [2, 8, 8, 3], spans=forced), turn([3], [4, 5])], uid="a")
    packed = pack([first, trajectory([], uid="c")])
    assert packed.target.tolist() == [2, 3, 4, 5]
    kl = torch.tensor([0.12349, 2.0, 3.0, 4.0])
    advantage = {"a": torch.tensor([1.0, -1.0, 0.25, 0.25]), "b": torch.tensor([0.5, 0.5, 0.5, 0.5])}
    composed = {name: Composed(values, {}, {}) for name, values in advantage.items()}
    learned = torch.tensor([True, True, False, False])
    plain = [[Credit(), Credit()], []]

    def by_token(kl_of_terms):
        terms = ReferenceTerms(torch.tensor([-1.0, -2.0, -3.0, -4.0]), kl_of_terms, None, None)
        frozen = FrozenTerms(torch.full((4,), -0.5), torch.zeros(4), {"teacher": terms})
        return with_tokens(packed, [first, first], plain, frozen, composed, learned)

    (one, two), nothing = by_token(kl)
    assert nothing == []
    assert one.token_kl == (0.123, 0.0, 0.0, 2.0) and two.token_kl == (3.0, 4.0)
    assert one.token_advantage == (1.5, 0.0, 0.0, -0.5)
    assert two.token_advantage == (0.75,)  # the same for all
    assert one.unlearned == ((1, 3),) and two.unlearned == ((0, 2),)
    assert by_token(None)[0][1].token_kl == (2.5, 3.5)  # log q - log p
    assert with_tokens(packed, [first, first], plain, None)[0][1] == Credit()
    assert with_tokens(pack([]), [], [], None) == []
