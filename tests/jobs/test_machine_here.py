"""What a plan takes this machine for: the part of it that a scheduler gives to the process."""

from pathlib import Path

import pytest

from actlake.jobs.plan import machine
from actlake.jobs.plan.machine import choose_machine, memory_here
from actlake.jobs.plan.options import PlanOptions
from actlake.jobs.plan.rates import read_rates


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tree of control groups in whose ``slurm/job_7/step_0`` this process is."""
    (tmp_path / "own").write_text("4:memory:/other\n0::/slurm/job_7/step_0\n")
    (tmp_path / "groups/slurm/job_7/step_0").mkdir(parents=True)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_memory_is_that_of_the_tightest_group(groups: Path) -> None:
    whole = memory_here()
    (groups / "memory.max").write_text("max\n")
    (groups / "slurm/job_7/step_0/memory.max").write_text("max\n")
    assert memory_here() == whole
    (groups / "slurm/job_7/memory.max").write_text(f"{96 << 20}\n")
    assert memory_here() == 96 << 20
    (groups / "memory.max").write_text(f"{64 << 20}\n")
    assert memory_here() == 64 << 20


def test_without_control_groups_memory_is_the_machines(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_here()
    monkeypatch.setattr(machine, "_OWN_CGROUP", groups / "none")
    assert memory_here() == whole > 0


@pytest.mark.parametrize(
    ("visible", "n_gpus"), [(None, 4), ("2,3", 2), ("GPU-aa", 1), ("", 0), ("-1", 0), ("2,-1,3", 1), ("0,1,2,3,4,5", 4)]
)
def test_gpus_are_those_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, n_gpus: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "echo NVIDIA H100 80GB HBM3\n" * 4)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_machine(PlanOptions(), read_rates()).n_gpus == n_gpus
