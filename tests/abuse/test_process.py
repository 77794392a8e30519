"""What importing the library costs a process, and what it leaves alone."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Several processes, each of which imports TensorFlow.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT = 0.2
"""Seconds that importing may add to TensorFlow's and Keras' own."""

PROBE = """
import json, sys, threading, time
import tensorflow, keras

def living():
    return sorted(thread.name for thread in threading.enumerate())

# As installed packages are: compiled. TensorFlow stays where it is.
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
threads, modules = living(), set(sys.modules)
start = time.perf_counter()
import bn_callbacks
for name in bn_callbacks.__all__:
    getattr(bn_callbacks, name)
seconds = time.perf_counter() - start
new = set(sys.modules) - modules
print(json.dumps({
    "seconds": seconds,
    "threads": living() == threads,
    "foreign": sorted(n for n in new if not n.startswith("bn_callbacks")),
}))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Several new processes; the first one compiles what the others time."""
    bytecode = str(tmp_path_factory.mktemp("bytecode"))
    runs = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", PROBE, bytecode],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    return runs[1:]


def test_importing_adds_little_to_tensorflow(probes: list[dict[str, Any]]) -> None:
    assert statistics.median(run["seconds"] for run in probes) < LIMIT


def test_importing_starts_no_thread(probes: list[dict[str, Any]]) -> None:
    assert all(run["threads"] for run in probes)


def test_importing_loads_nothing_that_tensorflow_has_not(
    probes: list[dict[str, Any]],
) -> None:
    assert probes[0]["foreign"] == []
