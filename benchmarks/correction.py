"""What a proved repair costs and is worth, and what going back to a state costs.

    python benchmarks/correction.py [repairs|returning ...] [--episodes 128] [--repeats 15] [--json]

`repairs`: failed episodes of the shipped student of OrderDesk are repaired by the shipped teacher, by the
scripted expert, and by a teacher that is wrong on purpose, which makes random calls; with no proof, with one
look of 4 rollouts an arm, and with looks of 4, 8 and 16. Every proposal is audited with 32 fresh rollouts an
arm, whatever was decided: these tell which repairs were any good. `returning`: seconds to come back to the
state before a turn from a snapshot, by a replay, and in a new environment; every state is compared by its
digest. Parts that are not named keep their figures of the last run.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cases import Case
from figures import as_text, keep, markdown, spread

from opd_agents import envs
from opd_agents.config import Correction, load_config
from opd_agents.correction import Repair, correct, improbable
from opd_agents.correction.evidence import Evidence
from opd_agents.correction.states import Place
from opd_agents.envs import AgentEnv, Snapshot
from opd_agents.episode import Episode
from opd_agents.evaluation.rates import wilson
from opd_agents.experience import score
from opd_agents.policies import ExpertPolicy, RandomPolicy
from opd_agents.policies.base import Policy
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.teachers.api import Writable
from opd_agents.types import Task

BELOW = Correction().propose.below
PROOFS = {"4": [4], "4, 8, 16": [4, 8, 16]}
AUDIT = {"share": 1.0, "rollouts": 32}
SURE = 0.975
CASES = (
    Case("opd_agents/OrderDesk-v0", {"level": "hard"}), Case("opd_agents/ShopText-v0", {"level": "hard"}),
    Case("opd_agents/BabyAI-v0"), Case("opd_agents/CodeFix-v0", {"level": "hard"}),
    Case("opd_agents/Shop-v0", {"level": "hard"}),
)  # fmt: skip
DEPTHS = (2, 4, 8, 15)
ABOUT = {
    "repairs": """\
Better, worse: of the accepted repairs, those that 32 fresh rollouts an arm find better than the student's own
action and its retry with a probability of .975, and those that they find more likely no better than one of
these. Gain: success rate after an accepted repair, less that of its best rival, in these rollouts. Without
a proof every proposal counts as accepted. In brackets 95 % Wilson intervals.""",
    "returning": """\
Milliseconds to come back to the state before a turn: restoring a snapshot, or resetting and replaying with
every digest compared, in an environment that is there already; new: making one, restoring the snapshot and
closing it, as each rollout of a proof does. A snapshot of an environment whose states cannot be copied is a
recording, and restoring it is a replay. The arms alternate; the ratio is of neighbours. Median (min to max).
Times are of a machine of two cores; what an environment puts off until it is used, as CodeFix does the start
of its container, is not in them.""",
}


def repairs(episodes: int) -> list[dict[str, Any]]:
    """A row for each teacher and proof; asserts that an audit changes no verdict."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(folder)
        errors = _errors(session, episodes)
        teacher = session.references.teachers["teacher"]
        policies: dict[str, Policy] = {
            "shipped teacher": teacher.greedy, "scripted expert": ExpertPolicy(),
            "random calls": Writable(RandomPolicy(), session.chat),
        }  # fmt: skip
        return [row for name, policy in policies.items() for row in _rows(session, name, policy, errors)]


def _session(folder: str) -> Session:
    config = load_config(
        "orderdesk_opd", f"output={folder}/run", "evaluation=null", "trainer.tensorboard=false"
    )
    return load_session(config, RunFolder(config.folder, config.model_dump(mode="json"), resume=False))


