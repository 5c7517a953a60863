"""``python -m opd_agents`` is the command line."""

from opd_agents.cli import main

main()
