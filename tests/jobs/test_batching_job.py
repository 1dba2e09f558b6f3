"""`capture.batching` from the job file to the rows: "auto" is settled once, and a dataset keeps what it began with."""

from collections.abc import Callable
from pathlib import Path

import pytest

import actlake
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.jobs.rerun import Rerun
from actlake.storage.corpus import Corpus
from actlake.storage.errors import SpecMismatchError
from actlake.storage.stores import resolve_url

Write = Callable[..., Path]


def run(job: Path, batching: str | None = None, max_rows: int | None = None) -> actlake.ActivationDataset:
    """Run a job with this ``batching`` (None: no such key); return its dataset."""
    text = job.read_text()
    if batching is not None:
        text = text.replace("[capture]\n", f'[capture]\nbatching = "{batching}"\n')
    if max_rows is not None:
        text = text.replace("max_rows = 700", f"max_rows = {max_rows}")
    other = job.with_name("other.toml")
    other.write_text(text)
    checked = read_job(other)
    ingest(checked, engine="local")
    return actlake.open(checked.dataset)


def test_short_documents_are_packed_and_the_dataset_says_so(write_job: Write) -> None:
    job = write_job()
    ds = run(job, max_rows=200)
    # Texts of 1 to 59 words in windows of 32.
    assert ds.spec.batching == "packed"
    assert actlake.open(f"{ds.url}/heldout").spec.batching == "packed"
    # Asked for, or grown: the same dataset.
    assert run(job, "packed", max_rows=200).spec == ds.spec
    assert run(job, "auto", max_rows=300).spec == ds.spec
    with pytest.raises(SpecMismatchError, match=r"batching: here 'packed', there 'padded'"):
        run(job, "padded")


def test_a_padded_dataset_stays_one(write_job: Write) -> None:
    job = write_job()
    ds = run(job, "padded", max_rows=200)
    assert "batching" not in ds.spec.to_json()
    assert run(job, max_rows=300).spec == ds.spec
    with pytest.raises(SpecMismatchError, match=r"batching: here 'padded', there 'packed'"):
        run(job, "packed")


def test_packed_rows_run_again_have_the_stored_bits(write_job: Write, tiny_model: Path) -> None:
    ds = run(write_job(), "packed")
    corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
    heard: list[int] = []
    assert Rerun(ds.spec, model=str(tiny_model)).check(ds, corpus, 700, on_rows=heard.append) == ()
    assert sum(heard) == 700


def test_packed_and_padded_rows_agree(write_job: Write, tmp_path: Path) -> None:
    padded, packed = (run(write_job(dataset=f'"{tmp_path}/{batching}"'), batching) for batching in ("padded", "packed"))
    assert padded.spec.row_space_id == packed.spec.row_space_id
    assert (padded["rows/token_id"][:] == packed["rows/token_id"][:]).all()
    for point in padded.hook_points:
        one, other = (ds.tensor(point, slice(0, 700)).double() for ds in (padded, packed))
        # Rounding of bfloat16; a neighbour's text would make it several times a row's size.
        assert ((one - other).norm(dim=1) <= 0.05 * one.norm(dim=1)).all(), point
