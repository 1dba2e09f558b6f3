"""What the benchmarks share: conditions, clocks, tables in Markdown, ``--json``, and fresh processes."""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

_PACKAGES = (
    "actlake",
    "torch",
    "numpy",
    "numcodecs",
    "zarr",
    "pyarrow",
    "transformers",
    "ray",
    "sae-lens",
    "datasets",
    "mosaicml-streaming",
    "litdata",
    "safetensors",
    "fsspec",
    "gcsfs",
    "s3fs",
    "moto",
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: Opens the line on which a child process leaves its result.
_RESULT = "RESULT "

Row = Mapping[str, Any]


# --- conditions and output ---


def conditions() -> dict[str, str]:
    """Return the conditions of a run: machine, load, commit and the versions of what is installed."""
    return {
        "cpu": _cpu(),
        "cpus": str(n_cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
    } | _versions()


def n_cores() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring as its help and knows ``--json``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and tables to this file as well")
    return parser


class Report:
    """Prints conditions and tables in Markdown as they come; at its end writes them to the file of ``--json``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._file: Path | None = arguments.json
        self._command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self._conditions = conditions()
        self._tables: dict[str, list[Row]] = {}

    def __enter__(self) -> Self:
        print(f"Command: `{self._command}`\n")
        print(", ".join(f"{name} {value}" for name, value in self._conditions.items()), flush=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is not None:
            value = {"command": self._command, "conditions": self._conditions, "tables": self._tables}
            self._file.write_text(json.dumps(value, indent=1) + "\n")

    def table(self, title: str, rows: Iterable[Row], note: str = "") -> None:
        """Print rows of the same columns under a title, and a note below them."""
        found = self._tables[title] = list(rows)
        print(f"\n### {title}\n\n{markdown(found)}" + (f"\n\n{note}" if note else ""), flush=True)


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table with the columns of the first row; numbers with three significant digits."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


# --- clocks ---


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Gigabytes (1e9, uncompressed) per second, and CPU seconds for each, of how many seconds in all."""

    gb_per_s: float
    cpu_s_per_gb: float
    seconds: float = 0.0


class Stopwatch:
    """Times a block that handles so many bytes; the CPU time is that of the process, or of ``pids``."""

    def __init__(self, nbytes: float = 0.0, pids: Sequence[int] | None = None) -> None:
        self.nbytes, self._pids = nbytes, pids

    def __enter__(self) -> Self:
        self._cpu, self._wall = self._cpu_s(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_s = self._cpu_s() - self._cpu

    @property
    def rate(self) -> Rate:
        gb = self.nbytes / 1e9
        return Rate(gb_per_s=gb / self.seconds, cpu_s_per_gb=self.cpu_s / gb, seconds=self.seconds)

    def _cpu_s(self) -> float:
        return time.process_time() if self._pids is None else sum(map(tree_cpu_s, self._pids))


def warm_memory(nbytes: int = 3 << 29) -> None:
    """Touch and free so much memory: call it before a timed run.

    A virtual machine's kernel may hand out pages that its host has yet to find. That took 1.35 s for 512 MiB here, and
    0.07 s the next time: it says something of the host's last minutes and nothing of what is measured.
    """
    held = []
    for _ in range(nbytes >> 26):
        held.append(np.empty(1 << 26, dtype=np.uint8))
        held[-1][:: resource.getpagesize()] = 1


def tree_cpu_s(pid: int | None = None) -> float:
    """Return the CPU seconds of a process (this one by default) and all its children, living or waited for. Linux."""
    root = os.getpid() if pid is None else pid
    table = {int(entry): _stat(entry) for entry in os.listdir("/proc") if entry.isdigit()}
    living = {number: fields for number, fields in table.items() if fields is not None}
    family, grown = {root}, True
    while grown:
        born = {number for number, fields in living.items() if int(fields[1]) in family} - family
        grown = bool(born)
        family |= born
    # Fields 14 to 17 of proc_pid_stat(5): own and waited-for children's user and system time.
    return sum(sum(map(int, living[number][11:15])) for number in family & living.keys()) / _TICKS_PER_S


def _stat(pid: str) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        # It ended since /proc was listed.
        return None


def median_rate(rates: Sequence[Rate]) -> Rate:
    """Return the median of each field."""
    return Rate(
        gb_per_s=statistics.median(rate.gb_per_s for rate in rates),
        cpu_s_per_gb=statistics.median(rate.cpu_s_per_gb for rate in rates),
        seconds=statistics.median(rate.seconds for rate in rates),
    )


# --- memory ---


def reset_peak_rss() -> int:
    """Begin a new peak of resident memory; return what is resident now, in bytes. Linux."""
    # 5 resets the peak (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5")
    return _status_nbytes("VmRSS")


def peak_rss() -> int:
    """Return the peak of resident memory since ``reset_peak_rss``, in bytes."""
    return _status_nbytes("VmHWM")


def _status_nbytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


# --- fresh processes ---


def run_child(script: str, arguments: Sequence[object], *, timeout_s: float = 1800) -> Any:
    """Run a script in a process of its own; return what it gave to ``leave_result``.

    Raises ``RuntimeError`` with the end of its standard error where it failed.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not found:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(found[-1].removeprefix(_RESULT))


def leave_result(value: Any) -> None:
    """Print what ``run_child`` returns, in the child."""
    print(_RESULT + json.dumps(value), flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Each benchmark names what it had; no environment has all of them.
            continue
    return found


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
