"""Tags, templates, choices, explanations and inline points: the texts of the released families."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.data.example import POINT_MARK, Conversation, Example, InlinePoints, Message
from molmo_model.data.loader import generator
from molmo_model.errors import DataError
from molmo_model.model_config import LossWeighting, MessageFormat, PointFormat, PromptTemplates, SystemPrompt
from molmo_model.preprocessing import templates
from molmo_model.preprocessing.preprocessor import IGNORE, Preprocessor
from molmo_model.preprocessing.prompts import PromptFormat, asked, choices, write
from molmo_model.preprocessing.system_prompts import DEMO_STYLES, IMAGE_CHOICE_STYLES, tags
from tests.preprocessing.examples import asked as ask
from tests.preprocessing.examples import example

CAPTION = "A grey cat sits on a red sofa and looks at the camera. " * 4


def choosing(style="science_qa", answer="B", options=("a dog", "a cat", "an owl"), **more) -> Conversation:
    return Conversation(style, (Message("user", "What is it?", options=options), Message("assistant", answer, **more)))


def pointing(style="pointing") -> Conversation:
    points = ((10.0, 20.0), (9.94, 7.0))
    return Conversation(style, (Message("user", label="Cats"), Message("assistant", points=points, label="Cats")))


INLINE = Conversation(
    "point_qa",
    (
        Message("user", "Who is taller?"),
        Message(
            "assistant",
            f"The {POINT_MARK}, not the {POINT_MARK}.",
            inline=(
                InlinePoints(((1.0, 2.0),), "left man", "man"),
                InlinePoints(((50.0, 3.0), (4, 5)), "others", "men"),
            ),
        ),
    ),
)
EVERY = [
    ask(None, CAPTION, "long_caption"),
    Conversation(
        "transcript", (Message("user"), Message("assistant", "Well, a cat.", alternatives=("So, here is a cat " * 20,)))
    ),
    ask(None, "Two dogs run.", "video_long_caption"),
    pointing(),
    pointing("point_count"),
    pointing("count_then_point"),
    ask("How many cats are there?", "Three", "user_qa"),
    ask("What is the cat's name?", "Tom", "synthetic_qa"),
    Conversation(
        "vqa2", (Message("user", "Colour?"), Message("assistant", "red", alternatives=("dark red", "reddish")))
    ),
    ask("What is the sum?", "12", "chart_qa"),
    Conversation(
        "cosyn_chart_exp", (Message("user", "Sum?"), Message("assistant", "12", explanation="5 and 7 are 12."))
    ),
    choosing(),
    choosing("ai2_diagram"),
    choosing("ai2_diagram_no_letter", "C", ("A", "C", "B")),
    choosing("video_multiple_choice", "C"),
    choosing("eval_multiple_choice", "A"),
    ask("What happens?", "He falls", "video_short_answer"),
    ask("What?", "This", "eval_short_answer"),
    INLINE,
]
NAMES = [f"{number} {one.style}" for number, one in enumerate(EVERY)]


# --- tags


@pytest.mark.parametrize(
    ("system_prompt", "style", "expected"),
    [
        ("none", "vqa2", ""),
        ("no_style", "vqa2", ""),
        ("style", "vqa2", "vqa2:"),
        ("style", "long_caption", "long_caption:"),
        ("style", "eval_short_answer", "vqa2:"),
        ("style", "eval_multiple_choice", "a_okvqa_mc:"),
        ("style", "video_eval_multiple_choice", "video_multiple_choice:"),
        ("demo_or_style", "user_qa", ""),
        ("demo_or_style", "long_caption", ""),
        ("demo_or_style", "android_control", ""),
        ("demo_or_style", "vqa2", "vqa2:"),
        ("demo_or_style", "science_qa", "science_qa:"),
        ("demo_or_style_v2", "science_qa", ""),
        ("demo_or_style_v2", "video_eval_multiple_choice", ""),
        ("demo_or_style_v2", "vqa2", "vqa2:"),
        ("style_and_length", "long_caption", "long_caption 65:"),
        ("style_and_length_v2", "transcript", "transcript 65:"),
        ("style_and_length", "pointing", "pointing:"),
        ("style_and_length_v2", "vqa2", "vqa2:"),
    ],
)
def test_tags_of_evaluation(system_prompt, style, expected):
    talk = ask("What?", CAPTION, style)
    (question,) = asked(talk, PromptFormat(SystemPrompt(system_prompt), templates=PromptTemplates.none))
    assert question == f"{expected} What?".lstrip()
    assert write(talk, PromptFormat(SystemPrompt(system_prompt), templates=PromptTemplates.none))[0] == question


def test_captions_without_a_length_differ_by_version():
    """The models of 2024 were trained with a blank before the colon, later ones without (a trap of old checkpoints)."""
    texts = {
        name: asked(ask("Say.", "x", "long_caption"), PromptFormat(SystemPrompt(name), length=0))[0]
        for name in ("style_and_length", "style_and_length_v2", "style_and_length_v3")
    }
    assert texts == {
        "style_and_length": "long_caption : Say.",
        "style_and_length_v2": "long_caption: Say.",
        "style_and_length_v3": "long_caption: Say.",
    }
    nothing = PromptFormat(SystemPrompt.style_and_length, templates=PromptTemplates.none, length=0)
    assert asked(ask(None, "x", "long_caption"), nothing) == ["long_caption :"]  # a tag alone has no blank behind it


def drawn(talk: Conversation, form: PromptFormat, count: int = 2000) -> list[str]:
    return [write(talk, form, generator(seed))[0] for seed in range(count)]


def test_lengths_of_training():
    """Nine in ten have a length: the answer's letters and N(0, 25), in units of 15."""
    talk = ask("Say.", "x" * 300, "long_caption")
    found = drawn(talk, PromptFormat(SystemPrompt.style_and_length))
    plain = [text for text in found if text == "long_caption : Say."]
    numbers = [int(m[1]) for text in found if (m := re.fullmatch(r"long_caption (\d+): Say\.", text))]
    assert len(plain) + len(numbers) == len(found)
    assert abs(len(plain) / len(found) - 0.1) < 0.02
    assert abs(np.mean(numbers) - (300 / 15 - 0.5)) < 0.15  # floor loses half a unit
    assert abs(np.std(numbers) - 25 / 15) < 0.12
    assert min(drawn(ask("Say.", "x", "long_caption"), PromptFormat(SystemPrompt.style_and_length))) >= "long_caption 0"


