"""The log-probs that a signal tells, whatever its type: what can be kept, or added up."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError
from opd_agents.policies.models import local_device
from opd_agents.teachers.base import HiddenStates, SampledLogprobs, TeacherSignal, TeacherTopK

PROJECTED = 2**23  # logits at once


@torch.no_grad()
def log_probs(signal: TeacherSignal, target: Tensor, temperature: float, k: int = 0) -> dict[str, Tensor]:
    """``logprobs`` [N] of the action tokens ``target`` [N], nats; with ``k`` also ``top_logprobs`` [N, k] and
    ``top_ids`` (int32), the most probable first. In float32, on the CPU; ``temperature`` is the run's, at
    which signals other than hidden states already are. Raises AlignmentError for a signal of fewer than k."""
    match signal:
        case SampledLogprobs(logprobs) if not k:
            return {"logprobs": logprobs.float()}
        case TeacherTopK(ids, logprobs, sampled) if k <= ids.shape[-1]:
            best, places = logprobs.float().topk(k)
            top = {"top_logprobs": best, "top_ids": ids.gather(-1, places).int()}
            return {"logprobs": sampled.float()} | (top if k else {})
        case HiddenStates(hidden, head):
            device = local_device()
            rows = max(1, PROJECTED // head(hidden[:1].to(device)).shape[-1])
            parts = [
                _projected(head(part.to(device)), own, temperature, k)
                for part, own in zip(hidden.split(rows), target.split(rows), strict=True)
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    raise AlignmentError(f"A {type(signal).__name__} does not hold the top {k}.")


def _projected(logits: Tensor, target: Tensor, temperature: float, k: int) -> dict[str, Tensor]:
    log_p = (logits.float() / temperature).log_softmax(-1).cpu()
    values = {"logprobs": log_p.gather(-1, target[:, None])[:, 0]}
    if k:
        best, ids = log_p.topk(k)
        values |= {"top_logprobs": best, "top_ids": ids.int()}
    return values
