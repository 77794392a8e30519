"""Which layers have charts, what is remembered, and how texts are laid out."""

import email.message
import html
import itertools
import math
import re
import warnings

import numpy as np
import pytest

from bn_callbacks import BatchNormReport, LayerReport, RecalibrationReport
from bn_callbacks.episodes import Episode
from bn_callbacks.report import MAX_ROWS
from bn_callbacks.statistics import causes
from bn_callbacks.tensorboard import panels
from bn_callbacks.tensorboard.charts import (
    RECOVERED,
    TURNOVER,
    ChartedLayers,
    make_layout,
)
from bn_callbacks.tensorboard.history import FIGURES, MARKS, MAX_COLUMNS, History
from bn_callbacks.tensorboard.panels import (
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


def test_the_worst_layer_gets_a_free_place_at_once():
    charted = ChartedLayers(4)
    lags = np.linspace(0.01, 0.1, 10)
    assert paths(charted.update(report_of(lags))) == ["8", "9"]
    lags[0] = 3.0
    assert paths(charted.update(report_of(lags))) == ["0", "8", "9"]


def test_a_layer_that_stays_among_the_worst_gets_a_chart():
    charted = ChartedLayers(4)
    lags = np.linspace(0.3, 1, 10)
    assert paths(charted.update(report_of(lags))) == ["8", "9"]
    lags[:2] = 2.0, 3.0
    seen = [paths(charted.update(report_of(lags))) for _ in range(3)]
    assert seen == [["1", "8", "9"], ["1", "8", "9"], ["0", "1", "8", "9"]]


def test_the_place_of_a_layer_long_healthy_is_taken_over():
    charted = ChartedLayers(4)
    lags = np.full(10, 0.1)
    lags[6:] = 0.5, 0.6, 0.7, 0.8
    for _ in range(4):
        before = charted.update(report_of(lags))
    assert paths(before) == ["8", "9"]
    for sick in (0, 1):
        lags[sick] = 2.0 + sick
        charted.update(report_of(lags))
    lags[9] = 0.1  # It recovers, and nobody else does.
    lags[2] = 5.0
    for _ in range(RECOVERED - 1):
        assert "2" not in paths(charted.update(report_of(lags)))
    assert paths(charted.update(report_of(lags))) == ["0", "1", "2", "8"]


def test_charts_do_not_flicker_and_there_are_never_more():
    charted, rng = ChartedLayers(6), np.random.default_rng(0)
    ever: set[str] = set()
    since: dict[str, int] = {}
    for look in range(400):
        lags = rng.uniform(0.0, 0.1, 40)
        lags[rng.integers(0, 40, 2)] = 2.0
        now = set(paths(charted.update(report_of(lags))))
        assert len(now) <= 6
        for path in now - set(since):
            since[path] = look
        for path in set(since) - now:
            assert look - since.pop(path) >= RECOVERED - 1
        ever |= now
    assert 6 < len(ever) <= TURNOVER * 6


def test_healthy_layers_get_no_further_chart():
    charted = ChartedLayers(4)
    report = report_of(np.linspace(0, 0.1, 10))
    charted.update(report)
    for _ in range(3 * RECOVERED):
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
    assert paths(BatchNormReport(layers).ranked) == ["e", "b", "c", "a", "d"]


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


def found(*lags, cause=""):
    return [LayerReport("bn", cause or "healthy", lag=lag) for lag in lags]


def test_history_keeps_steps_lags_and_causes():
    history = History(start=100)
    history.add(110, found(0.1, None))
    history.add(130, found(0.2, NAN, cause="drifting"))
    assert history.edges == [100, 110, 130]
    np.testing.assert_array_equal(history.lags, [[0.1, 0.2], [NAN, INF]])
    assert history.marks.tolist() == [["", "D"], ["", "D"]]


def test_the_same_step_again_replaces_what_was_found():
    history = History(0)
    history.add(0, found(0.1))
    history.add(0, found(0.2, cause="noisy"))
    assert history.edges == [0, 1]
    assert history.lags.tolist() == [[0.2]]
    assert history.marks.tolist() == [["N"]]


@pytest.mark.parametrize("count", [MAX_COLUMNS, MAX_COLUMNS + 1, 1000, 1023])
def test_a_long_history_takes_no_more_room_and_forgets_nothing(count):
    history = History(0)
    rng = np.random.default_rng(0)
    lags = rng.uniform(0, 1, count)
    lags[count // 3] = 7.0
    sick = count // 2
    for step, lag in enumerate(lags, 1):
        cause = "outliers" if step == sick else ""
        history.add(step, [*found(lag, None), *found(lag / 100, cause=cause)])
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
    # A cause is worse than a large lag.
    ((row, column),) = np.argwhere(history.marks != "")
    assert row == 2
    assert edges[column] < sick <= edges[column + 1]
    assert columns[2, column] == lags[sick - 1] / 100


def test_the_past_of_a_layer_is_what_was_known():
    history = History(0)
    history.add(5, [LayerReport("a"), LayerReport("b", lag=0.5, noise=0.1)])
    history.add(9, [LayerReport("a"), LayerReport("b", lag=NAN, start_weight=0.25)])
    assert list(history.past(1)) == [
        (5, {"lag": 0.5, "noise": 0.1}),
        (9, {"start_weight": 0.25}),
    ]
    assert list(history.past(0)) == [(5, {}), (9, {})]
    assert {"lag", "noise"} < set(FIGURES)


def test_each_cause_has_a_letter_of_its_own():
    words = {
        word for name, word in vars(causes).items() if name.isupper()
    } - {causes.HEALTHY}  # fmt: skip
    assert MARKS.keys() == words
    assert len(set(MARKS.values())) == len(words)


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


def test_advice_is_given_once_for_a_cause_and_is_that_of_the_worst():
    panel = report_panel(report_of([0.1, 0.5, 0.9]), {})
    assert panel.count("Advice") == 1
    assert "What to do:\n\n- **drifting**: Advice 2." in panel
    assert "What to do" not in report_panel(report_of([0.1]), {})


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


NAMES = (
    *("a|b", "<b>x</b>", "*a*_b_", "`a`", "[a](b)", "![a](b)", "a\\b", "&amp;", "> a"),
    *("- a", "1. a", "# a", "a\n\n# b", "    a", "~~~", "---", "http://a.b/"),
)  # fmt: skip


def shown_by_tensorboard(text):
    """The HTML that TensorBoard makes of a text."""
    with warnings.catch_warnings():
        # Older versions bring an html5lib that does not like itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard import plugin_util

        return plugin_util.markdown_to_safe_html(text)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name):
    episode = Episode("noisy", 1, 2, 1, 1, (name,), name, 0.5, advice="Do `it`.")
    layers = (LayerReport(name, "noisy", lag=0.5, advice="Do `it`."),
              LayerReport("other", "noisy", lag=0.3, advice="Do `it`."))  # fmt: skip
    report = BatchNormReport(layers, clues=(name,), episodes=(episode,))
    text = shown_by_tensorboard(report_panel(report, {}))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text, re.DOTALL)
    shown = " ".join(name.split())
    assert html.unescape(cells[0]) == shown
    assert f": {shown} by 0.5</li>" in html.unescape(text)
    assert f"<p>{shown}</p>" in html.unescape(text)
    tags = set(re.findall(r"</?(\w+)", text))
    ours = "h3 table thead tbody tr th td p ul li strong code"
    assert tags == set(ours.split())
    assert re.findall("<code>(.*?)</code>", text) == ["it"]
    recalibration = RecalibrationReport(report, None, 1, 1, 1, committed=True)
    assert "<b>" not in shown_by_tensorboard(recalibration_panel(recalibration))


