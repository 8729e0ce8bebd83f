"""What a model is, as dataclasses: the part of `params.yaml` below `models:`.

Choices are enums, sizes left at None are the family's own, and nothing here imports torch. `molmo_model.config` reads
and checks the file; the transformers configuration is built from these in `molmo_model.nn.build`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class CropMode(StrEnum):
    """How an image becomes crops."""

    resize = "resize"
    """One crop: the whole image squashed or letterboxed to the encoder's input size."""
    overlap_and_resize = "overlap_and_resize"
    """High-resolution overlapping crops only."""
    overlap_and_resize_c2 = "overlap_and_resize_c2"
    """One global low-resolution crop first, then the overlapping high-resolution crops."""
    hierarchical = "hierarchical"
    """The crops of `overlap_and_resize_c2`, but one set of tokens: each token holds its window of the stitched
    high-resolution grid and the patch of the global crop that shows the same place; the connector fuses the scales."""


class VisionPositions(StrEnum):
    """How the vision encoder knows where a patch is."""

    native = "native"
    """The encoder's own learned positions, interpolated to the input size where it differs from the pretrained one."""
    learned_2d = "learned_2d"
    """The native ones, and a learned vector per row and column of a crop, zero at first, added to the features."""
    rope_2d = "rope_2d"
    """Rotary positions over rows and columns in every block instead of the native ones; for models from scratch."""


class Pooling(StrEnum):
    """How the patches of one pooling window become one image token, or `num_queries` of them."""

    none = "none"
    """No pooling: one token per patch; needs `pooling_size: [1, 1]`."""
    mean = "mean"
    """Average of the window, without its holes if they are masked. `"2"` is this with `pooling_size: [2, 2]`, `"4"`
    with [4, 4]."""
    attention_meanq = "attention_meanq"
    """Multi-head attention whose one query is the mean of the window."""
    attention_meanq_2x = "attention_meanq_2x"
    """The same with heads, and so the projector's input, twice as wide."""
    attention_meanq_4x = "attention_meanq_4x"
    """The same, four times as wide."""
    attention = "attention"
    """Multi-head attention whose query is the first (top left) patch of the window; masked, the first that is none of
    its holes."""
    attention_2wide = "attention_2wide"
    """The same with heads, and so the projector's input, twice as wide."""
    learned_queries = "learned_queries"
    """Cross-attention of `num_queries` learned queries to the window, each of which becomes a token."""
    c_abstractor = "c_abstractor"
    """Convolutions over the window, pooled to `num_queries` places (a square number), convolutions again."""
    stack = "stack"
    """The patches of the window side by side on the channel, holes as zeros."""


class Projector(StrEnum):
    """How a pooled feature becomes a vector of the language model's width."""

    linear = "linear"
    """One matrix without bias."""
    mlp = "mlp"
    """SwiGLU without biases: `w2(silu(w1 x) * w3 x)`."""
    mlpx = "mlpx"
    """SwiGLU to the language model's width, then `y + SwiGLU(y)` at that width; both as wide inside."""


class PaddingEmbedding(StrEnum):
    """What tells padded patches of letterboxed crops apart, added to the features before pooling, zero at first. Needs
    a `resize` that letterboxes."""

    none = "none"
    pad_embed = "pad_embed"
    """One vector on patches that are all padding."""
    regress = "regress"
    """One vector, weighted by the share of the patch that is picture."""
    pad_and_partial_pad = "pad_and_partial_pad"
    """One vector on patches that are all padding, another on those that are so in part."""


class ScaleFusion(StrEnum):
    """How the scales of a hierarchical token become one feature."""

    sum = "sum"
    """Each scale is pooled by itself; the pooled features are added, the global one through a matrix."""
    concat = "concat"
    """They are put side by side on the channel and brought back to the encoder's width by a matrix."""


class PointFormat(StrEnum):
    """How points are written in text; see `preprocessing/points.py`."""

    molmo_v1 = "molmo_v1"
    """`<point x="10.5" y="20.0" alt="a">a</point>`, percent of the image with one decimal."""
    html_v1 = "html_v1"
    """`<points coords="1 1 042 310 2 500 120">a</points>`: image number, then index, x and y in thousandths; images or
    frames are separated by a tab. Molmo2's first format."""
    html_v2 = "html_v2"
    """The same, images or frames separated by a semicolon."""


