"""The page of prompts says what the code writes.

    python -m tests.preprocessing.test_prompt_page

writes its tables anew.
"""

from pathlib import Path

from molmo_model.data.example import POINT_MARK, Conversation, InlinePoints, Message
from molmo_model.errors import DataError
from molmo_model.model_config import PromptTemplates, SystemPrompt
from molmo_model.preprocessing import system_prompts, templates
from molmo_model.preprocessing.prompts import PromptFormat, asked, choices, write
from tests.preprocessing.examples import asked as ask

PAGE = Path("docs/prompts.md")
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->"
OPTIONS = ("a dog", "a cat")
NOTHING = "*refused: nothing to ask*"


def pointing(style: str) -> Conversation:
    answer = Message("assistant", points=((10.0, 20.0), (60.0, 5.0)), label="Cats")
    return Conversation(style, (Message("user", label="Cats"), answer))


def choosing(style: str, answer: str, options: tuple[str, ...] = OPTIONS) -> Conversation:
    return Conversation(style, (Message("user", "What is it?", options=options), Message("assistant", answer)))


SAMPLES = [
    *(ask(None, "A cat sits there.", style) for style in ("long_caption", "short_caption", "transcript")),
    *map(pointing, ("pointing", "point_count", "count_then_point")),
    ask("Is it asleep?", "Yes.", "user_qa"),
    ask("How many cats?", "Two.", "user_qa"),
    ask("What is this?", "A cat.", "synthetic_qa"),
    Conversation(
        "point_qa",
        (
            Message("user", "Which cat is asleep?"),
            Message("assistant", f"The {POINT_MARK}.", inline=(InlinePoints(((10.0, 20.0),), "left one", "cat"),)),
        ),
    ),
    *(
        ask("What is the total?", "12", style)
        for style in ("vqa2", "text_vqa", "chart_qa", "doc_qa", "eval_short_answer")
    ),
    Conversation(
        "cosyn_chart_exp", (Message("user", "What is the total?"), Message("assistant", "12", explanation="5 and 7."))
    ),
    choosing("ai2_diagram", "B"),
    choosing("ai2_diagram_no_letter", "C", ("B", "C")),
    choosing("science_qa", "B"),
    choosing("eval_multiple_choice", "B"),
    *(
        ask(None, "A cat runs.", style)
        for style in ("video_long_caption", "video_short_caption", "video_motion_caption")
    ),
    ask("Why?", "It fled.", "video_short_answer"),
    choosing("video_multiple_choice", "B"),
    choosing("video_eval_multiple_choice", "B"),
    ask("Write a poem.", "Roses...", "text_sft"),
]


def code(text: str) -> str:
    """A text in a cell of a table."""
    return "`" + text.replace("\n", "⏎").replace("|", "\\|") + "`" if text.strip() else " "


def first_question(talk: Conversation, form: PromptFormat) -> str:
    try:
        return code(asked(talk, form)[0])
    except DataError:
        return NOTHING


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def tables() -> str:
    """What stands between the marks of the page."""
    by_words = table(
        ["style", *(f"`{one.value}`" for one in PromptTemplates), "wordings", "answer under `uber_model`"],
        [
            [
                f"`{talk.style}`",
                *(first_question(talk, PromptFormat(templates=one)) for one in PromptTemplates),
                str(len(choices(talk, PromptFormat())[0])),
                code(write(talk, PromptFormat())[1].strip()),
            ]
            for talk in SAMPLES
        ],
    )
    tagged = [one for one in SystemPrompt if one not in (SystemPrompt.none, SystemPrompt.no_style)]
    styles = list(dict.fromkeys(talk.style for talk in SAMPLES))
    by_tag = table(
        ["style", *(f"`{one.value}`" for one in tagged)],
        [[f"`{style}`", *(tag_cell(style, one) for one in tagged)] for style in styles],
    )
    layouts = dict.fromkeys(templates.CHOICE_LAYOUTS)
    drawn = table(
        ["question", "answers"],
        [[code(text), code(" / ".join(said))] for text, said in (one.write("What is it?", OPTIONS) for one in layouts)],
    )
    return "\n".join(
        [
            "## Questions and answers",
            "",
            "The text of evaluation, without a tag; `⏎` is a line break. *Wordings* is how many training draws from",
            "under `uber_model`.",
            "",
            *by_words,
            "## Tags",
            "",
            "Of evaluation. In brackets what training draws otherwise; 83 stands for the length of the answer at hand.",
            "",
            *by_tag,
            "## Layouts of choices under `uber_model_v2`",
            "",
            "The first is that of evaluation and of one training draw in ten.",
            "",
            *drawn,
        ]
    )


def tag_cell(style: str, system_prompt: SystemPrompt) -> str:
    """The tag of evaluation, and what else training draws."""
    known = system_prompts.train_style(style)
    now = system_prompts.tags(known, system_prompt, 65, [1245])
    rule = system_prompts.LENGTH_RULES.get(system_prompt)
    if rule is None or style not in system_prompts.CAPTION_STYLES:
        other = [f"1 in 10 {code(tag)}" for tag in now[1:]]
    else:
        other = [f"9 in 10 {code(f'{known} 83:')}", f"1 in 10 {code(known + rule.unknown)}"]
    return (code(now[0]).strip() or "none") + (f" ({', '.join(other)})" if other else "")


def test_the_page_says_what_the_code_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == tables(), "write it anew: see this module's docstring"


def test_every_templated_style_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for style in (*templates.TEMPLATES, *system_prompts.EVAL_STYLES, *templates.QUESTION_TEMPLATES):
        assert f"`{style}`" in page, style


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(head + BEGIN + tables() + END + tail, encoding="utf-8")
