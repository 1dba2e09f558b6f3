"""A sample of the hostile inputs that ``make fuzz`` gives to everything that reads, always the same ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("run.py")
#: About 20 s on two idle cores.
INPUTS = int(os.environ.get("FUZZ_INPUTS", "150"))


@pytest.mark.slow
def test_whatever_is_stored_reading_works_or_raises_one_of_our_errors() -> None:
    # A process of its own: its memory is limited, and what crashes it crashes nothing else.
    command = [sys.executable, str(FUZZ), "--inputs", str(INPUTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Every kind of object had its share.
    assert done.stdout.count(" inputs, ") == len(done.stdout.splitlines()) >= 15


def test_what_is_not_ours_would_be_found(tmp_path: Path) -> None:
    # A reader that lets one error through that Python raises for such input.
    script = tmp_path / "broken.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(FUZZ.parents[1])!r})\n"
        "sys.argv[1:] = ['--inputs', '20', '--target', 'root']\n"
        "import actlake.storage.summaries as summaries\n"
        "from fuzz import run\n"
        "summaries._check_root = lambda value: None\n"
        "sys.exit(run.main())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "root: FAILED" in done.stdout
