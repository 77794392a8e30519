"""Recalibration of random models against a slow reference that shares no code."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from models import batch_norms, cut, lag, seen_in_inference, state, stored
from random_models import Net, build, data, examples, nets
from reference import distance, recalibration

from bn_callbacks import BatchNormWarning, recalibrate

PRECISION = {"mixed_float16": 2.0**-10, "mixed_bfloat16": 2.0**-7}
BASE = 1e-3
"""Error in standard deviations that float32 may leave where the mean is up to 200 of
them, which is the most that the fast kernels are used for."""

SENSITIVITY = 30.0
"""How much more than a perturbation of the reference rounding may do."""


def check_recalibration(net: Net, refine: Any) -> None:
    model, x = build(net), data(net)
    batches = cut(x, net.batch_size)
    passes = 0 if refine == "auto" else refine
    exact = recalibration(model, batches, passes)
    rounding = PRECISION.get(net.policy or "", 1e-6)
    other = recalibration(model, batches, passes, perturbed=rounding)
    old, before = stored(model), state(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        report = recalibrate(
            model, x, batch_size=net.batch_size, refine=refine, verbose=0
        )
    if not report.committed:
        # Not even as near as before: then nothing is touched.
        assert refine == "auto"
        assert report.residual >= max(report.before.max_lag, 1e-3)
        assert state(model) == before
        return
    assert (report.samples, report.batches) == (len(x), len(batches))

    found = batch_norms(model)
    allowed = {
        id(bn): BASE + SENSITIVITY * distance(bn, other[id(bn)], exact[id(bn)])
        for bn in found
        if id(bn) in exact
    }
    if refine == "auto":
        check_residual(model, batches, report.residual, max(allowed.values()))
    for bn, after, start in zip(found, stored(model), old, strict=True):
        if id(bn) not in exact:
            note(f"{bn.name} is frozen or sees nothing")
            assert np.array_equal(after, start)
        elif refine != "auto":
            error = distance(bn, after, exact[id(bn)])
            note(f"{bn.name}: off by {error:.2g}, allowed {allowed[id(bn)]:.2g}")
            assert error <= allowed[id(bn)]

    changed = {key for key, value in state(model).items() if before[key] != value}
    assert all("moving_" in key or "renorm_" in key for key in changed), changed
    report.undo()
    assert state(model) == before


def check_residual(
    model: Any, batches: list[Any], reported: float, allowed: float
) -> None:
    """The residual is what inference leaves, measured apart from the library."""
    found = [bn for bn in batch_norms(model) if bn.trainable]
    pairs = zip(batch_norms(model), seen_in_inference(model, batches), strict=True)
    remains = [
        lag(
            bn, seen, *(np.array(v.value) for v in (bn.moving_mean, bn.moving_variance))
        )
        for bn, seen in pairs
        if bn in found and len(seen)
    ]
    note(f"residual {reported:.2g}, measured {max(remains):.2g}")
    assert abs(max(remains) - reported) <= allowed + 0.05 * reported


@pytest.mark.slow
@examples(4)
@given(nets(), st.sampled_from([0, 1, "auto"]))
def test_a_few_random_models(net: Net, refine: Any) -> None:
    check_recalibration(net, refine)


@pytest.mark.slow
@examples(300)
@given(nets(), st.sampled_from([0, 1, "auto"]))
def test_300_random_models(net: Net, refine: Any) -> None:
    check_recalibration(net, refine)
