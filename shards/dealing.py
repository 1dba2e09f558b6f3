"""Chunks dealt to batches by compiled code, ``_dealing.c``: from a file or from bytes, without Python in between.

Where it is not there (no compiler at installation, another processor, a numcodecs that hides its zstd), or where a
chunk is unusual in any way, ``shards.window`` goes by way of numcodecs, with the same result: docs/adr/0011.
"""

import ctypes
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from actlake.storage.arrays import ArraySpec

#: What zstd's functions are called in numcodecs' library, as ``use_zstd`` takes them.
_ZSTD = ("ZSTD_decompressDCtx", "ZSTD_createDCtx", "ZSTD_freeDCtx")


class Decoder(Protocol):
    """Memory to decode chunks in, of one thread."""

    def deal(
        self,
        stored: bytes | memoryview,
        start: int,
        length: int,
        shape: tuple[int, int, int, int, int],
        first_row: int,
        moves: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.uint64],
    ) -> bool:
        """Deal the rows of one stored chunk to batches; return whether that was done.

        ``stored`` is the path of a file, which has the chunk at bytes ``start`` to ``start + length``, or a buffer with
        it. ``shape``: rows of a chunk, of a unit and of a batch, bytes of a row and of a number in it (2 or 4).
        ``first_row``: the chunk's first among those of its unit. ``moves``: int64 [M, 5], as in ``shards.order``;
        ``addresses``: uint64 [N], where each batch begins. False: nothing that counts was done, read the chunk
        otherwise. Raises ``ValueError`` for moves beyond a unit or a batch.
        """


def make_decoder() -> Decoder | None:
    """Return a decoder for one thread; None where the compiled code is not there."""
    kind = _decoder_type()
    return None if kind is None else kind()


def can_deal(array: ArraySpec) -> bool:
    """Say whether the chunks of an array are of the kind that the compiled code decodes."""
    codec = array.codec
    known = (codec.name, codec.cname, codec.shuffle) == ("blosc", "zstd", "shuffle") and array.width is not None
    return known and array.numpy_dtype.itemsize in (2, 4) and _decoder_type() is not None


@cache
def _decoder_type() -> type[Decoder] | None:
    try:
        compiled = import_module("actlake.shards._dealing")
    except ImportError:
        return None
    try:
        library = ctypes.CDLL(blosc.__file__)
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _ZSTD]
    except (OSError, AttributeError):
        return None
    compiled.use_zstd(*addresses)
    return cast("type[Decoder]", compiled.Decoder)
