"""What came and went: episodes, what remembers them, and who tells of them."""

import copy
import dataclasses
import json
import pickle
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import bn_callbacks
from bn_callbacks import (
    BatchNormLagWarning,
    BatchNormMonitor,
    BatchNormReport,
    BatchNormWatch,
    Episode,
    LayerReport,
)
from bn_callbacks.report import MAX_LINES
from bn_callbacks.statistics import causes
from bn_callbacks.watching.episode_recorder import MAX_EPISODES, EpisodeRecorder

NAN = float("nan")


def report_of(gap=None, **lags):
    """`cause=lag` or `cause=(lag, lag)`: layers `cause_0`, `cause_1` with it."""
    layers = [
        LayerReport(f"{cause}_{index}", cause, lag=lag, advice=f"{cause} at {lag}")
        for cause, values in lags.items()
        for index, lag in enumerate(np.atleast_1d(np.array(values, object)))
    ]
    losses = {} if gap is None else {"loss_batch": 1.0, "loss_inference": gap}
    return BatchNormReport((LayerReport("fine", lag=0.01), *layers), **losses)


def record(*looks, ends_epoch=True, recorder=None):
    """One report an epoch of ten steps."""
    recorder = recorder or EpisodeRecorder()
    report = BatchNormReport()
    for epoch, look in enumerate(looks, 1):
        report = recorder.add(look or report_of(), 10 * epoch, epoch, ends_epoch)
    return report.episodes


# --- Joining reports


def test_an_episode_is_the_time_in_which_a_cause_was_found():
    (episode,) = record(
        None,
        report_of(1.5, noisy=(0.3, 0.5)),
        report_of(4.0, noisy=0.9),
        report_of(9.0),
    )
    assert episode == Episode(
        "noisy", 20, 30, 2, 3, ("noisy_1", "noisy_0"), "noisy_0", 0.9, 4.0,
        is_over=True, advice="noisy at 0.9",
    )  # fmt: skip


def test_what_the_latest_report_shows_is_not_over():
    past, now = record(report_of(stale=0.5), report_of(noisy=0.5))
    assert (past.cause, past.is_over) == ("stale", True)
    assert (now.cause, now.is_over) == ("noisy", False)
    assert str(now) == "noisy since epoch 2 (step 20): noisy_0 by 0.5"


