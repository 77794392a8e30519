"""Which run in a log directory a training writes into."""

import itertools
import os
import time

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

SUBDIRECTORY = "batch_norm"
"""Own directory under `log_dir`, so that no other writer's run is mixed with ours."""


def choose_run(log_dir: str, start: int) -> str:
    """The directory that a training writes into, of its own or its own again.

    A training that begins with a later step than 0 goes on in the run that has come as
    far, or farther where it was interrupted. Any other makes a run of its own:
    `batch_norm`, or one with a number and the time it began, where there are others.

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
    """Makes a directory; not where another training did at this moment."""
    if "://" in run:  # Where directories are but parts of names.
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