class MessageFormat(StrEnum):
    """How messages are told apart. Answers end with the tokenizer's end of text, unless said otherwise."""

    none = "none"
    """Texts alone; every message but the first begins with a space."""
    role = "role"
    """`User: question Assistant:` and ` answer`, as in the released Molmo models."""
    chatml = "chatml"
    """`<|im_start|>user ... <|im_end|>` as the Qwen family was trained with, and Molmo2 with it. The tokenizer must
    have both tokens; answers end with `<|im_end|>`, whatever else the tokenizer ends a text with."""


class SystemPrompt(StrEnum):
    """What stands before the first question of a conversation: a tag with its style; see
    `preprocessing/system_prompts.py`. Demo styles are what a person gets who just asks: captions, points, free
    questions."""

    none = "none"
    style = "style"
    """The style's name, as in `scene_count: How many ...`."""
    demo_or_style = "demo_or_style"
    """The same, but demo styles only once in ten times, and never in evaluation."""
    demo_or_style_v2 = "demo_or_style_v2"
    """The style's name, but never of demo styles and of questions with choices. Molmo2's."""
    style_and_length = "style_and_length"
    """The style's name and, of captions, nine times in ten about how long the answer is: `long_caption 83:`; without a
    length `long_caption :`, as the captioners of 2024 were trained."""
    style_and_length_v2 = "style_and_length_v2"
    """The same; without a length `long_caption:`."""
    style_and_length_v3 = "style_and_length_v3"
    """The same, the length in units of 25 letters and noisy by 5% of itself."""
    no_style = "no_style"
    """Nothing, as `none`; Molmo2's name for it."""


class PromptTemplates(StrEnum):
    """Which questions are put in words of this project's; see `preprocessing/templates.py`."""

    none = "none"
    """None: pointing is asked for by the label alone, captions by nothing, which needs a `system_prompt`."""
    uber_model = "uber_model"
    """Captions, transcripts, pointing, explanations, short answers about films. Academic sets stay as they are."""
    uber_model_v2 = "uber_model_v2"
    """The same, and all questions with choices."""


class LossWeighting(StrEnum):
    """How the loss is shared out among the conversations of one example, besides their own weights."""

    root_subsegments = "root_subsegments"
    """Each of k conversations counts 1 / sqrt(k): more than one alone, less than k apart."""
    root_length = "root_length"
    """A conversation of n answered tokens counts 2 / sqrt(n): long answers count more than short ones, but less than
    in proportion to their length."""
    root_subsegments_root_length = "root_subsegments_root_length"
    """The product of both. Molmo2's `root_subsegments_root_tokens`."""
    none = "none"


CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
"""The tokens of `MessageFormat.chatml`."""
CONNECTOR_MODULES = ("connector", "extra_embedding", "learned_positions", "temporal", "token_selector")
"""Modules, as parameters are named, that the `connector` component is made of: what is new beside the two towers."""
GPU_CHUNK = 1024
"""Answered tokens whose logits exist at a time in training on a GPU: 0.6 GB in fp32 for 152,064 words."""


class FrameSampling(StrEnum):
    """Which frames of a clip are shown."""

    uniform = "uniform"
    """`max_frames` evenly spread times, the first at the clip's start, the end not included."""
    uniform_last_frame = "uniform_last_frame"
    """The same, the last frame included."""
    fps = "fps"
    """The highest of the candidate rates that needs no more than `max_frames`; if even the lowest needs more, its
    first `max_frames`."""
    fps_uniform = "fps_uniform"
    """The same, but uniform if even the lowest rate needs more."""


class FrameTimes(StrEnum):
    """How the model is told when a frame was shown, as text."""

    none = "none"
    per_frame = "per_frame"
    """`time 12.34 ` before each frame, seconds in the clip's container time."""
    per_frame_compact = "per_frame_compact"
    """`12.3 ` before each frame."""
    fps_prefix = "fps_prefix"
    """`FPS 2.00 ` before all frames."""
    delta_prefix = "delta_prefix"
    """`Sampling Delta 0.50 ` before all frames, seconds between frames."""


class TokenScore(StrEnum):
    """What decides which high-resolution tokens a HeMolmo keeps."""

    learned = "learned"
    """The scorer over the language model's low-resolution states, and the prior where there is one."""
    prior_only = "prior_only"
    """The prior over the high-resolution features alone: the question has no say."""
    random = "random"
    """Random tokens: the baseline."""


