"""What decides tokens and crops besides the tokenizer: saved in every checkpoint as `molmo_preprocessor.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.lookup import lookup
from molmo_model.model_config import (
    CropMode,
    LossWeighting,
    MessageFormat,
    PointFormat,
    PreprocessingConfig,
    PromptTemplates,
    SelectorConfig,
    SystemPrompt,
)
from molmo_model.preprocessing.augmentation import AugmentationSpec
from molmo_model.preprocessing.image import RESIZE_METHODS
from molmo_model.preprocessing.prompts import PromptFormat
from molmo_model.preprocessing.system_prompts import DEFAULT_LENGTH
from molmo_model.preprocessing.tiling import IM_COL, IM_END, IM_PATCH, IM_START, IMAGE_TOKENS, TilingSpec
from molmo_model.preprocessing.video import VideoSpec

_Kind = TypeVar("_Kind", bound=Enum)

CONFIG_FILE = "molmo_preprocessor.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PreprocessorConfig:
    """Everything that decides tokens and crops, besides the tokenizer. Saved in every checkpoint."""

    image_size: int
    """Pixels per side of a crop."""
    patch_size: int
    pooling_size: tuple[int, int]
    """Height and width of a pooling window in patches."""
    resize: str
    """A name of `image.RESIZE_METHODS`."""
    vocab_size: int
    """Rows of the language model's embedding: the id of the first image token."""
    crop_mode: CropMode = CropMode.overlap_and_resize_c2
    max_crops: int = 12
    overlap_margins: tuple[int, int] = (4, 4)
    max_images: int = 8
    point_format: PointFormat = PointFormat.molmo_v1
    system_prompt: SystemPrompt = SystemPrompt.none
    message_format: MessageFormat = MessageFormat.none
    loss_weighting: LossWeighting = LossWeighting.root_subsegments
    exact_resize: bool = False
    """Resize as transformers' Molmo2 image processor does, to the last bit."""
    tokens_per_window: int = 1
    """`<im_patch>` tokens of each pooling window: the connector's queries with `learned_queries`, `c_abstractor`."""
    patch_masks: bool = False
    """Batches say which share of every patch is picture, for the connector's padding embeddings."""
    shifted_patch_masks: bool = False
    """They say it of the crop after it, as the models released in 2024 were trained; see `crops.patch_masks`."""
    selector_tokens: int = 0
    """High-resolution tokens of every image that a token selector keeps; 0 has none, and all of them enter."""
    selector_min_tokens: int = 0
    """In training the number is drawn between this and `selector_tokens`; 0 keeps it fixed."""
    indicate_tokens: bool = False
    """`K=n` stands before every image."""
    question_first: bool = False
    """The first question stands before the images, so that it decides what is selected."""
    video: VideoSpec = field(default_factory=VideoSpec)
    """How films become frames and tokens."""
    equal_windows: str = ""
    """What in the connector needs pooling windows of one size, such as `pooling stack`; empty: nothing does. Films are
    then refused unless their frames are pooled as images are."""
    prompt_templates: PromptTemplates = PromptTemplates.uber_model
    caption_length: int = DEFAULT_LENGTH
    """What evaluation says of the length of captions, where the system prompt does; 0 says nothing."""
    last_message_loss_only: bool = False
    """Of a conversation of several turns only the last answer is learned."""
    augmentation: AugmentationSpec = field(default_factory=AugmentationSpec)
    """What training changes about pixels."""

    def __post_init__(self) -> None:
        lookup(RESIZE_METHODS, self.resize, "resize method")
        if self.vocab_size < 1 or self.max_images < 1:
            raise ConfigError(f"vocab_size {self.vocab_size} and max_images {self.max_images} must be at least 1")
        _ = self.tiling  # refuses a geometry that cannot be
        if self.caption_length < 0:
            raise ConfigError(f"caption_length is {self.caption_length}; it must be at least 0")
        if self.selector_tokens:
            self._check_selector()

    def _check_selector(self) -> None:
        if self.crop_mode is not CropMode.overlap_and_resize_c2:
            raise ConfigError(
                f"a token selector needs low-resolution tokens to choose by and high-resolution ones to choose from, "
                f"apart; crop_mode {self.crop_mode.value} has no such pair, use overlap_and_resize_c2"
            )
        if self.augmentation.p_high_res:
            raise ConfigError(
                "a token selector chooses from one number of crops; set preprocessing.augmentation.p_high_res to 0"
            )
        if self.tokens_per_window != 1:
            raise ConfigError(
                f"a token selector chooses pooling windows of one token each, not of {self.tokens_per_window}; "
                "use a pooling with one query"
            )
        if self.selector_min_tokens > self.selector_tokens:
            raise ConfigError(
                f"selector.min_tokens {self.selector_min_tokens} is more than selector.tokens {self.selector_tokens}"
            )

    @classmethod
    def build(
        cls,
        preprocessing: PreprocessingConfig,
        *,
        image_size: int,
        patch_size: int,
        pooling_size: int | Sequence[int],
        resize: str,
        vocab_size: int,
        tokens_per_window: int = 1,
        patch_masks: bool = False,
        selector: SelectorConfig | None = None,
        equal_windows: str = "",
    ) -> "PreprocessorConfig":
        """The config of a model.

        Args:
            preprocessing: the section of the params.
            image_size, patch_size, resize: of the vision encoder; `preprocessing.resize` overrides the last.
            pooling_size: patches per side of a pooling window, or its height and width; [0, 0] is a whole crop.
            vocab_size: rows of the language model's embedding, which may be more than the tokenizer has tokens.
            tokens_per_window, patch_masks: what the connector makes of a window and needs.
            selector: the model's section of that name.
            equal_windows: what in the connector needs windows of one size; see the field.

        Raises:
            ConfigError: an unknown name, or sizes that do not fit together.
        """
        pool = (pooling_size, pooling_size) if isinstance(pooling_size, int) else tuple(pooling_size)
        if not any(pool):
            pool = (image_size // patch_size,) * len(pool)
        margins = tuple(preprocessing.overlap_margins)
        if len(margins) != 2 or len(pool) != 2:
            raise ConfigError(f"overlap_margins {list(margins)} and pooling size {list(pool)} must be two numbers each")
        return cls(
            image_size=image_size,
            patch_size=patch_size,
            pooling_size=(pool[0], pool[1]),
            resize=preprocessing.resize or resize,
            vocab_size=vocab_size,
            crop_mode=preprocessing.crop_mode,
            max_crops=preprocessing.max_crops,
            overlap_margins=(margins[0], margins[1]),
            max_images=preprocessing.max_images,
            point_format=preprocessing.point_format,
            system_prompt=_choice(SystemPrompt, preprocessing.system_prompt, "system_prompt"),
            message_format=preprocessing.message_format,
            loss_weighting=_choice(LossWeighting, preprocessing.loss_weighting, "loss_weighting"),
            prompt_templates=_choice(PromptTemplates, preprocessing.prompt_templates, "prompt_templates"),
            caption_length=preprocessing.caption_length,
            last_message_loss_only=preprocessing.last_message_loss_only,
            augmentation=AugmentationSpec.of(preprocessing.augmentation),
            exact_resize=preprocessing.exact_resize,
            tokens_per_window=tokens_per_window,
            patch_masks=patch_masks,
            selector_tokens=selector.tokens if selector else 0,
            selector_min_tokens=(selector.min_tokens or 0) if selector else 0,
            indicate_tokens=selector.indicate_tokens if selector else False,
            question_first=selector.question_first if selector else False,
            video=VideoSpec.of(preprocessing.video),
            equal_windows=equal_windows,
        )

    @property
    def tiling(self) -> TilingSpec:
        """The geometry's part of this config."""
        return TilingSpec(
            self.image_size,
            self.patch_size,
            self.pooling_size,
            self.overlap_margins,
            self.max_crops,
            self.crop_mode,
            self.tokens_per_window,
            RESIZE_METHODS[self.resize].letterbox,
        )

    @property
    def prompts(self) -> PromptFormat:
        """The texts' part of this config."""
        return PromptFormat(
            self.system_prompt, self.message_format, self.point_format, self.prompt_templates, self.caption_length
        )

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of every image token."""
        return {token: self.vocab_size + place for place, token in enumerate(IMAGE_TOKENS)}

    @property
    def im_start_id(self) -> int:
        return self.vocab_size + IM_START

    @property
    def im_end_id(self) -> int:
        return self.vocab_size + IM_END

    @property
    def im_patch_id(self) -> int:
        return self.vocab_size + IM_PATCH

    @property
    def im_col_id(self) -> int:
        return self.vocab_size + IM_COL

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the version of the format. What came later is left out where it is as it always was."""
        plain = {name: _plain(value) for name, value in asdict(self).items()}
        later = {one.name: getattr(self, one.name) == _default(one) for one in fields(self) if one.name in _LATER}
        return {"version": FORMAT_VERSION} | {name: x for name, x in plain.items() if not later.get(name, False)}

    @classmethod
    def from_json(cls, raw: dict[str, Any], source: str = CONFIG_FILE) -> "PreprocessorConfig":
        """The config that `to_json` wrote.

        Raises:
            CheckpointError: another version, or unknown, missing or wrong values; names `source`.
        """
        values = dict(raw)
        if (version := values.pop("version", None)) != FORMAT_VERSION:
            raise CheckpointError(f"{source}: version is {version!r}, this code reads {FORMAT_VERSION}")
        try:
            for name, kind in _ENUMS.items():
                if name in values or name not in _LATER:
                    values[name] = kind(values[name])
            for name in ("pooling_size", "overlap_margins"):
                first, second = values[name]
                values[name] = (first, second)
            values["video"] = VideoSpec.from_json(values.get("video", {}))
            values["augmentation"] = AugmentationSpec.from_json(values.get("augmentation", {}))
            return cls(**values)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{source}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


_LATER = ("prompt_templates", "caption_length", "last_message_loss_only", "augmentation")
"""Fields that older checkpoints do not have; left out of the file where they are the default."""


def _default(one: Any) -> Any:
    """The default of a dataclass field."""
    return one.default_factory() if callable(one.default_factory) else one.default


_ENUMS: dict[str, type[Enum]] = {
    "crop_mode": CropMode,
    "point_format": PointFormat,
    "system_prompt": SystemPrompt,
    "message_format": MessageFormat,
    "prompt_templates": PromptTemplates,
    "loss_weighting": LossWeighting,
}


def _choice(kind: type[_Kind], value: Any, what: str) -> _Kind:
    choice: _Kind = lookup({member.value: member for member in kind}, value, what)
    return choice
