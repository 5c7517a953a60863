"""E3: do the measures that propose an error find it, and does verification tell good repairs from bad ones?

    opd-agents train orderdesk_cold_start --seeds 0-4     # the students; a minute each
    python benchmarks/locator.py runs/orderdesk-cold-start [--episodes 400] [--repairs 24] [--json]

Every student, one a training seed, plays validation tasks of the easy OrderDesk without time-outs. Of a
failed episode the truth is found by letting the scripted expert go on from every state: `first_suboptimal` is
the first action after which it needs no fewer turns than before, or fails; `first_fatal` the first one after
which it fails, because an order was changed for good. Each measure proposes one action an episode, or none.
Repairs (what the expert does there) of the same proposals are taken as they are, after one success as SCoRe
does it, or verified at 4, 8 and 16 rollouts against the student's own action and a retry; 32 fresh rollouts
an arm audit them. A repair is right if the audit finds it better than both rivals, P(better) > .5.

Written down before the first run, with intervals over the seeds (t, 95 %):

1. Of the repairs that verification accepts a larger share is right than of those taken as they are, for
   proposals at random turns. Reproduced if the interval of the paired difference is above 0, contradicted if
   below.
2. The teacher's disagreement finds `first_suboptimal` more often than its log-prob does (`improbable`): same
   rule for the difference of recalls.
3. Bisection of the student's own success (`dropped`) lands nearer to `first_fatal` than to
   `first_suboptimal`: same rule for the difference of mean distances in turns.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from figures import markdown, over_seeds, plus_minus, verdict, write

from opd_agents import envs
from opd_agents.batch import Packed, pack
from opd_agents.config import EXPERIMENTS, Correction
from opd_agents.correction import Repair, correct, disagreed, divergent, dropped, improbable
from opd_agents.correction.states import Place, act_at, restore, saved_at
from opd_agents.envs import AgentEnv
from opd_agents.episode import Episode, Limits
from opd_agents.frozen import frozen_terms
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import load_chat, load_model, load_tokenizer
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.rollout import rollout
from opd_agents.runs import latest_checkpoint
from opd_agents.teachers.local import LocalTeacher
from opd_agents.types import Actor, Outcome, Task, Trajectory

DESK = "opd_agents/OrderDesk-v0"
OPTIONS = {"level": "easy", "timeout_rate": 0.0}
LIMITS = Limits(max_tokens_per_turn=16, max_context_tokens=384)
ONE_SUCCESS = Correction(verify={"rollouts": [1], "rivals": []}, audit=None)
VERIFIED = Correction(audit={"share": 1.0, "rollouts": 32})
REPAIRED = ("disagreed, teacher", "dropped", "random turn")  # whose proposals are repaired


@dataclass(frozen=True, slots=True)
class Truth:
    """Of a failed episode, by the expert; ``first_fatal`` is None where it could still have been saved."""

    first_suboptimal: int
    first_fatal: int | None


def expert_turns(env: AgentEnv) -> float:
    """How many turns the expert needs from here; infinite where it fails. The environment is used up."""
    turns = 0
    while not env.over:
        env.step(env.expert_action())
        turns += 1
    return turns if env.success() == 1 else math.inf


def truth_of(one: Trajectory) -> Truth | None:
    """None where no single action is to blame: nothing was suboptimal until the turns ran out."""
    needed: list[float] = []
    for turn in range(len(one.turns)):
        needed.append(expert_turns(restore(one, turn, envs.make)))
    last = restore(one, len(one.turns) - 1, envs.make)
    last.step(one.turns[-1].action)
    needed.append(math.inf if last.over else expert_turns(last))
    worse = [k for k in range(len(one.turns)) if needed[k + 1] >= needed[k]]
    fatal = [k for k in range(len(one.turns)) if math.isinf(needed[k + 1]) and not math.isinf(needed[k])]
    return Truth(worse[0], fatal[0] if fatal else None) if worse else None


class Scene:
    """A student, its episodes, and who may be asked about them."""

    def __init__(self, folder: Path, seed: int, episodes: int) -> None:
        path = str(latest_checkpoint(folder))
        self.seed, self.model = seed, load_model(path, "float32")
        self.chat = load_chat(path, load_tokenizer(path))
        teacher = str(EXPERIMENTS.joinpath("orderdesk_teacher"))
        self.teacher = LocalTeacher(teacher, self.chat, dtype="float32", temperature=1.0)
        self.student = TransformersSampler(
            self.model, self.chat.end_ids, actor=Actor.STUDENT, temperature=1.0
        )
        self.play = partial(
            rollout, make=envs.make, chat=self.chat, limits=LIMITS, temperature=1.0
        )  # fmt: skip
        played = self.play(
            [
                Episode(
                    uid=f"{seed}-{n}", env_id=DESK, env_kwargs=OPTIONS, seed=n,
                    task=Task(str(n), "validation"), stream=(seed, 0, n),
                )
                for n in range(episodes)
            ],
            policy=self.student,
        )  # fmt: skip
        self.success = mean(one.success for one in played)
        lost = (one for one in played if one.outcome in (Outcome.FAILURE, Outcome.UNFINISHED))
        self.truths = {one.uid: truth for one in lost if (truth := truth_of(one)) is not None}
        self.failed = [one for one in played if one.uid in self.truths]

    def proposals(self) -> dict[str, dict[str, int]]:
        """The turn that each measure names, by episode."""
        packed, act = pack(self.failed), partial(act_at, make=envs.make, chat=self.chat, limits=LIMITS)
        numbered, stream = dict(enumerate(self.failed)), (self.seed, 1)
        theirs, gap = self._scores(packed)
        by_turn: dict[str, Sequence[Place]] = {
            "improbable": improbable(self.failed, packed, theirs, -2.3),
            "divergent": divergent(self.failed, packed, gap, 0.5),
        }
        save = partial(saved_at, make=envs.make, limits=LIMITS)
        own = partial(self.play, policy=self.student)
        random = np.random.default_rng(self.seed)
        asked: dict[str, Mapping[int, int]] = {
            "disagreed, teacher": disagreed(
                numbered, self.teacher.greedy, samples=1, stream=stream, act=act
            ),
            "disagreed, 4 samples": disagreed(numbered, self.teacher, samples=4, stream=stream, act=act),
            "disagreed, expert": disagreed(numbered, ExpertPolicy(), samples=1, stream=stream, act=act),
            "dropped": dropped(numbered, rollouts=4, stream=stream, save=save, play=own)[0],
            "last turn": {n: len(one.turns) - 1 for n, one in numbered.items()},
            "random turn": {n: int(random.integers(len(one.turns))) for n, one in numbered.items()},
        }  # fmt: skip
        found = {name: {one.uid: turn for one, turn in places} for name, places in by_turn.items()}
        return found | {
            name: {numbered[n].uid: turn for n, turn in turns.items()} for name, turns in asked.items()
        }

    def _scores(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's log-probs, and the student's less the teacher's."""
        signals = {"teacher": self.teacher.score(packed, 16384)}
        terms = frozen_terms(self.model, packed, signals, 1.0, 16384)
        theirs = terms.references["teacher"].logprob
        return theirs, terms.logprob - theirs

    def repairs(self, turns: Mapping[str, int], settings: Correction, most: int) -> dict[str, Repair]:
        """Repairs by the expert, of up to ``most`` episodes, by episode."""
        errors = [(one, turns[one.uid]) for one in self.failed if one.uid in turns][:most]
        found = correct(
            errors, settings.model_copy(update={"episodes_per_step": max(1, len(errors))}),
            stream=(self.seed, 2), token_budget=math.inf, student=self.student, proposes=ExpertPolicy(),
            resumes=self.student, make=envs.make, chat=self.chat, limits=LIMITS, temperature=1.0,
        )  # fmt: skip
        return {one.parent.uid: one for one in found}


