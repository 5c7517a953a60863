"""The shop without a browser: the same pages and answers as a real one gives, as plain data."""

from __future__ import annotations

from urllib.parse import urlencode

from opd_agents.envs.web.shop.store import Store
from opd_agents.envs.web.shop.view import Button, Control, Field, Form, Link, to_nodes
from opd_agents.tools import ToolError
from opd_agents.tools.browser import Node
from opd_agents.tools.browser.nodes import CHOOSE, find


class TextBrowser:
    """One tab on one store. Its state is the history of addresses and what was entered on the page."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.history = ["/"]
        self.typed: dict[str, str] = {}  # by the field's id, as JSON needs it

    def observe(self) -> list[Node]:
        return to_nodes(self.store.view(self.history[-1]), self.typed)

    def goto(self, path: str) -> None:
        if path != self.history[-1]:  # otherwise it is loaded again
            self.history.append(path)
        self.typed = {}

    def back(self) -> None:
        if len(self.history) == 1:
            raise ToolError("there is no page to go back to")
        self.history.pop()
        self.typed = {}

    def click(self, id: int) -> None:
        control, form = self._control(id)
        match control:
            case Link(_, path):
                self.goto(path)
            case Button() if form is not None:
                self._send(form)
            case Field(box=True):
                self.typed[str(id)] = "" if self._value(id, control) else "on"
            case Field(options=(_, *_)):
                raise ToolError(CHOOSE)

    def fill(self, id: int, text: str) -> None:
        control, _ = self._control(id)
        if not isinstance(control, Field) or control.box or control.options:
            raise ToolError("it is no text field")
        self.typed[str(id)] = text

    def select(self, id: int, option: str) -> None:
        control, _ = self._control(id)
        if not isinstance(control, Field) or not control.options:
            raise ToolError("it offers no options")
        if option not in control.options:
            raise ToolError(f"no such option; it has: {', '.join(control.options)}")
        self.typed[str(id)] = option

    def scroll(self, direction: str) -> None:
        """The whole page is seen anyway."""

    def _control(self, id: int) -> tuple[Control, Form | None]:
        find(self.observe(), id)
        return self.store.view(self.history[-1]).controls()[id - 1]

    def _value(self, id: int, field: Field) -> str:
        return self.typed.get(str(id), field.value)

    def _send(self, form: Form) -> None:
        data = {
            control.name: self._value(id, control)
            for id, (control, inside) in enumerate(self.store.view(self.history[-1]).controls(), 1)
            if inside == form and isinstance(control, Field) and (not control.box or self._value(id, control))
        }
        if form.method == "get":
            self.goto(f"{form.path}?{urlencode(data)}")
        else:
            self.history.append(self.store.send(form.path, data))  # a visit of its own, also of the same page
            self.typed = {}
