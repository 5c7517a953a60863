"""Several processes ("ranks") that train one model, started by torchrun or `accelerate launch`.

Every rank knows all trajectories and the whole packed table of a step. It rolls out its share of the
episodes, and scores and trains the rows that it owns. Parameters, gradients and optimizer state of the model
that is updated are divided among the ranks (FSDP2); beside it stands a whole copy that acts and scores, so
that ranks may run it as often as their own episodes need, and that gives up its memory during updates. All
read the same files: models, data and the run's folder, which the main rank alone writes.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opd_agents.errors import OpdError, UserError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from opd_agents.batch import Packed

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(hours=2)  # of a rank that waits; rollouts of others may be much longer than its own
TELLING = 2.0  # seconds that a rank which fails gets to say why, before others end with it


@dataclass(frozen=True, slots=True)
class World:
    """This process and those beside it. In a world of one every method gives back what it was given."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value (picklable), in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def total(self, counted: float) -> float:
        """The sum of a number over all ranks, exact for whole ones."""
        return sum(self.gather(counted))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all ranks, element by element, the same bits on every rank."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        result = values.clone()
        dist.all_reduce(result)
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the main rank, on every rank: for what two calls may answer differently, as
        a function of the user's may."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        values: list[Any] = [work() if self.is_main else None]
        dist.broadcast_object_list(values)
        return cast(T, values[0])

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)

    def shared(
        self,
        items: Sequence[T],
        work: Callable[[Sequence[T]], Sequence[R]],
        group: int | Sequence[int] = 1,
    ) -> list[R]:
        """``work`` (a list in, its results out) on all items, each rank on its share of them; all results in
        the order of the items, on every rank. ``group`` neighbours stay on one rank; given the sizes of all
        groups, the neighbours of each."""
        if isinstance(group, int):
            groups = [i // group for i in range(len(items))]
        else:
            groups = [number for number, size in enumerate(group) for _ in range(size)]
        mine = [i for i, number in enumerate(groups) if number % self.size == self.rank]
        done = zip(mine, work([items[i] for i in mine]), strict=True)
        placed = {i: result for share in self.gather(list(done)) for i, result in share}
        return [placed[i] for i in range(len(items))]

    def owned(self, packed: Packed) -> Tensor:
        """The action tokens (bool [N]) of the rows that are this rank's to score and train: longest first,
        each row goes to the rank that has the fewest tokens."""
        import torch

        loads, owner = [0] * self.size, torch.zeros(len(packed.rows), dtype=torch.int64)
        for row in sorted(range(len(packed.rows)), key=lambda r: -len(packed.rows[r])):
            least = loads.index(min(loads))
            owner[row] = least
            loads[least] += len(packed.rows[row])
        return owner[packed.row] == self.rank

    @contextmanager
    def errors_told_once(self) -> Iterator[None]:
        """An error that many ranks raise leaves one of them only, and none where it is but the echo of
        another rank's failure; the others end quietly, so that the launcher ends what still runs."""
        try:
            yield
        except BaseException as error:
            atexit.unregister(_leave)  # it could wait for ranks that wait for this one
            if self.store is None or _is_first(self.store, error):
                raise
            time.sleep(TELLING)
            sys.exit(2 if isinstance(error, UserError) else 1)


def _is_first(store: dist.Store, error: BaseException) -> bool:
    first_failure = store.add("failures", 1) == 1
    if isinstance(error, (OpdError, OSError, KeyboardInterrupt)):
        return store.add(hashlib.sha256(str(error).encode()).hexdigest(), 1) == 1
    return first_failure  # else most likely a connection that the failed rank has closed


ALONE = World()


@cache
def join_world() -> World:
    """The processes that a launcher started with this one (by the environment's RANK and WORLD_SIZE); alone
    without one. Collectives run over gloo on the CPU and over nccl on GPUs, LOCAL_RANK naming this one's."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers loads weights on one rank only
    import torch
    import torch.distributed as dist

    from opd_agents.policies.models import local_device

    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    atexit.register(_leave)
    return World(rank, size, dist.PrefixStore("opd_agents", store))


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
