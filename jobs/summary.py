"""What ``show``, ``head`` and ``diff`` say of datasets, as JSON values."""

import json
from collections import defaultdict
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from actlake.shards.dataset import ActivationDataset
from actlake.storage.hookpoints import HookPoint
from actlake.storage.moments import Moments
from actlake.storage.redaction import piece_of
from actlake.storage.rowspace import ROLES

#: Statistics are shown where they take no more reads than this: one a hook point and shard.
_MOST_READS = 20_000

#: The fields of a spec that decide which rows there are, and where.
_ROW_SPACE = ("corpus_id", "split", "keep", "seed", "order", "rows_per_shard", "rows_per_block")

_ROLE_NAMES = {code: name for name, code in ROLES.items()}

#: Tokens of context before a row's own.
_CONTEXT = 8


def summarise(ds: ActivationDataset) -> dict[str, Any]:
    """Return what ``show`` prints."""
    stored, arrays = ds.reader.manifest.nbytes_by_array(), ds.spec.arrays()
    with_statistics = len(ds.reader.manifest) * len(ds.hook_points) <= _MOST_READS
    points = {}
    for point in ds.spec.hook_points:
        nbytes = stored.get(point.name, 0)
        points[point.name] = {
            "width": point.width,
            "rows_per_chunk": point.rows_per_chunk,
            "nbytes": nbytes,
            "ratio": ds.n_rows * arrays[point.name].nbytes_per_row / nbytes if nbytes else None,
            **_statistics(ds.statistics(point.name) if with_statistics else None),
        }
    missing = ds.reader.manifest.missing(ds.spec.row_space(ds.n_rows_planned))
    return {
        "url": ds.url,
        "complete": not missing,
        "n_rows": ds.n_rows,
        "n_rows_planned": ds.n_rows_planned,
        "n_void": int(pc.sum(ds.reader.manifest.columns("n_void")["n_void"]).as_py() or 0),
        "n_shards": len(ds.reader.manifest),
        "n_shards_missing": len(missing),
        "missing_shards": missing[:100],
        "nbytes": ds.reader.manifest.nbytes,
        "raw_nbytes": ds.n_rows * ds.spec.nbytes_per_row,
        "dataset_id": ds.spec.dataset_id,
        "row_space_id": ds.spec.row_space_id,
        "corpus": ds.header.corpus,
        "spec": ds.spec.to_json(),
        "hook_points": points,
        "streams": _by_stream(ds, stored),
        "provenance": provenance(ds),
    }


def _statistics(moments: Moments | None) -> dict[str, float | None]:
    if moments is None or not moments.count:
        return {"norm_mean": None, "norm_median": None, "unit_scale": None}
    median = None if moments.norm_histogram is None else moments.median_norm
    return {"norm_mean": moments.norm_mean, "norm_median": median, "unit_scale": moments.unit_scale}


