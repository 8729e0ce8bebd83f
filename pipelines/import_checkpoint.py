"""Reads a model of another layout and writes it as a checkpoint folder of this project.

usage: python -m pipelines.import_checkpoint source=FOLDER out=FOLDER

source   a folder with config.json, safetensors, tokenizer and processor files: native Molmo2 of transformers, or one of
         the models released in 2024 (Molmo-7B-D, Molmo-7B-O, Molmo-72B, MolmoE-1B), downloaded whole
out      a new folder, which `pipelines.generate checkpoint=` answers from and which a model of params.yaml names as
         `checkpoint:` beside its preset, so that runs start from it

The weights are held in memory in fp32 meanwhile: four bytes for each parameter. Not a stage: writes no artefact.
Exit codes: 0 written, 2 refused with a message.
"""

from collections.abc import Sequence
from pathlib import Path

from pipelines.export import parse
from pipelines.stage import arguments, exit_on_error

OPTIONS = ("source", "out")


def import_checkpoint(values: dict[str, str]) -> list[str]:
    """Does what the options say; returns what to print."""
    from molmo_model.exchange import import_folder

    out = Path(values["out"])
    notes = import_folder(Path(values["source"]), out)
    return [f"written to {out}", *(f"  {note}" for note in notes)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("import_checkpoint"):
        print("\n".join(import_checkpoint(parse(argv, OPTIONS, OPTIONS))))


if __name__ == "__main__":
    main()
