"""`Episode`: a time of a training in which something was wrong."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Episode:
    """A time in which one cause affected layers.

    Steps are the optimizer's, as in TensorBoard. Epochs are counted from 1, as `fit`
    prints them. Both belong to reports that showed the cause: it may have begun any
    time after the report before.

    Args:
        cause: The cause.
        first_step: Step of the first report that showed it.
        last_step: Step of the last one.
        first_epoch: Epoch of the first report that showed it.
        last_epoch: Epoch of the last one.
        layers: Paths of the affected layers, the worst of the first report first.
        worst: Path of the layer with the largest lag.
        lag: That lag; None, the default, if unknown.
        loss_gap: The largest loss gap at an epoch's end in this time; None, the
            default, if not measured.
        is_over: Whether the latest report no longer shows the cause; True by default.
        times: How many episodes this one stands for; 1 by default. More than 1 if a
            training had so many that those of the same cause were joined.
        advice: What to do about the worst layer; empty by default.

    Example:
        >>> print(Episode("outliers", 130, 140, 7, 7, ("bn_1", "bn_2"), "bn_2", 0.8))
        outliers in epoch 7 (steps 130-140): 2 layers, worst bn_2 by 0.8
    """

    cause: str
    first_step: int
    last_step: int
    first_epoch: int
    last_epoch: int
    layers: tuple[str, ...]
    worst: str
    lag: float | None = None
    loss_gap: float | None = None
    is_over: bool = True
    times: int = 1
    advice: str = ""

    @property
    def when(self) -> str:
        """The epochs, in words."""
        if not self.is_over:
            return f"since epoch {self.first_epoch}"
        return f"in {_span('epoch', self.first_epoch, self.last_epoch)}"

    @property
    def steps(self) -> str:
        """The steps, in words."""
        if not self.is_over:
            return f"step {self.first_step:,}"
        return _span("step", self.first_step, self.last_step)

    @property
    def who(self) -> str:
        """The layers, in words."""
        lag = "" if self.lag is None else f" by {self.lag:.2g}"
        if len(self.layers) == 1:
            return f"{self.worst}{lag}"
        return f"{len(self.layers)} layers, worst {self.worst}{lag}"

    def __str__(self) -> str:
        often = f", {self.times} times" if self.times > 1 else ""
        gap = "" if self.loss_gap is None else f", loss gap {self.loss_gap:.3g}"
        return f"{self.cause} {self.when} ({self.steps}{often}): {self.who}{gap}"

    def extended(self, later: "Episode") -> "Episode":
        """This episode, extended by a later one of the same cause."""
        new = later if _size(later.lag) > _size(self.lag) else self
        gaps = [gap for gap in (self.loss_gap, later.loss_gap) if gap is not None]
        return dataclasses.replace(
            new,
            first_step=self.first_step,
            last_step=later.last_step,
            first_epoch=self.first_epoch,
            last_epoch=later.last_epoch,
            layers=tuple(dict.fromkeys((*self.layers, *later.layers))),
            loss_gap=max(gaps, key=_size, default=None),
            is_over=later.is_over,
            times=self.times,
        )


def _size(number: float | None) -> float:
    """A number to compare by: NaN is the largest, None the smallest."""
    if number is None:
        return -math.inf
    return math.inf if math.isnan(number) else number


def _span(unit: str, first: int, last: int) -> str:
    return f"{unit} {first:,}" if first == last else f"{unit}s {first:,}-{last:,}"
