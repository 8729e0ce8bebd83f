"""The wordings of prompts, as tables: what a person might type, per kind of task.

The kinds are those of the released models (allenai/molmo `olmo/data/data_formatter.py`, allenai/molmo2
`olmo/preprocessing/{data_formatter,multiple_choice_templates}.py` and `NO_POINT_PREFIX` of `pixmo_datasets.py`); the
words are this project's own. `prompts` says when they are used and draws one of them. The first of each table is the
one for evaluation. Places: `{label}`, what is pointed at or described; `{question}`, `{options}`, `{kind}`.

    uber_model     captions, transcripts, pointing, counting by points, explanations and short answers about films are
                   templated; sets with questions of their own (VQA v2, ChartQA, ...) are asked as they were written
    uber_model_v2  the same, and every question with choices is laid out in one of `CHOICE_LAYOUTS`
    none           nothing is added: a label, or nothing at all where there is no question
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

_POINT = ("Point to {label}.", "Point at {label}.", "Where is {label}? Point to it.", "Show me {label}.")
_COUNT = (
    "How many {label} are there?",
    "Count {label}.",
    "What is the number of {label}?",
    "How many {label} do you see?",
)

DEMO_TEMPLATES: dict[str, tuple[str, ...]] = {
    "scene_caption": ("Read the scene.", "What does the scene show?", "Describe the scene.", "Read all cells."),
    "scene_count": _COUNT,
    "scene_point": _POINT,
    "chart_caption": ("Read the chart.", "What does the chart show?", "Describe the chart.", "Read all values."),
    "caption": (
        "Describe this image.",
        "What is in this image?",
        "Write a caption of this image.",
        "Say everything that you can see.",
    ),
    "point": _POINT,
    "point_count": _COUNT,
}
"""Those of the built-in datasets, and of short names for one's own. The tokenizer `bytes512` is learned from them."""

_LONG_CAPTION = (
    "Describe this image.",
    "Describe everything in this image in detail.",
    "What does this image show? Be thorough.",
    "Caption this at length.",
    "caption this in detail",
    "Give a full description of the picture.",
    "Explain to someone who cannot see it what is in this photo.",
    "A detailed caption, please.",
    "Tell me all that you see here.",
    "long description",
    "Look closely at the image and write down what is in it.",
    "Write one long paragraph about this picture.",
    "What can you see?",
    "Go through the image and describe each part of it.",
    "say what the photo shows",
    "I would like a complete account of this image.",
)
_SHORT_CAPTION = (
    "Describe this image in one or two sentences.",
    "Give a short caption.",
    "In brief, what is in this picture?",
    "Sum up the image in a sentence.",
    "short caption:",
    "One line about this photo, please.",
    "What is this, in a few words?",
    "Write a title-like description of the image.",
    "Tell me shortly what the picture shows.",
    "A one-sentence description of the image:",
)
_TRANSCRIPT = (
    "Describe this image as somebody would who talks about it.",
    "Say out loud what you see in this image and write your words down.",
    "Write the transcript of a person who describes this picture.",
    "Talk me through this image, in spoken language.",
    "What would a speaker say while looking at this image?",
)
_POINTING = (
    *_POINT,
    "Point at all of {label}.",
    "Point to all {label} in the image, or say 'There are none.'",
    "Look for {label} and point.",
    "find all {label}",
    "Locate {label} in the picture.",
    "Mark {label} with points.",
    "Can you find {label}? Point them out.",
    "Where do you see {label}?",
    "Give me the points of {label}.",
    "point: {label}",
    "Is there any {label} here? Point if so.",
    "I am searching for {label}. Where in the image?",
    'Point out each instance of "{label}".',
    "Thing to find: {label}\nTask: point at it.",
    "Help me spot {label}.",
    "Indicate where {label} can be seen.",
)
_POINT_COUNT = (
    *_COUNT,
    "please count {label}",
    "number of {label}?",
    "How many {label} does the image show?",
    "Point to {label} and count them.",
    "Tell me the number of {label} in this picture.",
    "Find all {label}; how many are there?",
    "Give the total of {label}.",
    "Can you count {label}?",
    "Point at every {label}, then say how many.",
    "Is there any {label}? How many?",
    "Thing to count: {label}\nTask: point and count.",
    "Count each {label} that is visible, or say 'There are none.'",
    'What is the count of "{label}" here?',
    "I need the number of {label}.",
)
_COUNT_THEN_POINT = (
    "How many {label} are there? Then point to them.",
    "Count {label} first, and point to them afterwards.",
    "Say how many {label} you see and show me where.",
    "Give the number of {label}, then their points.",
)
_MOTION = (
    "Describe what moves in this video.",
    "What moves in this video, and how?",
    "Describe how people and things move here.",
    "Write a caption about the movement in the clip.",
    "motion caption",
    "Follow the motion and tell me about it in detail.",
)
_OBJECT = (
    "Describe the {label} in this video in one or two sentences.",
    "Give a short description of the {label} in the video.",
    "What about the {label}? Describe it in a sentence.",
    "short caption of the {label}:",
    "Sum up what the video shows of the {label}.",
)


