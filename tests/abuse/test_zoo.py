"""The networks of keras.applications: each family that has BatchNormalization.

With random parameters and statistics, on 18 images of noise: few values a channel in
deep layers, and nothing that training would have smoothed. The truth is an eager pass
over all data as one batch, in float64 at each layer, as `reference.py` makes it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from models import Array, batch_norms, cut, state

from bn_callbacks import RecalibrationReport, recalibrate
from bn_callbacks.measuring import layer_input, sample
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.statistics.moments import Moments

pytestmark = pytest.mark.slow

LIMIT = 1e-3
"""Residual at most."""


class Kind(NamedTuple):
    """An architecture, and the smallest images that it takes."""

    name: str
    size: int = 32
    is_minimalistic: bool = False


KINDS = {
    "MobileNet": Kind("MobileNet"),
    "MobileNetV2": Kind("MobileNetV2"),
    "MobileNetV3Small": Kind("MobileNetV3Small"),
    "MobileNetV3Large": Kind("MobileNetV3Large"),
    "MobileNetV3Large-minimalistic": Kind("MobileNetV3Large", 32, True),
    "ResNet50": Kind("ResNet50"),
    "ResNet50V2": Kind("ResNet50V2"),
    "ResNet101V2": Kind("ResNet101V2"),
    "Xception": Kind("Xception", 71),
    "InceptionV3": Kind("InceptionV3", 75),
    "InceptionResNetV2": Kind("InceptionResNetV2", 75),
    "DenseNet121": Kind("DenseNet121"),
    "NASNetMobile": Kind("NASNetMobile"),
    "EfficientNetB0": Kind("EfficientNetB0"),
    "EfficientNetV2B0": Kind("EfficientNetV2B0"),
    "EfficientNetV2S": Kind("EfficientNetV2S"),
}

SLOW = {"ResNet101V2", "InceptionResNetV2", "EfficientNetV2S"}
"""Left out where many passes are made; others of their families are in."""


def images(kind: Kind, count: int = 18) -> Array:
    shape = (count, kind.size, kind.size, 3)
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def network(kind: Kind) -> keras.Model:
    """With random weights, gamma, beta and moving statistics."""
    keras.utils.set_random_seed(0)
    shape = (kind.size, kind.size, 3)
    make = getattr(keras.applications, kind.name)
    more = {"minimalistic": True} if kind.is_minimalistic else {}
    model = make(weights=None, input_shape=shape, classes=5, **more)
    draw = np.random.default_rng(1)
    for bn in batch_norms(model):
        size = bn.moving_mean.shape[0]
        if bn.scale:
            bn.gamma.assign(draw.uniform(0.5, 1.5, size))
        if bn.center:
            bn.beta.assign(draw.normal(0, 0.5, size))
        bn.moving_mean.assign(draw.normal(size=size))
        bn.moving_variance.assign(draw.uniform(0.5, 2, size))
    return model


class Subject:
    """A network with its truth; one at a time, since each test leaves it as it was."""

    def __init__(self, name: str) -> None:
        self.kind = KINDS[name]
        self.model = network(self.kind)
        self.x = images(self.kind)
        self.truth = reference.measure(self.model, [self.x])
        self._weights = self.model.get_weights()

    def restore(self) -> None:
        self.model.set_weights(self._weights)


@pytest.fixture(scope="module")
def of_kind(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture
def subject(of_kind: Subject) -> Iterator[Subject]:
    yield of_kind
    of_kind.restore()


def held(model: keras.Model) -> reference.Given:
    """What the layers store."""
    return {
        id(bn): (
            np.asarray(bn.moving_mean.value, np.float64),
            np.asarray(bn.moving_variance.value, np.float64),
        )
        for bn in batch_norms(model)
    }


def distances(
    model: keras.Model, seen: reference.Given, stored: reference.Given
) -> dict[str, float]:
    """The lag of each layer, DESIGN §2: in standard deviations of what is stored."""
    result = {}
    for bn in batch_norms(model):
        (mean, variance), (mean_0, variance_0) = seen[id(bn)], stored[id(bn)]
        sigma = np.sqrt(variance + bn.epsilon)
        sigma_0 = np.sqrt(variance_0 + bn.epsilon)
        squares = ((mean - mean_0) / sigma_0) ** 2 + (sigma / sigma_0 - 1) ** 2
        result[bn.name] = float(np.sqrt(np.mean(squares)))
    return result


def worst(of: dict[str, float]) -> float:
    assert np.isfinite(list(of.values())).all()
    return max(of.values())


def assert_not_worse(model: keras.Model, x: Array, batch_size: int) -> None:
    """Recalibrates: right by a measurement of ours, or nothing has changed."""
    before = state(model)
    report = recalibrate(model, x, batch_size=batch_size, verbose=0)
    if not report.committed:
        assert state(model) == before
        return
    assert_right(report)
    stored = held(model)
    seen = reference.measure(model, cut(x, batch_size), stored)
    assert worst(distances(model, seen, stored)) <= 1.2 * LIMIT
    # A sample of a third of pure noise may fail; then one layer follows the other.
    assert report.passes <= len(batch_norms(model)) + 10


def assert_right(report: RecalibrationReport) -> None:
    assert report.committed
    assert report.residual is not None
    assert report.residual <= LIMIT


def a_batch_is_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MEMORY", 0)


def every_kind_but(left_out: set[str]) -> pytest.MarkDecorator:
    names = [name for name in KINDS if name not in left_out]
    return pytest.mark.parametrize("of_kind", names, indirect=True)


@every_kind_but(set())
def test_every_layer_is_as_in_one_batch_of_all_data(subject: Subject) -> None:
    report = recalibrate(subject.model, subject.x, batch_size=6, verbose=0)
    assert_right(report)
    assert report.passes == 1
    found = distances(subject.model, subject.truth, held(subject.model))
    assert worst(found) <= 5e-3, found


@every_kind_but(SLOW)
def test_a_third_as_the_sample_is_enough(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_batch_is_the_sample(monkeypatch)
    assert_not_worse(subject.model, subject.x, batch_size=6)


@pytest.mark.parametrize(
    "of_kind", ["MobileNetV3Large", "ResNet50", "MobileNet"], indirect=True
)
def test_a_quarter_of_more_images_as_the_sample(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_batch_is_the_sample(monkeypatch)
    assert_not_worse(subject.model, images(subject.kind, 256), batch_size=64)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 1e-7 σ in whatever is measured or normalised with, anew each time."""
    size = 1e-7
    draw = np.random.default_rng(2)
    moments, mixed = Population._moments, layer_input.LayerInput._mixed

    def rough(self: Any, *arguments: Any, **options: Any) -> list[Moments]:
        result = []
        for one in moments(self, *arguments, **options):
            sigma = np.sqrt(one.variance)
            mean = one.mean + size * sigma * draw.normal(size=sigma.shape)
            factor = 1 + 2 * size * draw.normal(size=sigma.shape)
            result.append(Moments(one.count, mean, one.m2 * factor))
        return result

    def unsteady(self: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        mean, variance = mixed(self, *arguments, **options)
        noise = size * tf.random.normal((2, self.bn.channels))
        deviation = tf.cast(noise, mean.dtype)
        mean += deviation[0] * tf.sqrt(tf.maximum(variance, 0))
        return mean, variance * (1 + 2 * deviation[1])

    monkeypatch.setattr(Population, "_moments", rough)
    monkeypatch.setattr(layer_input.LayerInput, "_mixed", unsteady)


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("is_all", [True, False], ids=["all", "third"])
@pytest.mark.parametrize("name", ["MobileNetV3Large", "ResNet50", "EfficientNetV2B0"])
def test_noise_of_a_gpu_does_not_grow(
    name: str, is_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model of its own: the noise is traced with it.
    fresh = Subject(name)
    if is_all:
        report = recalibrate(fresh.model, fresh.x, batch_size=6, verbose=0)
        assert_right(report)
        assert worst(distances(fresh.model, fresh.truth, held(fresh.model))) <= 5e-3
        return
    a_batch_is_the_sample(monkeypatch)
    assert_not_worse(fresh.model, fresh.x, batch_size=6)


def test_the_noise_is_there(noisy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["MobileNet"]
    once, again = network(kind), network(kind)
    for model in (once, again):
        recalibrate(model, images(kind), batch_size=6, verbose=0)
    between = distances(once, held(once), by_place(held(again), once))
    assert 1e-8 < worst(between) < 1e-4


def by_place(of_another: reference.Given, model: keras.Model) -> reference.Given:
    pairs = zip(batch_norms(model), of_another.values(), strict=True)
    return {id(bn): values for bn, values in pairs}