def _errors(session: Session, episodes: int) -> list[Place]:
    """The first action in each of the student's failed episodes that the shipped teacher finds improbable."""
    source = session.config.environments[0]
    wanted = [
        Episode(f"e{n}", source.id, n, Task(str(n), source.split), (0, 0, n), source.options)
        for n in range(episodes)
    ]
    played = rollout(
        wanted,
        session.student_sampler,
        make=envs.launch,
        chat=session.chat,
        limits=session.limits,
        temperature=1.0,
    )
    scored = score(session, played)
    return improbable(played, scored.packed, scored.frozen.references["teacher"].logprob, BELOW)


def _rows(session: Session, name: str, teacher: Policy, errors: Sequence[Place]) -> list[dict[str, Any]]:
    first = next(iter(PROOFS.values()))
    audited = _repaired(session, teacher, errors, {"rollouts": first}, AUDIT)
    audits = {one.parent.uid: one.audit for one in audited if one.audit is not None}
    rows = [{"arm": name, "proof": "none", **_worth(audited, audits)}]
    for proof, looks in PROOFS.items():
        found = _repaired(session, teacher, errors, {"rollouts": looks}, None)
        accepted = [one for one in found if one.accepted]
        if looks == first:
            assert [one.accepted for one in found] == [one.accepted for one in audited]
        row = {
            "arm": name,
            "proof": proof,
            "proposed": len(found),
            "rejected": _share(len(found) - len(accepted), found),
        }
        row |= {
            "rollouts": sum(one.evidence.played for one in found),
            "tokens": sum(one.tokens for one in found),
        }
        rows.append(row | _worth(accepted, audits))
    return rows


def _repaired(
    session: Session,
    teacher: Policy,
    errors: Sequence[Place],
    looks: Mapping[str, Any],
    audit: Mapping[str, Any] | None,
) -> list[Repair]:
    """All of ``errors``, under the same noise whatever is asked of the proof."""
    settings = Correction.model_validate({"verify": looks, "audit": audit, "episodes_per_step": len(errors)})
    return correct(
        errors, settings, stream=(0, 0), token_budget=math.inf, student=session.student_sampler,
        proposes=teacher, resumes=session.student_sampler, make=envs.launch, chat=session.chat,
        limits=session.limits, temperature=1.0,
    )  # fmt: skip


def _worth(accepted: Sequence[Repair], audits: Mapping[str, Evidence]) -> dict[str, Any]:
    """What the audits say of the repairs that were ``accepted``."""
    found = [audits[one.parent.uid] for one in accepted]
    gains = [one.gain for one in found if one.gain is not None]
    return {
        "accepted": len(found), "better": _share(sum(one.better >= SURE for one in found), found),
        "worse": _share(sum(one.better < 0.5 for one in found), found),
        "gain": sum(gains) / len(gains) if gains else None,
    }  # fmt: skip


def _share(count: int, of: Sequence[Any]) -> list[float] | None:
    """The share and its interval."""
    return [count / len(of), *wilson(count, len(of))] if of else None


# ---- going back ----


