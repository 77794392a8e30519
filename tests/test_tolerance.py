"""`tolerance`: a pass that ends when the statistics are precise enough."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compiled, dense, grouped, lag, normal, rng, single, stored, unchanged

from bn_callbacks import RecalibrateBatchNorm, recalibrate, recalibrated
from bn_callbacks.measuring.precision import MIN_BATCHES

SIZE = 256
NOISE = 1.0


def examples(count: int, seed: int) -> tuple[Any, Any]:
    """Rows and a noisy target: half of its variance is out of reach."""
    x = normal(count, 6, seed=seed)
    z = (x - 3) / 2
    y = np.sin(z[:, :1]) + z[:, 1:2] * np.tanh(z[:, 2:3])
    return x, y + NOISE * rng(seed + 1).normal(size=y.shape).astype("float32")


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    """Three BN layers, trained until the learning rate has fallen to 0.

    Where weights still move fast, the loss falls or rises with the first power of an
    error of the statistics; at a minimum, with the second.
    """
    keras.utils.set_random_seed(0)
    model = dense(3, width=16)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 250)
    model.compile(keras.optimizers.Adam(rate), "mse")
    model.fit(*examples(12_800, 1), batch_size=SIZE, epochs=5, verbose=0)
    return model


@pytest.mark.slow
def test_a_small_part_of_a_large_stream_is_as_good_as_all_of_it(
    trained: keras.Model,
) -> None:
    steps = 500
    x, _ = examples(steps * SIZE, 2)
    stream = tf.data.Dataset.from_tensor_slices(x).batch(SIZE).repeat()
    x_test, y_test = examples(20_000, 3)
    losses, reports = [], []
    for tolerance in (None, 0.01):
        arguments = {"steps": steps, "tolerance": tolerance, "verbose": 0}
        with recalibrated(trained, stream, **arguments) as report:
            loss = trained.evaluate(x_test, y_test, batch_size=2_000, verbose=0)
            losses.append(loss)
        reports.append(report)
    full, part = reports
    assert full.batches == steps
    assert part.batches <= 0.2 * steps
    assert part.samples == part.batches * SIZE
    assert part.residual <= 1e-3
    assert losses[0] > 0.1 * y_test.var()  # any error is large beside a loss near 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_independent_samples_are_read_until_their_standard_error(seed: int) -> None:
    tolerance, size, features = 0.05, 16, 12
    x = rng(seed).normal(3, 2, size=(20_000, features)).astype("float32")
    model = single(features)
    report = recalibrate(model, x, batch_size=size, tolerance=tolerance, verbose=0)
    # Of a normal distribution: mean 1/n, scale 1/(2n).
    needed = 1.5 / tolerance**2
    assert needed / 1.5 < report.samples < 3 * needed
    ((mean, variance),) = stored(model)
    exact = np.full(features, 3.0), np.full(features, 4.0)
    sigma = np.sqrt(variance / exact[1])
    error = np.sqrt(np.mean(((mean - exact[0]) / 2) ** 2 + (sigma - 1) ** 2))
    assert error < 1.5 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("span", "seed"), [(1, 0), (8, 1)])
def test_a_group_counts_once_however_many_samples_and_batches_it_has(
    seed: int, span: int
) -> None:
    tolerance, size, features = 0.1, 4, 12
    x = grouped(1_000, span * size, features, seed=seed)
    model = single(features)
    bn = model.layers[0]
    # In the order they have; arrays are read in random order.
    parts = iter(x.reshape(-1, size, features))
    report = recalibrate(model, parts, tolerance=tolerance, verbose=0)
    groups = report.batches / span
    # The groups' means alone have so much of the variance.
    between = x.reshape(1_000, -1, features).mean(1).var(0) / x.var(0)
    assert groups > 0.5 * between.mean() / tolerance**2
    assert groups < 1_000
    assert lag(bn, x.astype(np.float64), *stored(model)[0]) < 2 * tolerance

    # The same rows in no order are read to a fraction.
    shuffled = rng(seed).permutation(x)
    brief = recalibrate(
        model, shuffled, batch_size=size, tolerance=tolerance, verbose=0
    )
    assert brief.batches < report.batches / 2 or report.batches == MIN_BATCHES


@pytest.mark.parametrize("span", [1, 8])
def test_grouped_data_are_read_to_their_end_if_there_are_too_few_groups(
    span: int,
) -> None:
    x = grouped(400 // span, span * 16, 6)
    report = recalibrate(single(6), x, batch_size=16, tolerance=0.01, verbose=0)
    assert (report.batches, report.samples) == (400, 400 * 16)


class Recording(keras.utils.PyDataset):
    """Batches that note how often each is read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.x = normal(count, 32, 6)
        self.reads = [0] * count

    @property
    def num_batches(self) -> int:
        return len(self.x)

    def __len__(self) -> int:  # Keras before 3.1
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.x[index]


