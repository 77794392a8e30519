"""Pictures: what they show, and that nothing in them overlaps."""

import io
import itertools
import math
import sys

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image, ImageDraw

from bn_callbacks import BatchNormReport, LayerReport, RecalibrationReport
from bn_callbacks.pictures import HeatMap, bars, heat_map
from bn_callbacks.pictures.heat_map import CARD, CARD_ROWS, COLOURS, LEVELS, OTHERS
from bn_callbacks.pictures.names import shorten

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
            "healthy" if i % 7 else "drifting",
            lag=0.05 if i % 7 else 0.9,
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
    report = BatchNormReport((LayerReport(name, "drifting", lag=0.9),))
    figure = report.plot().figure
    figure.canvas.draw()
    assert name in [text.get_text() for text in visible_texts(figure)]


def test_an_overlap_is_found():
    figure, axes = pyplot.subplots(figsize=(2, 2))
    axes.set_yticks(np.linspace(0, 1, 80), [f"layer {i}" for i in range(80)])
    assert overlaps(figure)


def test_small_axes_of_the_users_own_get_fewer_rows():
    _, (axes, other) = pyplot.subplots(1, 2, figsize=(12, 3))
    assert report_of(60).plot(axes) is axes
    rows = len(axes.get_yticklabels())
    assert 5 < rows < 30
    assert f"the first {rows}" in axes.get_title(loc="left")
    assert not other.get_title()


def test_of_many_layers_the_worst_are_drawn():
    axes = report_of(200).plot()
    assert len(axes.get_yticklabels()) == bars.MAX_ROWS
    drawn = sorted(axes.patches, key=lambda bar: bar.get_y())
    sick = len(report_of(200).lagging)
    assert {bar.get_width() for bar in drawn[:sick]} == {0.9}
    assert {bar.get_width() for bar in drawn[sick:]} == {0.05}
    assert f"{sick} of 200" in axes.get_title(loc="left")


def test_names_lose_the_words_that_all_share():
    assert shorten(["net/a_1/bn", "net/b_2/bn"], 20) == ["a_1", "b_2"]
    assert shorten(["net/stem_bn", "net/a_1/bn"], 20) == ["stem", "a_1"]
    assert shorten(["bn", "bn_1", "bn_2"], 20) == ["bn", "bn_1", "bn_2"]
    assert shorten(["same/bn", "same/bn"], 20) == ["same/bn", "same/bn"]
    assert shorten(["bn/bn", "bn/bn/bn"], 20) == ["bn", "bn/bn"]
    assert shorten([""], 20) == [""]
    assert shorten([], 20) == []


def test_long_names_keep_their_end():
    (short,) = shorten(["a" * 30 + "b" * 30 + "_17"], 40)
    assert len(short) == 40
    assert short.startswith("a")
    assert short.endswith("b_17")


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
    drawn = {round(bar.get_y() + 0.4): bar for bar in axes.patches}
    assert [drawn[row].get_width() for row in range(3)] == [0.5, 0.3, 0.1]
    colours = [drawn[row].get_facecolor() for row in range(3)]
    assert colours[0] == colours[1] != colours[2]
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {"drifting", "healthy", "noise floor"}
    (marks,) = axes.collections
    assert [path.vertices[0].tolist() for path in marks.get_paths()] == [
        [0.1, -0.4],
        [0.2, 0.6],
    ]
    assert axes.get_title(loc="left") == "2 of 3 BatchNormalization layers not healthy"
    assert axes.yaxis_inverted(), "the worst layer is at the top"


def test_lags_without_a_number_are_shown_as_such():
    lags = (0.1, None, INF, NAN)
    layers = tuple(LayerReport(f"{i}", "noisy", lag=lag) for i, lag in enumerate(lags))
    axes = BatchNormReport(layers).plot()
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {"noisy"}
    texts = {text.get_position()[1]: text.get_text().strip() for text in axes.texts}
    # Worst first: what is no number is the worst, what is unknown the last.
    assert texts == {0: "not finite", 1: "not finite", 3: "lag unknown"}
    assert {bar.get_width() for bar in axes.patches} == {0.1, 0.0}


def test_a_huge_lag_leaves_something_to_see_of_the_others():
    layers = tuple(LayerReport(f"{lag}", lag=lag) for lag in (0.2, 500.0))
    axes = BatchNormReport(layers).plot()
    widths = [bar.get_window_extent().width for bar in axes.patches]
    assert widths[0] > widths[1] / 40


