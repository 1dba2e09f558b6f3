"""The benchmarks run, and what they compare is what they say: tiny sizes, no assertion about speed."""

import importlib
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_batching
import bench_corpus
import bench_end_to_end
import bench_flips
import bench_gpu
import bench_ingest
import bench_manifest
import bench_reader_memory
import bench_reader_remote
import bench_rivals
import bench_scale
import bench_shuffle
import bench_store
import bench_stream
import gpu_capture
import gpu_model
import harness
import numpy as np
import pytest
import tiny_gemma
import torch
from decoding import decode_files, decode_memory, stored_chunks
from formula_dataset import BOTH, NARROW, WIDE, Made, bits, make_spec
from rivals import Rival, Settings
from rivals.common import mixed
from tiling import pick_points, tile, write_raw, write_repeated

import actlake
from actlake.shards.verify import verify
from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError

SCRIPTS = (
    bench_batching,
    bench_corpus,
    bench_end_to_end,
    bench_flips,
    bench_gpu,
    bench_ingest,
    bench_reader_memory,
    bench_reader_remote,
    bench_rivals,
    bench_scale,
    bench_shuffle,
    bench_store,
    bench_stream,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(tmp_path_factory.mktemp("source") / "ds"), 868).build_all()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Return a function that runs a benchmark as its command would, and returns its tables."""

    def run(script: Any, *arguments: object) -> dict[str, list[dict[str, Any]]]:
        file = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments), "--json", str(file)])
        script.main()
        tables: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["tables"]
        return tables

    return run


# --- the harness ---


def test_a_table_is_markdown_with_three_significant_digits() -> None:
    rows = [{"name": "a", "x": 0.123456, "n": 12_345}, {"name": "b", "x": 1234.5, "n": None}]
    assert harness.markdown(rows).splitlines() == [
        "| name | x | n |",
        "| --- | --- | --- |",
        "| a | 0.123 | 12,345 |",
        "| b | 1234 | - |",
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.__name__))
def test_every_script_explains_itself(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.parse(["--help"])
    assert ended.value.code == 0
    assert script.__doc__.splitlines()[0] in capsys.readouterr().out


def test_cpu_time_counts_living_children() -> None:
    before = harness.tree_cpu_s()
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert harness.tree_cpu_s(process.pid) >= 0.28
        assert harness.tree_cpu_s() - before >= 0.28
    finally:
        process.kill()
        process.communicate()


def test_a_child_returns_its_result_or_its_error(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys\nprint('RESULT [1, 2]') if sys.argv[1] == 'good' else sys.exit('broken')")
    assert harness.run_child(str(script), ["good"]) == [1, 2]
    with pytest.raises(RuntimeError, match="ended with 1:\nbroken"):
        harness.run_child(str(script), ["bad"])


# --- datasets ---


def test_a_tiled_dataset_repeats_the_rows_with_other_sequences(source: Made, tmp_path: Path) -> None:
    ds = source.open()
    made = tile(ds, tmp_path / "tiled", 2000, BOTH, codec=Codec(name="none"), rows_per_shard=512)
    report = verify(made)
    assert (report.problems, report.n_rows, made.n_rows) == ((), 2000, 2000)
    for name in BOTH:
        assert np.array_equal(bits(made[name][:]), bits(np.concatenate([ds[name][:]] * 3)[:2000]))
    sequence, position = made["rows/sequence"][:], made["rows/position"][:]
    assert len(set(zip(sequence.tolist(), position.tolist(), strict=True))) == 2000


def test_a_tiled_dataset_can_be_permuted_in_smaller_blocks(source: Made, tmp_path: Path) -> None:
    ds = source.open()
    made = tile(ds, tmp_path / "tiled", ds.n_rows, [WIDE], rows_per_shard=64, by_row=True)
    assert verify(made).problems == ()
    place = made["rows/sequence"][:] * 97 + made["rows/position"][:]
    # Rows of a block are those that follow one another in the corpus, in another order.
    for start in range(0, 868, 64):
        assert sorted(place[start : start + 64]) == list(range(start, min(start + 64, 868)))
    assert list(place[:64]) != sorted(place[:64])


def test_repeated_shards_have_whole_sequences(tmp_path: Path) -> None:
    ds = write_repeated(tmp_path / "ds", make_spec(hook_points=make_spec().hook_points[:1]), 4, rows_per_sequence=100)
    assert np.bincount(ds["rows/sequence"][:]).tolist() == [100] * 10 + [24]
    assert np.array_equal(bits(ds[NARROW][:256]), bits(ds[NARROW][256:512]))


def test_the_raw_file_has_the_same_bits(source: Made, tmp_path: Path) -> None:
    ds = source.open()
    assert np.array_equal(write_raw(ds, WIDE, tmp_path / "raw"), bits(ds[WIDE][:]))


def test_points_of_one_width_are_picked(source: Made) -> None:
    assert pick_points(source.open(), 4) == [NARROW]
    assert pick_points(source.open(), 4, WIDE) == [WIDE]


# --- decoding ---


def test_the_yardstick_decodes_and_checks_every_chunk(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), 868).build_all()
    ds = made.open()
    chunks = stored_chunks(ds, BOTH)
    # 868 rows in shards of 256: 64 and 32 rows a chunk.
    assert [sum(c.array.name == name for c in chunks) for name in BOTH] == [14, 28]
    assert decode_files(ds, chunks).gb_per_s > 0
    last = chunks[-1]
    made.flip(WIDE, 3, last.offset + last.length // 2)
    for decode in (decode_files, decode_memory):
        with pytest.raises(CorruptObjectError):
            decode(ds, chunks)


# --- bench_stream ---


def test_bench_stream_measures_every_mode(source: Made, run: Callable[..., Any]) -> None:
    tables = run(
        bench_stream, source.url, "--point", WIDE, "--batch-size", 32, "--make", 0.0001, "--repeats", 2,
        "--only", "modes", "--only", "first", "--only", "none",
    )  # fmt: skip
    modes = [row["mode"] for row in tables["Streaming over pure decoding"]]
    assert modes == ["default", "buffer of 65,536 rows", "direct", "default, row columns"]
    assert all(row["stream / decode"] > 0 for row in tables["Streaming over pure decoding"])
    assert tables["The first batch"][0]["ratio"] > 0
    assert len(tables["Codec none, from the page cache"]) == 5


@pytest.mark.slow
def test_bench_stream_deals_every_row_to_some_rank(source: Made) -> None:
    options = bench_stream.parse([source.url, "--ranks", "2", "--repeats", "1", "--epochs", "1", "--batch-size", "31"])
    rows = bench_stream.bench_ranks(source.open(), WIDE, options)
    assert [(row["cores"], row["ranks"]) for row in rows] == [(n, 2) for n in sorted({1, harness.n_cores()})]
    assert all(row["GB/s, all ranks"] > 0 for row in rows)


# --- bench_batching ---


def test_bench_batching_counts_padding_and_runs_both(tmp_path: Path, run: Callable[..., Any]) -> None:
    model = tiny_gemma.save(tmp_path / "model")
    tables = run(
        bench_batching, "--model", model, "--context", 64, "--tokens", 200, "--repeats", 2, "--shards", 500, 5000,
    )  # fmt: skip
    counted, timed = tables.values()
    assert [(row["documents"], row["padded"], row["packed"], row["auto"]) for row in counted[-2:]] == [
        ("full windows", "0.0%", "0.0%", "padded")
    ] * 2
    assert all(float(row["packed"][:-1]) <= float(row["padded"][:-1]) for row in counted)
    assert [row["documents"] for row in timed] == ["reference and descriptions", "web", "chats", "full windows"]
    assert all(row["lowest"] <= row["packed / padded"] <= row["highest"] for row in timed)


# --- bench_gpu ---

#: Installed beside actlake, but not on a machine that has only torch and transformers.
ABSENT_THERE = ("ray", "zarr", "typer", "rich", "gguf", "duckdb", "obstore", "gcsfs", "s3fs", "adlfs", "accelerate")
RUN_BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent!r}))
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, {folder!r})
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_bench_gpu_runs_with_little_more_than_torch_and_transformers(tmp_path: Path) -> None:
    script, file = Path(bench_gpu.__file__), tmp_path / "found.json"
    code = RUN_BARE.format(absent=ABSENT_THERE, folder=str(script.parent))
    options = "--device cpu --shapes tiny --context 64 --max-rows 512 --minutes 0.02 --memory 1GiB --threads 2"
    command = [sys.executable, "-c", code, str(script), *options.split(), "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    tables = json.loads(file.read_text())["tables"]
    assert list(tables) == ["Machine", "Gemma 3 tiny alone", "Gemma 3 tiny captured"]
    rows = tables["Gemma 3 tiny captured"]
    selections = ("1 point", "4 streams x 4 layers", "4 streams x all layers")
    expected = list(itertools.product(selections, ("none", "blosc"), ("null", "disk")))
    assert [(row["hook points"], row["codec"], row["to"]) for row in rows] == expected
    assert all(
        row["shards"] >= 2 and row["of slowest"] > 0 and min(row["forward, s"], row["copy, s"]) > 0 for row in rows
    )
    assert all((row["raw / stored"] > 1.1) == (row["codec"] == "blosc") for row in rows)
    # Nothing is left beside the file.
    assert list(tmp_path.iterdir()) == [file]


def test_bench_gpu_says_how_to_bring_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(bench_gpu, "PACKAGES", ("json", "brought", "missing"))
    (tmp_path / "brought.py").write_text("")
    with pytest.raises(SystemExit, match=r"not installed here: missing\. .*pip install --target FOLDER .* missing;"):
        bench_gpu.require_packages(tmp_path)
    with pytest.raises(SystemExit, match="no such folder"):
        bench_gpu.require_packages(tmp_path / "other")


@pytest.mark.slow
def test_bench_ingest_compares_the_same_batches_and_names_its_bound(
    run: Callable[..., dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    tiny_gemma.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{4 + i * 7 % 90}" for i in range(1000)))
    sizes = ("--rows", 128, "--shards", 3, "--repeats", 1, "--context", 32, "--batch-tokens", 256)
    places = ("--model", tmp_path / "model", "--source", tmp_path / "text.txt")
    tables = run(bench_ingest, *sizes, *places, "--only", "layer")
    (speed,), (parts,), (memory,) = tables.values()
    # 4 streams of a layer: 256 numbers of attention and three residuals of 48, two bytes each, but not of BOS rows.
    assert 0.7 * 2 * (256 + 3 * 48) < 1000 * speed["kB a token"] < 2 * (256 + 3 * 48) + 17
    assert speed["ratio"] > 0
    assert 0 < speed["bound"] < 1
    assert speed["of the bound"] == pytest.approx(speed["ratio"] / speed["bound"])
    assert all(parts[name] > 0 for name in ("forward", *bench_ingest.PARTS))
    assert memory["peak RSS GB"] > memory["shard GB"]
    assert memory["planned GB"] > 2 * memory["shard GB"]


def test_flops_count_the_linear_layers_and_the_keys_seen() -> None:
    size = gpu_model.SIZES["tiny"]
    text = gpu_model.random_model(size, "cpu").text
    n_weights = sum(module.weight.numel() for module in text.modules() if isinstance(module, torch.nn.Linear))
    # 64 heads' channels in each of 4 layers; a sequence of 3 tokens sees 1, 2 and 3 keys.
    assert gpu_model.flops_per_token(size, 3) == 2 * n_weights + 4 * 64 * 4 * 2
    # 22 of 26 layers see no more than 512 tokens.
    in_window = (512 * 513 / 2 + 1536 * 512) / 2048
    larger = gpu_model.SIZES["1b"]
    more = gpu_model.flops_per_token(larger, 2048) - gpu_model.flops_per_token(larger, 1)
    assert more == pytest.approx(4 * 1024 * (4 * (2049 / 2 - 1) + 22 * (in_window - 1)))


def test_a_null_store_keeps_metadata_alone(tmp_path: Path) -> None:
    store = gpu_capture.NullStore(tmp_path)
    for key in ("arrays/layers.0.resid_post/c/0/0", "arrays/rows/role/c/0", "stats/0000000000.parquet"):
        store.write(key, b"bytes")
    store.write("arrays/layers.0.resid_post/zarr.json", b"{}")
    store.write("spec.json", b"{}")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["spec.json", "zarr.json"]


def test_a_capture_that_fails_ends_its_driver(tmp_path: Path) -> None:
    class Failing:
        store = gpu_capture.NullStore(tmp_path)

        def build(self, shard: int) -> None:
            raise ValueError("planted")

    builder: Any = Failing()
    with pytest.raises(ValueError, match="planted"):
        gpu_capture.Driver(builder, seconds=3600).run()


# --- bench_shuffle ---


def test_the_ideal_is_the_mean_over_all_draws() -> None:
    lengths = np.array([3, 1, 2, 4])
    rows = np.repeat(np.arange(4), lengths)
    draws = [len(set(rows[list(draw)])) for draw in itertools.combinations(range(10), 4)]
    assert bench_shuffle.ideal_distinct(lengths, 4) == pytest.approx(sum(draws) / math.comb(10, 4))
    # More rows are drawn than others there are: none is missed.
    assert bench_shuffle.ideal_distinct(lengths, 10) == pytest.approx(4)


def test_equal_batches_are_correlated_and_opposite_ones_the_other_way() -> None:
    lengths = np.array([4, 4, 4, 4])
    some, others = np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])
    same = bench_shuffle.mixing(iter([some, some, some]), lengths, 4)
    assert same.distinct == 2
    assert same.correlation == pytest.approx(1)
    assert bench_shuffle.mixing(iter([some, others]), lengths, 4).correlation == pytest.approx(-1)


def test_bench_shuffle_compares_buffers(run: Callable[..., Any]) -> None:
    rows = run(
        bench_shuffle, "--only", "mixing", "--shards", 4, "--rows-per-shard", 4096, "--sequence", 128,
        "--batch-size", 64, "--buffers", 2048, "--batches", 12,
    )["Mixing"]  # fmt: skip
    found = {row["buffer"]: row["over the ideal"] for row in rows}
    assert list(found) == ["default, 1 GiB", "none (direct)", "2,048 rows", "true global shuffle"]
    # 4 shuffle blocks: the whole dataset mixes as well as a true shuffle, one chunk has the rows of one block.
    assert found["default, 1 GiB"] > 0.9
    assert found["true global shuffle"] > 0.9
    assert found["none (direct)"] < found["default, 1 GiB"]


def test_bench_shuffle_trains_and_draws(tmp_path: Path, run: Callable[..., Any]) -> None:
    shape = {"rows_per_shard": 1024, "rows_per_block": 512}
    Made(str(tmp_path / "data"), 2000, make_spec(**shape)).build_all()
    Made(str(tmp_path / "data/heldout"), 100, make_spec(**shape, split="heldout")).build_all()
    rows = run(
        bench_shuffle, tmp_path / "data", "--only", "training", "--point", WIDE, "--seeds", 2, "--steps", 3,
        "--latents", 16, "--block", 256, "--sae-batch-size", 128, "--plot", tmp_path / "img/plot.svg",
    )["Loss after the same steps"]  # fmt: skip
    assert len(rows) == 5
    assert rows[0]["over the global shuffle"] == "1.000"
    assert (tmp_path / "img/plot.svg").read_text().count("<svg") == 1


# --- memory ---


@pytest.mark.slow
def test_bench_reader_memory_says_what_passes_the_buffer(run: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(
            bench_reader_memory, "--points", 2, "--buffer", "128MiB", "--times", 2, "--width", 256,
            "--batch-size", 1024, "--rows-per-shard", 4096,
        )  # fmt: skip
    assert ended.value.code == 0


def test_bench_reader_memory_fails_where_memory_does_not_suffice(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"hook points": 36, "peak, MiB": 600.1, "allowed, MiB": 600.0}
    monkeypatch.setattr(bench_reader_memory, "measure", lambda *_: row)
    with pytest.raises(SystemExit, match="36 hook points: over what is allowed"):
        run(bench_reader_memory)


# --- many shards ---


@pytest.mark.usefixtures("ray_cluster")
def test_bench_scale_measures_every_phase(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    # The actors have no path to the benchmarks.
    for module in (bench_scale, bench_manifest):
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    (tmp_path / "at").mkdir()
    left: list[Any] = []

    def in_this_process(script: str, words: Sequence[object]) -> Any:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        bench_scale.main()
        return left.pop()

    monkeypatch.setattr(harness, "run_child", in_this_process)
    monkeypatch.setattr(harness, "leave_result", left.append)
    rows = run(
        bench_scale, "--sizes", "1.1k", "3.1k", "--points", 1, "--handed", 1100, "--at", tmp_path / "at"
    )["Shards by the million"]  # fmt: skip
    counted = {(row["phase"], row["shards"]): row["handed out, or missing"] for row in rows}
    assert counted == {
        **{(phase, 1100): 1100 for phase in ("plan", "dispatch", "commit", "compact", "finish")},
        **{(phase, 3100): 1100 for phase in ("dispatch", "commit", "compact")},
        # A finished dataset, and one of which a killed run left a group and 1,023 shards of the next.
        ("plan", 3100): 3100,
        ("finish", 3100): 3100,
        ("resume", 1100): 550,
        ("resume", 3100): 3100 - 1024 - 1023,
        **{("resume-every-second", size): size // 2 for size in (1100, 3100)},
    }
    assert list((tmp_path / "at").iterdir()) == []


# --- corpora ---


def test_bench_corpus_writes_the_text_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_corpus, "FILE_NBYTES", 20_000)
    bench_corpus.write_text(tmp_path / "in", 50_000, 1_000)
    texts = list(bench_corpus.texts(tmp_path))
    assert 50_000 <= sum(len(text.encode()) for text in texts) < 60_000
    assert len(set(texts)) == len(texts)
    assert len(list((tmp_path / "in").iterdir())) == 3


# --- object stores ---


@pytest.fixture
def echo() -> Iterator[int]:
    """Run a server that answers every message with itself; give its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(timeout=10)


