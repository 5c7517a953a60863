"""A teacher that judges in words: what it is asked about an episode, and what is made of its answers."""

from opd_agents.judging.judge import NOT_ASKED, Asks, Judged, judge_corrections, judge_episodes
from opd_agents.judging.leaks import leaks
from opd_agents.judging.opinions import Opinions
from opd_agents.judging.preferences import Preferred, judge_preferences
from opd_agents.judging.sameness import NOT_COMPARED, Compared, Practised, judge_key_steps

__all__ = [
    "NOT_ASKED",
    "NOT_COMPARED",
    "Asks",
    "Compared",
    "Judged",
    "Opinions",
    "Practised",
    "Preferred",
    "judge_corrections",
    "judge_episodes",
    "judge_key_steps",
    "judge_preferences",
    "leaks",
]
