"""Evaluation suites: one YAML a suite."""
