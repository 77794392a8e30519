"""Pictures: what they show, and that nothing in them overlaps."""

import io
import itertools
import math
import sys

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from bn_callbacks import BatchNormReport, LayerReport, RecalibrationReport
from bn_callbacks.pictures import canvas, draw_heat_map, to_png
from bn_callbacks.pictures.canvas import MAX_LABEL, chosen_rows, shorten
from bn_callbacks.pictures.heat_map import HIGHEST, LOWEST, NOT_FINITE, UNKNOWN

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def report_of(count):
    """Of layers with long names, every seventh of which is not healthy."""
    layers = [
        LayerReport(
            f"efficientnet_of_our_own/block_{i}/a_rather_long_name/batch_norm_{i}",
            *(("drifting", 0.9) if i % 7 == 0 else ("healthy", 0.05)),
            noise=0.02,
        )
        for i in range(count)
    ]
    return BatchNormReport(tuple(layers))


def x_labels(axes):
    low, high = axes.get_xlim()
    labels = axes.get_xticklabels() if axes.xaxis.get_visible() else ()
    # matplotlib has a tick more than it shows.
    return [label for label in labels if low <= label.get_position()[0] <= high]


def visible_texts(figure):
    figure.draw_without_rendering()
    texts = [
        text
        for axes in figure.axes
        for text in (
            *(axes.get_yticklabels() if axes.yaxis.get_visible() else ()),
            *x_labels(axes),
            axes.xaxis.label,
            axes.title,
            axes._left_title,
            *axes.texts,
            *(axes.get_legend().get_texts() if axes.get_legend() else ()),
        )
    ]
    return [text for text in texts if text.get_text() and text.get_visible()]


def overlaps(figure):
    """Pairs of texts that touch, and texts that do not fit the picture."""
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in visible_texts(figure)
    ]
    pairs = [
        (one, other)
        for (one, box), (other, other_box) in itertools.combinations(boxes, 2)
        if box.overlaps(other_box)
    ]
    width, height = figure.canvas.get_width_height()
    outside = [
        name
        for name, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    return pairs + outside


def heat_map_of(report, columns=20):
    lags = np.array([[layer.lag] * columns for layer in report.layers], float)
    causes = {report.layers.index(layer): layer.cause for layer in report.lagging}
    return draw_heat_map(
        [layer.path for layer in report.layers],
        range(0, 50 * columns + 1, 50),
        lags,
        causes,
        0.2,
        f"{report.headline} at step {50 * columns:,}",
    )


def recalibration_of(before, after):
    return RecalibrationReport(
        before, max(after, default=None), 64, 2, 2, committed=True, residuals=after
    )


# --- Nothing overlaps


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5, 40, 200])
@pytest.mark.parametrize(
    "draw",
    [
        lambda report: report.plot().figure,
        lambda report: (
            recalibration_of(report, (0.01,) * len(report.layers)).plot().figure
        ),
        heat_map_of,
    ],
    ids=["lags", "recalibration", "heat map"],
)
def test_no_text_overlaps_another(draw, count):
    figure = draw(report_of(count))
    assert overlaps(figure) == []
    assert len(visible_texts(figure)) >= min(count, 20) + 3


@pytest.mark.parametrize("draw", [lambda report: report.plot().figure, heat_map_of])
def test_names_are_no_formulas(draw):
    name = r"$\alpha_{$/bn"
    figure = draw(BatchNormReport((LayerReport(name, "drifting", 0.9),)))
    to_png(figure)
    assert name in [text.get_text() for text in visible_texts(figure)]


def test_an_overlap_is_found():
    figure, axes = pyplot.subplots(figsize=(2, 2))
    axes.set_yticks(np.linspace(0, 1, 80), [f"layer {i}" for i in range(80)])
    assert overlaps(figure)


def test_small_axes_of_the_users_own_get_fewer_names():
    _, (axes, other) = pyplot.subplots(1, 2, figsize=(12, 3))
    assert report_of(60).plot(axes) is axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert 5 < len(names) < 30
    assert not other.get_title()


@pytest.mark.parametrize("count", [0, 1, 7, 200])
@pytest.mark.parametrize("gap", [1, 3, 50])
def test_rows_are_chosen_apart_and_the_important_ones_first(count, gap):
    first = [row for row in (4, 5, 150) if row < count]
    rows = chosen_rows(count, gap, first)
    assert rows == sorted(set(rows) & set(range(count)))
    assert all(b - a >= gap for a, b in itertools.pairwise(rows))
    assert rows[:1] if count else not rows
    assert 4 in rows or count <= 4
    # No room is left for another.
    assert all(min(abs(row - other) for other in rows) < gap for row in range(count))


def test_names_lose_what_all_share_and_never_their_end():
    long = "a" * 30 + "/" + "b" * 30 + "_17"
    assert shorten([f"net/{long}", "net/x"]) == [shorten([long])[0], "x"]
    (short,) = shorten([long])
    assert len(short) == MAX_LABEL
    assert short.startswith("a")
    assert short.endswith("b_17")
    assert shorten([]) == []
    assert shorten(["same/bn", "same/bn"]) == ["bn", "bn"]


# --- What they show


