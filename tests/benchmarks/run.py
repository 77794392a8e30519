"""Measures everything and writes docs/benchmarks.md: some 60 minutes.

    python tests/benchmarks/run.py [--sections overhead causes ...] [--quick]

Each section is a script of its own, run in its own process; what is not measured keeps
what the page had.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from page import PATH, SECTIONS, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPTIONS = {
    "overhead": ["--repeats", "2"],
    "probe": [],
    "recalibration": [],
    "first_call": [],
    "validation": [],
    "samples": [],
    "passes": [],
    "growth": [],
    "handful": [],
    "causes": [],
    "limits": [],
}
QUICK = {
    "overhead": ["--models", "mlp", "--repeats", "1", "--steps", "20"],
    "probe": ["--models", "mlp", "--repeats", "1"],
    "recalibration": [
        *("--models", "mlp6", "--repeats", "1", "--steps", "1"),
    ],
    "first_call": ["--models", "mlp6", "--steps", "1"],
    "validation": ["--models", "mlp6-20k", "--seeds", "1", "--images", "256"],
    "samples": ["--models", "EfficientNetV2B0", "--sizes", "300", "--steps", "1"],
    "passes": [
        *("--models", "mlp", "--peaks", "mlp", "--batches", "1"),
        *("--repeats", "1", "--memory-repeats", "1"),
    ],
    "growth": [
        *("--repeats", "1", "--batches", "2"),
        *("--readings", "2", "--reports", "1"),
    ],
    "handful": ["--models", "dense", "--seeds", "1", "--draws", "1"],
    "causes": ["--with-probe", "--only", "momentum_one"],
    "limits": ["--only", "SOLVED"],
}
"""Settings that show that a script works, and measure nothing."""


def main() -> None:
    """Runs the scripts one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS))
    parser.add_argument("--markdown", type=Path, default=PATH, help="the page to write")
    parser.add_argument("--quick", action="store_true", help="only try the scripts")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    markdown = arguments.markdown.resolve()
    if ROOT in markdown.parents:
        markdown = markdown.relative_to(ROOT)
    if load() > 0.5:
        print(f"The machine is busy (load {load():.1f}): figures will be off.\n")
    for name in arguments.sections:
        options = (QUICK if arguments.quick else OPTIONS)[name]
        script = (HERE / f"{name}.py").relative_to(ROOT)
        command = [sys.executable, str(script), *options]
        command += ["--markdown", str(markdown)]
        print(f"=== {SECTIONS[name]}\n{' '.join(command)}\n", flush=True)
        began = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT)
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)


if __name__ == "__main__":
    main()
