"""When a finding deserves a word."""

import dataclasses

import pytest

from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.watching.warning_filter import CLEAR, PATIENCE, WORSE, WarningFilter

SICK = LayerReport("bn", cause="outliers", lag=1.0, advice="Clean the data.")


def look(
    warning_filter: WarningFilter, *layers: LayerReport, steps_left: int | None = 100
) -> list[str]:
    return warning_filter.messages(BatchNormReport(layers), steps_left)


def said(warning_filter: WarningFilter, *layers: LayerReport) -> list[str]:
    """What two looks say that find the same."""
    return look(warning_filter, *layers) + look(warning_filter, *layers)


def of(lag: float | None, path: str = "bn", cause: str = "outliers") -> LayerReport:
    return dataclasses.replace(SICK, path=path, lag=lag, cause=cause)


def test_a_finding_is_said_once_and_again_when_it_has_worsened() -> None:
    warning_filter = WarningFilter(threshold=0.2)
    assert len(said(warning_filter, of(1.0))) == 1
    for lag in (1.0, 0.5, 0.99 * WORSE):
        assert said(warning_filter, of(lag)) == []
    (again,) = said(warning_filter, of(1.01 * WORSE))
    assert f"{1.01 * WORSE:.2f} standard deviations" in again
    # From now on it is that which must be exceeded.
    assert said(warning_filter, of(1.5 * WORSE)) == []


def test_layers_are_grouped_by_cause_and_causes_are_apart() -> None:
    warning_filter = WarningFilter(threshold=0.2)
    first, second = said(
        warning_filter,
        of(1.0),
        of(3.0, "worse"),
        of(2.0, "sorted", "correlated_batches"),
    )
    assert first.startswith("2 of 3 BatchNormalization layers lag, worst worse by 3.00")
    assert "correlated_batches" in second


@pytest.mark.parametrize("lag", [None, 0.0, float("nan")])
def test_what_has_no_size_cannot_worsen(lag: float | None) -> None:
    warning_filter = WarningFilter(threshold=0.2)
    assert len(said(warning_filter, of(lag))) == 1
    assert said(warning_filter, of(lag)) == []


def test_one_look_is_chance_and_the_next_one_confirms_it() -> None:
    warning_filter = WarningFilter(threshold=0.2)
    assert look(warning_filter, of(1.0)) == []
    assert look(warning_filter, of(0.1, cause="healthy")) == []
    assert look(warning_filter, of(1.0)) == []
    assert len(look(warning_filter, of(1.0))) == 1


@pytest.mark.parametrize("cause", ["non_finite", "inference_mode", "not_updating"])
def test_facts_and_the_end_need_no_second_look(cause: str) -> None:
    assert len(look(WarningFilter(threshold=0.2), of(None, cause=cause))) == 1
    assert len(look(WarningFilter(threshold=0.2), of(1.0), steps_left=0)) == 1


def test_after_a_healthy_training_the_last_look_has_to_be_clear() -> None:
    def last(lag: float, inference: float | None = None) -> list[str]:
        warning_filter = WarningFilter(threshold=0.2)
        for _ in range(3):
            assert look(warning_filter, of(0.1, cause="healthy")) == []
        losses = {} if inference is None else {
            "loss_batch": 1.0, "loss_inference": inference, "loss_recalibrated": 1.0
        }  # fmt: skip
        report = BatchNormReport((of(lag, cause="stale"),), **losses)
        return warning_filter.messages(report, steps_left=0)

    assert last(0.3) == []
    assert last(9.0, inference=1.5) == []
    assert last(CLEAR * 0.2 - 0.01) == []
    assert len(last(CLEAR * 0.2 + 0.01)) == 1
    assert last(9.0, inference=CLEAR - 0.1) == []
    assert len(last(0.1, inference=CLEAR)) == 1


def test_turbulence_has_to_last_for_three_memories() -> None:
    warning_filter = WarningFilter(threshold=0.2)

    def drifting(memories: float) -> list[str]:
        updates = round(100 * memories)
        layer = dataclasses.replace(
            of(1.0, cause="drifting"), momentum=0.99, updates=1000 + updates
        )
        return look(warning_filter, layer)

    assert PATIENCE == 3
    assert [len(drifting(memories)) for memories in (0, 1, 2, 2.9, 3.1)] == [
        0, 0, 0, 0, 1,
    ]  # fmt: skip
