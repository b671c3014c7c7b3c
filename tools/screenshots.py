"""Write the pictures of docs/window.md: open `smalti ui` in headless Chromium, and use its tabs.

    python tools/screenshots.py --model runs/demo/pipeline --run runs/demo/prior --picture cat.png

It needs Debian's chromium and chromium-driver, and pip install 'smalti[test]'. The first model and
the last one are compared.
"""

import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
MARGIN = 24  # pixels below the last thing shown
BRUSHED = ((-90, 40), (0, 60), (90, 40))  # the line painted, from the middle of the picture

from browser import Page, chromium  # noqa: E402

from smalti.scripts.ui import UIConfig, showing  # noqa: E402


@dataclass(frozen=True)
class Screenshots:
    """Pictures of the window with these models, of which the first one is shown."""

    model: tuple[str, ...]
    run: Path  # folder of a run, for its curves
    picture: Path  # a picture to reconstruct and to paint over
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
    sample(page, "generate", "#generated")
    photograph(page, options.output / "window_generate.png")
    page.open_tab("Reconstruct")
    page.upload("#reconstruct-input", options.picture)
    page.loaded("#reconstruct-input")
    page.press("#reconstruct")
    page.until(lambda: "PSNR" in page.one("#reconstruct-words").text)
    page.loaded("#reconstruct-result")
    page.loaded("#reconstruct-codes")
    photograph(page, options.output / "window_reconstruct.png")
    page.open_tab("Inpaint")
    page.upload("#editor", options.picture)
    page.draw("#editor canvas", *BRUSHED)
    sample(page, "inpaint", "#inpainted")
    photograph(page, options.output / "window_inpaint.png")
    page.open_tab("Compare")
    sample(page, "compare", "#right")
    photograph(page, options.output / "window_compare.png")
    page.open_tab("Run")
    page.until(lambda: page.all("#curves svg"))
    page.loaded("#previews")
    photograph(page, options.output / "window_run.png")


def sample(page: Page, tab: str, pictures: str) -> None:
    """Press the button of a tab, and wait for its pictures."""
    page.press(f"#{tab}")
    page.until(lambda: page.one(f"#{tab}-status").text == "Done")
    page.loaded(pictures)


if __name__ == "__main__":
    main(tyro.cli(Screenshots))
