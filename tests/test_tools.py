import datetime
import random
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import pytest

from opd_agents.errors import EnvironmentContractError
from opd_agents.tools import Tool, ToolError, random_call
from opd_agents.types import ToolSpec


def book(
    city: Annotated[str, pydantic.Field(description="where to")],
    nights: int,
    breakfast: bool = False,
    room: Literal["single", "double"] = "single",
    title: str | None = None,
) -> dict[str, object]:
    """Book a room."""
    return {"city": city, "nights": nights, "breakfast": breakfast, "room": room, "title": title}


def test_schema_is_made_from_the_signature() -> None:
    spec = Tool.from_function(book).spec
    assert (spec.name, spec.description) == ("book", "Book a room.")
    schema = spec.parameters
    assert list(schema["properties"]) == ["city", "nights", "breakfast", "room", "title"]
    assert schema["properties"]["city"] == {"type": "string", "description": "where to"}
    assert schema["properties"]["room"] == {
        "type": "string",
        "enum": ["single", "double"],
        "default": "single",
    }
    assert schema["required"] == ["city", "nights"]
    assert schema["additionalProperties"] is False


def test_result_is_compact_json_in_key_order_and_strings_stay() -> None:
    tool = Tool.from_function(book)
    text = tool({"nights": 2, "city": "Évora"})
    assert text == '{"city":"Évora","nights":2,"breakfast":false,"room":"single","title":null}'

    def say() -> str:
        return "as it is"

    assert Tool.from_function(say)({}) == "as it is"


@pytest.mark.parametrize(
    ("arguments", "explained"),
    [
        ({"city": "Rome"}, "nights: Field required"),
        ({"city": "Rome", "nights": "2"}, "nights: Input should be a valid integer"),
        ({"city": 5, "nights": 2}, "city: Input should be a valid string"),
        ({"city": "Rome", "nights": 2, "stars": 5}, "stars: Extra inputs are not permitted"),
        ({"city": "Rome", "nights": 2, "room": "triple"}, "room: Input should be 'single' or 'double'"),
        ({"city": "\ud800", "nights": 2}, "Invalid JSON"),
    ],
)
def test_bad_arguments_are_refused_in_plain_words(arguments: dict, explained: str) -> None:
    with pytest.raises(ToolError, match="bad arguments for book: ") as caught:
        Tool.from_function(book)(arguments)
    assert explained in str(caught.value)


def test_bound_methods_and_structured_types() -> None:
    @dataclass
    class Calendar:
        year: int

        def weekday(self, day: datetime.date, shift: float = 0) -> str:
            return f"{self.year} {day:%A} {shift}"

    first, second = Tool.from_function(Calendar(1).weekday), Tool.from_function(Calendar(2).weekday)
    assert "self" not in first.spec.parameters["properties"]
    assert first({"day": "2025-01-01"}) == "1 Wednesday 0"
    assert second({"day": "2025-01-02", "shift": 1}) == "2 Thursday 1.0"


def test_functions_that_make_no_schema_are_refused() -> None:
    def untyped(x):  # type: ignore[no-untyped-def]
        return x

    def variadic(*xs: int) -> int:
        return sum(xs)

    with pytest.raises(EnvironmentContractError, match="'x' of tool 'untyped' has no type annotation"):
        Tool.from_function(untyped)
    with pytest.raises(EnvironmentContractError, match="cannot be passed by name"):
        Tool.from_function(variadic)


def test_errors_of_the_function_itself_are_not_hidden() -> None:
    def broken(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError):
        Tool.from_function(broken)({"x": 0})


def test_a_tool_without_argument_model_passes_them_on() -> None:
    tool = Tool(ToolSpec("echo", "", {"type": "object"}), lambda **arguments: arguments)
    assert tool({"a": [1]}) == '{"a":[1]}'


def test_random_calls_fit_the_schema_and_use_the_words() -> None:
    tool, rng = Tool.from_function(book), random.Random(0)
    calls = [random_call([tool.spec], rng, ["Rome", "Oslo"]) for _ in range(50)]
    for call in calls:
        tool(call.arguments)
    assert {call.arguments["city"] for call in calls} == {"Rome", "Oslo"}
    assert any("room" in call.arguments for call in calls) and any("room" not in c.arguments for c in calls)
