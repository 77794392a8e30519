"""Chooses the run in a log directory that a training writes into."""

import itertools
import os
import time

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

SUBDIRECTORY = "batch_norm"
"""The directory under `log_dir` for our run, apart from those of other writers."""


def choose_run(log_dir: str, start: int) -> str:
    """Chooses the directory that a training writes into, and makes it if it is new.

    A training that resumes at a later step than 0 continues the run that ended at this
    step, or soonest after it. Any other training makes a new run: `batch_norm`, or, if
    there are others, one with a number and the time.

    Args:
        log_dir: The log directory.
        start: The optimizer's step at which training begins.

    Returns:
        A directory that exists.
    """
    tf.io.gfile.makedirs(log_dir)
    runs = tf.io.gfile.glob(os.path.join(log_dir, f"{SUBDIRECTORY}*"))
    if start:
        ends = {run: _last_step(run) for run in sorted(runs, reverse=True)}
        own = [run for run, end in ends.items() if end >= start]
        if own:
            return str(min(own, key=lambda run: ends[run]))
    now = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(len(runs) + 1):
        name = SUBDIRECTORY if number == 1 else f"{SUBDIRECTORY}_{number}_{now}"
        run = os.path.join(log_dir, name)
        if _is_made(run):
            return run
    raise AssertionError


def _is_made(run: str) -> bool:
    """Makes a directory; False if another training has made it at the same moment."""
    if "://" in run:  # Object stores have no directories, only names.
        return not tf.io.gfile.exists(run)
    try:
        os.mkdir(run)
    except FileExistsError:
        return False
    return True


def _last_step(run: str) -> int:
    files = tf.io.gfile.glob(os.path.join(run, "events.*"))
    if not files:
        return -1
    # Names begin with the time.
    events = LegacyEventFileLoader(max(files)).Load()
    return max((int(event.step) for event in events), default=-1)
