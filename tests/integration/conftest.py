"""The real model, converted at most once on a machine, and the demo on an object store."""

from pathlib import Path

import pytest
from integration.demo_job import N_ROWS, N_SHARDS, write_demo_job
from servers import Servers

from actlake.ingest.models import resolve_model
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.storage.stores import Store


@pytest.fixture(scope="session")
def gemma_270m() -> Path:
    """The packaged Gemma 3 270M as bf16 safetensors with its tokenizer; in the user's cache, as the demo's is."""
    return Path(resolve_model("gemma-3-270m-gguf").path)


@pytest.fixture(scope="session")
def demo_on_gcs(
    servers: Servers, gemma_270m: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Store:
    """The whole demo on the emulator of Google's store, as ``actlake ingest`` makes it with Ray."""
    store = servers.folder("gs").child("demo")
    job = read_job(write_demo_job(tmp_path_factory.mktemp("demo"), store.url, store.options))
    report = ingest(job, engine="ray")
    assert (report.n_rows, report.n_built, report.n_committed) == (N_ROWS, N_SHARDS, N_SHARDS)
    return store
