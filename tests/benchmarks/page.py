"""One page of sections, `docs/benchmarks.md`, each written by a command of its own."""

import argparse
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

PATH = Path(__file__).resolve().parents[2] / "docs/benchmarks.md"

HEAD = """\
# Benchmarks

Nothing here is typed by hand. This command measures all of it, best on a machine that
does nothing else, and writes this page:

```bash
python tests/benchmarks/run.py
```

Each section can be measured alone; it says how, on what machine and with which versions
it was.
"""

SECTIONS = {
    "overhead": "What the monitor costs",
    "probe": "What a probe costs",
    "recalibration": "What recalibration costs",
    "first_call": "What its first call costs",
    "validation": "What recalibrating for each validation costs",
    "samples": "How large a sample has to be",
    "passes": "What a pass costs",
    "growth": "How both grow",
    "handful": "What a handful of examples does",
    "causes": "How often the cause is right",
    "limits": "What the limits lie between",
}
"""The sections in their order, and their titles."""


def machine() -> str:
    """What all of it ran on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> str:
    """The versions that count."""
    return (
        f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
        f"Keras {keras.__version__}, NumPy {np.__version__}"
    )


def load() -> float:
    """How many processes the machine was busy with, over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a script that writes a section."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--markdown", type=Path, help="the page to write this into")
    return made


class Section:
    """A section in the making: knows when it began, and how busy the machine was.

    Args:
        name: One of `SECTIONS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._began = time.perf_counter()
        self._load = load()
        print(f"{machine()}\n{versions()}\nload {self._load:.1f}\n", flush=True)

    def text(self, body: str) -> str:
        """The section with its title, and with how it was measured."""
        minutes = (time.perf_counter() - self._began) / 60
        script = Path(sys.argv[0])
        if script.is_absolute() and PATH.parents[1] in script.parents:
            script = script.relative_to(PATH.parents[1])
        command = shlex.join(["python", str(script), *sys.argv[1:]])
        return (
            f"## {SECTIONS[self.name]}\n\n```bash\n{command}\n```\n\n"
            f"Measured on {machine()}; {versions()}; load of the machine at the "
            f"start {self._load:.1f}; {minutes:.1f} minutes.\n\n{body.strip()}\n"
        )

    def write(self, body: str, path: Path | None) -> None:
        """Puts the section into the page at `path`, or leaves it at that."""
        if path is not None:
            before = path.read_text("utf-8") if path.exists() else ""
            path.write_text(replaced(before, self.name, self.text(body)), "utf-8")
            print(f"\nWritten into {path}")


def replaced(page: str, name: str, text: str) -> str:
    """The page with one section exchanged, or put in where it belongs."""
    sections = {
        found: body
        for found, body in re.findall(
            r"<!-- section (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL
        )
        if found in SECTIONS
    }
    sections[name] = text
    parts = [
        f"<!-- section {each} -->\n{sections[each]}<!-- end -->\n"
        for each in SECTIONS
        if each in sections
    ]
    return "\n".join([HEAD, *parts])