def test_further_passes_read_the_same_batches() -> None:
    model, data = dense(), Recording(400)
    with unchanged(model):
        report = recalibrate(model, data, tolerance=0.05, refine=2, verbose=0)
        report.undo()
    assert MIN_BATCHES <= report.batches < 100
    assert report.passes == 4
    # The first batch is looked at once more, to learn the structure of the data.
    data.reads[0] -= 1
    assert sorted(data.reads)[-report.batches :] == [report.passes] * report.batches
    assert sum(data.reads) == report.passes * report.batches


def test_few_batches_are_never_enough() -> None:
    report = recalibrate(
        single(6), normal(3200, 6), batch_size=32, tolerance=100.0, verbose=0
    )
    assert report.batches == MIN_BATCHES


def test_less_data_than_that_are_read_to_their_end() -> None:
    report = recalibrate(single(6), normal(64, 6), tolerance=100.0, verbose=0)
    assert (report.batches, report.samples) == (2, 64)


def test_samples_of_a_last_batch_that_is_smaller_are_counted() -> None:
    report = recalibrate(single(6), normal(70, 6), tolerance=1e-9, verbose=0)
    assert (report.batches, report.samples) == (3, 70)


def endless(read: list[int]) -> Iterator[Any]:
    draw = rng(5)
    for index in itertools.count():
        read.append(index)
        x = draw.normal(3, 2, size=(32, 6)).astype("float32")
        yield x, x[:, :1]


@pytest.mark.parametrize("steps", [None, 500])
def test_an_endless_generator_is_read_only_as_far_as_needed(steps: int | None) -> None:
    read: list[int] = []
    report = recalibrate(dense(), endless(read), steps=steps, tolerance=0.05, verbose=0)
    assert len(read) == report.batches < 100
    assert report.samples == 32 * report.batches
    assert report.residual <= 1e-3


@pytest.mark.slow
def test_the_callback_stops_early_too() -> None:
    model = compiled(dense())
    read: list[int] = []
    callback = RecalibrateBatchNorm(
        endless(read), steps=500, tolerance=0.05, when="epoch_end"
    )
    x = normal(256, 6)
    model.fit(x, x[:, :1], epochs=2, callbacks=[callback], verbose=0)
    assert callback.report.committed
    assert MIN_BATCHES <= callback.report.batches < 100
    assert callback.report.residual <= 1e-3
    assert len(read) < 100  # both times the same batches


@pytest.mark.parametrize(
    "tolerance",
    [0, 0.0, -0.01, math.nan, "0.01"],
    ids=repr,
)
def test_a_tolerance_that_is_no_positive_number_is_refused(tolerance: Any) -> None:
    message = (
        r"^`tolerance` must be None or a positive .*, in standard deviations\. "
        rf"Received: tolerance={tolerance!r}\."
    )
    model, x = single(6), normal(32, 6)
    with unchanged(model), pytest.raises(ValueError, match=message):
        recalibrate(model, x, tolerance=tolerance, verbose=0)
    with pytest.raises(ValueError, match=message):
        RecalibrateBatchNorm(x, tolerance=tolerance)
