"""The selection as a picture: what is kept shows the picture's colours, what is left out is grey and dark."""

import numpy as np
import pytest

from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Question
from molmo_model.eval.heatmap import TokenMap, draw_selection, selected_tokens
from molmo_model.eval.inference import Predictor
from molmo_model.preprocessing.selection import window_edges
from molmo_model.preprocessing.tiling import layout
from pipelines import generate
from tests.nn.he_molmo import build
from tests.preprocessing.examples import asked, example, png


def colourfulness(pixels):
    return np.ptp(pixels.astype(int), axis=-1)


def test_kept_tokens_are_coloured_and_the_rest_is_grey():
    pixels = np.full((400, 600, 3), (30, 200, 30), dtype=np.uint8)
    importance = np.full((2, 3), np.nan, dtype=np.float32)
    importance[0, 2], importance[1, 0] = 1.0, 0.0
    edges = np.linspace(0, 1, 3, dtype=np.float32), np.linspace(0, 1, 4, dtype=np.float32)
    drawn = np.asarray(draw_selection(pixels, TokenMap(importance, *edges)))
    assert drawn.shape == pixels.shape
    for row in range(2):
        for column in range(3):
            cell = drawn[row * 200 + 10 : row * 200 + 190, column * 200 + 10 : column * 200 + 190]
            assert (colourfulness(cell).min() > 50) == bool(np.isfinite(importance[row, column]))
    assert drawn[100, 500, 0] > drawn[300, 100, 0]  # more important is warmer


@pytest.mark.parametrize(("size", "resize"), [((90, 150), "siglip"), ((90, 150), "clip"), ((64, 300), "clip")])
def test_windows_cover_the_picture(size, resize):
    _, encode = build({"tokens": 4})
    spec = type(encode.config)(**{**encode.config.__dict__, "resize": resize}).tiling
    rows, columns = window_edges(layout(*size, spec), spec, size)
    for edges in (rows, columns):
        assert edges[0] == 0 and edges[-1] == 1 and (np.diff(edges) >= 0).all()


def test_maps_say_what_was_selected():
    model, encode = build({"tokens": 6})
    predictor = Predictor(model, encode)
    found = selected_tokens(predictor, Question(example([asked("where?", "x")], ((90, 150), (64, 64)))))
    assert [one.kept for one in found] == [6, 4]  # the small picture has no more
    for one in found:
        shares = one.importance[np.isfinite(one.importance)]
        assert ((shares > 0) & (shares < 1)).all()
    plain, encode_plain = build(None)
    with pytest.raises(ConfigError, match="no token selector"):
        selected_tokens(Predictor(plain, encode_plain), Question(example([asked("where?", "x")])))


@pytest.mark.parametrize("selector", [{"tokens": 5}, None], ids=["selecting", "plain"])
def test_on_the_command_line(selector, tmp_path, capsys, monkeypatch):
    model, encode = build(selector)
    model.save_pretrained(tmp_path / "model")
    encode.save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(noise))
    out = tmp_path / "maps" / "heat.png"
    options = [f"checkpoint={tmp_path / 'model'}", "prompt=what?", f"image={tmp_path / 'a.png'}", "max_new_tokens=2"]
    options += [f"image={tmp_path / 'a.png'}", f"heatmap={out}"]
    if selector is None:
        monkeypatch.setattr(Predictor, "answer", None)  # refused before anything is computed
        with pytest.raises(SystemExit) as ended:
            generate.main(options)
        assert ended.value.code == 2 and "no token selector" in capsys.readouterr().err
        assert not out.exists()
        return
    generate.main(options)
    said = capsys.readouterr().out
    assert "5 of" in said and out.exists() and out.with_stem("heat-2").exists()
