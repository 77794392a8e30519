"""The replicas and workers of a `tf.distribute` strategy, as a team."""

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.eager import context as tf_context

_MESSAGE_BYTES = 1000
_LIST_BYTES = 8000

PATIENCE = 180
"""Seconds that a worker waits for the others to begin with it."""

_meetings = itertools.count()


def copies(value: Any) -> tuple[Any, ...]:
    """What a value is on each replica of this process; one if it is not distributed."""
    is_distributed = isinstance(value, tf.distribute.DistributedValues)
    return tuple(value.values) if is_distributed else (value,)


class Team:
    """The replicas and workers that share the work of a pass.

    Workers talk to each other in `agreed` and `gather` only, and all of them must call
    these in the same order. Whatever may fail runs inside `agreed`, so that no worker
    waits for one that has failed. If a worker dies, TensorFlow gives up after a
    time-out of its own.

    Args:
        strategy: The strategy; None for none.

    Attributes:
        replicas: Number of replicas in this process.
        workers: Number of processes.
        worker: Number of this process; 0 is the chief.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None) -> None:
        self._strategy = strategy
        self._ids: list[int] = [0]
        total = 1
        if strategy is not None:
            self._ids = []
            strategy.experimental_distribute_values_from_function(self._add_id)
            total = strategy.num_replicas_in_sync
        self.replicas = len(self._ids)
        self.workers = total // self.replicas
        self.worker = self._ids[0] // self.replicas

    def _add_id(self, context: Any) -> Any:
        self._ids.append(context.replica_id_in_sync_group)
        return tf.constant(0)

    @property
    def size(self) -> int:
        """Number of replicas of all workers."""
        return self.replicas * self.workers

    @property
    def is_chief(self) -> bool:
        """Whether this process prints and writes files."""
        return self.worker == 0

    def run(self, function: Callable[[int], Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Runs a function on each replica of this process, in a `tf.function`.

        Args:
            function: Gets the number of the replica, and returns tensors.

        Returns:
            What each replica has returned.
        """
        if self._strategy is None:
            return [tuple(function(0))]

        def on_replica() -> tuple[Any, ...]:
            context = tf.distribute.get_replica_context()
            replica = int(tf.get_static_value(context.replica_id_in_sync_group))
            return tuple(function(replica - self._ids[0]))

        columns = self._strategy.run(on_replica)
        return list(zip(*map(copies, columns), strict=True))

    def gather(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """The rows of all workers, each of the same length.

        Raises:
            RuntimeError: Another worker does not answer.
        """
        if self._strategy is None or self.workers == 1:
            return row[None]

        def mine(context: Any) -> Any:
            rows = np.zeros((self.workers, len(row)))
            if context.replica_id_in_sync_group == self._ids[0]:
                rows[self.worker] = row
            return tf.constant(rows)

        # All other rows are zeros, so that the sum is exact, and the same everywhere.
        rows = self._strategy.experimental_distribute_values_from_function(mine)
        try:
            total: NDArray[np.float64] = self._strategy.reduce(
                tf.distribute.ReduceOp.SUM, rows, axis=None
            ).numpy()
        except tf.errors.OpError as error:
            raise RuntimeError(
                "Another worker does not answer, so that nothing is changed here. "
                f"Received: {str(error)[:300]}. Look for what ended it, and start all "
                "workers again."
            ) from error
        return total

    def everywhere(self, is_so: bool) -> bool:
        """Whether it is so on all workers."""
        return bool(self.gather(np.array([float(is_so)])).all())

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Ends when all workers have done what is inside, and raises if any failed.

        Raises:
            Exception: What was raised inside, here.
            RuntimeError: Another worker has failed inside, or does not answer.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            if self.workers == 1:
                raise
            error = raised
        if self.workers == 1:
            return
        failed = np.flatnonzero(self.gather(np.array([float(error is not None)])))
        if len(failed):
            texts = self._tell("" if error is None else str(error) or repr(error))
            if error is not None:
                raise error
            raise RuntimeError(
                f"Worker {failed[0]} has failed, so that nothing is changed on any. "
                "Mend it there, and begin again on all workers. "
                f"Received there: {texts[failed[0]]}"
            )

    def check_same(self, what: str, lines: Sequence[str]) -> None:
        """Raises on all workers if they were not all told to do the same.

        Args:
            what: What the lines describe.
            lines: What this worker was told.

        Raises:
            RuntimeError: Another worker was told something else, or does not answer.
        """
        if self.workers == 1:
            return
        self._meet(what)
        text = "\n".join(lines)
        sums = self.gather(np.array([float(zlib.crc32(text.encode()))])).ravel()
        if (sums == sums[0]).all():
            return
        other = int(np.flatnonzero(sums != sums[0])[0])
        texts = self._tell(text, _LIST_BYTES)
        mine, theirs = (texts[worker].splitlines() for worker in (0, other))
        only = [
            "; ".join(line for line in one if line not in rest)[:_MESSAGE_BYTES]
            for one, rest in ((mine, theirs), (theirs, mine))
        ]
        raise RuntimeError(
            f"The workers do not all have the same {what}, so that nothing has begun "
            f"on any. Received: {only[0] or 'nothing more'} on worker 0, and "
            f"{only[1] or 'nothing more'} on worker {other}. Give all of them the same."
        )

    def _meet(self, what: str) -> None:
        """Waits for the other workers, some of which may never call this.

        A sum over workers would wait for ever then. TensorFlow's coordination service
        takes a time-out, and can stop the others with a message.

        Raises:
            RuntimeError: Another worker does not come.
        """
        context: Any = tf_context.context()
        if not hasattr(context, "get_config_key_value"):
            return
        place = f"bn_callbacks/{next(_meetings)}"
        context.set_config_key_value(f"{place}/{self.worker}", "here")
        deadline = time.monotonic() + PATIENCE
        for worker in range(self.workers):
            left = max(1, round(1000 * (deadline - time.monotonic())))
            try:
                context.get_config_key_value(f"{place}/{worker}", left)
            except tf.errors.OpError as error:
                message = (
                    f"Worker {worker} did not come to where the workers compare their "
                    f"{what}, so that nothing has begun. Received: no answer within "
                    f"{PATIENCE} seconds on worker {self.worker}. Give all workers the "
                    f"same {what}, and callbacks of bn_callbacks to all or to none."
                )
                with contextlib.suppress(tf.errors.OpError, ValueError):
                    context.report_error_to_cluster(
                        tf.errors.FAILED_PRECONDITION, message
                    )
                raise RuntimeError(message) from error

    def _tell(self, text: str, size: int = _MESSAGE_BYTES) -> list[str]:
        letters = np.frombuffer(text.encode()[:size], np.uint8)
        row = np.pad(letters.astype(np.float64), (0, size - len(letters)))
        return [
            bytes(values.astype(np.uint8)).rstrip(b"\0").decode(errors="ignore")
            for values in self.gather(row)
        ]
