"""What `--data` takes, each kind read as the model takes it."""

import argparse
import gzip
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from cli_kit import make_model

from bn_callbacks.cli.arrays import as_fit_takes_them
from bn_callbacks.cli.errors import CommandError
from bn_callbacks.cli.images import read_images
from bn_callbacks.cli.sources import open_data
from bn_callbacks.layers import InputLayout, count_inputs, input_layout
from bn_callbacks.measuring.data import Batches

ONE = InputLayout(("feat",), ((None, 4),))
TWO = InputLayout(("a", "b"), ((None, 4), (None, 2)))
TWO_IN_DICT = InputLayout(("a", "b"), ((None, 4), (None, 2)), is_dict=True)


def open_(text, model, features=None, batch_size=None):
    options = argparse.Namespace(features=features, batch_size=batch_size)
    return open_data(str(text), model, options)


def batches(text, model, **options):
    """All batches `(x, y, sample_weight)` of a source, as NumPy arrays."""
    x, batch_size = open_(text, model, **options)
    read = Batches(x, batch_size=batch_size, inputs=count_inputs(model))
    return [
        tf.nest.map_structure(lambda t: None if t is None else t.numpy(), batch)
        for batch in read
    ]


@pytest.fixture(scope="module")
def model():
    """Only looked at."""
    return make_model()


def two_inputs(is_dict=False):
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()([a, b])
    outputs = [keras.layers.Dense(1, name=name)(joined) for name in ("p", "q")]
    return keras.Model({"a": a, "b": b} if is_dict else [a, b], outputs)


def image_model(units=2, activation="softmax", loss="sparse_categorical_crossentropy"):
    model = keras.Sequential(
        [
            keras.Input((6, 5, 3)),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation=activation),
        ]
    )
    model.compile("sgd", loss)
    return model


class Own(keras.Model):
    """A subclassed model, of which Keras knows the shapes of its first call."""

    def call(self, x):
        return tf.nest.flatten(x)[0]


@pytest.mark.parametrize(
    ("names", "layout", "outputs", "data", "unused"),
    [
        (["feat"], ONE, [], "feat", []),
        (["x", "y"], ONE, [], ("x", "y"), []),
        (["x", "feat", "y"], ONE, [], ("feat", "y"), ["x"]),
        (["anything"], ONE, [], "anything", []),
        (["arr_0", "arr_1"], ONE, [], ("arr_0", "arr_1"), []),
        (["arr_0", "arr_1", "arr_2"], TWO, [], (["arr_0", "arr_1"], "arr_2"), []),
        (["x", "labels"], ONE, [], "x", ["labels"]),
        (
            ["x_train", "y_train", "x_test", "y_test"],
            ONE,
            [],
            ("x_train", "y_train"),
            ["x_test", "y_test"],
        ),
        (["x", "sample_weight", "y"], ONE, [], ("x", "y", "sample_weight"), []),
        (["x", "sample_weight"], ONE, [], "x", ["sample_weight"]),
        (["b", "a", "y"], TWO, [], (["a", "b"], "y"), []),
        (["x_1", "x_0"], TWO, [], ["x_0", "x_1"], []),
        (["b", "a"], TWO_IN_DICT, [], {"a": "a", "b": "b"}, []),
        (["x", "q", "p"], ONE, ["p", "q"], ("x", ["p", "q"]), []),
        (["x", "y_0", "y_1"], ONE, ["p", "q"], ("x", ["y_0", "y_1"]), []),
        (["x", "out"], ONE, ["out"], ("x", "out"), []),
        (["x", "y"], None, [], ("x", "y"), []),
    ],
)
def test_names_tell_inputs_from_targets(names, layout, outputs, data, unused):
    assert as_fit_takes_them(names, layout, outputs) == (data, unused)


@pytest.mark.parametrize(
    ("names", "layout", "says"),
    [
        (["u", "v"], ONE, "Received: u, v. Name the inputs feat or x, the targets y."),
        ([], ONE, "Received: none."),
        (["a", "c"], TWO, "Received: a, c. Name the inputs a and b, the targets y."),
    ],
)
def test_names_that_are_not_the_models(names, layout, says):
    with pytest.raises(CommandError) as error:
        as_fit_takes_them(names, layout, [])
    assert says in str(error.value)


