"""A process that must end at once leaves no file without a name, however busy its threads are."""

import subprocess
import sys
from pathlib import Path

import pytest

from actlake.storage.unfinished import unfinished

#: Eight threads write objects without an end; the process leaves in the middle of it, a little after it has tidied up.
BUSY = """
import os, sys, threading, time
from actlake.storage.stores import Store
from actlake.storage.unfinished import remove_unfinished

store = Store(sys.argv[1])

def write(thread):
    for number in range(10**9):
        store.write(f"{thread}/{number}", b"x" * 100_000)

for thread in range(8):
    threading.Thread(target=write, args=(thread,), daemon=True).start()
time.sleep(0.2)
remove_unfinished()
time.sleep(0.2)
os._exit(0)
"""


def test_nothing_is_begun_once_the_process_tidied_up(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BUSY, str(tmp_path)], check=True, timeout=60)
    assert len(list(tmp_path.rglob("*"))) > 8
    assert list(tmp_path.rglob(".actlake-*")) == []


def test_a_file_that_cannot_be_created_holds_nothing_up(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError), unfinished(tmp_path / "absent/file"):
            pytest.fail("entered")
    with unfinished(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
