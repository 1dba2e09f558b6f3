"""The command's entry: its groups, its exit codes, and how errors are shown.

Exit code 0: done; 1: some shards could not be built; 2: bad input or damaged data; 130: interrupted.
"""

import logging
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import actlake
from actlake.storage.errors import ActlakeError, ShardFailedError

#: Messages go to stderr, so that what a command prints can be piped.
ERRORS = Console(stderr=True, soft_wrap=True, highlight=False)
OUT = Console(soft_wrap=True, highlight=False)


class Commands(TyperGroup):
    """Turns our errors into a message and an exit code; other exceptions keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ActlakeError as error:
            ERRORS.print("error:", style="bold red", end=" ")
            ERRORS.print(str(error), markup=False)
            raise typer.Exit(1 if isinstance(error, ShardFailedError) else 2) from error
        except KeyboardInterrupt as error:
            ERRORS.print("interrupted; run the same command again to go on where it stopped")
            raise typer.Exit(130) from error


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
    for name in ("transformers", "huggingface_hub", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line."""
    from actlake.jobs.cli import demo, ingest, query  # noqa: F401 - each registers its commands

    app()