@pytest.mark.parametrize("is_dict", [False, True])
def test_the_layout_is_that_of_the_model(is_dict, model):
    layout = InputLayout(("a", "b"), ((None, 4), (None, 2)), is_dict)
    assert input_layout(two_inputs(is_dict)) == layout
    assert input_layout(model) == ONE
    assert input_layout(keras.Sequential([keras.layers.Dense(1)])) is None


def test_the_layout_of_a_subclassed_model_is_that_of_its_first_call():
    a, b = np.ones((2, 4), "float32"), np.ones((2, 3), "float32")
    for x, expected in (
        (a, InputLayout(("x",), ((None, 4),))),
        ([a, b], InputLayout(("x_0", "x_1"), ((None, 4), (None, 3)))),
        ({"b": b, "a": a}, InputLayout(("a", "b"), ((None, 4), (None, 3)), True)),
    ):
        model = Own()
        model(x)
        assert input_layout(model) == expected
    model = Own()
    assert input_layout(model) is None


def test_arrays_are_read_in_batches_of_the_size_asked_for(here, model):
    x = np.load("train.npz")["x"]
    np.save("x.npy", x)
    assert [len(batch[0]) for batch in batches("x.npy", model)] == [32] * 6
    read = batches("train.npz", model, batch_size=100)
    assert [len(batch[0]) for batch in read] == [100, 92]
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in read]), x)
    assert read[0][1].shape == (100, 1)


@pytest.mark.parametrize("is_dict", [False, True])
def test_several_inputs_are_arrays_of_their_names(tmp_path, is_dict):
    a, b, p = np.ones((8, 4)), np.zeros((8, 2)), np.ones((8, 1))
    np.savez(tmp_path / "d.npz", b=b, a=a, p=p, q=2 * p)
    model = two_inputs(is_dict)
    model.compile("sgd", "mse")
    ((x, y, _),) = batches(tmp_path / "d.npz", model)
    assert [part.shape for part in tf.nest.flatten(x)] == [(8, 4), (8, 2)]
    assert [part[0, 0] for part in y] == [1, 2]
    if is_dict:
        model.evaluate(x, y, verbose=0)


def test_arrays_that_are_not_used_are_named(tmp_path, capsys, model):
    np.savez(tmp_path / "d.npz", x=np.ones((4, 4)), labels=np.ones(4))
    open_(tmp_path / "d.npz", model)
    assert capsys.readouterr().err.endswith("d.npz, labels will not be used\n")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.npy", b"no numbers", "holds Python objects, or is no NumPy file"),
        ("d.npz", b"PK\x03\x04torn", "d.npz is damaged: "),
        ("d.npz", b"", "d.npz is damaged: "),
    ],
)
def test_a_damaged_file_of_arrays(tmp_path, name, content, says, model):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandError, match=says):
        open_(tmp_path / name, model)


def test_pickles_are_never_loaded(tmp_path, model):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    np.savez(tmp_path / "d.npz", x=np.array([Trap(), Trap()], object))
    np.save(tmp_path / "d.npy", np.array([Trap()], object), allow_pickle=True)
    for name in ("d.npz", "d.npy"):
        with pytest.raises(CommandError, match="holds Python objects"):
            open_(tmp_path / name, model)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.ones((8, 5), "float32"), "does not fit the model"),
        (np.ones((8, 4, 2), "float32"), "does not fit the model"),
        (np.full((8, 4), "text"), "The model fails on batch 0 of the data."),
        (np.ones((0, 4), "float32"), "--data is empty"),
        (np.float32(3), "x.npy: One number is no data."),
        (np.full((8, 4), np.nan, "float32"), "is not finite"),
    ],
)
def test_data_of_a_wrong_shape_or_dtype(fails, untouched, x, says):
    np.save("x.npy", x)
    line = fails("recalibrate", "model.keras", "--data", "x.npy", "--in-place")
    assert says in line
    (untouched / "x.npy").unlink()


