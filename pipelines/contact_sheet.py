"""A page that shows the pictures of a generation job, filtered by class or prompt."""

import base64
import html
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from smalti.files import replacing
from smalti.pipelines.output import png_of
from smalti.pipelines.picture_files import Store

SHEET = "index.html"
EMBEDDED = 300  # pictures of shards or of an npz that the page holds itself, at most ...
SIDE = 64  # ... with this longer side, in pixels
SHOWN_SIDE = 128  # CSS pixels of a picture

STYLE = f"""
body {{ font: 14px system-ui, sans-serif; margin: 1rem; }}
main {{ display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start; }}
figure {{ margin: 0; width: {SHOWN_SIDE}px; }}
figure[hidden] {{ display: none; }}
img {{ width: 100%; min-height: 32px; image-rendering: pixelated; }}
figcaption {{ font-size: small; overflow-wrap: anywhere; }}
label {{ margin-right: 1rem; }}
"""

SCRIPT = """
const figures = [...document.querySelectorAll("figure")];
const chosen = document.getElementById("class"), text = document.getElementById("prompt");
function show() {
  const name = chosen ? chosen.value : "", words = text ? text.value.toLowerCase() : "";
  let shown = 0;
  for (const figure of figures) {
    figure.hidden = (name && figure.dataset.class !== name) ||
      (words && !figure.dataset.prompt.toLowerCase().includes(words));
    shown += !figure.hidden;
  }
  document.getElementById("shown").textContent = `${shown} shown`;
}
for (const field of [chosen, text]) field && field.addEventListener("input", show);
show();
"""

Rows = Callable[[], Iterable[Mapping[str, Any]]]


def write_contact_sheet(path: Path, title: str, rows: Rows, store: Store) -> None:
    """Write a page of all pictures. It refers to their files, which a browser reads when they come
    into view; of shards and of an npz it holds small copies of some pictures.

    Args:
        title: one line about the job.
        rows: the rows of the manifest, each time it is called.
        store: where the pictures are.
    """
    embedded = any("member" in row or row["file"].endswith(".npz") for row in _first(rows(), 1))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as page:
        page.write('<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n')
        page.write(f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n")
        page.write(f"<h1>{html.escape(title)}</h1>\n")
        shown: Iterable[Mapping[str, Any]] = rows()
        if embedded:
            shown, total = _of_every_class(rows()), sum(1 for _ in rows())
            file = "shards" if store.beside else "samples.npz"
            page.write(
                f"<p>{len(shown)} of {total} pictures, in small copies: a browser cannot show "
                f"pictures inside {file}.</p>\n"
            )
        _write_filters(page, rows)
        page.write("<main>\n")
        for row in shown:
            source = _embedded(row, store) if embedded else quote(row["file"])
            page.write(_figure(row, source, linked=not embedded))
        page.write(f"</main>\n<script>{SCRIPT}</script>\n</html>\n")


def _first(rows: Iterable[Mapping[str, Any]], count: int) -> Iterator[Mapping[str, Any]]:
    return itertools.islice(rows, count)


def _write_filters(page: TextIO, rows: Rows) -> None:
    """A list of the classes and a field for words of the prompts, as far as there are some."""
    page.write("<p>")
    classes = sorted({row["class"] for row in rows() if "class" in row})
    if classes:
        names = (html.escape(name) for name in classes)
        options = "".join(f'<option value="{name}">{name}</option>' for name in names)
        page.write('<label>class <select id="class"><option value="">all</option>')
        page.write(f"{options}</select></label>")
    if any("prompt" in row for row in _first(rows(), 1)):
        page.write('<label>prompt <input id="prompt" type="search"></label>')
    page.write('<output id="shown"></output></p>\n')


def _figure(row: Mapping[str, Any], source: str, *, linked: bool) -> str:
    caption = ", ".join(str(row[name]) for name in ("class", "prompt") if name in row)
    data = "".join(
        f' data-{name}="{html.escape(row[name])}"' for name in ("class", "prompt") if name in row
    )
    image = f'<img loading="lazy" alt="{html.escape(caption)}" src="{source}">'
    if linked:
        image = f'<a href="{source}">{image}</a>'
    name = f"{row['index']}: {html.escape(caption)}" if caption else str(row["index"])
    return f"<figure{data}>{image}<figcaption>{name}</figcaption></figure>\n"


def _of_every_class(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Up to `EMBEDDED` rows, as many of each class or prompt as of the others."""
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        group = groups.setdefault((row.get("class"), row.get("prompt")), [])
        if len(group) < EMBEDDED:
            group.append(row)
    turns = itertools.zip_longest(*groups.values())
    chosen = _first((row for turn in turns for row in turn if row is not None), EMBEDDED)
    return sorted(chosen, key=lambda row: row["index"])


def _embedded(row: Mapping[str, Any], store: Store) -> str:
    """A small copy of a picture, as the source of an image."""
    content = store.find(row["index"], row["sha256"])
    picture = None if content is None else store.thumbnail(content)
    if picture is None:
        return ""
    picture.thumbnail((SIDE, SIDE))
    return f"data:image/png;base64,{base64.b64encode(png_of(picture)).decode()}"
