"""When the frames of a film are shown: presentation times from its container, kept small and exact.

Times are whole ticks of the container's time base, never a frame number over a rate: films from phones and screens have
frames of different lengths, and 29.97 frames per second are 30000 / 1001. At time t the frame on the screen is the last
one whose tick is at or before t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from math import floor

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

KEY_SPACING = Fraction(1)
"""Seconds between the key frames that are kept: some codecs make every frame one."""


@dataclass(frozen=True)
class Timeline:
    """The presentation times of a film's frames."""

    time_base: tuple[int, int]
    """Seconds of one tick, as numerator and denominator."""
    start: int
    """Tick of the first frame."""
    steps: tuple[tuple[int, int], ...]
    """(ticks to the next frame, how often in a row), run by run; every step is at least 1."""
    last: int
    """Ticks that the last frame is shown; 0 where the container does not say."""
    keys: tuple[int, ...] = (0,)
    """Numbers of frames that decoding can begin at, from the first on."""

    @classmethod
    def of(cls, ticks: Sequence[int], last: int, time_base: tuple[int, int], keys: Sequence[int] = (0,)) -> "Timeline":
        """The timeline of frames at strictly rising `ticks`."""
        steps = tuple((int(step), len(list(run))) for step, run in groupby(np.diff(np.asarray(ticks)).tolist()))
        kept, base = [0], Fraction(*time_base)
        for key in keys:
            if (ticks[key] - ticks[kept[-1]]) * base >= KEY_SPACING:
                kept.append(int(key))
        return cls(time_base, int(ticks[0]), steps, int(last), tuple(kept))

    @property
    def frames(self) -> int:
        return 1 + sum(count for _, count in self.steps)

    @cached_property
    def ticks(self) -> IntArray:
        """[frames] when each frame appears."""
        steps = np.array(self.steps, dtype=np.int64).reshape(-1, 2)
        ticks = self.start + np.concatenate([[0], np.repeat(steps[:, 0], steps[:, 1]).cumsum()]).astype(np.int64)
        ticks.flags.writeable = False
        return ticks

    @property
    def base(self) -> Fraction:
        """Seconds of one tick."""
        return Fraction(*self.time_base)

    def time(self, frame: int) -> Fraction:
        """Seconds at which a frame appears."""
        return int(self.ticks[frame]) * self.base

    @property
    def begin(self) -> Fraction:
        """Seconds at which the first frame appears."""
        return self.start * self.base

    @property
    def end(self) -> Fraction:
        """Seconds at which the last frame disappears."""
        return (int(self.ticks[-1]) + self.last) * self.base

    def frame_at(self, time: Fraction) -> int:
        """The frame on the screen at `time`: the last whose tick is at or before it; the first one before that."""
        return max(int(np.searchsorted(self.ticks, floor(time / self.base), side="right")) - 1, 0)
