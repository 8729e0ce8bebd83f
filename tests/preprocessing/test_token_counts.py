"""Counting tokens without making them: the tokenizer itself is the oracle."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molmo_model.preprocessing.marked import Marked
from molmo_model.preprocessing.templates import CHOICE_LAYOUTS, TEMPLATES
from molmo_model.preprocessing.token_counts import TokenCounts, translated
from molmo_model.preprocessing.tokenizer import Vocabulary

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 cuts; OLMo 2's differs in `\\p{N}{1,3}`."""
CUTS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": QWEN,
    "olmo2": QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"),
}


def learned(name: str) -> Tokenizer:
    """A byte-level BPE that cuts as the named family does, learned from the templates."""
    made = Tokenizer(models.BPE())
    cut = CUTS[name]
    if isinstance(cut, str):
        split = pre_tokenizers.Split(Regex(cut), "isolated")
        cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.pre_tokenizer = cut
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    texts = [text for every in TEMPLATES.values() for text in every] + [one.frame for one in CHOICE_LAYOUTS]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([*texts, *(f"it's {n} of {n * 7}\n\n• “é”" for n in range(200))], trainer)
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("   ", normalized=False)])
    return made


@pytest.fixture(scope="module", params=["own", *CUTS])
def vocabulary(request, tokenizer) -> Vocabulary:
    if request.param == "own":
        return Vocabulary(tokenizer)
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=learned(request.param), eos_token="<|end|>"))


PARTS = st.one_of(
    st.text(st.characters(max_codepoint=0x7F), max_size=6),
    st.text(st.characters(max_codepoint=0x250, exclude_categories=["Cs"]), max_size=4),
    st.sampled_from(
        [
            " ",
            "\n",
            "  ",
            " \n ",
            "\t",
            "\x0b",
            "\x1c",
            "'s",
            "'RE",
            "12345",
            "²3",
            "é",
            "…",
            "’s",
            "• ",
            "е́",
            "中文",
            "🙂",
        ]
    ),
    st.sampled_from(["<|end|>", "<|endoftext|>", "<tool>", '<point x="1.5" y="20.0" alt="a">a</point>', "the image?"]),
)


@given(st.lists(PARTS, max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_as_many_as_the_tokenizer_makes(vocabulary, text):
    assert vocabulary.length(text) == len(vocabulary.encode(text))


def test_usual_texts_are_counted_by_their_words(vocabulary):
    """Else nothing is gained: bullets of layouts and quotes of captions are no reason to ask the tokenizer."""
    for text in ("How many “red” cats are in this café’s photo?\n• 12\n• none", " There are none."):
        assert vocabulary._counts.count(text) == len(vocabulary.encode(text))


def test_markers_are_one_token_each(chat_tokenizer):
    vocabulary = Vocabulary(chat_tokenizer, "<|im_end|>")
    text = Marked("", "<|im_start|>", "user\nsay <|im_end|>", "<|im_end|>", "\n")
    assert vocabulary.length(text) == len(vocabulary.encode(text))
    assert vocabulary.length(str(text)) == len(vocabulary.encode(str(text))) != vocabulary.length(text)
    assert pickle.loads(pickle.dumps(vocabulary)).length(text) == vocabulary.length(text)


@pytest.mark.parametrize(
    "pattern",
    [r"\p{Lu}+|.", r"(\w+)", r"[a[bc]]", r"^a|b$", r"\h+", r"a*", r"[\p{L}&&[a-z]]+", r"\p{N}{1,3}+", r"[]a]+", r"(a"],
)
def test_expressions_that_python_may_read_differently_are_left_to_the_tokenizer(pattern):
    assert translated(pattern) is None


def test_other_kinds_of_tokenizers_count_for_themselves():
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenCounts(words).count("a b") is None
    spaced = learned("gpt2")
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert TokenCounts(spaced).count("a b") is None
    lowered = learned("gpt2")
    lowered.normalizer = normalizers.Lowercase()
    assert TokenCounts(lowered).count("A B") is None
