"""One stored array: its Zarr v3 metadata, its object keys, and the bytes of one shard object.

A shard object is the Zarr ``sharding_indexed`` layout with the index at the end: the encoded chunks one after another,
then for each chunk its offset and length (uint64, little endian), then the crc32c of that index. Each chunk ends with
its own crc32c. Chunks that lie wholly past the last row are absent (offset and length 2**64 - 1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import crc32c as crc32c_library
import ml_dtypes
import numpy as np
import numpy.typing as npt

from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError

_ABSENT = np.uint64(2**64 - 1)
#: Bytes of the checksum that ends a chunk and a shard index.
CRC_NBYTES = 4
#: What blosc adds to data that do not compress (its BLOSC_MAX_OVERHEAD).
_BLOSC_NBYTES = 16

#: Maps a function over items in order, as ``map`` or an executor's ``map`` does.
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """Return the crc32c (Castagnoli) of ``data``, continued from ``value``."""
    return int(crc32c_library.crc32c(data, value))


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape, type and chunking of one array ``[rows, width]``, or ``[rows]`` where ``width`` is None."""

    name: str
    dtype: str
    width: int | None
    rows_per_shard: int
    rows_per_chunk: int
    codec: Codec

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def nbytes_per_row(self) -> int:
        return self.numpy_dtype.itemsize * (self.width or 1)

    @property
    def chunks_per_shard(self) -> int:
        return self.rows_per_shard // self.rows_per_chunk

    @property
    def index_nbytes(self) -> int:
        """Size of the shard index with its checksum, at the end of every shard object."""
        return 16 * self.chunks_per_shard + CRC_NBYTES

    @property
    def max_encoded_nbytes(self) -> int:
        """Bytes of a stored chunk at most: what does not compress gets blosc's header, and all get a checksum."""
        return self.rows_per_chunk * self.nbytes_per_row + _BLOSC_NBYTES + CRC_NBYTES

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of ``n_rows`` rows of this array."""
        return (n_rows,) if self.width is None else (n_rows, self.width)

    def object_key(self, shard: int) -> str:
        """Return the dataset-relative key of one shard object."""
        return f"arrays/{self.name}/c/{shard}" + ("" if self.width is None else "/0")

    def zarr_json(self, n_rows: int) -> dict[str, Any]:
        """Return the array's ``zarr.json`` for a total of ``n_rows``."""
        itemsize = self.numpy_dtype.itemsize
        endian = {} if itemsize == 1 else {"configuration": {"endian": "little"}}
        inner = [{"name": "bytes", **endian}, *self.codec.zarr_codecs(itemsize), {"name": "crc32c"}]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": list(self.shape(self.rows_per_chunk)),
            "codecs": inner,
            "index_codecs": index,
            "index_location": "end",
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": list(self.shape(self.rows_per_shard))}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape(n_rows)),
            "data_type": self.dtype,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if self.dtype in ("bfloat16", "float32") else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["row"] if self.width is None else ["row", "channel"],
            "attributes": {},
        }


@dataclass(frozen=True, kw_only=True)
class ShardObject:
    """The encoded bytes of one array's shard, with their checksums.

    ``parts`` are by turns a chunk and its checksum, which are not put together, for that would copy the chunk; then the
    index.
    """

    parts: tuple[bytes, ...]
    nbytes: int
    crc32c: int
    index_crc32c: int


def encode_shard(array: ArraySpec, rows: npt.NDArray[Any], mapper: Mapper = map) -> ShardObject:
    """Encode the rows of one shard, ``[n, width]`` with n <= rows_per_shard.

    The last chunk is padded with zeros to ``rows_per_chunk``. ``mapper`` may spread the chunks over threads.
    """
    starts = range(0, len(rows), array.rows_per_chunk)
    chunks = list(mapper(lambda start: _encode_chunk(array, rows[start : start + array.rows_per_chunk]), starts))
    index = np.full((array.chunks_per_shard, 2), _ABSENT, dtype="<u8")
    lengths = np.array([len(data) + len(checksum) for data, checksum in chunks], dtype="<u8")
    index[: len(chunks), 0] = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    index[: len(chunks), 1] = lengths
    index_crc = crc32c(index.tobytes())
    parts = [part for chunk in chunks for part in chunk]
    parts.append(index.tobytes() + index_crc.to_bytes(CRC_NBYTES, "little"))
    whole = 0
    for part in parts:
        whole = crc32c(part, whole)
    return ShardObject(parts=tuple(parts), nbytes=sum(map(len, parts)), crc32c=whole, index_crc32c=index_crc)


