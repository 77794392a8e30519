"""`prior="stored"`: recalibration with a handful of examples."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import KERAS, compiled, conv, dense, normal, rng, state

import bn_callbacks as bn
from bn_callbacks.layers import find, read, restore, snapshot

layers = keras.layers


@pytest.fixture(scope="module")
def data():
    x = normal(2048, 6)
    return x, np.abs(x[:, :1])


@pytest.fixture(scope="module")
def once(data):
    """Trained a little, and right for its data."""
    keras.utils.set_random_seed(0)
    model = compiled(dense(3, width=32))
    model.fit(*data, batch_size=128, epochs=2, verbose=0)
    bn.recalibrate(model, data[0], verbose=0)
    return model


@pytest.fixture
def trained(once):
    """The same for each test, which may write its statistics."""
    saved = snapshot(find(once))
    yield once
    restore(saved)


def few(model, x, **arguments):
    return bn.recalibrate(model, x, prior="stored", verbose=0, **arguments)


def lags(model, x):
    return bn.audit(model, x).residual


def test_a_healthy_model_is_left_almost_alone(trained, data):
    plain, with_prior = [], []
    for draw in range(4):
        x = data[0][rng(draw).choice(2048, 8, replace=False)]
        for results, prior in ((plain, None), (with_prior, "stored")):
            report = bn.recalibrate(trained, x, prior=prior, verbose=0)
            results.append(lags(trained, data[0]))
            report.undo()
    assert np.mean(with_prior) < 0.25 * np.mean(plain)


def test_start_values_are_found_and_taken_out(trained, data):
    weight = 0.5
    for layer in find(trained):
        mean, variance = layer.averages
        mean.assign(mean * (1 - weight))
        variance.assign(variance * (1 - weight) + weight)
    report = few(trained, data[0][:16])
    assert report.committed
    for each in report.shrinkage:
        assert each.start_weight == pytest.approx(weight, abs=0.12)
    assert "of start values taken out" in str(report)
    assert lags(trained, data[0]) < 0.5 * report.before.max_lag


def test_it_beats_plain_recalibration_on_shifted_data(trained, data):
    x = 1.5 * data[0] + 2
    old = state(trained)
    report = few(trained, x[:16])
    ours = lags(trained, x)
    assert state(trained) != old
    report.undo()
    assert state(trained) == old
    bn.recalibrate(trained, x[:16], verbose=0)
    assert ours < lags(trained, x) < report.before.max_lag


def test_with_more_than_enough_examples_it_is_plain_recalibration(data):
    model = compiled(dense(2))
    report = few(model, data[0])
    assert report.shrinkage == ()
    ours = read(find(model))
    report.undo()
    bn.recalibrate(model, data[0], verbose=0)
    for one, other in zip(ours, read(find(model)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_with_a_thousand_examples_it_is_nearly_that(data):
    model = compiled(dense(2))
    report = few(model, data[0][:1000])
    assert all(each.error < 0.06 for each in report.shrinkage)
    report.undo()
    bn.recalibrate(model, data[0][:1000], verbose=0)
    plain = lags(model, data[0])
    report = few(model, data[0][:1000])
    assert lags(model, data[0]) < max(1.5 * plain, 0.08)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_examples_are_an_error(trained, data, count):
    old = state(trained)
    with pytest.raises(ValueError, match=f"Received: examples: {count}.*at least 3"):
        few(trained, data[0][:count])
    assert state(trained) == old


def test_three_are_enough_to_run(trained, data):
    assert few(trained, data[0][:3]).samples == 3


def test_pixels_are_no_examples():
    """A convolution's error is judged by images, not by how many pixels they have."""
    model = keras.Sequential([keras.Input((8, 8, 2)), layers.BatchNormalization()])
    flat = rng(0).normal(size=(16, 1, 1, 2))
    x = np.broadcast_to(flat, (16, 8, 8, 2)) + 1e-3 * rng(1).normal(size=(16, 8, 8, 2))
    report = few(model, x.astype("float32"))
    assert report.shrinkage[0].error > 0.2
    single = keras.Sequential([keras.Input((2,)), layers.BatchNormalization()])
    other = few(single, x[:, 0, 0].astype("float32"))
    assert report.shrinkage[0].error == pytest.approx(other.shrinkage[0].error, rel=0.1)


