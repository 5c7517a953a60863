"""Without the real part a marked test is skipped on a desk and fails in the gate."""

from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("part", "required", "outcome"),
    [
        ("no_such_part", "0", "skipped"),
        ("no_such_part", "1", "errors"),
        ("json", "1", "passed"),
        ("cuda", "1", "passed" if torch.cuda.is_available() else "skipped"),
    ],
)
def test_real_marker(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, part: str, required: str, outcome: str
) -> None:
    monkeypatch.setenv("OPD_REQUIRE_REAL", required)
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_inside=f"import pytest\n@pytest.mark.real({part!r})\ndef test_it(): pass")
    assert pytester.runpytest_inprocess("-p", "no:asyncio").parseoutcomes() == {outcome: 1}