def test_demo_styles_are_tagged_once_in_ten():
    found = drawn(ask("Say.", "x", "user_qa"), PromptFormat(SystemPrompt.demo_or_style))
    assert set(found) == {"Say.", "user_qa: Say."}
    assert abs(found.count("user_qa: Say.") / len(found) - 0.1) < 0.02
    assert set(drawn(ask("Say.", "x", "user_qa"), PromptFormat(SystemPrompt.demo_or_style_v2), 50)) == {"Say."}
    assert set(drawn(ask("Say.", "x", "vqa2"), PromptFormat(SystemPrompt.demo_or_style), 50)) == {"vqa2: Say."}


def test_the_length_follows_the_answer_that_was_drawn():
    short, long = "x" * 30, "y" * 3000
    talk = Conversation("transcript", (Message("user", "Say."), Message("assistant", short, alternatives=(long,))))
    form = PromptFormat(SystemPrompt.style_and_length_v2)
    seen = set()
    for seed in range(60):
        question, said = write(talk, form, generator(seed))
        if found := re.search(r" (\d+):", question):
            seen.add(said)
            assert (int(found[1]) > 100) is (said == " " + long)
    assert len(seen) == 2


# --- templates


@pytest.mark.parametrize("table", [templates.TEMPLATES, templates.QUESTION_TEMPLATES])
def test_wordings_have_the_places_of_their_kind(table):
    for style, texts in table.items():
        assert len(set(texts)) == len(texts), style
        places = {tuple(sorted(set(re.findall(r"\{(\w+)\}", text)))) for text in texts}
        assert len(places) == 1 and places <= {(), ("label",), ("question",)}, style


def test_what_each_set_of_templates_puts_in_words():
    def first(templates_, talk):
        return asked(talk, PromptFormat(SystemPrompt.style, templates=PromptTemplates(templates_)))[0]

    assert first("none", pointing()) == "pointing: cats"
    assert first("uber_model", pointing()) == "pointing: Point to cats."
    assert first("none", EVERY[0]) == "long_caption:"
    assert first("uber_model", EVERY[0]) == "long_caption: Describe this image."
    for name in PromptTemplates:  # academic sets are asked as they were written
        assert first(name, EVERY[9]) == "chart_qa: What is the sum?"
    assert first("none", EVERY[10]) == "cosyn_chart_exp: Sum?"
    assert first("uber_model_v2", EVERY[10]).startswith("cosyn_chart_exp: Sum? Explain")
    assert first("uber_model", ask("Where?", "x", "pointing")) == "pointing: Where?"  # it brings its question along