def test_data_of_every_kind_give_the_same(trained, data):
    x = data[0][:12]
    results = []
    for source in (
        x,
        tf.data.Dataset.from_tensor_slices(x).batch(5),
        iter([x[:7], x[7:]]),
    ):
        report = few(trained, source)
        assert report.samples == 12
        results.append(np.concatenate([np.ravel(each) for each in read(find(trained))]))
        report.undo()
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-5)


def test_convolutions_shared_layers_and_loops(data):
    shared = layers.BatchNormalization()
    inputs = [keras.Input((6,)), keras.Input((6,))]
    twice = keras.Model(inputs, layers.Add()([shared(each) for each in inputs]))
    over_time = keras.Sequential(
        [keras.Input((5, 6)), layers.TimeDistributed(layers.BatchNormalization())]
    )
    for model, x in (
        (conv(), normal(10, *conv().input_shape[1:])),
        (twice, [data[0][:10], data[0][10:20] + 3]),
        (over_time, normal(10, 5, 6)),
    ):
        report = few(model, x)
        assert report.committed
        assert len(report.shrinkage) == len(find(model))
        assert all(0 <= each.share <= 1 for each in report.shrinkage)


@pytest.mark.skipif(KERAS < (3, 3), reason="Keras before 3.3 ignores the size")
def test_a_model_of_a_fixed_batch_size_takes_batches_for_examples(data):
    model = keras.Sequential(
        [keras.Input(batch_shape=(4, 6)), layers.BatchNormalization()]
    )
    assert few(model, data[0][:16], batch_size=4).batches == 4
    with pytest.raises(ValueError, match="batches of a model that divides none: 2"):
        few(model, data[0][:8], batch_size=4)


def test_validation_decides_here_too(trained, data):
    wrong = data[0][:8] * 40
    report = few(trained, wrong, validation_data=(data[0][:256], data[1][:256]))
    assert not report.committed
    assert report.loss_after > report.loss_before


def test_a_broken_prior_is_replaced_by_the_sample(data):
    model = compiled(dense(1))
    model.layers[1].moving_mean.assign(np.full(8, np.nan))
    report = few(model, data[0][:64])
    assert report.shrinkage[0].share == 1.0
    assert lags(model, data[0]) < 0.4


def test_report_is_json_and_says_where_statistics_are_from(trained, data):
    report = few(trained, data[0][:8])
    told = json.loads(json.dumps(report.to_dict()))
    assert {"path", "start_weight", "scale", "share", "error"} == set(
        told["shrinkage"][0]
    )
    assert "from what was stored to the new statistics:" in str(report)


def test_nothing_is_said_of_plain_recalibration(trained, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bn.recalibrate(trained, data[0][:64], verbose=0)
    assert "from what was stored" not in str(report)


@pytest.mark.parametrize("prior", ["start", True, 16, np.ones(3)])
def test_another_prior_is_refused(trained, data, prior):
    with pytest.raises(
        ValueError, match=r"`prior` must be None or 'stored'\. Received"
    ):
        bn.recalibrate(trained, data[0], prior=prior, verbose=0)


@pytest.mark.parametrize(
    ("others", "received"),
    [
        ({"refine": 0}, "refine=0"),
        ({"tolerance": 0.01}, r"tolerance=0\.01"),
        ({"refine": 2, "tolerance": 0.01}, r"refine=2 and tolerance=0\.01"),
    ],
)
def test_prior_goes_with_nothing_else_that_decides(trained, data, others, received):
    message = (
        r"^`prior` cannot be combined with `refine` or `tolerance`: .* Received: "
        rf"prior='stored' with {received}\. Leave out `prior`, or all others\.$"
    )
    with pytest.raises(ValueError, match=message):
        few(trained, data[0], **others)
