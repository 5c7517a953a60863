"""Code environments: small functions to mend and to write, and HumanEval, run in a sandbox."""

from opd_agents.envs.code.env import CodeEnv, CodeFix, CodeGen
from opd_agents.envs.code.humaneval import HumanEval

__all__ = ["CodeEnv", "CodeFix", "CodeGen", "HumanEval"]