@dataclass
class VisionConfig:
    """The vision encoder. Sizes left at None take the encoder's defaults or those of `pretrained`."""

    encoder: str = MISSING
    """A name of the table in `molmo_model.nn.vision_encoder`, such as `siglip` or `clip`."""
    pretrained: str | None = None
    """Hub id or folder of a transformers vision model; None builds it from the sizes below."""
    image_size: int | None = None
    """Pixels per side of one square crop, a multiple of `patch_size`. Other than that of `pretrained`: its learned
    positions are interpolated."""
    patch_size: int | None = None
    """Pixels per side of one patch."""
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    """Layers of the full encoder; negative `feature_layers` count from here, and unused last ones are not built."""
    num_heads: int | None = None
    feature_layers: list[int] = field(default_factory=list)
    """Blocks whose outputs are concatenated on the channel, in this order; 0-based, negative from the end. Empty takes
    the encoder's own, such as [-2, -9] for CLIP."""
    positions: VisionPositions = VisionPositions.native


@dataclass
class ConnectorConfig:
    """From patch features to image tokens."""

    pooling: Pooling = Pooling.attention_meanq
    pooling_size: list[int] = field(default_factory=lambda: [2, 2])
    """Height and width, in patches, of one pooling window on the stitched grid; [1, n] pools along rows only. [0, 0] is
    a window as large as one crop."""
    num_queries: int = 1
    """Image tokens that each window becomes, with `learned_queries` and `c_abstractor`."""
    num_heads: int = 4
    """Attention heads of the pooling."""
    pooling_attention_mask: bool = True
    """True: holes of a window take no part in the mean and the attention. False: they count as zero vectors."""
    window_position_embedding: bool = False
    """Adds a learned vector per place in the window before pooling. Not in Molmo; speeds up training from scratch."""
    padding_embedding: PaddingEmbedding = PaddingEmbedding.none
    feature_dropout: float = 0.0
    """Dropout on patch features before pooling."""
    scale_fusion: ScaleFusion = ScaleFusion.sum
    """With `crop_mode: hierarchical`."""
    projector: Projector = Projector.mlp
    projector_hidden_size: int | None = None
    """Hidden width of the projector; None is the language model's MLP width, as in the released models. (The reference
    code's `mlp_hidden_size // 2` is the same: it counts the gate and the up matrix together.)"""


@dataclass
class LanguageConfig:
    """The language model. Sizes left at None take those of `pretrained`."""

    family: str = MISSING
    """A name or alias of the tables in `molmo_model.nn.language_model`, such as `qwen2` or `llama3`."""
    pretrained: str | None = None
    """Hub id or folder of a transformers causal language model; None builds it from the sizes below."""
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    """Width of one attention head, in families where it may differ from `hidden_size / num_heads` (Qwen3)."""
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    vocab_size: int | None = None
    """Rows of the embedding of a model that is built, not loaded; None is the tokenizer's. Extra ids begin here."""
    rope_theta: float | None = None
    """Base of the rotary positions of a model that is built; None is the family's own for short contexts."""
    sliding_window: int | None = None
    """Positions that sliding layers see back, in families that have such layers (OLMo3)."""
    num_experts: int | None = None
    """Experts of each layer (OLMoE)."""
    num_experts_per_token: int | None = None
    extra_vocab_size: int = 16
    """Rows of the extra embedding for image tokens; ids begin exactly at the language model's embedding size."""
    bidirectional_images: bool = True
    """Tokens of one image see each other in both directions."""
    one_image_block: bool = False
    """With `bidirectional_images`: all images of an example form one block, whose tokens see each other whichever image
    they belong to. The rule of transformers' Molmo2, which a model must be trained with to be exported to it."""
    residual_dropout: float = 0.0
    """Dropout on what attention and MLP add to the residual stream, on tokens that are not answered."""
    response_residual_dropout: float | None = None
    """The same on answered tokens; None is `residual_dropout`."""
    embedding_dropout: float = 0.0
    load_balancing_weight: float = 0.01
    """Factor of the experts' load-balancing loss (Switch Transformer); mixtures of experts only."""
    router_z_weight: float = 0.001
    """Factor of the router's z-loss (ST-MoE); mixtures of experts only."""


