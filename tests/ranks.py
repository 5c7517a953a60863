"""Run by torchrun in every process: train the configs given (``+``: go on with one), then check the parts."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opd_agents import sharding
from opd_agents.config import load_config
from opd_agents.distributed import World, join_world
from opd_agents.errors import AlignmentError
from opd_agents.optimizers import ModelOptimizer
from opd_agents.sharding import Trained, shard, updating, whole, whole_state
from opd_agents.trainer import train

IDS = torch.arange(3, 27).reshape(4, 6)


def model(tied: bool, seed: int = 0) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=51, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def loss(student: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """A sum over all positions: of the whole batch it is the sum of its rows'."""
    hidden = student.base_model(input_ids=ids).last_hidden_state
    return student.get_output_embeddings()(hidden).log_softmax(-1)[..., 7].sum()


def results_come_back_in_order(world: World) -> None:
    calls: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        return [10 * item for item in items]

    assert world.shared(range(7), work, group=2) == [10 * i for i in range(7)]
    assert calls == [[0, 1, 4, 5]] if world.is_main else [[2, 3, 6]]
    assert world.shared([5], work) == [50]  # less than there are ranks
    assert world.total(2**60 + world.rank) == 2**61 + 1
    assert world.sum(torch.tensor([1.0, float(world.rank)])).tolist() == [2.0, 1.0]
    assert world.from_main(lambda: world.rank) == 0


def gradients_are_sums_over_the_ranks(world: World, tied: bool) -> None:
    """Whoever divides the parameters, torch or accelerate."""
    alone = model(tied)
    loss(alone, IDS).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    divided = shard(model(tied), world)
    assert all(isinstance(p, DTensor) for p in divided.parameters())
    check_gradients(world, divided, expected)
    by_accelerate = Trained(model(tied))
    sharding.shard_by_accelerate(by_accelerate)
    assert all(isinstance(p, DTensor) for p in by_accelerate.parameters())
    sharding.sum_gradients(by_accelerate)
    check_gradients(world, by_accelerate, expected)


def check_gradients(world: World, divided: Trained, expected: dict[str, torch.Tensor]) -> None:
    for ids in (IDS[:3], IDS[3:]):  # the other rank has nothing to say, but takes part in both passes
        divided(lambda inner, ids=ids: loss(inner, ids) * world.is_main).backward()
    for name, parameter in divided.model.named_parameters():
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-5, atol=1e-6)


def what_is_not_divided_is_refused(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AlignmentError, match="every rank would train"):
        patch.setattr(sharding, "fully_shard", lambda module, **options: module)
        shard(model(True), world)


def the_whole_model_has_the_new_weights(world: World, dtype: torch.dtype, kind: str, rtol: float) -> None:
    """Against the same updates in one process; the optimizer's state is then that process's too."""
    plain, acting = model(True).to(dtype), model(True).to(dtype)
    trained = shard(acting, world)
    alone, divided = ModelOptimizer(plain, kind, 0.1), ModelOptimizer(trained.model, kind, 0.1)
    rows = IDS[world.rank :: world.size]
    for _ in range(2):
        with updating(acting, trained):
            assert acting.base_model.layers[0].mlp.up_proj.weight.numel() == 0
            trained(lambda inner: loss(inner, rows)).backward()
            divided.collect()
            norm = divided.clip(1.0)
            divided.step(0.01)
        loss(plain, IDS).backward()
        alone.collect()
        expected = alone.clip(1.0)
        assert abs(norm / expected - 1) <= rtol, (norm, expected)
        alone.step(0.01)
    for mine, theirs in zip(acting.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)
    assert acting.get_output_embeddings().weight is acting.get_input_embeddings().weight
    state = whole_state(divided.state_dict(), kept=True)
    again = ModelOptimizer(copy.deepcopy(plain), kind, 0.1)
    again.load_state_dict(copy.deepcopy(state))
    divided.load_state_dict(copy.deepcopy(state))
    for other in (whole_state(divided.state_dict(), kept=True), again.state_dict()):
        torch.testing.assert_close(tensors(other), tensors(state), rtol=0, atol=0)


def tensors(state: dict[str, Any]) -> list[Any]:
    return [optimizer["state"] for optimizer in state["optimizers"]] + state["masters"]


def main() -> None:
    world = join_world()
    for file in sys.argv[1:]:
        train(load_config(file.removesuffix("+")), resume=file.endswith("+"))
    results_come_back_in_order(world)
    what_is_not_divided_is_refused(world)
    the_whole_model_has_the_new_weights(world, torch.float32, "adamw", 1e-5)
    the_whole_model_has_the_new_weights(world, torch.bfloat16, "adamw", 0.02)
    the_whole_model_has_the_new_weights(world, torch.float32, "muon", 0.01)  # it iterates in bfloat16
    for tied in (True, False):
        gradients_are_sums_over_the_ranks(world, tied)
    print(f"rank {world.rank} has checked all")


if __name__ == "__main__":
    main()
