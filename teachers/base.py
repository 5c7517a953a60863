"""What a teacher gives: a closed set of signal types."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The teacher's last hidden states before every action token of a packed batch, and its head.

    ``hidden`` [N, H] follows the order of the packed table; ``head`` maps it to logits [N, V]. The full
    next-token distribution is thus available by chunk, without ever storing logits.
    """

    hidden: Tensor
    head: nn.Module
