"""Prints for each unseen case whether it is what it says, by training it otherwise.

python tests/causes/fresh_proof.py [a part of a name or a cause]
"""

import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
MODULES = [
    f"{part}_{kind}"
    for part in ("fresh", "second")
    for kind in ("averages", "batches", "modes", "healthy")
]


def main() -> None:
    """Proves the cases that are asked for, one after the other."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster import add_devices

    add_devices()
    from fresh_kit import PROOFS, prove

    for name in MODULES:
        __import__(name)
    wanted = sys.argv[1:] or [""]
    for proof in PROOFS:
        label = f"{proof.case.name} {proof.case.expected or 'silent'}"
        module = proof.case.build.__module__
        if not any(part in f"{label} {module}" for part in wanted):
            continue
        start = time.perf_counter()
        try:
            is_so, text = prove(proof)
        except Exception:
            is_so, text = False, traceback.format_exc()
        seconds = time.perf_counter() - start
        print(f"{' ' if is_so else '✗'} {label:60} {seconds:4.0f}s {text}", flush=True)


if __name__ == "__main__":
    main()
