"""`bn-callbacks export`: what is left behind is what was verified."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cli_kit import make_model

from bn_callbacks.cli import served, serving
from bn_callbacks.cli.errors import CommandError
from bn_callbacks.layers import compute_precision, takes_any_batch, to_model_inputs
from bn_callbacks.recalibration import recalibrate

EXPORT = ("export", "model.keras", "--data", "train.npz", "--output", "serving/1")


@pytest.fixture
def in_process(monkeypatch):
    """Serves in this process, which is faster; as `served` does, but for Keras."""

    def serve(path, inputs):
        loaded = tf.saved_model.load(path)
        return [
            [served.storable(one) for one in tf.nest.flatten(loaded.serve(*batch))]
            for batch in inputs
        ]

    monkeypatch.setattr(serving, "_serve", serve)


def test_the_export_computes_what_the_recalibrated_model_does(run, here, in_process):
    content = (here / "model.keras").read_bytes()
    ran = run(*EXPORT, "--json")
    assert (ran.status, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert report["output"] == "serving/1"
    assert report["verified"]["samples"] == 128
    assert report["verified"]["difference"] < report["verified"]["bound"] == 1e-3
    assert (here / "model.keras").read_bytes() == content
    x = np.load("val.npz")["x"]
    loaded = tf.saved_model.load("serving/1")
    outputs = loaded.serve(x)
    model = keras.models.load_model("model.keras")
    old = model(x)
    recalibrate(model, np.load("train.npz")["x"], verbose=0)
    wanted = model(x)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(wanted - old)).max() > 0.1


@pytest.mark.slow
def test_the_bound_is_printed_and_nothing_else_is_made(run, here, in_process):
    (here / "serving").mkdir()
    ran = run(*EXPORT)
    assert ran.status == 0
    assert (
        "Exported to serving/1. Loaded with TensorFlow alone, its outputs on 128"
        in (ran.out)
    )
    assert "standard deviations (bound: 0.001)." in ran.out
    assert "endpoint" not in ran.out
    assert [path.name for path in (here / "serving").iterdir()] == ["1"]


def spoilt(change):
    """Exports something else than the model."""
    original = serving.export_saved_model

    def export(model, path):
        change(model)
        original(model, path)

    return export


def other_statistics(model):
    bn = model.get_layer("bn")
    bn.moving_mean.assign(bn.moving_mean + 0.01)


def other_weights(model):
    kernel = model.layers[-1].kernel
    kernel.assign(kernel * 1.01)


def training_mode(model):
    bn, own = model.get_layer("bn"), model.get_layer("bn").call
    vars(bn)["call"] = lambda x, **options: own(x, training=True)


def not_finite(model):
    model.layers[-1].bias.assign([np.nan])


@pytest.mark.parametrize(
    "change",
    [
        other_statistics,
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (other_weights, training_mode, not_finite)
        ),
    ],
)
def test_an_export_that_differs_is_refused_and_removed(
    fails, untouched, in_process, monkeypatch, change
):
    # `export` has imported the function by its name.
    monkeypatch.setattr("bn_callbacks.cli.export.export_saved_model", spoilt(change))
    line = fails(*EXPORT)
    assert "does not compute what the model does, and was removed" in line
    assert "(bound: 0.001)" in line


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("export_saved_model", KeyboardInterrupt),
        pytest.param("verify", KeyboardInterrupt, marks=pytest.mark.slow),
        pytest.param("export_saved_model", OSError, marks=pytest.mark.slow),
        pytest.param("verify", RuntimeError, marks=pytest.mark.slow),
    ],
)
def test_what_ends_the_export_leaves_nothing(
    run, untouched, in_process, monkeypatch, when, error
):
    def end(*arguments):
        path = next(each for each in arguments if isinstance(each, Path))
        path.mkdir(exist_ok=True)
        (path / "saved_model.pb").write_text("half of it")
        raise error("early")

    monkeypatch.setattr(f"bn_callbacks.cli.export.{when}", end)
    ran = run(*EXPORT)
    assert ran.status == (130 if error is KeyboardInterrupt else 2)
    assert ran.err.count("\n") == 1


def test_a_model_that_keras_cannot_export(fails, untouched, monkeypatch):
    def export(self, path):
        stack = 'File "x.py", line 3, in call *\n        y\n'
        raise ValueError(
            f"in user code:\n\n    {stack}\n    ValueError: No\n    way.\n"
        )

    monkeypatch.setattr(keras.Sequential, "export", export)
    assert fails(*EXPORT).endswith(
        "Keras cannot export the model: ValueError: No way. Nothing was left behind. "
        "In Python, model.export('serving') shows where it fails.\n"
    )


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(fails, untouched):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        line = fails(*EXPORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Cannot write serving/1: " in line
    assert line.endswith(
        "Nothing was left behind. Make room, or write to another place.\n"
    )


@pytest.mark.slow
def test_a_worse_validation_loss_exports_nothing(run, untouched):
    model = keras.models.load_model("model.keras")
    x = np.load("val.npz")["x"]
    np.savez("own.npz", x=x, y=model.predict(x, verbose=0))
    ran = run(*EXPORT, "--validation", "own.npz")
    assert ran.status == 1
    assert ran.out.endswith("recalibration would raise the validation loss.\n")
    (untouched / "own.npz").unlink()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("full", "full is not empty. Name a directory to make"),
        ("model.keras", "model.keras is a file. Name a directory to make."),
        (
            "model.keras/1",
            "model.keras is a file, not a directory for the output. Name another "
            "place.",
        ),
    ],
)
def test_an_output_that_cannot_be(fails, here, output, says):
    (here / "full").mkdir()
    (here / "full" / "precious").touch()
    assert says in fails(*EXPORT[:-1], output)


def difference(wanted, given, precision=2.0**-23):
    return serving._difference(
        [np.float32(part) for part in wanted],
        [np.float32(part) for part in given],
        precision,
    )


def test_a_difference_is_counted_in_deviations_of_its_own_output():
    # One output of the size of a million, one of a millionth.
    one = np.random.default_rng(0).normal(size=(64, 2)) * [1e6, 1e-6]
    assert difference([one[:40], one[40:]], [one[:40], one[40:]]) == 0
    off = one + np.array([0, 1e-8])
    assert difference([one], [off]) == pytest.approx(1e-2, rel=0.2)


def test_outputs_that_never_vary_may_differ_by_rounding():
    one = np.full((8, 3), 7.0)
    assert difference([one], [one * (1 + 1e-6)]) < serving.BOUND
    assert difference([one], [one * (1 + 1e-4)]) > serving.BOUND
    assert difference([one * 0], [one * 0]) == 0
    assert difference([one * 0], [one * 0 + 1e-30]) == np.inf


def test_less_precise_models_may_differ_by_their_own_rounding():
    one = np.random.default_rng(0).normal(size=(64, 1))
    off = one + 0.005 * np.abs(one).max()
    assert difference([one], [off]) > serving.BOUND
    assert difference([one], [off], 2.0**-10) < serving.BOUND


def test_outputs_of_another_shape_or_kind():
    one = np.ones((4, 2))
    assert difference([one], [one[:, :1]]) == np.inf
    assert serving._difference([np.arange(3)], [np.arange(3)], 0) == 0
    assert serving._difference([np.arange(3)], [np.arange(3) + 1], 0) == np.inf
    assert difference([one], [one * np.nan]) == np.inf
    with pytest.raises(CommandError, match="own outputs are not finite"):
        difference([one * np.nan], [one])


def test_inputs_are_put_into_the_models_order():
    a, b = keras.Input((1,), name="b"), keras.Input((2,), name="a")
    model = keras.Model([a, b], keras.layers.Concatenate()([a, b]))
    x = {"a": np.ones((3, 2), "int64"), "b": np.zeros((3, 1))}
    given = to_model_inputs(model, x)
    assert [tensor.shape for tensor in given] == [(3, 1), (3, 2)]
    assert {tensor.dtype for tensor in given} == {tf.float32}
    (given,) = to_model_inputs(make_model(), np.ones((2, 4)))
    assert given.dtype == tf.float32


def test_facts_that_decide_how_to_compare():
    assert takes_any_batch(make_model())
    fixed = keras.Sequential([keras.Input(batch_shape=(8, 4)), keras.layers.Dense(1)])
    assert not takes_any_batch(fixed)
    assert compute_precision(make_model()) == 2.0**-23
    assert compute_precision(make_model(dtype="mixed_bfloat16")) == 2.0**-7


def test_what_the_two_processes_exchange_comes_back(tmp_path):
    batches = [[np.ones((2, 3)), np.arange(4)], [np.zeros((1, 3)), np.array([b"text"])]]
    served.save(tmp_path / "file.npz", batches)
    loaded = served.load(tmp_path / "file.npz")
    assert [[a.tolist() for a in batch] for batch in loaded] == [
        [a.tolist() for a in batch] for batch in batches
    ]
    assert served.storable(tf.constant([1.5], tf.bfloat16)).dtype == np.float32
    assert served.storable(tf.constant(["text"])).tolist() == [b"text"]


# What follows loads each export in a process of its own.


def two_inputs():
    a = keras.Input((4,), name="b")
    b = keras.Input((2,), name="a", dtype="int32")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(9, 3)(b))
    joined = keras.layers.Concatenate()([a, embedded])
    joined = keras.layers.BatchNormalization()(joined)
    return keras.Model(
        [a, b],
        {
            "value": keras.layers.Dense(1)(joined),
            "class": keras.layers.Dense(3, activation="softmax")(joined),
        },
    )


def sequence_model():
    model = keras.Sequential(
        [
            keras.Input((None, 4)),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
            keras.layers.LSTM(3, return_sequences=True),
        ]
    )
    model.compile("sgd", "mse")
    return model


def image_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, strides=2),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )


def random(*shape, dtype="float32", high=None):
    draw = np.random.default_rng(0)
    if high:
        return draw.integers(0, high, shape).astype(dtype)
    return (5 + 2 * draw.normal(size=shape)).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (
            two_inputs,
            lambda: {"a": random(150, 2, high=9, dtype="int64"), "b": random(150, 4)},
        ),
        (sequence_model, lambda: {"x": random(40, 7, 4)}),
        (image_model, lambda: {"x": random(200, 8, 8, 3, high=255, dtype="uint8")}),
        (lambda: make_model(dtype="mixed_bfloat16"), lambda: {"x": random(64, 4)}),
        (lambda: make_model(dtype="float64"), lambda: {"x": random(64, 4)}),
    ],
    ids=["two_inputs", "sequence", "images", "bfloat16", "float64"],
)
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_models_of_many_kinds_are_exported(run, here, make, data):
    make().save("own.keras")
    np.savez("own.npz", **data())
    ran = run("export", "own.keras", "--data", "own.npz", "--output", "out", "--json")
    assert ran.status == 0, ran
    proof = json.loads(ran.out)["verified"]
    assert proof["difference"] < proof["bound"]
    assert Path("out/saved_model.pb").is_file()


@pytest.mark.slow
def test_a_mistake_of_keras_in_the_graph_is_found(fails, here):
    # Of a TimeDistributed layer over an open number of steps, Keras 3.15 exports a
    # graph that counts samples as steps; Keras 3.0 fails once the model was called.
    steps = keras.layers.TimeDistributed(keras.layers.Dense(3))
    bn = keras.layers.BatchNormalization()
    keras.Sequential([keras.Input((None, 4)), bn, steps]).save("steps.keras")
    for samples in (4, 40):
        np.savez("steps.npz", x=random(samples, 7, 4))
        given = ("--data", "steps.npz", "--output", "out")
        line = fails("export", "steps.keras", *given)
        assert ", and was removed." in line or "Keras cannot export the model" in line
        assert not Path("out").exists()


PYTHON_INSIDE = """
import keras, tensorflow as tf

