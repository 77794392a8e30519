"""A real TensorBoard in a real browser."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

WIDTH, HEIGHT = 1500, 1250
PATIENCE = 60
"""Seconds to wait for something to appear."""


def missing() -> str:
    """What a browser test lacks on this machine; empty if nothing."""
    lacking = [
        program for program in ("chromium", "chromedriver") if not shutil.which(program)
    ]
    try:
        import selenium  # noqa: F401
    except ModuleNotFoundError:
        lacking.append("selenium")
    return ", ".join(lacking)


@contextlib.contextmanager
def tensorboard(log_dir: Path) -> Iterator[str]:
    """Serves a directory on loopback; gives the address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    process = subprocess.Popen(
        [*command, "--host=127.0.0.1", "--port=0", "--reload_interval=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if address := re.search(r"at (http://127\.0\.0\.1:\d+)/", line):
                break
        else:
            raise RuntimeError("TensorBoard did not start:\n" + "".join(said))
        yield address.group(1)
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with an empty profile."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
        ):
            options.add_argument(argument)
        driver = webdriver.Chrome(
            options, webdriver.ChromeService(shutil.which("chromedriver"))
        )
        try:
            yield driver
        finally:
            driver.quit()


# TensorBoard's tabs are web components: what they show is in shadow roots.
DEEP = """
const deep = (selector, root = document) => [
  ...root.querySelectorAll(selector),
  ...[...root.querySelectorAll("*")]
    .filter((element) => element.shadowRoot)
    .flatMap((element) => deep(selector, element.shadowRoot)),
];
const text = (element) => element.textContent.trim().replace(/\\s+/g, " ");
const isCurve = (path) => (path.getAttribute("d") || "").length > 20;
const drawn = (root) =>
  deep("path", root).filter(isCurve).length + deep("canvas", root).length;
const inside = (element) => element.shadowRoot || element;
"""


class Page:
    """TensorBoard in a browser.

    Args:
        driver: The browser.
        address: TensorBoard's address.
    """

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        self._address = address

    def open(self, tab: str, tags: str = "") -> None:
        """Opens a tab, such as `"timeseries"`, there with tags of a pattern alone."""
        # Another page first, or the browser would only change what follows the #.
        self.driver.get("about:blank")
        query = f"?{urlencode({'tagFilter': tags})}" if tags else ""
        self.driver.get(f"{self._address}/{query}#{tab}")

    def ask(self, script: str, *arguments: Any) -> Any:
        """What a script returns that may use the functions of `DEEP`."""
        return self.driver.execute_script(DEEP + script, *arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """The same, as soon as it is neither empty nor false."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if answer := self.ask(script, *arguments):
                return answer
            time.sleep(0.3)
        raise AssertionError(f"Not within {PATIENCE} s: {script} {arguments}")

    def screenshot(self, path: Path) -> None:
        """Keeps what is seen now."""
        time.sleep(1)  # Curves are animated.
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))
