"""Chunks that compiled code deals: the same rows as by way of numcodecs, and no harm from what is damaged."""

import platform
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from formula_dataset import BOTH, NARROW, WIDE, Made, flat, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from actlake.shards import dealing
from actlake.shards.dealing import Decoder
from actlake.storage.arrays import ArraySpec, crc32c, decode_chunk, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError
from actlake.storage.spec import PointSpec

ROWS, WIDTH = 96, 40
BLOCKS = Codec(blocksize=1024)


def can_compile() -> bool:
    libc, _ = platform.libc_ver()
    return shutil.which("cc") is not None and platform.machine() == "x86_64" and libc == "glibc"


needs_compiled = pytest.mark.skipif(not can_compile(), reason="built with a compiler, on x86-64 with glibc")


@pytest.fixture
def decoder() -> Decoder:
    made = dealing.make_decoder()
    assert made is not None, "a compiler is here, and yet the compiled code is not"
    return made


@pytest.fixture
def by_numcodecs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(dealing, "_decoder_type", lambda: None)


def same_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return one.dtype == other.dtype and bool(np.array_equal(one.view(np.uint8), other.view(np.uint8)))


def array_of(dtype: str = "bfloat16", codec: Codec = BLOCKS) -> ArraySpec:
    spec = make_spec(
        hook_points=(PointSpec(name=WIDE, width=WIDTH, rows_per_chunk=ROWS),),
        dtype=dtype,
        codec=codec,
        rows_per_shard=4 * ROWS,
        rows_per_block=4 * ROWS,
    )
    return spec.arrays()[WIDE]


def stored_chunk(array: ArraySpec, seed: int = 0) -> tuple[bytes, npt.NDArray[Any]]:
    values = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(array.numpy_dtype)
    data, checksum, *_ = encode_shard(array, values).parts
    return data + checksum, values


def deal_to(
    decoder: Decoder, array: ArraySpec, stored: bytes, moves: list[tuple[int, int, int, int, int]], batches: Any
) -> bool:
    places = np.array([batch.ctypes.data for batch in batches], np.uint64)
    shape = array.rows_per_chunk, ROWS, batches.shape[1], array.nbytes_per_row, array.numpy_dtype.itemsize
    table = np.array(moves, np.int64).reshape(-1, 5)
    return decoder.deal(memoryview(stored), 0, len(stored), shape, 0, table, places)


@needs_compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("blocksize", [0, 1024, 2000, 1 << 19])
def test_rows_go_where_the_moves_say_bit_for_bit(decoder: Decoder, dtype: str, blocksize: int) -> None:
    array = array_of(dtype, Codec(blocksize=blocksize))
    stored, values = stored_chunk(array)
    batches = np.zeros((5, 50, WIDTH), array.numpy_dtype)
    assert deal_to(decoder, array, stored, [(0, 1, 3, 10, 3), (30, 0, 0, 7, 1), (60, 4, 14, 36, 1)], batches)
    expected = np.zeros_like(batches)
    for i in range(3):
        expected[1 + i, 3:13] = values[10 * i : 10 * i + 10]
    expected[0, :7], expected[4, 14:] = values[30:37], values[60:]
    assert same_bits(batches, expected)


@needs_compiled
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_unit_may_have_several_chunks_in_a_file(decoder: Decoder, tmp_path: Path, chunk: int) -> None:
    array = array_of()
    stored, values = stored_chunk(array)
    (tmp_path / "shard").write_bytes(b"before" + stored + b"after")
    batch = np.zeros((1, 3 * ROWS, WIDTH), array.numpy_dtype)
    moves = np.array([(0, 0, 0, 3 * ROWS, 1)], np.int64)
    shape = ROWS, 3 * ROWS, 3 * ROWS, array.nbytes_per_row, 2
    path, places = str(tmp_path / "shard").encode(), np.array([batch.ctypes.data], np.uint64)
    assert decoder.deal(path, 6, len(stored), shape, chunk * ROWS, moves, places)
    assert same_bits(batch[0, chunk * ROWS : (chunk + 1) * ROWS], values)
    assert np.count_nonzero(batch.view(np.uint16)) == np.count_nonzero(values.view(np.uint16))
    for start, length in ((7, len(stored)), (6, len(stored) + 6), (1 << 40, len(stored))):
        assert not decoder.deal(path, start, length, shape, 0, moves, places)
    assert not decoder.deal(path + b"-gone", 6, len(stored), shape, 0, moves, places)


@needs_compiled
@pytest.mark.parametrize(
    "codec",
    [
        Codec(cname="lz4"),
        Codec(shuffle="bitshuffle"),
        Codec(shuffle="noshuffle"),
        Codec(clevel=0),
        Codec(cname="blosclz"),
        Codec(name="none"),
    ],
)
def test_other_codecs_are_left_to_numcodecs(decoder: Decoder, codec: Codec) -> None:
    array = array_of(codec=codec)
    stored, _ = stored_chunk(array)
    batch = np.zeros((1, ROWS, WIDTH), array.numpy_dtype)
    assert not deal_to(decoder, array, stored, [(0, 0, 0, ROWS, 1)], batch)


