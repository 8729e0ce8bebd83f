"""Makes `tokenizers/bytes512`, the tokenizer of small models trained from scratch: byte-level BPE of 512 ids.

    python -m molmo_model.preprocessing.bytes512 FOLDER

256 ids are the bytes, so that any text has a spelling and comes back exactly. The merges are learned from made-up text
like that of the built-in datasets. A digit is one token, together with the space before it; two digits never merge, so
that numbers are read place by place. The markup of points is cut into pieces such as `" y1="`, one token each.
"""

import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_model.preprocessing.points import count_to_text, points_to_text
from molmo_model.preprocessing.templates import DEMO_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 512
END, PAD = "<|endoftext|>", "<|pad|>"

PIECES = "|".join(
    [
        r' ?<points? x1?="',  # markup of points, up to nine of them
        r'" [xy][1-9]?="',
        r'" alt="',
        r'">',
        r"</points?>",
        r" ?\p{N}",  # one digit
        r" ?\p{L}+",  # a word
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\s+(?!\S)",  # blanks, of which the last goes to the word that follows
        r"\s+",
    ]
)
"""What merges never cross; every character is in one alternative."""

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TITLES = (
    "Max temp C",
    "Min temp C",
    "Rain mm",
    "Wind m/s",
    "Seattle F",
    "Stock $",
    "Jobs k",
    "Media jobs k",
    "Wheat price",
    "Wages",
    "Disease",
    "Other",
    "Miles driven",
    "Barley",
    "TWh",
)
_CHART_QUESTIONS = (
    "What is the value of {name}?",
    "What is the highest value?",
    "What is the lowest value?",
    "Which label has the highest value?",
    "Which label has the lowest value?",
    "How many bars are there?",
    "How many points are there?",
    "What is the difference between {name} and {other}?",
    "Is {name} larger than {other}?",
    "What is the sum of {name} and {other}?",
    "What is the average of all values?",
    "What is the title of the chart?",
)
_COMMON = (
    "Describe this image.",
    "What is in the image?",
    "What colour is the bar on the left?",
    "The image shows a line with a point on the right.",
    "There is one in the top row and there are two at the bottom of it.",
    "Answer with yes or no.",
    " yes",
    " no",
    "User: Where is it? Assistant: It is not there.",
)


def corpus(lines: int = 20_000) -> Iterator[str]:
    """Text like that of the built-in datasets; the same on every machine."""
    rng = random.Random(512)
    makers = (_scene, _question, _markup, _chart)
    for number in range(lines):
        yield makers[number % len(makers)](rng)


def _scene(rng: random.Random) -> str:
    cells = [rng.choice([*"0123456789", ".", "."]) for _ in range(9)]
    return " " + " / ".join(" ".join(cells[i : i + 3]) for i in (0, 3, 6))


def _question(rng: random.Random) -> str:
    row, col, digit = rng.randint(1, 9), rng.randint(1, 9), rng.randint(0, 9)
    label = rng.choice([f"the digit {digit}", f"row {row}, column {col}", "all digits", "every digit", "empty cells"])
    template = rng.choice([template for style in sorted(DEMO_TEMPLATES) for template in DEMO_TEMPLATES[style]])
    return rng.choice(
        [
            template.replace("{label}", label),
            f"Which digit is in row {row}, column {col}?",
            f"How many times does the digit {digit} appear?",
            "How many digits are there?",
            "Read the digits row by row.",
            f"Point to {label}.",
            " empty",
            f" {digit}",
        ]
    )


def _markup(rng: random.Random) -> str:
    label = rng.choice([f"digit {rng.randint(0, 9)}", f"row {rng.randint(1, 9)}, column {rng.randint(1, 9)}", "digits"])
    points = [(rng.uniform(0, 100), rng.uniform(0, 100)) for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 9]))]
    writers: list[Callable[..., str]] = [points_to_text, count_to_text]
    return " " + rng.choice(writers)(points, label)


def _chart(rng: random.Random) -> str:
    def number() -> str:
        return rng.choice([str(rng.randint(0, 9999)), f"{rng.uniform(-10, 100):.1f}"])

    names = [*_MONTHS, *(str(rng.randint(1, 31)) for _ in range(3)), str(rng.randint(1930, 2019)), "6h", "12h"]
    shown = rng.sample(names, rng.randint(3, 6))
    if rng.random() < 0.3:
        values = ", ".join(f"{name} {number()}" for name in shown)
        return f" {rng.choice(_TITLES)}, {rng.choice(_MONTHS)} {rng.randint(1930, 2019)}: {values}"
    question = rng.choice(_CHART_QUESTIONS).replace("{name}", shown[0]).replace("{other}", shown[1])
    return rng.choice([question, question, rng.choice(_COMMON), f" {number()}", f" {shown[0]}"])


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer, learned anew; the same every time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    markup = [f'" {axis}{number}="' for axis, number in product("xy", range(1, 10))]  # numbers above 5 are rare
    tokenizer.train_from_iterator([*corpus(), *(piece for piece in markup for _ in range(1000))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def main(arguments: list[str]) -> int:
    """Writes the tokenizer to the folder named on the command line."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    make_tokenizer().save_pretrained(Path(arguments[0]))
    print(f"{arguments[0]}: {VOCABULARY} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
