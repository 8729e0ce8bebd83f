"""Text-only conversations, read from a small copy with the published columns."""

from datasets import Features, List, Value

from molmo_model.data.example import BadRow, Conversation, Message
from tests.data.snapshots import examples, read, write_split

TEXT = Value("string")
FEATURES = Features({"id": TEXT, "messages": List({"content": TEXT, "role": TEXT}), "source": TEXT})


def chat(name, *turns, source="good/part"):
    return {"id": name, "source": source, "messages": [{"role": role, "content": said} for role, said in turns]}


TALK = (("user", " Hi. "), ("assistant", "Hello."), ("user", "Sum\nit up."), ("assistant", "Done."))
SYSTEM = ("system", "Be short.")


def test_conversations_of_several_turns(tmp_path):
    rows = [chat("a", *TALK), chat("b", SYSTEM, *TALK[:2]), chat("a", *TALK[:2], source="other/part")]
    write_split(tmp_path, "train", rows, FEATURES)
    first, second, third = examples("tulu", tmp_path, eval_fraction=0.0)
    said = tuple(
        Message(role, text)
        for role, text in (("user", "Hi."), ("assistant", "Hello."), ("user", "Sum\nit up."), ("assistant", "Done."))
    )
    assert first.conversations == (Conversation("text_sft", said),)
    assert (first.id, first.files, first.metadata) == ("a", (), {"source": "good/part"})
    asked = (Message("user", "System: Be short.\nHi."), said[1])
    assert second.conversations == (Conversation("text_sft", asked, metadata={"system": "Be short."}),)
    assert third.id != "a", "ids are unique though the set repeats one"


def test_what_the_options_leave_out(tmp_path):
    rows = [chat("a", *TALK), chat("b", SYSTEM, *TALK[:2]), chat("c", *TALK[:2], source="other/part")]
    write_split(tmp_path, "train", rows, FEATURES)
    kept = examples("tulu", tmp_path, options={"system": "skip", "skip_sources": ["other/part"]})
    assert [one.id for one in kept] == ["a"]
    (bad,) = [row for _, row in read("tulu", tmp_path, options={"system": "refuse"}) if isinstance(row, BadRow)]
    assert (bad.line, bad.field) == (2, "messages[0].role")
    assert "option `system`" in bad.reason


def test_equal_texts_stand_on_one_side(tmp_path):
    """Held out by a hash of the text: the same conversation is never in training and evaluation."""
    rows = [chat(f"{i}", ("user", f"Question {i % 40}"), ("assistant", "Yes.")) for i in range(120)]
    write_split(tmp_path, "train", rows, FEATURES)
    sides = {}
    for side, one in read("tulu", tmp_path, eval_fraction=0.3):
        sides.setdefault(one.conversations[0].messages[0].text, set()).add(side)
    assert {len(found) for found in sides.values()} == {1}
    assert 2 <= sum(found == {"eval"} for found in sides.values()) <= 25


def test_defects(tmp_path):
    user, assistant = TALK[:2]
    rows = [
        chat("0", assistant, user),
        chat("1", user),
        chat("2", user, user, assistant, assistant),
        chat("3", user, assistant, SYSTEM, assistant),
        chat("4", user, ("assistant", " ")),
        chat("5", SYSTEM),
        chat("6", ("system", ""), user, assistant),
        chat("7", user, ("tool", "x")),
        {"id": "8", "source": "s", "messages": None},
        chat("9", user, assistant),
    ]
    write_split(tmp_path, "train", rows, FEATURES)
    found = read("tulu", tmp_path, eval_fraction=0.0)
    told = [(row.line, row.field) for _, row in found if isinstance(row, BadRow)]
    assert told == [
        (1, "messages[0].role"),
        (2, "messages"),
        (3, "messages[1].role"),
        (4, "messages[2].role"),
        (5, "messages[1].content"),
        (6, "messages"),
        (7, "messages[0].content"),
        (8, "messages[1].role"),
        (9, "messages"),
    ]
    assert [row.id for _, row in found if not isinstance(row, BadRow)] == ["9"]
