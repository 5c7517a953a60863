import ast
import math
import operator
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.tools import Tool, ToolError
from opd_agents.tools.calculator import calculate

SIGNS = st.sampled_from(["+", "-", "*", "/", "//", "%", "**"])
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("-2 ** 2", "-4"),
        ("2 ** -1", "0.5"),
        ("2 ^ 3 ^ 2", "512"),
        ("10 / 4", "2.5"),
        ("10 / 5", "2"),
        ("10**20 / 10**3", "100000000000000000"),
        ("0.1 + 0.2", "0.3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("1e3 + .5", "1000.5"),
        ("round(2.567, 2)", "2.57"),
        ("round(2.5)", "2"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("sqrt(16) + log(8, 2) + log10(100)", "9"),
        ("2 * pi", "6.28318530718"),
        ("floor(-1.5) + ceil(1.2) + abs(-3)", "3"),
    ],
)
def test_calculates(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "the expression is incomplete"),
        ("(1 + 2", "expected '\\)' but found 'the end'"),
        ("1 2", "unexpected '2'"),
        ("1 + * 2", "unexpected '\\*'"),
        ("__import__('os')", "cannot read"),
        ("(1).__class__", "cannot read"),
        ("exec(1)", "unknown name 'exec'; there are pi, e, abs"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("7 % 0.0", "division by zero"),
        ("sqrt(-1)", "no real number"),
        ("(-8) ** 0.5", "no real number"),
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 1023 * 2", "too large"),
        ("exp(1000)", "too large"),
        ("1e999", "too large"),
        ("round(12, -10 ** 9)", "up to 15"),
        ("max(1)", "max takes 2 to 20 arguments"),
        ("sqrt(1, 2)", "sqrt takes 1 arguments"),
        ("(" * 200, "nested deeper"),
        ("-" * 200 + "1", "nested deeper"),
        ("1" * 501, "longer than 500"),
        ("\N{SUPERSCRIPT TWO}", "cannot read"),
    ],
)
def test_what_cannot_be_calculated_is_said(expression: str, problem: str) -> None:
    with pytest.raises(ToolError, match=problem):
        calculate(expression)


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: (
            st.builds(
                "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner
            )
            | st.builds("-{}".format, inner)
        ),
        max_leaves=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_agrees_with_python(expression: str) -> None:
    try:
        expected = reference(ast.parse(expression, mode="eval").body)
    except ArithmeticError:
        with pytest.raises(ToolError):
            calculate(expression)
        return
    assert math.isclose(float(calculate(expression)), expected, rel_tol=1e-9, abs_tol=1e-9)


def reference(node: ast.expr) -> float:
    """The value by Python's own grammar, refused where ours is."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(operand=operand):
            return -reference(operand)
        case ast.BinOp(left=left, op=op, right=right):
            one, other = reference(left), reference(right)
            if isinstance(op, ast.Pow) and abs(one) > 1 and other * math.log2(abs(one)) > 1024:
                raise OverflowError
            value = OPERATORS[type(op)](one, other)
            if isinstance(value, complex) or abs(value) >= 2**1024:
                raise OverflowError
            return value
    raise AssertionError(ast.dump(node))


@given(st.text(max_size=600) | st.text("0123456789.e+-*/%^(), sqrtpi", max_size=500))
@settings(max_examples=200, deadline=None)
def test_any_text_is_answered_at_once(expression: str) -> None:
    start = time.perf_counter()
    try:
        float(Tool.from_function(calculate)({"expression": expression}))
    except ToolError as error:
        assert str(error)
    assert time.perf_counter() - start < 1
