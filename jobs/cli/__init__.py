"""The ``actlake`` command."""

from actlake.jobs.cli.app import main

__all__ = ["main"]
