"""The machine that a plan reckons with: one of the rates file, or the one that this runs on."""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from actlake.jobs.plan.options import PlanOptions
from actlake.jobs.plan.rates import Gpu, Rates
from actlake.jobs.work import available_cpus
from actlake.storage.errors import JobFileError, UnknownNameError, nearest

HERE = "here"

_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``count`` equal machines; ``memory`` in bytes, ``nic`` in bytes a second (None: unknown), ``hour`` in dollars."""

    name: str
    count: int
    gpu: Gpu | None
    n_gpus: int
    n_cpus: int
    memory: int
    nic: float | None
    hour: float
    spot: bool = False


def choose_machine(options: PlanOptions, rates: Rates, *, device: str = "auto") -> Machine:
    """Return the machine that ``[plan]`` describes; single keys there replace what the rates say of it.

    Raises ``UnknownNameError`` for a machine or GPU that the rates do not have, ``JobFileError`` for ``gpus`` of an
    unknown kind.
    """
    found = _here(rates, device) if options.machine == HERE else _listed(options, rates)
    gpu = found.gpu
    if options.gpu is not None:
        if options.gpu not in rates.gpus:
            raise UnknownNameError(f"plan.gpu: no GPU {options.gpu!r} in the rates{nearest(options.gpu, rates.gpus)}")
        gpu = rates.gpus[options.gpu]
    n_gpus = options.gpus if options.gpus is not None else max(found.n_gpus, int(gpu is not None))
    if n_gpus and gpu is None:
        raise JobFileError(f"plan.gpus = {n_gpus}, but of which kind? set plan.gpu to one of {', '.join(rates.gpus)}")
    return replace(
        found,
        count=options.machines,
        gpu=gpu if n_gpus else None,
        n_gpus=n_gpus,
        n_cpus=options.cpus or found.n_cpus,
        memory=options.memory or found.memory,
        nic=options.nic or found.nic,
        hour=found.hour if options.hour is None else options.hour,
    )


def _listed(options: PlanOptions, rates: Rates) -> Machine:
    listed = rates.machine(options.machine)
    return Machine(
        name=options.machine,
        count=1,
        gpu=rates.gpus[listed.gpu],
        n_gpus=listed.n_gpus,
        n_cpus=listed.n_cpus,
        memory=int(listed.memory_gib * 2**30),
        nic=listed.nic_gb_s * 1e9,
        hour=listed.spot_hour if options.spot else listed.hour,
        spot=options.spot,
    )


def _here(rates: Rates, device: str) -> Machine:
    names = [] if device == "cpu" else _gpu_names()
    key = rates.gpu_named(names[0]) if names else None
    return Machine(
        name=HERE,
        count=1,
        gpu=None if key is None else rates.gpus[key],
        n_gpus=len(names) if key is not None else 0,
        n_cpus=available_cpus(),
        memory=memory_here(),
        nic=None,
        hour=0.0,
    )


def _gpu_names() -> list[str]:
    """Return the GPUs that this process sees by name; without the seconds that importing torch takes."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        # A driver without a GPU: nothing to reckon with.
        return []
    names, visible = done.stdout.splitlines(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    # A scheduler gives some of them; which kind each is does not matter where all are of one. -1 ends the list.
    return names[: len(list(takewhile(lambda one: one.strip() not in ("", "-1"), visible.split(","))))]


def memory_here() -> int:
    """Return the bytes of memory that this process may use: the machine's, or those of its container or batch job."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroups():
        try:
            limit = (folder / "memory.max").read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            limits.append(int(limit))
    return min(limits)


def _cgroups() -> list[Path]:
    """Return the control groups (version 2) that this process is in: its own, as Slurm makes one, and those above."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    return [_CGROUPS / own, *(_CGROUPS / parent for parent in PurePosixPath(own).parents)]
