"""Texts that may be evaluated as Python: lists without code, and polynomials, which take no time."""

from __future__ import annotations

import ast

NODES = 400
POWER = 100
_PLAIN = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd),
)


def is_list(text: str) -> bool:
    """Whether evaluating ``text`` runs no code: a literal, a name, or no Python at all."""
    if text.isidentifier():
        return True
    try:
        ast.literal_eval(text)
    except SyntaxError:
        return True
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True


def is_polynomial(text: str) -> bool:
    """Whether ``text`` is arithmetic over numbers and names of one letter; only names have powers."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(nodes) <= NODES and all(map(_is_allowed, nodes))


def _is_allowed(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float) and abs(value) < 2**64
        case ast.Name(id=name):
            return len(name) == 1
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            small = isinstance(exponent, ast.Constant) and exponent.value in range(POWER + 1)
            return isinstance(base, ast.Name) and small
        case ast.BinOp(op=ast.Div(), right=divisor):
            return not any(isinstance(part, ast.Name) for part in ast.walk(divisor))
    return isinstance(node, _PLAIN)
