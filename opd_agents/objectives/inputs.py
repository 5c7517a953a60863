"""What every tensor of a table of tokens or episodes must be before it is learned from."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError


def check_rows(where: str, counted: Tensor | None = None, /, **rows: Tensor) -> None:
    """Refuse (AlignmentError) tensors that are not all ``[N]``, float16 or bfloat16 ones, and values that are
    not finite, in rows that count (``counted``, bool [N]; None: in all): a token of no log-prob, or of
    probability 0, has no place in such a loss."""
    shapes = {name: list(tensor.shape) for name, tensor in rows.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or any(len(s) != 1 for s in shapes.values()):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise AlignmentError(f"{where}: all must be [N], one entry per row of one table, but got {given}.")
    for name, tensor in rows.items():
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise AlignmentError(
                f"{where}: {name} is {tensor.dtype}, whose rounding is of the size of what is learned from;"
                " take the log-softmax in float32."
            )
        values = tensor if counted is None else tensor[counted]
        if not bool(values.isfinite().all()):
            raise AlignmentError(
                f"{where}: {name} is not finite in {int((~values.isfinite()).sum())} of {len(values)} rows."
                " Leave such rows out (a token that nobody sampled has no log-prob), or look for the NaN"
                " where they come from."
            )
