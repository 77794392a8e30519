"""What is written is the old file with other moving statistics, and nothing else."""

import hashlib
import io
import zipfile

import cli_kit
import h5py
import keras
import numpy as np
import pytest

from bn_callbacks.cli import models, patching
from bn_callbacks.cli.errors import CommandError
from bn_callbacks.layers import steps_made

KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
X = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")


def contents(path):
    """Each array of a saved model, as bytes; and each other member of the archive."""
    arrays, members = {}, {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            data = archive.read(member)
            if member.filename != "model.weights.h5":
                members[member.filename, member.date_time, member.external_attr] = data
        weights = archive.read("model.weights.h5")
    with h5py.File(io.BytesIO(weights)) as file:
        file.visititems(
            lambda name, item: (
                arrays.update({name: (item.dtype.str, item[...].tobytes())})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return arrays, members, weights


def assert_only_statistics_change(old, new, count):
    """`count` arrays of the file are others; all bytes around them are the same."""
    arrays, members, weights = contents(old)
    arrays_now, members_now, weights_now = contents(new)
    assert members_now == members
    assert list(arrays_now) == list(arrays)
    changed = [name for name in arrays if arrays[name] != arrays_now[name]]
    assert len(changed) == count, changed
    assert not any("optimizer" in name for name in changed)
    # Where the arrays have no bytes, nothing may differ.
    touched = np.frombuffer(weights, "u1") != np.frombuffer(weights_now, "u1")
    assert len(weights) == len(weights_now)
    assert touched.sum() <= sum(len(arrays[name][1]) for name in changed)


def stack(**policy):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, **policy),
            layers.BatchNormalization(name="one", **policy),
            layers.Dropout(0.3),
            layers.Dense(6, **policy),
            layers.BatchNormalization(name="two", scale=False, **policy),
            layers.Dense(1, dtype="float32"),
        ]
    )


