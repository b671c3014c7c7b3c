"""Write the pictures of docs/window.md: open `smalti ui` in headless Chromium, and use its tabs.

    python tools/screenshots.py --model runs/demo/pipeline --run runs/demo/prior --picture cat.png
    python tools/screenshots.py --model runs/text/pipeline --prompt "flag it" --tabs generate

It needs Debian's chromium and chromium-driver, and pip install 'smalti[test]'.
"""

import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
MARGIN = 24  # pixels below the last thing shown
Tab = Literal["generate", "reconstruct", "inpaint", "compare", "run"]
SHOWN = {  # pictures that a tab makes
    "generate": ["#generated"],
    "reconstruct": ["#reconstruct-original", "#reconstruct-result", "#reconstruct-codes"],
    "inpaint": ["#inpainted"],
    "compare": ["#left", "#right"],
}
BRUSHED = ((-90, 40), (0, 60), (90, 40))  # the line painted, from the middle of the picture

from browser import Page, chromium  # noqa: E402

from smalti.scripts.ui import UIConfig, brush_radius, showing  # noqa: E402


@dataclass(frozen=True)
class Screenshots:
    """Pictures of the window with these models. The tabs show the first one; compare, the first one
    and the last one."""

    model: tuple[str, ...]
    tabs: tuple[Tab, ...] = get_args(Tab)  # the tabs to photograph
    run: Path = Path("runs/demo/prior")  # folder of a run, for its curves
    picture: Path = Path("cat.png")  # to reconstruct and to paint over
    prompt: str = ""  # of a prior of captions
    output: Path = ROOT / "docs"


def photograph(page: Page, file: Path) -> None:
    """Save what the browser shows, without the empty part below, as a PNG file of 256 colours."""
    whole = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    empty = Image.new("RGB", whole.size, whole.getpixel((0, 0)))
    box = ImageChops.difference(whole, empty).getbbox() or (0, 0, *whole.size)
    height = min(whole.height, box[3] + MARGIN)
    whole.crop((0, 0, whole.width, height)).quantize(256).save(file, optimize=True)
    print(file)


def main(options: Screenshots) -> None:
    """Open the window and the browser."""
    config = UIConfig(model=options.model, run=(options.run,), port=0)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        showing(config) as url,
        chromium(Path(profile)) as page,
    ):
        page.driver.get(url)
        photograph_tabs(page, options)


def photograph_tabs(page: Page, options: Screenshots) -> None:
    """Use the tabs, and photograph each."""
    if options.prompt:
        page.write("#prompt textarea", options.prompt)
    for tab in options.tabs:
        page.open_tab(tab.capitalize())
        use(page, tab, options.picture)
        photograph(page, options.output / f"window_{tab}.png")


def use(page: Page, tab: Tab, picture: Path) -> None:
    """Use a tab, and wait for what it shows."""
    if tab == "run":
        page.until(lambda: page.all("#curves svg"))
        page.loaded("#previews")
        return
    if tab == "reconstruct":
        page.upload("#reconstruct-input", picture)
        page.loaded("#reconstruct-input")
    if tab == "inpaint":
        page.paint("#editor", picture, brush_radius(Image.open(picture).size), *BRUSHED)
    page.press(f"#{tab}")
    if tab == "reconstruct":
        page.until(lambda: "PSNR" in page.one("#reconstruct-words").text)
    else:
        page.until(lambda: page.one(f"#{tab}-status").text == "Done")
    for shown in SHOWN[tab]:
        page.loaded(shown)


if __name__ == "__main__":
    main(tyro.cli(Screenshots))
