"""The way to TensorFlow Lite that the documentation shows."""

import contextlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(tf, "lite"), reason="No converter in TensorFlow"),
    # TensorFlow announces that its interpreter will move to a package of its own.
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated"),
]

OUTPUT = ("--data", "train.npz", "--output")


def shown(name):
    """A function that the page shows."""
    namespace = {}
    codes = re.findall(
        r"<!-- tflite[\w ]* -->\n```python\n(.*?)```",
        PAGE.read_text("utf-8"),
        re.DOTALL,
    )
    for code in codes:
        exec(code, namespace)
    return namespace[name]


def check_converted(recalibrated):
    """Holds model.tflite against the model that it was made of."""
    interpreter = tf.lite.Interpreter("model.tflite")
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    (result,) = interpreter.get_output_details()
    x = np.load("val.npz")["x"][:8]
    outputs = []
    for sample in x:
        interpreter.set_tensor(given["index"], sample[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(result["index"])[0])
    model = keras.models.load_model(recalibrated)
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), rtol=1e-4)


def test_the_converted_model_computes_what_the_recalibrated_one_does(run, here):
    assert run("export", "model.keras", *OUTPUT, "serving/1").status == 0
    assert run("recalibrate", "model.keras", *OUTPUT, "new.keras").status == 0
    shown("to_tflite")("serving/1", "model.tflite")
    check_converted("new.keras")


def test_a_model_of_half_precision_is_converted_by_way_of_float32(run, here):
    with policy("mixed_float16"):
        inner = [keras.layers.Dense(6), keras.layers.BatchNormalization()]
        half = keras.Sequential(
            [
                keras.Input((4,)),
                keras.Sequential([keras.Input((4,)), *inner], name="inner"),
                keras.layers.ReLU(),
                keras.layers.Dense(1),
            ]
        )
        half.compile("adam", "mse")
        with np.load("train.npz") as data:
            half.fit(data["x"], data["y"], verbose=0)
        half.save("half.keras")
    assert run("export", "half.keras", *OUTPUT, "serving/1").status == 0
    with pytest.raises(Exception, match="f16"):
        shown("to_tflite")("serving/1", "model.tflite")
    loaded = keras.models.load_model("half.keras", compile=False)
    shown("in_float32")(loaded).save("float32.keras")
    assert run("export", "float32.keras", *OUTPUT, "serving/2").status == 0
    assert run("recalibrate", "float32.keras", *OUTPUT, "new.keras").status == 0
    shown("to_tflite")("serving/2", "model.tflite")
    check_converted("new.keras")


@contextlib.contextmanager
def policy(name):
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.mixed_precision.set_dtype_policy(before)
