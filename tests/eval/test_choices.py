"""Multiple choice: readings against what the published codes give for the same answers, and the plain reading."""

import random
from string import ascii_uppercase as LETTERS

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS, choices, letters
from molmo_model.eval.metrics.choices import Choices, read_choice

OPTIONS = ("a cat", "a black dog", "the moon", "nothing at all")
LETTERED, UNLETTERED = Choices(OPTIONS, 1, True), Choices(OPTIONS, 1, False)


def asked(answer="B", right=1, options=OPTIONS, **metadata):
    return {
        "answer": answer,
        "metadata": {"options": list(options), "answer_index": right, "answer": options[right]} | metadata,
    }


# --- the published readings

PUBLISHED = (
    *("muir_bench", "muir_bench_lmms_eval", "blink_lmms_eval", "em_start", "perception_test", "egoschema", "next_qa"),
    *("long_video_bench", "video_mme", "lmms_eval", "molmo2"),
)
TAKEN = {
    "B": "BBBBBBBBBBB",
    "b": "-BBB------B",
    "(B)": "B-B-BBBBBBB",
    "B.": "BBBBBBBBBBB",
    "B) a black dog": "B-BBB--BBBB",
    "B: a black dog": "B-BBB--BBBB",
    "B. a black dog": "BBBBBBBBBBB",
    "a black dog": "--AA------A",
    "black": "--BB------B",
    "The answer is B.": "B---BBBBBBA",
    "The best answer is: (B)": "B---BBBBBBA",
    "Answer: B": "B-ABBBBABBB",
    "Best answer: B": "B-BBBBBBBBB",
    "A or B": "B-AAAABAAAA",
    "(A) is wrong, so (B)": "B-A-AABAABA",
    "not A. but B": "A---AABAABA",
    "It is a black dog, as far as I can see.": "B----BB---A",
    "A black dog runs": "A-AAAAAAAAA",
    "cat": "--CC------C",
    "I do not know": "----------D",
    "": "-----------",
    "Because of USA. B": "A-BBBABBBBB",
    "maybe\nB\nmaybe": "-------BBBA",
    "E": "----------A",
    "D B": "B-DDDDBDDDD",
}
"""What each published code, in the order of `PUBLISHED`, takes from an answer about `OPTIONS`, found by running it with
its random draws taken out: `-` where it would draw, drop the answer, or take a letter that is not offered."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_readings_take_what_the_published_codes_take(name):
    read = choices.molmo2 if name == "molmo2" else letters.READINGS[name]
    column = PUBLISHED.index(name)
    found = {said: read(said, LETTERED) for said in TAKEN}
    assert found == {said: None if row[column] == "-" else LETTERS.index(row[column]) for said, row in TAKEN.items()}


@pytest.mark.parametrize(
    ("said", "of_letters", "of_texts"),
    [
        ("B", 1, 1),
        ("b.", 1, 0),
        ("B. a black dog", 0, 1),
        ("a black dog", 0, 1),
        ("black", 0, 1),
        ("the moo", 0, 2),
        ("nothing", 0, 3),
        ("it is the moon", 0, 2),
        ("", None, None),
    ],
)
def test_molmos_first_reading_takes_the_nearest_name(said, of_letters, of_texts):
    assert choices.nearest(said, LETTERED) == of_letters
    assert choices.nearest(said, UNLETTERED) == of_texts


def test_no_reading_depends_on_chance_or_names_a_choice_that_is_not_offered():
    rng = random.Random(0)
    words = ["A", "B.", "(C)", "d", "E", "F:", "a cat", "answer is", "the", "\n", "因为", "moon", "USA"]
    reads = {"plain": read_choice, "molmo": choices.nearest, "molmo2": choices.molmo2, "llava": choices.llava}
    for _ in range(300):
        said = " ".join(rng.choices(words, k=rng.randint(0, 9)))
        for name, read in (reads | letters.READINGS).items():
            place = read(said, LETTERED)
            assert place is None or 0 <= place < 4, (name, said)
            assert read(said, LETTERED) == place


@pytest.mark.parametrize("name", ["multiple_choice", "science_qa", "ai2d", *letters.METRICS])
def test_every_reading_takes_the_letter_of_every_choice(name):
    metric = METRICS[name]
    for right, letter in enumerate("ABCD"):
        score = metric.score(letter, asked(letter, right))
        assert set(score.values.values()) == {1.0}
        assert score.read == f"{letter}. {OPTIONS[right]}"
        assert metric.score("ABCD"[right - 1], asked(letter, right)).values[metric.primary] == 0.0
        assert all(metric.output(number) for number in score.values)


@pytest.mark.parametrize("name", ["multiple_choice", "science_qa", "ai2d", *letters.METRICS])
def test_an_answer_without_a_choice_is_counted_and_scores_nothing(name):
    metric = METRICS[name]
    for said in ("", "   \n", "?"):
        score = metric.score(said, asked("A", 0))
        assert score.parsed is False
        assert score.values[metric.primary] == score.values["accuracy"] == 0.0
        assert score.read is None


# --- the plain reading


@pytest.mark.parametrize(
    "said",
    [
        *("B", "b", "(B)", "[B]", "B.", "b)", "B:", "B. a black dog", "B: a black dog", "(B) a black dog"),
        *("B) A Black Dog", "B - a black dog", "B a black dog", "a black dog", "A BLACK DOG", "a black dog."),
        *("black dog", "Answer: B", "The answer is B.", "The correct option is (B)", "It is a black dog, I think"),
        *("First I looked.\nThen I thought.\nThe answer is B.", "B\nbecause it barks", "I see no cat. So: (B)"),
    ],
)
def test_letter_and_text_of_a_choice_are_the_same_answer(said):
    assert read_choice(said, LETTERED) == 1


@pytest.mark.parametrize(
    "said",
    ["", "E", "(E)", "the", "a cat or the moon", "B. the moon", "(A) or (C)", "dogs", "I do not know", "?!"],
)
def test_what_names_no_choice_or_two_is_unread(said):
    assert read_choice(said, LETTERED) is None


def test_letters_on_the_picture_are_texts_and_letters_of_choices_are_not():
    drawn = ("F", "B", "A")
    assert read_choice("B", Choices(drawn, 1, lettered=True)) == 1
    assert read_choice("A", Choices(drawn, 1, lettered=True)) == 0
    assert read_choice("A", Choices(drawn, 1, lettered=False)) == 2
    assert read_choice("(f)", Choices(drawn, 1, lettered=False)) == 0
    assert read_choice("It is a tree", Choices(drawn, 1, lettered=False)) is None
    assert (
        METRICS["ai2d"].score("A", asked("A", 2, drawn)).values["accuracy"] == 1.0
    )  # unlettered: the text is the answer


def test_numbers_keep_their_sign_and_decimals():
    numbers = Choices(("5", "-5", "3.5", "35", "3,500"), 0, True)
    said = {"5": 0, "-5": 1, "3.5": 2, "35": 3, "3,500": 4, "5.": 0, "it is 3.5": 2, "7": None}
    assert {one: read_choice(one, numbers) for one in said} == said


def test_a_choice_offered_twice_is_one():
    twice = asked("C", 2, ("red", "blue", "Red ", "green"))
    for said in ("C", "A", "red", "A. red"):
        assert METRICS["multiple_choice"].score(said, twice).values["accuracy"] == 1.0
    assert METRICS["multiple_choice"].score("A", twice).values["molmo2"] == 0.0
    assert METRICS["multiple_choice"].score("B", twice).values["accuracy"] == 0.0


def test_the_order_of_the_choices_does_not_matter_to_an_answer_by_its_text():
    rng = random.Random(1)
    for _ in range(50):
        options = rng.sample(OPTIONS, 4)
        right = options.index("the moon")
        assert METRICS["multiple_choice"].score("The moon!", asked(LETTERS[right], right, options)).values["accuracy"]


def test_references_that_do_not_hold_together_say_so():
    score = METRICS["multiple_choice"].score
    with pytest.raises(EvaluationError, match="0 options and the answer_index None"):
        score("B", {"answer": "B"})
    with pytest.raises(EvaluationError, match="answer_index 4"):
        score("B", asked() | {"metadata": {"options": list(OPTIONS), "answer_index": 4}})
    with pytest.raises(EvaluationError, match="'a dog'; by the metadata it is 'B', or 'a black dog'"):
        score("B", asked("a dog"))


def test_the_constant_answer_is_the_most_frequent_letter():
    training = [asked(letter, LETTERS.index(letter)) for letter in "CABCC"]
    assert METRICS["multiple_choice"].constant(training) == "C"
    assert METRICS["video_mme"].constant(training) == "C"


# --- sets of their own


def test_ai2d_tells_opaque_from_transparent_and_counts_plain_pictures_in_both():
    def numbers(said, **metadata):
        return METRICS["ai2d"].score(said, asked(**metadata)).values

    assert numbers("B", abc_label=True, has_transparent_box=False).keys() == {
        *("accuracy", "molmo", "molmo2", "accuracy_opaque", "molmo2_opaque"),
    }
    assert "accuracy_opaque" not in numbers("B", abc_label=True, has_transparent_box=True)
    assert numbers("B", abc_label=True, has_transparent_box=True)["accuracy_transparent"] == 1.0
    both = numbers("C", abc_label=False, has_transparent_box=False)
    assert both["accuracy_opaque"] == both["accuracy_transparent"] == 0.0
    assert "accuracy_transparent" not in numbers("B", has_transparent_box=False)  # the hub's rows


def test_video_mme_shows_what_dropping_unread_answers_hides():
    score = METRICS["video_mme"].score
    read, unread = score("B", asked()), score("no idea", asked())
    assert read.values["answered_only"] == 1.0
    assert "answered_only" not in unread.values
    assert unread.values["video_mme"] == 0.0
    assert not unread.parsed
    assert (
        score("Best answer: D", asked("D", 3)).values["video_mme"] == 1.0
    )  # B with the published list's missing comma


ROAD = "Where does the road lead?\n\nA. Left\nB. Straight ahead\nC. Right\nPlease answer directly with only the letter."


@pytest.mark.parametrize(
    ("said", "accuracy", "molmo2"),
    [("C", 1, 1), ("C. Right", 1, 1), ("right", 1, 0), ("Left", 0, 0), ("", 0, 0), ("(C)", 1, 1), ("the left", 0, 0)],
)
def test_real_world_qa_choices_stand_in_the_question(said, accuracy, molmo2):
    references = {"metadata": {"question_type": "multiple_choice", "prompt": ROAD, "answers": ["C"]}}
    values = METRICS["real_world_qa"].score(said, references).values
    assert values == {"accuracy": accuracy, "molmo2": molmo2}


def test_real_world_qa_short_answers_are_compared_as_vqa_answers():
    references = {"metadata": {"question_type": "short_answer", "prompt": "How many?", "answers": ["2"]}}
    assert METRICS["real_world_qa"].score("Two.", references).values == {"accuracy": 1.0, "molmo2": 1.0}
    assert METRICS["real_world_qa"].score("3", references).values == {"accuracy": 0.0, "molmo2": 0.0}
    bare = {"metadata": {"question_type": "multiple_choice", "prompt": "Left or right?", "answers": ["D"]}}
    assert METRICS["real_world_qa"].score("D", bare).values["accuracy"] == 1.0
    with pytest.raises(EvaluationError, match="none of the letters"):
        METRICS["real_world_qa"].score("C", {"metadata": bare["metadata"] | {"answers": ["E"]}})


def test_llavas_reading_of_science_qa():
    said = {"B": 1.0, "b": 1.0, "B. a black dog": 1.0, "b. a black dog": 0.0, "B) a black dog": 0.0, "(B)": 0.0}
    assert {one: METRICS["science_qa"].score(one, asked()).values["llava"] for one in said} == said


# --- TempCompass

CAPTIONS = "Which fits?\nCaption A: a man runs\nCaption B: a man: he walks"


@pytest.mark.parametrize(
    ("task", "said", "answer", "right"),
    [
        ("multi-choice", "A. up", "A. up", 1),
        ("multi-choice", "A", "A. up", 1),
        ("multi-choice", "A) upwards", "A. up", 1),
        ("multi-choice", "B. up", "A. up", 0),
        ("multi-choice", "It is A", "A. up", None),
        ("yes_no", "Yes, it does", "yes", 1),
        ("yes_no", "nobody", "yes", 0),
        ("yes_no", "It does", "yes", None),
        ("caption_matching", "Caption A: a man runs", "Caption A: a man runs", 1),
        ("caption_matching", "a man runs", "Caption A: a man runs", 1),
        ("caption_matching", "Caption A.", "Caption A: a man runs", 1),
        ("caption_matching", "A", "Caption A: a man runs", 1),
        ("caption_matching", "(A) a man runs", "Caption A: a man runs", 1),
        ("caption_matching", "B", "Caption A: a man runs", 0),
        ("caption_matching", "Caption B: a man: he walks", "Caption B: a man: he walks", 1),
        ("caption_matching", "a man", "Caption B: a man: he walks", 1),
        ("caption_matching", "he runs", "Caption A: a man runs", None),
        ("caption_matching", "", "Caption A: a man runs", None),
    ],
)
def test_temp_compass_matches_by_the_published_rules(task, said, answer, right):
    references = {"answer": answer, "metadata": {"task": task, "question": CAPTIONS, "answers": [answer]}}
    score = METRICS["temp_compass"].score(said, references)
    assert score.values == dict.fromkeys(("temp_compass", task.replace("-", "_")), float(bool(right)))
    assert score.parsed is (right is not None)


@pytest.mark.parametrize("name", ["muir_bench", "em_start", "video_mme", "mmmu"])
def test_readings_of_letters_refuse_choices_without_them(name):
    references = {"answer": "a dog", "metadata": {"options": ["a cat", "a dog"], "answer_index": 1}}
    with pytest.raises(EvaluationError, match="reads letters; use multiple_choice"):
        METRICS[name].score("a dog", references)


@pytest.mark.parametrize(
    ("said", "right"),
    [("The answer is (A) or (B).", 0.0), ("The answer is (A)/(B)", 0.0), ("The answer is (A), not (B)", 1.0)],
)
def test_two_letters_that_are_called_the_answer_are_none(said, right):
    references = {"answer": "A", "metadata": {"options": ["red", "green"], "answer_index": 0}}
    score = METRICS["multiple_choice"].score(said, references)
    assert (score.values["accuracy"], score.parsed) == (right, bool(right))


@pytest.mark.parametrize(
    ("said", "right"),
    [("The answer is 2.", 1.0), ("So the answer is: -2", 0.0), ("It is 2 and not 3.", 0.0), ("2", 1.0)],
)
def test_a_short_text_that_is_called_the_answer_is_read(said, right):
    references = {"answer": "B", "metadata": {"options": ["1", "2", "3"], "answer_index": 1, "answer": "2"}}
    assert METRICS["multiple_choice"].score(said, references).values["accuracy"] == right
    assert METRICS["mathvista"].score(said, references).values["mathvista"] == right
