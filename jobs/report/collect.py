"""Everything that the page shows, as plain values for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import actlake
from actlake.jobs.report.documents import Documents, documents
from actlake.jobs.report.manifest_facts import Provenance, Span, Split, provenance, spans, split_facts
from actlake.jobs.report.mix import Mix, mix
from actlake.jobs.report.point_facts import ChannelMap, Point, points, stat_shards
from actlake.jobs.report.sample import PositionProfile, position_profile, sample_rows
from actlake.shards.corpus_rows import CorpusRows
from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import NotFoundError, SpecMismatchError
from actlake.storage.rowspace import ROLES

#: Rows that are read for what the stored statistics do not have.
DEFAULT_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The data of one page. ``splits`` has the training split first; all else but the run in time is of that split.

    Statistics are of ``n_stat_shards`` of the committed shards. ``corpus_note`` says why texts and labels are absent.
    """

    name: str
    url: str
    version: str
    generated: str
    watch_s: float
    complete: bool
    spec: Mapping[str, Any]
    ids: Mapping[str, str]
    splits: Sequence[Split]
    provenance: Provenance
    spans: Sequence[Span]
    n_stat_shards: int
    points: Sequence[Point]
    channel_maps: Mapping[str, ChannelMap]
    sample_points: Sequence[str]
    positions: PositionProfile
    mix: Mix
    documents: Documents
    corpus_note: str
    pieces: Mapping[str, str]
    roles: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the contents as JSON values."""
        return asdict(self)


def collect(ds: ActivationDataset, *, n_rows: int = DEFAULT_ROWS, watch_s: float = 0.0) -> Contents:
    """Read what the page shows of a dataset as it was opened; ``n_rows`` rows are sampled, none if 0."""
    splits = [ds, ds.heldout] if ds.spec.split == "train" and ds.store.exists("heldout/spec.json") else [ds]
    sample = sample_rows(ds, n_rows)
    corpus, corpus_note = _corpus(ds)
    shown = documents(ds, corpus) if n_rows else Documents()
    mixed = mix(sample, corpus)
    shards = stat_shards(ds)
    found, maps = points(ds, shards, sample)
    return Contents(
        name=ds.url.rstrip("/").rsplit("/", 1)[-1],
        # A page is passed on: where on a machine the dataset lay is nobody's business.
        url="" if ds.store.local else ds.url,
        version=actlake.__version__,
        generated=datetime.now(UTC).isoformat(timespec="seconds"),
        watch_s=watch_s,
        complete=all(split.complete for split in splits),
        spec=ds.spec.to_json(),
        ids={"dataset_id": ds.spec.dataset_id, "row_space_id": ds.spec.row_space_id, "corpus_id": ds.spec.corpus_id},
        splits=[split_facts(split) for split in splits],
        provenance=provenance(splits),
        spans=spans(splits),
        n_stat_shards=len(shards),
        points=found,
        channel_maps=maps,
        sample_points=tuple(sample.norms),
        positions=position_profile(sample),
        mix=mixed,
        documents=shown,
        corpus_note=corpus_note,
        pieces=_pieces(corpus, mixed, shown),
        roles={str(code): name for name, code in ROLES.items()},
    )


def _corpus(ds: ActivationDataset) -> tuple[CorpusRows | None, str]:
    """Return a dataset's corpus, or why it cannot be shown: a dataset is read without it."""
    try:
        ds.corpus.pieces()
    except (NotFoundError, SpecMismatchError) as error:
        return None, "the corpus is gone" if isinstance(error, NotFoundError) else "another corpus lies in its place"
    return ds.corpus, ""


def _pieces(corpus: CorpusRows | None, mixed: Mix, shown: Documents) -> dict[str, str]:
    """Return the readable text of the token ids that the page shows."""
    if corpus is None:
        return {}
    vocabulary = corpus.pieces()
    used = {token for token, _ in mixed.tokens} | {token for item in shown.documents for token in item.tokens}
    return {str(token): vocabulary[token] for token in sorted(used) if 0 <= token < len(vocabulary)}
