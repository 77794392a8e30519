"""Counting steps: what Keras tells, what the optimizer counted, what was announced."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from bn_callbacks.watching.steps import StepCounter, announced


class Epoch:
    """An epoch as a callback sees it."""

    def __init__(
        self, begins, announced=None, per_execution=1, is_stopped=False, is_fit=True,
        optimizer=None, is_old_keras=False,
    ):  # fmt: skip
        model = SimpleNamespace(
            steps_per_execution=per_execution,
            stop_training=is_stopped,
            optimizer=optimizer,
        )
        if not is_old_keras:
            model.unrolled_steps_per_execution = 1
        self.counter = StepCounter(model, {"steps": announced} if is_fit else None)
        self.begins = begins

    def count(self, iterations=None, *, moved=None, origin=0):
        """What is counted in the end.

        Args:
            iterations: What the optimizer has counted, None without one.
            moved: Whether the last execution moved the averages; None: not read.
            origin: The optimizer's count when the epoch began.
        """
        for batch in self.begins:
            done = self.counter.begin_batch(batch)
            if batch == self.begins[0] or (
                batch == self.begins[-1] and moved is not None
            ):
                here = None if iterations is None else origin + min(done, iterations)
                self.counter.observe(here, np.array([float(done)]))
        if iterations is not None:
            iterations += origin
        done += 1 if moved else 0
        return self.counter.finish(iterations, np.array([float(done)]))


def test_nothing_begun_is_no_step():
    assert StepCounter(SimpleNamespace(), None).finish(None, np.zeros(1)) == 0


@pytest.mark.parametrize("origin", [0, 100])
@pytest.mark.parametrize("optimizer_counts", [True, False])
@pytest.mark.parametrize(("begins", "per_execution"), [(range(10), 1), ([0, 4, 8], 4)])
def test_a_whole_epoch_has_the_announced_steps(
    begins, per_execution, optimizer_counts, origin
):
    epoch = Epoch(begins, announced=10, per_execution=per_execution)
    assert (
        epoch.count(10 if optimizer_counts else None, moved=True, origin=origin) == 10
    )


@pytest.mark.parametrize("announced", [10, 12])
@pytest.mark.parametrize("made", [9, 10, 11, 12])
def test_the_last_execution_makes_as_many_steps_as_there_are_data(made, announced):
    epoch = Epoch([0, 4, 8], announced, per_execution=4)
    assert epoch.count(made, moved=True) == made


def test_an_old_keras_is_not_believed_to_make_more_steps_than_announced():
    epoch = Epoch([0, 4, 8], announced=10, per_execution=4, is_old_keras=True)
    assert epoch.count(12, moved=True) == 10


def test_an_execution_begun_without_data_is_no_step():
    # TensorFlow raises the counter all the same.
    assert Epoch(range(10), announced=10).count(10, moved=False) == 9


def test_of_an_execution_without_data_the_one_before_may_be_partial():
    epoch = Epoch([0, 4, 8], announced=12, per_execution=4)
    assert epoch.count(6, moved=False) == 6


@pytest.mark.parametrize("counted", [0, 3, 5, 20])
def test_a_counter_that_counts_otherwise_yields_to_the_announcement(counted):
    assert Epoch(range(10), announced=10).count(counted, moved=True) == 10


def test_a_counter_that_stands_still_in_a_single_step_is_not_believed():
    assert Epoch([0], announced=1).count(0, moved=True) == 1


@pytest.mark.parametrize("counts", [True, False])
def test_stopping_within_an_epoch_ends_after_an_execution(counts):
    epoch = Epoch([0, 4], announced=20, per_execution=4, is_stopped=True)
    assert epoch.count(8 if counts else None) == 8


@pytest.mark.parametrize("counted", [25, 26])
def test_data_of_unknown_length_end_with_an_execution_that_fails(counted):
    assert Epoch(range(26)).count(counted) == 25
    assert Epoch(range(26)).count(None) == 25


@pytest.mark.parametrize("made", [25, 26, 27, 28])
def test_data_of_unknown_length_end_after_a_partial_execution(made):
    assert Epoch(range(0, 29, 4), per_execution=4).count(made) == made


@pytest.mark.parametrize("counted", [25, 26, 27, 28])
def test_where_keras_counts_on_without_data_the_number_is_unknown(counted):
    epoch = Epoch(range(0, 25, 4), per_execution=4, is_old_keras=True)
    assert epoch.count(counted) is None
    epoch = Epoch([0, 4], announced=12, per_execution=4, is_old_keras=True)
    assert epoch.count(counted - 20) is None
    assert Epoch(range(7), announced=10).count(7) is None


def test_data_that_run_out_early_are_counted_where_the_counter_is_plausible():
    assert Epoch(range(7), announced=10).count(6) == 6
    assert Epoch([0, 4], announced=12, per_execution=4).count(6) == 6


@pytest.mark.parametrize(
    ("iterations", "expected"), [(10, 10), (None, None), (3, None)]
)
def test_a_hand_written_loop_is_counted_by_its_optimizer(iterations, expected):
    assert Epoch(range(10), is_fit=False).count(iterations) == expected


@pytest.mark.parametrize("first", [0, 1, 3, 500])
def test_an_epoch_may_begin_with_any_number(first):
    epoch = Epoch([first, first + 4, first + 8], announced=10, per_execution=4)
    assert epoch.count(10, moved=True) == 10


def test_steps_that_loss_scaling_leaves_out_are_counted():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    counter = Epoch([], announced=10, per_execution=4, optimizer=optimizer).counter
    left_out = 1
    for batch in (0, 4, 8):
        counter.begin_batch(batch)
        counter.observe(max(0, batch - left_out), np.array([float(batch)]))
    assert counter.finish(10 - left_out, np.array([10.0])) == 10


@pytest.mark.parametrize(
    ("batch", "announced", "per_execution", "expected"),
    [
        (9, 10, 1, True),
        (8, 10, 1, False),
        (8, 10, 4, True),
        (4, 10, 4, False),
        (9, None, 1, False),
    ],
)
def test_knows_the_last_announced_execution(batch, announced, per_execution, expected):
    counter = Epoch([], announced, per_execution).counter
    counter.begin_batch(0)
    counter.begin_batch(batch)
    assert counter.needs_reading is expected


def test_averages_that_never_move_do_not_look_like_missing_data():
    counter = Epoch([], announced=10).counter
    for batch in range(10):
        counter.begin_batch(batch)
        counter.observe(batch, np.zeros(1))
    assert counter.finish(10, np.zeros(1)) == 10


def test_a_new_epoch_forgets_the_one_before():
    counter = Epoch([]).counter
    counter.begin_batch(7)
    counter.begin_epoch()
    assert not counter.has_begun
    assert counter.begin_batch(3) == 0


def test_announcements_may_be_missing():
    assert announced(None, "steps") is announced({}, "epochs") is None
    assert announced({"steps": 5}, "steps") == 5
    assert announced({"epochs": 2}, "epochs") == 2
