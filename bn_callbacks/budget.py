"""Keeping what costs time to a share of the time that passes."""

import contextlib
import time
from collections.abc import Iterator


class Budget:
    """Allows something as long as all of it takes no more than a share of the time.

    Args:
        share: The share, from 0 to 1.
        cost: Seconds that doing it once takes, as a guess before the first time.

    Example:
    >>> budget = Budget(share=0.5, cost=0.0)
    >>> with budget.spend():
    ...     time.sleep(0.02)
    >>> budget.allows()
    False
    """

    def __init__(self, share: float, cost: float) -> None:
        self._share = share
        self._cost = cost
        self._spent = 0.0
        self._began = time.perf_counter()

    def allows(self) -> bool:
        """Whether it may be done once more."""
        passed = time.perf_counter() - self._began
        return self._spent + self._cost <= self._share * passed

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Inside, it is done, and timed."""
        began = time.perf_counter()
        yield
        self._cost = time.perf_counter() - began
        self._spent += self._cost
