"""Which layers have charts, what is remembered, and how texts are laid out."""

import html
import itertools
import math
import re

import numpy as np
import pytest

from bn_callbacks import BatchNormReport, LayerReport, RecalibrationReport
from bn_callbacks.tensorboard.charts import ChartedLayers, make_layout, worst_first
from bn_callbacks.tensorboard.history import MAX_COLUMNS, LagHistory
from bn_callbacks.tensorboard.panels import (
    MAX_ROWS,
    escape,
    recalibration_panel,
    report_panel,
)

INF, NAN = math.inf, math.nan


def report_of(lags, threshold=0.2, **arguments):
    """A report on layers named by their index."""
    layers = [
        LayerReport(
            f"{index}",
            "drifting" if lag is not None and not lag <= threshold else "healthy",
            lag=lag,
            advice="" if lag is not None and lag <= threshold else f"Advice {index}.",
        )
        for index, lag in enumerate(lags)
    ]
    return BatchNormReport(tuple(layers), **arguments)


def paths(layers):
    return [layer.path for layer in layers]


# --- Charts


def test_a_small_model_has_charts_of_all_layers():
    charted = ChartedLayers(5)
    assert paths(charted.update(report_of([0.1, None, 0.9]))) == ["0", "1", "2"]


def test_of_a_large_model_the_worst_get_half_of_the_charts():
    lags = np.linspace(0.1, 1, 20)
    assert paths(ChartedLayers(6).update(report_of(lags))) == ["17", "18", "19"]
    healthy = report_of(lags, threshold=9)
    assert paths(ChartedLayers(5).update(healthy)) == ["17", "18", "19"]


def test_a_layer_that_stays_among_the_worst_gets_a_chart():
    charted = ChartedLayers(4)
    lags = np.linspace(0.3, 1, 10)
    assert paths(charted.update(report_of(lags))) == ["8", "9"]
    lags[0] = 3.0
    seen = [paths(charted.update(report_of(lags))) for _ in range(4)]
    assert seen == [["8", "9"], ["8", "9"], ["0", "8", "9"], ["0", "8", "9"]]


def test_layers_that_are_bad_for_a_moment_get_none():
    charted = ChartedLayers(4)
    rng = np.random.default_rng(0)
    charted.update(report_of(np.full(50, 0.3)))
    before = paths(charted.update(report_of(np.full(50, 0.3))))
    for step in range(40):
        lags = np.full(50, 0.1)
        lags[[step % 48 + 2, rng.integers(2, 50)]] = 2.0
        assert paths(charted.update(report_of(lags))) == before


def test_charts_never_end_and_there_are_never_more():
    charted, rng = ChartedLayers(6), np.random.default_rng(0)
    before: set[str] = set()
    for _ in range(60):
        worst = rng.integers(0, 40)
        for _ in range(4):
            lags = rng.uniform(0.3, 0.5, 40)
            lags[worst] = 2.0
            now = set(paths(charted.update(report_of(lags))))
            assert before <= now
            before = now
    assert len(before) == 6


def test_healthy_layers_get_no_further_chart():
    charted = ChartedLayers(4)
    report = report_of(np.linspace(0, 0.1, 10))
    charted.update(report)
    for _ in range(5):
        other = report_of(np.linspace(0.1, 0, 10))
        assert paths(charted.update(other)) == ["8", "9"]


def test_without_charts_there_are_none():
    assert ChartedLayers(0).update(report_of([0.5] * 3)) == []


def test_the_worst_are_those_with_a_cause_and_then_the_largest_lags():
    layers = (
        LayerReport("a", lag=0.9),
        LayerReport("b", "noisy", lag=0.3),
        LayerReport("c", "inference_mode"),
        LayerReport("d"),
        LayerReport("e", "non_finite", lag=INF),
    )
    assert paths(worst_first(BatchNormReport(layers))) == ["e", "b", "c", "a", "d"]


@pytest.mark.parametrize("path", ["net/bn", "a.b(c)+[d]", "bn$", "bn_1"])
def test_a_charts_expression_matches_its_layer_alone(path):
    layout = make_layout([path], has_loss_gap=False)
    for category in layout.category[1:]:
        (chart,) = category.chart
        (pattern,) = chart.multiline.tag
        name = next(x for x in ("mu", "sigma", "lag") if x in pattern)
        assert re.match(pattern, f"bn/{name}/{path}")
        for other in (f"{path}0", f"x/{path}", "net_bn"):
            assert not re.match(pattern, f"bn/{name}/{other}")


# --- History


def test_history_keeps_steps_and_lags():
    history = LagHistory(start=100)
    history.add(110, [0.1, None])
    history.add(130, [0.2, NAN])
    assert history.edges == [100, 110, 130]
    np.testing.assert_array_equal(history.lags, [[0.1, 0.2], [NAN, INF]])


