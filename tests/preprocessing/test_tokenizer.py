"""The shipped tokenizer, finding tokenizers, and texts that try to be special."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from molmo_model.errors import ConfigError
from molmo_model.preprocessing.bytes512 import VOCABULARY, main
from molmo_model.preprocessing.points import points_to_text
from molmo_model.preprocessing.tokenizer import REPOSITORY, Vocabulary, load_tokenizer, tokenizer_folder

SHIPPED = "molmo_model/preprocessing/tokenizers/bytes512"


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def pieces(tokenizer, vocabulary, text: str) -> list[str]:
    return [tokenizer.decode([number]) for number in vocabulary.encode(text)]


def test_size_and_special_ids(tokenizer, vocabulary):
    assert len(tokenizer) == vocabulary.size == VOCABULARY == 512
    assert tokenizer.convert_ids_to_tokens([vocabulary.eos_id, vocabulary.pad_id]) == ["<|endoftext|>", "<|pad|>"]
    assert vocabulary.bos_id == vocabulary.eos_id


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids.tolist()) == text
    assert not set(ids.tolist()) & {vocabulary.eos_id, vocabulary.pad_id}


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|pad|>b", "<im_patch>", "🙂 \n\t  ümläut\x00", "\u2028"])
def test_special_tokens_in_text_are_spelled_out(vocabulary, text):
    ids = vocabulary.encode(text).tolist()
    assert len(ids) > 1 and vocabulary.decode(ids) == text
    assert not set(ids) & {vocabulary.eos_id, vocabulary.pad_id}


def test_digits_stand_alone(tokenizer, vocabulary):
    assert pieces(tokenizer, vocabulary, " 1024.50%") == [" 1", "0", "2", "4", ".", "5", "0", "%"]
    assert pieces(tokenizer, vocabulary, " 3 . / 5") == [" 3", " .", " /", " 5"]
    merged = [t for t in map(tokenizer.decode, range(512)) if sum(c.isdigit() for c in t) > 1]
    assert merged == []


def test_point_markup_is_short(tokenizer, vocabulary):
    text = " " + points_to_text([(10.5 + k, 20) for k in range(9)], "digit 3")
    found = pieces(tokenizer, vocabulary, text)
    assert {' <points x1="', '" y1="', '" x2="', '" y9="', '" alt="', '">', "</points>"} <= set(found)
    assert len(found) == 9 * 2 * 5 + len(['" alt="', "digit", " 3", '">', "digit", " 3", "</points>"])
    assert len(vocabulary.encode(" " + points_to_text([(1.5, 2)], "cell"))) < 22


def test_it_can_be_made_again(tmp_path, capsys):
    """The committed files are what the command writes."""
    assert main([str(tmp_path)]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((REPOSITORY / SHIPPED / name).read_text()), name
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().out


def test_names(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    assert tokenizer_folder(SHIPPED) == REPOSITORY / SHIPPED
    assert load_tokenizer(SHIPPED).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path / SHIPPED)
    assert tokenizer_folder(SHIPPED) == Path(SHIPPED)  # the working directory comes first
    assert AutoTokenizer.from_pretrained(tmp_path / SHIPPED).eos_token == "<|endoftext|>"


def test_what_cannot_be_loaded(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"'no/such/thing' cannot be loaded; it is neither a folder"):
        load_tokenizer("no/such/thing")  # three parts: no hub id, so nobody asks the network
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


def test_ids_are_shared_and_read_only(vocabulary):
    assert vocabulary.encode("How many?") is vocabulary.encode("How many?")
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.encode("How many?")[0] = 1


def test_workers_can_be_sent_one(vocabulary):
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy.encode("<|endoftext|> 12").tolist() == vocabulary.encode("<|endoftext|> 12").tolist()
