"""The advice of each message, taken literally: does the loss fall?

A case is trained as it is, and its message read: every remedy offered is followed in a
training of its own, and has to lower the loss in inference mode on the second half
of the probe. The statistics are recalibrated over the first half.
"""

import re
from collections.abc import Callable
from typing import Any

import kit
import pytest
from cases import CASES
from kit import Case, Listening, Run

from bn_callbacks import DebiasBatchNorm, recalibrate
from bn_callbacks.layers import find

pytestmark = pytest.mark.slow

BY_NAME = {case.name: case for case in CASES}

FOLLOWED = [
    "short_regression",
    "two_views_of_raw_rows",
    "like_steps_in_a_short_run",
    "start_far_from_unscaled_inputs",
    "memory_longer_than_progress",
    "short_memory_of_few_pictures",
    "last_batch_of_one_example",
    "one_session_a_batch",
    "two_datasets_in_turn",
    "batch_of_one",
    "optimizer_ema",
    "momentum_one",
    "bfloat16",
    "backbone_frozen_without_compile",
    "an_absurd_value",
]


def halves(data: Any) -> tuple[Any, Any]:
    """The first and the second half of `(x, y)`."""
    half = len(data[1]) // 2
    return tuple(part[:half] for part in data), tuple(part[half:] for part in data)  # type: ignore[return-value]


def loss(run: Run) -> float:
    """In inference mode, on the half that nothing was measured on; no penalties."""
    _, held_out = halves(run.probe)
    found = run.model.evaluate(*held_out, verbose=0, return_dict=True)["loss"]
    return float(found) - float(sum(run.model.losses))


def trained(case: Case, change: Callable[[Run], dict[str, Any]]) -> Run:
    """A case, trained as the advice has it."""
    made = kit.build(case)
    arguments = change(made)
    callbacks = arguments.pop("callbacks", [])
    made.fit(callbacks, **arguments)
    return made


def with_momentum(value: float) -> Callable[[Run], dict[str, Any]]:
    def change(run: Run) -> dict[str, Any]:
        for bn in find(run.model):
            bn.layer.momentum = value
        return {}

    return change


def compiled_anew(run: Run) -> dict[str, Any]:
    model = run.model
    model.compile(model.optimizer, model.loss, jit_compile=False)
    return {}


def remedies(message: str, case: Case) -> dict[str, Callable[[], Run]]:
    """What the message offers, as trainings to be made."""
    found: dict[str, Callable[[], Run]] = {}
    message = message.partition("Likely cause: ")[2]
    momentum = re.search(r"[Ss]et momentum=([0-9.]*[0-9])", message)
    if momentum:
        value = float(momentum[1])
        assert value >= 0.5
        found["momentum"] = lambda: trained(case, with_momentum(value))
    if "`DebiasBatchNorm`" in message:
        found["debias"] = lambda: trained(
            case, lambda run: {"callbacks": [DebiasBatchNorm()]}
        )
    if "Shuffle the examples" in message:
        found["shuffle"] = lambda: trained(case, lambda run: {"shuffle": True})
    if "larger batches" in message:
        size = {"batch_size": 32 if case.expected == "tiny_batch" else 64}
        found["larger batches"] = lambda: trained(case, lambda run: dict(size))
    if "then `compile`" in message:
        found["compile"] = lambda: trained(case, compiled_anew)
    is_cure = "ecalibrate" in message and not re.search(
        "Do not recalibrate|cannot repair|in part at best", message
    )
    if is_cure:

        def recalibrated() -> Run:
            made = trained(case, lambda run: {})
            recalibrate(made.model, halves(made.probe)[0][0], verbose=0)
            return made

        found["recalibrate"] = recalibrated
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_each_remedy_lowers_the_loss(name: str) -> None:
    case = BY_NAME[name]
    made = kit.build(case)
    monitor = Listening(probe=made.probe)
    made.fit([monitor])
    before = loss(made)
    message = monitor.messages[-1]
    assert f"cause: {case.expected}" in message
    offered = remedies(message, case)
    assert offered, message
    after = {remedy: loss(train()) for remedy, train in offered.items()}
    # A loss that is no number is lower than none.
    worse = {remedy: value for remedy, value in after.items() if value >= before}
    assert not worse, (before, after, message)


def test_every_cause_with_a_remedy_in_training_is_followed() -> None:
    followed = {BY_NAME[name].expected for name in FOLLOWED}
    assert followed >= {
        "warming_up", "drifting", "noisy", "tiny_batch", "correlated_batches",
        "weights_replaced", "not_updating", "low_precision", "unexpected_update",
        "non_finite",
    }  # fmt: skip
