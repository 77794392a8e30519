"""Reports: order, figures, table, dictionary, notebook."""

import dataclasses
import html
import json
import math
import re
import warnings

import numpy as np
import pytest

import bn_callbacks
from bn_callbacks import (
    BatchNormLagWarning,
    BatchNormReport,
    BatchNormWarning,
    Episode,
    LayerReport,
    RecalibrationReport,
)
from bn_callbacks.report import MAX_ROWS, layer_reports
from bn_callbacks.statistics.evidence import Evidence
from bn_callbacks.statistics.losses import Family
from bn_callbacks.statistics.moments import Statistics

INF, NAN = math.inf, math.nan


def report_of(*lags, **arguments):
    layers = [
        LayerReport(
            f"layer{i}", cause="healthy" if lag is None else "drifting", lag=lag
        )
        for i, lag in enumerate(lags)
    ]
    return BatchNormReport(tuple(layers), **arguments)


# --- Order


def test_without_layers_there_is_no_worst_and_no_lag():
    report = BatchNormReport()
    assert report.worst is None
    assert report.max_lag == 0.0
    assert report.lagging == ()
    assert str(report) == "No BatchNormalization layers."


@pytest.mark.parametrize(
    ("lags", "order"),
    [
        ([0.1, 0.5, 0.3], [1, 2, 0]),
        ([0.1, INF, 0.3], [1, 2, 0]),
        ([0.1, NAN, 0.3], [1, 2, 0]),
        ([0.2, 0.2], [0, 1]),
        ([0.2, None, 0.1], [0, 2]),
    ],
)
def test_the_worst_comes_first(lags, order):
    report = report_of(*lags)
    assert [layer.path for layer in report.lagging] == [f"layer{i}" for i in order]
    assert report.worst is report.layers[order[0]]


def test_the_largest_lag_leaves_out_what_is_not_known():
    assert report_of(None, 0.2, 0.1).max_lag == 0.2
    assert report_of(None).max_lag == 0.0
    assert report_of(0.2, INF).max_lag == INF


def test_a_large_lag_that_is_healthy_is_the_worst_but_does_not_lag():
    noisy = LayerReport("a", "healthy", lag=0.9)
    report = BatchNormReport((LayerReport("b", "drifting", lag=0.3), noisy))
    assert report.worst is noisy
    assert [layer.path for layer in report.lagging] == ["b"]


@pytest.mark.parametrize(
    ("batch", "inference", "gap"),
    [
        (2.0, 3.0, 1.5),
        (None, 3.0, None),
        (2.0, None, None),
        (0.0, 1.0, None),
        (-1.0, 1.0, None),
        (None, None, None),
    ],
)
def test_loss_gap_is_a_ratio_where_there_is_one(batch, inference, gap):
    report = BatchNormReport(loss_batch=batch, loss_inference=inference)
    assert report.loss_gap == gap


def test_loss_gap_of_a_loss_that_is_nan_is_nan():
    assert math.isnan(BatchNormReport(loss_batch=1.0, loss_inference=NAN).loss_gap)


# --- Forms


def full_report():
    worst = LayerReport(
        "model/<b>&bn", "warming_up", lag=1.25, mean_shift=0.5, scale_ratio=2.0,
        noise=0.01, updates=10, start_weight=0.9, momentum=0.99,
        suggested_momentum=0.9, design_effect=1.0, advice="Wait <long> & \"well\".",
    )  # fmt: skip
    return BatchNormReport(
        (LayerReport("a"), worst), loss_batch=2.0, loss_inference=3.0
    )


def test_the_table_is_aligned_and_followed_by_losses_and_advice():
    head, *lines = str(full_report()).splitlines()
    assert head == full_report().headline
    assert lines[0].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[1:3]] == ["model/<b>&bn", "a"]
    for name in ("cause", "lag", "momentum"):
        assert name in lines[0]
    # Figures end where their heading ends.
    end = lines[0].index("lag") + len("lag")
    assert lines[1][:end].endswith(" 1.25")
    assert lines[2][:end].endswith(" -")
    assert lines[3].startswith("loss: 3 in inference mode, 2 with batch statistics")
    assert "(gap 1.5)" in lines[3]
    assert lines[4] == 'warming_up: Wait <long> & "well".'


def test_advice_is_given_once_for_each_cause_and_for_the_worst():
    layers = [
        LayerReport("a", "drifting", lag=lag, advice=f"at {lag}") for lag in (1, 3, 2)
    ]
    text = str(BatchNormReport(tuple(layers)))
    assert text.count("drifting: at 3") == text.count("drifting: ") == 1


