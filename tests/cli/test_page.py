"""Every command of docs/command-line.md, and what messages call its options."""

import re
import shlex
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cli_kit import make_model

from bn_callbacks.cli import options as cli_options
from bn_callbacks.cli.errors import OPTIONS, with_options
from bn_callbacks.cli.options import parse

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text("utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("bn-callbacks ")
]
RECALIBRATE = ("recalibrate", "model.keras", "--data")


def save_images(folder):
    """A model of images, TFRecord files of them, and the specification on the page."""
    (spec,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (folder / "spec.json").write_text(spec, "utf-8")
    with tf.io.TFRecordWriter(str(folder / "train-0.tfrecord")) as writer:
        for label in range(40):
            image = np.random.default_rng(label).integers(0, 256, 784, "uint8")
            features = {
                "image": tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[image.tobytes()])
                ),
                "label": tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[label % 10])
                ),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Conv2D(4, 5)])
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    model.save(folder / "model.keras")


@pytest.mark.slow
def test_every_command_of_the_page_works(run, here, tmp_path_factory, monkeypatch):
    make_model().save("float32.keras")
    for part in ("here.npz", "there.npz"):
        shutil.copy("train.npz", part)
    images = tmp_path_factory.mktemp("images")
    save_images(images)
    assert len(COMMANDS) >= 7
    for line in COMMANDS:
        options = parse(shlex.split(line)[1:])
        is_of_images = getattr(options, "features", None) is not None
        monkeypatch.chdir(images if is_of_images else here)
        ran = run(*shlex.split(line)[1:])
        # An inspection may find something, which the page says.
        assert ran.status in ((0, 1) if options.command == "inspect" else (0,)), ran
        assert "note:" not in ran.err
        if getattr(options, "output", None):
            assert Path(options.output).exists()
    assert {parse(shlex.split(line)[1:]).command for line in COMMANDS} == {
        *("inspect", "recalibrate", "measure", "merge", "apply", "export")
    }


@pytest.mark.parametrize("command", cli_options.COMMANDS)
def test_help_and_page_say_the_same_of_the_exit_status(command, capsys):
    row, *_ = re.findall(rf"^\| `{command}` \|.*\|$", PAGE, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    meanings = "; ".join(f"{n} {what}" for n, what in enumerate(cells) if what)
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    assert f"\nexit status: {meanings}\n" in capsys.readouterr().out


def test_more_steps_than_the_data_have_are_told_as_they_were_typed(fails, untouched):
    assert fails("inspect", "model.keras", "--data", "train.npz", "--steps", "100") == (
        "bn-callbacks: --data ran out of data after 6 batches. Received: --steps 100. "
        "Pass fewer --steps, or data that repeat.\n"
    )


def test_a_layer_that_there_is_not_is_told_as_it_was_typed(fails, untouched):
    line = fails("inspect", "model.keras", "--layers", "dense")
    assert line.startswith(
        "bn-callbacks: --layers selects no BatchNormalization layer."
    )


def test_validation_data_may_be_those_that_are_meant(fails, untouched):
    np.save("empty.npy", np.ones((0, 4), "float32"))
    line = fails(*RECALIBRATE, "train.npz", "--validation", "empty.npy", "--in-place")
    assert line.startswith("bn-callbacks: --data or --validation is empty.")
    (untouched / "empty.npy").unlink()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps=None. Pass `steps`.", "no --steps. Pass --steps."),
        ("layers='a/b'. Pass None", "--layers a/b. Pass None"),
        ("tolerance=0.5.", "--tolerance 0.5."),
        ("`xs` and steps_per_epoch=3", "`xs` and steps_per_epoch=3"),
        ("`recalibrate(model, x)`", "`recalibrate(model, x)`"),
    ],
)
def test_arguments_become_options_and_nothing_else_does(text, said):
    assert with_options(text) == said


def test_every_argument_has_its_option():
    given = ["export", "m", "--data", "d", "--output", "o", "--validation", "v"]
    options = vars(parse(given))
    for name in OPTIONS.values():
        assert name.removeprefix("--").replace("-", "_") in options
