"""For every test: TensorFlow quiet and on the CPU, fresh names, the same seed."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

# What tests share, for `import models`.
sys.path.insert(0, str(Path(__file__).parent))

import keras
import pytest
import tensorflow as tf
from cluster import add_devices

# What runs without a strategy uses the first of them.
add_devices()

# Of two processes on two cores each has enough with one thread for an operation.
tf.config.threading.set_intra_op_parallelism_threads(1)

# Scripts: one only runs as one of several workers, the other is read and never run.
collect_ignore = ["typing_script.py", "workers.py"]

# What the imports made is not garbage.
gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_keras() -> None:
    # Keras collects garbage with each new session, which takes longer than most tests.
    with mock.patch("gc.collect"):
        keras.backend.clear_session()
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    yield
    gc.collect()
