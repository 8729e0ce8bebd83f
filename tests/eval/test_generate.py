"""Asking a checkpoint from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Answer
from molmo_model.eval.drawing import COLOUR, draw_points
from molmo_model.eval.inference import Predictor
from pipelines import generate
from tests.data.films import film

CHECKPOINT = "artifacts/checkpoints/base/step-000000"
POINTS = '<points x1="25.0" y1="50.0" x2="75.0" y2="50.0" alt="a">a</points>'


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").symlink_to(assembled / "artifacts")
    Image.new("RGB", (80, 40), (0, 0, 90)).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """Answers to give instead of the model's."""
    answers = []

    def answer(self, questions, *settings):
        return [Answer(answers[-1], "stop", 5, 9) for _ in questions]

    monkeypatch.setattr(Predictor, "answer", answer)
    return answers


def test_the_model_answers_about_one_picture_or_two(project, capsys):
    for images in (["image=photo.png"], ["image=photo.png", "image=photo.png"], []):
        generate.main([f"checkpoint={CHECKPOINT}", "prompt=What is it?", "max_new_tokens=3", *images])
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert not Path("answer.png").exists()


def test_the_model_answers_about_a_film_or_a_part_of_it(project, capsys, monkeypatch):
    Path("clip.mp4").write_bytes(film(range(0, 120_000, 6_000)))
    seen, original = [], Predictor.answer

    def answer(self, questions, *settings):
        seen.extend(question.example.videos for question in questions)
        return original(self, questions, *settings)

    monkeypatch.setattr(Predictor, "answer", answer)
    asked = [f"checkpoint={CHECKPOINT}", "prompt=What moves?", "max_new_tokens=3"]
    for videos in (["video=clip.mp4"], ["video=clip.mp4,1,2.5"], ["video=clip.mp4,0,1", "video=clip.mp4,2,3"]):
        generate.main([*asked, *videos])
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert [[video.clip for video in videos] for videos in seen] == [[None], [(1.0, 2.5)], [(0.0, 1.0), (2.0, 3.0)]]


def test_decoding_reaches_the_model(project, capsys):
    asked = [f"checkpoint={CHECKPOINT}", "prompt=What is it?", "max_new_tokens=12", "image=photo.png"]
    sampled = ["decoding.do_sample=true", "decoding.temperature=2"]
    said = []
    for options in (
        [],
        sampled,
        sampled,
        [*sampled, "decoding.seed=1"],
        ["decoding.num_beams=3"],
        ["keep_image_tokens=0.5"],
    ):
        generate.main([*asked, *options])
        said.append(capsys.readouterr().out)
    assert said[1] == said[2]
    assert len({said[0], said[1], said[3]}) == 3


def test_points_are_printed_and_drawn(project, said, capsys):
    said.append(POINTS)
    generate.main([f"checkpoint={CHECKPOINT}", "image=photo.png", "prompt=Point to a.", "out=drawn/a.png"])
    assert capsys.readouterr().out.splitlines() == [POINTS, "2 points drawn in drawn/a.png: (25, 50), (75, 50)"]
    pixels = np.asarray(Image.open("drawn/a.png"))
    height, width = pixels.shape[:2]
    assert width == 2 * height >= 384
    for x in (0.25, 0.75):
        assert tuple(pixels[height // 2, int(width * x)]) == COLOUR
    assert tuple(pixels[0, 0]) == (0, 0, 90)


def test_without_points_nothing_is_saved_unless_asked_for(project, said):
    said.append("a cat")
    arguments = [f"checkpoint={CHECKPOINT}", "image=photo.png", "prompt=What?"]
    generate.main(arguments)
    assert not Path("answer.png").exists()
    generate.main([*arguments, "out=answer.png"])
    assert Path("answer.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=x"], "checkpoint= is missing"),
        (["checkpoint=nowhere"], "prompt= is missing"),
        (["checkpoint=nowhere", "prompt=x"], "nowhere is not a checkpoint"),
        (["checkpoint=c", "prompt=x", "image="], "image= is empty"),
        (["checkpoint=c", "prompt=x", "prompt=y"], "prompt= is given twice"),
        (["checkpoint=c", "prompt=x", "images=y"], "'images=y' is no option"),
        (["checkpoint=c", "prompt=x", "heatmap=h.png"], "heatmap= shows what is selected of a picture; give an image="),
        (["checkpoint=c", "prompt=x", "max_new_tokens=-1"], "max_new_tokens=-1"),
        (["checkpoint=c", "prompt=x", "length=-1"], "length=-1 must be a whole number"),
        (["checkpoint=c", "prompt=x", "precision=fp64"], "fp64"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "option=one"], "a question offers 2 to 26"),
        (["checkpoint=c", "prompt=x", "decoding.num_beam=2"], "num_beam"),
        (["checkpoint=c", "prompt=x", "decoding.num_beams=0"], "decoding.num_beams is 0"),
        (["checkpoint=c", "prompt=x", "decoding.top_p=0.5"], "do_sample is off"),
        (["checkpoint=c", "prompt=x", "keep_image_tokens=most"], "keep_image_tokens=most must be a number"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "image=photo.png", "keep_image_tokens=2"], "keep_image_tokens is 2"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "image=none.png"], "none.png cannot be read"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "image=text.png"], "text.png"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "video=none.mp4"], "none.mp4 cannot be read"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "video=text.png"], "text.png"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "video=text.png,1"], "must be FILE, or FILE,START,END"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", "video=text.png,a,b"], "two numbers of seconds"),
        ([f"checkpoint={CHECKPOINT}", "prompt= ", "image=photo.png"], "text"),
        ([f"checkpoint={CHECKPOINT}", "prompt=x", *["image=photo.png"] * 9], "max_images"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(project, capsys, arguments, message):
    Path("text.png").write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        generate.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("generate: ")]) == 1


def test_an_out_that_is_no_picture_is_refused(project, said, capsys):
    said.append("a cat")
    with pytest.raises(SystemExit):
        generate.main([f"checkpoint={CHECKPOINT}", "prompt=x", "image=photo.png", "out=answer.txt"])
    assert "out=answer.txt cannot be written" in capsys.readouterr().err


def test_style_length_and_options_reach_the_prompt(project, capsys, monkeypatch):
    asked = []

    def answer(self, questions, *args):
        asked.extend(questions)
        return [Answer("A", "stop", 1, 9) for _ in questions]

    monkeypatch.setattr(Predictor, "answer", answer)
    generate.main([f"checkpoint={CHECKPOINT}", "prompt=x", "style=long_caption", "length=7", "option=a", "option=b"])
    generate.main([f"checkpoint={CHECKPOINT}", "prompt=x"])
    (first, second) = asked
    assert (first.length, first.example.conversations[0].style) == (7, "long_caption")
    assert first.example.conversations[0].messages[0].options == ("a", "b")
    assert (second.length, second.example.conversations[0].style) == (None, "qa")


def test_parse_names_the_argument():
    with pytest.raises(ConfigError, match="'hello' is no option"):
        generate.parse(["hello"])


def test_drawing_keeps_the_size_of_large_pictures():
    picture = draw_points(np.zeros((400, 500, 3), dtype=np.uint8), [(100.0, 100.0), (0.0, 0.0)])
    assert picture.size == (500, 400)


def test_help_is_light():
    code = (
        "import sys; from pipelines import generate; generate.main(['--help'])\n"
        "heavy = {'numpy', 'PIL', 'torch', 'omegaconf'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m pipelines.generate" in done.stdout
