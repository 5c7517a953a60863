"""Resources: methods, suites and experiments as YAML, read through ``importlib.resources``."""
