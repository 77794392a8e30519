"""Windows: batch statistics recovered from two readings, foreign writes noticed."""

import keras
import numpy as np
import pytest

from bn_callbacks.layers import assign, find, restore, snapshot
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.watching.windows import KEPT_WINDOWS, Windows

MOMENTUM = 0.9


class Averages:
    """Two BN layers whose averages are moved by hand, as training would."""

    def __init__(self, momentum=MOMENTUM, length=1):
        layers = [keras.layers.BatchNormalization(momentum=momentum) for _ in range(2)]
        self.model = keras.Sequential([keras.Input((3,)), *layers])
        self.layers = find(self.model)
        self.windows = Windows(self.model, self.layers, length)
        self.momentum = momentum
        self._rng = np.random.default_rng(0)

    def train(self, steps, only=(0, 1)):
        """Moves the averages; returns the batches, `(steps, mean/variance, 3)`."""
        batches = self._rng.uniform(1, 2, (steps, 2, 3)).astype("float32")
        for batch in batches:
            for index in only:
                for variable, value in zip(
                    self.layers[index].averages, batch, strict=True
                ):
                    old = np.array(variable.value)
                    m = self.momentum
                    variable.assign(m * old + (1 - m) * value)
        return batches

    def close(self, steps):
        self.windows.close(self.windows.readings()[1], steps)

    def evidence(self, index=0):
        return self.windows.evidence(None, 0.2)[index]


def weighted(batches, momentum=MOMENTUM):
    """`Σ (1−m)·m^(N−1−i)·b_i / (1−m^N)`."""
    n = len(batches)
    weights = (1 - momentum) * momentum ** np.arange(n - 1, -1, -1) / (1 - momentum**n)
    return np.tensordot(weights, np.asarray(batches, np.float64), 1)


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_recovers_the_weighted_mean_of_the_batches(steps):
    averages = Averages()
    batches = averages.train(steps)
    averages.close(steps)
    for index in (0, 1):
        np.testing.assert_allclose(
            averages.evidence(index).batch, weighted(batches), rtol=2e-6
        )


def test_remembers_the_latest_windows_only():
    averages = Averages()
    batches = []
    for _ in range(KEPT_WINDOWS + 5):
        batches.append(averages.train(2))
        averages.close(2)
    windows = zip(*averages.evidence().windows, strict=True)
    for window, batch in zip(windows, batches[-KEPT_WINDOWS:], strict=True):
        np.testing.assert_allclose(window, weighted(batch), rtol=1e-5)


def test_readings_closer_than_a_window_are_joined():
    averages = Averages(length=6)
    batches = []
    for _ in range(4):
        batches.append(averages.train(3))
        averages.close(3)
    evidence = averages.evidence()
    assert evidence.window_updates == 6
    windows = zip(*evidence.windows, strict=True)
    for window, pair in zip(windows, (batches[:2], batches[2:]), strict=True):
        np.testing.assert_allclose(window, weighted(np.concatenate(pair)), rtol=1e-5)


def test_windows_of_two_epochs_are_not_joined():
    averages = Averages(length=6)
    averages.train(3)
    averages.close(3)
    averages.windows.reread()
    batches = averages.train(3)
    averages.close(3)
    evidence = averages.evidence()
    assert evidence.window_updates == 3
    second = [part[1] for part in evidence.windows]
    np.testing.assert_allclose(second, weighted(batches), rtol=1e-5)


def test_the_short_rest_of_an_epoch_is_judged_with_the_window_before():
    averages = Averages(length=5)
    batches = averages.train(5)
    averages.close(5)
    batches = np.concatenate([batches, averages.train(1)])
    averages.close(1)
    evidence = averages.evidence()
    np.testing.assert_allclose(evidence.batch, weighted(batches), rtol=1e-5)
    assert evidence.window_updates == 5, "noise is measured in equal windows"


def test_no_step_is_no_window():
    averages = Averages()
    averages.close(0)
    assert averages.evidence().batch is None
    assert averages.evidence().updates == 0


def test_an_unknown_number_of_steps_drops_the_window():
    averages = Averages()
    averages.train(4)
    averages.close(None)
    assert averages.evidence().batch is None
    assert averages.evidence().updates == 0
    batches = averages.train(4)
    averages.close(4)
    np.testing.assert_allclose(averages.evidence().batch, weighted(batches), rtol=2e-6)


def test_a_reading_after_the_data_ran_out_is_set_right():
    averages = Averages(length=4)
    first = averages.train(4)
    averages.close(4)
    second = averages.train(1)
    averages.close(4)
    averages.close(1 - 4)
    evidence = averages.evidence()
    assert evidence.updates == 5
    np.testing.assert_allclose(
        evidence.batch, weighted(np.concatenate([first, second])), rtol=1e-5
    )
    assert evidence.window_updates == 4