@dataclass
class VideoConfig:
    """How clips become frames and tokens, and what of the model looks across frames (VideoOlmo)."""

    max_frames: int = 8
    sampling: FrameSampling = FrameSampling.uniform
    candidate_fps: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    random_sampling: bool = False
    """In training each frame is drawn from its interval, by the example's own generator, their number staying the same;
    evaluation stays fixed."""
    times: FrameTimes = FrameTimes.per_frame
    pooling_size: list[int] = field(default_factory=lambda: [3, 3])
    """Height and width in patches of the pooling window of low-resolution frames."""
    high_res_every: int = 0
    """Every n-th frame, the first included, is pooled by the connector's `pooling_size` instead; 0 is none."""
    select_frames_by_query: str | None = None
    """Hub id or folder of a SigLIP(2) text-image model that scores frames against the question; the best ones, as many
    as `high_res_every` would give, become the high-resolution frames. None spaces them evenly. One conversation per
    sequence then. The model is not part of the checkpoint, which names it."""
    temporal_position_embedding: bool = False
    """A learned vector per frame number (`max_frames` of them), zero at first, added to the frame's features."""
    temporal_attention_layers: int = 0
    """Layers of attention over the same patch of all frames, after the encoder; zero at first."""
    frames_per_batch: int = 0
    """Frames (and crops of images) that the vision encoder sees at once in inference, to bound memory; 0 is all."""


@dataclass
class SelectorConfig:
    """HeMolmo: only the high-resolution tokens that matter enter the language model."""

    tokens: int = MISSING
    """K, high-resolution tokens that are kept of each image."""
    min_tokens: int | None = None
    """In training K is drawn between this and `tokens` by the example's own generator; None keeps it fixed."""
    indicate_tokens: bool = False
    """The prompt says `K=n`."""
    question_first: bool = False
    """The question stands before the image, so that it decides what is selected. One conversation per sequence then."""
    score: TokenScore = TokenScore.learned
    low_res_layers: int | None = None
    """Layers of the language model that the low-resolution pass runs; None is all."""
    gradient_layers: list[int] = field(default_factory=list)
    """[first, end) layers of that pass that get gradients; empty is none. Without `all_layers` its last layer must be
    among them, or none would arrive."""
    gradient_embedding: bool = False
    """The low-resolution pass also sends gradients into the embeddings and image features."""
    all_layers: bool = False
    """Score from the states of all layers of the pass instead of the last."""
    norm: bool = True
    """States and features are normalised before they are scored; inside a language model they can be very large."""
    hidden_size: int = 1024
    """Width of the scorer's and the prior's MLP; 0 is a linear scorer."""
    dropout: float = 0.1
    prior: bool = True
    """Adds a score of the high-resolution features themselves."""
    query: bool = False
    """Adds a dot product of the state of the image's end token with the high-resolution features."""
    offset: float = 0.2
    """Added to the scores of what is selected, before the sigmoid."""
    gate_at_test: bool = False
    """Values are scaled by importance in evaluation too, not only in training."""
    gate_dropout: float = 0.1
    """Share of selected tokens whose importance is set to 1 in training."""
    target_importance: float = 0.7
    importance_weight: float = 0.01
    """Factor of `|mean importance - target|`."""
    saturation_weight: float = 0.0
    """Factor of the penalty on scores beyond 10 in size."""


@dataclass
class AugmentationConfig:
    """What training changes about the pixels of images, drawn anew for every example and epoch by the example's own
    generator; see `preprocessing/augmentation.py`. Nothing by default; films and evaluation never."""

    crop: float = 0.0
    """Probability that a window of the image is shown instead of the whole, at the whole's size, so that the tokens
    stay the same. All points of the example lie in the window, and are moved with it."""
    crop_scale: list[float] = field(default_factory=lambda: [0.6, 1.0])
    """Least and most of the image's width and height that a window has."""
    crop_stretch: float = 0.0
    """Width and height of the window differ by up to this share from each other: 0.1 is 10%."""
    crop_styles: list[str] = field(default_factory=list)
    """Styles that remain true of a window, though they do not answer with points. Without it only examples are cut all
    of whose conversations answer with points: what a caption or a document's question speaks of may be cut away."""
    brightness: float = 0.0
    """All values are multiplied by a factor in [1 - x, 1 + x]."""
    contrast: float = 0.0
    """The same for their distance from the image's mean grey."""
    saturation: float = 0.0
    """The same for their distance from the pixel's own grey."""
    hue: float = 0.0
    """Colours turn by up to this share of the colour circle, either way."""
    resize_noise: float = 0.0
    """Probability that the image is shrunk to between half and all of its sides and enlarged again, each by a drawn
    interpolation: what becomes of pictures on their way through the web."""
    p_high_res: float = 0.0
    """Probability that an image gets up to `high_res_max_crops` crops. Packs are planned for the larger of both."""
    high_res_max_crops: int = 24
    high_res_styles: list[str] = field(default_factory=list)
    """Only images with a conversation of these styles; empty is all. Molmo2 has 0.3 for pointing alone."""