def save_images(directory, classes=("cat", "dog"), count=3):
    for index, name in enumerate(classes):
        (directory / name).mkdir(parents=True)
        for number in range(count):
            image = np.full((9, 7, 3), 100 * index + number, "uint8")
            content = tf.io.encode_png(image).numpy()
            (directory / name / f"{number}.png").write_bytes(content)


def test_images_come_in_the_models_size_with_the_class_of_each(tmp_path, capsys):
    save_images(tmp_path / "images")
    read = batches(tmp_path / "images", image_model(), batch_size=4)
    assert [batch[0].shape for batch in read] == [(4, 6, 5, 3), (2, 6, 5, 3)]
    values = np.concatenate([batch[0][:, 0, 0, 0] for batch in read])
    labels = np.concatenate([batch[1] for batch in read])
    assert sorted(values) == [0, 1, 2, 100, 101, 102]
    np.testing.assert_array_equal(labels, values >= 100)
    assert list(labels) != sorted(labels)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: image_model(loss="categorical_crossentropy"), (6, 2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (lambda: image_model(loss=keras.losses.BinaryCrossentropy()), (6, 2)),
                (lambda: image_model(loss=["sparse_categorical_crossentropy"]), (6,)),
                (lambda: image_model(1, "sigmoid", "binary_crossentropy"), (6, 1)),
            )
        ),
    ],
)
def test_labels_are_as_the_loss_takes_them(tmp_path, model, shape):
    save_images(tmp_path)
    model = model()
    ((x, y, _),) = batches(tmp_path, model)
    assert y.shape == shape
    assert np.isfinite(model.evaluate(x, y, verbose=0))


def test_labels_that_fit_no_output_are_left_out_and_that_is_told(tmp_path, capsys):
    save_images(tmp_path, ("a", "b", "c"))
    ((x, y, _),) = batches(tmp_path, image_model())
    assert (len(x), y) == (9, None)
    assert "labels are not used: 3 classes do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((4,), "the model takes no image"),
        ((8, 8, 5), "the model takes no image"),
        ((None, 8, 3), "images of any size"),
    ],
)
def test_a_model_that_takes_no_images_of_a_size(tmp_path, shape, says):
    save_images(tmp_path)
    model = keras.Sequential([keras.Input(shape), keras.layers.Flatten()])
    with pytest.raises(CommandError, match=says):
        read_images(tmp_path, model, input_layout(model), 32)


def test_a_directory_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match="There are no images in"):
        open_(tmp_path, image_model())


@pytest.mark.parametrize(("compression", "is_batched"), [(None, True), ("GZIP", False)])
def test_a_saved_dataset_is_read_as_it_was_saved(here, compression, is_batched, model):
    arrays = np.load("train.npz")
    dataset = tf.data.Dataset.from_tensor_slices((arrays["x"], arrays["y"]))
    if is_batched:
        dataset = dataset.batch(50)
    dataset.save("saved", compression=compression)
    for batch_size, sizes in (
        (None, [50, 50, 50, 42] if is_batched else [32] * 6),
        (96, [96, 96]),
    ):
        read = batches("saved", model, batch_size=batch_size)
        assert [len(batch[0]) for batch in read] == sizes
        x = np.concatenate([batch[0] for batch in read])
        np.testing.assert_array_equal(x, arrays["x"])


def test_a_damaged_dataset(tmp_path, model):
    tf.data.Dataset.range(9).save(str(tmp_path))
    for path in tmp_path.rglob("*.snapshot"):
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(CommandError, match="is damaged: "):
        open_(tmp_path, model)


def example(**features):
    kinds = {
        float: lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=v)),
        int: lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=v)),
        bytes: lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=v)),
    }
    made = {name: kinds[type(v[0])](v) for name, v in features.items()}
    return tf.train.Example(
        features=tf.train.Features(feature=made)
    ).SerializeToString()


def write_records(path, examples):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for one in examples:
            writer.write(one)


SPEC = {
    "inputs": {"values": {"shape": [4], "dtype": "float32"}},
    "targets": {"target": {"shape": [1], "dtype": "float32"}},
}


