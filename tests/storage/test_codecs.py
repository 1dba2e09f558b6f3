from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.codecs import Codec
from actlake.storage.errors import BadInputError

CODECS = [
    Codec(),
    Codec(name="none"),
    Codec(cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=0),
    Codec(cname="zlib", shuffle="noshuffle", blocksize=4096),
]
DTYPES = ["bfloat16", "float32", "int32", "int64", "uint8"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_comes_back_bit_for_bit(codec: Codec, dtype: str, make_rows: Callable[..., npt.NDArray[Any]]) -> None:
    rows = make_rows(300, 7, dtype)
    chunk = rows.view("<u2") if dtype == "bfloat16" else rows
    out = np.full_like(rows, 99)
    codec.decode(codec.encode(chunk), out)
    assert out.tobytes() == rows.tobytes()


@given(st.binary(min_size=2, max_size=4000), st.sampled_from(CODECS))
def test_any_bits_come_back(data: bytes, codec: Codec) -> None:
    bits = np.frombuffer(data[: len(data) & ~1], dtype="<u2")
    out = np.empty(len(bits), dtype=ml_dtypes.bfloat16)
    codec.decode(memoryview(codec.encode(bits)), out)
    assert out.tobytes() == bits.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["empty", "one byte", "short", "long", "noise", "cut"])
def test_what_is_no_such_chunk_raises(codec: Codec, damage: str) -> None:
    chunk = np.arange(1000, dtype="<u2")
    whole = codec.encode(chunk)
    data = {
        "empty": b"",
        "one byte": b"\x07",
        "short": codec.encode(chunk[:-1]),
        "long": codec.encode(np.arange(1001, dtype="<u2")),
        "noise": bytes(range(256)),
        "cut": whole[: len(whole) // 2],
    }[damage]
    with pytest.raises((ValueError, RuntimeError)):
        codec.decode(data, np.empty(1000, dtype="<u2"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_reads_its_own_json(codec: Codec) -> None:
    assert Codec.from_json(codec.to_json()).to_json() == codec.to_json()


def test_the_default_is_the_measured_one() -> None:
    assert Codec().zarr_codecs(2) == [
        {
            "name": "blosc",
            "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2, "blocksize": 524288},
        }
    ]
    assert Codec(name="none").zarr_codecs(2) == []
    # Blosc's own header has the typesize and the block size: byte 3 and bytes 8 to 12.
    data = Codec().encode(np.zeros(1_000_000, dtype="<u2"))
    assert data[3] == 2
    assert int.from_bytes(data[8:12], "little") == 524288


@pytest.mark.parametrize(("dtype", "itemsize"), [("<u2", 2), ("<f4", 4), ("<i8", 8), ("u1", 1)])
def test_the_byte_shuffle_takes_the_element_size_of_the_chunk(dtype: str, itemsize: int) -> None:
    # Byte 3 of a blosc header is the typesize, which must agree with the one in the Zarr metadata.
    assert Codec().encode(np.arange(100, dtype=dtype))[3] == itemsize
    assert Codec().zarr_codecs(itemsize)[0]["configuration"]["typesize"] == itemsize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "blocs"}, "no codec 'blocs'; did you mean 'blosc'"),
        ({"shuffle": "shufle"}, "no shuffle 'shufle'; did you mean 'shuffle'"),
        ({"cname": "zst"}, "no blosc compressor 'zst'; did you mean 'zstd'"),
        ({"clevel": 10}, "clevel = 10 must be 0..9"),
        ({"blocksize": -1}, "blocksize = -1 bytes"),
    ],
)
def test_a_codec_that_does_not_exist_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Codec(**changes)
