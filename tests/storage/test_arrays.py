import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.arrays import ArraySpec, ShardIndex, ShardObject, chunk_rows, crc32c, decode_chunk, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError

ABSENT = 2**64 - 1
COLUMNS: list[tuple[str, int | None]] = [
    ("bfloat16", 5),
    ("float32", 3),
    ("int32", None),
    ("int64", None),
    ("uint8", None),
]


def array_of(dtype: str, width: int | None, codec: Codec | None = None) -> ArraySpec:
    return ArraySpec(
        name="x", dtype=dtype, width=width, rows_per_shard=32, rows_per_chunk=8, codec=codec or Codec(blocksize=0)
    )


def whole(encoded: ShardObject) -> bytes:
    return b"".join(encoded.parts)


def decode(array: ArraySpec, data: bytes, n_rows: int) -> npt.NDArray[Any]:
    """Read a shard object as a reader would: tail, index, chunks."""
    index = ShardIndex.parse(array, data[-array.index_nbytes :], n_rows, len(data), "object x")
    chunks = []
    for chunk in chunk_rows(array, 0, n_rows):
        start, length = int(index.offsets[chunk]), int(index.lengths[chunk])
        out = np.empty(array.shape(array.rows_per_chunk), dtype=array.numpy_dtype)
        decode_chunk(array, data[start : start + length], out, f"object x, chunk {chunk}")
        chunks.append(out)
    return np.concatenate(chunks)


def test_crc32c_known_answer_and_continuation() -> None:
    # RFC 3720, B.4: 32 bytes of zeros; and the check value of the CRC catalogue.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


