"""The last step of whoever adds shards to a dataset: what summarises them."""

from actlake.storage.header import Header
from actlake.storage.manifest import Manifest, compact, write_root
from actlake.storage.stores import Store


def finish(store: Store, header: Header) -> Manifest:
    """Compact the groups that are full, write ``root.json`` where no planned shard is missing; return what is there."""
    manifest = Manifest.load(store, header.n_rows)
    space = header.spec.row_space(header.n_rows)
    sizes = {shard: len(space.rows_of(shard)) for shard in range(space.n_shards)}
    groups = compact(store, manifest, space.n_shards, sizes)
    if manifest.n_rows_by_shard() == sizes:
        write_root(store, dataset_id=header.spec.dataset_id, n_rows=header.n_rows, manifest=manifest, groups=groups)
    return manifest
