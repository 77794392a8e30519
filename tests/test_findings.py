"""When a finding deserves a word."""

import dataclasses

import pytest

from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.watching.findings import WORSE, Findings

SICK = LayerReport("bn", cause="outliers", lag=1.0, advice="Clean the data.")


def look(
    findings: Findings, *layers: LayerReport, steps_left: int | None = 100
) -> list[str]:
    return findings.messages(BatchNormReport(layers), steps_left)


def said(findings: Findings, *layers: LayerReport) -> list[str]:
    """What two looks say that find the same."""
    return look(findings, *layers) + look(findings, *layers)


def of(lag: float | None, path: str = "bn", cause: str = "outliers") -> LayerReport:
    return dataclasses.replace(SICK, path=path, lag=lag, cause=cause)


def test_a_finding_is_said_once_and_again_when_it_has_worsened() -> None:
    findings = Findings(threshold=0.2)
    assert len(said(findings, of(1.0))) == 1
    for lag in (1.0, 0.5, 0.99 * WORSE):
        assert said(findings, of(lag)) == []
    (again,) = said(findings, of(1.01 * WORSE))
    assert f"{1.01 * WORSE:.2f} standard deviations" in again
    # From now on it is that which must be exceeded.
    assert said(findings, of(1.5 * WORSE)) == []


def test_layers_are_grouped_by_cause_and_causes_are_apart() -> None:
    findings = Findings(threshold=0.2)
    first, second = said(
        findings, of(1.0), of(3.0, "worse"), of(2.0, "sorted", "correlated_batches")
    )
    assert first.startswith("2 of 3 BatchNormalization layers lag, worst worse by 3.00")
    assert "correlated_batches" in second


@pytest.mark.parametrize("lag", [None, 0.0, float("nan")])
def test_what_has_no_size_cannot_worsen(lag: float | None) -> None:
    findings = Findings(threshold=0.2)
    assert len(said(findings, of(lag))) == 1
    assert said(findings, of(lag)) == []
