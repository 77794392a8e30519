"""tf.distribute on several machines: real processes on loopback, with time-outs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import workers as workers_of

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("workers.py")
TIMEOUT = 240


def run(workers: int, scenarios: str, directory: Path) -> list[dict[str, Any] | None]:
    """What each worker has printed; None for one that ended without."""
    command = [sys.executable, str(SCRIPT), scenarios, str(directory)]
    with workers_of(workers, command, stderr=subprocess.STDOUT) as processes:
        return [result(process) for process in processes]


def result(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    output, _ = process.communicate(timeout=TIMEOUT)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines or process.returncode == 9, output[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


ALL = "same_data,own_data,failing_data,training_loop,differing"


@pytest.fixture(scope="module", params=[2, 3])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    found = run(request.param, ALL, tmp_path_factory.mktemp("logs"))
    assert None not in found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("scenario", ALL.split(","))
def test_all_workers_end_with_identical_statistics(
    results: list[dict[str, Any]], scenario: str
) -> None:
    first, *others = (result[scenario]["stored"] for result in results)
    if scenario != "failing_data":
        assert all(other == first for other in others)


def test_workers_with_the_same_data_share_the_work(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        for name in ("auto", "one pass"):
            distance, *counts = result["same_data"][name]
            assert distance < 1e-6
            assert counts == [203, 13, 203, 13]
        ours, theirs, mine, their = result["same_data"]["losses"]
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert mine == pytest.approx(their, rel=1e-6)


def test_workers_with_shares_of_different_length(
    results: list[dict[str, Any]],
) -> None:
    assert len({result["own_data"]["own"] for result in results}) > 1
    for result in results:
        assert result["own_data"]["samples"] == 203
        assert result["own_data"]["distance"] < 1e-5
        assert result["own_data"]["stopped"] < 64


def test_a_failure_of_one_worker_changes_nobody(
    results: list[dict[str, Any]],
) -> None:
    for index, result in enumerate(results):
        said = result["failing_data"]
        assert said["intact"]
        assert said["undone"]
        assert said["took"] < 60
        own = "OSError: the disk is gone"
        told = "RuntimeError: Worker 1 has failed, so that nothing is changed on any."
        assert said["broken"].startswith(own if index == 1 else told)
        assert "the disk is gone" in said["broken"]
        if index == 0:
            assert "`x` is empty" in said["empty"]
        assert ("ValueError" in said["shape"]) == (index == 1)
        assert "does not fit" in said["shape"]
        assert "in batch 5 of the data" in said["not finite"]
        assert "refine=-1" in said["option"]


def test_workers_that_were_told_different_things_end_with_an_error(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        found = result["differing"]
        assert found["same"] == "nothing"
        assert found["intact"]
        assert not found["files"]
        assert found["took"] < 60
        for name, said in found["said"].items():
            assert said.startswith("RuntimeError: The workers do not all have"), name
            assert "on worker 0, and" in said
        assert (
            "refine=0 on worker 0, and refine=2 on worker 1" in found["said"]["refine"]
        )
        assert "callback 1, DebiasBatchNorm on worker 1" in found["said"]["one more"]


def test_the_callbacks_in_a_training_loop(results: list[dict[str, Any]]) -> None:
    chief, *others = (result["training_loop"] for result in results)
    assert chief["cause"] == "replicas_differ"
    assert chief["disagreement"] > 0.5
    assert chief["warnings"] == 0  # Recalibration at the end cures it.
    assert chief["files"]
    for other in others:
        assert not other["files"]
        for name in ("cause", "disagreement", "lag", "gap", "statistics"):
            assert other[name] == chief[name]
        # What validation used is gone again: each goes on with its own average.
        assert other["resumed"][1] != chief["resumed"][1]
        own, pooled = other["debiased"]
        assert own != pooled == chief["debiased"][1]


def test_a_dead_worker_is_an_error_and_no_hang(tmp_path: Path) -> None:
    chief, dead = run(2, "dying", tmp_path)
    assert dead is None
    assert chief is not None
    assert "Another worker does not answer" in chief["dying"]["said"]
    assert chief["dying"]["intact"]
    assert chief["dying"]["took"] < 120


def test_a_callback_on_the_chief_only_is_an_error_and_no_hang(tmp_path: Path) -> None:
    chief, other = run(2, "on_the_chief_only", tmp_path)
    assert chief is not None
    said = chief["on_the_chief_only"]
    assert said["said"].startswith("RuntimeError: Worker 1 did not come to where the")
    assert said["took"] < 60
    assert other is not None
    assert "did not come" in other["on_the_chief_only"]["said"]
