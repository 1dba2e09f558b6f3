"""docs/format.md against the code: its tables, its JSON and its code blocks."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.ingest.batching import LONGEST_PACKED_ROW, PAD_MULTIPLE, SHORTEST_PACKED_ROW, plan_batches
from actlake.ingest.corpus import build_corpus
from actlake.ingest.corpus_windows import order_key, split_of
from actlake.shards.covariance import SCHEMA as COVARIANCE
from actlake.shards.covariance import covariance_key
from actlake.storage import corpus_files
from actlake.storage.arrays import ArraySpec, encode_shard
from actlake.storage.codecs import CNAMES, Codec
from actlake.storage.corpus_segments import Segment
from actlake.storage.corpus_spec import CorpusSpec, SourceFile, SplitInfo
from actlake.storage.header import Header
from actlake.storage.manifest import SCHEMA, Manifest, group_key, write_root
from actlake.storage.manifest_files import index_key
from actlake.storage.moments import Moments, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit_key, stats_key
from actlake.storage.rowspace import ROLES, KeepRule, block_places, content_hash, mix64
from actlake.storage.spec import FORMAT_VERSIONS, ROW_COLUMNS, DatasetSpec, PointSpec
from actlake.storage.stores import Store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/format.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).parent / "data/format-v1"


def block(info: str) -> str:
    """Return the one code block with that info string."""
    found = re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, info
    return str(found[0])


def table(heading: str) -> dict[str, str]:
    """Return the first table below a heading: the names in its first column, and its second column."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.MULTILINE)
    assert len(section) == 2, heading
    text = re.split(r"^#+ ", section[1], flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", text, flags=re.MULTILINE))


def names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def arrow(schema: pa.Schema) -> dict[str, str]:
    """Return names and types of a schema as the page writes them."""
    types = {field.name: str(field.type).replace("item: ", "").replace("element: ", "") for field in schema}
    return {
        name: re.sub(r"dictionary<values=(\w+), indices=(\w+), .*>", r"dictionary<\1, \2>", t)
        for name, t in types.items()
    }


# --- tables ---


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("`spec`", names_of(DatasetSpec)),
        ("`keep`", names_of(KeepRule)),
        ("`hook_points[]`", names_of(PointSpec)),
        ("`codec`", names_of(Codec)),
        ("`content`", [name for name in names_of(ShardRecord) if name not in ("revision", "provenance")]),
        ("`objects.*`, `stats`", names_of(ObjectRecord)),
        ("`provenance`", names_of(Provenance)),
        ("`corpus.json: spec`", names_of(CorpusSpec)),
        ("`corpus.json: splits.*`", names_of(SplitInfo)),
        ("`corpus.json: source_files[]`", names_of(SourceFile)),
        ("`corpus.json: segments[]`", list(Segment(segment_id="", sources=(), source_files=(), splits={}).to_json())),
    ],
)
def test_fields_are_those_of_the_code(heading: str, names: list[str]) -> None:
    assert list(table(heading)) == names


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("Manifest", SCHEMA),
        ("Statistics", pq.read_schema(pa.BufferReader(to_parquet({"x": Moments.empty(1)})))),
        ("Covariance", COVARIANCE),
        ("`sequences/*.parquet`", corpus_files.SEQUENCES),
        ("`vocab-*.parquet`", corpus_files.VOCABULARY),
        ("`quarantine-*.parquet`", corpus_files.QUARANTINE),
        ("`rows/*/*.parquet`", corpus_files.ROW_INDEX),
    ],
)
def test_columns_are_those_of_the_code(heading: str, schema: pa.Schema) -> None:
    assert table(heading) == arrow(schema)


def test_row_columns_are_those_of_the_code() -> None:
    assert table("`rows/*`") == ROW_COLUMNS


def test_roles_are_those_of_the_code() -> None:
    assert {name: int(code) for name, code in table("`role`").items()} == ROLES


