"""What we write, others read without us, and the other way round."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.dtype import data_type_registry

from actlake.storage.arrays import ArraySpec, ShardIndex, decode_chunk, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError
from actlake.storage.zarr_dtype import BFloat16

MakeRows = Callable[..., npt.NDArray[Any]]
N_ROWS = 150  # Two whole shards of 64 and a short one, whose last chunk of 16 is padded.
ARRAYS = {
    f"{name}-{codec.name}": ArraySpec(
        name=name, dtype=dtype, width=width, rows_per_shard=64, rows_per_chunk=16, codec=codec
    )
    for name, dtype, width in (
        ("layers.0.resid_post", "bfloat16", 24),
        ("layers.0.mlp_out", "float32", 24),
        ("rows/token_id", "int32", None),
        ("rows/position", "int32", None),
        ("rows/sequence", "int64", None),
        ("rows/role", "uint8", None),
    )
    for codec in (Codec(), Codec(name="none"))
}


@dataclass
class Stored:
    """An array on disk: its folder and the rows that it must read as."""

    array: ArraySpec
    folder: Path
    rows: npt.NDArray[Any]

    @property
    def root(self) -> Path:
        return self.folder.parents[self.array.name.count("/") + 1]

    @property
    def bits(self) -> bytes:
        return self.rows.tobytes()


@pytest.fixture(params=ARRAYS)
def stored(request: pytest.FixtureRequest, tmp_path: Path, make_rows: MakeRows) -> Stored:
    array = ARRAYS[request.param]
    rows = make_rows(N_ROWS, array.width, array.dtype)
    rows[16:32] = 0  # A chunk of zeros, which some writers would leave out.
    folder = tmp_path / "arrays" / array.name
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(array.zarr_json(N_ROWS)))
    for shard in range(3):
        path = tmp_path / array.object_key(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(encode_shard(array, rows[shard * 64 : (shard + 1) * 64]).parts))
    return Stored(array, folder, rows)


def test_zarr_python_reads_equal_bits(stored: Stored) -> None:
    found = zarr.open_array(stored.folder, mode="r")
    assert found.dtype == stored.rows.dtype
    assert np.asarray(found[:]).tobytes() == stored.bits
    assert np.asarray(found[60:70]).tobytes() == stored.rows[60:70].tobytes()


def test_zarrs_reads_equal_bits(stored: Stored) -> None:
    rows, metadata = stored.rows, stored.array.zarr_json(N_ROWS)
    if stored.array.dtype == "bfloat16":
        # zarrs 0.2 hands numpy's extension types back to zarr-python (the next test); so here the bits as integers.
        rows, metadata = rows.view("<u2"), metadata | {"data_type": "uint16", "fill_value": 0}
        (stored.folder / "zarr.json").write_text(json.dumps(metadata))
    # Strict: no falling back on zarr-python's own codecs.
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        found = zarr.open_array(stored.folder, mode="r")
        assert type(found._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        assert np.asarray(found[:]).tobytes() == stored.bits
        assert np.asarray(found[60:70]).tobytes() == rows[60:70].tobytes()


def test_the_zarrs_pipeline_reads_equal_values(stored: Stored) -> None:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        found = zarr.open_array(stored.folder, mode="r")
        assert found.dtype == stored.rows.dtype
        assert np.asarray(found[:]).tobytes() == stored.bits


def test_tensorstore_reads_equal_bits(stored: Stored) -> None:
    place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{stored.folder}/"}}
    found = tensorstore.open(place, read=True, open=True).result()
    assert found.dtype.name == stored.array.dtype
    assert found.read().result().tobytes() == stored.bits
    assert found[60:70].read().result().tobytes() == stored.rows[60:70].tobytes()


def rewrite(stored: Stored, *, with_empty_chunks: bool) -> list[bytes]:
    """Let zarr-python write the array anew; return its shard objects."""
    shutil.rmtree(stored.folder / "c")
    with zarr.config.set({"array.write_empty_chunks": with_empty_chunks}):
        zarr.open_array(stored.folder, mode="r+")[:] = stored.rows
    return [(stored.root / stored.array.object_key(shard)).read_bytes() for shard in range(3)]


def test_what_zarr_python_writes_decodes_here(stored: Stored) -> None:
    array = stored.array
    for shard, data in enumerate(rewrite(stored, with_empty_chunks=True)):
        rows = stored.rows[shard * 64 : (shard + 1) * 64]
        index = ShardIndex.parse(array, data[-array.index_nbytes :], len(rows), len(data), "w")
        for start in range(0, len(rows), 16):
            offset, length = int(index.offsets[start // 16]), int(index.lengths[start // 16])
            out = np.full(array.shape(16), 9, dtype=array.numpy_dtype)
            decode_chunk(array, data[offset : offset + length], out, "w")
            part = rows[start : start + 16]
            assert out[: len(part)].tobytes() == part.tobytes()


def test_a_chunk_that_others_leave_out_is_no_chunk_here(stored: Stored) -> None:
    array, data = stored.array, rewrite(stored, with_empty_chunks=False)[0]
    assert np.asarray(zarr.open_array(stored.folder, mode="r")[:]).tobytes() == stored.bits
    with pytest.raises(CorruptObjectError, match="w, chunk 1: absent"):
        ShardIndex.parse(array, data[-array.index_nbytes :], 64, len(data), "w")


def test_the_metadata_is_what_zarr_would_write(stored: Stored) -> None:
    parsed = zarr.open_array(stored.folder, mode="r").metadata
    written = json.loads(parsed.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes())
    # Optional in the specification, and empty.
    assert written.pop("storage_transformers") == []
    assert written == stored.array.zarr_json(N_ROWS)


def test_a_dataset_is_a_zarr_group(tmp_path: Path, stored: Stored) -> None:
    (tmp_path / "arrays/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    group = zarr.open_group(tmp_path / "arrays", mode="r")
    array = group[stored.array.name]
    assert isinstance(array, zarr.Array)
    assert array.shape == stored.rows.shape


# --- bfloat16 for zarr-python ---


def test_the_entry_point_leads_to_our_type() -> None:
    found = [entry for entry in entry_points(group="zarr.data_type") if entry.name == "bfloat16"]
    assert [entry.load() for entry in found] == [BFloat16]


def test_importing_the_module_is_enough(tmp_path: Path) -> None:
    array = ARRAYS["layers.0.resid_post-blosc"]
    (tmp_path / "zarr.json").write_text(json.dumps(array.zarr_json(N_ROWS)))
    code = f"import zarr, actlake.storage.zarr_dtype; print(zarr.open_array({str(tmp_path)!r}, mode='r').dtype)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "bfloat16\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, 1.5), (float("nan"), "NaN"), (float("inf"), "Infinity"), (float("-inf"), "-Infinity"), (0, 0.0)],
)
def test_fill_values_go_through_json(value: float, text: object) -> None:
    kind = BFloat16()
    scalar = kind.cast_scalar(value)
    assert kind.to_json_scalar(scalar, zarr_format=3) == text
    assert kind.from_json_scalar(text, zarr_format=3).tobytes() == scalar.tobytes()


def test_fill_values_may_be_bits() -> None:
    # 0x3fc0 is 1.5: the upper half of the float32 0x3fc00000.
    assert BFloat16().from_json_scalar("0x3fc0", zarr_format=3) == ml_dtypes.bfloat16(1.5)


def test_the_type_is_found_by_name_and_by_dtype() -> None:
    assert data_type_registry.match_json("bfloat16", zarr_format=3) == BFloat16()
    assert data_type_registry.match_dtype(np.dtype(ml_dtypes.bfloat16)) == BFloat16()
    assert data_type_registry.match_dtype(np.dtype(np.float16)) != BFloat16()


def test_zarr_creates_such_arrays_too(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows(20, 3)
    made = zarr.create_array(tmp_path / "x", shape=(20, 3), chunks=(8, 3), dtype=rows.dtype)
    made[:] = rows
    assert np.asarray(zarr.open_array(tmp_path / "x", mode="r")[:]).tobytes() == rows.tobytes()
