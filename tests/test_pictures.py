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
from bn_callbacks.pictures import canvas, draw_heat_map, heat_map
from bn_callbacks.pictures.canvas import MAX_LABEL, chosen_rows, shorten
from bn_callbacks.pictures.heat_map import HIGHEST, LOWEST, OTHERS, lay_out

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


def layout_of(report, last=1000, threshold=0.2):
    """Of the report's heat map."""
    causes = {report.layers.index(layer): layer.cause for layer in report.lagging}
    title = f"{report.headline} at step {last:,}"
    paths = [layer.path for layer in report.layers]
    return lay_out(paths, [0, last], causes, threshold, title)


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
    ],
    ids=["lags", "recalibration"],
)
def test_no_text_overlaps_another(draw, count):
    figure = draw(report_of(count))
    assert overlaps(figure) == []
    assert len(visible_texts(figure)) >= min(count, 20) + 3


def test_names_are_no_formulas():
    name = r"$\alpha_{$/bn"
    report = BatchNormReport((LayerReport(name, "drifting", 0.9),))
    figure = report.plot().figure
    figure.canvas.draw()
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


def boxes_of(layout):
    """The texts of a heat map and the pixels they cover."""
    for x, y, anchor, text, size in layout.labels:
        left, top, right, bottom = heat_map._font(size).getbbox(text, anchor=anchor)
        yield text, (x + left, y + top, x + right, y + bottom)


@pytest.mark.parametrize("count", [1, 5, 40, 200])
@pytest.mark.parametrize("last", [1, 30, 1_234_567])
def test_in_a_heat_map_no_text_touches_another(count, last):
    layout = layout_of(report_of(count), last)
    boxes = [*boxes_of(layout), ("map", layout.map), ("scale", layout.scale)]
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        is_beside = box[2] <= other_box[0] or other_box[2] <= box[0]
        is_above = box[3] <= other_box[1] or other_box[3] <= box[1]
        assert is_beside or is_above, (one, other)
    for text, (left, top, right, bottom) in boxes:
        width, height = layout.size
        assert 0 <= left < right <= width, text
        assert 0 <= top < bottom <= height, text
    assert len(layout.labels) >= min(count, 20) + 13


def test_in_a_heat_map_causes_stand_beside_their_layers():
    layout = layout_of(report_of(15))
    notes = {label.y for label in layout.labels if label.text == "drifting"}
    ends = ("batch_norm_0", "batch_norm_7", "batch_norm_14")
    assert notes == {label.y for label in layout.labels if label.text.endswith(ends)}
    assert len(notes) == 3


@pytest.mark.parametrize("first", [0, 7, 1000])
@pytest.mark.parametrize("length", [1, 2, 3, 99, 1_234_567])
def test_steps_below_a_heat_map_are_few_and_round(first, length):
    steps = list(heat_map._round_steps(first, first + length))
    assert 1 <= len(steps) <= 7
    assert first <= steps[0] <= steps[-1] <= first + length
    for step, other in itertools.pairwise(steps):
        assert str(other - step).strip("0") in ("1", "2", "5")


def picture_of(lags, edges=None):
    """The colours of a heat map, and where the map is in it."""
    lags = np.array(lags, float)
    paths = [f"{row}" for row in range(len(lags))]
    edges = list(range(lags.shape[1] + 1)) if edges is None else edges
    png, size = draw_heat_map(paths, edges, lags, {}, 0.2, "")
    image = Image.open(io.BytesIO(png))
    assert image.size == size
    box = lay_out(paths, edges, {}, 0.2, "").map
    return np.array(image.convert("RGB"))[box.top : box.bottom, box.left : box.right]


def colours_of(lags):
    """The colour of each cell of a picture, in which all of a cell has one."""
    rows = np.array_split(picture_of(lags), len(lags))
    cells = [cell for row in rows for cell in np.array_split(row, len(lags[0]), axis=1)]
    for cell in cells:
        assert (cell[1:-1, 1:-1] == cell[1, 1]).all()
    return [tuple(cell[1, 1].tolist()) for cell in cells]


def test_the_larger_the_lag_the_darker_the_cell():
    lags = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    shades = [sum(colour) for colour in colours_of([lags])]
    assert shades == sorted(shades, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(shades)) > 20


def test_the_scale_is_magma():
    magma = pyplot.get_cmap("magma_r")
    lags = np.geomspace(LOWEST, HIGHEST, 10)
    for place, colour in zip(np.linspace(0, 1, 10), colours_of([lags]), strict=True):
        assert np.abs(np.array(magma(place)[:3]) * 255 - colour).max() < 12


def test_a_lag_has_the_same_colour_in_every_picture():
    assert colours_of([[0.2, 0.02]])[0] == colours_of([[0.2, 50.0]])[0]
    assert colours_of([[LOWEST]])[0] == colours_of([[0.0]])[0]
    assert colours_of([[HIGHEST]])[0] == colours_of([[1e6]])[0]


def test_what_is_no_number_has_a_colour_of_its_own():
    *kinds, _ = colours_of([[NAN, INF, 0.1]])
    assert [bytes(colour).hex() for colour in kinds] == list(OTHERS.values())


def test_rows_and_columns_are_where_they_belong():
    lags = [[0.02, 0.1, 0.5], [0.1, 0.5, 2.0]]
    picture = picture_of(lags, [0, 10, 20, 100])
    of = dict(zip(np.ravel(lags), colours_of(lags), strict=True))
    height, width, _ = picture.shape
    for row, line in enumerate(lags):
        for lag, begin, end in zip(line, (0, 0.1, 0.2), (0.1, 0.2, 1.0), strict=True):
            cell = picture[
                row * height // 2 : (row + 1) * height // 2,
                round(begin * width) : round(end * width),
            ]
            assert (cell == of[lag]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_pixel_of_many_cells_shows_the_largest_lag(axis):
    lags = np.full((3, 3000), 0.02)
    lags[1, 1234] = 2.0
    lags[1, 17] = NAN
    edges = list(range(3001))
    if axis == 0:
        lags, edges = lags.T, [0, 1, 2, 3]
    dark = picture_of(lags, edges).sum(axis=2) < 100
    assert 0 < dark.sum() < dark.size / 200
    lines = dark.any(axis=1 - axis).nonzero()[0]
    assert len(lines) == 1
    assert abs(lines[0] / dark.shape[axis] - 1234 / 3000) < 0.003


@pytest.mark.parametrize("name", ["слой/層", "$x_{$" * 30, "two\nlines", " ", ""])
def test_odd_names_are_no_error(name):
    draw_heat_map([name], [0, 1], np.ones((1, 1)), {0: "drifting"}, 50.0, "")


@pytest.mark.parametrize(
    ("version", "has_letters", "is_enough"),
    [
        ("10.1.0", True, True),
        ("13.0", True, True),
        ("10.0.1", True, False),
        ("11.0.0", False, False),
    ],
)
def test_old_pillows_are_none(monkeypatch, version, has_letters, is_enough):
    monkeypatch.setattr("PIL.__version__", version)
    monkeypatch.setattr("PIL.features.check", lambda name: has_letters)
    assert heat_map.is_available() is is_enough
