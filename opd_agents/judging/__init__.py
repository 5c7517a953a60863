"""A teacher that judges in words: what it is asked about an episode, and what is made of its answers."""

from opd_agents.judging.judge import NOT_ASKED, Asks, Judged, judge_corrections, judge_episodes
from opd_agents.judging.leaks import leaks
from opd_agents.judging.opinions import Opinions
from opd_agents.judging.preferences import Preferred, judge_preferences

__all__ = [
    "NOT_ASKED",
    "Asks",
    "Judged",
    "Opinions",
    "Preferred",
    "judge_corrections",
    "judge_episodes",
    "judge_preferences",
    "leaks",
]
