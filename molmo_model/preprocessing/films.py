"""An example's films: planned from their facts, then decoded to crops, the frames of most interest at high resolution.

The first needs no pixel and gives what the example costs; the second happens once, when the example is encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Conversation, Example, Video
from molmo_model.data.video_file import decode_frames
from molmo_model.errors import ConfigError, DataError
from molmo_model.model_config import CropMode
from molmo_model.preprocessing import prompts
from molmo_model.preprocessing.crops import FloatArray, patch_masks
from molmo_model.preprocessing.image import Pixels, resize
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.video import Film, best_frames, lay_out, plan_clip

FrameScorer = Callable[[Pixels, str], npt.NDArray[np.floating]]
"""Frames [F, S, S, 3] as the model sees them and a question, to how well each frame goes with it [F]; see
`molmo_model.nn.frame_selection`."""


def plan_film(
    config: PreprocessorConfig, name: str, videos: Sequence[Video], rng: np.random.Generator | None
) -> Film | None:
    """The frames of an example's films, as far as they are known without a pixel; None without films.

    Raises:
        DataError: naming the example: more films than `max_images`.
        ConfigError: the model's other choices have no place for films.
    """
    if not videos:
        return None
    if len(videos) > config.max_images:
        raise DataError(
            f"example {name}: has {len(videos)} videos, more than max_images {config.max_images}; raise the model's "
            "preprocessing.max_images"
        )
    if config.selector_tokens or config.tiling.fused:
        what = "a token selector" if config.selector_tokens else "crop_mode hierarchical"
        raise ConfigError(f"example {name}: has a video, and a model with {what} takes still images only")
    if config.equal_windows and config.video.pooling_size != config.pooling_size:
        raise ConfigError(
            f"example {name}: has a video, whose frames are pooled by {list(config.video.pooling_size)} patches, and "
            f"{config.equal_windows} needs windows of one size, {list(config.pooling_size)}; set "
            "preprocessing.video.pooling_size to connector.pooling_size, or pool by mean or masked attention"
        )
    return lay_out([plan_clip(video, config.video, rng) for video in videos], config.video, config.tiling)


def decode_film(
    config: PreprocessorConfig,
    example: Example,
    film: Film | None,
    asked: Sequence[Conversation],
    scorer: FrameScorer | None,
) -> Film | None:
    """The film with its crops, and, where the question decides, with the best frames at high resolution.

    The question is what the users of the one conversation say, the last first: scorers read 64 tokens or so. It does
    not depend on draws, so training and prompts see the same frames.

    Raises:
        DataError: a film cannot be decoded, or several conversations would have to share its frames.
        ConfigError: there is no scorer.
    """
    if film is None:
        return None
    selecting = config.video.select_frames_by_query
    if selecting and len(asked) != 1:
        raise DataError(
            f"example {example.id}: the question chooses its frames (video.select_frames_by_query), so a sequence has "
            f"one conversation, not {len(asked)}; set max_conversations: 1 in the mixture entry"
        )
    if selecting and scorer is None:
        raise ConfigError(
            f"video.select_frames_by_query is {selecting}, but this preprocessor has no frame_scorer; give it a "
            "`molmo_model.nn.frame_selection.FrameScorer` of that model"
        )
    crops = _frame_crops(config, example, film)
    if not selecting or scorer is None:
        return replace(film, crops=crops)
    users = [message for message in asked[0].messages if message.role == "user"]
    question = "\n".join(
        prompts.questions(asked[0].style, message, config.prompt_templates)[0] for message in reversed(users)
    )
    clips, start = [], 0
    for clip in film.clips:
        clips.append(best_frames(clip, scorer(crops[start : start + len(clip.frames)], question)))
        start += len(clip.frames)
    return replace(lay_out(clips, config.video, config.tiling), crops=crops)


def film_masks(config: PreprocessorConfig, example: Example, film: Film) -> FloatArray:
    """[C, N] share of every patch of every frame that is picture."""
    plain = replace(config.tiling, mode=CropMode.resize)
    videos = [example.videos[number] for number in film.crop_videos]
    pairs = zip(videos, film.layouts, strict=True)
    return np.concatenate([patch_masks(video.height, video.width, one, plain) for video, one in pairs])


def _frame_crops(config: PreprocessorConfig, example: Example, film: Film) -> Pixels:
    """The crops [C, S, S, 3] of all frames."""
    size, start = config.image_size, 0
    crops = np.empty((len(film.layouts), size, size, 3), dtype=np.uint8)
    for number, (video, clip) in enumerate(zip(example.videos, film.clips, strict=True), start=1):
        places = {frame: start + place for place, frame in enumerate(clip.frames)}
        for frame, picture in decode_frames(video, clip.frames, name=f"example {example.id}, video {number}"):
            resize(picture, size, size, config.resize, exact=config.exact_resize, out=crops[places[frame]])
        start += len(clip.frames)
    return crops