def test_the_dictionary_survives_json():
    report = full_report()
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["layers"] == [dataclasses.asdict(layer) for layer in report.layers]
    assert values["loss_gap"] == 1.5
    assert values["max_lag"] == 1.25
    assert values["worst"] == "model/<b>&bn"
    assert values["lagging"] == ["model/<b>&bn"]
    assert values["loss_batch"] == 2.0
    assert values["loss_inference"] == 3.0


def test_what_json_cannot_say_becomes_a_string():
    report = report_of(INF, NAN, loss_batch=1.0, loss_inference=-INF)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [layer["lag"] for layer in values["layers"]] == ["inf", "nan"]
    assert values["loss_gap"] == "-inf"


def test_the_empty_report_survives_json_too():
    values = json.loads(json.dumps(BatchNormReport().to_dict()))
    assert values["worst"] is None
    assert values["layers"] == values["lagging"] == []


def test_the_notebook_view_escapes_what_users_named():
    view = full_report()._repr_html_()
    assert "<b>" not in view.replace("<br>", "")
    assert "model/&lt;b&gt;&amp;bn" in view
    assert "Wait &lt;long&gt; &amp; " in view
    assert view.count("<tr>") == 3
    assert view.startswith(f"<p>{full_report().headline}</p><table>")


def test_rows_beyond_30_are_cut_worst_first_and_counted():
    healthy = [LayerReport(f"h{index}", lag=0.001 * index) for index in range(60)]
    sick = [
        LayerReport(f"s{index}", "drifting", lag=1.0 + index)
        for index in range(MAX_ROWS + 2)
    ]
    text = str(BatchNormReport((*healthy, *sick)))
    lines = text.splitlines()
    rows = [line.split()[0] for line in lines[2 : 2 + MAX_ROWS]]
    assert rows == [f"s{index}" for index in range(MAX_ROWS + 1, 1, -1)]
    assert lines[2 + MAX_ROWS] == "… and 62 more layers, 2 of them not healthy"
    few = str(BatchNormReport(tuple(healthy[:MAX_ROWS])))
    assert "more layers" not in few


def test_the_losses_are_told_with_what_recalibrating_can_reach():
    report = BatchNormReport(
        (LayerReport("a", residual=0.5), LayerReport("b")), 1.0, 3.0, (), 1.1
    )
    assert report.loss_line.endswith("(gap 3), 1.1 if recalibrated on these examples")
    assert report.residual == 0.5
    assert report.to_dict()["loss_recalibrated"] == 1.1
    assert report.to_dict()["residual"] == 0.5
    assert BatchNormReport().residual is None


@pytest.mark.parametrize("kind", [BatchNormReport, LayerReport, RecalibrationReport])
def test_reports_cannot_be_changed(kind):
    assert kind.__dataclass_params__.frozen


# --- Recalibrations


def recalibration(**arguments):
    arguments = {
        "before": report_of(0.5, 0.25), "residual": 0.001, "samples": 1200,
        "batches": 40, "passes": 2, "committed": True,
    } | arguments  # fmt: skip
    return RecalibrationReport(**arguments)


def test_a_recalibration_tells_what_it_did():
    text = str(recalibration())
    assert text.startswith(
        "Recalibrated 2 BatchNormalization layers over 1,200 samples"
    )
    assert "40 batches, 2 passes" in text
    assert "lag 0.5 before, 0.001 after" in text
    one = str(recalibration(before=report_of(0.5), passes=1, residual=None))
    assert "1 BatchNormalization layer over" in one
    assert "1 pass)" in one
    assert "after" not in one


def test_a_recalibration_tells_what_it_kept_and_left_alone():
    text = str(recalibration(committed=False, loss_before=1.0, loss_after=2.0,
                             unreached=("layer1",), skipped=("frozen",)))  # fmt: skip
    assert text.startswith("Kept the old statistics of 1 BatchNormalization layer ")
    assert "loss 1 -> 2" in text
    assert "never reached by the data: layer1" in text
    assert "not updated in training: frozen" in text


def test_the_headline_counts_the_layers():
    assert recalibration().headline == "Recalibrated 2 BatchNormalization layers"
    kept = recalibration(committed=False, unreached=("layer1",)).headline
    assert kept == "Kept the old statistics of 1 BatchNormalization layer"
    assert (
        report_of(0.5, None).headline == "1 of 2 BatchNormalization layers not healthy"
    )
    assert report_of(None).headline == "1 of 1 BatchNormalization layers healthy"


def test_before_and_after_are_paired_by_layer():
    report = recalibration(residuals=(0.001, None))
    assert [(layer.path, after) for layer, after in report.before_and_after()] == [
        ("layer0", 0.001),
        ("layer1", None),
    ]
    assert [after for _, after in recalibration().before_and_after()] == [None, None]


