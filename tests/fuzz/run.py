"""Feeds hostile objects to everything that reads: python tests/fuzz/run.py --inputs 100000.

Each input either works or raises one of our own errors, within a bound of memory and of time; anything else ends the
run with the smallest input that Hypothesis finds, and exit code 1.
"""

import argparse
import faulthandler
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

# As pytest has it: tests/ is where helpers are found.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz import targets
from hypothesis import HealthCheck, Phase, given, seed, settings

#: Memory that an input may take beside what the process had before, address space included: GiB.
MEMORY_GIB = 3
#: Seconds that one input may take.
TIME_S = 60


def limit_memory() -> None:
    """Let no input have more than ``MEMORY_GIB``: what asks for more gets ``MemoryError``, which is none of ours."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def run(name: str, target: targets.Target, world: targets.World, inputs: int, number: int) -> float:
    """Give a target so many inputs; return the seconds of the slowest. Raises what an input made it raise."""
    slowest = 0.0

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(target.objects)
    def check(objects: targets.Objects) -> None:
        nonlocal slowest
        faulthandler.dump_traceback_later(TIME_S, exit=True)
        start = time.monotonic()
        try:
            target.run(world, objects)
        finally:
            faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - start)

    check()
    return slowest


def described(error: BaseException) -> Iterator[str]:
    """Yield what was raised and where, and the input that did it, cut short."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from described(inner)
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "actlake" in f.filename]
    yield f"{type(error).__name__}: {error}"[:300]
    yield f"  at {' < '.join(ours[:-5:-1])}"
    yield from (f"  {note}"[:500] for note in getattr(error, "__notes__", ()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs, over all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only these")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # Hypothesis's, of large inputs; numpy's, of values that nobody would store
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        world = targets.World.build(Path(folder))
        every = targets.targets(world)
        chosen = {name: every[name] for name in args.target or every}
        for target in chosen.values():
            target.run(world, {})  # Everything that loads lazily is loaded before memory is limited.
        limit_memory()
        for name, target in chosen.items():
            start, n = time.monotonic(), max(1, args.inputs // len(chosen))
            try:
                slowest = run(name, target, world, n, args.seed)
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - whatever an input caused is looked for
                failed += 1
                print(f"{name}: FAILED", *described(error), sep="\n  ", flush=True)
                continue
            print(f"{name}: {n} inputs, {time.monotonic() - start:.1f} s, slowest {slowest:.2f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
