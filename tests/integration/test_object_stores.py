"""The demo's job, all of it, with the real Gemma 3 270M and Ray, on an object store."""

from pathlib import Path

import pytest
import torch
from integration.demo_job import N_ROWS, write_demo_job

import actlake
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.shards.verify import verify
from actlake.storage.stores import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def dataset(demo_on_gcs: Store) -> actlake.ActivationDataset:
    return actlake.open(demo_on_gcs.url, demo_on_gcs.options)


def test_the_whole_demo_is_there_and_sound(dataset: actlake.ActivationDataset) -> None:
    assert dataset.complete
    assert dataset.n_rows + dataset.heldout.n_rows == N_ROWS
    for part in (dataset, dataset.heldout):
        report = verify(part)
        assert report.problems == ()
        assert report.n_rows == part.n_rows


def test_it_is_streamed_by_either_client(demo_on_gcs: Store, dataset: actlake.ActivationDataset) -> None:
    point = dataset.hook_points[-1]
    whole = dataset.tensor(point, slice(0, dataset.n_rows))
    fast = actlake.open(demo_on_gcs.url, demo_on_gcs.options | {"client": "obstore"})
    rows = []
    for batch in dataset.stream([point], batch_size=4096, drop_last=False):
        assert torch.equal(batch[point], whole[batch.row])
        rows.append(batch.row)
    assert sorted(torch.cat(rows).tolist()) == list(range(60_000))
    first = next(iter(fast.stream([point], batch_size=4096)))
    assert first.row.tolist() == rows[0].tolist()
    assert torch.equal(first[point], whole[first.row])
    assert fast.hook_points == dataset.hook_points
    assert len(fast.hook_points) == 21


def test_started_again_it_finds_all_that_is_there(demo_on_gcs: Store, tmp_path: Path) -> None:
    job = read_job(write_demo_job(tmp_path, demo_on_gcs.url, demo_on_gcs.options))
    assert ingest(job, engine="ray").n_built == 0