def test_a_recalibration_shows_before_and_after():
    before = BatchNormReport((LayerReport("a", lag=0.5), LayerReport("b", lag=0.2)))
    axes = recalibration_of(before, (0.1, 0.05)).plot()
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {"before", "after"}
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


def test_what_matplotlib_itself_lacks_is_told(monkeypatch):
    for name in ("pyplot", "rcsetup"):
        monkeypatch.delitem(sys.modules, f"matplotlib.{name}")
    monkeypatch.delattr("matplotlib.pyplot")
    monkeypatch.setitem(sys.modules, "cycler", None)
    with pytest.raises(ModuleNotFoundError, match="cycler"):
        report_of(1).plot()


# --- The heat map


def heat_map_of(lags, edges=None, marks=None, paths=None, **arguments):
    lags = np.array(lags, float)
    edges = list(range(lags.shape[1] + 1)) if edges is None else edges
    marks = np.full(lags.shape, "", "<U1") if marks is None else np.array(marks)
    paths = [f"{row}" for row in range(len(lags))] if paths is None else paths
    arguments = {"threshold": 0.2, "title": "", "legend": {}} | arguments
    return HeatMap(paths, edges, lags, marks, **arguments)


def pixels_of(drawn):
    png, size = drawn
    image = Image.open(io.BytesIO(png))
    assert image.size == size
    return np.array(image.convert("RGB")).astype(int)


def boxes_of(shown, monkeypatch, whole=False):
    """The texts of a heat map and the pixels they cover, and its size."""
    found = []
    write = ImageDraw.ImageDraw.text

    def record(pen, place, text, fill=None, font=None, anchor=None):
        found.append((text, pen.textbbox(place, text, font, anchor)))
        return write(pen, place, text, fill, font, anchor)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", record)
        _, size = shown.whole() if whole else shown.card()
    return found, size


def busy(count, columns=60):
    """Layers with long names, of which causes come and go."""
    rng = np.random.default_rng(0)
    lags = rng.uniform(0.0, 0.1, (count, columns))
    marks = np.full(lags.shape, "", "<U1")
    for mark, begin, end in (("W", 0, 2), ("C", 20, 40), ("O", 45, 46), ("D", 47, 55)):
        lags[::2, begin:end] += rng.uniform(0.2, 3)
        marks[::2, begin:end] = mark
    legend = {
        "W": "warming_up, epoch 1",
        "C": "correlated_batches, epoch 4-5",
        "O": "outliers, epoch 7",
        "D": "drifting, epoch 8-9",
        "X": "not here",
    }
    return heat_map_of(
        lags,
        list(range(0, 50 * columns + 1, 50)),
        marks,
        [layer.path for layer in report_of(count).layers],
        title=f"Step {50 * columns:,}: 12 of {count} not healthy, loss gap 1.2e+02",
        legend=legend,
    )


@pytest.mark.parametrize("count", [1, 5, 15, 200])
@pytest.mark.parametrize("whole", [False, True])
def test_in_a_heat_map_no_text_touches_another(count, whole, monkeypatch):
    boxes, (width, height) = boxes_of(busy(count), monkeypatch, whole)
    rows = count if whole else min(count, CARD_ROWS)
    assert len(boxes) > rows + 12
    assert any(text.startswith("C  correlated_batches") for text, _ in boxes)
    assert not any("not  here" in text for text, _ in boxes)
    for text, (left, top, right, bottom) in boxes:
        assert 0 <= left <= right <= width, text
        assert 0 <= top <= bottom <= height, text
    lefts, tops, rights, bottoms = np.array([box for _, box in boxes]).T
    is_beside = rights[:, None] <= lefts
    # Letters below the line may reach into those that rise above it.
    is_above = bottoms[:, None] <= tops + 2
    is_apart = is_beside | is_beside.T | is_above | is_above.T
    for one, other in np.argwhere(~is_apart & ~np.eye(len(boxes), dtype=bool)):
        pytest.fail(f"{boxes[one]} touches {boxes[other]}")


def test_the_card_is_shown_as_it_is_in_the_smallest_card_of_tensorboard():
    assert pixels_of(busy(65).card()).shape[1::-1] == CARD == (303, 215)


def test_the_card_shows_what_is_sick_now_first_and_then_the_worst_of_all_time(
    monkeypatch,
):
    lags = np.full((30, 100), 0.05)
    lags[7, 10:70] = 0.9  # For long.
    lags[8, 10] = 5.0  # For a moment.
    lags[9, -1] = 0.25
    marks = np.full(lags.shape, "", "<U1")
    marks[9, -1] = "N"
    boxes, _ = boxes_of(heat_map_of(lags, marks=marks), monkeypatch)
    rows = [(box[1], text) for text, box in boxes if text.isdigit() and box[2] < 30]
    assert [text for _, text in sorted(rows)[:3]] == ["9", "7", "8"]


