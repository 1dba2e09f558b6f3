"""Kills runs of a small job at every step of a shard and at random times: python tests/chaos/run.py --random 50

Each line is a dataset that was disturbed once, resumed, and compared with an undisturbed one byte for byte. Lines with
*bytes differ* have a model whose activations are others in every forward pass: there no mixture of two attempts may go
unseen. Exit code 1 where a row is lost or there twice, a byte is another, or a mixture was not found.
"""

import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# As pytest has it: tests/ and benchmarks/ are where helpers are found.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from chaos.campaign import Outcome, Run, World
from chaos.nodes import Nodes
from chaos.scenes import ONE, RAY, TWO, VICTIMS, Scene, at_point, at_random, late, late_and_killed
from chaos.site.planted import BEFORE_COMMIT, BETWEEN_OBJECTS, POINTS
from harness import Report, make_parser

#: Of so many random kills one is on Ray, and one on two processes: they take twenty times as long as the others.
_PERIOD = 8
BYTES_DIFFER = ", bytes differ"


class Campaign:
    """Runs one scene after another; keeps what became of each."""

    def __init__(self, folder: Path, nodes: Nodes | None) -> None:
        self.folder, self.nodes, self.n_runs, self.failed = folder, nodes, 0, 0
        self.world = World.make(folder / "world")
        self.rows: list[dict[str, Any]] = []

    def scenes(self, engines: list[str]) -> Iterator[Scene]:
        for engine in engines:
            for victim in VICTIMS[engine]:
                yield Scene(engine, victim, self.nodes if engine == RAY else None)

    def add(self, kind: str, name: str, scene: Scene, make: Callable[[Path], Run], do: Callable[[Run], object]) -> None:
        """Disturb one run and look at what is left."""
        self.n_runs += 1
        started, run = time.monotonic(), make(self.folder / f"run-{self.n_runs}")
        try:
            do(run)
            found = run.outcome()
        except Exception as error:  # noqa: BLE001 - shown, and counted as a failure
            traceback.print_exc()
            found = Outcome(kills=run.n_kills, resumes=run.n_resumes, problems=[f"{type(error).__name__}: {error}"])
        self.failed += not found.is_sound
        counts = {name.replace("_", " "): value for name, value in vars(found).items() if name != "problems"}
        self.rows.append({"point": kind, "engine": scene.engine, "killed": scene.victim, "runs": 1, **counts})
        said = "; ".join(found.problems) or ("sound" if found.is_sound else f"NOT SOUND: {counts}")
        print(f"{name}, {scene.engine}, {scene.victim}: {said}; {time.monotonic() - started:.0f} s", file=sys.stderr)

    def scripted(self, scene: Scene) -> None:
        """Kill at each point of a shard's way."""
        for point in POINTS:
            name = point.replace("-", " ")
            self.add(name, name, scene, partial(scene.run, self.world), partial(at_point, scene, point=point))

    def randomly(self, number: int, seed: int, engines: list[str]) -> None:
        """Kill at a time that follows from the seed and the number."""
        drawn = random.Random(f"{seed}-{number}")
        engine = {0: TWO, 4: RAY}.get(number % _PERIOD, ONE)
        engine = engine if engine in engines else ONE
        scene = Scene(engine, drawn.choice(VICTIMS[engine]), self.nodes if engine == RAY else None)
        salted = engine != RAY and number % 3 == 2
        # Processes of their own take as long as their imports: about 20 times a fork.
        seconds = self.world.seconds * (1 if engine == ONE else 20)
        kind = f"random time{BYTES_DIFFER * salted}"
        do = partial(at_random, scene, drawn=drawn, seconds=seconds)
        self.add(kind, f"{kind}, seed {seed}-{number}", scene, partial(scene.run, self.world, salted=salted), do)

    def lately(self) -> None:
        """Let a process go on after another has finished the dataset."""
        stopped, killed = Scene(ONE, "stopped"), Scene(ONE, "stopped, then killed")
        for salted, codec in ((False, "blosc"), (True, "blosc"), (True, "none")):
            make = partial(Run, self.world, codec=codec, salted=salted)
            kind = f"late, codec {codec}{BYTES_DIFFER * salted}"
            for point in (BETWEEN_OBJECTS, BEFORE_COMMIT):
                self.add(kind, f"{kind}, {point}", stopped, make, partial(late, point=point))
            self.add(kind, kind, killed, make, late_and_killed)


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each point, engine and victim."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        total = found.setdefault((row["point"], row["engine"], row["killed"]), dict.fromkeys(row, 0))
        for name, value in row.items():
            total[name] = total[name] + value if isinstance(value, int) else value
    return list(found.values())


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--random", type=int, default=50, help="kills at random times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default=",".join(VICTIMS), help="some of: " + ", ".join(VICTIMS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="actlake-chaos-") as name, Report(arguments) as report:
        engines, folder = arguments.engines.split(","), Path(name)
        with Nodes(folder / "nodes") as nodes:
            if RAY in engines:
                nodes.start_head()
                nodes.start_node()
            campaign = Campaign(folder, nodes)
            for scene in campaign.scenes(engines):
                campaign.scripted(scene)
            for number in range(arguments.random):
                campaign.randomly(number, arguments.seed, engines)
            campaign.lately()
        report.table("Chaos: what is left of disturbed runs", summed(campaign.rows), f"Seed {arguments.seed}.")
    print(f"{campaign.n_runs} runs disturbed, {campaign.failed} not sound", file=sys.stderr)
    return int(campaign.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
