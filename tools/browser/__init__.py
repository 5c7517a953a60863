"""Pages of a real headless Chromium, read as a short tree of text and acted on by element number."""

from opd_agents.tools.browser.nodes import Node, render
from opd_agents.tools.browser.page import Page, open_page

__all__ = ["Node", "Page", "open_page", "render"]