@pytest.fixture
def records(tmp_path):
    """Two files of three examples, and their specification."""
    for part in range(2):
        write_records(
            tmp_path / f"part-{part}.tfrecord",
            [
                example(values=[float(3 * part + i)] * 4, target=[float(i)])
                for i in range(3)
            ],
        )
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("part-0.tfrecord", range(3)),
        ("part-*.tfrecord", range(6)),
        (".", range(6)),
    ],
)
def test_records_are_a_file_a_pattern_or_a_directory(records, name, values, model):
    spec = str(records / "spec.json")
    ((x, y, _),) = batches(records / name, model, features=spec)
    np.testing.assert_array_equal(x[:, 0], values)
    assert (x.shape[1], y.shape) == (4, (len(values), 1))


def test_features_may_go_by_the_names_that_arrays_have(records, model):
    feature = {"shape": [4], "dtype": "float32"}
    for names in (("feat", "y"), ("x", "y"), ("inputs", None)):
        for path in records.glob("*.tfrecord"):
            path.unlink()
        content = {name: [1.0] * 4 for name in names if name}
        write_records(records / "p.tfrecord", [example(**content)])
        spec = {name: feature for name in names if name}
        (records / "spec.json").write_text(json.dumps(spec))
        ((x, y, _),) = batches(records, model, features=str(records / "spec.json"))
        assert x.shape == (1, 4)
        assert (y is None) == (names[1] is None)


def test_other_data_beside_records_are_no_records(records, here, model):
    spec = str(records / "spec.json")
    assert batches(here / "val.npz", model, features=spec)[0][0].shape == (32, 4)
    (records / "any.name").write_bytes((records / "part-0.tfrecord").read_bytes())
    ((x, _, _),) = batches(records / "any.name", model, features=spec)
    assert x.shape == (3, 4)


def test_compressed_records(records, model):
    content = (records / "part-0.tfrecord").read_bytes()
    (records / "p.tfrecord.gz").write_bytes(gzip.compress(content))
    spec = str(records / "spec.json")
    ((x, _, _),) = batches(records / "p.tfrecord.gz", model, features=spec)
    assert x.shape == (3, 4)


def test_bytes_are_decoded_as_the_specification_says(tmp_path):
    picture = np.arange(4 * 4 * 3, dtype="uint8").reshape(4, 4, 3)
    stored = {
        "raw": picture.tobytes(),
        "tensor": tf.io.serialize_tensor(picture).numpy(),
        "image": tf.io.encode_png(picture).numpy(),
    }
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    for encoding, content in stored.items():
        write_records(tmp_path / "p.tfrecord", [example(image=[content], label=[7])])
        image = {"shape": [4, 4, 3], "dtype": "uint8", "encoding": encoding}
        label = {"shape": [], "dtype": "int32"}
        spec = {"inputs": {"image": image}, "targets": {"label": label}}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        ((x, y, _),) = batches(
            tmp_path / "p.tfrecord", model, features=str(tmp_path / "spec.json")
        )
        np.testing.assert_array_equal(x[0], picture)
        assert (x.dtype, y.dtype, y[0]) == (np.uint8, np.int32, 7)


@pytest.mark.parametrize("is_dict", [False, True])
def test_records_of_several_inputs_go_by_the_models_names(tmp_path, is_dict):
    write_records(
        tmp_path / "p.tfrecord",
        [example(a=[1.0] * 4, b=[2, 3], p=[4.0], q=[5.0]) for _ in range(3)],
    )
    spec = {
        "inputs": {
            "b": {"shape": [2], "dtype": "float32"},
            "a": {"shape": [4], "dtype": "float32"},
        },
        "targets": {name: {"shape": [1], "dtype": "float32"} for name in "qp"},
    }
    spec["inputs"]["b"]["dtype"] = "int64"
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    model = two_inputs(is_dict)
    model.compile("sgd", "mse")
    ((x, y, _),) = batches(
        tmp_path / "p.tfrecord", model, features=str(tmp_path / "spec.json")
    )
    assert [part.shape for part in tf.nest.flatten(x)] == [(3, 4), (3, 2)]
    assert [part[0, 0] for part in y] == [4, 5]
    del spec["targets"]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    ((x, y, _),) = batches(
        tmp_path / "p.tfrecord", model, features=str(tmp_path / "spec.json")
    )
    assert [part.shape for part in tf.nest.flatten(x)] == [(3, 4), (3, 2)]
    assert y is None


