"""Asks a checkpoint a question about a picture or a film, prints the answer, saves the picture with its points drawn.

usage: python -m pipelines.generate checkpoint=FOLDER prompt=TEXT [image=FILE ... | video=FILE ...] [out=answer.png]
                                    [option=TEXT ...] [style=NAME] [length=N] [heatmap=FILE] [max_new_tokens=256]
                                    [precision=fp32] [keep_image_tokens=1] [decoding.NAME=VALUE ...]

checkpoint      a checkpoint's name or folder, such as sft/step-000500 or artifacts/checkpoints/sft/step-000500
image           a picture; several `image=` are asked about together, up to the model's max_images
video           a film, in place of pictures, for a model that was trained with films; FILE,START,END is the part of it
                between two seconds; several may be given
prompt          the question
out             where the first picture goes, the points of the answer drawn; answer.png, written only if there are any
heatmap         where the selection of a HeMolmo goes: each picture with the tokens that the model kept for this
                question in the colour of their importance; further pictures as NAME-2.png, NAME-3.png ...
max_new_tokens  the answer is cut off there
option          a choice that the question offers; several, in their order, are written behind it as in training
style           task family that the question is asked in, for a model whose prompts depend on it (docs/prompts.md)
length          about how long a caption is to be, in units of 15 letters, for a model trained with `style_and_length`
precision       fp32, bf16 or fp16
keep_image_tokens  share of each picture's tokens that the language model sees
decoding.NAME   as in the params: decoding.num_beams=3, or decoding.do_sample=true decoding.top_p=0.9 decoding.seed=1

examples:
  python -m pipelines.generate checkpoint=sft/step-000500 image=scene.png prompt='How many digits are there?'
  python -m pipelines.generate checkpoint=sft/step-000500 image=scene.png prompt='Point to the digit 7.'
  python -m pipelines.generate checkpoint=sft/step-000500 image=scene.png prompt='List the digits.' decoding.num_beams=3
  python -m pipelines.generate checkpoint=sft/step-000500 video=clip.mp4,2,4.5 prompt='Which digit appears last?'

Not a stage: writes no artefact. Exit codes: 0 answered, 2 refused with a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_model.errors import ConfigError, DataError
from pipelines.stage import arguments, checkpoint_folder, exit_on_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from molmo_model.data.example import Image, Video
    from molmo_model.eval.answering import Question
    from molmo_model.eval.inference import Predictor

OPTIONS = (
    *("checkpoint", "prompt", "image", "video", "out", "heatmap", "max_new_tokens", "style", "length", "option"),
    *("precision", "keep_image_tokens", "decoding.NAME"),
)


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    checkpoint: Path
    prompt: str
    images: list[Path] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    """`FILE` or `FILE,START,END` each."""
    out: Path | None = None
    heatmap: Path | None = None
    decoding: list[str] = field(default_factory=list)
    """Settings of `molmo_model.config.DecodingConfig`, as `key=value`."""
    keep_image_tokens: float = 1.0
    max_new_tokens: int = 256
    options: tuple[str, ...] = ()
    """Choices that the question offers."""
    style: str | None = None
    """None is that of a question as people ask it."""
    length: int | None = None
    """Of a caption; see `Preprocessor.encode_prompt`."""
    precision: str = "fp32"


def parse(argv: Sequence[str]) -> Request:
    """The request of a command line.

    Raises:
        ConfigError: an unknown, missing, repeated or wrong option, by name.
    """
    values: dict[str, str] = {}
    images, videos, decoding, options = [], [], [], []
    for argument in argv:
        name, separator, value = argument.partition("=")
        if separator and name.startswith("decoding."):
            decoding.append(argument.removeprefix("decoding."))
            continue
        if not separator or name not in OPTIONS:
            raise ConfigError(f"{argument!r} is no option; write one of {', '.join(f'{o}=...' for o in OPTIONS)}")
        if not value:
            raise ConfigError(f"{name}= is empty")
        if name == "image":
            images.append(Path(value))
        elif name == "video":
            videos.append(value)
        elif name == "option":
            options.append(value)
        elif name in values:
            raise ConfigError(f"{name}= is given twice; only image=, video= and option= may be")
        else:
            values[name] = value
    for name in ("checkpoint", "prompt"):
        if name not in values:
            raise ConfigError(f"{name}= is missing; --help shows the usage")
    if "heatmap" in values and not images:
        raise ConfigError("heatmap= shows what is selected of a picture; give an image=")
    tokens, length = values.get("max_new_tokens", "256"), values.get("length")
    if not tokens.isdecimal() or int(tokens) < 1:
        raise ConfigError(f"max_new_tokens={tokens} must be a whole number of at least 1")
    if length is not None and not length.isdecimal():
        raise ConfigError(f"length={length} must be a whole number, 0 for none")
    try:
        keep = float(values.get("keep_image_tokens", "1"))
    except ValueError as error:
        raise ConfigError(f"keep_image_tokens={values['keep_image_tokens']} must be a number, 0 to 1") from error
    return Request(
        checkpoint=checkpoint_folder(values["checkpoint"]),
        prompt=values["prompt"],
        images=images,
        videos=videos,
        out=Path(values["out"]) if "out" in values else None,
        heatmap=Path(values["heatmap"]) if "heatmap" in values else None,
        max_new_tokens=int(tokens),
        options=tuple(options),
        style=values.get("style"),
        length=None if length is None else int(length),
        precision=values.get("precision", "fp32"),
        decoding=decoding,
        keep_image_tokens=keep,
    )


def answer(request: Request) -> str:
    """Answers a request, saves the picture if it was asked for or there are points; returns what to print.

    Raises:
        MolmoError: the checkpoint or a picture cannot be read, or the picture cannot be saved; or a heatmap is asked of
            a model without a token selector.
    """
    from molmo_model.config import EvalPrecision, lookup, read_decoding
    from molmo_model.data.example import Conversation, Example, Message

    precision = lookup({item.value: item for item in EvalPrecision}, request.precision, "precision")
    decoding = read_decoding(request.decoding, request.max_new_tokens, "generate")
    read = [_read(path) for path in request.images]
    # the answer's turn is only there because a conversation ends with one; the model is given what stands before it
    turns = (Message("user", request.prompt, options=request.options), Message("assistant", "A"))
    videos = tuple(_film(given) for given in request.videos)

    from molmo_model.eval.answering import Question
    from molmo_model.eval.inference import Predictor
    from molmo_model.preprocessing.points import extract_points
    from molmo_model.preprocessing.system_prompts import default_style

    predictor = Predictor.load(request.checkpoint, precision)
    style = request.style or default_style(predictor.preprocessor.config.system_prompt)
    example = Example("question", tuple(image for image, _ in read), (Conversation(style, turns),), videos=videos)
    if request.heatmap is not None:
        from molmo_model.eval.heatmap import require_selector

        require_selector(predictor)
    question = [Question(example, length=request.length)]
    (said,) = predictor.answer(question, request.max_new_tokens, decoding, request.keep_image_tokens)
    points = extract_points(said.text)
    lines = [said.text + (f" [cut off at {said.tokens} tokens]" if said.finish_reason == "length" else "")]
    if read and (points or request.out is not None):
        lines.append(_save(read[0][1], points, request.out or Path("answer.png")))
    if request.heatmap is not None:
        lines += _save_selection(predictor, question[0], [pixels for _, pixels in read], request.heatmap)
    return "\n".join(lines)


def _read(path: Path) -> "tuple[Image, npt.NDArray[np.uint8]]":
    """A picture as the model gets it, and its pixels [H, W, 3]."""
    from molmo_model.data.example import Image
    from molmo_model.preprocessing.image import decode_image

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error
    pixels = decode_image(data, name=str(path))
    return Image(data, pixels.shape[1], pixels.shape[0], path.suffix.lstrip(".").upper() or "PNG"), pixels


def _film(given: str) -> "Video":
    """A film, or the part of it between two seconds."""
    from molmo_model.data.video_file import probe_video

    name, *seconds = given.split(",")
    try:
        clip = (float(seconds[0]), float(seconds[1])) if len(seconds) == 2 else None
    except ValueError as error:
        raise ConfigError(f"video={given}: the part must be two numbers of seconds, FILE,START,END") from error
    if seconds and clip is None:
        raise ConfigError(f"video={given} must be FILE, or FILE,START,END for a part of it")
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"video {name} cannot be read: {error.strerror}") from error
    return probe_video(data, name=name, clip=clip)


def _save(pixels: "npt.NDArray[np.uint8]", points: list[tuple[float, float]], out: Path) -> str:
    """Saves the picture and says so."""
    from molmo_model.eval.drawing import draw_points

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_points(pixels, points).save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"out={out} cannot be written: {error}") from error
    places = ", ".join(f"({x:g}, {y:g})" for x, y in points)
    return f"{len(points)} point{'' if len(points) == 1 else 's'} drawn in {out}{': ' if points else ''}{places}"


def _save_selection(
    predictor: "Predictor", question: "Question", pictures: "list[npt.NDArray[np.uint8]]", out: Path
) -> list[str]:
    """Saves every picture with what the model kept of it, and says so."""
    from molmo_model.eval.heatmap import draw_selection, selected_tokens

    lines = []
    for number, (pixels, found) in enumerate(zip(pictures, selected_tokens(predictor, question), strict=True), start=1):
        path = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_selection(pixels, found).save(path)
        except (OSError, ValueError) as error:
            raise DataError(f"heatmap={path} cannot be written: {error}") from error
        lines.append(f"{found.kept} of {found.importance.size} tokens of the picture kept, drawn in {path}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("generate"):
        print(answer(parse(argv)))


if __name__ == "__main__":
    main()
