"""`actlake verify` and `actlake stats` on the dataset of a tiny model: every kind of damage, and exit codes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import stats, verify  # noqa: F401 - each registers its command
from actlake.jobs.cli.app import app
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.shards.covariance import read_covariance
from actlake.storage.arrays import crc32c, encode_shard
from actlake.storage.moments import from_parquet, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, commit, commit_key, read_record, stats_key
from actlake.storage.sealed import seal
from actlake.storage.stores import Store

POINT = "layers.1.attn_z"
OTHER = "layers.2.resid_post"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, documents: str) -> Path:
    """Return a folder with a dataset ``ds`` of three shards and its corpus; not to be changed."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "job.toml").write_text(
        f'dataset = "{folder}/ds"\nmodel = "{tiny_model}"\nhook_points = ["{POINT}", "{OTHER}"]\nmax_rows = 300\n'
        f'[capture]\nbatch_tokens = 256\n[corpus]\nsources = ["{documents}"]\ncontext_length = 32\nholdout = 0.2\n'
        "[layout]\nrows_per_shard = 128\nrows_per_chunk = 32\n[run]\nthreads = 1\n"
    )
    ingest(read_job(folder / "job.toml"), engine="local")
    return folder


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy" / "ds"


def key(name: str, shard: int) -> str:
    return f"arrays/{name}/c/{shard}" + ("" if name.startswith("rows/") else "/0")


def stored(dataset: Path, name: str, shard: int) -> npt.NDArray[Any]:
    record = read_record(Store(dataset), shard)
    return actlake.open(dataset)[name][record.first_row : record.first_row + record.n_rows].copy()


def rewrite(dataset: Path, name: str, shard: int, rows: npt.NDArray[Any], **changes: Any) -> None:
    """Store other rows of an array, with checksums and a record that agree with them."""
    store = Store(dataset)
    encoded = encode_shard(actlake.open(dataset).spec.arrays()[name], rows)
    store.write(key(name, shard), *encoded.parts)
    found = ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)
    record = read_record(store, shard)
    commit(store, replace(record, objects=dict(record.objects) | {name: found}, **changes))


def store_statistics(dataset: Path, shard: int, moments: dict[str, Any]) -> ObjectRecord:
    data = to_parquet(moments)
    Store(dataset).write(stats_key(shard), data)
    return ObjectRecord(nbytes=len(data), crc32c=crc32c(data))


# --- one damage of each kind ---


def missing(ds: Path) -> None:
    (ds / key(POINT, 1)).unlink()


