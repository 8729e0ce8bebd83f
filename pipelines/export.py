"""Writes a checkpoint as transformers' native Molmo2, which other programs load and serve without this project.

usage: python -m pipelines.export checkpoint=FOLDER out=FOLDER [dtype=fp32] [max_positions=N]

checkpoint      a checkpoint's name or folder, such as sft/step-000500 or artifacts/checkpoints/sft/step-000500
out             a new folder: weights under the released names, tokenizer, processor files, chat template
dtype           fp32, bf16 or fp16
max_positions   sequence length that the copy is for; left out, as many as are equal

Logits are equal. What the native class cannot express (other language models than Qwen3, OLMo 2 and OLMo 3, other
encoders than SigLIP, attention within each image, ...) is refused by name. Not a stage: writes no artefact.
Exit codes: 0 written, 2 refused with a message.
"""

from collections.abc import Sequence
from pathlib import Path

from molmo_model.errors import ConfigError
from pipelines.stage import arguments, checkpoint_folder, exit_on_error, option

OPTIONS = ("checkpoint", "out", "dtype", "max_positions")


def parse(argv: Sequence[str], known: tuple[str, ...], required: tuple[str, ...]) -> dict[str, str]:
    """`name=value` arguments as a mapping.

    Raises:
        ConfigError: an unknown, missing, empty or repeated option, by name.
    """
    values: dict[str, str] = {}
    for argument in argv:
        name, value = option(argument)
        if name not in known or not value:
            raise ConfigError(f"{argument!r} is no option; write one of {', '.join(f'{o}=...' for o in known)}")
        if name in values:
            raise ConfigError(f"{name}= is given twice")
        values[name] = value
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{missing[0]}= is missing; --help shows the usage")
    return values


def export(values: dict[str, str]) -> list[str]:
    """Does what the options say; returns what to print."""
    positions = values.get("max_positions")
    if positions is not None and not positions.isdecimal():
        raise ConfigError(f"max_positions={positions} must be a whole number")
    from molmo_model.exchange import export_molmo2

    out = Path(values["out"])
    notes = export_molmo2(
        checkpoint_folder(values["checkpoint"]), out, values.get("dtype", "fp32"), int(positions) if positions else None
    )
    return [f"written to {out}", *(f"  {note}" for note in notes)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("export"):
        print("\n".join(export(parse(argv, OPTIONS, ("checkpoint", "out")))))


if __name__ == "__main__":
    main()