@pytest.mark.parametrize("codec", [Codec(), Codec(name="none")])
@pytest.mark.parametrize(("dtype", "width"), COLUMNS)
@pytest.mark.parametrize("n_rows", [1, 8, 21, 32])
def test_a_shard_comes_back_with_its_last_chunk_padded_by_zeros(
    codec: Codec, dtype: str, width: int | None, n_rows: int, make_rows: Callable[..., npt.NDArray[Any]]
) -> None:
    array, rows = array_of(dtype, width, codec), make_rows(n_rows, width, dtype)
    found = decode(array, whole(encode_shard(array, rows)), n_rows)
    assert len(found) == -(-n_rows // 8) * 8
    assert found[:n_rows].tobytes() == rows.tobytes()
    assert not found[n_rows:].any()


@pytest.mark.parametrize("codec", [Codec(), Codec(name="none")])
def test_chunks_of_zeros_are_stored_and_chunks_without_rows_are_absent(codec: Codec) -> None:
    array = array_of("bfloat16", 5, codec)
    data = whole(encode_shard(array, np.zeros((17, 5), dtype=array.numpy_dtype)))
    table = np.frombuffer(data[-array.index_nbytes : -4], dtype="<u8").reshape(4, 2)
    assert (table[:3, 1] > 4).all()
    assert table[3].tolist() == [ABSENT, ABSENT]


def test_the_object_is_chunks_then_index_then_checksum(make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    array = array_of("int32", None, Codec(name="none"))
    rows = make_rows(20, None, "int32")
    encoded = encode_shard(array, rows)
    data = whole(encoded)
    padded = np.concatenate([rows, np.zeros(4, dtype="<i4")])
    chunks = [padded[start : start + 8].tobytes() for start in (0, 8, 16)]
    stored = b"".join(chunk + crc32c(chunk).to_bytes(4, "little") for chunk in chunks)
    index = np.array([[0, 36], [36, 36], [72, 36], [ABSENT, ABSENT]], dtype="<u8").tobytes()
    assert data == stored + index + crc32c(index).to_bytes(4, "little")
    assert (encoded.nbytes, encoded.crc32c, encoded.index_crc32c) == (len(data), crc32c(data), crc32c(index))
    assert array.index_nbytes == len(index) + 4


@pytest.mark.parametrize(("dtype", "width"), COLUMNS)
def test_blosc_shuffles_whole_elements(
    dtype: str, width: int | None, make_rows: Callable[..., npt.NDArray[Any]]
) -> None:
    # Byte 3 of a blosc chunk is the element size it shuffled by: it must be the one in the metadata.
    array = array_of(dtype, width)
    [codec] = array.codec.zarr_codecs(array.numpy_dtype.itemsize)
    stored = encode_shard(array, make_rows(8, width, dtype)).parts[0]
    assert stored[3] == codec["configuration"]["typesize"] == array.numpy_dtype.itemsize


def test_threads_give_the_same_object(make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    array, rows = array_of("bfloat16", 5), make_rows(32, 5)
    with ThreadPoolExecutor(2) as pool:
        assert whole(encode_shard(array, rows, pool.map)) == whole(encode_shard(array, rows))


@given(st.integers(1, 32), st.sampled_from(COLUMNS), st.booleans())
def test_any_number_of_rows_comes_back(n_rows: int, column: tuple[str, int | None], compressed: bool) -> None:
    array = array_of(*column, Codec() if compressed else Codec(name="none"))
    numbers = np.arange(np.prod(array.shape(n_rows)), dtype=np.int64) * n_rows % 127
    rows = numbers.reshape(array.shape(n_rows)).astype(array.numpy_dtype)
    assert decode(array, whole(encode_shard(array, rows)), n_rows)[:n_rows].tobytes() == rows.tobytes()


@pytest.mark.parametrize("codec", [Codec(), Codec(name="none")])
def test_every_changed_byte_is_found(codec: Codec, make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    array, rows = array_of("bfloat16", 5, codec), make_rows(21, 5)
    data = whole(encode_shard(array, rows))
    assert decode(array, data, 21)[:21].tobytes() == rows.tobytes()
    for place, flip in itertools.product(range(len(data)), (0x01, 0x80, 0xFF)):
        damaged = bytearray(data)
        damaged[place] ^= flip
        with pytest.raises(CorruptObjectError, match="object x"):
            decode(array, bytes(damaged), 21)


def test_every_truncation_is_found(make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    array, rows = array_of("bfloat16", 5), make_rows(21, 5)
    data = whole(encode_shard(array, rows))
    for length in range(len(data)):
        with pytest.raises(CorruptObjectError):
            decode(array, data[:length], 21)


def sealed(table: npt.NDArray[Any]) -> bytes:
    return table.tobytes() + crc32c(table.tobytes()).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("chunk", "entry"), [(1, (ABSENT, ABSENT)), (0, (0, 3)), (2, (100, 10**6)), (2, (ABSENT - 5, 10))]
)
def test_an_index_with_a_sound_checksum_must_still_make_sense(chunk: int, entry: tuple[int, int]) -> None:
    array = array_of("uint8", None)
    table = np.array([[0, 20], [20, 20], [40, 20], [ABSENT, ABSENT]], dtype="<u8")
    assert ShardIndex.parse(array, sealed(table), 24, 60 + array.index_nbytes, "w").lengths.tolist()[:3] == [20] * 3
    table[chunk] = entry
    with pytest.raises(CorruptObjectError, match=f"w, chunk {chunk}: absent or outside"):
        ShardIndex.parse(array, sealed(table), 24, 60 + array.index_nbytes, "w")


def test_messages_give_both_checksums(make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    array = array_of("int32", None, Codec(name="none"))
    data = bytearray(whole(encode_shard(array, make_rows(8, None, "int32"))))
    good = crc32c(bytes(data[:32]))
    data[0] ^= 1
    bad = crc32c(bytes(data[:32]))
    with pytest.raises(CorruptObjectError, match=f"object x, chunk 0: crc32c expected {good:#010x}, found {bad:#010x}"):
        decode(array, bytes(data), 8)
    with pytest.raises(CorruptObjectError, match=r"the shard index has 3 bytes, 68 expected"):
        ShardIndex.parse(array, b"abc", 8, 100, "w")


def test_a_sound_checksum_over_another_chunk_is_found() -> None:
    array, out = array_of("uint8", None), np.empty(8, dtype=np.uint8)
    sound = Codec().encode(np.zeros(8, dtype=np.uint8))
    # Blosc believes the size in bytes 12 to 16 of its header, and reads so much.
    boastful = sound[:12] + (1 << 30).to_bytes(4, "little") + sound[16:]
    for data in (b"", b"\0" * 40, Codec().encode(np.zeros(9, dtype=np.uint8)), boastful, sound[:-1], sound + b"\0"):
        with pytest.raises(CorruptObjectError, match="does not decode"):
            decode_chunk(array, data + crc32c(data).to_bytes(4, "little"), out, "w")


@pytest.mark.parametrize(
    ("start", "stop", "chunks"), [(0, 8, [0]), (0, 9, [0, 1]), (7, 9, [0, 1]), (8, 8, []), (31, 32, [3])]
)
def test_chunk_rows(start: int, stop: int, chunks: list[int]) -> None:
    assert list(chunk_rows(array_of("uint8", None), start, stop)) == chunks


def test_keys_and_sizes() -> None:
    wide, column = array_of("bfloat16", 5), array_of("uint8", None)
    assert (wide.object_key(12), column.object_key(12)) == ("arrays/x/c/12/0", "arrays/x/c/12")
    assert (wide.nbytes_per_row, column.nbytes_per_row) == (10, 1)
    assert (wide.chunks_per_shard, wide.shape(3), column.shape(3)) == (4, (3, 5), (3,))
