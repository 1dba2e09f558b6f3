"""The pages on planning quote the planner: their numbers are computed again, with the commands that they give."""

import json
import math
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, blocks, commands
from typer.testing import CliRunner

from actlake.jobs.cli import plan  # noqa: F401 - registers its command
from actlake.jobs.cli.app import app
from actlake.jobs.plan.rates import read_rates
from actlake.jobs.units import format_nbytes

PAGE = ROOT / "docs/petabyte.md"


def words(page: Path) -> str:
    """Return a page with one space between words, wherever its lines end."""
    return " ".join(page.read_text().split())


def planned(line: list[str]) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*line, "--json"])
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@cache
def releases() -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan the release as the page's two commands do: with the default memory of a shard, and with more of it."""
    narrow, wide = (line[1:] for line in commands(PAGE.read_text()) if line[1:3] == ["plan", "--release"])
    assert wide == [*narrow, "--shard-memory", "128GiB"]
    return planned(narrow), planned(wide)


@pytest.fixture(scope="module")
def wave(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of the page's job of eight layers."""
    job = tmp_path_factory.mktemp("wave") / "job.toml"
    (text,) = blocks(PAGE.read_text(), "toml")
    job.write_text(text)
    (line,) = (line[1:] for line in commands(PAGE.read_text()) if line[:3] == ["actlake", "plan", "job.toml"])
    return planned([str(job) if word == "job.toml" else word for word in line])


def total(release: dict[str, Any], *keys: str) -> float:
    """Return the sum of one number of all plans."""
    found = 0.0
    for made in release["plans"]:
        value: Any = made
        for key in keys:
            value = value[key]
        found += value
    return found


def of(release: dict[str, Any], model: str) -> dict[str, Any]:
    (found,) = (made for made in release["plans"] if made["model"] == f"google/{model}")
    return dict(found)


def dollars(amount: float) -> str:
    return f"${amount:,.0f}"


def thousands(amount: float) -> str:
    return f"${round(amount, -3):,.0f}"


def check(page: Path, *quoted: str) -> None:
    """Each of these is what the planner says now, so the page has to say it."""
    text = words(page)
    assert [one for one in quoted if one not in text] == []


def test_the_bytes_of_the_release_are_the_planners() -> None:
    for release in releases():
        assert format_nbytes(release["nbytes"]) == "110.2 PB"
        large = sum(made["nbytes"] for made in release["plans"] if re.search("12b|27b", made["model"]))
        check(
            PAGE,
            f"**{format_nbytes(release['nbytes'])}** in float32",
            f"store **{format_nbytes(release['stored'])}** of it",
            f"compute, {format_nbytes(release['nbytes'] / 2)}, and a lossless codec",
            f"({release['nbytes'] / release['stored']:.2f}x less in all)",
            f"{large / release['stored']:.0%}".replace("%", " %") + " of that are the 12B and the 27B",
        )
    check(ROOT / "docs/planning.md", f"{format_nbytes(releases()[0]['nbytes'])} in float32")


def test_the_table_of_object_sizes_is_the_planners() -> None:
    rows = [
        ("shards", [f"{total(one, 'n_shards'):,.0f}" for one in releases()]),
        ("objects", [f"{total(one, 'n_objects'):,.0f}" for one in releases()]),
        ("writes, class A", [dollars(total(one, "cost", "requests")) for one in releases()]),
        ("GPU-hours", [f"{total(one, 'gpu_hours'):,.0f}" for one in releases()]),
        ("time on 32 machines", [f"{total(one, 'seconds', 'total') / 3600:.1f} h" for one in releases()]),
        ("largest object, 27B", [f"{of(one, 'gemma-3-27b-pt')['largest_object'] / 1e6:.0f} MB" for one in releases()]),
    ]
    rows += [
        (
            "rows of a shard, 270M to 27B",
            [
                f"{one['plans'][0]['rows_per_shard']:,} to {of(one, 'gemma-3-27b-pt')['rows_per_shard']:,}"
                for one in releases()
            ],
        )
    ]
    check(PAGE, *(f"| {name} | {' | '.join(values)} |" for name, values in rows))
    twice = [of(one, "gemma-3-27b-pt")["tokens"] for one in releases()]
    shares = [one["straddling"] / one["run"] for one in twice]
    check(
        PAGE, f"run {100 * shares[1]:.1f} % of the tokens twice", f"the 4,096 of the default, {100 * shares[0]:.0f} %"
    )
    most = max(made["memory"]["host"] * made["memory"]["workers"] for made in releases()[1]["plans"])
    room = releases()[1]["plans"][0]["machine"]["memory"]
    check(PAGE, f"take at most {most / 1e12:.1f} TB (12B) of its {room / 1e12:.1f} TB")


def test_the_request_rates_and_the_ramp_are_the_planners() -> None:
    at_first = read_rates().stores["gcs"].writes_per_s
    assert at_first is not None
    for release, said, n_doublings in zip(
        releases(), ("25,000 a second", "3,100 objects a second"), (5, 2), strict=True
    ):
        made = of(release, "gemma-3-27b-pt")
        per_s = made["n_objects"] / made["seconds"]["total"]
        assert per_s == pytest.approx(float(said.split()[0].replace(",", "")), rel=0.03)
        check(PAGE, said)
        assert math.ceil(math.log2(per_s / at_first)) == n_doublings
    bound = [made for made in releases()[0]["plans"] if made["binding"] == "store"]
    assert (len(bound), len(releases()[0]["plans"])) == (8, 10)
    check(
        PAGE, "the store binds for eight of the ten models", "two doublings, 40 minutes", "five doublings, 100 minutes"
    )
    fastest = max(made["nbytes"] / made["seconds"]["total"] for made in releases()[1]["plans"]) / 1e9
    check(PAGE, f"up to {fastest:.0f} GB/s of stored bytes", f"32 machines, {fastest / 32:.0f} GB/s each")
    base = of(releases()[1], "gemma-3-27b-pt")
    days, stored = base["read_seconds"] / 86400, format_nbytes(base["nbytes"])
    check(PAGE, f"{days:.1f} days for one pass over the 27B base model ({stored})")


def test_time_and_cost_are_the_planners() -> None:
    wide = releases()[1]
    base, compute, month = of(wide, "gemma-3-27b-pt"), total(wide, "cost", "compute"), total(wide, "cost", "month")
    assert base["binding"] == "encode"
    hours, gpu_hours = base["seconds"]["total"] / 3600, total(wide, "gpu_hours")
    check(
        PAGE,
        f"GPUs are idle for {100 * base['idle']:.0f} % of {hours:.1f} hours",
        f"The forward passes are {100 - 100 * base['idle']:.0f} % of the bill",
        f"costs **{thousands(month)} a month**, computing it {thousands(compute)} once",
        f"{gpu_hours:,.0f} GPU-hours, {dollars(compute)} at spot prices",
        f"writes {dollars(total(wide, 'cost', 'requests'))}; storage {dollars(month)} a month",
        f"{total(wide, 'failures'):.1f} interruptions are to be expected in {gpu_hours:,.0f} GPU-hours",
        f"{base['n_shards']:,} shards of the 27B in {base['gpu_hours']:,.0f} GPU-hours are "
        f"{3600 * base['gpu_hours'] / base['n_shards']:.0f} GPU-seconds a shard",
        f"has {base['n_shards']:,} shards of 252 arrays (128 GiB), or "
        f"{of(releases()[0], 'gemma-3-27b-pt')['n_shards']:,} (16 GiB)",
    )
    assert sum(row["n_points"] for row in wide["rows"] if row["model"] == base["model"]) + 4 == 252


def test_where_storing_does_not_pay_is_the_planners() -> None:
    wide = releases()[1]
    assert not any(made["store_or_recompute"]["store"] for made in wide["plans"])
    assert {made["store_or_recompute"]["at_once"] for made in wide["plans"]} == {None}
    sizes = {"270M": "gemma-3-270m", "1B": "gemma-3-1b-pt", "4B": "gemma-3-4b-pt"}
    sizes |= {"12B": "gemma-3-12b-pt", "27B": "gemma-3-27b-pt"}
    reads = {size: of(wide, model)["store_or_recompute"]["one_by_one"] for size, model in sizes.items()}
    said = [f"{n:.0f} reads (270M)" if size == "270M" else f"{n:.1f} ({size})" for size, n in reads.items()]
    check(PAGE, f"from {', '.join(said[:-1])} and {said[-1]} on it is cheaper")


def test_the_wave_is_the_planners(wave: dict[str, Any]) -> None:
    seconds = {name: f"{value / 60:.0f}" for name, value in wave["seconds"].items()}
    cost, verdict = wave["cost"], wave["store_or_recompute"]
    assert wave["binding"] == "encode"
    assert verdict["store"]
    shares = wave["tokens"]["straddling"] / wave["tokens"]["run"]
    check(
        PAGE,
        f"| stored | {format_nbytes(wave['nbytes'])} in {wave['n_objects']:,} objects, the largest "
        f"{format_nbytes(wave['largest_object'])}; {wave['rows_per_shard']:,} rows a shard |",
        f"| time | {seconds['total']} minutes, {wave['gpu_hours']:.0f} GPU-hours |",
        f"| limits alone | encode {seconds['encode']} min, forward {seconds['forward']}, store {seconds['store']}, "
        f"NIC {seconds['nic']}, PCIe {seconds['host']} |",
        f"| cost | {dollars(cost['compute'])} of computing, {dollars(cost['month'] / 2)} for half a month of storage |",
        f"| a pass over it at the default quota | {wave['read_seconds'] / 3600:.1f} h |",
        f"| run twice | {100 * shares:.1f} % of the tokens |",
        f"five reads of each hook point cost {dollars(verdict['stored_cost'])} stored, "
        f"{dollars(verdict['recomputed_cost'])} recomputed; from {verdict['one_by_one']:.1f} reads of each on |",
    )


def test_the_page_on_planning_has_the_passes_of_the_planner(tmp_path: Path) -> None:
    page = ROOT / "docs/planning.md"
    (text,) = (code for code in blocks(page.read_text(), "toml") if "gemma-3-27b" in code)
    job = tomllib.loads(text)
    assert (job["layout"]["rows_per_shard"], job["layout"]["shard_memory"]) == (32_768, "16GiB")
    (tmp_path / "job.toml").write_text(text)
    found = planned(["plan", str(tmp_path / "job.toml"), "--offline", "--machine", "a3-ultragpu-8g"])
    assert found["passes"]["n"] == 5
    check(page, f"fit in five passes, which take {found['passes']['forward']:.1f} times the forward passes' time")


def test_the_page_on_planning_has_the_rates() -> None:
    rates = read_rates()
    store = rates.stores["gcs"]
    assert store.doubling_s is not None
    check(
        ROOT / "docs/planning.md",
        f"`mfu` ({rates.mfu:g} by default",
        f"on CPUs {rates.cpu.core_gflops:g} Gflop/s a core",
        f"| encode | {rates.encode_s_per_gb('blosc'):g} CPU seconds a GB with the default codec, "
        f"{rates.encode_s_per_gb('none'):g} without",
        f"starts at {store.writes_per_s:,.0f} a second and doubles every {store.doubling_s / 60:g} minutes",
    )


def test_a_number_that_has_drifted_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Ten models:\n**110.3\nPB** in float32.")
    check(tmp_path / "page.md", "**110.3 PB** in float32")
    with pytest.raises(AssertionError, match=r"110\.2 PB"):
        check(tmp_path / "page.md", f"**{format_nbytes(releases()[0]['nbytes'])}** in float32")