def test_nothing_to_ask_is_refused():
    with pytest.raises(DataError, match="a question is empty: prompt_templates none"):
        write(EVERY[0], PromptFormat(templates=PromptTemplates.none))


def test_a_filled_place_is_not_filled_again():
    assert templates.fill("{question} {options}", question="{options}", options="{x}") == "{options} {x}"
    tricky = Conversation(
        "pointing", (Message("user", label="{label} {x}"), Message("assistant", points=(), label="{label}"))
    )
    assert write(tricky, PromptFormat())[0] == "Point to {label} {x}."


@pytest.mark.parametrize(
    ("question", "counting"),
    [
        ("How many dogs are there?", True),
        ("Tell me, how many red cars can be seen", True),
        ("Count the people.", True),
        ("What is the total number of chairs?", True),
        ("There are ____ cats", True),
        ("Do not count the people.", False),
        ("How many years old is she?", False),
        ("How many kilometers is it?", False),
        ("What is the amount of money?", False),
        ("Approximately how many live here?", False),
        ("What number is on the bus?", False),
        ("Who counts?", False),
    ],
)
def test_counting_questions_in_words_say_so(question, counting):
    assert templates.is_counting(question) is counting
    for style in ("user_qa", "synthetic_qa"):
        texts = set(drawn(ask(question, "4", style), PromptFormat(), 200))
        assert texts == ({front + question for front in templates.NO_POINTING} if counting else {question})
    assert set(drawn(ask(question, "4", "vqa2"), PromptFormat(), 20)) == {question}
    pointed = Conversation("user_qa", (Message("user", question), Message("assistant", points=((1, 2),), label="x")))
    assert set(drawn(pointed, PromptFormat(), 20)) == {question}  # this one points


# --- choices


def test_choices_with_letters():
    for name in ("none", "uber_model"):
        question, said = write(choosing(), PromptFormat(templates=PromptTemplates(name)))
        assert (question, said) == ("What is it?\nA: a dog\nB: a cat\nC: an owl\n", " B")


def test_choices_without_letters():
    talk = choosing("ai2_diagram_no_letter", "C", ("A", "C", "B"))
    for name, text in (("uber_model", "What is it?\nA\nC\nB\n"), ("uber_model_v2", None)):
        question, said = write(talk, PromptFormat(templates=PromptTemplates(name)))
        assert said == " C" and (text is None or question == text)
        assert "A\nC\nB" in question


@pytest.mark.parametrize("talk", [choosing(), choosing("a", "A", ("x",) * 12), choosing("b", "C", explanation="So.")])
def test_every_layout_asks_and_answers_the_same(talk):
    options, right = talk.messages[0].options, ord(talk.messages[1].text) - ord("A")
    form = PromptFormat(templates=PromptTemplates.uber_model_v2)
    seen = set()
    for seed in range(300):
        question, said = write(talk, form, generator(seed))
        said = said.removeprefix(" So. Answer:").strip()
        seen.add(question)
        assert all(option in question for option in options) and "What is it?" in question
        assert "{" not in question
        listed = [part for part in re.split(r"\n|; ", question) if said == part.removeprefix("• ").strip()]
        name = re.escape(said)
        marked = re.findall(rf"(?:^|\n|; |: )[\(\[]?{name}[\.\):\]]*(?: -)? {re.escape(options[right])}", question)
        if said == options[right]:
            continue
        if said.endswith(options[right]):  # name and choice, as listed
            assert listed or said in question
        else:
            assert marked, (question, said)
    assert len(seen) == len(set(templates.CHOICE_LAYOUTS))
    text, said = write(talk, form)
    assert text == "What is it?\nGive only the right option.\n" + "\n".join(
        f"{chr(65 + place)}. {option}" for place, option in enumerate(options)
    )
    assert said.endswith(f"{talk.messages[1].text}. {options[right]}")


