"""Multiple choice: the letter that an answer names, as published codes for several pictures or a film read it.

Each reading is that of the code named, quirks included, because published numbers hold them; what those codes decide by
chance or leave out is unread here, scores 0 and is counted. `accuracy` beside them is `choices.read_choice`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase as LETTERS

from molmo_model.eval.metrics.answers import most_frequent, short_answer
from molmo_model.eval.metrics.choices import (
    ACCURACY,
    MOST_FREQUENT_CHOICE,
    Choices,
    Extraction,
    choice_score,
    lettered_choices_of,
)
from molmo_model.eval.metrics.metric import Metric, Output, References, Score


def _forms(form: str) -> tuple[str, ...]:
    return tuple(form.format(letter) for letter in LETTERS)


ROUND, CLOSED, PERIOD, COLON, SPACED, BEFORE_SPACE, BARE = map(
    _forms, ("({})", "{})", "{}.", "{}:", " {} ", "{} ", "{}")
)
"""How a letter is written: `(A)`, `A)`, `A.`, `A:`, and so on, by letter."""
LONG = 5
"""Words of an answer above which MMMU's parser looks for the text of a choice."""


def last_of(text: str, marks: Sequence[str]) -> int | None:
    """Number of the mark that stands last in a text; of marks at one place the first."""
    places = [text.rfind(mark) for mark in marks]
    return places.index(max(places)) if places and max(places) >= 0 else None


def first_of(text: str, marks: Iterable[tuple[int, str]]) -> int | None:
    """Of numbered marks that of the one whose last occurrence comes first."""
    found = [(place, number) for number, mark in marks if (place := text.rfind(mark)) >= 0]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def padded(text: str, marks: str = ",.!?;:'") -> str:
    """A text without these marks around it, each taken off once in this order, between two spaces."""
    for mark in marks:
        text = text.strip(mark)
    return f" {text} "


def parse_letter(response: str, options: Sequence[str]) -> int | None:
    """MMMU's parser of answers to questions with choices (`parse_multi_choice_response`), which MuirBench and others
    use too.

    The strongest form that any letter has decides, of several letters the last: `(A)`, `A)`, `A.`, `A:`, the letter
    alone, and in answers of more than five words the text of a choice. Choices without text are passed over.
    """
    text, count = padded(response), len(options)
    if (alone := text.strip()) in LETTERS[:count] and len(alone) == 1:
        return LETTERS.index(alone)
    for form in (ROUND, CLOSED, PERIOD, COLON, SPACED):
        if (place := last_of(text, form[:count])) is not None:
            return place
    return _last_content(text, options)


def _last_content(text: str, options: Sequence[str]) -> int | None:
    if len(text.split()) <= LONG:
        return None
    texts = {option.strip().lower(): place for place, option in reversed(list(enumerate(options))) if option.strip()}
    ordered = sorted(texts.items(), key=lambda item: item[1])
    last = last_of(text.lower(), [option for option, _ in ordered])
    return None if last is None else ordered[last][1]


def muir_bench(prediction: str, choices: Choices) -> int | None:
    """`muir_bench_mc` of allenai/molmo2, which also reads MMIU and BLINK."""
    return parse_letter(short_answer(prediction), choices.options)


def next_qa(prediction: str, choices: Choices) -> int | None:
    """MMMU's first parser: `(A)`, else ` A `, else `A.`, else the text of a choice; the last of several."""
    text = padded(short_answer(prediction))
    for form in (ROUND, SPACED, PERIOD):
        if (place := last_of(text, form[: len(choices.options)])) is not None:
            return place
    return _last_content(text, choices.options)


def egoschema(prediction: str, choices: Choices) -> int | None:
    """Of `(A)`, `A ` (also at the end of a word) and `A.` the one that comes first, else the first text of a choice."""
    text = padded(short_answer(prediction))
    marks = [mark for form in (ROUND, BEFORE_SPACE, PERIOD) for mark in enumerate(form[: len(choices.options)])]
    if (place := first_of(text, marks)) is not None:
        return place
    if len(text.split()) <= LONG:
        return None
    return first_of(text.lower(), [(i, one.strip().lower()) for i, one in enumerate(choices.options) if one.strip()])


_WHOLE_WORD = re.compile(r"\b([A-D])\b")
_A_TO_D, _A_TO_E = re.compile("[A-D]"), re.compile("[A-E]")
_SAID_BEFORE = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"),
    *("The correct option is", "Best answer:", "Best option:"),
)
"""What both parsers take away, everywhere in the answer."""
_SAID_BEFORE_TOO = ("Answer:", "Option:", "The correct answer", "The correct option")


