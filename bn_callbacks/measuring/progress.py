"""Shows one progress bar for all passes over data, and what each pass is for."""

import keras


class Progress:
    """Shows the batches of all passes in one bar.

    Args:
        is_shown: Whether to show anything.
        length: Batches in a pass; None if unknown.
    """

    def __init__(self, is_shown: bool, length: int | None) -> None:
        self._is_shown = is_shown
        self._length = length
        self._bar: keras.utils.Progbar | None = None
        self._before = self._shown = 0
        self.passes = 0

    def begin(self, purpose: str) -> None:
        """Announces a pass, such as `correcting`."""
        self._before = self._shown
        self.passes += 1
        if not self._is_shown:
            return
        # Keras prints the unit behind the time: it says what the time is spent on.
        unit = f"batch, pass {self.passes}: {purpose}"
        if self._bar is None:
            self._bar = keras.utils.Progbar(None, verbose=1, unit_name=unit)
        self._bar.unit_name = unit
        if self._length is not None:
            self._bar.target = self._before + self._length

    def show(self, count: int) -> None:
        """Shows how many batches of the pass have been read."""
        if self._bar is not None:
            self._shown = self._before + count
            self._bar.update(self._shown, finalize=False)

    def end(self) -> None:
        """Ends the bar where it is, and begins a new line."""
        if self._bar is not None:
            self._bar.update(self._shown, finalize=True)
