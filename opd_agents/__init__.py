"""On-policy distillation of multi-turn, tool-using language-model agents.

The public names below are loaded at first use: ``import opd_agents`` alone imports neither torch nor
transformers nor gymnasium.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name -> "module" or "module:attribute"
    "AgentEnv": "opd_agents.envs:AgentEnv",
    "Tool": "opd_agents.tools:Tool",
    "evaluate": "opd_agents.evaluation:evaluate",
    "list_envs": "opd_agents.envs:list_envs",
    "load_config": "opd_agents.config:load_config",
    "make": "opd_agents.envs:make",
    "objectives": "opd_agents.objectives",
    "register": "opd_agents.envs:register",
    "testing": "opd_agents.testing",
    "train": "opd_agents.trainer:train",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public: {', '.join(_PUBLIC)}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = importlib.import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return ["__version__", *_PUBLIC]
