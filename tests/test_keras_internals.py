"""Each internal of Keras that the library touches; a failure says which has changed.

`INTERNALS` names the test of each. A new one without a test is found by the first test.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    KERAS,
    batch_norms,
    compiled,
    dense,
    layers,
    normal,
    scatter,
    single,
    state,
    stored,
    unchanged,
)

import bn_callbacks
from bn_callbacks.layers import (
    LossMetric,
    compute_loss,
    count_inputs,
    find,
    forward,
    is_trainable_stale,
    pinned_in_graph,
    stateless,
    strategy,
    structure_of,
)

BN = layers.BatchNormalization
X = normal(32, 6)
PACKAGE = Path(bn_callbacks.__file__).parent

INTERNALS = {
    "_call_context_args": "test_using_a_model_still_changes_nothing_that_counts",
    "_called": "test_using_a_model_still_changes_nothing_that_counts",
    "_eval_epoch_iterator": "test_using_a_model_still_changes_nothing_that_counts",
    "_loss_ids": "test_using_a_model_still_changes_nothing_that_counts",
    "_losses": "test_using_a_model_still_changes_nothing_that_counts",
    "_build_shapes_dict": "test_a_built_subclass_still_keeps_the_shapes",
    "_call_has_training_arg": "test_keras_still_says_whether_call_takes_training",
    "_compiled_trainable_state": "test_compile_still_notes_what_is_trainable",
    "_distribute_strategy": "test_models_still_know_their_strategy",
    "_flatten_layers": "test_keras_still_flattens_layers_of_every_container",
    "_functional": "test_models_still_standardize_their_inputs",
    "_iterations": "test_optimizers_still_count_their_steps",
    "_layers": "test_layers_still_hold_their_children_in_layers",
    "_moments": "test_batch_normalization_still_takes_its_statistics_from_moments",
    "_nodes_by_depth": "test_functional_models_still_have_nodes_with_operations",
    "_standardize_inputs": "test_models_still_standardize_their_inputs",
    "_trainable": "test_batch_normalization_still_looks_at_trainable_when_called",
    "unscale_loss_for_distribution": "test_losses_are_still_scaled_for_replicas",
    # Public in name, but nobody promises them.
    "arguments": "test_nodes_still_keep_the_arguments_of_their_call",
    "count": "test_the_loss_metric_still_counts_examples",
    "get_build_config": "test_time_distributed_still_knows_its_steps",
    "inner_loop": "test_recurrent_layers_still_run_their_loop_in_inner_loop",
    "inner_optimizer": "test_loss_scaling_still_wraps_an_optimizer",
    "moving_stddev": "test_renormalisation_still_has_three_more_variables",
    "operation": "test_functional_models_still_have_nodes_with_operations",
    "renorm_mean": "test_renormalisation_still_has_three_more_variables",
    "renorm_stddev": "test_renormalisation_still_has_three_more_variables",
    "seed_generator_state": "test_seed_generators_still_keep_a_state_of_two_numbers",
}


def touched(source: str) -> set[str]:
    """Private attributes of others, by name or in a string, and private imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            if ast.unparse(node.value) not in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\A_[a-z_]+\Z", node.value))
    # What is reached through a private module is looked up in it by name.
    if "keras.src" in source:
        found |= set(re.findall(r'getattr\(_\w+, "(\w+)"', source))
    return found


def test_each_internal_has_a_test() -> None:
    used: set[str] = set()
    for path in sorted((PACKAGE / "layers").glob("*.py")):
        used |= touched(path.read_text("utf-8"))
    assert used - set(INTERNALS) == set(), "new: write a test, and name it in INTERNALS"
    private = {name for name in INTERNALS if name.startswith("_")}
    assert private - used == set(), "no longer used: take it out of INTERNALS"
    tests = [name for name in globals() if name.startswith("test_")]
    for internal, test in INTERNALS.items():
        assert any(name.startswith(test) for name in tests), internal


@pytest.mark.parametrize(
    "source",
    [
        "layer._build()",
        "vars(layer)['_build']",
        "getattr(x, '_build')",
        "a.b._build = 1",
    ],
)
def test_an_internal_is_found(source: str) -> None:
    assert touched(source) == {"_build"}


def test_our_own_attributes_are_no_internals() -> None:
    assert touched("self._build(); x.__dict__; x.build; '_ text'") == set()


