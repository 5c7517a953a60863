"""From components, as YAML gives them, to the loss and its gradient, the way that the trainer takes; and the
plain formulas to compare with, in float64 through each row's own logits."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from opd_agents.batch import pack
from opd_agents.config import Component, load_config
from opd_agents.experience import Experience, credit
from opd_agents.frozen import frozen_terms
from opd_agents.loss import micro_losses, plan
from opd_agents.policies.models import head, hidden_states
from opd_agents.schedules import Clock, value_at
from opd_agents.teachers import HiddenStates

T = 1.3  # the temperature that `sampled` was sampled at


def component(**fields):
    """One component, as a config would hold it."""
    return TypeAdapter(Component).validate_python(fields)


def preset(method, **changes):
    """The components of a shipped method."""
    return config_of(method, **changes).loss.components


def config_of(method, *overrides, **changes):
    raw = {"name": "x", "method": method, "student": {"model": "s"}, "environments": [{"id": "e"}]}
    own = {"teacher"} & load_config_keys(method)
    return load_config(raw | ({} if own else {"teacher": {"model": "t"}}) | changes, *overrides)


def load_config_keys(method):
    import yaml

    from opd_agents.config import method_text

    return set(yaml.safe_load(method_text(method))["config"])


def in_float64(model):
    """A copy; Llama's own norms would compute in float32."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def moved(model, scale=0.05, seed=0):
    """A float64 copy, a little off the weights that sampled, so that importance ratios are not 1."""
    model = in_float64(model)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return model


def signal_of(judge, packed):
    """Hidden states computed row by row."""
    with torch.no_grad():
        states = [hidden_states(judge, row[None])[0] for row in packed.rows]
    hidden = [states[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)]
    return HiddenStates(torch.stack(hidden), head(judge))


def log_probs(model, packed, temperature=T):
    """[N, V]: the plain way, through each row's own logits."""
    logits = [model(row[None]).logits[0] for row in packed.rows]
    states = [logits[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)]
    return (torch.stack(states) / temperature).log_softmax(-1)


def chosen(log_q, packed):
    return log_q.gather(1, packed.target[:, None])[:, 0]


def experience_of(sampler, trajectories, references=None, taught=None, temperature=T):
    """What `score` makes of trajectories that ``sampler`` sampled, ``references`` being models by name."""
    packed = pack(trajectories)
    signals = {name: signal_of(model, packed) for name, model in (references or {}).items()}
    frozen = frozen_terms(sampler, packed, signals, temperature, 10_000).where_taught(taught or {})
    everything = torch.ones(len(packed.target), dtype=torch.bool)
    return Experience(tuple(trajectories), packed, signals, taught or {}, frozen, everything)


def assigned_to(experience, components, chat=None, progress=0.0):
    at = partial(value_at, clock=Clock(progress, {}))
    chat = chat or SimpleNamespace(end_ids=frozenset(), token_id=int)
    config = SimpleNamespace(loss=SimpleNamespace(components=components))
    return credit(SimpleNamespace(config=config, at=at, chat=chat), experience)


def planned(experience, components, chat=None, progress=0.0, temperature=T, current=None):
    """The plan of one update on everything."""
    at = partial(value_at, clock=Clock(progress, {}))
    assigned = assigned_to(experience, components, chat, progress)
    current = experience.frozen.logprob if current is None else current
    return plan(experience, components, assigned, experience.owned, at, temperature, current)


def engine(model, experience, components, *, chat=None, progress=0.0, tokens=10_000, temperature=T):
    """Loss and gradient as the trainer gets them, summed over micro-batches of ``tokens``."""
    packed = experience.packed
    current = frozen_terms(model, packed, {}, temperature, 10_000).logprob
    todo = planned(experience, components, chat, progress, temperature, current)
    model.zero_grad()
    total = 0.0
    for micro in packed.micro_batches(tokens, todo.keep):
        loss = sum(micro_losses(model, packed, micro, todo, experience.signals, temperature).values())
        loss.backward()
        total += float(loss.detach())
    return total, gradient_of(model)


def plain(model, loss):
    """Value and gradient of a formula."""
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradient_of(model)


def gradient_of(model):
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def assert_same(one, other, rtol=1e-6):
    """Losses and gradients agree (coefficients, advantages and recorded log-probs are float32)."""
    assert one[0] == pytest.approx(other[0], rel=rtol, abs=rtol)
    assert float((one[1] - other[1]).norm()) <= rtol * float(other[1].norm())
    assert float(other[1].norm()) > 1e-3