def _of_video(texts: Sequence[str]) -> tuple[str, ...]:
    """The same, asked about a film."""
    return tuple(re.sub(r"\b(image|picture|photo)\b", "video", text) for text in texts)


TEMPLATES: dict[str, tuple[str, ...]] = DEMO_TEMPLATES | {
    "long_caption": _LONG_CAPTION,
    "short_caption": _SHORT_CAPTION,
    "transcript": _TRANSCRIPT,
    "pointing": _POINTING,
    "cosyn_point": _POINTING,
    "point_count": _POINT_COUNT,
    "point_then_count": _POINT_COUNT,
    "count_then_point": _COUNT_THEN_POINT,
    "video_long_caption": _of_video(_LONG_CAPTION),
    "video_short_caption": _of_video(_SHORT_CAPTION),
    "video_transcript": _of_video(_TRANSCRIPT),
    "video_motion_caption": _MOTION,
    "video_object_caption": _OBJECT,
}
"""The prompts of each style whose question has no text, the one for evaluation first.

A style that is not listed, such as `scene_qa`, `chart_qa`, `vqa2`, `user_qa` and `chat`, brings the text of every
question along.
"""

_SHORT_ANSWER = (
    "{question} Answer briefly.",
    "{question}\nReply with a few words.",
    "Give a short answer: {question}",
    "Q: {question} Short answer:",
    "{question} Keep the answer very short.",
    "Question: {question}\nBrief answer:",
    "Just the answer, no explanation.\n{question}",
    "Look at the video and answer in a few words: {question}",
    "{question}\nAnswer without any detail.",
    "{question} The short answer is",
)
EXPLAINED = "_exp"
"""In a style's name: the answer explains before it answers."""
QUESTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "video_short_answer": _SHORT_ANSWER,
    "video_short_answer_count_without_pointing": _SHORT_ANSWER,
    EXPLAINED: ("{question} Explain your reasoning step by step, and end with the short answer.",),
}
"""What stands around the text of a question, by style; `_exp` is every style with that in its name."""

NO_POINTING_STYLES = frozenset({"user_qa", "synthetic_qa", "correction_qa"})
"""Styles (PixMo-AskModelAnything, PixMo-CapQA, corrections) whose counting questions are answered in words, although a
model of this family points when it counts; the question then says so."""
NO_POINTING = (
    "Answer in words, without points: ",
    "Words, no points: ",
    "points are not wanted:\n",
    "NO POINTS HERE\n",
    "no points please\n",
    "You need not point. ",
    "Don't mark anything: ",
    "Please do not point.\n\n",
    "Leave out points. ",
    "Answer in words only. ",
    "In plain text, without points: ",
    "Without pointing at anything: ",
    "Reply without points:\n",
    "Skip the points. ",
    "Text only. ",
    "This time do not use points. ",
)
_UNITS = (
    r"(?:more|fewer|less|years|months|weeks|days|hours|minutes|\w*seconds|\w*met(?:er|re)s|feet|ft|inches|miles|yards|"
    r"acres|hectares|dollars|cents|euros|pounds|ounces|tons|\w*grams|\w*lit(?:er|re)s|gallons|degrees|calories|\w*watts|"
    r"\w*bytes|likes|ways|different ways|cubic|square)\b"
)
_COUNTING = re.compile(
    rf"\bhow ?many (?!{_UNITS})"
    r"|(?<!do not )(?<!don't )\b(?:count|tally) (?:all|every|each|the)\b"
    r"|\b(?:there are|a total of) _{3,}"
    r"|\bwhat(?:'s| is| was| are| were)?(?: the)?(?: exact| precise)?(?: total)? (?:number|count|amount) of "
    rf"(?!{_UNITS}|(?:the|money)\b)",
    re.IGNORECASE,
)


def is_counting(question: str) -> bool:
    """Whether a question asks for a number of things that one could point at, and not for a measure or a guess."""
    return _COUNTING.search(question) is not None and not question.lower().startswith("approximately")


# --- choices

CHOICE_TEMPLATES = (
    "{question}\n{options}\nAnswer with the letter of the right option.",
    "{question}\n{options}\nWhich option is right?",
    "Choose one of the options.\n{question}\n{options}",
    "Question: {question}\nOptions:\n{options}\nRight option:",
    "{question} Choose from:\n{options}",
    "Read the options and name the best one.\n{question}\n{options}",
    "{question}\n{options}\nBest option:",
    "Give only the right option.\nQuestion: {question}\nOptions: {options}",
)
"""Around questions with choices about films, under `uber_model`."""


