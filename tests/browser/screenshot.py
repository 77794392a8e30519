"""Takes the pictures of TensorBoard that the documentation shows.

    python tests/browser/screenshot.py

runs the demo, opens its log directory in the real TensorBoard and a real browser, and
writes `docs/images/`. Needs Debian's chromium and chromium-driver, and the extras
`browser` and `demo`.
"""

import contextlib
import io
import tempfile
from pathlib import Path

from PIL import Image
from tensorboard_page import Page, browser, missing, tensorboard

from bn_callbacks import demo

IMAGES = Path(__file__).parents[2] / "docs" / "images"
READY = {
    "timeseries": "return deep('scalar-card').length >= 3 && drawn(document) > 3",
    "custom_scalars": "return deep('.category-name').length >= 4",
    "text": "return deep('#markdown table').length > 0",
}
"""The tabs, and what has to be there before the picture is taken."""


def main() -> None:
    """Takes them all."""
    if lacking := missing():
        raise SystemExit(f"No picture without {lacking}.")
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stdout(io.StringIO()):
            demo.run(Path(directory))
        with (
            tensorboard(Path(directory) / "as_trained") as address,
            browser() as driver,
        ):
            page = Page(driver, address)
            for tab, script in READY.items():
                page.open(tab)
                page.wait(script)
                path = IMAGES / f"tensorboard_{tab}.png"
                page.screenshot(path)
                # A palette keeps the repository small.
                Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
                print(path)


if __name__ == "__main__":
    main()