def perception_test(prediction: str, choices: Choices) -> int | None:
    """The first capital letter from A to D that is a word."""
    found = _WHOLE_WORD.search(short_answer(prediction))
    return choices.place(found[1]) if found else None


def video_mme(prediction: str, choices: Choices) -> int | None:
    """The first capital letter from A to D, in a word or not, after phrases such as `The best answer is` are gone."""
    return _first_capital(prediction, (*_SAID_BEFORE, *_SAID_BEFORE_TOO), _A_TO_D, choices)


def long_video_bench(prediction: str, choices: Choices) -> int | None:
    """As `video_mme`, from A to E."""
    return _first_capital(prediction, _SAID_BEFORE, _A_TO_E, choices)


def _first_capital(prediction: str, phrases: Sequence[str], letters: re.Pattern[str], choices: Choices) -> int | None:
    text = prediction.strip()
    if len(text) > 1:
        for phrase in phrases:
            text = text.replace(phrase, "")
    found = letters.search(text)
    return choices.place(found[0]) if found else None


def em_start(prediction: str, choices: Choices) -> int | None:
    """The letter that the answer begins with, case aside, be it a word's (`a ball` is A)."""
    said = short_answer(prediction)
    return choices.place(said[0].upper()) if said[:1].isascii() and said[:1].isalpha() else None


_GROUNDED = re.compile(r"[\(\s]*([A-Z])", re.IGNORECASE)
_DOTTED = re.compile(r"\s*([A-Z])\.")


def blink_lmms_eval(prediction: str, choices: Choices) -> int | None:
    """The first letter behind brackets and spaces, case aside, be it a word's: `blink` of lmms-eval."""
    found = _GROUNDED.match(prediction.strip())
    return choices.place(found[1].upper()) if found and found[1].isascii() else None


def muir_bench_lmms_eval(prediction: str, choices: Choices) -> int | None:
    """A capital letter with a period at the beginning, or a letter and nothing else: `muirbench` of lmms-eval."""
    found = _DOTTED.match(prediction)
    said = found[1] if found else prediction.strip().upper()
    return choices.place(said) if len(said) == 1 else None


