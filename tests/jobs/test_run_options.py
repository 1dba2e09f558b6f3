"""How the model is run, from the job file to the record; what several GPUs of a worker ask of a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from actlake.jobs.engines import ray_engine
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import RunOptions, read_job
from actlake.jobs.work import WorkOrder
from actlake.storage.errors import BadInputError, JobFileError
from actlake.storage.records import read_record
from actlake.storage.stores import Store


def test_how_the_model_was_run_stands_in_every_record(write_job: Callable[..., Path], tmp_path: Path) -> None:
    job = write_job()
    # The last table of the file is [run].
    job.write_text(job.read_text() + 'attn_implementation = "eager"\ndevice_map = {"" = "cpu"}\n')
    ingest(read_job(job), engine="local")
    software = read_record(Store(f"{tmp_path}/ds"), 0).provenance.software
    assert software["kernels"].endswith(", eager attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "sdqa"}, r"run\.attn_implementation = 'sdqa' is not one of .*did you mean 'sdpa'"),
        ({"device_map": "automatic"}, r"run\.device_map = 'automatic' is not one of auto"),
        ({"gpus_per_worker": 0}, r"run\.gpus_per_worker = 0 must be at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        RunOptions(**options)


def test_a_worker_of_several_gpus_goes_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    order = WorkOrder(
        dataset="d",
        corpus="c",
        model="m",
        revision=None,
        fingerprint="f",
        points=("layers.0.mlp_in",),
        dtype="bfloat16",
        device="cuda",
        n_threads=2,
        n_gpus=4,
    )
    nodes = [{"Alive": True, "Resources": {"CPU": 64, "GPU": n_gpus}} for n_gpus in (8, 2, 7)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert ray_engine._fitting(order, 100) == 3
    monkeypatch.setattr(ray, "nodes", lambda: nodes[1:2])
    with pytest.raises(
        BadInputError, match="a worker wants 2 CPUs and 4 GPUs; the largest of 1 Ray nodes has 64 and 2"
    ):
        ray_engine._fitting(order, 100)