def test_the_layouts_cover_the_kinds():
    layouts = templates.CHOICE_LAYOUTS
    share = {
        name: np.mean([getattr(one, name) == value for one in layouts])
        for name, value in (("name_only", True), ("names", ""))
    }
    assert layouts.count(layouts[0]) / len(layouts) == 0.1
    assert 0.2 < share["name_only"] < 0.25 and 0.1 < share["names"] < 0.2
    assert {one.names for one in layouts} == {"A", "a", "1", "i", ""} and len({one.marker for one in layouts}) == 6
    assert any(one.separator == "; " for one in layouts)


def test_a_wrong_letter_is_refused():
    for answer in ("D", "b", "a ca"):
        with pytest.raises(DataError, match=r"style 'science_qa' is .*3 options it must be a letter from A to C"):
            choices(choosing(answer=answer), PromptFormat())
    for form in (PromptFormat(), PromptFormat(templates=PromptTemplates.uber_model_v2)):  # its choice is as good
        assert write(choosing(answer="a cat"), form) == write(choosing(answer="B"), form)
    with pytest.raises(DataError, match="must be one of them"):
        write(choosing("ai2_diagram_no_letter", "D", ("A", "C", "B")), PromptFormat())
    asked(choosing(answer="?"), PromptFormat())  # nobody knows the answer yet


# --- answers


def test_explanations_and_inline_points():
    assert write(EVERY[10], PromptFormat())[1] == " 5 and 7 are 12. Answer: 12"
    assert write(INLINE, PromptFormat())[1] == (
        ' The <point x="1.0" y="2.0" alt="man">left man</point>, not the '
        '<points x1="4.0" y1="5.0" x2="50.0" y2="3.0" alt="men">others</points>.'
    )
    assert write(INLINE, PromptFormat(point_format=PointFormat.html_v2))[1] == (
        ' The <points alt="man" coords="1 1 010 020">left man</points>, not the '
        '<points alt="men" coords="1 1 040 050 2 500 030">others</points>.'
    )
    assert write(pointing("count_then_point"), PromptFormat())[1].startswith(" There are 2 <points ")


def test_alternatives_are_drawn_evenly_and_the_first_is_for_evaluation():
    talk = Conversation(
        "vqa2",
        (Message("user", "a", alternatives=("b", "c")), Message("assistant", "x", alternatives=("y",))),
    )
    found = [tuple(write(talk, PromptFormat(), generator(seed))) for seed in range(1200)]
    counts = {pair: found.count(pair) for pair in set(found)}
    assert set(counts) == {(q, " " + a) for q in "abc" for a in "xy"}
    assert min(counts.values()) > 150
    assert write(talk, PromptFormat()) == ["a", " x"]


# --- what holds for all of them


@pytest.mark.parametrize(
    ("system_prompt", "message_format"),
    [
        *((name, MessageFormat.none) for name in SystemPrompt),
        (SystemPrompt.style_and_length, MessageFormat.role),
        (SystemPrompt.demo_or_style, MessageFormat.chatml),
    ],
)
@pytest.mark.parametrize("words", [PromptTemplates.uber_model, PromptTemplates.uber_model_v2])
def test_prompts_are_what_training_feeds_and_the_cost_is_a_bound(
    build, tokenizer, chat_tokenizer, system_prompt, words, message_format
):
    """For every style: `encode_prompt` is the beginning of `encode` without a generator, the rest is the answer; and no
    draw takes more tokens than `cost_parts` says, nor has a text that `choices` does not name."""
    config = build(system_prompt=system_prompt, prompt_templates=words).config
    config = dataclasses.replace(config, message_format=message_format)
    pre = Preprocessor(config, chat_tokenizer if message_format is MessageFormat.chatml else tokenizer)
    for talk in EVERY:
        one = example([talk], ((20, 20),))
        prompt, trained = pre.encode_prompt(one), pre.encode(one)
        length = len(prompt)
        for name in ("input_ids", "position_ids", "segment_ids", "image_ids"):
            np.testing.assert_array_equal(getattr(prompt, name), getattr(trained, name)[:length], err_msg=talk.style)
        assert (trained.labels[: length - 1] == IGNORE).all() and (trained.labels[length - 1 :] != IGNORE).all()
        named, cost = choices(talk, pre.config.prompts), pre.cost_parts([(20, 20)], [talk])
        assert [texts[0] for texts in named] == write(talk, pre.config.prompts)
        for seed in (None, *range(6)):
            rng = None if seed is None else generator(seed)
            texts = write(talk, pre.config.prompts, rng)
            assert all(text in some for text, some in zip(texts, named, strict=True))
            assert pre._branch(texts, 1.0).input_ids.size <= cost.branches[0], (talk.style, texts)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(EVERY))), min_size=1, max_size=4, unique=True),
    st.integers(0, 2**63),
    st.sampled_from(list(SystemPrompt)),
    st.sampled_from(list(PromptTemplates)[1:]),
)
def test_no_draw_costs_more(build, numbers, key, system_prompt, words):
    pre = build(system_prompt=system_prompt, prompt_templates=words)
    one = example([EVERY[number] for number in numbers], ((20, 20),))
    cost = pre.cost_parts([(20, 20)], one.conversations)
    assert len(pre.encode(one, None, generator(key))) <= cost.tokens
    assert pre.cost([(20, 20)], one.conversations, generator(key))[0] == len(pre.encode(one, None, generator(key)))