@dataclass(frozen=True)
class ChoiceLayout:
    """One way to write a question with choices and its answer."""

    frame: str
    """The whole, with places `{question}`, `{options}`, and `{kind}` for what the names are called."""
    names: str = "A"
    """First of the names: `A`, `a`, `1`, `i`; empty for choices without."""
    marker: str = "{name}. "
    """A name in front of its choice."""
    separator: str = "\n"
    name_only: bool = False
    """The answer is the name alone; otherwise marker and choice, as in the list."""

    def write(self, question: str, options: Sequence[str]) -> tuple[str, list[str]]:
        """The question, and the answer that says each of the options."""
        names = _NAMES[self.names][1](len(options)) if self.names else [""] * len(options)
        marked = [self.marker.replace("{name}", name) for name in names] if self.names else names
        listed = [mark + option for mark, option in zip(marked, options, strict=True)]
        body = (self.separator.lstrip("\n") if "•" in self.separator else "") + self.separator.join(listed)
        kind = _NAMES[self.names][0] if self.names else ""
        text = fill(self.frame, question=question, options=body, kind=kind)
        return text, names if self.name_only else listed


def _numerals(count: int) -> list[str]:
    """Lower-case Roman numerals from i."""
    tens, ones = ("", "x", "xx"), ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")
    return [tens[number // 10] + ones[number % 10] for number in range(1, count + 1)]


_NAMES: dict[str, tuple[str, Callable[[int], list[str]]]] = {
    "A": ("letter", lambda count: list(ascii_uppercase[:count])),
    "a": ("letter", lambda count: list(ascii_lowercase[:count])),
    "1": ("number", lambda count: [str(number) for number in range(1, count + 1)]),
    "i": ("numeral", _numerals),
}
_NAME_FRAMES = (
    "{question}\n{options}\nReply with the {kind} of the right option only.",
    "Name the {kind} of the best option.\n{question}\n{options}",
    "{question}\n\n{options}\n\nOnly the {kind}, please.",
    "Question: {question}\nOptions: {options}\nThe {kind} of the answer:",
    "{question}\nWhich one? Say its {kind}.\n{options}",
    "Choose an option and give nothing but its {kind}.\n\n{question}\n\n{options}",
    "Q: {question}\n{options}\n{kind}:",
    "{options}\n\nGiven these options, answer with a {kind}: {question}",
    "I have to answer '{question}' with one of these; tell me the {kind}.\n{options}",
)
_OPTION_FRAMES = (
    "{question}\n{options}\nChoose the right option.",
    "Pick the option that answers the question.\n{question}\n{options}",
    "Question: {question}\n\nOptions:\n{options}\n\nAnswer with one option.",
    "{question} Select one of:\n{options}",
    "{question}\n\n{options}\n\nWhich of them is correct?",
    "[Question]\n{question}\n\n[Options]\n{options}\n\n[Task]\nRepeat the right option.",
    "Q: {question}\n{options}\nThe right one:",
    "{question}\n---\n{options}\n---\nState the best option.",
    "One of these options is right. {question}\n{options}",
    "1) Question: {question}\n2) Options: {options}\n3) Your task: return the right one.",
    "Help me with '{question}' by choosing from\n{options}",
    "{question}\nAnswer with an option and nothing else.\n{options}",
)
_MARKERS = (
    "{name}. ",
    "{name}) ",
    "{name}: ",
    "({name}) ",
    "{name}. ",
    "[{name}] ",
    "{name}) ",
    "{name} - ",
    "{name}: ",
)
_INLINE = 7
"""Every seventh layout has its choices on one line."""


def _layouts() -> tuple[ChoiceLayout, ...]:
    standard = ChoiceLayout("{question}\nGive only the right option.\n{options}")
    kinds = tuple(_NAMES)
    made = []
    for place in range(9):
        frame, marker = _NAME_FRAMES[place], _MARKERS[place]
        made.append(ChoiceLayout(frame, kinds[place % 4], marker, _separator(place), name_only=True))
    for place in range(21):
        frame, marker = _OPTION_FRAMES[place % 12], _MARKERS[(place + place // 12) % 9]
        made.append(ChoiceLayout(frame, kinds[(place + place // 12) % 4], marker, _separator(place)))
    return (standard,) * 4 + tuple(made) + UNLABELLED_LAYOUTS[1:]


def _separator(place: int) -> str:
    return "; " if place % _INLINE == _INLINE - 1 else "\n"


UNLABELLED_LAYOUTS = tuple(
    ChoiceLayout(frame, "", separator=separator)
    for frame, separator in (
        ("{question}\nGive only the right option.\n{options}", "\n"),
        (_OPTION_FRAMES[0], "\n"),
        (_OPTION_FRAMES[2], "\n• "),
        (_OPTION_FRAMES[3], "\n• "),
        (_OPTION_FRAMES[4], "\n"),
        (_OPTION_FRAMES[8], "; "),
        (_OPTION_FRAMES[10], "\n"),
    )
)
"""How choices without names are written under `uber_model_v2`; the first is for evaluation."""

CHOICE_LAYOUTS = _layouts()
"""How choices are written under `uber_model_v2`. One in ten is the layout of evaluation; a quarter asks for the name
alone; one in seven has no names; four kinds of names, seven of markers."""


def fill(template: str, **places: str) -> str:
    """A template with its places filled, in one pass: what is filled in may itself look like a place."""
    return re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[0]), template)