def test_the_same_step_again_replaces_what_was_found():
    history = LagHistory(0)
    history.add(0, [0.1])
    history.add(0, [0.2])
    assert history.edges == [0, 1]
    assert history.lags.tolist() == [[0.2]]


@pytest.mark.parametrize("count", [MAX_COLUMNS, MAX_COLUMNS + 1, 1000, 1023])
def test_a_long_history_takes_no_more_room_and_forgets_no_lag(count):
    history = LagHistory(0)
    rng = np.random.default_rng(0)
    lags = rng.uniform(0, 1, count)
    lags[count // 3] = 7.0
    for step, lag in enumerate(lags, 1):
        history.add(step, [lag, None])
    columns = history.lags
    edges = history.edges
    assert MAX_COLUMNS // 2 <= columns.shape[1] <= MAX_COLUMNS
    assert len(edges) == columns.shape[1] + 1
    assert edges[0] == 0
    assert edges[-1] == count
    # Each column is the largest of its time.
    expected = [max(lags[a:b]) for a, b in itertools.pairwise(edges)]
    assert columns[0].tolist() == expected
    assert np.isnan(columns[1]).all()


# --- Texts


def table_of(panel):
    lines = [line for line in panel.splitlines() if line.startswith("|")]
    return [
        [html.unescape(cell.strip()) for cell in line[1:-1].split(" | ")]
        for line in lines
    ]


def test_the_panel_begins_with_the_verdict():
    assert report_panel(report_of([0.1, 0.5]), {}).startswith(
        "### 1 of 2 BatchNormalization layers not healthy\n"
    )
    assert report_panel(report_of([0.1]), {}).startswith(
        "### 1 of 1 BatchNormalization layers healthy\n"
    )


def test_the_worst_come_first_and_say_since_when():
    head, _, *rows = table_of(report_panel(report_of([0.1, 0.5, 0.9]), {"2": 70}))
    assert head[0] == "layer"
    assert [row[0] for row in rows] == ["2", "1", "0"]
    assert [row[5] for row in rows] == ["70", "", ""]


def test_advice_is_given_once_for_a_cause():
    _, _, *rows = table_of(report_panel(report_of([0.1, 0.5, 0.9]), {}))
    assert [row[6] for row in rows] == ["Advice 2.", "As for 2.", ""]


def test_a_large_model_has_a_short_table():
    lags = [0.05] * 100 + [0.6] * 100
    panel = report_panel(report_of(lags), {})
    assert len(table_of(panel)) == MAX_ROWS + 2
    assert "170 layers more, 70 of them not healthy, with lags up to 0.6." in panel
    panel = report_panel(report_of([0.05] * (MAX_ROWS + 1)), {})
    assert "1 layer more, all healthy, with lags up to 0.05." in panel
    assert len(report_panel(report_of(lags), {})) < 10_000


def test_what_else_is_known_follows():
    report = report_of([0.5], loss_batch=2.0, loss_inference=3.0, clues=("one_clue",))
    panel = html.unescape(report_panel(report, {}, ["a note"]))
    assert panel.split("\n\n")[-3:] == [
        "Loss: 3 in inference mode, 2 with batch statistics (gap 1.5).",
        "one_clue",
        "a note",
    ]


@pytest.mark.parametrize("name", ["a|b", "<b>x</b>", "*a*_b_", "`a`", "[a](b)", "a\\b"])
def test_names_are_shown_as_they_are(name):
    markdown = pytest.importorskip("markdown")
    text = markdown.markdown(
        report_panel(BatchNormReport((LayerReport(name),)), {}), extensions=["tables"]
    )
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert html.unescape(cells[0]) == name
    assert "<" not in cells[0]


def test_a_recalibration_shows_before_and_after():
    before = report_of([0.2, 0.5])
    report = RecalibrationReport(
        before, 0.01, 64, 2, 3, committed=True, loss_before=2.0, loss_after=1.0,
        residuals=(0.01, None),
    )  # fmt: skip
    panel = recalibration_panel(report)
    assert html.unescape(panel).startswith(str(report))
    assert table_of(panel)[2:] == [
        ["validation loss", "2", "1"],
        ["1", "0.5", ""],
        ["0", "0.2", "0.01"],
    ]


def test_a_recalibration_of_many_layers_shows_the_worst():
    before = report_of(np.linspace(0, 1, MAX_ROWS + 5))
    report = RecalibrationReport(before, None, 64, 2, 1, committed=True)
    rows = table_of(recalibration_panel(report))[2:]
    assert len(rows) == MAX_ROWS + 1
    assert rows[0][0] == str(MAX_ROWS + 4)
    assert rows[-1][0] == "and 5 more"


def test_escaping_leaves_plain_words_alone():
    assert escape("two  words,\nand 0.5.") == "two words, and 0.5."