def test_the_picture_of_all_layers_labels_every_row_in_model_order(monkeypatch):
    shown = heat_map_of(np.full((200, 3), 0.1), paths=[f"a{i}" for i in range(200)])
    boxes, _ = boxes_of(shown, monkeypatch, whole=True)
    heights = {text: (box[1] + box[3]) / 2 for text, box in boxes}
    rows = np.array([heights[f"a{index}"] for index in range(200)])
    assert (np.abs(np.diff(rows) - heat_map.LINE) < 2).all()


def test_causes_are_marked_at_the_time_they_held(monkeypatch):
    lags = np.full((2, 100), 0.3)
    marks = np.full(lags.shape, "", "<U1")
    marks[0, 40:50] = "C"
    marks[1, :] = "D"
    boxes, _ = boxes_of(heat_map_of(lags, marks=marks), monkeypatch)
    ((left, _, right, _),) = [box for text, box in boxes if text == "C"]
    begin, across = 15, CARD[0] - 17
    assert begin + 0.38 * across < left < right < begin + 0.52 * across
    assert len([text for text, _ in boxes if text == "D"]) > 2


def rows_of(lags, edges=None):
    """The colours of the map alone, of a picture of all layers."""
    pixels = pixels_of(heat_map_of(lags, edges).whole())
    top = 2 * heat_map.LINE + 3
    left = next(x for x in range(640) if (pixels[top : top + 10, x] == 0).all()) + 1
    return pixels[top : top + heat_map.LINE * len(lags), left:-2]


def name_of(pixel):
    return "#" + bytes(pixel.tolist()).hex()


def test_a_lag_has_a_colour_that_says_how_many_thresholds_it_is():
    ends = [0.0, *(0.2 * level for level in LEVELS)]
    row = rows_of([[end + 0.001 for end in ends]])[3]
    cells = np.array_split(row, len(ends))
    assert [name_of(cell[len(cell) // 2]) for cell in cells] == list(COLOURS)


def test_colours_grow_darker():
    shades = [sum(bytes.fromhex(colour[1:])) for colour in COLOURS]
    assert shades == sorted(shades, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(shades)) > 50


def test_what_is_no_number_has_a_colour_of_its_own():
    cells = np.array_split(rows_of([[NAN, INF]])[3], 2)
    assert [name_of(cell[20]) for cell in cells] == list(OTHERS.values())


def test_rows_and_columns_are_where_they_belong():
    lags = [[0.0, 0.15, 0.3], [0.6, 1.5, 9.0]]
    picture = rows_of(lags, [0, 10, 20, 100])
    height, width, _ = picture.shape
    places = [(row, *at) for row in (0, 1) for at in ((0, 0.1), (0.1, 0.2), (0.2, 1))]
    for (row, begin, end), colour in zip(places, COLOURS, strict=True):
        cell = picture[
            row * height // 2 + 1 : (row + 1) * height // 2 - 1,
            round(begin * width) + 2 : round(end * width) - 2,
        ]
        assert {name_of(pixel) for pixel in cell.reshape(-1, 3)} == {colour}


def test_a_pixel_of_many_columns_shows_the_largest_lag():
    lags = np.full((3, 3000), 0.02)
    lags[1, 1234] = 9.0
    lags[1, 17] = NAN
    picture = rows_of(lags)
    (dark,) = (picture.sum(axis=2) < 300).any(axis=0).nonzero()
    assert len(dark) == 1
    assert abs(dark[0] / picture.shape[1] - 1234 / 3000) < 0.003


@pytest.mark.parametrize("name", ["слой/層", "$x_{$" * 30, "two\nlines", " ", ""])
def test_odd_names_are_shown_in_a_line(name, monkeypatch):
    shown = heat_map_of([[0.9]], marks=[["D"]], paths=[name], threshold=50.0)
    boxes, (width, _) = boxes_of(shown, monkeypatch)
    assert shown.whole()
    assert not any("\n" in text for text, _ in boxes)
    assert max(box[2] for _, box in boxes) <= width


@pytest.mark.parametrize("error", [ImportError("no FreeType"), TypeError("size")])
def test_old_pillows_are_none(monkeypatch, error):
    def fail(*_):
        raise error

    assert heat_map.is_available()
    monkeypatch.setattr("PIL.ImageFont.load_default", fail)
    assert not heat_map.is_available()