@needs_compiled
@pytest.mark.parametrize(
    "move",
    [
        (0, 0, 0, ROWS + 1, 1),
        (0, 0, 1, ROWS, 1),
        (0, 0, 0, 10, 2),
        (0, 1, 0, 10, 1),
        (-1, 0, 0, 10, 1),
        (0, -1, 0, 10, 1),
        (0, 0, -1, 10, 1),
        (0, 0, 0, 0, 1),
        (0, 0, 0, 10, 0),
        (0, 0, 0, 1 << 62, 1 << 62),
        (1 << 62, 0, 0, 10, 1),
        (0, 0, 1 << 62, 10, 1),
    ],
)
def test_moves_beyond_the_rows_are_refused(decoder: Decoder, move: tuple[int, int, int, int, int]) -> None:
    array = array_of()
    stored, _ = stored_chunk(array)
    with pytest.raises(ValueError, match="outside of the rows"):
        deal_to(decoder, array, stored, [move], np.zeros((1, ROWS, WIDTH), array.numpy_dtype))


#: Offsets of header and block table are drawn more often than those of the many bytes behind.
DAMAGE = st.lists(st.tuples(st.integers(0, 48) | st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4)


@needs_compiled
@settings(max_examples=2_000, deadline=None)
@given(damage=DAMAGE, cut=st.integers(0, 60), sealed=st.booleans())
def test_damage_is_refused_or_as_numcodecs_reads_it(damage: list[tuple[int, int]], cut: int, sealed: bool) -> None:
    array, decoder = array_of(), dealing.make_decoder()
    assert decoder is not None
    stored, _ = stored_chunk(array)
    body = bytearray(stored[: len(stored) - 4 - cut])
    for place, flip in damage:
        body[place % len(body)] ^= flip
    # A checksum that fits what is damaged: as another program would write it, or one who means harm.
    found = bytes(body) + (struct.pack("<I", crc32c(bytes(body))) if sealed else stored[-4:])
    batch = np.zeros((1, ROWS, WIDTH), array.numpy_dtype)
    dealt = deal_to(decoder, array, found, [(0, 0, 0, ROWS, 1)], batch)
    expected = np.zeros((ROWS, WIDTH), array.numpy_dtype)
    try:
        decode_chunk(array, found, expected.view("<u2"), "here")
    except CorruptObjectError:
        assert not dealt
    else:
        assert not dealt or same_bits(batch[0], expected)
    assert sealed or not dealt or found == stored


@needs_compiled
def test_decoders_end_with_their_threads(decoder: Decoder) -> None:
    array = array_of()
    stored, values = stored_chunk(array)
    found: list[bool] = []

    def run() -> None:
        mine, batch = dealing.make_decoder(), np.zeros((1, ROWS, WIDTH), array.numpy_dtype)
        assert mine is not None
        whole = [(0, 0, 0, ROWS, 1)]
        found.extend(deal_to(mine, array, stored, whole, batch) and same_bits(batch[0], values) for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 400


def streams(place: str, dtype: str) -> Iterator[tuple[Made, dict[str, Any]]]:
    points = tuple(
        PointSpec(name=name, width=w, rows_per_chunk=r) for name, w, r in ((NARROW, 24, 128), (WIDE, 40, 64))
    )
    spec = make_spec(hook_points=points, dtype=dtype, codec=BLOCKS)
    made = Made(place, 868, spec=spec, voids=frozenset({3, 300})).build_all()
    for batch_size in (7, 64, 100, 868):
        for buffer_bytes in (0, 60_000, "1GiB"):
            yield made, {"batch_size": batch_size, "buffer_bytes": buffer_bytes, "drop_last": False}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stream_is_the_same_without_compiled_code(
    place: str, dtype: str, by_numcodecs: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_dealt = []
    if can_compile():
        kind: Any = dealing._decoder_type()

        class Counted:
            def __init__(self) -> None:
                self.inner = kind()

            def deal(self, *args: Any) -> bool:
                dealt = bool(self.inner.deal(*args))
                n_dealt.append(dealt)
                return dealt

        monkeypatch.setattr(dealing, "_decoder_type", lambda: Counted)
    cases = list(streams(place, dtype))
    with_it = [list(made.open().stream(BOTH, **options)) for made, options in cases]
    # Units with void rows go the longer way, and so do chunks that blosc found not worth compressing.
    assert not can_compile() or sum(n_dealt) > 100
    by_numcodecs()
    for (made, options), found in zip(cases, with_it, strict=True):
        without = list(made.open().stream(BOTH, **options))
        assert flat(found) == flat(without)
        for one, other in zip(found, without, strict=True):
            assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in BOTH)
