"""Finds, reads and checks the films that the rows of a user's file name, as `chat_images` does with pictures.

A film lies where images may lie and is held to the same bounds of bytes and pixels. It is decoded once from end to end,
which also says when each of its frames is shown.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from molmo_model.data.datasets.chat_images import ImageSource
from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.example import Video, is_number
from molmo_model.data.video_file import LIMITS, fit_clip, probe_video
from molmo_model.errors import DataError

KEPT = 2
"""Films in memory, because rows about one film often stand together."""
CLIP_FIELDS = ("clip_start", "clip_end")


class VideoSource:
    """The films of one dataset, found through its `ImageSource`."""

    def __init__(self, files: ImageSource) -> None:
        self.files = files
        self.limits = replace(LIMITS, pixels=files.max_pixels)
        self._kept: OrderedDict[bytes, Video] = OrderedDict()

    def load(self, item: Any, field: str, row_clip: dict[str, Any]) -> Video:
        """The film, or the part of it, that an entry of `videos` names.

        Args:
            item: a path, or a mapping with `path`, or in Parquet `bytes`, and perhaps `clip_start` and `clip_end`.
            row_clip: `clip_start` and `clip_end` of the row, where they stand beside a single film.

        Raises:
            RowError: it is missing, lies outside the root, is no film, broken or too large, or the clip is none of it.
        """
        file, clip = split_clip(item)
        if clip and row_clip:
            raise RowError(next(iter(row_clip)), f"stands beside the one of `{field}`; give one of them")
        film = self._probed(self.files.read(file, field), field)
        if not clip and not row_clip:
            return film
        where = {name: f"{field}.{name}" if name in clip else name for name in CLIP_FIELDS}
        start, end = self._seconds(clip or row_clip, where)
        try:
            return replace(film, clip=fit_clip((start, end), film.timeline, field))
        except DataError as error:
            name = "clip_end" if end is not None and "enclose" in str(error) else "clip_start"
            raise RowError(where[name], str(error).removeprefix(f"{field}: ")) from error

    def _probed(self, data: bytes, field: str) -> Video:
        if data not in self._kept:
            try:
                self._kept[data] = probe_video(data, name=field, limits=self.limits)
            except DataError as error:
                raise RowError(field, str(error).removeprefix(f"{field}: ")) from error
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(data)
        return self._kept[data]

    @staticmethod
    def _seconds(clip: dict[str, Any], where: dict[str, str]) -> tuple[float, float | None]:
        """Start and end in seconds; a start that is left out is 0, an end that is left out the film's."""
        for name, value in clip.items():
            if not is_number(value) or value < 0:
                raise RowError(where[name], f"is {value!r}; it must be a number of seconds, at least 0")
        end = clip.get("clip_end")
        return float(clip.get("clip_start", 0.0)), None if end is None else float(end)


def split_clip(item: Any) -> tuple[Any, dict[str, Any]]:
    """An entry of `videos` without its clip, as images are written, and the clip."""
    if not isinstance(item, dict):
        return item, {}
    clip = {name: item[name] for name in CLIP_FIELDS if item.get(name) is not None}
    return {name: value for name, value in item.items() if name not in CLIP_FIELDS}, clip
