"""Limits work that is not essential to a share of the time that passes."""

import contextlib
import time
from collections.abc import Iterator


class Budget:
    """Allows repeated work as long as all of it takes at most a share of the time.

    Args:
        share: The share, from 0 to 1.
        cost: Seconds that one run takes; a guess, until the first one is timed.

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
        """Whether another run fits into the budget."""
        passed = time.perf_counter() - self._began
        return self._spent + self._cost <= self._share * passed

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Times the block and charges it to the budget."""
        began = time.perf_counter()
        yield
        self._cost = time.perf_counter() - began
        self._spent += self._cost
