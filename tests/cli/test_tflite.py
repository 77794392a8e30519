"""The way to TensorFlow Lite that the documentation shows."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(tf, "lite"), reason="No converter in this TensorFlow")
# TensorFlow announces that its interpreter will move to a package of its own.
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_the_converted_model_computes_what_the_recalibrated_one_does(run, here):
    output = ("--data", "train.npz", "--output")
    assert run("export", "model.keras", *output, "serving/1").status == 0
    assert run("recalibrate", "model.keras", *output, "new.keras").status == 0
    (code,) = re.findall(
        r"<!-- tflite -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    namespace = {}
    exec(code, namespace)
    namespace["to_tflite"]("serving/1", "model.tflite")
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
    model = keras.models.load_model("new.keras")
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), rtol=1e-4)
