"""How many passes recalibration needs with samples of several sizes.

    python tests/benchmarks/samples.py [--models ResNet50 ...] [--sizes 16 32 64 128]
                                       [--markdown docs/benchmarks.md]

Where memory allows few examples, as with large images, the sample is a poorer model of
the data.
"""

import os
from collections.abc import Callable, Sequence
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from networks import Network, application, trained
from page import Section, new_parser, table
from recalibration import residual_of

from bn_callbacks import recalibrate
from bn_callbacks.layers import find
from bn_callbacks.measuring import consistent
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.measuring.sample import MEMORY

NETWORKS = {
    "ResNet50": Network(application("ResNet50"), 96, 300, 10),
    "EfficientNetV2B0": Network(application("EfficientNetV2B0"), 96, 300, 10),
}
SIZES = (16, 32, 64, 128)
BATCH = 16
WIDTHS = (96, 224)
PAGE = """\
Passes over {images} images of 96×96, in batches of {batch}, until the residual (in
brackets) is small enough, where the sample has so many examples instead of what memory
allows. As many as the last columns say it allows beside a batch, by size of the images.
Networks after a short training; layer by layer, which is the simple way to the same
statistics, each needs as many passes as there are layers.

Where memory allows a small sample only, several of them could run in lockstep, as one
larger sample: each layer waits for the moments of all. But then the activations of all
are in memory at a time, as they are when the larger sample runs as one batch, and
nothing is gained. To compute them again instead costs a pass over the sample for each
layer. So it is passes over all data that finish the work, as many as the table shows.

{table}
"""


def by_sample(name: str, sizes: Sequence[int], steps: int | None) -> tuple[str, ...]:
    """Passes and residual of one network with samples of several sizes."""
    model, x = trained(name, NETWORKS[name], steps)
    cells = [name, str(len(find(model)))]
    for size in sizes:
        # In place of what memory allows.
        with mock.patch.object(consistent, "sample_size", return_value=size):
            report = recalibrate(model, x, batch_size=BATCH, verbose=0)
        cells.append(f"{report.passes} ({residual_of(report):.0e})")
        report.undo()
        print(name, size, cells[-1], flush=True)
    cells += [str(allowed(NETWORKS[name].build, width)) for width in WIDTHS]
    return tuple(cells)


def allowed(build: Callable[[int], keras.Model], width: int) -> int:
    """How many images a sample may have beyond a batch."""
    model = build(width)
    population = Population(model, find(model))
    batch = (tf.zeros((1, width, width, 3)), None, None)
    return int(MEMORY / population.bytes_of_example(batch))


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--steps", type=int, help="steps of training, in place of ours")
    options = parser.parse_args()
    section = Section("samples")
    head = (
        *("network", "BN layers", *(f"sample of {size}" for size in options.sizes)),
        *(f"allowed at {width}×{width}" for width in WIDTHS),
    )
    rows = []
    for name in options.models:
        rows.append(by_sample(name, options.sizes, options.steps))
        body = PAGE.format(
            images=NETWORKS[name].images, batch=BATCH, table=table(head, rows)
        )
        # After each, so that an interrupted run leaves what it has.
        section.write(body, options.markdown)


if __name__ == "__main__":
    main()