_CONCLUSIONS = (
    *(f"{the}{kind}answer is" for the in ("", "the ") for kind in ("", "correct ", "best ")),
    *(f"{the}{kind} option is" for the in ("", "the ") for kind in ("correct", "best")),
    *("choice is", "the choice is", "correct choice is", "the correct choice is", "my answer is", "my choice is"),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_eval(prediction: str, choices: Choices) -> int | None:
    """`extract_mcq_answer` of lmms-eval at 75571cf (August 2026), for Video-MME, MLVU and RealWorldQA among others.

    A letter that the answer begins with, else that it ends with, else the last after a phrase such as `the answer is`,
    else the last of the form `(A)`, `A.`, `A:`, `A)`, `A `, else the last capital anywhere.
    """
    text, count = padded(prediction.strip(), ",.!?;:'\""), len(choices.options)
    said = text.strip()
    if not said:
        return None
    for letter, beside in ((said[0], said[1:2]), (said[-1], said[-2:-1])):
        if letter in LETTERS[:count] and not beside.isalpha():
            return LETTERS.index(letter)
    if (place := _after_phrases(text, count)) is not None:
        return place
    for form in (ROUND, PERIOD, COLON, CLOSED, BEFORE_SPACE, BARE):
        if (place := last_of(text, form[:count])) is not None:
            return place
    return None


def _after_phrases(text: str, count: int) -> int | None:
    """Of the letters' first places after each phrase the last."""
    lower = text.lower()
    ends = [begin + len(phrase) for phrase in _CONCLUSIONS if (begin := lower.find(phrase)) >= 0]
    places = [(text.find(LETTERS[number], end), number) for end in ends for number in range(count)]
    place, number = max(places, default=(-1, 0))
    return number if place >= 0 else None


# --- metrics

READINGS: dict[str, Extraction] = {
    "muir_bench": muir_bench,
    "muir_bench_lmms_eval": muir_bench_lmms_eval,
    "blink_lmms_eval": blink_lmms_eval,
    "em_start": em_start,
    "perception_test": perception_test,
    "egoschema": egoschema,
    "next_qa": next_qa,
    "long_video_bench": long_video_bench,
    "video_mme": video_mme,
    "lmms_eval": lmms_eval,
}
_OUTPUTS: dict[str, str] = {
    "muir_bench": "1 if the last of the letters in their strongest form is right: `(A)`, `A)`, `A.`, `A:`, ` A `, text",
    "muir_bench_lmms_eval": "1 if the answer is the right letter, or begins with it and a period",
    "blink_lmms_eval": "1 if the first letter of the answer, in a word or not, is the right one",
    "em_start": "1 if the answer begins with the right letter, in a word or not",
    "perception_test": "1 if the first capital from A to D that is a word is right",
    "egoschema": "1 if the first of `(A)`, `A ` and `A.`, else of the choices' texts, is right",
    "next_qa": "1 if the last `(A)`, else ` A `, else `A.`, else text of a choice, is right",
    "long_video_bench": "1 if the first capital from A to E after the usual phrases is right",
    "video_mme": "1 if the first capital from A to D after the usual phrases is right",
    "lmms_eval": "1 if the letter that lmms-eval's reading by rank of forms takes is right",
}
ANSWERED_ONLY = Output("as `video_mme`, over the answers that hold a letter, as published: it rewards saying none")


def _metric(readings: Sequence[str], citation: str) -> Metric:
    """A metric of letters whose first reading is the primary one."""
    primary = readings[0]
    extractions: Mapping[str, Extraction] = {name: READINGS[name] for name in readings}

    def score(prediction: str, references: References) -> Score:
        return choice_score(prediction, lettered_choices_of(references), extractions, primary)

    score.__doc__ = f"`accuracy` and the readings {', '.join(readings)}."
    outputs = {name: Output(_OUTPUTS[name]) for name in readings} | {"accuracy": ACCURACY}
    return Metric(score, primary, most_frequent, MOST_FREQUENT_CHOICE, citation, unparsed=UNPARSED, outputs=outputs)


def video_mme_score(prediction: str, references: References) -> Score:
    """Video-MME's reading with the answers without a letter, and without them."""
    readings = {"video_mme": video_mme, "lmms_eval": lmms_eval}
    score = choice_score(prediction, lettered_choices_of(references), readings, "video_mme")
    answered = {"answered_only": score.values["video_mme"]} if score.parsed else {}
    return Score(score.values | answered, score.parsed, read=score.read)


UNPARSED = "It has no letter for the primary reading: that scores 0; the other readings find what they find."
_UNREAD = "there an answer without a letter is given one by chance, here it scores 0"

METRICS: dict[str, Metric] = {
    "muir_bench": _metric(
        ("muir_bench", "muir_bench_lmms_eval"),
        "MuirBench (Wang et al. 2024, arXiv:2406.09411) and MMIU (Meng et al. 2024, arXiv:2408.02718) as in "
        f"allenai/molmo2, `muir_bench_mc`; {_UNREAD}. `muir_bench_lmms_eval` is lmms-eval's.",
    ),
    "blink": _metric(
        ("muir_bench", "blink_lmms_eval"),
        f"BLINK (Fu et al. 2024, arXiv:2404.12390) as in allenai/molmo2, which reads it as MuirBench; {_UNREAD}. "
        "`blink_lmms_eval` is lmms-eval's.",
    ),
    "em_start": _metric(
        ("em_start", "lmms_eval"),
        "MVBench (Li et al. 2023, arXiv:2311.17005) and MLVU (Zhou et al. 2024, arXiv:2406.04264) as `em_start` of "
        "allenai/molmo2; `lmms_eval` is what lmms-eval does for MLVU.",
    ),
    "perception_test": _metric(
        ("perception_test",),
        "PerceptionTest (Patraucean et al. 2023, arXiv:2305.13786) as in lmms-eval and allenai/molmo2.",
    ),
    "egoschema": _metric(
        ("egoschema",),
        f"EgoSchema (Mangalam et al. 2023, arXiv:2308.09126) as in lmms-eval and allenai/molmo2; {_UNREAD}.",
    ),
    "next_qa": _metric(
        ("next_qa",),
        f"NExT-QA (Xiao et al. 2021, arXiv:2105.08276) as in lmms-eval and allenai/molmo2; {_UNREAD}.",
    ),
    "long_video_bench": _metric(
        ("long_video_bench",),
        f"LongVideoBench (Wu et al. 2024, arXiv:2407.15754) as in lmms-eval and allenai/molmo2; {_UNREAD}.",
    ),
    "video_mme": Metric(
        video_mme_score,
        "video_mme",
        most_frequent,
        MOST_FREQUENT_CHOICE,
        "Video-MME (Fu et al. 2024, arXiv:2405.21075), with the four phrases that the published list runs together by "
        "missing commas taken apart (`Best answer: D` is D, there B); an answer without a letter scores 0, where the "
        "published code leaves it out, which `answered_only` does too.",
        unparsed=UNPARSED,
        outputs={
            "video_mme": Output(_OUTPUTS["video_mme"]),
            "answered_only": ANSWERED_ONLY,
            "lmms_eval": Output(_OUTPUTS["lmms_eval"]),
            "accuracy": ACCURACY,
        },
    ),
}