@keras.saving.register_keras_serializable("test_patching")
class Own(keras.Model):
    """A model of the user's own, with an inner one and with a list of layers."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.inner = keras.Sequential(
            [keras.layers.Dense(6), keras.layers.BatchNormalization()]
        )
        self.norms = [keras.layers.BatchNormalization() for _ in range(2)]
        self.head = keras.layers.Dense(1)

    def call(self, x, training=None):
        x = self.inner(x, training=training)
        for norm in self.norms:
            x = norm(x, training=training)
        return self.head(x)


def nested():
    inner = stack()
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(inner(inputs))
    shared = keras.layers.BatchNormalization()
    x = keras.layers.ReLU()(shared(x))
    if KERAS >= (3, 1):  # Which cannot load what calls a layer twice.
        x = shared(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def in_policy(name, make=stack):
    def made():
        keras.mixed_precision.set_dtype_policy(name)
        try:
            return make()
        finally:
            keras.mixed_precision.set_dtype_policy("float32")

    return made


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "ema": lambda: keras.optimizers.SGD(0.01, use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "lion": lambda: keras.optimizers.Lion(0.001),
}
MODELS = {
    "float32": stack,
    "mixed_float16": in_policy("mixed_float16"),
    "mixed_bfloat16": in_policy("mixed_bfloat16"),
    "bfloat16": in_policy("bfloat16"),
    "float64": in_policy("float64"),
    "nested": nested,
    "own": Own,
}


def saved(path, make, optimizer, **compilation):
    model = make()
    model.compile(optimizer(), "mse", **compilation)
    model.fit(X, X[:, :1], epochs=2, batch_size=16, verbose=0)
    model.save(path)
    return model


def rewrite(tmp_path, change=lambda values: np.abs(values) + 0.5):
    """Loads, changes all statistics, writes; returns how many arrays were changed."""

    def load(path):
        return models.load(path, None, is_trusted=False)

    source = tmp_path / "old.keras"
    model = load(source)
    statistics = patching.SavedStatistics(source, model, load)
    variables = [v for bn in patching.find(model) for v in bn.variables]
    for variable in variables:
        variable.assign(change(np.array(variable)))
    statistics.write(tmp_path / "new.keras")
    written = load(tmp_path / "new.keras")
    for one, other in zip(
        [*model.weights, *model.optimizer.variables],
        [*written.weights, *written.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    return len(variables)


def check(tmp_path, make, optimizer, **compilation):
    trained = saved(tmp_path / "old.keras", make, optimizer, **compilation)
    digest = hashlib.sha256((tmp_path / "old.keras").read_bytes()).digest()
    count = rewrite(tmp_path)
    assert_only_statistics_change(tmp_path / "old.keras", tmp_path / "new.keras", count)
    assert hashlib.sha256((tmp_path / "old.keras").read_bytes()).digest() == digest
    return trained


@pytest.mark.parametrize("kind", ["mixed_float16", "bfloat16", "own"])
def test_nothing_but_the_statistics_changes(tmp_path, kind):
    check(tmp_path, MODELS[kind], OPTIMIZERS["adam"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_but_the_statistics_changes_whatever_the_model(
    tmp_path, kind, optimizer
):
    check(tmp_path, MODELS[kind], OPTIMIZERS[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "mixed_float16"])
def test_a_model_for_xla(tmp_path, kind):
    check(tmp_path, MODELS[kind], OPTIMIZERS["adam"], jit_compile=True)


def test_a_scaled_loss_keeps_its_optimizer_and_its_steps(run, here):
    trained = saved("model.keras", MODELS["mixed_float16"], OPTIMIZERS["adam"])
    count = len(trained.optimizer.variables)
    command = ("recalibrate", "model.keras", "--data", "train.npz", "--in-place")
    ran = run(*command)
    assert (ran.status, ran.err) == (0, "")
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        written = keras.models.load_model("model.keras")
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    assert len(written.optimizer.variables) == count
    for one, other in zip(
        trained.optimizer.variables, written.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    steps = steps_made(trained)
    assert steps_made(written) == steps > 0
    loaded = models.load("model.keras", None, is_trusted=False)
    assert steps_made(loaded) == steps
    assert keras.mixed_precision.dtype_policy().name == "float32"


def test_marks_that_do_not_fit_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(patching, "_powers", lambda base, count: iter([1, 3, 9, 27]))
    saved(tmp_path / "old.keras", stack, OPTIMIZERS["adam"])
    with pytest.raises(CommandError, match="the copy loads with other values"):
        rewrite(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 128**2, 128**2 + 1, 10**6])
def test_digits_reach_as_far_as_they_must(count):
    units = list(patching._powers(128, count))
    numbers = {tuple(i // unit % 128 for unit in units) for i in (0, count - 1)}
    assert len(numbers) == min(count, 2)
    assert units[-1] * 128 >= count


@keras.saving.register_keras_serializable("test_patching")
class Logarithmic(keras.layers.BatchNormalization):
    """Saves what nobody expects."""

    def save_own_variables(self, store):
        for index, variable in enumerate(self.variables):
            store[str(index)] = np.log1p(np.abs(np.array(variable)))

    def load_own_variables(self, store):
        for index, variable in enumerate(self.variables):
            variable.assign(np.expm1(np.array(store[str(index)])))


def test_statistics_that_are_not_stored_as_they_are_are_refused(fails, here):
    model = keras.Sequential([keras.Input((4,)), Logarithmic(), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(X, X[:, :1], verbose=0)
    model.save("model.keras")
    before = (here / "model.keras").read_bytes()
    line = fails("recalibrate", "model.keras", "--data", "train.npz", "--in-place")
    assert "does not hold the moving statistics as plain arrays" in line
    assert (here / "model.keras").read_bytes() == before


def test_compressed_archives_and_arrays_are_kept_as_they_are(tmp_path):
    """As others may have packed them; with a comment and a member of their own."""
    model = cli_kit.make_model()
    model.save(tmp_path / "plain.keras")
    with zipfile.ZipFile(tmp_path / "plain.keras") as plain:
        weights = tmp_path / "weights.h5"
        weights.write_bytes(plain.read("model.weights.h5"))
        with h5py.File(weights, "r+") as file:
            name = "layers/batch_normalization/vars/3"
            if name not in file:
                (name,) = [n for n in names(file) if n.endswith("bn/vars/3")]
            values = file[name][...]
            del file[name]
            file.create_dataset(name, data=values, chunks=(2,), compression="gzip")
        with zipfile.ZipFile(
            tmp_path / "old.keras", "w", zipfile.ZIP_DEFLATED
        ) as packed:
            packed.comment = b"ours"
            for member in plain.namelist():
                data = plain.read(member)
                if member == "model.weights.h5":
                    data = weights.read_bytes()
                packed.writestr(member, data)
    rewrite(tmp_path)
    old, new = contents(tmp_path / "old.keras"), contents(tmp_path / "new.keras")
    assert old[1] == new[1]
    changed = [name for name in old[0] if old[0][name] != new[0][name]]
    assert [name[-7:] for name in sorted(changed)] == ["/vars/2", "/vars/3"]
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        assert archive.comment == b"ours"
        kinds = {member.compress_type for member in archive.infolist()}
        assert kinds == {zipfile.ZIP_DEFLATED}


def names(file):
    found = []
    file.visit(found.append)
    return found