def returning(repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in CASES:
        with closing(envs.launch(case.id, **case.options)) as env:
            actions = _course(env)
            for depth in (depth for depth in DEPTHS if depth <= len(actions)):
                rows.append(
                    {"part": case.name, "fork": env.fork_mode} | _timed(env, case, actions[:depth], repeats)
                )
    return rows


def _reset(env: AgentEnv) -> None:
    env.reset(seed=0, options={"task_id": "0", "split": next(iter(env.split_sizes))})


def _course(env: AgentEnv) -> list[str]:
    """The expert's actions but for the last, again and again, as many as fit into an episode."""
    _reset(env)
    expert: list[str] = []
    while not env.over:
        expert.append(env.expert_action())
        env.step(expert[-1])
    again = (expert[:-1] * max(DEPTHS))[: min(max(DEPTHS), env.max_turns - 1)]
    _reset(env)
    done: list[str] = []
    for action in again:
        env.step(action)
        if env.over:
            break
        done.append(action)
    return done


def _timed(env: AgentEnv, case: Case, actions: Sequence[str], repeats: int) -> dict[str, Any]:
    _reset(env)
    digests = []
    for action in actions:
        env.step(action)
        digests.append(env.state_digest())
    saved = env.snapshot()

    def replayed() -> None:
        _reset(env)
        env.replay(actions, digests)

    arms = {"snapshot": lambda: env.restore(saved), "replay": replayed, "new": lambda: _anew(case, saved)}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm in [*arms][:: -1 if repeat % 2 else 1]:
            begun = time.perf_counter()
            arms[arm]()
            taken[arm].append(1000 * (time.perf_counter() - begun))
            assert env.state_digest() == digests[-1]
    times = {arm: values[1:] for arm, values in taken.items()}  # the first was for warming up
    ratios = [slow / fast for slow, fast in zip(times["replay"], times["snapshot"], strict=True)]
    return {"depth": len(actions), **{arm: spread(of) for arm, of in times.items()}, "ratio": spread(ratios)}


def _anew(case: Case, saved: Snapshot) -> None:
    with closing(envs.launch(case.id, **case.options)) as env:
        env.restore(saved)


# ---- the program ----


def page(result: Mapping[str, Any]) -> str:
    """A table a part."""
    cells = {"repairs": _repairs_cells, "returning": _returning_cells}
    parts = []
    for name, part in result.items():
        table = [cells[name](row) for row in part["rows"]]
        parts.append(markdown(ABOUT[name].replace("\n", " "), part, table))
    return "\n".join(parts)


def _repairs_cells(row: Mapping[str, Any]) -> dict[str, str]:
    accepted = row["accepted"]
    per = {
        key: f"{row[key] / accepted:.0f}" if key in row and accepted else "" for key in ("rollouts", "tokens")
    }
    return {
        "arm": row["arm"], "proof": row["proof"], "proposed": str(row.get("proposed", accepted)),
        "accepted": str(accepted), "rejected": _percent(row.get("rejected")),
        "rollouts per accepted": per["rollouts"], "tokens per accepted": per["tokens"],
        "better": _percent(row["better"]), "worse": _percent(row["worse"]),
        "gain": "" if row["gain"] is None else f"{row['gain']:+.2f}",
    }  # fmt: skip


def _percent(share: Sequence[float] | None) -> str:
    if share is None:
        return ""
    middle, low, high = (f"{100 * value:.0f}" for value in share)
    return f"{middle} % ({low} to {high})"


def _returning_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "part": row["part"], "states are": {"snapshot": "copied", "replay": "replayed"}[row["fork"]],
        "turn": str(row["depth"]), **{f"{arm}, ms": as_text(row[arm]) for arm in ("snapshot", "replay")},
        "replay / snapshot": as_text(row["ratio"], digits=1), "new, ms": as_text(row["new"]),
    }  # fmt: skip


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ABOUT)}; all.")] = None,
    episodes: Annotated[
        int, typer.Option(min=1, help="That the student plays; the failed are repaired.")
    ] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed returns of each way.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where correction.json and .md go.")] = Path("benchmarks/results"),
) -> None:
    """What repairs cost and are worth, and seconds to go back to a state."""
    torch.set_num_threads(1)
    file = out / "correction.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in parts or ABOUT:  # each is kept at once
        load, begun = os.getloadavg()[0], time.perf_counter()
        facts: dict[str, Any] = {"episodes": episodes} if name == "repairs" else {"repeats": repeats}
        rows = repairs(episodes) if name == "repairs" else returning(repeats)
        facts |= {"torch": torch.__version__, "threads": 1, "cores": os.cpu_count()}
        facts |= {"load before": round(load, 2), "load after": round(os.getloadavg()[0], 2)}
        result[name] = facts | {"seconds": round(time.perf_counter() - begun), "rows": rows}
        result = {part: result[part] for part in ABOUT if part in result}
        keep(out, "correction", result, page(result))
    print(json.dumps(result, indent=1) if as_json else page(result))


if __name__ == "__main__":
    typer.run(main)
