"""Capture on one GPU beside the bare forward pass, PCIe, the processor and the disk: Gemma 3 at 1B, 4B and 12B sizes.

    python benchmarks/bench_gpu.py [--minutes 8] [--shapes 1b 4b 12b] [--packages FOLDER] [--json FILE]

For a machine with one CUDA GPU, torch and transformers; no Ray, no network, no model, no installed actlake: this
checkout's is used. Weights and tokens are random. Each size is run bare (no hooks, no logits), then captured by the
real shard builder, driven as a worker drives it: to a folder on a disk and to one that drops the bytes, with and
without compression. A rate is what is sustained after the warm-up; it stands beside what bounds it, all measured here:
the forward pass alone, copies to pinned memory, the processor's work alone (statistics, encoding, checksums; all
threads), and writes to that disk. `--device cpu --shapes tiny --context 64` runs all of it in seconds without a GPU.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from harness import Report, make_parser, n_cores

SHAPES = ("1b", "4b", "12b", "tiny")
#: The modules that building shards imports.
PACKAGES = ("torch", "transformers", "numpy", "ml_dtypes", "pyarrow", "fsspec", "numcodecs", "crc32c")


def main() -> None:
    options = parse()
    require_packages(options.packages)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    # What it imports is at hand only now.
    bench = importlib.import_module("gpu_run")
    require_device(options.device)
    with Report(options) as report, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        failed = bench.run(options, report, folder)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES[:3])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; shards become smaller with less")
    parser.add_argument("--memory", default="48GiB", help="host memory that may be used (default: 48GiB)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: the system's temporary folder")
    parser.add_argument("--packages", type=Path, help="a folder with Python packages that are not installed here")
    parser.add_argument("--threads", type=int, default=n_cores(), help="that encode; default: all cores")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a forward pass; default: by shape")
    parser.add_argument("--max-rows", type=int, default=262_144, help="rows of a shard at most")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU; default: by its name")
    return parser.parse_args(arguments)


def require_packages(folder: Path | None) -> None:
    """Make a folder's packages importable, after those that are installed; exit where one is still missing."""
    if folder is not None:
        if not folder.is_dir():
            sys.exit(f"--packages {folder}: no such folder")
        sys.path.append(os.fspath(folder.resolve()))
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        names, version = " ".join(missing), ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"not installed here: {names}. Where there is a network: pip install --target FOLDER --no-deps "
            f"--only-binary :all: --python-version {version} --platform manylinux_2_28_{os.uname().machine} "
            f"--platform manylinux2014_{os.uname().machine} {names}; bring FOLDER here and add --packages FOLDER"
        )


def require_device(device: str) -> None:
    """Exit where a GPU is wanted and torch sees none."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU here; without one: --device cpu --shapes tiny --context 64")


if __name__ == "__main__":
    main()