def located(scene: Scene, turns: Mapping[str, int]) -> dict[str, float]:
    """Of the proposals of one measure: how many there are an episode; of each truth the share of proposals
    that are it (precision), of episodes that have it in which it was proposed (recall), and the mean distance
    in turns where both are known."""
    figures: dict[str, float] = {"proposed": len(turns) / len(scene.truths)}
    for name in ("first_suboptimal", "first_fatal"):
        truths = {uid: getattr(truth, name) for uid, truth in scene.truths.items()}
        known = {uid: turn for uid, turn in truths.items() if turn is not None}
        hits = sum(truths[uid] == turn for uid, turn in turns.items())
        both = [abs(turn - known[uid]) for uid, turn in turns.items() if uid in known]
        figures[f"{name}/precision"] = hits / len(turns) if turns else math.nan
        figures[f"{name}/recall"] = hits / len(known) if known else math.nan
        figures[f"{name}/distance"] = mean(both) if both else math.nan
    return figures


def audited(scene: Scene, turns: Mapping[str, int], most: int) -> dict[str, float]:
    """Of repairs at these turns: the share that is right of all, of those that one success accepts, and of
    those that are verified; how many of each there are, and what the audit says that they gain."""
    verified = scene.repairs(turns, VERIFIED, most)
    lucky = scene.repairs(turns, ONE_SUCCESS, most)
    ways = {
        "as they are": set(verified),
        "one success": {uid for uid, one in lucky.items() if one.accepted} & set(verified),
        "verified": {uid for uid, one in verified.items() if one.accepted},
    }
    figures: dict[str, float] = {"rollouts": sum(one.evidence.played for one in verified.values())}
    for way, uids in ways.items():
        audits = [found for uid in sorted(uids) if (found := verified[uid].audit) is not None]
        gains = [found.gain for found in audits if found.gain is not None]
        figures[f"{way}/repairs"] = len(audits)
        figures[f"{way}/right"] = mean(found.better > 0.5 for found in audits) if audits else math.nan
        figures[f"{way}/gain"] = mean(gains) if gains else math.nan
    return figures


