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
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import add_devices

add_devices()

from fresh_kit import PROOFS, prove  # noqa: E402

for part in ("averages", "batches", "modes", "healthy"):
    for set_ in ("fresh", "second"):
        if (Path(__file__).parent / f"{set_}_{part}.py").exists():
            __import__(f"{set_}_{part}")

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
