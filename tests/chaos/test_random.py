"""SIGKILL at random times of a whole run, its corpus and its summaries included: a sample of what run.py does."""

import random
from pathlib import Path

import pytest
from chaos.campaign import Run, World
from chaos.scenes import DRIVER, ONE, Scene, at_random


@pytest.mark.parametrize("seed", range(6))
def test_one_process_is_killed_at_random_times(world: World, tmp_path: Path, seed: int) -> None:
    run, drawn = Run(world, tmp_path, salted=seed % 3 == 2), random.Random(seed)
    at_random(Scene(ONE, DRIVER), run, drawn, world.seconds)
    assert run.outcome().is_whole
