"""What recalibrating for each validation costs, and what it gives.

python tests/benchmarks/validation.py [--models mlp6-20k ...] [--seeds 3]
                                      [--markdown docs/benchmarks.md]
"""

import itertools
import time
from typing import Any

import keras
import numpy as np
from networks import NETWORKS, data_for, mlp
from page import Section, new_parser, table

from bn_callbacks import RecalibrateBatchNorm, recalibrate

NETWORKS = NETWORKS | {"mlp6-20k": NETWORKS["plain16-20k"]._replace(build=mlp)}
MODELS = ("mlp6-20k", "plain16-20k")
EPOCHS = 3
HELD_OUT = 2000
GUESSED = (0.0, 0.3)
"""Shares of labels, of training and validation, that are random."""
PAGE = """\
`fit` over {images:,} images of 32×32 for {epochs} epochs, with 2,000 more to validate
on and `RecalibrateBatchNorm(x, when="validation")`. *Cost* is the time in the
callback's methods before and after a validation, over that of an epoch's training, in
the last epoch: the first one traces. The other columns compare the last `val_loss`
with the loss of the same weights after `recalibrate` over all images. Medians over
{seeds} trainings, and the worst. Images of these classes are easy to tell apart. With
*random labels* in part, the loss stays as large as it is for a task that cannot be
learned to the end.

{table}
"""
HEAD = (
    *("network", "random labels", "ms an epoch", "cost", "at most", "largest cost"),
    *("val_loss", "with all images", "largest difference", "at most"),
)


class Timed(RecalibrateBatchNorm):  # type: ignore[misc]
    """Takes the time of an epoch's training, and of what validation costs more."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self.cost, self.training = 0.0, None
        self._began = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        began = time.perf_counter()
        if self.training is None:
            self.training = began - self._began
        super().on_test_begin(logs)
        self.cost += time.perf_counter() - began

    def on_test_end(self, logs: Any = None) -> None:
        began = time.perf_counter()
        super().on_test_end(logs)
        self.cost += time.perf_counter() - began


def fit(
    name: str, guessed: float, seed: int, limit: int | None
) -> tuple[float, float, float, float]:
    """Milliseconds of training, and of the callback; the two validation losses."""
    keras.utils.set_random_seed(seed)
    network = NETWORKS[name]
    count = limit or network.images
    x, y = data_for(name, count + HELD_OUT, network.size)
    draw = np.random.default_rng(seed)
    y = np.where(draw.random(len(y)) < guessed, draw.permutation(y), y)
    model = network.build(network.size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=False)
    held_out = x[count:], y[count:]
    callback = Timed(x[:count], when="validation")
    history = model.fit(
        *(x[:count], y[:count]),
        epochs=EPOCHS,
        validation_data=held_out,
        callbacks=[callback],
        verbose=0,
    ).history
    # At the end of `fit` the callback has recalibrated over all images.
    recalibrate(model, x[:count], verbose=0)
    best = model.evaluate(*held_out, verbose=0)
    assert callback.training is not None
    return (
        callback.training * 1000,
        callback.cost * 1000,
        history["val_loss"][-1],
        best,
    )


def line(name: str, guessed: float, seeds: int, limit: int | None) -> tuple[str, ...]:
    """A line of the table."""
    fits = np.array([fit(name, guessed, seed, limit) for seed in range(seeds)])
    training, cost, brief, whole = fits.T
    share, apart = cost / training, np.abs(brief / whole - 1)
    return (
        name,
        f"{guessed:.0%}",
        f"{np.median(training):,.0f}",
        f"{np.median(share):.1%}",
        "10%",
        f"{share.max():.1%}",
        f"{np.median(brief):.4f}",
        f"{np.median(whole):.4f}",
        f"{apart.max():.2%}",
        "1%",
    )


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(NETWORKS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="in place of 20,000")
    options = parser.parse_args()
    section = Section("validation")
    rows = []
    for name, guessed in itertools.product(options.models, GUESSED):
        rows.append(line(name, guessed, options.seeds, options.images))
        print("  ".join(cell.ljust(12) for cell in rows[-1]), flush=True)
    body = PAGE.format(
        images=options.images or NETWORKS[MODELS[0]].images,
        epochs=EPOCHS,
        seeds=options.seeds,
        table=table(HEAD, rows),
    )
    section.write(body, options.markdown)


if __name__ == "__main__":
    main()
