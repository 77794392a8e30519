"""A real TensorBoard in a real browser."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
