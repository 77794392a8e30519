"""Something is done only as often as its time is a small share of all time."""

import types

import pytest

import bn_callbacks.budget
from bn_callbacks.budget import Budget


class Clock(types.SimpleNamespace):
    """A clock that is set by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bn_callbacks.budget, "time", clock)
    return clock


def test_the_first_time_waits_until_the_guess_is_affordable(clock: Clock) -> None:
    budget = Budget(share=0.01, cost=2.0)
    clock.now = 199.0
    assert not budget.allows()
    clock.now = 200.0
    assert budget.allows()


def test_what_it_took_counts_and_is_what_it_will_take(clock: Clock) -> None:
    budget = Budget(share=0.01, cost=0.0)
    assert budget.allows()
    with budget.spend():
        clock.now += 3.0
    # Three seconds spent, and three to come.
    clock.now = 599.0
    assert not budget.allows()
    clock.now = 600.0
    assert budget.allows()


def test_all_of_it_stays_below_its_share(clock: Clock) -> None:
    budget, spent = Budget(share=0.01, cost=0.1), 0.0
    for _ in range(100_000):
        clock.now += 0.01
        if budget.allows():
            with budget.spend():
                clock.now += 0.25
            spent += 0.25
    assert 0.009 * clock.now < spent <= 0.01 * clock.now
