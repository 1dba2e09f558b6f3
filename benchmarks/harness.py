"""What every benchmark prints beside its figures: hardware, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("actlake", "torch", "transformers", "zarr", "numcodecs", "ray", "pyarrow")


def conditions() -> dict[str, str]:
    """Return the conditions of a run."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "cpu": _cpu(),
        "cpus": str(os.cpu_count()),
        "python": platform.python_version(),
        "commit": _commit(),
    } | versions


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