def _encode_chunk(array: ArraySpec, rows: npt.NDArray[Any]) -> tuple[bytes, bytes]:
    chunk = np.ascontiguousarray(rows, dtype=array.numpy_dtype)
    if len(chunk) < array.rows_per_chunk:
        padded = np.zeros(array.shape(array.rows_per_chunk), dtype=array.numpy_dtype)
        padded[: len(chunk)] = chunk
        chunk = padded
    # Blosc takes its typesize from the buffer, and no buffer is of type bfloat16.
    data = array.codec.encode(chunk.view("<u2") if array.dtype == "bfloat16" else chunk)
    return data, crc32c(data).to_bytes(CRC_NBYTES, "little")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the chunks of one shard object lie."""

    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    crc32c: int

    @classmethod
    def parse(cls, array: ArraySpec, tail: bytes, n_rows: int, nbytes: int, where: str) -> "ShardIndex":
        """Read the last ``index_nbytes`` bytes of a shard object of ``nbytes`` bytes that holds ``n_rows`` rows.

        Raises ``CorruptObjectError`` where the checksum fails or a chunk with rows is absent or out of bounds.
        """
        if len(tail) != array.index_nbytes:
            raise CorruptObjectError(f"{where}: the shard index has {len(tail)} bytes, {array.index_nbytes} expected")
        expected, found = int.from_bytes(tail[-CRC_NBYTES:], "little"), crc32c(tail[:-CRC_NBYTES])
        if expected != found:
            raise CorruptObjectError(f"{where}: shard index crc32c expected {expected:#010x}, found {found:#010x}")
        table = np.frombuffer(tail[:-CRC_NBYTES], dtype="<u8").reshape(-1, 2)
        n_chunks = -(-n_rows // array.rows_per_chunk)
        limit = nbytes - array.index_nbytes
        for chunk, (offset, length) in enumerate(table[:n_chunks].tolist()):
            if offset + length > limit or length < CRC_NBYTES:
                raise CorruptObjectError(f"{where}, chunk {chunk}: absent or outside of the object's {nbytes} bytes")
            if length > array.max_encoded_nbytes:
                raise CorruptObjectError(f"{where}, chunk {chunk}: {length} bytes are more than a chunk can have")
        return cls(offsets=table[:, 0], lengths=table[:, 1], crc32c=found)


def decode_chunk(array: ArraySpec, data: bytes | memoryview, out: npt.NDArray[Any], where: str) -> None:
    """Check and decode one stored chunk into ``out``, C-contiguous ``[rows_per_chunk, width]``.

    Raises ``CorruptObjectError`` naming ``where`` and both checksums.
    """
    view = memoryview(data)
    check_chunk(view[:-CRC_NBYTES], view[-CRC_NBYTES:], where)
    try:
        array.codec.decode(view[:-CRC_NBYTES], out)
    except (ValueError, RuntimeError) as error:
        raise CorruptObjectError(f"{where}: the chunk does not decode ({error})") from error


def check_chunk(data: memoryview, checksum: bytes | memoryview, where: str) -> None:
    """Raise ``CorruptObjectError`` where a stored chunk has not the crc32c that follows it."""
    expected, found = int.from_bytes(checksum, "little"), crc32c(data)
    if expected != found:
        raise CorruptObjectError(
            f"{where}: crc32c expected {expected:#010x}, found {found:#010x}; "
            "run 'actlake verify --repair' on the dataset, then 'actlake ingest' rebuilds the shard"
        )


def chunk_rows(array: ArraySpec, start: int, stop: int) -> Sequence[int]:
    """Return the chunk numbers of a shard that hold its rows ``start:stop``."""
    return range(start // array.rows_per_chunk, -(-stop // array.rows_per_chunk))
