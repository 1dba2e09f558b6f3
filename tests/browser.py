"""A headless Chromium for the tests of pages: found on this machine, or put beside the tests' Python by ``make test``.

Playwright's own browsers come from a host that not every network reaches; the npm package ``@sparticuz/chromium``
brings a whole one, with the libraries and fonts that a bare machine lacks, from the registry that npm is set up for.
"""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

_PACKAGE = "@sparticuz/chromium@147.0.0"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_INSTALLED = Path(sys.prefix) / "browser"
_FONTS = """<?xml version="1.0"?>
<fontconfig>
<dir>{folder}/fonts</dir><cachedir>{folder}/cache</cachedir>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include>
</fontconfig>
"""


def find() -> Path | None:
    """Return the browser to use: ``ACTLAKE_CHROMIUM``, else one on the path, else what ``make test`` installed."""
    if named := os.environ.get("ACTLAKE_CHROMIUM"):
        return Path(named)
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    installed = _INSTALLED / "chromium"
    return Path(found) if found else installed if installed.is_file() else None


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a headless Chromium; skip the test where there is none."""
    path = find()
    if path is None:
        pytest.skip("no Chromium here: 'make test' installs one where npm works, or set ACTLAKE_CHROMIUM to its path")
    environment: dict[str, str | float | bool] = {**os.environ}
    if path.parent == _INSTALLED:
        environment |= {"LD_LIBRARY_PATH": str(_INSTALLED / "lib"), "FONTCONFIG_FILE": str(_INSTALLED / "fonts.conf")}
    with sync_playwright() as playwright:
        # The pages under test are ours; as root, as in containers, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], env=environment)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page of a browser and what it complained about or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def open_page(context: BrowserContext, path: Path) -> Watched:
    """Open a local page, with everything that it logs, throws and asks for on record."""
    watched = Watched(page=context.new_page())
    watched.page.on("console", lambda message: watched.complaints.append(f"{message.type}: {message.text}"))
    watched.page.on("pageerror", lambda error: watched.complaints.append(f"error: {error}"))
    watched.page.on("request", lambda request: watched.requests.append(request.url))
    watched.page.goto(path.as_uri())
    # Figures of several plots are drawn a frame later, when they have a width.
    watched.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return watched


def install(folder: Path) -> bool:
    """Put a Chromium into ``folder`` by npm, unless there is one already; say so and return False where that fails."""
    if find() is not None:
        return True
    npm = shutil.which("npm")
    if npm is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return _cannot("it needs npm, Linux and x86-64")
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts"]
        done = subprocess.run([npm, "install", "--prefix", scratch, *options, _PACKAGE], capture_output=True, text=True)
        if done.returncode:
            return _cannot(done.stderr.strip())
        _unpack(Path(scratch, "node_modules", "@sparticuz", "chromium", "bin"), folder)
    return True


def _cannot(reason: str) -> bool:
    sys.stderr.write(f"no Chromium was installed, tests of pages will be skipped: {reason}\n")
    return False


def _unpack(packed: Path, folder: Path) -> None:
    import brotli

    folder.mkdir(parents=True, exist_ok=True)
    for archive in ("al2023.tar.br", "fonts.tar.br", "swiftshader.tar.br"):
        data = brotli.decompress(packed.joinpath(archive).read_bytes())
        with tarfile.open(fileobj=BytesIO(data)) as files:
            files.extractall(folder, filter="data")
    folder.joinpath("fonts.conf").write_text(_FONTS.format(folder=folder))
    program = folder / "chromium"
    program.write_bytes(brotli.decompress(packed.joinpath("chromium.br").read_bytes()))
    program.chmod(0o755)


if __name__ == "__main__":
    sys.exit(not install(_INSTALLED))
