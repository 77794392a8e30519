"""Joins the reports of a training into episodes: what came and went."""

import dataclasses
import itertools
from weakref import WeakKeyDictionary

import keras

from bn_callbacks.episodes import Episode
from bn_callbacks.report import BatchNormReport, LayerReport
from bn_callbacks.statistics.causes import WARMING_UP

MAX_EPISODES = 40
"""Largest number of past episodes, more than there are causes. Beyond it, the two
episodes of one cause that are closest in time become one."""

LOOKS = 2
"""Reports in a row that make an episode. One at an epoch's end counts as two."""

_recorders: "WeakKeyDictionary[keras.Model, EpisodeRecorder]" = WeakKeyDictionary()


class EpisodeRecorder:
    """Remembers which causes were found in which reports.

    Within an epoch a single report may be chance. So a cause begins an episode when two
    reports in a row show it, or the one at an epoch's end; and an episode survives one
    report within an epoch that does not show it. Every training begins by warming up:
    this begins an episode only at an epoch's end.
    """

    def __init__(self) -> None:
        self._past: list[Episode] = []
        self._now: dict[str, Episode] = {}
        self._looks: dict[str, int] = {}
        self._missed: dict[str, int] = {}
        self._step = self._epoch = 0

    @classmethod
    def of(cls, model: keras.Model, epoch: int, step: int) -> "EpisodeRecorder":
        """Finds the recorder for a training that begins.

        Args:
            model: The model in training.
            epoch: Its first epoch, counted from 0.
            step: Its first step.

        Returns:
            The recorder of the training before, if this one resumes it; or a new one.
        """
        before = _recorders.pop(model, None)
        # An interrupted epoch may be repeated.
        resumes = (
            before and epoch and before._epoch <= epoch + 1 and before._step <= step
        )
        recorder = before if before and resumes else cls()
        _recorders[model] = recorder
        return recorder

    def add(
        self, report: BatchNormReport, step: int, epoch: int, ends_epoch: bool
    ) -> BatchNormReport:
        """Adds a report.

        Args:
            report: The report.
            step: Its step.
            epoch: Its epoch, counted from 1.
            ends_epoch: Whether the epoch has ended, so that the losses are new.

        Returns:
            The report, with all episodes so far.
        """
        self._step, self._epoch = step, epoch
        gap = report.loss_gap if ends_epoch else None
        groups: dict[str, list[LayerReport]] = {}
        for layer in report.lagging:
            groups.setdefault(layer.cause, []).append(layer)
        for cause, layers in groups.items():
            worst = layers[0]
            paths = tuple(layer.path for layer in layers)
            seen = Episode(
                *(cause, step, step, epoch, epoch, paths, worst.path, worst.lag, gap),
                is_over=False,
                advice=worst.advice,
            )
            before = self._now.get(cause)
            self._now[cause] = seen if before is None else before.extended(seen)
            looks = LOOKS if ends_epoch else int(cause != WARMING_UP)
            self._looks[cause] = self._looks.get(cause, 0) + looks
            self._missed[cause] = 0
        for cause in [cause for cause in self._now if cause not in groups]:
            self._missed[cause] += 1
            if ends_epoch or self._missed[cause] > 1 or self._looks[cause] < LOOKS:
                self._close(cause)
        return dataclasses.replace(report, episodes=self.episodes)

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes, in the order of their beginnings."""
        now = [
            dataclasses.replace(episode, is_over=self._missed[cause] > 0)
            for cause, episode in self._now.items()
            if self._looks[cause] >= LOOKS
        ]
        return tuple(
            sorted([*self._past, *now], key=lambda episode: episode.first_step)
        )

    def _close(self, cause: str) -> None:
        episode, looks = self._now.pop(cause), self._looks.pop(cause)
        if looks >= LOOKS:
            self._past.append(dataclasses.replace(episode, is_over=True))
        if len(self._past) > MAX_EPISODES:
            self._join()

    def _join(self) -> None:
        """Joins two episodes, so that memory stays bounded in long trainings."""
        pairs = [
            pair
            for cause in dict.fromkeys(episode.cause for episode in self._past)
            for pair in itertools.pairwise(
                episode for episode in self._past if episode.cause == cause
            )
        ]
        one, other = min(pairs, key=lambda pair: pair[1].first_step - pair[0].last_step)
        joined = dataclasses.replace(one.extended(other), times=one.times + other.times)
        self._past[self._past.index(one)] = joined
        self._past.remove(other)
