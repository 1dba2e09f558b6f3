"""The ``bfloat16`` data type for zarr-python, registered when this module is imported.

The entry point group ``zarr.data_type`` names it too, but zarr-python 3.1.6 collects that group and never loads it.
zarrs and tensorstore know ``bfloat16`` themselves. ``HasItemSize`` and ``HasEndianness`` come with ``BaseFloat``:
without them the sharding codec cannot size its chunks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, cast

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """Zarr v3 data type ``bfloat16`` over ``ml_dtypes.bfloat16``, little endian."""

    dtype_cls = type(BFLOAT16)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[()]] = ()

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return bool(dtype == BFLOAT16)

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Return this type for ``ml_dtypes.bfloat16``, raise ``DataTypeValidationError`` for another."""
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    def to_native_dtype(self) -> Any:
        return BFLOAT16

    @property
    def item_size(self) -> int:
        return 2

    def default_scalar(self) -> Any:
        return ml_dtypes.bfloat16(0)

    def cast_scalar(self, data: object) -> Any:
        return ml_dtypes.bfloat16(cast("float", data))

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        value = float(cast("float", data))
        if value != value:
            return "NaN"
        return {float("inf"): "Infinity", float("-inf"): "-Infinity"}.get(value, value)

    def from_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        if isinstance(data, str) and data.startswith("0x"):
            return np.array([int(data, 16)], dtype=np.uint16).view(BFLOAT16)[0]
        if isinstance(data, str):
            return ml_dtypes.bfloat16(_SPECIAL[data])
        return ml_dtypes.bfloat16(float(cast("float", data)))


data_type_registry.register("bfloat16", BFloat16)
