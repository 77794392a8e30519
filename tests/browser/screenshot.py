"""Takes the pictures of TensorBoard that the documentation shows.

    python tests/browser/screenshot.py

runs the demo and a training whose troubles come and go, opens their log directories in
the real TensorBoard and a real browser, and writes `docs/images/`. Needs Debian's
chromium and chromium-driver, and the extras `browser` and `demo`.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import tensorflow as tf
import troubles
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_page import Page, browser, missing, tensorboard

from bn_callbacks import demo
from bn_callbacks.tensorboard.writer import CARD, WHOLE

IMAGES = Path(__file__).parents[2] / "docs" / "images"
READY = {
    "timeseries": "return deep('image-card img').some((one) => one.naturalWidth)",
    "custom_scalars": "return deep('.category-name').length >= 4",
    "text": "return deep('#markdown table').length > 0",
}
"""The tabs, and what has to be there before the picture is taken."""

SHOWN = {"troubles": ("timeseries", "text"), "as_trained": ("custom_scalars",)}
"""The log directories, and the tabs to show of each."""

PICTURES = {CARD: "lag_map", WHOLE: "lag_map_of_all_layers"}
"""The heat maps, and their files."""


def main() -> None:
    """Takes them all."""
    if lacking := missing():
        raise SystemExit(f"No picture without {lacking}.")
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stdout(io.StringIO()):
            demo.run(Path(directory))
        troubles.train(Path(directory, "troubles"), on_lag="ignore")
        write_pictures(Path(directory, "troubles", "batch_norm"))
        for run, tabs in SHOWN.items():
            with tensorboard(Path(directory, run)) as address, browser() as driver:
                driver.set_window_size(1280, 900)
                for tab in tabs:
                    page = Page(driver, address)
                    page.open(tab)
                    page.wait(READY[tab])
                    path = IMAGES / f"tensorboard_{tab}.png"
                    page.screenshot(path)
                    # Keeps the repository small.
                    Image.open(path).convert("RGB").save(path, optimize=True)
                    print(path)


def write_pictures(run: Path) -> None:
    """The heat maps themselves, as they were last."""
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    for tag, name in PICTURES.items():
        _, _, png = tf.make_ndarray(events.Tensors(tag)[-1].tensor_proto)
        path = IMAGES / f"{name}.png"
        Image.open(io.BytesIO(png)).quantize(64).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
