"""How the model is run, from the job file to the record; what several GPUs of a worker ask of a cluster."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actlake.jobs.engines import ray_cluster
from actlake.jobs.engines.ray_pool import PoolOptions
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import RunOptions, parse_job, read_job
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
        ({"workers": 0}, r"run\.workers = 0 must be at least 1"),
        ({"placement": "spred"}, r"run\.placement = 'spred' is not one of pack, spread.*did you mean 'spread'"),
        ({"resources": {"GPU": 2.0}}, r"run\.resources\.GPU: say it with run\.gpus_per_worker"),
        ({"resources": {"spot": 0}}, r"run\.resources\.spot = 0 must be a number above 0"),
        ({"resources": {"spot": "yes"}}, r"run\.resources\.spot = 'yes' must be a number above 0"),
        ({"start_timeout": 0.0}, r"run\.start_timeout = 0\.0 must be above 0; it is in seconds"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        RunOptions(**options)


def run_options(text: str) -> RunOptions:
    return parse_job(
        tomllib.loads(f'dataset = "d"\nmodel = "m"\npreset = "clt"\n[corpus]\nsources = ["x"]\n[run]\n{text}')
    ).run


def test_workers_are_a_number_or_a_range() -> None:
    assert (run_options("").most_workers, run_options("").least_workers) == (None, 1)
    four = run_options("workers = 4")
    assert (four.most_workers, four.least_workers) == (4, 1)
    some = run_options("workers = { min = 2, max = 16 }")
    assert (some.most_workers, some.least_workers) == (16, 2)
    assert run_options("workers = { max = 16 }").least_workers == 1
    options = run_options('workers = 4\nresources = { spot = 1 }\nplacement = "spread"\nstart_timeout = 60')
    assert PoolOptions.of(options, 3) == PoolOptions(
        least=1, most=3, attempts=2, resources={"spot": 1}, placement="spread", start_timeout=60.0
    )
    # A run of two shards needs no more workers than that to begin.
    assert PoolOptions.of(run_options("workers = { min = 3, max = 8 }"), 2).least == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers = { min = 2 }", r"'run\.workers\.max' is missing; give e\.g\. workers = \{min = 1, max = 16\}"),
        ("workers = { min = 5, max = 4 }", r"run\.workers = \{min = 5, max = 4\}: max must be at least min"),
        ("workers = { min = 0, max = 4 }", r"run\.workers\.min = 0 must be at least 1"),
        ("workers = { mim = 1, max = 4 }", r"unknown key 'run\.workers\.mim'; did you mean 'min'"),
        ('workers = "all"', r"run\.workers = 'all' must be a whole number"),
    ],
)
def test_a_range_of_workers_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        run_options(text)


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
    wanted = ray_cluster.wanted_by(order)
    assert ray_cluster.room(wanted) == 3
    # Of the node of 8 GPUs each worker gets 32 CPUs, of that of 7 at least as many.
    assert ray_cluster.threads_each(order) == 32
    assert ray_cluster.threads_each(replace(order, device="cpu")) == 2
    monkeypatch.setattr(ray, "nodes", lambda: nodes[1:2])
    assert ray_cluster.threads_each(order) == 2
    with pytest.raises(
        BadInputError, match="a worker wants 2 CPUs and 4 GPUs; the largest of 1 Ray nodes has 64 and 2"
    ):
        ray_cluster.require_room(wanted)
