"""Attempts that go on after another has committed: harmless where bits reproduce, found elsewhere."""

from pathlib import Path

import pytest
from chaos.campaign import Run, World
from chaos.scenes import late, late_and_killed
from chaos.site.planted import BEFORE_COMMIT, BETWEEN_OBJECTS

from actlake.shards.verify import repair, verify

POINT = pytest.mark.parametrize("point", [BETWEEN_OBJECTS, BEFORE_COMMIT])


@POINT
def test_a_process_that_goes_on_late_changes_nothing_where_bits_reproduce(
    world: World, tmp_path: Path, point: str
) -> None:
    late(run := Run(world, tmp_path), point)
    assert run.outcome().is_whole


@POINT
@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_where_bits_differ_what_it_has_mixed_is_found_and_built_again(
    world: World, tmp_path: Path, point: str, codec: str
) -> None:
    late(run := Run(world, tmp_path, salted=True, codec=codec), point)
    require_found_and_mended(run)


def test_objects_of_a_late_process_that_dies_before_its_commit_are_found(world: World, tmp_path: Path) -> None:
    late_and_killed(run := Run(world, tmp_path, salted=True))
    require_found_and_mended(run)


def require_found_and_mended(run: Run) -> None:
    found = run.outcome()
    assert found.is_sound, found
    assert found.mixtures_found >= 1
    for ds in run.splits():
        repair(ds, verify(ds, n_threads=1))
    assert run.resume().outcome().is_whole