def test_keras_still_flattens_layers_of_every_container() -> None:
    class Holder(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.many, self.named = BN(), [BN()], {"a": BN()}

    found = Holder()._flatten_layers()
    count = sum(isinstance(layer, BN) for layer in found)
    assert count == 3, "Layer._flatten_layers no longer finds layers in containers"


def test_keras_still_says_whether_call_takes_training() -> None:
    class Without(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x

    assert dense()._call_has_training_arg is True, "Layer._call_has_training_arg"
    assert Without()._call_has_training_arg is False, "Layer._call_has_training_arg"


def test_batch_normalization_still_takes_its_statistics_from_moments() -> None:
    model = single(6)
    (bn,) = batch_norms(model)
    vars(bn)["_moments"] = lambda x, mask: (tf.fill([6], 2.0), tf.fill([6], 0.25))
    outputs = model(X, training=True)
    np.testing.assert_allclose(
        outputs,
        (X - 2) / np.sqrt(0.25 + bn.epsilon),
        rtol=1e-4,
        err_msg="BatchNormalization.call no longer normalises with self._moments",
    )


def test_batch_normalization_still_looks_at_trainable_when_called() -> None:
    model = single(6)
    (bn,) = batch_norms(model)
    assert "_trainable" in vars(bn), "Layer.trainable no longer reads Layer._trainable"
    vars(bn)["_trainable"] = False
    model(X, training=True)
    assert not np.any(stored(model)[0][0]), "a frozen layer updates its averages"


def test_keras_still_calls_what_an_instance_has_for_call() -> None:
    layer = layers.Dense(2)
    layer(X)
    vars(layer)["call"] = lambda inputs: inputs
    np.testing.assert_array_equal(layer(X), X, err_msg="Layer.__call__ and self.call")


def test_functional_models_still_have_nodes_with_operations() -> None:
    inputs = keras.Input((6,))
    shared = BN()
    model = keras.Model(inputs, shared(shared(inputs)))
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth]
    used = [node.operation for node in nodes].count(shared)
    assert used == 2, "Function._nodes_by_depth or Node.operation"


def test_models_still_standardize_their_inputs() -> None:
    for model in (dense(), keras.Model(inputs := keras.Input((6,)), BN()(inputs))):
        graph = getattr(model, "_functional", model)
        (standardized,) = graph._standardize_inputs(tf.cast(X, tf.float64))
        assert standardized.dtype == "float32", "Functional._standardize_inputs"


def test_layers_still_hold_their_children_in_layers() -> None:
    class Holder(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.child = BN()

    holder = Holder()
    assert holder._layers == [holder.child], "Layer._layers"


def test_optimizers_still_count_their_steps() -> None:
    model = compiled(dense(1))
    optimizer = model.optimizer
    counter = getattr(optimizer, "_iterations", optimizer.iterations)
    model.train_on_batch(X, X[:, :1])
    assert int(counter.value) == 1, "Optimizer._iterations"


def test_a_built_subclass_still_keeps_the_shapes_it_was_built_for() -> None:
    class One(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs + 1

    model = One()
    model(X)
    assert count_inputs(model) in (1, None), "Layer._build_shapes_dict"


def test_recurrent_layers_still_run_their_loop_in_inner_loop() -> None:
    layer = layers.SimpleRNN(2)
    called = []
    own = layer.inner_loop

    def inner_loop(*args: Any, **kwargs: Any) -> Any:
        called.append(args)
        return own(*args, **kwargs)

    vars(layer)["inner_loop"] = inner_loop
    layer(normal(4, 3, 2))
    assert called, "RNN.call no longer calls self.inner_loop"


def test_seed_generators_still_keep_a_state_of_two_numbers_among_the_variables() -> (
    None
):
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, seed=1)])
    seeds = [v for v in model.variables if v.name == "seed_generator_state"]
    assert [tuple(seed.shape) for seed in seeds] == [(2,)], "SeedGenerator.state"


def test_a_stateless_scope_still_keeps_variables_and_what_moves_in_it() -> None:
    model = scatter(dense(2))
    with unchanged(model), stateless(model):
        forward(model, X, training=True)
    before = state(model)
    forward(model, X, training=True)
    assert state(model) != before, "a training call outside the scope moves averages"


def test_a_stateless_scope_still_maps_variables_to_tensors() -> None:
    model = single(6)
    (bn,) = batch_norms(model)
    given = tf.fill([6], 5.0)
    with keras.StatelessScope([(bn.moving_mean, given)]):
        inside = np.asarray(keras.ops.cast(bn.moving_mean, "float32"))
        outputs = np.asarray(model(X))
    np.testing.assert_array_equal(inside, given)
    np.testing.assert_allclose(outputs, (X - 5) / np.sqrt(1 + bn.epsilon), rtol=1e-4)


def test_a_stateless_scope_still_collects_losses() -> None:
    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(keras.ops.sum(x))
            return x

    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(1, kernel_regularizer="l2"), Penalty()]
    )
    compiled(model)
    y = np.zeros((32, 1), "float32")
    expected = model.evaluate(X, y, verbose=0, return_dict=True)["loss"]
    with stateless(model):
        outputs = forward(model, X, training=False)
        loss = compute_loss(model, (X, tf.constant(y), None), outputs)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_compile_still_notes_what_is_trainable() -> None:
    model = compiled(dense(1))
    (bn,) = find(model)
    assert not is_trainable_stale(model, bn)
    if not hasattr(model, "_compiled_trainable_state"):
        assert KERAS < (3, 1), "Trainer._compiled_trainable_state"
        return
    bn.layer.trainable = False
    assert is_trainable_stale(model, bn), "Trainer._compiled_trainable_state"


def test_nodes_still_keep_the_arguments_of_their_call() -> None:
    inputs, bn = keras.Input((6,)), BN()
    model = keras.Model(inputs, bn(inputs, training=False))
    assert pinned_in_graph(model) == {id(bn)}, "Node.arguments.kwargs"