def test_our_own_write_drops_the_window_of_that_layer_only():
    averages = Averages()
    batches = averages.train(4)
    far = Statistics(np.full(3, 50.0), np.full(3, 9.0))
    assign(averages.layers[:1], [far])
    averages.close(4)
    assert averages.evidence(0).batch is None
    np.testing.assert_allclose(averages.evidence(1).batch, weighted(batches), rtol=2e-6)
    batches = averages.train(4)
    averages.close(4)
    np.testing.assert_allclose(averages.evidence(0).batch, weighted(batches), rtol=1e-5)
    assert [averages.evidence(index).updates for index in (0, 1)] == [4, 8]


def test_what_is_written_and_restored_in_between_leaves_no_trace():
    averages = Averages()
    saved = snapshot(averages.layers)
    assign(averages.layers, [Statistics(np.ones(3), np.ones(3))] * 2)
    restore(saved)
    batches = averages.train(4)
    averages.close(4)
    np.testing.assert_allclose(averages.evidence().batch, weighted(batches), rtol=2e-6)


def test_a_foreign_write_between_epochs_is_the_new_start():
    averages = Averages()
    averages.train(4)
    averages.close(4)
    averages.layers[0].layer.moving_mean.assign([7.0, 8.0, 9.0])
    averages.windows.reread()
    batches = averages.train(4)
    averages.close(4)
    evidence = averages.evidence(0)
    np.testing.assert_allclose(evidence.batch, weighted(batches), rtol=1e-5)
    assert evidence.updates == 4
    assert evidence.start.mean.tolist() == [7.0, 8.0, 9.0]
    assert not evidence.is_initial
    assert averages.evidence(1).updates == 8


def test_averages_that_never_move_are_still():
    averages = Averages()
    averages.train(4, only=[1])
    averages.close(4)
    assert [averages.evidence(index).is_still for index in (0, 1)] == [True, False]
    assert averages.evidence(0).is_initial


def test_statistics_written_before_training_are_not_initial():
    averages = Averages()
    averages.layers[0].layer.moving_mean.assign([7.0, 8.0, 9.0])
    averages.windows.reread()
    averages.close(4)
    evidence = averages.evidence()
    assert evidence.is_still
    assert not evidence.is_initial


def test_a_layer_frozen_in_mid_training_has_what_it_had_then_to_keep():
    averages = Averages()
    averages.train(5)
    averages.close(5)
    assert averages.evidence().is_initial
    learned = [np.array(each.value) for each in averages.layers[0].averages]
    averages.layers[0].layer.trainable = False
    averages.train(3)
    averages.close(3)
    frozen, other = averages.evidence(0), averages.evidence(1)
    np.testing.assert_array_equal(frozen.start, learned)
    assert (frozen.updates, other.updates) == (3, 8)
    assert not frozen.is_initial
    assert other.is_initial


def wild(averages, steps, value):
    """Single steps, the last of which has a variance of `value`, read one by one."""
    for step in range(steps):
        averages.train(1)
        if step == steps - 1:
            variable = averages.layers[0].averages[1]
            variable.assign_add((1 - MOMENTUM) * value * np.ones(3))
        averages.close(1)


def test_a_wild_batch_counts_beside_single_steps_of_its_own_epoch():
    averages = Averages(length=4)
    wild(averages, 12, 0.0)
    calm = averages.evidence().scatter.dominance
    averages.windows.end_epoch()
    # All scales change, as weights do in time, and no single steps are read.
    averages.train(8)
    averages.layers[0].averages[1].assign_add(100 * np.ones(3))
    averages.close(8)
    averages.windows.end_epoch()
    assert averages.evidence().scatter.dominance == pytest.approx(calm)
    # A wild batch in the epoch whose steps are known, in a window before them.
    averages = Averages(length=4)
    averages.train(4)
    averages.layers[0].averages[1].assign_add(1000 * np.ones(3))
    averages.close(4)
    wild(averages, 8, 0.0)
    first = averages.evidence().scatter.dominance
    assert first > 100
    for _ in range(KEPT_WINDOWS):
        averages.windows.end_epoch()
        averages.train(4)
        averages.close(4)
    assert averages.evidence().scatter.dominance == first


def test_momentum_one_recovers_nothing():
    averages = Averages(momentum=1.0)
    averages.train(4)
    averages.close(4)
    evidence = averages.evidence()
    assert evidence.batch is None
    assert evidence.windows is None
    assert evidence.is_still


def test_nan_is_no_foreign_write():
    averages = Averages()
    averages.train(4)
    averages.layers[0].layer.moving_mean.assign([np.nan] * 3)
    averages.close(4)
    averages.windows.reread()
    averages.close(4)
    assert averages.evidence().updates == 8


def test_an_average_made_of_the_window_itself_is_judged_by_its_past():
    averages = Averages(length=40)
    for _ in range(3):
        old = [np.array(v.value) for v in averages.layers[0].averages]
        averages.train(40)
        averages.close(40)
    assert MOMENTUM**40 < 0.5
    np.testing.assert_allclose(averages.evidence().past, old)


def test_an_average_longer_than_the_window_is_its_own_witness():
    averages = Averages(length=4)
    for _ in range(10):
        averages.train(4)
        averages.close(4)
    assert MOMENTUM**4 > 0.5
    assert averages.evidence().past is None