def _by_stream(ds: ActivationDataset, stored: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return layers, bytes and ratio of each stream, and of the row columns together."""
    nbytes: dict[str, int] = defaultdict(int)
    raw: dict[str, int] = defaultdict(int)
    layers: dict[str, list[int]] = defaultdict(list)
    for name, array in ds.spec.arrays().items():
        stream = "rows" if name.startswith("rows/") else HookPoint.parse(name).stream
        nbytes[stream] += stored.get(name, 0)
        raw[stream] += ds.n_rows * array.nbytes_per_row
        layers[stream] += [] if stream == "rows" else [HookPoint.parse(name).layer]
    return {
        stream: {
            "layers": layers[stream],
            "nbytes": nbytes[stream],
            "ratio": raw[stream] / nbytes[stream] if nbytes[stream] else None,
        }
        for stream in nbytes
    }


def provenance(ds: ActivationDataset) -> dict[str, Any]:
    """Return who made the committed shards, on what, and what it cost so far.

    ``worker_s`` is the time from the start to the end of each shard's build, summed: what the workers were paid for.
    """
    seconds = ("forward_s", "encode_s", "write_s")
    table = ds.reader.manifest.columns("host", "device", "software", "started", "finished", "n_tokens", *seconds)
    totals = {name: round(float(pc.sum(table[name]).as_py() or 0), 3) for name in seconds}
    return {
        "hosts": sorted(pc.unique(table["host"]).to_pylist()),
        "devices": sorted(pc.unique(table["device"]).to_pylist()),
        "software": [json.loads(text) for text in sorted(pc.unique(table["software"]).to_pylist())],
        "first_started": pc.min(table["started"]).as_py(),
        "last_finished": pc.max(table["finished"]).as_py(),
        "n_tokens": int(pc.sum(table["n_tokens"]).as_py() or 0),
        **totals,
        "worker_s": round(_spans(table["started"].to_pylist(), table["finished"].to_pylist()), 3),
    }


def _spans(started: list[str], finished: list[str]) -> float:
    total = 0.0
    for start, stop in zip(started, finished, strict=True):
        try:
            total += (datetime.fromisoformat(stop) - datetime.fromisoformat(start)).total_seconds()
        except ValueError:
            continue  # Provenance is free text: other builders may leave the times out.
    return total


def head_rows(ds: ActivationDataset, start: int, n: int, point: str | None) -> list[dict[str, Any]]:
    """Return ``n`` rows from ``start`` on: token, context, document, role, labels and the norm at a hook point."""
    chosen = ds.spec.select(point)[0] if point else ds.hook_points[0]
    numbers = np.arange(min(start, ds.n_rows_planned), min(start + n, ds.n_rows_planned))
    columns = {name: column.tolist() for name, column in ds.rows(numbers).items()}
    norms = np.linalg.norm(ds[chosen][numbers].astype(np.float64), axis=1)
    pieces = ds.corpus.pieces()
    found = []
    for i, row in enumerate(numbers.tolist()):
        token, position, role = (columns[name][i] for name in ("token_id", "position", "role"))
        sequence = ds.corpus.sequence(columns["sequence"][i])
        before = sequence.tokens[max(0, position - _CONTEXT) : position]
        found.append(
            {
                "row": row,
                "token_id": token,
                "token": piece_of(pieces, token),
                "context": "".join(piece_of(pieces, token) for token in before),
                "position": position,
                "sequence": sequence.index,
                "document": sequence.document,
                "role": _ROLE_NAMES.get(role, str(role)),
                "metadata": dict(sequence.metadata),
                "norm": float(norms[i]),
                "point": chosen,
            }
        )
    return found


def diff(a: ActivationDataset, b: ActivationDataset) -> dict[str, Any]:
    """Return in what two datasets differ: specs, coverage, and whether their rows line up."""
    here, there = a.spec.to_json(), b.spec.to_json()
    shards_a, shards_b = set(a.reader.manifest.shards), set(b.reader.manifest.shards)
    return {
        "a": _side(a),
        "b": _side(b),
        "same_dataset_id": a.spec.dataset_id == b.spec.dataset_id,
        "spec": a.spec.difference(b.spec),
        "aligned": a.spec.row_space_id == b.spec.row_space_id,
        "alignment": [
            f"{name}: here {here[name]!r}, there {there[name]!r}" for name in _ROW_SPACE if here[name] != there[name]
        ],
        "hook_points": {
            "both": [name for name in a.hook_points if name in b.hook_points],
            "only_a": [name for name in a.hook_points if name not in b.hook_points],
            "only_b": [name for name in b.hook_points if name not in a.hook_points],
        },
        "shards": {
            "both": len(shards_a & shards_b),
            "only_a": len(shards_a - shards_b),
            "only_b": len(shards_b - shards_a),
        },
    }


def _side(ds: ActivationDataset) -> dict[str, Any]:
    return {
        "url": ds.url,
        "dataset_id": ds.spec.dataset_id,
        "row_space_id": ds.spec.row_space_id,
        "n_rows": ds.n_rows,
        "n_rows_planned": ds.n_rows_planned,
        "n_shards": len(ds.reader.manifest),
        "complete": not ds.reader.manifest.missing(ds.spec.row_space(ds.n_rows_planned)),
        "nbytes": ds.reader.manifest.nbytes,
    }