def test_the_notebook_view_of_a_recalibration_shows_before_and_after():
    before = BatchNormReport((LayerReport("<b>", lag=0.5),))
    view = recalibration(before=before, residuals=(0.001,))._repr_html_()
    assert "<tr><td>&lt;b&gt;</td><td>0.5</td><td>0.001</td></tr>" in view
    assert "<th>lag after</th>" in view
    assert "Recalibrated 1 BatchNormalization layer over 1,200 samples" in view


def test_undo_calls_what_gives_the_statistics_back():
    calls = []
    recalibration(_undo=lambda: calls.append(1)).undo()
    assert calls == [1]
    recalibration().undo()


# --- Warnings


def test_warnings_bear_the_public_name_and_can_be_silenced_as_one():
    assert issubclass(BatchNormLagWarning, BatchNormWarning)
    assert issubclass(BatchNormWarning, UserWarning)
    for category in (BatchNormWarning, BatchNormLagWarning):
        assert category.__module__ == "bn_callbacks"
        assert getattr(bn_callbacks, category.__name__) is category
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        warnings.warn("lag", BatchNormLagWarning, stacklevel=1)


# --- What a notebook and a terminal are shown


@pytest.mark.parametrize(
    "name", ["$x$ and $y$", r"\(x\)", r"\begin{b}", "<img src=x>", "&lt;"]
)
def test_a_notebook_makes_no_markup_and_no_formula_of_a_name(name):
    episode = Episode("noisy", 1, 1, 1, 1, (name,), name, 0.5)
    report = BatchNormReport(
        (LayerReport(name, "noisy", lag=0.5),), episodes=(episode,)
    )
    recalibrated = recalibration(before=report, residuals=(0.1,), skipped=(name,))
    for view in (report._repr_html_(), recalibrated._repr_html_()):
        tags = set(re.findall(r"</?(\w+)", view))
        assert tags <= {"p", "table", "tr", "th", "td", "span"}
        # MathJax looks for both ends of a formula in one element.
        pieces = re.split(r"<[^>]*>", view)
        assert not any(
            len(piece) > 1 and re.search(r"[$\\]", piece) for piece in pieces
        )
        assert name in html.unescape(re.sub(r"<[^>]*>", "", view))


def test_a_notebook_shows_30_layers_at_most_worst_first():
    layers = [LayerReport(f"bn_{i}", "noisy", lag=i) for i in range(MAX_ROWS + 5)]
    report = BatchNormReport(tuple(layers))
    recalibrated = recalibration(before=report, residuals=(0.1,) * len(layers))
    for view in (report._repr_html_(), recalibrated._repr_html_()):
        rows = re.findall(r"<tr><td>(\w+)", view)
        assert len(rows) == MAX_ROWS
        assert rows[0] == f"bn_{MAX_ROWS + 4}"
        assert "and 5 more layers" in view


def test_worst_comes_first_also_in_small_reports():
    layers = (LayerReport("a", lag=0.1), LayerReport("b", "noisy", lag=0.3),
              LayerReport("c", lag=0.9), LayerReport("d"))  # fmt: skip
    lines = str(BatchNormReport(layers)).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["b", "c", "a", "d"]


def test_a_healthy_layer_that_is_far_off_says_what_clears_it():
    report = BatchNormReport((LayerReport("a", lag=1.2, cleared="drifting"),))
    assert "healthy (loss clears drifting)" in str(report)
    assert "healthy (loss clears drifting)" in report._repr_html_()


def far_off(family, lag=1.0):
    """Evidence of a layer that lags behind its batches by so much, and nothing else."""
    count = 8
    windows = Statistics(
        np.full((8, count), lag) + np.linspace(0, 0.5, 8)[:, None], np.ones((8, count))
    )
    return Evidence(
        "bn",
        momentum=0.99,
        epsilon=1e-3,
        moving=Statistics(np.zeros(count), np.ones(count)),
        batch=Statistics(np.full(count, lag), np.ones(count)),
        updates=100_000,
        start=Statistics(np.zeros(count), np.ones(count)),
        windows=windows,
        window_updates=50,
        window_share=0.02,
        batch_size=64,
        family=family,
    )


def test_what_the_losses_have_cleared_is_found_by_asking_without_them():
    (alone,) = layer_reports([far_off(Family.UNKNOWN)])
    (cleared,) = layer_reports([far_off(Family.INNOCENT)])
    assert alone.cause != "healthy"
    assert alone.cleared == ""
    assert (cleared.cause, cleared.cleared) == ("healthy", alone.cause)
    (near,) = layer_reports([far_off(Family.INNOCENT, lag=0.1)])
    assert near.cleared == ""
    (unclear,) = layer_reports([far_off(Family.UNCLEAR)])
    assert unclear.cleared == ""