def truncated(ds: Path) -> None:
    data = (ds / key(POINT, 1)).read_bytes()
    (ds / key(POINT, 1)).write_bytes(data[: len(data) // 2])


def flipped(ds: Path) -> None:
    data = bytearray((ds / key(POINT, 1)).read_bytes())
    data[40] ^= 1
    (ds / key(POINT, 1)).write_bytes(bytes(data))


def swapped(ds: Path) -> None:
    one, other = (ds / key(POINT, shard) for shard in (0, 1))
    left, right = one.read_bytes(), other.read_bytes()
    one.write_bytes(right)
    other.write_bytes(left)


def of_another_shard(ds: Path) -> None:
    (ds / commit_key(1)).write_bytes((ds / commit_key(0)).read_bytes())


def of_another_dataset(ds: Path) -> None:
    value = json.loads((ds / "heldout" / commit_key(0)).read_bytes())
    value["content"]["shard"] = 1
    (ds / commit_key(1)).write_text(json.dumps(seal(value)))


def foreign(ds: Path) -> None:
    (ds / "arrays" / "layers.7.resid_post").mkdir()
    (ds / "arrays" / "layers.7.resid_post" / "zarr.json").write_text("{}")


def wrong_token(ds: Path) -> None:
    rows = stored(ds, "rows/token_id", 1)
    rows[17] += 1
    rewrite(ds, "rows/token_id", 1, rows)


def changed_statistics(ds: Path) -> None:
    moments = from_parquet(Store(ds).read(stats_key(1)))
    mean = moments[POINT].mean.copy()
    mean[3] *= 1.001
    record = store_statistics(ds, 1, moments | {POINT: replace(moments[POINT], mean=mean)})
    commit(Store(ds), replace(read_record(Store(ds), 1), stats=record))


def lost_metadata(ds: Path) -> None:
    (ds / "arrays" / POINT / "zarr.json").unlink()


def damaged_totals(ds: Path) -> None:
    (ds / "root.json").write_text("{")


@pytest.mark.parametrize(
    ("plant", "kind", "shards", "named"),
    [
        (missing, "missing", [1], POINT),
        (truncated, "index", [1], POINT),
        (flipped, "chunk", [1], f"{POINT}, chunk 0"),
        (swapped, "mixed", [0, 1], POINT),
        (of_another_shard, "record", [1], "is the record of shard 0"),
        (of_another_dataset, "record", [1], "is of dataset"),
        (foreign, "foreign", [None], "arrays/layers.7.resid_post"),
        (wrong_token, "token", [1], "row 17"),
        (changed_statistics, "statistics", [1], "mean of channel 3"),
        (lost_metadata, "metadata", [None], f"{POINT}/zarr.json is not there"),
        (damaged_totals, "manifest", [None], "root.json is damaged"),
    ],
)
def test_each_damage_is_found_named_and_repaired(
    dataset: Path, plant: Callable[[Path], None], kind: str, shards: list[int | None], named: str
) -> None:
    plant(dataset)
    result = run("verify", dataset, "--json")
    assert result.exit_code == 2
    train, heldout = json.loads(result.stdout)
    assert [(problem["kind"], problem["shard"]) for problem in train["problems"]] == [(kind, shard) for shard in shards]
    assert all(named in problem["message"] for problem in train["problems"])
    assert (heldout["split"], heldout["problems"]) == ("heldout", [])
    shown = run("verify", dataset, "--repair")
    assert shown.exit_code == 2
    assert f"{kind}: " in shown.output
    if kind == "foreign":
        return  # Nothing is deleted that may be somebody's.
    assert actlake.open(dataset).missing_shards == [shard for shard in shards if shard is not None]
    assert run("verify", dataset).exit_code == 0


def test_a_sound_dataset_in_numbers(dataset: Path) -> None:
    train, heldout = json.loads(run("verify", dataset, "--json").stdout)
    assert (train["n_shards"], train["n_deep"], train["n_rows"], train["corpus"]) == (3, 3, 300, True)
    assert (train["problems"], heldout["problems"], train["missing_shards"]) == ([], [], [])
    assert "verify: train is whole: 3 shards" in run("verify", dataset).output
    assert "1 shards of them read whole" in run("verify", dataset, "--sample", "1%").output
    quick = run("verify", dataset, "--quick")
    assert (quick.exit_code, "0 shards of them read whole" in quick.output) == (0, True)


@pytest.mark.parametrize("share", ["0%", "101%", "2", "many", "nan"])
def test_a_sample_that_is_no_share(dataset: Path, share: str) -> None:
    result = run("verify", dataset, "--sample", share)
    assert result.exit_code == 2
    assert "is no share of the shards; write e.g. 1% or 0.01" in result.output


def test_a_corpus_that_is_gone_is_said_and_one_that_is_damaged_is_a_problem(dataset: Path) -> None:
    (corpus,) = (dataset.parent / "corpora").iterdir()
    (table,) = corpus.glob("sequences/train-*.parquet")
    data = bytearray(table.read_bytes())
    data[100] ^= 1
    table.write_bytes(bytes(data))
    damaged = run("verify", dataset, "--json")
    assert damaged.exit_code == 2
    train, _ = json.loads(damaged.stdout)
    assert [(problem["kind"], problem["shard"]) for problem in train["problems"]] == [("corpus", None)]
    assert not train["corpus"]
    shutil.rmtree(corpus)
    gone = run("verify", dataset)
    assert gone.exit_code == 0
    assert "the corpus was not checked, nor the rows against it" in gone.output
    refused = run("verify", dataset, "--rerun", "3")
    assert refused.exit_code == 2
    assert "--rerun needs the corpus" in refused.output


# --- through the model again ---


def test_what_only_the_model_can_tell(dataset: Path, tiny_model: Path) -> None:
    sound = run("verify", dataset, "--rerun", "40", "--model", tiny_model)
    assert sound.exit_code == 0, sound.output
    # One bit of one value, and every checksum and statistic made to agree.
    rows = stored(dataset, POINT, 1)
    rows.view(np.uint16)[9, 4] ^= 1
    moments = from_parquet(Store(dataset).read(stats_key(1)))
    moments[POINT] = of_shard(rows, numbers=np.arange(128, 256))
    rewrite(dataset, POINT, 1, rows, stats=store_statistics(dataset, 1, moments))
    assert run("verify", dataset).exit_code == 0
    result = run("verify", dataset, "--rerun", "300", "--model", tiny_model, "--repair", "--json")
    assert result.exit_code == 2
    train, heldout = json.loads(result.stdout)
    (problem,) = train["problems"]
    assert (problem["kind"], problem["shard"], problem["array"]) == ("rerun", 1, POINT)
    assert "1 of " in problem["message"]
    assert "the first is row 137" in problem["message"]
    assert heldout["problems"] == []
    assert actlake.open(dataset).missing_shards == [1]


def test_rows_of_another_machine_may_be_rounded_differently_but_not_be_others(dataset: Path, tiny_model: Path) -> None:
    store = Store(dataset)
    for shard in range(3):
        record = read_record(store, shard)
        commit(store, replace(record, provenance=replace(record.provenance, software={"torch": "another"})))
    rows = stored(dataset, POINT, 1)
    rows.view(np.uint16)[9, 4] ^= 1
    for changed, code in ((rows, 0), (rows[::-1], 2)):
        moments = from_parquet(store.read(stats_key(1)))
        moments[POINT] = of_shard(changed, numbers=np.arange(128, 256))
        rewrite(dataset, POINT, 1, changed, stats=store_statistics(dataset, 1, moments))
        result = run("verify", dataset, "--rerun", "300", "--model", tiny_model)
        assert result.exit_code == code, result.output


def test_a_model_that_is_not_the_datasets(dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    unnamed = run("verify", dataset, "--rerun", "3")
    assert unnamed.exit_code == 2
    assert "name it with --model FOLDER" in unnamed.output
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    refused = run("verify", dataset, "--rerun", "3", "--model", other)
    assert refused.exit_code == 2
    assert "name the model that made it with --model FOLDER" in refused.output


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_the_report_is_the_same(dataset: Path) -> None:
    flipped(dataset)
    of_another_dataset(dataset / "heldout" / "..")
    foreign(dataset)
    here, there = (run("verify", dataset, "--json", *options) for options in ((), ("--address", "auto")))
    assert here.exit_code == there.exit_code == 2
    assert json.loads(there.stdout) == json.loads(here.stdout)


# --- stats ---


def test_stats_are_those_of_the_rows(dataset: Path) -> None:
    shown = json.loads(run("stats", dataset, "--json").stdout)
    ds = actlake.open(dataset)
    assert list(shown["hook_points"]) == list(ds.hook_points)
    for point, found in shown["hook_points"].items():
        rows = ds[point][:].astype(np.float64)
        norms = np.sqrt((rows**2).sum(axis=1))
        assert (found["count"], found["n_nonfinite"], found["width"]) == (300, 0, rows.shape[1])
        assert found["norm_mean"] == pytest.approx(norms.mean(), rel=1e-9)
        assert found["norm_rms"] == pytest.approx((norms**2).mean() ** 0.5, rel=1e-9)
        assert found["unit_scale"] == pytest.approx((norms**2).mean() ** -0.5, rel=1e-9)
        assert found["sqrt_d_scale"] == pytest.approx(rows.shape[1] ** 0.5 / norms.mean(), rel=1e-9)
        assert found["median_norm"] == pytest.approx(np.median(norms), rel=0.01)
        assert found["outlier_rows"][0] == {"row": int(norms.argmax()), "norm": pytest.approx(norms.max(), rel=1e-9)}
        assert sum(found["norm_histogram"]["counts"]) == 300
        shares = (rows**2).mean(axis=0) / (rows**2).mean(axis=0).sum()
        assert [item["channel"] for item in found["outlier_channels"]] == [
            channel for channel in np.argsort(-shares).tolist() if shares[channel] >= 0.01
        ]
    from_rows = json.loads(run("stats", dataset, "--json", "--from-rows", "--point", "layers.1.*").stdout)
    assert from_rows["hook_points"] == {POINT: shown["hook_points"][POINT]}
    assert POINT in run("stats", dataset).output


def test_stats_of_an_earlier_actlake_say_how_to_get_the_rest(dataset: Path) -> None:
    moments = from_parquet(Store(dataset).read(stats_key(1)))
    old = {
        name: replace(found, n_nonfinite=None, norm_histogram=None, outlier_rows=None)
        for name, found in moments.items()
    }
    commit(Store(dataset), replace(read_record(Store(dataset), 1), stats=store_statistics(dataset, 1, old)))
    result = run("stats", dataset)
    assert result.exit_code == 0
    assert "--from-rows computes medians" in result.output
    assert json.loads(run("stats", dataset, "--json").stdout)["hook_points"][POINT]["median_norm"] is None


def test_stats_stores_a_covariance(dataset: Path) -> None:
    result = run("stats", dataset, "--covariance", "layers.1.*", "--rows", "64", "--seed", "2", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["covariance"].values()
    again = read_covariance(actlake.open(dataset), POINT)
    # Two chunks of 32 rows, or one of them and the last with 12.
    assert found["n_rows"] == again.n_rows
    assert again.n_rows in (44, 64)
    assert (found["seed"], found["effective_rank"]) == (2, again.effective_rank)
    assert run("verify", dataset).exit_code == 0
    shown = run("stats", dataset, "--covariance", POINT, "--rows", "300").output
    assert "covariance of 300 rows, effective rank" in shown
