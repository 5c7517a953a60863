"""Importing the package announces its environment, and does nothing that takes time."""

import opd_agents as opd

opd.register("timetable/Timetable-v0", "timetable.env:Timetable")
