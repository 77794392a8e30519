"""Statistics that inference sees, in few passes, and never worse than before."""

import math
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    KERAS,
    batch_norms,
    cut,
    dense,
    grouped,
    layers,
    normal,
    residual,
    scatter,
    single,
    stored,
    unchanged,
)

from bn_callbacks import BatchNormWarning, RecalibrateBatchNorm, recalibrate
from bn_callbacks.layers import find, read
from bn_callbacks.measuring import consistent as module
from bn_callbacks.measuring import sample
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.measuring.sample import Joined, Reservoir, Sample, sample_size
from bn_callbacks.statistics.moments import Moments


class Counting(keras.utils.PyDataset):
    """Batches of arrays, each read counted."""

    def __init__(self, x: Any, size: int = 32) -> None:
        super().__init__()
        self.x, self.size, self.reads = x, size, 0

    @property
    def num_batches(self) -> int:
        return -(-len(self.x) // self.size)

    def __len__(self) -> int:  # Keras before 3.1
        return self.num_batches

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.x[index * self.size : (index + 1) * self.size]


def deep(depth: int = 12) -> keras.Model:
    return scatter(dense(depth, width=16))


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 256 examples, whatever the memory."""
    monkeypatch.setattr(module, "sample_size", lambda *_: 256)


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_few_reads_suffice_for_many_layers(small_sample: None, order: str) -> None:
    x = normal(2048, 6) if order == "shuffled" else grouped(8, 256, 6)
    model, data = deep(), Counting(x)
    report = recalibrate(model, data, verbose=0)
    assert report.residual <= 1e-3
    assert residual(model, cut(x, 32)) <= 1.2e-3
    # An untrained net, and an eighth of the data: few passes all the same.
    assert report.passes <= 7 < len(find(model))
    assert data.reads <= report.passes * len(data)


@pytest.mark.parametrize("kind", ["generator", "dataset"])
def test_the_sample_of_a_stream_is_spread_over_it(
    small_sample: None, kind: str
) -> None:

    x = grouped(8, 256, 6)  # its beginning says nothing of the rest
    data: Any = iter(cut(x, 32))
    if kind == "dataset":
        data = tf.data.Dataset.from_tensor_slices(x).batch(32)
    model = deep()
    report = recalibrate(model, data, verbose=0)
    assert report.residual <= 1e-3
    assert report.passes <= 5
    assert residual(model, cut(x, 32)) <= 1.2e-3


def test_all_data_in_the_sample_need_one_pass_that_confirms() -> None:
    model, data = deep(), Counting(normal(512, 6))
    report = recalibrate(model, data, verbose=0)
    assert (report.passes, data.reads) == (1, len(data))
    assert report.residual <= 1e-5


def test_noise_of_a_device_does_not_keep_it_from_converging(
    small_sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    own = Population._moments

    def noisy(*args: Any, **kwargs: Any) -> list[Moments]:
        return [
            Moments(
                one.count,
                one.mean
                + 1e-7 * np.sqrt(one.variance) * draw.normal(size=one.mean.shape),
                one.m2 * (1 + 1e-7 * draw.normal(size=one.mean.shape)),
            )
            for one in own(*args, **kwargs)
        ]

    monkeypatch.setattr(Population, "_moments", noisy)
    for can_sample in (True, False):
        monkeypatch.setattr(Population, "takes_any_batch", can_sample, raising=False)
        model, x = deep(), normal(1024, 6)
        report = recalibrate(model, x, verbose=0)
        assert report.residual <= 1e-3
        assert report.passes <= len(find(model)) + 1


def fixed_batch(depth: int = 6) -> keras.Model:
    stack: list[Any] = [keras.Input(batch_shape=(16, 6))]
    for _ in range(depth):
        stack += [layers.Dense(8), layers.BatchNormalization(), layers.ReLU()]
    return scatter(keras.Sequential(stack))


def test_a_model_of_a_fixed_batch_size_is_solved_layer_by_layer() -> None:
    model, x = fixed_batch(), grouped(8, 16, 6)
    report = recalibrate(model, x, batch_size=16, verbose=0)
    assert report.residual <= 1e-3
    assert 2 < report.passes <= len(find(model)) + 2


def test_a_sample_that_misleads_is_given_up(
    small_sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Sample.batch

    def foreign(self: Sample) -> Any:
        (x, *rest) = own(self)
        return (-5 * x, *rest)

    monkeypatch.setattr(Sample, "batch", foreign)
    model, x = deep(6), normal(1024, 6)
    report = recalibrate(model, x, verbose=0)
    assert report.residual <= 1e-3
    assert residual(model, cut(x, 32)) <= 1.2e-3


def test_nothing_is_committed_that_is_no_nearer_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = deep(3), normal(256, 6)
    own = module.lags
    monkeypatch.setattr(
        module, "lags", lambda *args: [each + 99.0 for each in own(*args)]
    )
    with unchanged(model), pytest.warns(BatchNormWarning, match="Nothing was changed"):
        report = recalibrate(model, x, verbose=0)
    assert not report.committed
    assert "Nothing was changed" in str(report)


def test_recalibrating_what_is_right_already_is_no_failure() -> None:
    model, x = deep(3), normal(256, 6)
    recalibrate(model, x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BatchNormWarning)
        report = recalibrate(model, x, verbose=0)
    assert report.committed


def test_channels_that_a_mask_hides_unequally_count_for_themselves() -> None:
    x = normal(200, 4, 3)
    for step in range(1, 4):  # of every second example fewer steps are there
        x[::2, step] = 0.0
    x[5:, 3] = 0.0
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.Masking(),
            layers.BatchNormalization(axis=1),
        ]
    )
    report = recalibrate(model, x, verbose=0)
    ((mean, variance),) = stored(model)
    for step in range(4):
        values = x[:, step][(x[:, step] != 0).any(axis=-1)].astype(np.float64)
        assert mean[step] == pytest.approx(values.mean(), rel=1e-5)
        assert variance[step] == pytest.approx(values.var(), rel=1e-4)
    assert report.residual <= 1e-5


@pytest.mark.parametrize("depth", [1, 2])
def test_a_constant_channel_without_epsilon(depth: int) -> None:
    x = normal(128, 4)
    x[:, 2] = 3.0
    stack = [layers.BatchNormalization(epsilon=0.0) for _ in range(depth)]
    model = keras.Sequential([keras.Input((4,)), *stack])
    report = recalibrate(model, x, verbose=0)
    assert report.committed
    assert report.residual <= 1e-3
    mean, variance = stored(model)[0]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-4, atol=1e-6)
    assert np.isfinite(model.predict(x, verbose=0)).all()


# In `fit`.


def test_a_validation_reads_a_part_and_the_end_all() -> None:
    x = normal(6000, 6)
    model = dense(2)
    model.compile("sgd", "mse")
    reports = []

    class Keep(RecalibrateBatchNorm):
        def on_test_begin(self, logs: Any = None) -> None:
            super().on_test_begin(logs)
            if self.report is not None:
                reports.append(self.report)

    callback = Keep(x, when="validation")
    y = x[:, :1]
    model.fit(
        x,
        y,
        batch_size=256,
        validation_data=(x[:64], y[:64]),
        callbacks=[callback],
        verbose=0,
    )
    assert reports[0].samples == 2048
    assert callback.report.samples == 6000
    assert callback.report.residual <= 1e-3


def test_sorted_arrays_do_not_stop_a_validation_early() -> None:
    x = np.sort(normal(20_000, 1), axis=0)[:, :1]
    model = single(1)
    callback = RecalibrateBatchNorm(x, when="validation")
    callback.set_model(model)
    callback.set_params({})
    callback.on_train_begin()
    callback._recalibrate(is_brief=True)
    ((mean, _),) = stored(model)
    assert callback.report.samples < len(x) / 5
    # Its rows are read in random order, not batches of consecutive ones.
    assert abs(mean[0] - x.mean()) < 3 * x.std() / math.sqrt(callback.report.samples)


@pytest.mark.parametrize(
    ("count", "batch_size", "read"),
    [(6000, 32, 2048), (6000, 100, 2100), (30_000, 32, 4352), (30_000, 256, 4352)],
)
def test_a_validation_reads_a_seventh_if_that_is_more(
    count: int, batch_size: int, read: int
) -> None:
    callback = RecalibrateBatchNorm(normal(count, 6), batch_size, when="validation")
    callback.set_model(dense(2))
    callback.set_params({})
    callback._recalibrate(is_brief=True)
    assert callback.report.samples == read
    # The sample is all that is read, and solves itself.
    assert (callback.report.passes, callback.report.batches) == (1, read / batch_size)


def test_a_validation_reads_no_more_than_it_needs() -> None:
    callback = RecalibrateBatchNorm(normal(200_000, 2), when="validation")
    callback.set_model(single(2))
    callback.set_params({})
    callback._recalibrate(is_brief=True)
    # 1.5 / 0.01² would do; looks are some way apart.
    assert 10_000 < callback.report.samples < 20_000


# Batches that are no random sample.


def test_grouped_batches_point_to_validation_data() -> None:
    x = grouped(64, 32, 6)
    report = recalibrate(deep(3), iter(cut(x, 32)), verbose=0)
    assert "no random samples" in report.notes[0]
    assert "validation_data" in str(report)
    assert recalibrate(deep(3), normal(2048, 6), verbose=0).notes == ()


def test_validation_data_choose_between_one_pass_and_all_data() -> None:
    x, losses = grouped(16, 32, 6), {}
    model = deep(3)
    model.compile("sgd", "mse")
    start = model.get_weights()
    for kind, refine in (("one pass", 0), ("consistent", "auto")):
        model.set_weights(start)
        recalibrate(model, x, refine=refine, verbose=0)
        losses[kind] = model.predict(x, verbose=0)
    for kind, targets in losses.items():
        model.set_weights(start)
        report = recalibrate(model, x, validation_data=(x, targets), verbose=0)
        assert report.loss_after < 1e-6, kind
        assert (report.residual > 0.01) == (kind == "one pass")


# The parts.


def test_a_reservoir_is_a_fair_sample() -> None:
    counts = np.zeros(100)
    reservoir = Reservoir(20)
    for start in range(0, 100, 8):
        part = np.arange(start, min(start + 8, 100), dtype="float32")[:, None]
        reservoir.add(next(iter(Batches(part)))[:3])
    rows = reservoir.batch()[0].numpy().ravel()
    counts[rows.astype(int)] += 1
    assert len(rows) == 20
    assert counts.max() == 1
    assert 30 < rows.mean() < 70


def test_batches_of_several_types_are_not_joined() -> None:
    x = np.round(normal(512, 3))
    parts = [
        part.astype("int32" if index % 2 else "float32")
        for index, part in enumerate(cut(x, 32))
    ]
    model = single(3)
    report = recalibrate(model, iter(parts), verbose=0)
    assert (report.samples, report.batches) == (512, 16)
    np.testing.assert_allclose(stored(model)[0][0], x.mean(0), atol=1e-5)


def test_joined_batches_hold_the_same_rows() -> None:
    x = normal(100, 3)
    batches = Batches(x, batch_size=8)
    joined = Joined(batches, 30)
    parts = [batch[0].numpy() for batch in joined]
    assert [len(part) for part in parts] == [24, 24, 24, 28]
    np.testing.assert_array_equal(np.concatenate(parts), x)
    assert [joined.number(index) for index in range(4)] == [0, 3, 6, 9]
    assert joined.read(2) == 6


def test_a_sample_is_as_large_as_the_bound_allows() -> None:
    few = sample_size(2.0**20, 32)
    assert 16 < few <= 128 + 16
    assert sample_size(2.0**10, 32) > 100 * few or sample._free_memory() < 2**31


@pytest.mark.skipif(KERAS < (3, 3), reason="weights are read by path")
def test_given_statistics_do_not_depend_on_how_batches_are_joined() -> None:
    model, x = deep(4), normal(300, 6)
    population = Population(model, find(model))
    given = read(find(model))
    apart = population.read(Batches(x), given).moments
    together = population.read(Joined(Batches(x), 256), given).moments
    for one, two in zip(apart, together, strict=True):
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.variance, two.variance, rtol=1e-4)
    assert len(batch_norms(model)) == 4