def test_causes_overlap_and_come_again():
    both = report_of(stale=0.5, noisy=0.4)
    episodes = record(both, report_of(noisy=0.4), None, both)
    assert [(e.cause, e.first_epoch, e.last_epoch) for e in episodes] == [
        ("stale", 1, 1), ("noisy", 1, 2), ("stale", 4, 4), ("noisy", 4, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("looks", "spans"),
    [
        # Between the ends of epochs one look is chance, two are none.
        ("-x---", []),
        ("-xx--", [(20, 30)]),
        # One report that misses it ends nothing, two do.
        ("xx-x-", [(10, 40)]),
        ("xx--xx", [(10, 20), (50, 60)]),
    ],
)
def test_between_the_ends_of_epochs_one_look_is_chance(looks, spans):
    reports = [report_of(outliers=0.5) if look == "x" else None for look in looks]
    episodes = record(*reports, ends_epoch=False)
    assert [(each.first_step, each.last_step) for each in episodes] == spans


def test_warming_up_counts_at_the_end_of_an_epoch_only():
    warming = report_of(warming_up=0.5)
    assert record(*[warming] * 5, ends_epoch=False) == ()
    recorder = EpisodeRecorder()
    record(warming, warming, ends_epoch=False, recorder=recorder)
    (episode,) = recorder.add(warming, 30, 1, ends_epoch=True).episodes
    assert (episode.first_step, episode.last_step) == (10, 30)


def test_losses_count_where_they_are_new():
    recorder = EpisodeRecorder()
    look = report_of(5.0, outliers=0.5)
    record(look, look, ends_epoch=False, recorder=recorder)
    assert recorder.episodes[0].loss_gap is None


@pytest.mark.parametrize(("lags", "worst"), [((0.5, NAN), 1), ((NAN, 0.5), 0)])
def test_what_is_no_number_is_the_worst(lags, worst):
    (episode,) = record(*(report_of(non_finite=lag) for lag in lags))
    assert episode.advice == f"non_finite at {lags[worst]}"


def test_a_lag_that_is_unknown_is_the_least():
    (episode,) = record(report_of(inference_mode=None), report_of(inference_mode=0.1))
    assert episode.lag == 0.1
    assert str(record(report_of(inference_mode=None))[0]).endswith(": inference_mode_0")


def test_long_trainings_take_no_more_room_and_forget_nothing():
    recorder = EpisodeRecorder()
    words = [w for n, w in vars(causes).items() if n.isupper() and w != causes.HEALTHY]
    rng = np.random.default_rng(0)
    came = dict.fromkeys(words, 0)
    for epoch in range(1, 20_001):
        cause = words[rng.integers(len(words))] if epoch % 2 else None
        look = report_of() if cause is None else report_of(**{cause: 0.3})
        if cause:
            came[cause] += 1
        if epoch == 7_001:
            look = report_of(outliers=9.0)
            came[cause] -= 1
            came["outliers"] += 1
        report = recorder.add(look, 5 * epoch, epoch, ends_epoch=True)
        assert len(report.episodes) <= MAX_EPISODES + 1
    for cause in words:
        mine = [each for each in report.episodes if each.cause == cause]
        assert sum(each.times for each in mine) == came[cause]
    (worst,) = (each for each in report.episodes if each.lag == 9.0)
    assert worst.first_epoch <= 7_001 <= worst.last_epoch
    starts = [each.first_step for each in report.episodes]
    assert starts == sorted(starts)
    assert len(pickle.dumps(report)) < 20_000


# --- In a report


def test_episodes_travel_with_the_report():
    report = dataclasses.replace(report_of(), episodes=record(report_of(stale=NAN)))
    assert pickle.loads(pickle.dumps(report)).episodes[0].cause == "stale"
    assert copy.deepcopy(report).episodes[0].layers == ("stale_0",)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["episodes"] == [
        dataclasses.asdict(report.episodes[0]) | {"lag": "nan", "layers": ["stale_0"]}
    ]


def test_a_printed_report_tells_what_came_and_went():
    episodes = record(report_of(3.0, outliers=(0.5, 0.75)), None)
    report = dataclasses.replace(report_of(), episodes=episodes)
    assert str(report).splitlines()[:2] == [
        "1 of 1 BatchNormalization layers healthy",
        "  outliers in epoch 1 (step 10): 2 layers, worst outliers_1 by 0.75, "
        "loss gap 3",
    ]
    assert "outliers in epoch 1" in report._repr_html_()
    many = dataclasses.replace(report, episodes=episodes * (MAX_LINES + 4))
    assert str(many).splitlines()[1] == "  … 4 earlier ones"
    assert str(many).count("outliers in epoch") == MAX_LINES


def test_an_episode_that_came_often_says_so():
    (episode,) = record(report_of(stale=0.5))
    text = str(dataclasses.replace(episode, times=3, last_step=900, last_epoch=90,
                                   is_over=True))  # fmt: skip
    assert text == "stale in epochs 1-90 (steps 10-900, 3 times): stale_0 by 0.5"


# --- In a training

BATCH = 16
X = np.random.default_rng(0).normal(3, 2, (10 * BATCH, 3)).astype("float32")


def make_model(momentum=0.99):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.BatchNormalization(momentum=momentum, name="bn"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    return model


def fit(model, *callbacks, **arguments):
    arguments = {"batch_size": BATCH, "verbose": 0} | arguments
    return model.fit(X, X[:, :1], callbacks=list(callbacks), **arguments)


def test_a_fit_remembers_what_is_over():
    # 2 % of the start is left after 40 updates.
    monitor = BatchNormMonitor(on_lag="ignore")
    fit(make_model(momentum=0.9), monitor, epochs=5)
    (episode,) = monitor.report.episodes
    assert monitor.report.lagging == ()
    assert episode.cause == "warming_up"
    assert (episode.first_step, episode.first_epoch) == (10, 1)
    assert episode.is_over
    assert 1 <= episode.last_epoch < 5
    assert episode.last_step == 10 * episode.last_epoch


@pytest.mark.parametrize("is_same_monitor", [True, False])
def test_a_fit_that_resumes_adds_to_them(is_same_monitor):
    model, monitor = make_model(), BatchNormMonitor(on_lag="ignore")
    fit(model, monitor, epochs=2)
    again = monitor if is_same_monitor else BatchNormMonitor(on_lag="ignore")
    fit(model, again, epochs=3, initial_epoch=2)
    (episode,) = again.report.episodes
    assert (episode.first_epoch, episode.last_epoch) == (1, 3)
    assert (episode.first_step, episode.last_step) == (10, 30)
    # A training of its own has episodes of its own.
    fit(model, again, epochs=1)
    (episode,) = again.report.episodes
    assert (episode.first_step, episode.first_epoch) == (40, 1)


def test_an_epoch_that_was_interrupted_is_made_again():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if self.model.optimizer.iterations.numpy() == 15:
                raise KeyboardInterrupt

    model, monitor = make_model(), BatchNormMonitor(on_lag="ignore")
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor, Stop(), epochs=2)
    fit(model, monitor, epochs=2, initial_epoch=1)
    (episode,) = monitor.report.episodes
    assert (episode.first_epoch, episode.last_epoch) == (1, 2)
    assert (episode.first_step, episode.last_step) == (10, 25)


def test_another_model_has_nothing_to_do_with_them():
    monitor = BatchNormMonitor(on_lag="ignore")
    fit(make_model(), monitor, epochs=2)
    fit(make_model(), monitor, epochs=3, initial_epoch=2)
    (episode,) = monitor.report.episodes
    assert (episode.first_epoch, episode.first_step) == (3, 10)


def test_a_loop_without_fit_has_them_too():
    model = make_model()
    watch = BatchNormWatch(model, steps=10, epochs=2)
    for _ in range(2):
        watch.begin_epoch()
        for step in range(10):
            watch.begin_step()
            part = slice(BATCH * step, BATCH * step + BATCH)
            model.train_on_batch(X[part], X[part, :1])
        watch.end_epoch()
    (episode,) = watch.report.episodes
    assert (episode.first_epoch, episode.last_epoch) == (1, 2)
    assert (episode.first_step, episode.last_step) == (10, 20)


def test_the_last_warning_tells_what_was_before():
    watch = BatchNormWatch(make_model(), steps=10)
    past = Episode("outliers", 1, 2, 1, 1, ("bn",), "bn", 0.9)
    layer = LayerReport("bn", "noisy", lag=9.0, advice="Do it.")
    watch.report = BatchNormReport((layer,), episodes=(past,))
    assert watch.messages(is_last=False) == []
    (message,) = watch.messages(is_last=True)
    assert message.endswith(
        "Do it. Before that: outliers in epoch 1 (steps 1-2): bn by 0.9."
    )


# --- Who is told, where


def line_of_fit():
    return sys._getframe(1).f_lineno


def test_a_warning_points_at_the_line_with_fit():
    with pytest.warns(BatchNormLagWarning) as caught:
        fit(make_model(), BatchNormMonitor())
    (warning,) = caught
    assert warning.filename == __file__
    source = Path(__file__).read_text("utf-8").splitlines()
    assert "model.fit(" in source[warning.lineno - 1]


def test_all_warnings_of_ours_point_at_the_user(tmp_path):
    from bn_callbacks.warn import warn

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("here", UserWarning)
        line = line_of_fit() - 1
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_what_is_printed_leaves_the_progress_bar_whole(capsys):
    monitor = BatchNormMonitor(on_lag="ignore", verbose=1)
    fit(make_model(), monitor, epochs=2, verbose=1)
    lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
    ours = [index for index, line in enumerate(lines) if "BatchNormalization" in line]
    assert [lines[index] for index in ours] == [
        f"Epoch {epoch}: 1 of 1 BatchNormalization layers not healthy"
        for epoch in (1, 2)
    ]
    for index in ours:
        above = [line for line in lines[:index] if line.strip()][-1]
        assert "10/10" in above
        assert "bn_lag" in above
    assert lines[ours[0] : ours[1]].count("Epoch 2/2") == 1


@pytest.mark.parametrize("on_lag", ["ignore", "raise"])
def test_without_a_progress_bar_it_is_printed_at_once(on_lag, capsys):
    monitor = BatchNormMonitor(on_lag=on_lag, verbose=1)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(capsys.readouterr().out)
    )
    try:
        fit(make_model(), monitor, look)
    except BatchNormLagWarning:
        seen.append(capsys.readouterr().out)
    assert seen[0].startswith("Epoch 1: 1 of 1 BatchNormalization layers not healthy\n")
    assert seen[0].count("BatchNormalization") == 1


def test_episodes_are_public():
    assert "Episode" in bn_callbacks.__all__
    assert bn_callbacks.Episode is Episode