def test_the_header_and_the_totals(tmp_path: Path, make_spec: Callable[..., DatasetSpec]) -> None:
    header = Header(spec=make_spec(), n_rows=150, corpus="../corpus")
    assert list(table("`spec.json`")) == list(json.loads(header.to_bytes()))
    store = Store(tmp_path)
    write_root(store, dataset_id="d", n_rows=1, manifest=Manifest.of([]), groups=[])
    assert set(table("`root.json`")) == set(json.loads(store.read("root.json")))


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id = 2

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % 50 + 3 for letter in one] for one in text]}

    def __len__(self) -> int:
        return 60

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return [str(i) for i in ids]


def test_the_corpus_header_and_keys(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / f"text/{i}.txt").write_text("some words " * (i + 1))
    spec = CorpusSpec(sources=(f"{tmp_path}/text/*.txt",), context_length=16, holdout=0.4, tokenizer="t")
    corpus = build_corpus(Store(tmp_path / "corpus"), spec, Letters())
    keep = KeepRule(exclude=(2,))
    corpus.row_index("train", keep)
    header = json.loads((tmp_path / "corpus/corpus.json").read_bytes())
    assert set(table("`corpus.json`")) == set(header)
    assert header["definition_id"] == spec.definition_id
    assert (header["sequences_per_file"], header["sequences_per_row_group"]) == (65_536, 1_024)
    keys = {str(path.relative_to(tmp_path / "corpus")) for path in (tmp_path / "corpus").rglob("*") if path.is_file()}
    patterns = table("Corpus")
    for key in keys:
        assert sum(bool(re.fullmatch(key_pattern(name), key)) for name in patterns) == 1, key
    assert f"rows/{keep.keep_id}/train.parquet" in keys


def key_pattern(text: str) -> str:
    """Return the regular expression of a key as the page writes it."""
    pattern = re.sub(r"<[^<>]*?(\d+) digits>", r"\0\1\0", text).replace("<name>", "\2")
    pattern = re.sub(r"<[^<>]*>", "\1", pattern)
    pattern = re.sub("\0(\\d+)\0", r"[0-9]{\1}", re.escape(pattern).replace("\\\0", "\0"))
    return pattern.replace("\1", "[^/]+").replace("\2", ".+")  # An array's name may be rows/role.


def test_every_stored_object_has_its_line() -> None:
    names = re.findall(
        r"`([^`]+)`", "\n".join(re.findall(r"^\| (`.+?) \|", PAGE.split("## Identities")[0], re.MULTILINE))
    )
    patterns = [key_pattern(name) for name in names if not name.endswith("/")]
    keys = [str(path.relative_to(GOLDEN)).removeprefix("heldout/") for path in GOLDEN.rglob("*") if path.is_file()]
    keys += [commit_key(5000), stats_key(5000), group_key(3), index_key(2, 65536), covariance_key("layers.0.mlp_in")]
    for key in keys:
        assert any(re.fullmatch(pattern, key) for pattern in patterns), key
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in keys), pattern


# --- identities and metadata ---


def test_the_example_is_the_golden_dataset() -> None:
    value = json.loads(block("json spec.json"))
    assert value == json.loads((GOLDEN / "spec.json").read_bytes())
    spec = DatasetSpec.from_json(value["spec"])
    # By the page's own words, without the code's.
    space = {name: value["spec"][name] for name in re.findall(r"`(\w+)`", row_of("Identities", "row_space_id"))}
    assert content_hash({"format_version": 1, "spec": value["spec"]}) == value["dataset_id"] == spec.dataset_id
    assert content_hash(space) == value["row_space_id"] == spec.row_space_id
    assert f"`keep_id` is `{content_hash(value['spec']['keep'])[:16]}`" in PAGE
    assert spec.keep.keep_id == content_hash(value["spec"]["keep"])[:16]


def row_of(heading: str, name: str) -> str:
    return table(heading)[name]


@pytest.mark.parametrize("name", ["layers.0.resid_post", "rows/role"])
def test_the_array_metadata(name: str, make_spec: Callable[..., DatasetSpec]) -> None:
    assert json.loads(block(f"json {name}")) == make_spec().arrays()[name].zarr_json(150)


