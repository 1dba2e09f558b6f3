"""The demo's job, with the real Gemma 3 270M, on an object store."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from servers import Servers

import actlake
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.shards.verify import verify

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "examples/demo.toml"


def test_the_demo_runs_on_gcs(servers: Servers, gemma_270m: Path) -> None:
    store = servers.folder("gs").child("demo")
    job = read_job(DEMO)
    corpus = replace(job.corpus, max_tokens=4000, context_length=128)
    job = replace(job, dataset=store.url, storage_options=store.options, max_rows=600, corpus=corpus)
    report = ingest(job, engine="local")
    assert report.n_rows >= 600
    ds = actlake.open(store.url, store.options)
    assert ds.complete
    assert len(ds.hook_points) == len(actlake.open(store.url, store.options | {"client": "obstore"}).hook_points) > 1
    assert verify(ds).problems == ()
    point = ds.hook_points[-1]
    fast = actlake.open(store.url, store.options | {"client": "obstore"})
    batches = list(fast.stream([point], batch_size=128, drop_last=False))
    assert sorted(torch.cat([batch.row for batch in batches]).tolist()) == list(range(600))
    assert all(torch.equal(batch[point], ds.tensor(point, batch.row.numpy())) for batch in batches)
    # Started again it finds all that is there.
    assert ingest(job, engine="local").n_built == 0