IMAGE = {"shape": [2, 2, 3], "dtype": "uint8"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{", "spec.json is no specification of features"),
        ("[]", "spec.json is no specification of features"),
        ("{}", "is no specification of features: it needs inputs"),
        ({"inputs": 3}, "is no specification of features"),
        ({"u": IMAGE, "v": IMAGE}, "cannot be told apart. Received: u, v."),
        ({"inputs": {}}, "it needs inputs"),
        ({**SPEC, "labels": {}}, "nothing else"),
        ({"inputs": {"a": {"shape": [4]}}}, "The feature 'a' needs a shape"),
        ({"inputs": {"a": {"shape": [-1], "dtype": "int64"}}}, "whole numbers"),
        ({"inputs": {"a": {"shape": [4], "dtype": "number"}}}, "a dtype"),
        ({"inputs": {"a": {**IMAGE, "encoding": "jpg"}}}, "raw, tensor, image"),
        ({"inputs": {"a": {**IMAGE, "size": 3}}}, "'size': 3"),
        (
            {"inputs": {"a": {"shape": [4], "dtype": "uint8", "encoding": "image"}}},
            "'encoding': 'image'",
        ),
        (
            {"inputs": {"a": IMAGE, "b": IMAGE}},
            "Received: a, b. The model's inputs are feat",
        ),
        ({**SPEC, "targets": {"a": IMAGE, "b": IMAGE}}, "outputs one target"),
    ],
)
def test_a_specification_that_is_none(records, spec, says, model):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    (records / "spec.json").write_text(text)
    with pytest.raises(CommandError) as error:
        open_(records, model, features=str(records / "spec.json"))
    assert says in str(error.value)


def test_records_need_a_specification(records, model):
    for name in (".", "part-0.tfrecord", "part-*.tfrecord"):
        with pytest.raises(CommandError, match=r"--features SPEC\.json has to say"):
            open_(records / name, model)
    with pytest.raises(CommandError, match="There are no TFRecord files"):
        open_(records / "x-*", model, features=str(records / "spec.json"))
    with pytest.raises(CommandError, match="No such file"):
        open_(records, model, features=str(records / "nowhere.json"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:20], "The data are damaged: truncated record"),
        (lambda content: content.replace(b"target", b"tarGet"), "corrupted record"),
        (None, "The data cannot be read: "),
    ],
)
def test_damaged_records_are_one_line(fails, here, records, damage, says):
    path = records / "part-0.tfrecord"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        write_records(path, [example(values=[1.0] * 4)])
    data = ("--data", path, "--features", records / "spec.json")
    line = fails("inspect", "model.keras", *data)
    assert says in line
    assert damage or line.endswith("Check --data, and --features of TFRecord files.\n")


FUNCTIONS = """
import numpy as np, tensorflow as tf
x = np.ones((64, 4), "float32")
arrays = lambda: (x, x[:, :1])
dataset = lambda: tf.data.Dataset.from_tensor_slices(arrays()).batch(16)
examples = lambda: tf.data.Dataset.from_tensor_slices(x)
generator = lambda: (x[i : i + 8] for i in range(0, 64, 8))
nothing = lambda: None
constant = 3

def broken():
    raise KeyError("lost")

def with_arguments(split):
    return x
"""


