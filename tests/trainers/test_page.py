"""docs/trainers.md: what needs no package runs, and every block has a test."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_cross_layer_transcoder(run: Callable[..., dict[str, Any]]) -> None:
    names = run("Cross-layer transcoder by hand")
    assert names["batch"].shape == (256, 2, 3, names["d"])
    # Standardised rows: predicting the mean costs 1.
    assert names["loss"].item() < 0.5


def test_sequences(run: Callable[..., dict[str, Any]]) -> None:
    names = run("Sequences")
    assert names["rows"].shape == (32, *names["mask"].shape[1:], names["stream"].widths[names["point"]])
    assert names["loss"].item() < 0.5


def test_every_block_is_run() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(headings) > 8
    assert [heading for heading in headings if f'run("{heading}"' not in tests] == []