def test_a_bar_is_as_long_as_the_lag_and_has_the_colour_of_its_cause():
    report = BatchNormReport(
        (
            LayerReport("a", "drifting", lag=0.5, noise=0.1),
            LayerReport("b", "healthy", lag=0.1),
            LayerReport("c", "drifting", lag=0.3, noise=0.2),
        )
    )
    axes = report.plot()
    bars = {round(bar.get_y() + 0.4): bar for bar in axes.patches}
    assert [bars[row].get_width() for row in range(3)] == [0.5, 0.1, 0.3]
    assert bars[0].get_facecolor() == bars[2].get_facecolor() != bars[1].get_facecolor()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["drifting", "healthy", "noise floor"]
    (marks,) = axes.collections
    assert [path.vertices[0].tolist() for path in marks.get_paths()] == [
        [0.1, -0.4],
        [0.2, 1.6],
    ]
    assert axes.get_title(loc="left") == "2 of 3 BatchNormalization layers not healthy"
    assert axes.yaxis_inverted(), "the first layer is at the top"


def test_lags_without_a_number_are_shown_as_such():
    lags = (0.1, None, INF, NAN)
    layers = tuple(LayerReport(f"{i}", "noisy", lag=lag) for i, lag in enumerate(lags))
    axes = BatchNormReport(layers).plot()
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {"noisy", "not finite", "lag unknown"}
    (crosses,) = axes.lines
    assert crosses.get_ydata().tolist() == [1]
    edge = axes.get_xlim()[1]
    assert {bar.get_width() for bar in axes.patches} == {0.1, edge}


def test_a_huge_lag_leaves_something_to_see_of_the_others():
    layers = tuple(LayerReport(f"{lag}", lag=lag) for lag in (0.2, 500.0))
    axes = BatchNormReport(layers).plot()
    widths = [bar.get_window_extent().width for bar in axes.patches]
    assert widths[0] > widths[1] / 40


def test_a_recalibration_shows_before_and_after():
    before = BatchNormReport((LayerReport("a", lag=0.5), LayerReport("b", lag=0.2)))
    axes = recalibration_of(before, (0.1, 0.05)).plot()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["before", "after"]
    assert sorted(bar.get_width() for bar in axes.patches) == [0.2, 0.5]
    (marks,) = axes.collections
    assert [path.vertices[0][0] for path in marks.get_paths()] == [0.1, 0.05]
    # With refine=0 nothing is known of after.
    legend = recalibration_of(before, ()).plot().get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["before"]


@pytest.mark.parametrize(
    "make", [BatchNormReport, lambda: recalibration_of(BatchNormReport(), ())]
)
def test_nothing_to_show_is_no_error(make):
    make().plot().figure.canvas.draw()


def test_plots_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for report in (report_of(1), recalibration_of(report_of(1), ())):
        with pytest.raises(
            ModuleNotFoundError, match=r'pip install "bn-callbacks\[plot\]"'
        ):
            report.plot()


def test_what_matplotlib_itself_lacks_is_not_taken_for_its_absence(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")
    monkeypatch.setitem(sys.modules, "cycler", None)
    monkeypatch.delitem(sys.modules, "matplotlib.rcsetup")
    with pytest.raises(ModuleNotFoundError, match="cycler"):
        canvas.matplotlib("rcsetup")


# --- The heat map


def colours_of(lags, tmp=None):
    """The colour of each cell of a picture."""
    lags = np.array(lags, float)
    figure = draw_heat_map(
        [f"{row}" for row in range(len(lags))],
        range(lags.shape[1] + 1),
        lags,
        {},
        0.2,
        "",
    )
    png, size = to_png(figure)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.size == size
    axes = figure.axes[0]
    colours = []
    for row in range(len(lags)):
        for column in range(lags.shape[1]):
            x, y = axes.transData.transform((column + 0.5, row))
            colours.append(image.getpixel((int(x), int(size[1] - y))))
    return colours


def brightness(colour):
    return sum(colour)


def test_the_larger_the_lag_the_darker_the_cell():
    lags = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    shades = [brightness(colour) for colour in colours_of([lags])]
    assert shades == sorted(shades, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(shades)) > 20


def test_a_lag_has_the_same_colour_in_every_picture():
    assert colours_of([[0.2, 0.02]])[0] == colours_of([[0.2, 50.0]])[0]
    assert colours_of([[LOWEST]])[0] == colours_of([[0.0]])[0]
    assert colours_of([[HIGHEST]])[0] == colours_of([[1e6]])[0]


def test_what_is_no_number_has_a_colour_of_its_own():
    unknown, infinite, _ = colours_of([[NAN, INF, 0.1]])
    for colour, expected in ((unknown, UNKNOWN), (infinite, NOT_FINITE)):
        assert list(colour) == [int(expected[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_heat_map_names_causes_beside_their_layers():
    figure = heat_map_of(report_of(15))
    notes = [label for label in figure.axes[0].texts if label.get_text() == "drifting"]
    assert [label.get_position()[1] for label in notes] == [0, 7, 14]


def test_heat_maps_leave_no_figure_behind():
    to_png(heat_map_of(report_of(3)))
    assert pyplot.get_fignums() == []