def test_the_proxy_holds_back_requests_and_keeps_the_bytes(echo: int) -> None:
    message = os.urandom(50_000)
    with (
        bench_reader_remote.delayed(echo, 50) as (port, pids),
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        assert len(pids) == 1
        for _ in range(3):
            started = time.perf_counter()
            client.sendall(message)
            got = b""
            while len(got) < len(message):
                got += client.recv(1 << 16)
            assert got == message
            assert time.perf_counter() - started >= 0.05


def test_bench_reader_remote_refuses_what_its_server_cannot_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for stores in ([], ["--store", "gs"]):
        with pytest.raises(SystemExit):
            bench_reader_remote.parse(["--client", "obstore", *stores])
        assert "give --latency 0" in capsys.readouterr().err
    assert bench_reader_remote.parse(["--client", "obstore", "--store", "s3"]).latency == [0, 20]
    assert bench_reader_remote.parse(["--client", "obstore", "--latency", "0"]).store is None


@pytest.mark.slow
@pytest.mark.parametrize("store", ["gs", "s3"])
def test_bench_reader_remote_streams_from_an_emulator(source: Made, store: str, run: Callable[..., Any]) -> None:
    rows = run(
        bench_reader_remote, source.url, "--point", WIDE, "--gb", 0.00005, "--store", store, "--latency", 0, 20,
        "--repeats", 1,
    )["Streams from object stores"]  # fmt: skip
    assert [row["latency, ms"] for row in rows] == ["0", "20"]
    assert all(row["stream / bound"] > 0 for row in rows)


# --- rivals ---


@pytest.mark.parametrize("module", ["memmap", "safetensors_shuffle", "pt_files", "hf_datasets"])
def test_a_rival_delivers_the_rows_of_the_source(module: str, tmp_path: Path) -> None:
    rival: Rival = importlib.import_module(f"rivals.{module}")
    rows = np.arange(2 * 8192 * 4, dtype=np.uint16).reshape(-1, 4)
    rival.prepare(rows, tmp_path)
    batches = rival.batches(tmp_path, Settings(width=4, batch_size=512, mixing_rows=8192, n_workers=1))
    # More than an epoch.
    for batch in itertools.islice(batches, 40):
        assert batch.dtype == torch.bfloat16
        bench_rivals.check_batch(batch, rows, 512)


def test_a_batch_of_other_rows_is_noticed() -> None:
    rows = np.arange(64, dtype=np.uint16).reshape(-1, 4)
    batch = torch.from_numpy(rows[:8].view(np.int16).copy()).view(torch.bfloat16)
    bench_rivals.check_batch(batch, rows, 8)
    batch.view(torch.int16)[3, 2] += 1
    with pytest.raises(AssertionError, match="1 of 8 rows are not of the source"):
        bench_rivals.check_batch(batch, rows, 8)


def test_mixing_in_memory_loses_and_repeats_no_row() -> None:
    blocks = torch.arange(700).reshape(7, 100, 1)
    batches = list(mixed(blocks, mixing_rows=250, batch_size=64))
    found = torch.cat(batches).flatten().tolist()
    assert {len(batch) for batch in batches} == {64}
    assert len(set(found)) == len(found) == 9 * 64
    assert found != sorted(found)


def test_bench_rivals_measures_actlake_and_a_file_by_hand(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process: each child would import torch again.
    monkeypatch.setattr(
        bench_rivals, "run_child", lambda _, words: bench_rivals.answer(bench_rivals.parse(list(map(str, words))))
    )
    spec = make_spec(rows_per_shard=4096, rows_per_block=4096)
    source = Made(str(tmp_path / "ds"), 8192, spec).build_all()
    rows = run(
        bench_rivals, source.url, "--point", WIDE, "--rows", 8192, "--seconds", 0.2, "--rounds", 1, "--only", "memmap",
        "--only", "actlake", "--batch-size", 256, "--mixing-rows", 2048,
    )["Readers of the same activations"]  # fmt: skip
    assert [row["reader"] for row in rows] == ["actlake", "actlake, direct", "np.memmap gather, by hand"]
    assert rows[2]["stored bytes / raw"] == 1
    assert all(row["GB/s"] > 0 for row in rows)


# --- end to end ---


def totals(saes: Sequence[int], once: float, each: float, live: float) -> dict[str, Any]:
    first = {"live": {"s": 0.0}, "cache": {"s": 0.0}, "actlake": {"s": once}}
    later: dict[str, list[Any]] = {
        "live": [{"s": live}],
        "cache": [{"s": live}],
        "actlake": [{"s": each - 1}, {"s": each + 1}],
    }
    return dict(bench_end_to_end._totals(first, later, "s", saes)[-1])


def test_totals_are_once_and_each_and_break_even_where_live_costs_as_much() -> None:
    found = totals([1, 4], once=60, each=10, live=40)
    assert (found["1 SAEs"], found["4 SAEs"]) == (70, 100)
    assert found["live over it"] == "0.57x, 1.60x"
    assert found["breaks even with live after"] == "2.00 SAEs"
    assert totals([1], once=60, each=50, live=40)["breaks even with live after"] == "never"


def test_no_step_is_an_error() -> None:
    options = bench_end_to_end.parse(["--batch-size", "64", "--mixing-rows", "100"])
    assert bench_end_to_end.n_steps(228, options) == 2
    with pytest.raises(ValueError, match="163 rows make no step of 64 rows"):
        bench_end_to_end.n_steps(163, options)


def test_the_names_of_readers_are_modules() -> None:
    found = {path.stem for path in (Path(bench_rivals.__file__).parent / "rivals").glob("*.py")}
    assert set(bench_rivals.RIVALS.values()) | set(bench_rivals.BY_ROW.values()) == found - {"__init__", "common"}
    assert actlake.__version__
