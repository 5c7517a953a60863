"""The formulas of the white-box papers, in float64 and from what a batch's models say of it; for the tests of
the presets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from engine import T, chosen
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.types import Actor, Outcome, Trajectory


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


def temperature_aware(seen: Seen) -> Tensor:
    """The student at the sampler's temperature."""
    return kl((seen.p * T / 1.5).log_softmax(-1), seen.q).mean()


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
    mixture = chosen((0.8 * seen.old.exp() + 0.2 * seen.p.exp()).log(), seen.packed)
    ratio = (chosen(seen.q, seen.packed) - mixture).exp()
    advantage = torch.zeros(len(seen.q), dtype=torch.float64)
    for own in seen.episodes:
        d = seen.d[own].tolist()
        for t, token in enumerate(own.tolist()):
            later = [0.95 ** (k - t) * d[k] for k in range(t + 1, len(d))]
            advantage[token] = sum(later) / max(len(later), 1)
    advantage = (advantage - advantage.mean()) / advantage.std()
    return (clipped(ratio, advantage) + kl(seen.q, seen.p)).mean()
