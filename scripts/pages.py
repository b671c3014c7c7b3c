"""Tables of results, in Markdown and as a page of HTML that needs nothing from the network."""

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: 0.2em 1em; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child { text-align: left; }
svg text { font-size: 12px; fill: #444; }
img { max-width: 100%; image-rendering: pixelated; }
""".strip()

Row = dict[str, str]  # heading -> text


def headings(rows: Sequence[Row]) -> list[str]:
    """Every heading of some row, at its place in the first row that has it."""
    found: list[str] = []
    for row in rows:
        at = 0
        for heading in row:
            if heading in found:
                at = found.index(heading) + 1
            else:
                found.insert(at, heading)
                at += 1
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown; a value that a row does not have is a dash."""
    columns = headings(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(name, "-") for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html_table(rows: Sequence[Row]) -> str:
    """The table in HTML; a value that a row does not have is a dash."""
    columns = headings(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(row.get(name, '-'))}</td>" for name in columns) + "</tr>\n"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def page(title: str, body: str) -> str:
    """A complete page.

    Args:
        body: HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    )
