"""Write the pictures of docs/window.md: open `smalti ui` in headless Chromium, and use its tabs.

    python tools/screenshots.py --model runs/demo/pipeline --run runs/demo/prior --picture cat.png

It needs Debian's chromium and chromium-driver, and pip install 'smalti[test]'. The first model and
the last one are compared.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, chromium  # noqa: E402

from smalti.scripts.ui import UIConfig, showing  # noqa: E402


@dataclass(frozen=True)
class Screenshots:
    """Pictures of the window with these models, of which the first one is shown."""

    model: tuple[str, ...]
    run: Path  # folder of a run, for its curves
    picture: Path  # a picture to reconstruct
    prompt: str = ""  # of a prior of captions
    output: Path = ROOT / "docs"


def photograph(page: Page, file: Path) -> None:
    """Save what the browser shows as a PNG file of 256 colours, which is small."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.png"
        page.driver.save_screenshot(str(whole))
        Image.open(whole).convert("RGB").quantize(256).save(file, optimize=True)
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
        page.one("#prompt textarea").send_keys(options.prompt)
    page.press("#generate")
    page.until(lambda: page.one("#generate-status").text == "Done")
    page.loaded("#generated")
    photograph(page, options.output / "window_generate.png")
    page.open_tab("Reconstruct")
    page.one("#reconstruct-input input[type=file]").send_keys(str(options.picture.resolve()))
    page.loaded("#reconstruct-input")
    page.press("#reconstruct")
    page.until(lambda: "PSNR" in page.one("#reconstruct-words").text)
    page.loaded("#reconstruct-result")
    page.loaded("#reconstruct-codes")
    photograph(page, options.output / "window_reconstruct.png")
    page.open_tab("Compare")
    page.press("#compare")
    page.until(lambda: page.one("#compare-status").text == "Done")
    page.loaded("#right")
    photograph(page, options.output / "window_compare.png")
    page.open_tab("Run")
    page.until(lambda: page.all("#curves svg"))
    page.loaded("#previews")
    photograph(page, options.output / "window_run.png")


if __name__ == "__main__":
    main(tyro.cli(Screenshots))
