"""The command's entry: its groups, its exit codes, and how errors are shown.

Exit code 0: done; 1: some shards could not be built; 2: bad input or damaged data; 130: interrupted; 143: terminated
(SIGTERM, as Slurm and Kubernetes send it before they take a machine away).
"""

import logging
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import actlake
from actlake.storage.errors import ActlakeError, ShardFailedError

#: Messages go to stderr, so that what a command prints can be piped. Neither console reads markup or emoji codes: most
#: of what is shown comes from data, and texts and names may hold ``seq[index]`` or ``a[/b]``.
ERRORS = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
OUT = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

#: Whether SIGTERM has come; it then ends the command as Ctrl-C does.
_terminated = False


class Commands(TyperGroup):
    """Turns our errors into a message and an exit code; other exceptions keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ActlakeError as error:
            ERRORS.print("error:", style="bold red", end=" ")
            ERRORS.print(str(error))
            raise typer.Exit(1 if isinstance(error, ShardFailedError) else 2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(_say_interrupted()) from error


app = typer.Typer(
    cls=Commands,
    name="actlake",
    help="Build, store and stream activation datasets of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"actlake {actlake.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    # Libraries' own chatter would tear the progress bars.
    for name in ("transformers", "huggingface_hub.utils._http", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; an interrupted one ends at once, whatever its threads are doing."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from actlake.jobs.cli import cluster, corpus, demo, ingest, plan, query, report, sql, stats, store, verify  # noqa: F401 - each registers

        app()
    except KeyboardInterrupt:
        # No command ran yet: the modules were loading.
        _leave(_say_interrupted())
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            # While Ray starts, the handler is Ray's own.
            _leave(_say_interrupted(_TERMINATED))
        if ended.code in (_INTERRUPTED, _TERMINATED):
            _leave(ended.code)
        raise


def _terminate(*_: Any) -> None:
    global _terminated
    # Once is enough: the next one would break off what is being put away.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _terminated = True
    raise KeyboardInterrupt


def interrupted_code() -> int:
    """Return the exit code of a command that was interrupted, or terminated."""
    return _TERMINATED if _terminated else _INTERRUPTED


def _say_interrupted(code: int = 0) -> int:
    """Say that the command did not end by itself; return its exit code."""
    code = code or interrupted_code()
    what = "terminated" if code == _TERMINATED else "interrupted"
    ERRORS.print(f"{what}; run the same command again to go on where it stopped")
    return code


def _leave(code: int) -> NoReturn:
    # An orderly exit waits for the encoding threads, and aborts (SIGABRT) where the worker's thread is inside torch.
    from actlake.storage.unfinished import remove_unfinished

    remove_unfinished()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
