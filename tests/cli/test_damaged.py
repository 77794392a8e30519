"""Damaged data are named: which file, which record, which batch."""

import gzip
import json
import struct

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_callbacks import recalibrate

SPEC = {
    "inputs": {"feat": {"shape": [4], "dtype": "float32"}},
    "targets": {"y": {"shape": [1], "dtype": "float32"}},
}


def example(features=4):
    def floats(count):
        values = tf.train.FloatList(value=np.arange(count) / 10)
        return tf.train.Feature(float_list=values)

    feature = {"feat": floats(features), "y": floats(1)}
    message = tf.train.Example(features=tf.train.Features(feature=feature))
    return message.SerializeToString()


def write(path, examples, **options):
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(**options)) as writer:
        for each in examples:
            writer.write(each)


@pytest.fixture
def records(here):
    (here / "records").mkdir()
    (here / "spec.json").write_text(json.dumps(SPEC))
    for name in "abc":
        write(here / "records" / f"{name}.tfrecord", [example() for _ in range(40)])
    return here / "records"


COMMAND = ("inspect", "model.keras", "--features", "spec.json", "--data")


def test_a_record_that_is_damaged_is_named(fails, records):
    path = records / "b.tfrecord"
    content = bytearray(path.read_bytes())
    size = len(content) // 40
    content[17 * size + size // 2] ^= 255
    path.write_bytes(content)
    line = fails(*COMMAND, records)
    assert "The data are damaged: " in line
    assert f", in record 17 of {path} (counted from 0)" in line


def test_a_record_with_other_features_is_named(fails, records):
    path = records / "c.tfrecord"
    write(path, [example(), example(5), example()])
    line = fails(*COMMAND, records)
    assert f"in record 1 of {path} (counted from 0), which is not what" in line


def crc(data):
    """CRC-32C, masked, as TFRecord files have it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("length", [64 * 2**30, 2**63, 2**64 - 1])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_record_that_claims_to_be_huge_is_an_error(
    fails, records, length, is_compressed
):
    header = struct.pack("<Q", length)
    content = (records / "a.tfrecord").read_bytes()
    content += header + struct.pack("<I", crc(header)) + b"x" * 100
    for path in records.iterdir():
        path.unlink()
    path = records / "bad.tfrecord"
    if is_compressed:
        path = records / "bad.tfrecord.gz"
        content = gzip.compress(content)
    path.write_bytes(content)
    line = fails(*COMMAND, records)
    assert f"record 40 of {path} (counted from 0) claims to have" in line


@pytest.mark.parametrize("shape", [[10**12], [10**6, 10**6], [2**63]])
def test_a_specification_beyond_all_memory_is_an_error(fails, records, here, shape):
    spec = {**SPEC, "inputs": {"feat": {"shape": shape, "dtype": "float32"}}}
    (here / "spec.json").write_text(json.dumps(spec))
    line = fails(*COMMAND, records)
    assert "An example has 268,435,456 numbers at most" in line


def test_an_image_that_is_damaged_is_named(run, here):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.BatchNormalization()]
    )
    model.save("images.keras")
    for label in "ab":
        (here / "images" / label).mkdir(parents=True)
        for index in range(5):
            path = here / "images" / label / f"{index}.png"
            keras.utils.save_img(path, np.full((8, 8, 3), 20.0 * index))
    path = here / "images" / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:-30] + b"rotten" * 5)
    ran = run("inspect", "images.keras", "--data", "images")
    assert ran.status == 2
    assert f"{path.relative_to(here)} is no image, or damaged" in ran.err


# --- Data in memory


X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")


def model():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
        ]
    )


class Shrinking:
    """Gives two batches fewer each time it is read, after the first look."""

    left = 10

    def __iter__(self):
        self.left -= 2
        return iter(X[: 8 * self.left].reshape(-1, 8, 4))


def test_data_that_get_fewer_are_told_how_many_are_missing():
    with pytest.raises(ValueError, match="2 batches fewer than in the first pass"):
        recalibrate(model(), Shrinking(), refine=2, verbose=0)


@pytest.mark.parametrize("value", [1e25, -3e38])
def test_a_value_that_is_too_large_to_be_squared_is_not_called_nan(value):
    x = X.copy()
    x[40, 2] = value
    with pytest.raises(ValueError, match=r"overflow when .* in batch 1 "):
        recalibrate(model(), x, verbose=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_called_so(value):
    x = X.copy()
    x[40, 2] = value
    with pytest.raises(ValueError, match=r"Received: NaN or infinity in batch 1 "):
        recalibrate(model(), x, verbose=0)


def test_a_batch_of_another_width_is_named():
    def widths():
        for index in range(5):
            yield np.ones((4, 5 if index == 3 else 4), "float32")

    with pytest.raises(ValueError, match=r"^Batch 3 of the data .* shape \(4, 5\)"):
        recalibrate(model(), widths(), verbose=0)