def of_seed(folder: Path, seed: int, episodes: int, repairs: int) -> dict[str, Any]:
    """All figures of one student."""
    started, scene = time.perf_counter(), Scene(folder, seed, episodes)
    proposals = scene.proposals()
    fatal = [truth.first_fatal for truth in scene.truths.values() if truth.first_fatal is not None]
    return {
        "success": scene.success, "failed": len(scene.truths), "fatal": len(fatal),
        "located": {name: located(scene, turns) for name, turns in proposals.items()},
        "audited": {name: audited(scene, proposals[name], repairs) for name in REPAIRED},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def claims(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The three predictions."""

    def differences(one: Callable[[Any], float], other: Callable[[Any], float]) -> list[float]:
        return [one(seed) - other(seed) for seed in seeds]

    def recall(name: str) -> Callable[[Any], float]:
        return lambda seed: float(seed["located"][name]["first_suboptimal/recall"])

    random, dropped_at = "random turn", "dropped"
    return {
        "verified repairs are right more often": verdict(
            differences(
                lambda seed: seed["audited"][random]["verified/right"],
                lambda seed: seed["audited"][random]["as they are/right"],
            )
        ),
        "disagreement finds more than log-probs": verdict(
            differences(recall("disagreed, teacher"), recall("improbable"))
        ),
        "bisection is nearer to the fatal action": verdict(
            differences(
                lambda seed: seed["located"][dropped_at]["first_suboptimal/distance"],
                lambda seed: seed["located"][dropped_at]["first_fatal/distance"],
            )
        ),
    }


def page(result: Mapping[str, Any]) -> str:
    seeds = result["students"]

    def row(part: str, name: str, columns: Sequence[str]) -> dict[str, str]:
        return {"part": name} | {
            column: plus_minus(over_seeds([seed[part][name][column] for seed in seeds])) for column in columns
        }

    found, parts = [], ("located", "audited")
    for part, about in zip(parts, (
        "Where a failed episode went wrong: what measures propose, beside the truth by the expert.",
        "Repairs by the expert at proposed turns: what share is right, and how much they gain, in the audit.",
    ), strict=True):  # fmt: skip
        names = seeds[0][part]
        columns = list(next(iter(names.values())))
        found.append(markdown(about, result, [row(part, name, columns) for name in names]))
    lines = [
        f"- {claim}: **{one['verdict']}**, difference {plus_minus(one, 3)} ({one['seeds']} seeds)."
        for claim, one in result["claims"].items()
    ]
    told = "\n".join(lines)
    return "\n".join([*found, f"Means over students with 95 % t-intervals.\n\n{told}\n"])


def main(
    students: Annotated[Path, typer.Argument(help="Folder of the runs seed-0, seed-1, ...")],
    episodes: Annotated[int, typer.Option(min=2, help="Of each student.")] = 400,
    repairs: Annotated[int, typer.Option(min=1, help="Of each measure and student.")] = 24,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    out: Annotated[Path, typer.Option(help="Where locator.json and .md go.")] = Path("benchmarks/results"),
) -> None:
    """Locators beside the truth, and repairs beside their audits."""
    torch.set_num_threads(1)
    runs = sorted(students.glob("seed-*/"))
    if len(runs) < 2:
        raise typer.BadParameter(f"{students} holds {len(runs)} runs seed-N; two are needed for an interval.")
    load = os.getloadavg()[0]
    found = [of_seed(run, number, episodes, repairs) for number, run in enumerate(runs)]
    result = {
        "episodes": episodes, "repairs": repairs, "seeds": len(runs), "load": round(load, 1),
        "seconds": round(sum(one["seconds"] for one in found)), "claims": claims(found), "students": found,
    }  # fmt: skip
    write(out, "locator", result, page(result), as_json)


if __name__ == "__main__":
    typer.run(main)
