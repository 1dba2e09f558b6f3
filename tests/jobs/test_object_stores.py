"""Whole jobs on object stores: ingestion, growth, resume, compaction, reading, verify and queries, all through URLs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import contents
from servers import Servers
from typer.testing import CliRunner

import actlake
from actlake.jobs.cli import query, verify  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.shards.verify import verify as verify_dataset
from actlake.storage.errors import BadInputError
from actlake.storage.manifest import read_root, uncommit
from actlake.storage.stores import Store

POINT = "layers.1.attn_z"


@pytest.fixture(scope="module", params=["gs", "s3", "az"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def keys(store: Store, folder: str = "") -> Iterator[str]:
    """Yield the key of every object below a folder."""
    folders = set(store.folders(folder))
    for name in store.names(folder):
        key = f"{folder}/{name}".lstrip("/")
        yield from keys(store, key) if name in folders else [key]


def download(store: Store, folder: Path) -> Path:
    """Copy every object of a store to a local folder."""
    for key in keys(store):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(store.read(key))
    return folder


def test_a_job_on_an_object_store_gives_the_bytes_of_a_local_one(
    kind: str, servers: Servers, write_job: Callable[..., Path], reference: dict[str, Any], tmp_path: Path
) -> None:
    home = servers.folder(kind)
    store = home.child("ds")
    job = replace(read_job(write_job()), dataset=store.url, storage_options=store.options)
    # A smaller dataset first, which grows; then one that lost a commit.
    assert ingest(replace(job, max_rows=300), engine="local").n_rows > 300
    assert ingest(job, engine="local").n_built > 0
    uncommit(store, 2)
    assert read_root(store) is None
    assert ingest(job, engine="local").n_built == 1
    assert ingest(job, engine="local").n_built == 0

    root = read_root(store)
    assert root is not None
    assert store.exists(root["index"][0])
    assert contents(download(store, tmp_path / "copy")) == reference

    ds = actlake.open(store.url, store.options)
    local = actlake.open(tmp_path / "copy")
    assert ds.complete
    assert verify_dataset(ds).problems == verify_dataset(ds.heldout).problems == ()
    pairs = zip(*(one.stream(POINT, batch_size=64, drop_last=False) for one in (ds, local)), strict=True)
    assert all(torch.equal(here[POINT], there[POINT]) for here, there in pairs)
    assert [key for key in keys(home) if b"bench-secret" in home.read(key) or b"bench-key" in home.read(key)] == []


def test_commands_take_the_options(kind: str, servers: Servers, write_job: Callable[..., Path]) -> None:
    store = servers.folder(kind).child("ds")
    job = replace(read_job(write_job(max_rows=128)), dataset=store.url, storage_options=store.options)
    assert "bench-secret" not in repr(job)
    ingest(job, engine="local")
    options = ["-O", json.dumps(store.options)]
    for command in (["show", store.url], ["verify", store.url], ["head", store.url, "-n", "2"], ["ls", store.url]):
        found = CliRunner().invoke(app, [*command, *options])
        assert found.exit_code == 0, found.output
        assert "bench-secret" not in found.output


@pytest.mark.parametrize("url", ["hf://datasets/someone/acts", "https://example.org/acts"])
def test_a_destination_that_takes_no_objects_is_refused_before_anything_is_done(
    url: str, write_job: Callable[..., Path]
) -> None:
    job = replace(read_job(write_job()), dataset=url, storage_options={"token": "hf_very_secret"})
    with pytest.raises(BadInputError, match="cannot be written to: ") as caught:
        ingest(job, engine="local")
    assert "hf_very_secret" not in str(caught.value)
