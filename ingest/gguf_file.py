"""Read a GGUF file: metadata and tensors.

The header is parsed here because the ``gguf`` package's reader makes a NumPy view of each of the 786,432 tokens,
scores and types of a Gemma vocabulary: 2 s against 30 s. Layout of the file:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.extras import needs
from actlake.storage.errors import ModelAccessError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: ``shape`` in NumPy's order, ``kind`` a GGML type number, ``start`` in bytes of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GgufFile:
    """The metadata and the tensors of one file, which is read on demand.

    ``metadata`` maps the file's keys to Python values, ``tensors`` the tensors' names to where they lie.
    Raises ``ModelAccessError`` for a file that is no GGUF or ends early.
    """

    def __init__(self, path: Path) -> None:
        self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        cursor = _Cursor(memoryview(self._bytes.data))
        try:
            self.metadata, self.tensors = _read_header(cursor, path)
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ModelAccessError(f"{path} is a damaged GGUF file ({error!r}); fetch it again") from error

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor dequantised to float32."""
        with needs("ingest", "reading GGUF weights"):
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
            from gguf.quants import dequantize
        stored = self.tensors[name]
        kind = GGMLQuantizationType(stored.kind)
        n_values, n_bytes = GGML_QUANT_SIZES[kind]
        row_nbytes = stored.shape[-1] // n_values * n_bytes
        rows = stored.shape[:-1]
        nbytes = row_nbytes * int(np.prod(rows, dtype=np.int64))
        raw = self._bytes[stored.start : stored.start + nbytes].reshape(*rows, row_nbytes)
        if kind is GGMLQuantizationType.F32:
            return np.array(raw.view("<f4"), dtype=np.float32)
        return np.asarray(dequantize(raw, kind), dtype=np.float32)


class _Cursor:
    """A place in the file that moves as values are read."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += count * struct.calcsize(f"<{code}")
        return values

    def number(self, code: str) -> int:
        return int(self.take(code)[0])

    def text(self) -> str:
        length = self.number("Q")
        if self.at + length > len(self.data):
            raise struct.error(f"text of {length} bytes at {self.at} runs over the end")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, count = self.number("I"), self.number("Q")
        if item in (_STRING, _ARRAY):
            return [self.value(item) for _ in range(count)]
        return list(self.take(_SCALARS[item], count))


def _read_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    magic, version = bytes(cursor.data[:4]), struct.unpack_from("<I", cursor.data, 4)[0]
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ModelAccessError(f"{path} is no GGUF file of version 2 or 3 (starts with {magic!r}, version {version})")
    cursor.at = 8
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(n_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(n_tensors):
        name, n_axes = cursor.text(), cursor.number("I")
        fastest_first = cursor.take("Q", n_axes)
        found[name] = (tuple(int(n) for n in reversed(fastest_first)), cursor.number("I"), cursor.number("Q"))
    alignment = int(metadata.get("general.alignment", _ALIGNMENT))
    data_start = -(-cursor.at // alignment) * alignment
    return metadata, {
        name: StoredTensor(shape=shape, kind=kind, start=data_start + offset)
        for name, (shape, kind, offset) in found.items()
    }
