"""Suites, policies by name, and figures with intervals."""

from opd_agents.evaluation.evaluate import evaluate, play, run_suite
from opd_agents.evaluation.metrics import summarise
from opd_agents.evaluation.suites import Suite, load_suite
from opd_agents.evaluation.tables import table, tables

__all__ = ["Suite", "evaluate", "load_suite", "play", "run_suite", "summarise", "table", "tables"]
