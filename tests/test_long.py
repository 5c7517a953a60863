"""Long episodes: no tensor of tokens times tokens or times vocabulary, and a stated peak of memory.

python tests/test_long.py TOKENS    prints what one training step on one episode takes
"""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import component, planned
from rolling import trajectory, turn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from opd_agents.batch import Packed, pack
from opd_agents.experience import Experience
from opd_agents.frozen import FrozenTerms, frozen_terms
from opd_agents.loss import micro_losses
from opd_agents.objectives.terms import CHUNK_ELEMENTS
from opd_agents.policies import History, reader
from opd_agents.policies.models import head, hidden_states
from opd_agents.policies.recomputation import prepare_recomputation, recomputed
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.teachers import HiddenStates
from opd_agents.types import Actor

VOCABULARY, TURNS = 16_384, 16
COMPONENTS = {"distill": component(kind="distill"), "ce": component(kind="ce")}
# Resident memory (MiB) that a step on 32,768 tokens may add to what the imports and the models take. A mask
# of tokens by tokens alone would take 1024, the logits of all tokens 2048.
LIMIT = 900


def model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=40_000,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def episode(tokens: int) -> Packed:
    """One row; a quarter of it are actions."""
    ids = torch.randint(VOCABULARY, (TURNS, tokens // TURNS), generator=torch.Generator().manual_seed(0))
    split = 3 * ids.shape[1] // 4
    return pack([trajectory([turn(row[:split], row[split:]) for row in ids.tolist()])])


def step(student: PreTrainedModel, teacher: PreTrainedModel, packed: Packed) -> FrozenTerms:
    """The teacher's and the student's scores, then loss and gradient with recomputed activations."""
    with torch.no_grad():
        (micro,) = packed.micro_batches(1)
        signal = HiddenStates(hidden_states(teacher, micro.ids)[micro.row, micro.column], head(teacher))
    signals = {"teacher": signal}
    frozen = frozen_terms(student, packed, signals, 1.0, 1)
    episodes = (trajectory([turn([1], [1]) for _ in packed.turns]),)
    every = torch.ones_like(packed.target).bool()
    todo = planned(Experience(episodes, packed, signals, {}, frozen, every), COMPONENTS, temperature=1.0)
    with recomputed(student):
        parts = micro_losses(student, packed, micro, todo, signals, 1.0)
    torch.stack(list(parts.values())).sum().backward()
    return frozen


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives, weights left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(result)
                 if isinstance(leaf, Tensor)]  # fmt: skip
        self.elements = max([self.elements, *sizes])
        return result


def test_a_step_makes_no_tensor_of_tokens_by_tokens_or_by_vocabulary() -> None:
    tokens = 4096
    student, teacher, packed = model(1), model(2), episode(tokens)
    prepare_recomputation(student)
    with Largest() as largest:
        frozen = step(student, teacher, packed)
    assert largest.elements <= CHUNK_ELEMENTS < min(tokens * tokens, len(packed.target) * VOCABULARY)
    gradient = [p.grad for p in student.parameters()]
    student.zero_grad()
    # the same as all at once
    row, target = packed.rows[0][None], packed.target
    with torch.no_grad():
        log_p = head(teacher)(hidden_states(teacher, row)[0, packed.position - 1]).log_softmax(-1)
    log_q = student(row).logits[0, packed.position - 1].log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    own = log_q.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(frozen.references["teacher"].kl, divergence.detach(), atol=1e-4, rtol=1e-4)
    (divergence.mean() - own.mean()).backward()
    for mine, parameter in zip(gradient, student.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_long_prompt_is_fed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PREFILL_ELEMENTS", 2**20)
    student = model(1)
    rows = [tuple(range(n)) for n in (4096, 300)]

    def written(rows: list[tuple[int, ...]]) -> list[Any]:
        policy = TransformersSampler(student, frozenset({-1}), actor=Actor.STUDENT, temperature=1.0)
        return policy.act([History(str(len(ids)), (1, 2, 3), ids, (), 3, None) for ids in rows])

    with Largest() as largest:
        actions = written(rows)
    assert largest.elements <= 2**20
    for ids, action in zip(rows, actions, strict=True):
        with torch.no_grad():
            states = hidden_states(student, torch.tensor([ids + action.ids]))[0, len(ids) - 1 : -1]
            log_q = head(student)(states).log_softmax(-1)
        expected = [float(log_q[i, token]) for i, token in enumerate(action.ids)]
        assert action.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_32k_tokens_train_within_the_stated_memory() -> None:
    command = [sys.executable, __file__, "32768"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(figures)
    assert 100 < figures["added_memory_mib"] < LIMIT


def measured(tokens: int) -> dict[str, float]:
    """Peak resident memory that a step adds, after a short one has loaded what any step needs."""
    torch.set_num_threads(1)
    student, teacher = model(1), model(2)
    prepare_recomputation(student)
    step(student, teacher, episode(256))
    before, started = _peak(), time.perf_counter()
    step(student, teacher, episode(tokens))
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "added_memory_mib": _peak() - before, "before_mib": before, "seconds": seconds}


def _peak() -> float:
    """MiB, of this program alone: on Linux getrusage goes on from the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]))))
