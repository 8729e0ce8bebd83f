"""VQA accuracy: the text normalisation of the VQA evaluation and its two ways to average over annotators.

Follows the behaviour of the official evaluation, `vqaEval.py` of GT-Vision-Lab/VQA (Antol et al. 2015,
arXiv:1505.00468; https://visualqa.org/evaluation.html), quirks included, because published numbers hold them.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
NUMBER_WORDS["none"] = "0"

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
"""The official pattern says `(?!<=` where `(?<!` was meant, so the part before the period never matters; kept."""
_PERIOD_LIMIT = 32
"""The official code passes `re.UNICODE`, which is 32, in the place of the count; kept."""

_MISSPELT = """
    aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve hasnt havent hed
    hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt mightnt've mightn'tve mightve mustnt
    mustve neednt notve oclock oughtnt ow's'at 'ows'at 'ow'sat shant shed've she'dve shouldve shouldnt shouldnt've
    shouldn'tve somebodyd've somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell someones
    somethingd somethingd've something'dve somethingll thats thered thered've there'dve therere theres theyd theyd've
    they'dve theyll theyre theyve twas wasnt wed've we'dve weve werent whatll whatre whats whatve whens whered wheres
    whereve whod whod've who'dve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldnt've wouldn'tve yall
    yall'll y'allll yall'd've y'alld've y'all'dve youd youd've you'dve youll youre youve
"""
_SPELT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """The official table: misspelt contractions, and the right form with the same letters."""
    spelt = {word.replace("'", ""): word for word in _SPELT.split()}
    table = {word: spelt[word.replace("'", "")] for word in _MISSPELT.split()}
    table["somebody'd"] = "somebodyd"  # the one entry of the official table that takes an apostrophe away
    return table


CONTRACTIONS = _contractions()


@lru_cache(1 << 16)
def normalize(answer: str) -> str:
    """An answer as the VQA evaluation compares it: punctuation, case, number words, articles, contractions.

    Remembered, because ten annotators of a hundred thousand questions say the same few thousand words.
    """
    return _words(_punctuation(_plain(answer)))


def official(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy as published: mean over annotators of `min(1, matches among the others / 3)`.

    Normalises only where the annotators disagree, as the official code does.
    """
    prediction, answers = _plain(prediction), [_plain(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    matches, annotators = answers.count(prediction), len(answers)
    among_others = matches * min(1.0, (matches - 1) / 3) + (annotators - matches) * min(1.0, matches / 3)
    return among_others / annotators  # an annotator who said the same is no match of their own


def molmo(prediction: str, answers: Sequence[str]) -> float:
    """Molmo's variant (allenai/molmo, `vqa_score`): `min(1, matches / 3)` over all annotators, always normalised."""
    prediction = normalize(prediction)
    return min(1.0, sum(normalize(answer) == prediction for answer in answers) / 3)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_word_edge or comma else " ")
    return _PERIOD.sub("", result, count=_PERIOD_LIMIT)


def _words(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