@dataclass
class PreprocessingConfig:
    """From an example to tokens and crops; saved inside every checkpoint as `molmo_preprocessor.json`."""

    crop_mode: CropMode = CropMode.overlap_and_resize_c2
    max_crops: int = 12
    """Most high-resolution crops of one image; the global crop comes on top."""
    overlap_margins: list[int] = field(default_factory=lambda: [4, 4])
    """Patches that a crop overlaps its neighbour by, on the left/top and on the right/bottom."""
    max_images: int = 8
    """Images of one example beyond this number are refused."""
    resize: str | None = None
    """A name of the resize methods of `preprocessing.image`; None is the encoder's own."""
    exact_resize: bool = False
    """Resize exactly as transformers' Molmo2 image processor does, several times slower, instead of within one level
    of 255."""
    point_format: PointFormat = PointFormat.molmo_v1
    system_prompt: SystemPrompt = SystemPrompt.none
    message_format: MessageFormat = MessageFormat.none
    prompt_templates: PromptTemplates = PromptTemplates.uber_model
    caption_length: int = 65
    """With `system_prompt: style_and_length`: the length that evaluation asks captions for, in units of 15 letters (25
    in v3); 0 asks for none."""
    loss_weighting: LossWeighting = LossWeighting.root_subsegments
    last_message_loss_only: bool = False
    """Of a conversation of several turns only the last answer is learned."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass
class ModelConfig:
    """One model that runs can start from; assembled once by `pipelines.assemble`."""

    preset: str | None = None
    """A name of the table in `molmo_model.presets`, whose values stand wherever this model gives none."""
    checkpoint: str | None = None
    """Folder of a whole model, as `pipelines.import_checkpoint` writes it, whose weights are taken instead of drawn
    ones; the sizes must be those given here. The tokenizer is named apart and may be the same folder."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    selector: SelectorConfig | None = None
    """Makes the model a HeMolmo."""
    tokenizer: str = MISSING
    """Hub id or folder with `tokenizer.json`."""


AT_LEAST_0, AT_LEAST_1, ABOVE_0 = (0.0, 1e18), (1.0, 1e18), (1e-12, 1e18)
SHARE = (0.0, 0.999999)
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
BOUNDS: dict[type, dict[str, tuple[float, float]]] = {
    VisionConfig: dict.fromkeys((*_SIZES, "image_size", "patch_size"), AT_LEAST_1),
    ConnectorConfig: {
        **dict.fromkeys(("num_queries", "num_heads", "projector_hidden_size"), AT_LEAST_1),
        "pooling_size": AT_LEAST_0,
        "feature_dropout": SHARE,
    },
    LanguageConfig: {
        **dict.fromkeys((*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"), AT_LEAST_1),
        **dict.fromkeys(("vocab_size", "sliding_window", "num_experts", "num_experts_per_token"), AT_LEAST_1),
        "extra_vocab_size": AT_LEAST_1,
        "rope_theta": ABOVE_0,
        **dict.fromkeys(("residual_dropout", "response_residual_dropout", "embedding_dropout"), SHARE),
        **dict.fromkeys(("load_balancing_weight", "router_z_weight"), AT_LEAST_0),
    },
    VideoConfig: {
        **dict.fromkeys(("max_frames", "pooling_size"), AT_LEAST_1),
        **dict.fromkeys(("high_res_every", "temporal_attention_layers", "frames_per_batch"), AT_LEAST_0),
        "candidate_fps": (1e-6, 1e6),
    },
    SelectorConfig: {
        **dict.fromkeys(("tokens", "min_tokens", "low_res_layers"), AT_LEAST_1),
        **dict.fromkeys(("gradient_layers", "hidden_size", "offset"), AT_LEAST_0),
        **dict.fromkeys(("importance_weight", "saturation_weight"), AT_LEAST_0),
        **dict.fromkeys(("dropout", "gate_dropout"), SHARE),
        "target_importance": (0, 1),
    },
    PreprocessingConfig: {
        "max_crops": (1, 10_000),
        "overlap_margins": AT_LEAST_0,
        "max_images": AT_LEAST_1,
        "caption_length": AT_LEAST_0,
    },
    AugmentationConfig: {
        **dict.fromkeys(("crop", "resize_noise", "p_high_res", "brightness", "contrast", "saturation"), (0, 1)),
        "crop_scale": (0.05, 1),
        "crop_stretch": (0, 0.9),
        "hue": (0, 0.5),
        "high_res_max_crops": (1, 10_000),
    },
}
"""Smallest and largest value of every number, both allowed; of each element where the value is a list."""
