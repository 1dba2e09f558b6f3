"""SAELens: its cached activations, read by its ``ActivationsStore`` with its mixing buffer.

Its cache is a Hugging Face dataset of float32 or float16; it cannot hold bfloat16, and float16 overflows on Gemma 3.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from rivals import U16, Settings
from rivals.common import BLOCK_ROWS

_HOOK = "activations"


def prepare(rows: U16, folder: Path, dtype: str = "float32") -> None:
    """Store the rows."""
    features = datasets.Features(
        {
            _HOOK: datasets.Array2D(shape=(BLOCK_ROWS, rows.shape[1]), dtype=dtype),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=BLOCK_ROWS),
        }
    )
    parts = []
    for start in range(0, len(rows) // BLOCK_ROWS * BLOCK_ROWS, 16 * BLOCK_ROWS):
        part = rows[start : min(start + 16 * BLOCK_ROWS, len(rows) // BLOCK_ROWS * BLOCK_ROWS)]
        # A bfloat16 is the upper half of a float32.
        wide = (part.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            values = wide.astype(dtype).reshape(-1, BLOCK_ROWS, rows.shape[1])
        ids = np.zeros((len(values), BLOCK_ROWS), dtype=np.int32)
        parts.append(datasets.Dataset.from_dict({_HOOK: values, "token_ids": ids}, features=features))
    datasets.concatenate_datasets(parts).save_to_disk(str(folder / "rows"), max_shard_size="100MB")


class _NoModel:
    """Stands where the store keeps a model; the cache needs none."""

    tokenizer = None


def batches(folder: Path, settings: Settings, dtype: str = "float32") -> Iterator[Tensor]:
    """Yield shuffled batches."""
    from sae_lens.training.activations_store import ActivationsStore

    torch.manual_seed(settings.seed)
    model: Any = _NoModel()
    store: Iterator[Tensor] = ActivationsStore(
        model=model,
        dataset=None,
        streaming=False,
        hook_name=_HOOK,
        hook_head_index=None,
        context_size=BLOCK_ROWS,
        d_in=settings.width,
        n_batches_in_buffer=settings.mixing_rows // BLOCK_ROWS,
        total_training_tokens=10**9,
        store_batch_size_prompts=8,
        train_batch_size_tokens=settings.batch_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=dtype,
        cached_activations_path=str(folder / "rows"),
    )
    return store
