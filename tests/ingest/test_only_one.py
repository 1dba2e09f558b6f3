"""Workers of one machine fetch, convert and hash weights once: real processes, an empty cache."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actlake.ingest import gguf_model, model_files
from actlake.ingest.only_one import only_one

#: Converts by writing files and waits, in the middle, for what its parent says; tells what it does.
WORKER = """
import sys
from pathlib import Path
from actlake.ingest import gguf_model

def convert(folder):
    print("converting", flush=True)
    sys.stdin.readline()
    for name in gguf_model._COMPLETE:
        (folder / name).write_text("x")

gguf_model._convert = convert
gguf_model.packaged_sha256 = lambda: "f" * 64
gguf_model._terms_notice = lambda: "terms"
print(gguf_model.converted(lambda text: print(text, flush=True)), flush=True)
"""


@contextmanager
def worker(cache: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"ACTLAKE_CACHE": str(cache)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], wanted: str) -> str:
    """Return the first line that begins so."""
    assert process.stdout is not None
    found = next((text for text in process.stdout if text.startswith(wanted)), None)
    assert found is not None
    return found.strip()


def say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_workers_with_an_empty_cache_convert_once(tmp_path: Path) -> None:
    with worker(tmp_path) as first:
        line(first, "converting the packaged")
        line(first, "converting")
        with worker(tmp_path) as second:
            line(second, "another process converts the packaged weights; waiting for it")
            say_go(first)
            folder = line(first, str(tmp_path))
            # It was given nothing to go on with: a conversion of its own would hang.
            assert line(second, str(tmp_path)) == folder
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(gguf_model._COMPLETE)


def test_the_lock_of_a_killed_worker_is_free(tmp_path: Path) -> None:
    with worker(tmp_path) as first:
        line(first, "converting the packaged")
        line(first, "converting")
        with worker(tmp_path) as second:
            line(second, "another process")
            first.send_signal(signal.SIGKILL)
            line(second, "converting the packaged")
            say_go(second)
            assert line(second, str(tmp_path))


def test_a_file_is_hashed_once_by_workers_that_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTLAKE_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    digests, hashing, go = [], threading.Event(), threading.Event()
    digest = hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        digests.append(name)
        hashing.set()
        assert go.wait(60)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(model_files.file_sha256(weights))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert hashing.wait(60)
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 2
    assert len(digests) == 1


def test_where_no_lock_can_be_had_the_work_is_done(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("not a folder")
    done = []
    with only_one(tmp_path / "locks", "x"), only_one(tmp_path / "locks", "x"):
        done.append("both")
    assert done == ["both"]


def test_what_is_raised_inside_comes_out_and_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="planted"), only_one(tmp_path, "x"):
        raise OSError("planted")
    waited: list[str] = []
    with only_one(tmp_path, "x", lambda: waited.append("x")):
        assert waited == []