def test_texts_depend_on_the_key_alone(build):
    """Whatever was encoded before, by whichever process: the same key gives the same tokens."""
    section = {"system_prompt": "style_and_length", "prompt_templates": "uber_model_v2"}
    pre, again = build(**section), build(**section)
    tree = example(EVERY, ((20, 20),))
    first = {key: pre.encode(tree, None, generator(key)).input_ids for key in (3, 9, 27)}
    for key in (27, 3, 9):
        pre.encode(example([EVERY[0]], ((20, 20),)), None, generator(key))
        np.testing.assert_array_equal(again.encode(tree, None, generator(key)).input_ids, first[key])
    assert not np.array_equal(first[3], first[9])


# --- the loss


def loss_of(pre: Preprocessor, tree: Example, **options):
    encoded = pre.encode(tree, **options)
    return [encoded.loss_weights[encoded.segment_ids == number] for number in range(len(tree.conversations))]


def test_long_answers_count_less_by_the_token(build):
    tree = example([ask("a", "x" * 40), ask("b", "yy", weight=3.0)])
    for weighting, share in (("root_length", 1.0), ("root_subsegments_root_length", 2**-0.5)):
        for weights, own in zip(loss_of(build(loss_weighting=weighting), tree), (1.0, 3.0), strict=True):
            answered = weights[weights > 0]
            np.testing.assert_allclose(answered, own * share * 2 / len(answered) ** 0.5, rtol=1e-6)
    assert build(loss_weighting="none").config.loss_weighting is LossWeighting.none


def test_the_entry_s_weight_multiplies_the_conversation_s(build):
    tree = example([ask("a", "x"), ask("b", "yy", weight=3.0)])
    for plain, weighted in zip(loss_of(build(), tree), loss_of(build(), tree, weight=0.2), strict=True):
        np.testing.assert_allclose(weighted, plain * 0.2, rtol=1e-6)


def test_only_the_last_answer_is_learned(build):
    turns = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(("q", "one", "r", "two")))
    talk = Conversation("chat", turns)
    pre = build(last_message_loss_only=True)
    trained, prompt = pre.encode(example([talk])), pre.encode_prompt(example([talk]))
    np.testing.assert_array_equal(trained.input_ids, build().encode(example([talk])).input_ids)
    learned = np.flatnonzero(trained.labels != IGNORE)
    assert learned[0] == len(prompt) - 1 and (np.diff(learned) == 1).all()
    assert pre.decode(trained.labels[learned].tolist()) == "two" and not trained.loss_weights[: learned[0]].any()


def test_defaults_leave_no_trace_in_the_file(build):
    """A checkpoint of today's defaults has the file that it always had; others come back as they were."""
    assert not {"prompt_templates", "augmentation", "caption_length", "last_message_loss_only"} & set(
        build().config.to_json()
    )
    config = build(
        prompt_templates="none", caption_length=9, last_message_loss_only=True, loss_weighting="root_length"
    ).config
    assert type(config).from_json(config.to_json()) == config
    assert dataclasses.replace(config).to_json()["prompt_templates"] == "none"


def test_tables_agree():
    assert not DEMO_STYLES & IMAGE_CHOICE_STYLES
    for name in SystemPrompt:
        for style in ("long_caption", "vqa2", "user_qa", "demo"):
            assert len(tags(style, name, 65, [5, 900])) <= 80
