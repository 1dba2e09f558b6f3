"""A store that fails, stalls, truncates, forgets its answers or repeats requests: the dataset is the same."""

from pathlib import Path

import pytest
from chaos.campaign import Run, World
from faults import Faults, proxy
from runs import contents
from servers import Servers

from actlake.storage.listing import list_objects
from actlake.storage.stores import Store

#: Of ten requests one ends badly.
RATES = dict.fromkeys(("429", "500", "503", "reset", "truncate", "lost", "twice", "stale"), 0.012) | {"stall": 0.003}


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_job_through_a_bad_network_gives_the_bytes_of_a_local_one(
    world: World, servers: Servers, tmp_path: Path, kind: str
) -> None:
    plain = servers.folder(kind)
    faults = Faults(rates=RATES, seed=4)
    with proxy(servers[kind].port, faults) as port:
        through = servers[kind].store(plain.url, port, wait_s=0.01, stall_s=1.0, deadline_s=120.0)
        run = Run(world, tmp_path / "run", dataset=f"{plain.url}/ds", options=through.options)
        run.build()
    assert {"429", "500", "503", "reset", "truncate", "lost", "twice", "stall"} <= set(faults.done)
    assert contents(downloaded(plain.child("ds"), tmp_path / "copy")) == world.contents


def downloaded(store: Store, folder: Path) -> Path:
    """Copy a store to a folder."""
    for found in list_objects(store):
        place = folder / found.key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(store.read(found.key))
    return folder
