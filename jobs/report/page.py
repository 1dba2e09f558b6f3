"""The page itself: assets and data in one file that asks for nothing else.

What comes from data is JSON in a script element of a type that is never run, and the page's own code puts it in place
as text. The Content-Security-Policy allows the embedded scripts and styles by their hashes, and no connection at all.
"""

import base64
import hashlib
import json
from importlib.resources import files
from string import Template
from typing import Any

from actlake.jobs.report.collect import Contents

#: In the order in which they run. The third-party ones are as published; assets/LICENSES.txt has their terms.
SCRIPTS = ("d3-7.9.2.min.js", "plot-0.6.17.min.js", "dom.js", "charts.js", "documents.js", "report.js")

#: The style that Plot puts into each of its figures, for the class name that charts.js gives it.
_PLOT_STYLE = """:where(.chart) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.chart text),
:where(.chart tspan) {
  white-space: pre;
}"""


def render(contents: Contents) -> bytes:
    """Return the page, UTF-8."""
    style = _asset("report.css")
    scripts = [_asset(name) for name in SCRIPTS]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)} {_hash(_PLOT_STYLE)}"
    )
    page = Template(_asset("report.html")).substitute(
        policy=policy,
        style=style,
        licences=_asset("LICENSES.txt"),
        data=embed(contents.to_json()),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    return page.encode()


def embed(value: Any) -> str:
    """Return JSON that is harmless inside a script element: nothing in it can end the element or open another.

    Raises ``ValueError`` for a number that JSON does not have.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files("actlake.jobs.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
