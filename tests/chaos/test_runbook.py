"""What docs/operations.md says that a command prints is what the code has it print."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = ("ingest", "jobs", "shards", "storage")


@cache
def texts() -> str:
    """Return every text of the product's code; an ellipsis stands for what is put into it."""
    found = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """Return the messages in the first column of the runbook's table."""
    page = (ROOT / "docs/operations.md").read_text()
    table = page.partition("\n## When a run goes wrong\n")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    return [text for cell in first for text in re.findall(r"`([^`]+)`", cell) if " " in text and "GPU busy" not in text]


def test_the_table_quotes_enough() -> None:
    assert len(quoted()) >= 10


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    for part in filter(None, (part.strip(" ,") for part in re.split("…|; ", message))):
        assert part in texts()
