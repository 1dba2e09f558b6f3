"""The last step of whoever adds shards to a dataset: what summarises them."""

from actlake.storage.groups import compacted_groups
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest, compact, write_root
from actlake.storage.stores import Store


def finish(store: Store, header: Header) -> Manifest:
    """Compact the groups that are full, write ``root.json`` where no planned shard is missing; return what is there."""
    manifest, before = Manifest.load(store, header.n_rows), compacted_groups(store)
    space = header.spec.row_space(header.n_rows)
    groups = compact(store, manifest, space)
    if not set(groups) <= set(before):
        # The records of many commits are not kept: from here on they come from the groups.
        manifest = Manifest.load(store, header.n_rows)
    if manifest.is_exactly(space):
        write_root(store, dataset_id=header.spec.dataset_id, n_rows=header.n_rows, manifest=manifest, groups=groups)
    return manifest
