"""Pictures of a report, for the documents: ``python tests/screenshots.py report.html docs/img``."""

import sys
from pathlib import Path
from typing import Literal

from browser import chromium, open_page
from playwright.sync_api import Browser, FloatRect

Scheme = Literal["light", "dark"]


def shoot(browser: Browser, report: Path, folder: Path) -> list[Path]:
    """Write the head of the page and a few of its sections in both themes, and a phone's view; return the files."""
    views: tuple[tuple[str, Scheme, int, str | None], ...] = (
        ("report-light", "light", 1120, None),
        ("report-norms", "light", 1120, "#norms"),
        ("report-channels-dark", "dark", 1120, "#channels"),
        ("report-documents-dark", "dark", 1120, "#documents"),
        ("report-phone", "light", 390, None),
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, scheme, width, section in views:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 1200})
        page = open_page(context, report).page
        target = folder / f"{name}.png"
        if section is None:
            page.screenshot(path=target)
        else:
            box = page.locator(section).bounding_box()
            assert box is not None, f"the report has no {section}"
            clip: FloatRect = {"x": 0, "y": box["y"], "width": width, "height": box["height"] + 24}
            page.screenshot(path=target, clip=clip, full_page=True)
        context.close()
        written.append(target)
    return written


def main(report: str, folder: str) -> None:
    """Shoot a report that is there."""
    with chromium() as browser:
        shoot(browser, Path(report).resolve(), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
