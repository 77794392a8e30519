"""What a person sees who opens TensorBoard: the real one, in a real browser.

Screenshots are kept in `test-results/` of the clone.
"""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
import troubles
from benchmarks.event_files import make_report
from tensorboard_page import HEIGHT, WIDTH, Page, browser, missing, tensorboard

from bn_callbacks import BatchNormMonitor, RecalibrateBatchNorm, demo
from bn_callbacks.pictures.heat_map import CARD
from bn_callbacks.tensorboard import MAX_CHARTS, ReportWriter

SCREENSHOTS = Path(__file__).parents[2] / "test-results" / "screenshots"
LAYERS = [f"digits/bn_{number}" for number in (1, 2, 3)]
LARGE = 200

pytestmark = pytest.mark.slow


def fit_and_recalibrate(log_dir):
    """A fit beside keras.callbacks.TensorBoard in the same directory."""
    x = np.random.default_rng(0).normal(3, 2, (320, 3)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(1),
        ],
        name="net",
    )
    model.compile("sgd", "mse")
    model.fit(
        x,
        x[:, :1],
        epochs=2,
        verbose=0,
        callbacks=[
            keras.callbacks.TensorBoard(log_dir, update_freq=1),
            BatchNormMonitor(log_dir, on_lag="ignore"),
            RecalibrateBatchNorm(x),
        ],
    )


def write_large(log_dir):
    """Reports on a model of many layers, as the monitor writes them."""
    writer, step = ReportWriter(log_dir), 0
    for _ in range(3):
        for part in range(3):
            step += 20
            report, evidence = make_report(LARGE, seed=step)
            writer.write(report, step, evidence, ends_epoch=part == 2)
    writer.conclude(report, step)
    writer.close()