@pytest.mark.skipif(KERAS < (3, 3), reason="this Keras counts batches, which we know")
def test_the_loss_metric_still_counts_examples() -> None:
    model = compiled(dense(1))
    for size in (32, 5):
        model.train_on_batch(X[:size], X[:size, :1])
        assert LossMetric(model).examples() == size, "the count of Keras' metric `loss`"
        model.reset_metrics()


def test_time_distributed_still_knows_its_steps() -> None:
    model = keras.Sequential([keras.Input((4, 6)), layers.TimeDistributed(BN())])
    assert [bn.calls for bn in find(model)] == [4], "TimeDistributed.get_build_config"


def test_loss_scaling_still_wraps_an_optimizer() -> None:
    inner = keras.optimizers.SGD()
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    assert scaled.inner_optimizer is inner, "LossScaleOptimizer.inner_optimizer"


@pytest.mark.skipif(KERAS < (3, 13), reason="this Keras does not renormalise")
def test_renormalisation_still_has_three_more_variables() -> None:
    model = single(6, renorm=True)
    (bn,) = batch_norms(model)
    model(X, training=True)
    for name in ("moving_stddev", "renorm_mean", "renorm_stddev"):
        assert np.any(getattr(bn, name) != 0), f"BatchNormalization.{name}"
    names = {variable.name for variable in bn.non_trainable_variables}
    known = {"moving_mean", "moving_variance", "moving_stddev"}
    assert names == known | {"renorm_mean", "renorm_stddev"}


def test_losses_are_still_scaled_for_replicas() -> None:
    losses = pytest.importorskip("keras.src.losses.loss", reason="as an old Keras")
    if not hasattr(losses, "unscale_loss_for_distribution"):
        assert not hasattr(losses, "scale_loss_for_distribution"), "loss scaling"
        return
    value = losses.unscale_loss_for_distribution(
        losses.scale_loss_for_distribution(tf.constant(3.0))
    )
    assert float(value) == 3.0, "unscale_loss_for_distribution"


def test_batch_normalization_still_has_no_other_state() -> None:
    """What training changes in a layer is what `assign` writes, and nothing else."""
    model = single(6)
    names = [
        variable.name for variable in batch_norms(model)[0].non_trainable_variables
    ]
    assert names == ["moving_mean", "moving_variance"]


def test_batch_normalization_still_takes_what_we_pass_on() -> None:
    parameters = list(inspect.signature(BN.call).parameters)
    assert parameters == ["self", "inputs", "training", "mask"]
    assert list(inspect.signature(BN._moments).parameters) == ["self", "inputs", "mask"]


def test_moving_averages_still_move_as_they_are_inverted() -> None:
    """`moving = momentum·moving + (1 − momentum)·batch`, with the biased variance."""
    model = single(6, momentum=0.75)
    model(X, training=True)
    mean, variance = stored(model)[0]
    np.testing.assert_allclose(mean, 0.25 * X.mean(0), rtol=1e-4)
    np.testing.assert_allclose(variance, 0.75 + 0.25 * X.var(0), rtol=1e-4)


def test_callbacks_still_begin_a_batch_before_it_is_trained_on() -> None:
    """The monitor reads there: whatever was dispatched before has been counted."""
    model, seen = compiled(dense(1)), []

    class Reads(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            seen.append((batch, int(self.model.optimizer.iterations.numpy())))

    model.fit(X, X[:, :1], batch_size=8, verbose=0, callbacks=[Reads()])
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)], "Callback.on_train_batch_begin"


def test_fit_still_announces_steps_and_epochs() -> None:
    given: dict[str, Any] = {}

    class Reads(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            given.update(self.params)

    model = compiled(dense(1))
    model.fit(X, X[:, :1], batch_size=8, epochs=2, verbose=0, callbacks=[Reads()])
    assert (given["steps"], given["epochs"]) == (4, 2), "Callback.params"


def test_models_still_know_their_strategy() -> None:
    """A model still notes the strategy in whose scope it was made."""
    here = tf.distribute.MirroredStrategy(["CPU:0"])
    with here.scope():
        inside = dense(1)
    assert strategy(inside) is here, "TensorFlowTrainer._distribute_strategy"
    assert strategy(dense(1)) is None, "TensorFlowTrainer._distribute_strategy"


def test_using_a_model_still_changes_nothing_that_counts() -> None:
    model = compiled(dense(2))
    before = structure_of(model)
    model(X)
    model.predict(X, verbose=0)
    model.fit(X, X[:, :1], validation_data=(X, X[:, :1]), verbose=0)
    model.evaluate(X, X[:, :1], verbose=0)
    assert structure_of(model) == before


def test_fit_still_validates_by_the_models_own_evaluate() -> None:
    model, calls = compiled(dense(1)), []
    own = model.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(*args, **kwargs)

    vars(model)["evaluate"] = evaluate
    y = normal(32, 1)
    model.fit(X, y, validation_data=(X, y), epochs=2, verbose=0)
    assert len(calls) == 2
