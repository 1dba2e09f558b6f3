"""Small pieces of HTML for notebooks. Everything that comes from data is escaped."""

from collections.abc import Mapping
from html import escape

#: No colours of its own but those of the bar: notebooks are light or dark.
_BAR = (
    '<div style="width:16em;height:.6em;border-radius:.3em;background:#8884;overflow:hidden">'
    '<div style="width:{width:.2f}%;height:100%;background:{colour}"></div></div>'
)
_WHOLE, _PART = "#2e9e6b", "#d08a17"


def table_html(title: str, rows: Mapping[str, str]) -> str:
    """Return a small table: a title and named values, both plain text."""
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table><caption style="text-align:left"><b>{escape(title)}</b></caption>{cells}</table>'


def bar_html(share: float, label: str) -> str:
    """Return a bar of a share from 0 to 1 with its label: green where it is whole."""
    colour = _WHOLE if share >= 1 else _PART
    return _BAR.format(width=100 * share, colour=colour) + f"<div>{escape(label)}</div>"
