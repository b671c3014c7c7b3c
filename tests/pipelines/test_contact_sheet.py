"""The page of a generation job lists every picture, and can be filtered."""

import html
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from smalti.pipelines import contact_sheet
from smalti.pipelines.contact_sheet import write_contact_sheet
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.picture_files import PictureFormat
from smalti.pipelines.pipeline import Pipeline

CLASSES = ("cat", "<dog> & #1", "emu")


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def test_the_page_refers_to_every_picture(pipe, tmp_path: Path) -> None:
    labels = [0, 1, 2, 1]
    paths = generate_folder(
        pipe, tmp_path, labels, seed=7, guidance_scale=1.0, batch_size=2, layout="class"
    )
    page = (tmp_path / "index.html").read_text()
    sources = re.findall(r'<img loading="lazy" alt="[^"]*" src="([^"]+)"', page)
    assert [tmp_path / unquote(source) for source in sources] == paths
    assert not any(letter in source for source in sources for letter in "#<& ")
    classes = re.findall(r'<figure data-class="([^"]+)"', page)
    assert [html.unescape(name) for name in classes] == [CLASSES[label] for label in labels]
    options = re.findall(r'<option value="([^"]+)">', page)
    assert [html.unescape(name) for name in options] == sorted(CLASSES)
    assert "<title>4 pictures, seed 7, guidance_scale 1.0</title>" in page
    assert "<dog>" not in page and "http" not in page


@pytest.mark.parametrize("name", ["webdataset", "npz"])
def test_of_shards_and_of_an_npz_it_holds_some_of_every_class(
    pipe, tmp_path: Path, monkeypatch, name: str
) -> None:
    monkeypatch.setattr(contact_sheet, "EMBEDDED", 3)
    labels = [0, 0, 0, 1, 1, 2]
    options = {"seed": 7, "guidance_scale": 1.0, "batch_size": 2}
    generate_folder(pipe, tmp_path, labels, picture_format=PictureFormat(name), **options)
    page = (tmp_path / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<figure") == 3
    assert re.findall(r"<figcaption>(\d+)", page) == ["0", "3", "5"]
    assert "3 of 6 pictures, in small copies" in page


def test_prompts_can_be_searched(tmp_path: Path) -> None:
    rows = [
        {"index": i, "file": f"{i:06d}.png", "prompt": text}
        for i, text in enumerate(['a "red" apple', "a pear"])
    ]
    store = PictureFormat().store(tmp_path, [row["file"] for row in rows], 2)
    write_contact_sheet(tmp_path / "index.html", "two", lambda: rows, store)
    page = (tmp_path / "index.html").read_text()
    assert '<input id="prompt" type="search">' in page and 'id="class"' not in page
    assert 'data-prompt="a &quot;red&quot; apple"' in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_pictures_of_the_chosen_class_and_words(tmp_path: Path) -> None:
    rows = [
        {"index": i, "file": f"{i:06d}.png", "class": name, "prompt": text}
        for i, (name, text) in enumerate((n, t) for n in CLASSES for t in ("A pear", "apples"))
    ]
    store = PictureFormat().store(tmp_path, [row["file"] for row in rows], len(rows))
    page = tmp_path / "index.html"
    write_contact_sheet(page, "six", lambda: rows, store)
    choose = (
        'chosen.value = "<dog> & #1"; text.value = "PEAR"; text.dispatchEvent(new Event("input"));'
    )
    page.write_text(page.read_text().replace("</html>", f"<script>{choose}</script></html>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [*browser, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert '<output id="shown">1 shown</output>' in shown
    figures = re.findall(r"<figure ([^>]*)>.*?<figcaption>(\d+)", shown, re.DOTALL)
    assert [number for kind, number in figures if "hidden" not in kind] == ["2"]