def test_code_in_advice_is_code():
    layer = LayerReport("bn", "noisy", lag=0.5, advice="Do `f(x, y=*z)` or `_a_`.")
    text = shown_by_tensorboard(report_panel(BatchNormReport((layer,)), {}))
    assert "`" not in html.unescape(text)
    code = re.findall("<code>(.*?)</code>", html.unescape(text))
    assert code == ["f(x, y=*z)", "_a_"]


def test_the_panel_tells_what_came_and_went_first():
    when = (130, 140, 7, 7)
    past = Episode("outliers", *when, ("b", "a"), "b", 1.65, 3.2, advice="Look.")
    now = Episode("noisy", 150, 150, 8, 8, ("a",), "a", 0.5, is_over=False)
    report = report_of([0.1], episodes=(past, now))
    panel = html.unescape(report_panel(report, {}))
    assert panel.startswith(
        "### 1 of 1 BatchNormalization layers healthy\n\n"
        "What came and went:\n\n"
        "- **outliers** in epoch 7 (steps 130-140): 2 layers, worst b by 1.6, "
        "loss gap 3.2\n"
        "- **noisy** since epoch 8 (step 150): a by 0.5\n\n"
        "What to do:\n\n- **outliers**: Look."
    )
    many = report_of([0.1], episodes=(past,) * (panels.MAX_EPISODES + 3))
    assert "went:\n\n- 3 earlier ones\n" in report_panel(many, {})


def test_causes_are_links_where_the_documentation_has_an_address(monkeypatch):
    report = report_of([0.5])
    assert "<a " not in report_panel(report, {})
    monkeypatch.setattr(panels, "_documentation", lambda: "https://docs.test/bn")
    text = shown_by_tensorboard(report_panel(report, {}))
    assert '<a href="https://docs.test/bn/causes/#drifting">drifting</a>' in text


def test_the_address_is_that_of_the_installed_package(monkeypatch):
    message = email.message.Message()
    message["Project-URL"] = "Source, https://source.test"
    message["Project-URL"] = "Documentation, https://docs.test/bn/"
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: message)
    assert panels._documentation.__wrapped__() == "https://docs.test/bn"
    del message["Project-URL"]
    assert panels._documentation.__wrapped__() == ""


def test_a_layer_that_the_loss_clears_says_so():
    layer = LayerReport("bn", lag=1.5, cleared="drifting")
    (_, _, row) = table_of(report_panel(BatchNormReport((layer,)), {}))
    assert row[1] == "healthy (loss clears drifting)"


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
