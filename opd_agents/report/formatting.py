"""Numbers and names for people; an absent number is an en dash."""

from __future__ import annotations

import re

ABSENT = "–"  # noqa: RUF001 (an en dash is what a table cell without a value shows)


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    """A difference of two rates in percentage points, with its sign."""
    return f"{100 * value:+.1f} points".replace("-", "−")  # noqa: RUF001


def percent_range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{100 * low:.1f} to {percent(high)}"


def count(value: float | None) -> str:
    """812, 3.1k, 1.20M."""
    if value is None:
        return ABSENT
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{_digits(value / size)}{unit}"
    return f"{value:.0f}"


def decimal(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def flops(value: float | None) -> str:
    """Floating-point operations; TFLOP from a hundredth upwards."""
    if value is None:
        return ABSENT
    for size, from_, unit in ((1e18, 1e18, "EFLOP"), (1e15, 1e15, "PFLOP"), (1e12, 1e10, "TFLOP")):
        if abs(value) >= from_:
            return f"{_digits(value / size)} {unit}"
    return "0" if value == 0 else f"{_digits(value / 1e9)} GFLOP"


def seconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    if value < 120:
        return f"{value:.0f} s" if value >= 10 or value == 0 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def policy_label(key: str) -> str:
    """``student_sft_fresh`` -> ``Student, SFT fresh``."""
    words = re.sub(r"\b(sft|opd|grpo)\b", lambda match: match[0].upper(), key.replace("_", " "))
    if words.startswith("student ") and "," not in words:
        words = words.replace(" ", ", ", 1)
    return words[:1].upper() + words[1:]


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
