"""How much of a picture or a film an evaluation shows, where its task says another number than the checkpoint.

A checkpoint's preprocessor has the crops and frames of its training. `tasks.<t>.max_crops` and `max_frames` stand in
their place (Molmo was trained with 12 crops and answered documents with 36), and questions may have more pictures than
training's bound. No torch here.
"""

from dataclasses import replace

from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Asking
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig


def limited(preprocessor: Preprocessor, asking: Asking, files: int = 0) -> Preprocessor:
    """The preprocessor that a task asks with; the given one where nothing differs.

    Args:
        files: most pictures or films of one question. The bound of training protects its packs and says nothing about
            the model.

    Raises:
        ConfigError: the checkpoint cannot do what the task wants.
    """
    config = limited_config(preprocessor.config, asking)
    if files > config.max_images:
        config = replace(config, max_images=files)
    if config == preprocessor.config:
        return preprocessor
    return Preprocessor(config, preprocessor.tokenizer, preprocessor.frame_scorer)


def limited_config(config: PreprocessorConfig, asking: Asking) -> PreprocessorConfig:
    """The config with the task's crops and frames; see `limited`."""
    if asking.max_crops is not None:
        if config.crop_mode is CropMode.resize:
            raise ConfigError(
                f"max_crops is {asking.max_crops}, but the checkpoint shows every picture as one crop (crop_mode "
                "resize); leave max_crops out, `max_crops: null` where a benchmark sets it"
            )
        config = replace(config, max_crops=asking.max_crops)
    if asking.max_frames is not None:
        config = replace(config, video=replace(config.video, max_frames=asking.max_frames))
    return config