def test_the_versions_and_constants() -> None:
    assert f"# The format, version {FORMAT_VERSIONS[-1]}\n" in PAGE
    for version in FORMAT_VERSIONS:
        assert f"| {version} | dataset |" in PAGE
    assert ", ".join(f"`{name}`" for name in CNAMES[:-1]) + f" or `{CNAMES[-1]}`" in PAGE
    assert f"a multiple of {PAD_MULTIPLE} tokens" in PAGE
    assert f"more than {LONGEST_PACKED_ROW} tokens" in PAGE
    assert f"{SHORTEST_PACKED_ROW} tokens at least" in PAGE


# --- arithmetic ---


def test_the_known_answers_are_those_of_the_page_and_of_the_code() -> None:
    answers = json.loads(block("json known answers"))
    page: dict[str, Any] = {}
    exec(compile(block("python permutation"), "docs/format.md", "exec"), page)
    for x, expected in answers["mix"].items():
        assert page["mix"](int(x)) == int(mix64(np.uint64(int(x)))) == expected
    for case in answers["block_places"]:
        places = case.pop("places")
        assert page["block_places"](**case) == block_places(**case).tolist() == places
    for seed, number, n in ((3, 5, 100), (2**63, 0, 33)):
        assert page["block_places"](seed, number, n) == block_places(seed, number, n).tolist()


def test_the_corpus_answers_are_those_of_the_code() -> None:
    answers = json.loads(block("json corpus known answers"))
    for case in answers["order"]:
        assert order_key(case["seed"], case["document"], case["window"]) == case["key"]
    for case in answers["holdout"]:
        share = case["hash"] / 2**64
        assert split_of(case["seed"], share * (1 + 1e-9), case["document"]) == "heldout"
        assert split_of(case["seed"], share * (1 - 1e-9), case["document"]) == "train"


def test_batches_follow_the_pages_words() -> None:
    lengths = [7, 130, 64, 65, 130, 1, 64, 200]
    batches = [(batch.members, batch.n_tokens) for batch in plan_batches(lengths, 400, 4096)]
    assert batches == [((7,), 256), ((1, 4), 192), ((3, 2, 6), 128), ((0, 5), 64)]
    batches = [(batch.members, batch.n_tokens) for batch in plan_batches(lengths, 400, 200)]
    assert batches == [((7, 1), 200), ((4, 3), 192), ((2, 6, 0, 5), 64)]
    lengths = [7, 130, 600, 65, 300, 1, 64, 180, 513, 130]
    assert [(batch.rows, batch.n_tokens) for batch in plan_batches(lengths, 640, 4096, "packed")] == [
        (((2,),), 640),
        (((8,),), 576),
        (((4, 0, 5), (7, 1)), 320),
        (((9, 3), (6,)), 256),
    ]


def test_a_shards_statistics_are_folded_as_the_page_says() -> None:
    # Sums that are not exact, so that another order of adding shows.
    rows = np.sin(np.arange(7500, dtype=np.float32)).reshape(2500, 3)
    numbers = np.arange(2500)
    a, b, c = (Moments.of(rows[i : i + 1024], numbers[i : i + 1024]) for i in (0, 1024, 2048))
    assert to_parquet({"x": of_shard(rows)}) == to_parquet({"x": a.merge(b).merge(c)})


# --- the snippet ---


def test_the_bfloat16_snippet_runs_without_actlake(tmp_path: Path, make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    snippet = block("python bfloat16")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 30
    array = ArraySpec(
        name="layers.0.resid_post", dtype="bfloat16", width=8, rows_per_shard=64, rows_per_chunk=16, codec=Codec()
    )
    rows, store = make_rows(50, 8), Store(tmp_path / "demo")
    store.write(f"arrays/{array.name}/zarr.json", json.dumps(array.zarr_json(50)).encode())
    store.write(array.object_key(0), *encode_shard(array, rows).parts)
    check = "\nimport sys\nassert not [name for name in sys.modules if name.startswith('actlake')]"
    show = "\nprint(rows.dtype, rows.shape, rows.tobytes().hex())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet + check + show],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout == f"bfloat16 (50, 8) {rows.tobytes().hex()}\n"
