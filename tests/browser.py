"""Debian's Chromium without a screen, for the test of the window and for its pictures in docs/."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PROGRAMS = ("chromium", "chromedriver")
PATIENCE = 120  # seconds: a test ends with a failure, however slow the machine is


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator["Page"]:
    """A fresh browser that reaches nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "window-size=1280,1000",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    """The window in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for a condition; an element that the page replaces meanwhile is looked up again."""
        replaced = [StaleElementReferenceException]
        wait = WebDriverWait(self.driver, PATIENCE, 0.1, ignored_exceptions=replaced)
        return wait.until(lambda _: condition())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.until(lambda: self.all(selector))[0]

    def press(self, selector: str) -> None:
        element = self.until(lambda: [e for e in self.all(selector) if e.is_displayed()])[0]
        self.driver.execute_script("arguments[0].click()", element)

    def open_tab(self, name: str) -> None:
        tabs = self.until(lambda: [e for e in self.all("button[role=tab]") if e.text == name])
        self.driver.execute_script("arguments[0].click()", tabs[0])

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        field = self.until(lambda: [e for e in self.all(selector) if e.is_displayed()])[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text + Keys.TAB)

    def choose(self, selector: str, name: str) -> None:
        """Choose from a list."""
        self.one(f"{selector} input").click()
        options = "ul[role=listbox] li"
        found = self.until(lambda: [e for e in self.all(options) if e.text.endswith(name)])
        ActionChains(self.driver).move_to_element(found[0]).click().perform()

    def upload(self, selector: str, file: Path) -> None:
        """Put a file into a field of pictures."""
        self.one(f"{selector} input[type=file]").send_keys(str(file.resolve()))

    def paint(self, selector: str, file: Path, radius: int, *places: tuple[int, int]) -> None:
        """Put a picture into an editor, wait for a brush of this radius, and paint a line; places
        are in pixels of the screen, from the middle of the picture. Painting closes the slider."""
        slider, named = f"{selector} input[type=range]", f"{selector} button[aria-label='%s']"
        self.one(named % "Show Layers")  # it is ready for a picture
        self.upload(selector, file)
        self.one(named % "Undo" + ":not([disabled])")  # the picture is there

        def fits() -> bool:
            if not self.all(slider):
                self.press(named % "Brush")
                self.press(named % "Brush Size")
            return self.one(slider).get_attribute("value") == str(radius)

        self.until(fits)
        canvas = f"{selector} canvas"
        element = self.until(lambda: [e for e in self.all(canvas) if e.is_displayed()])[0]
        pointer = ActionChains(self.driver)
        pointer.move_to_element_with_offset(element, *places[0]).click_and_hold()
        for place in places[1:]:
            pointer.move_to_element_with_offset(element, *place)
        pointer.release().perform()

    def loaded(self, selector: str) -> list[Any]:
        """The pictures there, once there are any and all have their pixels."""
        script = "return arguments[0].complete && arguments[0].naturalWidth > 0"

        def found() -> Any:
            images = self.all(f"{selector} img")
            return all(self.driver.execute_script(script, i) for i in images) and images

        return self.until(found)

    def requested(self) -> set[str]:
        """The hosts that the page has asked for anything."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [m["params"]["request"]["url"] for m in sent]
        return {url.split("/")[2] for url in urls if url.startswith("http")}
