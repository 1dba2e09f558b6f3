"""docs/trainers.md: what needs no package runs, and every block has a test."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_sequences(run: Callable[..., dict[str, Any]]) -> None:
    names = run("Sequences")
    assert names["batch"][names["point"]].shape[0] == 32


def test_every_block_is_run() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(headings) > 8
    assert [heading for heading in headings if f'run("{heading}"' not in tests] == []