class Python(keras.layers.Layer):
    def call(self, x):
        y = tf.numpy_function(lambda a: a + 1, [x], tf.float32)
        return tf.ensure_shape(y, x.shape)
"""


@pytest.mark.slow
def test_an_export_that_needs_this_process_is_refused(fails, here):
    (here / "own_python.py").write_text(PYTHON_INSIDE)
    namespace = {"__name__": "own_python"}
    exec(PYTHON_INSIDE, namespace)
    keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(),
            namespace["Python"](),
        ]
    ).save("python.keras")
    given = ("--custom-objects", "own_python", "--output", "out")
    line = fails("export", "python.keras", "--data", "train.npz", *given)
    assert "cannot be loaded and run with TensorFlow alone, and was removed" in line
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_process_that_serves_has_no_keras(here):
    keras.models.load_model("model.keras").export("out")
    served.save(here / "in.npz", [[np.ones((2, 4), "float32")]])
    program = (
        "import sys; from bn_callbacks.cli import served; "
        "served.main('out', 'in.npz', 'results.npz'); "
        "assert sys.modules.pop('keras') is None; "
        "assert not [name for name in sys.modules if name.startswith('keras')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=here)
    ((outputs,),) = served.load(here / "results.npz")
    assert outputs.shape == (2, 1)
