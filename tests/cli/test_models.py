"""What may be given as MODEL, and what is said of the rest."""

import json
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_callbacks.cli import models
from bn_callbacks.cli.errors import LONGEST, CommandError, one_line, text_of


def weights_only(here):
    keras.models.load_model("model.keras").save_weights("m.weights.h5")
    return "m.weights.h5"


def saved_model(here):
    (here / "saved").mkdir()
    (here / "saved" / "saved_model.pb").touch()
    return "saved"


def written(name, content):
    def write(here):
        (here / name).write_bytes(content)
        return name

    return write


def zipped(**members):
    def write(here):
        with zipfile.ZipFile("zip.keras", "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_", "."), content)
        return "zip.keras"

    return write


def torn(start, end):
    """A model file of which a part is lost."""

    def write(here):
        content = (here / "model.keras").read_bytes()
        (here / "torn.keras").write_bytes(content[:start] + content[end:])
        return "torn.keras"

    return write


def scratched(here):
    content = bytearray((here / "model.keras").read_bytes())
    weights = content.index(b"\x89HDF")
    content[weights + 2000 : weights + 4000] = bytes(2000)
    (here / "scratched.keras").write_bytes(content)
    return "scratched.keras"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda here: "nowhere.keras", "There is no file nowhere.keras."),
        (lambda here: ".", ". is a directory."),
        (saved_model, "saved is a SavedModel: a graph for serving"),
        (weights_only, "m.weights.h5 holds weights only, not the model."),
        (written("m.h5", b"x"), "keras.models.load_model('m.h5').save('model.keras')"),
        (written("m.onnx", b"x"), "m.onnx is no .keras file."),
        (written("m.keras", b""), "m.keras is damaged, or no .keras file"),
        (torn(5000, 10**9), "torn.keras is damaged, or no .keras file"),
        (torn(5000, 5004), "torn.keras is damaged"),
        (scratched, "scratched.keras is damaged: Bad CRC-32"),
        (zipped(a="b"), "There is no Keras model in zip.keras."),
        (zipped(config_json="{"), "zip.keras is damaged: "),
        (zipped(config_json="{}"), "zip.keras "),
    ],
)
def test_what_is_no_model_is_told_in_one_line(fails, here, make, says):
    name = make(here)
    assert says in fails("inspect", name)


def test_safe_mode_is_on_unless_it_is_given_up(run, fails, here):
    with_code = keras.layers.Lambda(lambda x: 2 * x, output_shape=(3,))
    model = keras.Sequential(
        [keras.Input((3,)), with_code, keras.layers.BatchNormalization(name="bn")]
    )
    model.save("code.keras")
    line = fails("inspect", "code.keras")
    assert "code.keras holds Python code (a Lambda layer)" in line
    assert "pass --unsafe" in line
    ran = run("inspect", "code.keras", "--unsafe", "--json")
    assert json.loads(ran.out)["layers"][0]["path"] == "bn"


MODULE = """
import keras

class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs

def own_loss(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)

class Private(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.bn = keras.layers.BatchNormalization(name="bn")
    def call(self, x, training=None):
        return self.bn(2 * x, training=training)
"""


@pytest.fixture
def own_objects(here, monkeypatch):
    """A model of the user's own layers and loss, and the module that defines them."""
    (here / "own_layers.py").write_text(MODULE)
    namespace = {"__name__": "elsewhere"}
    exec(MODULE, namespace)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            namespace["Doubled"](),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", namespace["own_loss"])
    model.save("own.keras")
    model = namespace["Private"]()
    model(np.ones((2, 4), "float32"))
    model.save("subclass.keras")


@pytest.mark.parametrize("name", ["own", "subclass"])
def test_own_layers_come_from_the_module_that_is_named(run, fails, own_objects, name):
    line = fails("inspect", f"{name}.keras")
    unknown = {"own": "'Doubled'", "subclass": "'Private'"}[name]
    assert f"{name}.keras uses {unknown}, which Keras does not know." in line
    assert "--custom-objects MODULE" in line
    given = ("--custom-objects", "own_layers")
    ran = run("inspect", f"{name}.keras", *given, "--data", "train.npz")
    assert ran.status == 1  # Never trained.
    assert "Against the data:" in ran.out


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("no_layers", "There is no module 'no_layers' in "),
        ("own_layers.py", "Leave out the .py: own_layers."),
        ("needy_layers", "The module 'needy_layers' needs 'not_there'"),
        (
            "broken_layers",
            "the module 'broken_layers' raised ZeroDivisionError: division by zero. "
            "Try it with: python -c 'import broken_layers'",
        ),
    ],
)
def test_a_module_that_cannot_be_imported(fails, here, module, says):
    (here / "own_layers.py").write_text(MODULE)
    (here / "needy_layers.py").write_text("import not_there")
    (here / "broken_layers.py").write_text("1 / 0")
    assert says in fails("inspect", "model.keras", "--custom-objects", module)


@pytest.mark.filterwarnings("default:two")
def test_a_warning_is_one_line(run, here, monkeypatch):
    def load(*arguments, **options):
        warnings.warn("two\nlines", stacklevel=1)
        return models.load(*arguments, **options)

    monkeypatch.setattr("bn_callbacks.cli.inspect.load", load)
    ran = run("inspect", "model.keras")
    assert (ran.status, ran.err) == (0, "bn-callbacks: note: two lines\n")


def test_debug_shows_the_traceback_before_the_line(run, here):
    ran = run("inspect", torn(5000, 5004)(here), "--debug")
    assert ran.status == 2
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert ran.err.splitlines()[-1].startswith("bn-callbacks: torn.keras ")


def test_an_error_is_one_line_of_bearable_length():
    assert one_line(ValueError("a\n  b.\n")) == "a b."
    assert text_of(ValueError("a. ")) == "a"
    text = one_line(RuntimeError("x" * 5000))
    assert len(text) == LONGEST + 1
    assert text.endswith("x…")


def test_an_unexpected_error_names_its_kind_and_asks_for_debug():
    assert one_line(ZeroDivisionError("by zero")) == (
        "ZeroDivisionError: by zero. Run it again with --debug for a traceback."
    )
    assert one_line(KeyError()).startswith("KeyError. Run it again")


def test_common_errors_say_what_to_do():
    assert one_line(MemoryError()) == "Out of memory. Pass a smaller --batch-size."
    exhausted = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
    assert one_line(exhausted) == (
        "Out of memory: OOM when allocating. Pass a smaller --batch-size."
    )


def test_graphs_of_tensorflow_are_left_out_of_an_error():
    text = (
        "{{function_node f}} corrupted record at 0\n\t [[{{node x}}]] [Op:Next] name: "
    )
    assert one_line(CommandError(text)) == "corrupted record at 0"


@pytest.mark.skipif(not hasattr(ValueError, "add_note"), reason="Python 3.11")
def test_the_notes_of_an_error_are_in_its_line():
    error = ValueError("No.")
    error.add_note("Raised by batch 3.")
    assert one_line(error) == "No. Raised by batch 3."
