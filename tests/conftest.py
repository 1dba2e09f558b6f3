"""What every test shares: one thread per library, no calls home, and the order from the fast areas to the slow ones."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chaos.campaign import World
    from servers import Servers

# Read by the libraries when they are imported, so set before any test module is. Two cores run the suite: more threads
# than one make the timings of the parallel tests worthless and the sums of some kernels differ.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLOSC_NTHREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(
    TOKENIZERS_PARALLELISM="false",  # it warns after a fork otherwise, and warnings are errors
    HF_HUB_OFFLINE="1",  # no test may depend on a hub: what is not there fails at once instead of after retries
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",  # loopback only
)

# The environment of the trainers' tests has no Hypothesis.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # No deadline a case: the machine that runs the tests may be busy. The same cases in every run: a change is not to
    # be blamed for a case that has nothing to do with it. `pytest --hypothesis-profile explore` looks for new ones.
    settings.register_profile("actlake", deadline=None, derandomize=True)
    settings.register_profile("explore", deadline=None, max_examples=1_000)
    settings.load_profile("actlake")

_TESTS = Path(__file__).parent
_AREAS = ("storage", "ingest", "shards", "jobs", "infra", "fuzz", "", "chaos", "integration", "trainers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by area, the ones marked slow after all others; inside an area the order stays."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[bool, int]:
    parts = item.path.relative_to(_TESTS).parts
    area = parts[0] if len(parts) > 1 else ""
    return item.get_closest_marker("slow") is not None, _AREAS.index(area)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Run one Ray for all tests of this session."""
    from actlake.jobs.engines import ray_cluster

    with ray_cluster.cluster(None, n_cpus=2):
        yield


@pytest.fixture(scope="session")
def servers() -> "Iterator[Servers]":
    """Object stores on the loopback; each server starts when a test first asks for it."""
    from servers import Servers

    found = Servers()
    yield found
    found.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """A tiny model and texts, and what an undisturbed run makes of them: for the runs that are disturbed."""
    from chaos.campaign import World

    return World.make(tmp_path_factory.mktemp("chaos") / "world")
