"""The replicas and workers of a `tf.distribute` strategy, as a team."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

_MESSAGE_BYTES = 1000


class Team:
    """Those who share the work of a pass: replicas here, workers elsewhere.

    Workers talk to each other in `together` and `gather` alone, which all of them
    must call in the same order. What may fail is done in `together`, so that nobody
    waits for one that has failed. A worker that has died makes TensorFlow give up
    within its own time-out, some ten seconds.

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
    def is_chief(self) -> bool:
        """Whether this process is the one that speaks and writes files."""
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
        return list(zip(*map(self.parts, columns), strict=True))

    def parts(self, value: Any) -> tuple[Any, ...]:
        """The parts of a distributed value that lie in this process."""
        if self._strategy is None:
            return (value,)
        parts: tuple[Any, ...] = self._strategy.experimental_local_results(value)
        return parts

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

        # A sum with nothing but zeros: exact, and the same on all workers.
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

    def together(
        self, work: Callable[[], ArrayLike], size: int = 0
    ) -> NDArray[np.float64]:
        """Does a piece of work on every worker, and ends when all have done it.

        Args:
            work: Returns `size` numbers for the others.
            size: How many.

        Returns:
            What the work of each worker has returned, shape `(workers, size)`.

        Raises:
            Exception: What `work` has raised here.
            RuntimeError: `work` has failed on another worker, or that does not answer.
        """
        if self.workers == 1:
            return np.reshape(np.asarray(work(), np.float64), (1, size))
        row, error = np.zeros(size), None
        try:
            row[:] = work()
        except BaseException as raised:
            error = raised
        rows = self.gather(np.array([error is not None, *row], np.float64))
        failed = np.flatnonzero(rows[:, 0])
        if len(failed):
            texts = self._tell("" if error is None else f"{error or error!r}")
            if error is not None:
                raise error
            raise RuntimeError(
                f"Worker {failed[0]} has failed, so that nothing is changed on any. "
                f"Received there: {texts[failed[0]]}"
            )
        return rows[:, 1:]

    def _tell(self, text: str) -> list[str]:
        letters = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
        row = np.pad(letters.astype(np.float64), (0, _MESSAGE_BYTES - len(letters)))
        return [
            bytes(values.astype(np.uint8)).rstrip(b"\0").decode(errors="ignore")
            for values in self.gather(row)
        ]