@pytest.fixture(scope="module")
def driver():
    if lacking := missing():
        reason = f"No browser test without {lacking}"
        if os.environ.get("BN_CALLBACKS_CI"):
            pytest.fail(f"{reason}, and this is CI.")
        pytest.skip(f"{reason}. See CONTRIBUTING.md for what to install.")
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def small(driver, tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    demo.run(directory / "demo")
    fit_and_recalibrate(directory / "other")
    with tensorboard(directory) as address:
        yield Page(driver, address)


@pytest.fixture(scope="module")
def large(driver, tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    write_large(directory)
    with tensorboard(directory) as address:
        yield Page(driver, address)


@pytest.fixture(scope="module")
def past(driver, tmp_path_factory):
    """Troubles that came and went in 65 layers."""
    directory = tmp_path_factory.mktemp("past")
    troubles.train(directory, on_lag="ignore")
    with tensorboard(directory) as address:
        yield Page(driver, address)


def group_titles(page):
    return page.wait("return deep('metrics-card-groups .group-title').map(text)")


def open_card(page, tag):
    """The only card of a tag; TensorBoard draws no cards out of sight."""
    page.open("timeseries", tags=f"^{tag}$")
    return page.wait(
        "const cards = deep('metrics-main-view card-view').filter((card) =>"
        " deep('tb-truncated-path', card).some((one) => text(one) === arguments[0]));"
        "return cards[0] && drawn(cards[0]) > 0 && cards[0]",
        tag,
    )


def test_time_series_reads_from_the_summary_down(small):
    small.open("timeseries")
    titles = group_titles(small)
    # Before the charts of layers, and before those of Keras.
    assert titles[0] == "BN"
    assert {"batch_loss", "bn", "epoch_loss"} <= set(titles)
    small.wait(
        "const tags = deep('metrics-card-groups tb-truncated-path').map(text);"
        "return tags[0] === 'BN/lag_map'"
    )
    small.screenshot(SCREENSHOTS / "time_series.png")


@pytest.mark.parametrize(
    "tag", ["bn/summary/max_lag", *(f"bn/lag/{path}" for path in LAYERS)]
)
def test_time_series_draws_the_named_charts(small, tag):
    assert open_card(small, tag)
    small.screenshot(SCREENSHOTS / f"{tag.replace('/', '_')}.png")


def test_time_series_overlays_moving_and_batch_statistics(small):
    card = open_card(small, f"bn/mu/{LAYERS[0]}")
    for side in ("batch", "moving"):
        run = f"demo/as_trained/batch_norm/{side}"
        small.wait("return text(arguments[0]).includes(arguments[1])", card, run)
    small.screenshot(SCREENSHOTS / "time_series_overlay.png")


MATCHES = """
const charts = deep("tf-custom-scalar-multi-line-chart-card");
return charts.map((chart) => [
  text(deep(".heading-label.name", chart.shadowRoot)[0]),
  deep(".match-list-entry", chart.shadowRoot).map(text),
  drawn(chart.shadowRoot),
]);
"""


def test_custom_scalars_draw_each_layers_chart_with_two_curves(small):
    small.open("custom_scalars")
    small.wait(
        "return deep('.category-name').map(text).includes(arguments[0])",
        "Mean: moving against batches",
    )
    path = LAYERS[0]
    expected = {
        f"bn/mu/{path} (demo/as_trained/batch_norm/{side})"
        for side in ("batch", "moving")
    }

    def charts():
        return small.ask(MATCHES)

    small.wait(f"const all = (() => {{{MATCHES}}})();"
               "return all.some(([name, matches, drawn]) => name === arguments[0]"
               " && drawn && arguments[1].every((one) =>"
               " matches.some((match) => match.endsWith(one))))",
               path, sorted(expected))  # fmt: skip
    names = [name for name, _, _ in charts()]
    assert names[:3] == ["Largest lag", "Layers not healthy", "Lag of each layer"]
    small.screenshot(SCREENSHOTS / "custom_scalars.png")


def test_images_show_the_heat_map(small):
    small.open("images")
    width, height = small.wait(
        "const images = deep('tf-image-loader').flatMap((loader) =>"
        " deep('img', inside(loader))).filter((image) => image.naturalWidth > 0);"
        "return images.length && [images[0].naturalWidth, images[0].naturalHeight]"
    )
    assert width > 300
    assert height > 150
    assert "BN/lag_map" in small.ask("return deep('.heading-label.name').map(text)")
    small.screenshot(SCREENSHOTS / "images.png")


def tables(page):
    return page.wait(
        "return deep('#markdown table').map((table) =>"
        " deep('tr', table).map((row) => deep('th, td', row).map(text)))"
    )


def test_texts_show_the_report_and_the_recalibration(small):
    small.open("text")
    small.wait("return deep('#markdown h3').length > 1")
    by_head = {tuple(table[0]): table[1:] for table in reversed(tables(small))}
    head = ("layer", "cause", "lag", "noise", "start weight", "since step")
    shown = [row for table in tables(small) if tuple(table[0]) == head for row in table]
    rows = {row[0]: row for row in shown}
    assert {*LAYERS, "net/bn"} <= rows.keys()
    assert rows[LAYERS[0]][1] == "warming_up"
    lines = small.ask("return deep('#markdown li').map(text)")
    assert any(line.startswith("warming_up since epoch 1") for line in lines)
    assert any("of the start values is still in" in line for line in lines)
    code = small.ask("return deep('#markdown code').map(text)")
    assert {"DebiasBatchNorm", "recalibrate(model, x)"} <= set(code)
    assert not any("`" in line for line in lines)
    ((path, before, after),) = by_head["", "before", "after"]
    assert path == "net/bn"
    assert float(before) > 0.2 > float(after)
    small.screenshot(SCREENSHOTS / "text.png")


def test_histograms_show_the_channels(small):
    small.open("histograms")
    names = small.wait(
        "const loaders = deep('tf-histogram-loader').filter((one) =>"
        " drawn(one.shadowRoot));"
        "return loaders.length >= 3 &&"
        " loaders.map((one) => text(deep('.heading-label.name', one.shadowRoot)[0]))"
    )
    assert f"bn/per_channel_lag/{LAYERS[0]}" in names
    small.screenshot(SCREENSHOTS / "histograms.png")


def test_a_model_of_200_layers_has_so_many_cards_and_no_more(large):
    large.open("timeseries")
    assert group_titles(large) == ["BN", "bn"]
    (count,) = large.ask(
        "return deep('.card-group').filter((group) =>"
        " text(deep('.group-title', group)[0]) === 'bn')"
        ".map((group) => parseInt(text(deep('.group-card-count', group)[0])))"
    )
    # Five figures, mean, deviation and histogram of each layer; three of the model, and
    # the picture of all layers.
    assert MAX_CHARTS / 2 * 6 <= count <= MAX_CHARTS * 8 + 4
    large.screenshot(SCREENSHOTS / "large_time_series.png")
    for tab in ("custom_scalars", "images", "text"):
        large.open(tab)
        large.wait("return deep('.heading-label.name').length > 0")
        large.screenshot(SCREENSHOTS / f"large_{tab}.png")
    assert len(tables(large)[0]) == 31


@pytest.mark.parametrize(
    "size", [(1280, 800), (1500, 1250), (1920, 1080), (2560, 1300)]
)
def test_the_heat_map_is_shown_as_it_is_in_windows_of_all_sizes(small, size):
    small.driver.set_window_size(*size)
    try:
        small.open("timeseries")
        found = small.wait(
            "const images = deep('image-card img').filter((one) => one.naturalWidth);"
            "return images.length && images.map((one) => [one.naturalWidth,"
            " one.naturalHeight, one.clientWidth, one.clientHeight])"
        )
    finally:
        small.driver.set_window_size(WIDTH, HEIGHT)
    # A large window shows other pictures as well.
    *_, room, high = next(each for each in found if tuple(each[:2]) == CARD)
    width, height = CARD
    # TensorBoard fits a picture into this room: neither larger nor smaller.
    assert high == height
    assert room >= width - 1


def test_what_came_and_went_is_seen_when_all_is_well_again(past):
    past.open("timeseries")
    past.wait("return deep('image-card img').some((one) => one.naturalWidth)")
    past.screenshot(SCREENSHOTS / "past_time_series.png")
    past.open("text")
    lines = past.wait("return deep('#markdown li').map(text)")
    # The newest report is the first.
    heading = past.ask("return deep('#markdown h3').map(text)")[0]
    assert heading == "65 of 65 BatchNormalization layers healthy"
    outliers = next(line for line in lines if line.startswith("outliers in"))
    assert "epochs 7-8" in outliers
    assert "65 layers, worst stem_bn" in outliers
    assert any(line.startswith("outliers: Rare extreme") for line in lines)
    past.screenshot(SCREENSHOTS / "past_text.png")
    past.open("images")
    past.wait("return deep('tf-image-loader').length > 1")
    past.screenshot(SCREENSHOTS / "past_images.png")