@pytest.mark.parametrize(
    ("name", "size", "batch_size"),
    [
        ("arrays", 32, None),
        ("arrays", 10, 10),
        ("dataset", 16, None),
        ("dataset", 10, 10),
        ("examples", 32, None),
        ("generator", 8, None),
    ],
)
def test_a_function_returns_what_fit_takes(here, name, size, batch_size, model):
    (here / "own_data.py").write_text(FUNCTIONS)
    read = batches(f"own_data:{name}", model, batch_size=batch_size)
    assert len(read[0][0]) == size
    assert sum(len(batch[0]) for batch in read) == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("own_data:nothing", r"own_data:nothing\(\) returned None"),
        (
            "own_data:constant",
            "There is no function 'constant' in the module 'own_data'",
        ),
        ("own_data:absent", "There is no function 'absent'"),
        ("own_data:broken", r"own_data:broken\(\) raised KeyError: 'lost'"),
        ("own_data:with_arguments", "missing 1 required positional argument"),
        ("no_data:make", "There is no module 'no_data'"),
        ("nowhere.npz", r"nowhere.npz does not exist. Pass a .npz"),
        ("own_data.py", "own_data.py is nothing that can be read. Pass a .npz"),
    ],
)
def test_a_source_that_is_none(here, text, says, model):
    (here / "own_data.py").write_text(FUNCTIONS)
    with pytest.raises(CommandError, match=says):
        open_(text, model)


def test_what_a_function_prints_is_no_part_of_the_json(run, here):
    (here / "chatty_data.py").write_text(
        FUNCTIONS
        + "print('imported')\ndef make():\n    print('called')\n    return x\n"
    )
    ran = run("inspect", "model.keras", "--data", "chatty_data:make", "--json")
    assert json.loads(ran.out)["model"] == "model.keras"
    assert ran.err == "imported\ncalled\n"


def test_an_endless_dataset_needs_steps(run, fails, here):
    (here / "endless_data.py").write_text(
        FUNCTIONS + "endless = lambda: dataset().repeat()"
    )
    data = ("inspect", "model.keras", "--data", "endless_data:endless")
    assert "--data is infinite" in fails(*data)
    assert run(*data, "--steps", "2").status in (0, 1)


def test_batches_of_a_generator_stay_as_they_come(fails, here):
    (here / "own_data.py").write_text(FUNCTIONS)
    data = ("--data", "own_data:generator", "--batch-size", "4")
    assert "--batch-size is for arrays" in fails("inspect", "model.keras", *data)


@pytest.mark.slow
def test_every_source_gives_the_same_statistics(run, here):
    arrays = np.load("train.npz")
    dataset = tf.data.Dataset.from_tensor_slices((arrays["x"], arrays["y"]))
    dataset.save("saved")
    np.save("x.npy", arrays["x"])
    write_records(
        "t.tfrecord",
        [
            example(values=[float(v) for v in x], target=[float(y[0])])
            for x, y in zip(arrays["x"], arrays["y"], strict=True)
        ],
    )
    (here / "spec.json").write_text(json.dumps(SPEC))
    (here / "npz_data.py").write_text(
        "import numpy as np\ndef make():\n    return np.load('train.npz')['x']\n"
    )
    sources = {
        "npz": ["train.npz"],
        "npy": ["x.npy", "--batch-size", "100"],
        "saved": ["saved"],
        "records": ["t.tfrecord", "--features", "spec.json"],
        "function": ["npz_data:make"],
    }
    found = {}
    for name, data in sources.items():
        output = f"{name}.keras"
        ran = run("recalibrate", "model.keras", "--output", output, "--data", *data)
        assert ran.status == 0, ran
        bn = keras.models.load_model(output).get_layer("bn")
        found[name] = np.array([bn.moving_mean, bn.moving_variance])
    for statistics in found.values():
        np.testing.assert_allclose(statistics, found["npz"], rtol=1e-5)


@pytest.mark.slow
def test_a_model_is_recalibrated_with_images(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images", count=40)
    image_model().save("model.keras")
    ran = run("inspect", "model.keras", "--data", "images", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["audit"]["loss_gap"] is not None
    data = ("--data", "images", "--validation", "images")
    assert run("recalibrate", "model.keras", *data, "--in-place").status in (0, 1)
    assert run("recalibrate", "model.keras", *data[:2], "--in-place").status == 0
    bn = keras.models.load_model("model.keras").layers[0]
    values = [*range(40), *range(100, 140)]
    np.testing.assert_allclose(bn.moving_mean, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(bn.moving_variance, np.var(values), rtol=1e-4)
