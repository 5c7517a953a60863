"""Run by torchrun in every process: train the configs given (``+``: go on with one), check the parts, then
make the mistake of the last config but one, and fail on one rank with the last."""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd_agents import cli, sharding
from opd_agents.batch import EMPTY
from opd_agents.config import Lora, load_config
from opd_agents.distributed import World, join_world
from opd_agents.errors import AlignmentError, UserError
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies.adapters import add_adapter
from opd_agents.sharding import Trained, shard, updating, whole, whole_state
from opd_agents.trainer import train

IDS = torch.arange(3, 27).reshape(4, 6)


def model(tied: bool, family: str = "llama", **fields: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=51, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied, **fields,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def loss(student: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """A sum over the positions of real rows: of the whole batch it is the sum of its rows'."""
    hidden = student.base_model(input_ids=ids).last_hidden_state[ids.any(1)]
    return student.get_output_embeddings()(hidden).log_softmax(-1)[..., 7].sum()


def results_come_back_in_order(world: World) -> None:
    calls: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        return [10 * item for item in items]

    assert world.shared(range(7), work, group=2) == [10 * i for i in range(7)]
    assert calls == [[0, 1, 4, 5]] if world.is_main else [[2, 3, 6]]
    assert world.shared([5], work) == [50]  # less than there are ranks
    calls.clear()
    assert world.shared(range(6), work, group=[3, 0, 2, 1]) == [10 * i for i in range(6)]
    assert calls == [[0, 1, 2, 3, 4]] if world.is_main else [[5]]
    assert world.total(2**60 + world.rank) == 2**61 + 1
    assert world.sum(torch.tensor([1.0, float(world.rank)])).tolist() == [2.0, 1.0]
    assert world.from_main(lambda: world.rank) == 0


def gradients_are_sums_over_the_ranks(world: World, make: Callable[[], PreTrainedModel]) -> None:
    """Whoever divides the parameters, torch or accelerate."""
    alone = make()
    loss(alone, IDS).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    divided = shard(make(), world)
    assert all(isinstance(p, DTensor) for p in divided.parameters())
    check_gradients(world, divided, expected)
    by_accelerate = Trained(make())
    sharding.shard_by_accelerate(by_accelerate)
    assert all(isinstance(p, DTensor) for p in by_accelerate.parameters())
    sharding.sum_gradients(by_accelerate)
    check_gradients(world, by_accelerate, expected)


def check_gradients(world: World, divided: Trained, expected: dict[str, torch.Tensor]) -> None:
    for ids in (IDS[:3], IDS[3:]):  # the other rank has nothing to say, but takes part in both passes
        divided(partial(loss, ids=ids if world.is_main else EMPTY.ids)).backward()
    for name, parameter in divided.model.named_parameters():
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-5, atol=1e-6)


def a_weight_that_one_rank_does_not_meet_has_the_gradient_of_the_other(world: World) -> None:
    """The embedding and the head have one shape: FSDP2 would add up the gradients of the two."""
    divided = shard(model(False), world)
    table = (PreTrainedModel.get_input_embeddings, PreTrainedModel.get_output_embeddings)[world.rank]
    divided(lambda inner: table(inner).weight.sum() * (1.0 + world.rank)).backward()
    for number, module in enumerate((divided.model.get_input_embeddings(), divided.model.lm_head)):
        assert whole(module.weight.grad).unique().tolist() == [1.0 + number]


def what_is_not_divided_is_refused(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AlignmentError, match="every rank would train"):
        patch.setattr(sharding, "fully_shard", lambda module, **options: module)
        shard(model(True), world)


def the_whole_model_has_the_new_weights(
    world: World, dtype: torch.dtype, kind: str, rtol: float, *, lora: bool = False
) -> None:
    """Against the same updates in one process; the optimizer's state is then that process's too."""
    plain, acting = model(True).to(dtype), model(True).to(dtype)
    if lora:
        for one in (plain, acting):
            add_adapter(one, Lora(rank=3, alpha=6.0), seed=1)
    trained = shard(acting, world)
    alone, divided = ModelOptimizer(plain, kind, 0.1), ModelOptimizer(trained.model, kind, 0.1)
    rows = IDS[world.rank :: world.size]
    for _ in range(2):
        with updating(acting, trained):
            assert acting.base_model.layers[0].input_layernorm.weight.numel() == 0
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


def a_mistake_is_told_once(world: World, file: str) -> None:
    told: str | int | None
    try:
        train(load_config(file))
    except UserError as error:
        told = str(error)
    except SystemExit as error:
        told = error.code
    quiet, loud = sorted(world.gather(told), key=lambda one: one != 2)
    assert quiet == 2 and "nothing: no such folder" in str(loud), (quiet, loud)
    assert world.store is not None
    world.store.delete_key("failures")  # the next is the first again


def main() -> None:
    world = join_world()
    *files, mistaken, failing = sys.argv[1:]
    for file in files:
        train(load_config(file.removesuffix("+")), resume=file.endswith("+"))
    results_come_back_in_order(world)
    what_is_not_divided_is_refused(world)
    the_whole_model_has_the_new_weights(world, torch.float32, "adamw", 1e-5)
    the_whole_model_has_the_new_weights(world, torch.bfloat16, "adamw", 0.02)
    the_whole_model_has_the_new_weights(world, torch.bfloat16, "adamw", 0.02, lora=True)
    the_whole_model_has_the_new_weights(world, torch.float32, "muon", 0.01)  # it iterates in bfloat16
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for make in (partial(model, True), partial(model, False), partial(model, False, "qwen3_moe", **experts)):
        gradients_are_sums_over_the_ranks(world, make)
    a_weight_that_one_rank_does_not_meet_has_the_gradient_of_the_other(world)
    a_mistake_is_told_once(world, mistaken)
    print(f"rank {world.rank} has checked all at {time.time()}", flush=True)
    sys.argv = ["opd-agents", "train", failing]
    cli.main()


if __name__ == "__main__":
    main()
