"""For every test: TensorFlow quiet and on the CPU, fresh names, the same seed."""

import gc
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import pytest
import tensorflow as tf

# Four devices, so that strategies have replicas; what runs without one uses the first.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 4,
)

# Of two processes on two cores each has enough with one thread for an operation.
tf.config.threading.set_intra_op_parallelism_threads(1)

# A script, which only runs as one of several workers.
collect_ignore = ["workers.py"]

# Keras collects garbage with each new session; what the imports made is not garbage.
gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_keras() -> None:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)


# What tests share, for `import models`.
sys.path.insert(0, str(Path(__file__).parent))
