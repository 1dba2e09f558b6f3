"""Read handle of a dataset: ``open`` and ``ActivationDataset``."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.shards.objects import ShardReader, bits_dtype
from actlake.shards.point_view import PointView, RowKey
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.errors import (
    MissingExtraError,
    NotFoundError,
    UnknownNameError,
    nearest,
)
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest
from actlake.storage.moments import Moments, fold
from actlake.storage.spec import ROW_COLUMNS, DatasetSpec
from actlake.storage.stores import Store

if TYPE_CHECKING:
    import torch

    from actlake.shards.batch import TokenBatch
    from actlake.shards.corpus_rows import CorpusRows
    from actlake.shards.lookup import RowContext, SequenceRows
    from actlake.shards.normalizer import Normalizer
    from actlake.shards.source import Source
    from actlake.shards.stream import ActivationStream
    from actlake.shards.view import View

I64 = npt.NDArray[np.int64]

#: Hook points or patterns of them; for a transcoder, its two sides.
Points = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def open(  # noqa: A001  (actlake.open is the name that users type)
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> "ActivationDataset":
    """Open a dataset at a path or any fsspec URL, on the shards that are committed now.

    ``storage_options`` go to the file system. Raises ``NotFoundError`` where there is no dataset,
    ``FormatVersionError`` for one of a newer format.
    """
    store = Store(url, storage_options)
    header = Header.read(store)
    return ActivationDataset(store, header, Manifest.load(store, header.n_rows))


class ActivationDataset:
    """A dataset as it stood when it was opened: spec, manifest and arrays. Thread-safe; pickles as URL and options.

    ``reader`` reads its chunks and ``store`` its bytes; both are for tools that need more than this class offers.
    """

    def __init__(self, store: Store, header: Header, manifest: Manifest) -> None:
        self.store, self.header = store, header
        self.reader = ShardReader(store, header.spec, manifest)
        self._moments: dict[str, Moments] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.store.url, self.store.options)

    # --- what there is ---

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def spec(self) -> DatasetSpec:
        return self.header.spec

    @property
    def manifest(self) -> pa.Table:
        """One row per committed shard, ascending; ``storage.manifest`` has the columns."""
        return self.reader.manifest.table

    @property
    def n_rows(self) -> int:
        """Committed rows, voids included."""
        return self.reader.manifest.n_rows

    @property
    def n_rows_planned(self) -> int:
        return self.header.n_rows

    @property
    def hook_points(self) -> tuple[str, ...]:
        return self.spec.point_names

    @cached_property
    def missing_shards(self) -> list[int]:
        """Shards that are not committed, or committed with fewer rows than are planned now; ascending."""
        space = self.spec.row_space(self.n_rows_planned)
        return self.reader.manifest.missing(space)

    @property
    def complete(self) -> bool:
        """Whether every planned row is committed."""
        return not self.missing_shards

    @cached_property
    def heldout(self) -> "ActivationDataset":
        """The held-out split, the same interface; raise ``NotFoundError`` where the job held nothing out."""
        try:
            return open(self.store.child("heldout").url, self.store.options)
        except NotFoundError as error:
            raise NotFoundError(
                f"{self.url} has no held-out split; it gets one from 'holdout' in the job file's [corpus], where that "
                "share of the documents has rows"
            ) from error

    @cached_property
    def corpus(self) -> "CorpusRows":
        """What the corpus knows of the rows' sequences: documents, labels, tokens. Opened when first used."""
        from actlake.shards.corpus_rows import CorpusRows

        return CorpusRows(self)

    def __repr__(self) -> str:
        manifest, spec = self.reader.manifest, self.spec
        ratio = f", {spec.nbytes_per_row * self.n_rows / manifest.nbytes:.2f}x compressed" if manifest.nbytes else ""
        state = "complete" if self.complete else f"{len(self.missing_shards):_} shards missing"
        points = self.hook_points if len(self.hook_points) <= 4 else (*self.hook_points[:3], "...")
        lines = (
            f"ActivationDataset {self.url}",
            f"  model        {spec.model}, {spec.split} split, {spec.dtype}",
            f"  rows         {self.n_rows:_} of {self.n_rows_planned:_} in {len(manifest):_} shards, {state}",
            f"  hook points  {len(self.hook_points)}: {', '.join(points)}",
            f"  stored       {manifest.nbytes / 1e9:.3f} GB{ratio}",
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from actlake.shards.repr_html import dataset_html

        return dataset_html(self)

    # --- rows ---

    def __getitem__(self, name: str) -> "PointView":
        """Return the view of a hook point, or of a row column such as ``rows/token_id``."""
        if name not in self.reader.arrays:
            raise UnknownNameError(f"{self.url} has no array {name!r}{nearest(str(name), self.reader.arrays)}")
        return PointView(self, self.reader.arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_points)

    def __contains__(self, name: object) -> bool:
        return name in self.reader.arrays

    def tensor(self, name: str, rows: RowKey) -> "torch.Tensor":
        """Return ``self[name][rows]`` as a tensor, bfloat16 as ``torch.bfloat16``, without a copy."""
        require_torch()
        from actlake.shards.batch import to_tensor

        found = np.asarray(self[name][rows])
        return to_tensor(found.view(bits_dtype(self[name].array)))

    def rows(self, rows: RowKey) -> dict[str, npt.NDArray[Any]]:
        """Return token_id, position, sequence and role of rows, without reading activations."""
        return {column: self[f"rows/{column}"][rows] for column in ROW_COLUMNS}

    def statistics(self, point: str) -> Moments:
        """Return count, mean, M2 and mean norm of a hook point over the committed rows that are not void, in float64.

        Folded from what was stored with each shard. Raises ``MissingObjectError`` or ``CorruptObjectError``.
        """
        if point not in self.hook_points:
            raise UnknownNameError(f"{self.url} has no hook point {point!r}{nearest(point, self.hook_points)}")
        if point not in self._moments:
            self._moments[point] = self.moments(point, self.reader.manifest.shards)
        return self._moments[point]

    def _moments_of(self, point: str) -> Callable[[int], Moments]:
        return lambda shard: self.reader.moments(shard, point)

    # --- training ---

    def stream(self, points: Points, **options: Any) -> "ActivationStream":
        """Return a stream of shuffled batches over the shards that were committed when the dataset was opened.

        ``points`` are hook points or patterns of them (``"layers.*.resid_post"``), or ``{"inputs": [...], "targets":
        [...]}``; ``shards.streaming.make_stream`` has all options and what is raised.
        """
        require_torch()
        from actlake.shards.streaming import stream_of

        return stream_of(self, points, options)

    def where(self, **conditions: Any) -> "View":
        """Return a view of the rows that fulfil all conditions: the same interface, chosen as rows are read.

        By position, position_from_end, role, token_id, any field of the corpus, or the norm of a hook point in
        multiples of its median: ``shards.select.where`` has them all and what is raised.
        """
        from actlake.shards.view import View

        return View(self, ()).where(**conditions)

    def normalizer(self, points: Points, kind: str) -> "Normalizer":
        """Return what maps rows of hook points to a common size by their statistics, and trained weights back.

        ``kind`` is ``"unit"``, ``"sqrt_d"`` or ``"standardize"``. Raises as ``shards.normalizer.Normalizer.of``.
        """
        require_torch()
        from actlake.shards.streaming import make_normalizer

        return make_normalizer(self, points, kind)

    def context(self, rows: RowKey, *, before: int = 20, after: int = 10) -> "list[RowContext]":
        """Return the text around rows: their tokens among their neighbours, document and metadata.

        Reads no activations. Raises ``NotFoundError`` where the corpus is gone.
        """
        require_torch()
        from actlake.shards.lookup import context

        return context(self, rows, before=before, after=after)

    def sequence(self, number: int, points: str | Sequence[str] | None = None) -> "SequenceRows":
        """Return all rows of one sequence in order, at some hook points or all; ``shards.lookup.sequence``."""
        require_torch()
        from actlake.shards.lookup import sequence

        return sequence(self, number, points)

    def sample(self, points: str | Sequence[str], n: int, seed: int = 0) -> "TokenBatch":
        """Return a batch of ``n`` uniform rows that are not void, drawn without replacement.

        For a bias or a geometric median to begin with; ``shards.lookup.draw_rows`` says what is read and raised.
        """
        require_torch()
        from actlake.shards.lookup import draw_rows

        return self.batch_of(points, draw_rows(self.source(self.hook_points), n, seed=seed))

    def batch_of(self, points: str | Sequence[str], rows: I64) -> "TokenBatch":
        """Return a batch of these rows, int64 [B], in their order; ``points`` are hook points or patterns of them."""
        require_torch()
        from actlake.shards.batch import TokenBatch
        from actlake.shards.columns import BatchColumns

        chosen = self.spec.select(points if isinstance(points, str) else list(points))

        def read(name: str) -> npt.NDArray[Any]:
            return rows if name == "row" else self[f"rows/{name}"][rows]

        return TokenBatch({point: self.tensor(point, rows) for point in chosen}, BatchColumns(read))

    # --- what a stream asks for ---

    def select(self, pattern: str) -> tuple[str, ...]:
        """Expand one pattern of hook points; raise ``UnknownNameError`` for one that selects nothing."""
        return self.spec.select(pattern)

    def source(self, points: Sequence[str]) -> "Source":
        """Return the arrays of hook points, for a stream."""
        from actlake.shards.source import Source

        return Source(columns=self.reader, points={name: (self.reader, self.reader.arrays[name]) for name in points})

    def moments(self, point: str, shards: Sequence[int]) -> Moments:
        """Return the statistics of a hook point over some shards, folded as ``statistics`` does."""
        with Workers(thread_count(self.store.local)) as workers:
            parts = dict(zip(shards, workers.map(self._moments_of(point), shards), strict=True))
        return fold(parts, self.reader.arrays[point].width or 1)

    def labels(self, field: str) -> Callable[[npt.NDArray[Any]], list[str | None]]:
        """Return what gives a metadata field for sequence numbers; raise ``UnknownNameError`` for an unknown one."""
        self.corpus.require_field(field)
        return partial(self.corpus.values, field)

    def reopened(self) -> "ActivationDataset":
        """Return the dataset on the shards that are committed now."""
        return open(self.store.url, self.store.options)

    @property
    def planned_shards(self) -> list[int]:
        """Rows of each shard that is planned, ascending."""
        space = self.spec.row_space(self.n_rows_planned)
        return [len(space.rows_of(shard)) for shard in range(space.n_shards)]


def require_torch() -> None:
    """Raise ``MissingExtraError`` where torch is absent."""
    try:
        import torch  # noqa: F401  (looked for here, so that the message can name the remedy)
    except ImportError as error:
        raise MissingExtraError("tensors need torch, which is not installed; pip install torch") from error
