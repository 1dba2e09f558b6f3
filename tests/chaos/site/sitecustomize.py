"""Imported by every Python process that finds this folder on its path: a run that a test has begun is planted."""

import os
from pathlib import Path

if folder := os.environ.get("ACTLAKE_CHAOS"):
    import planted  # type: ignore[import-not-found]  # beside this file, which is on the path wherever this one is

    planted.plant(Path(folder))
