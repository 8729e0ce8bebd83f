"""The benchmark of a training step at toy sizes on a CPU: it runs, and the FLOPs that it counts are those computed."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_train_step import FULL, TINY, main, molmo, sequence, useful_flops
from molmo_model.nn.build import build_config, build_model


def test_useful_flops_are_what_a_counter_sees():
    """torch counts every product of a forward pass; the benchmark leaves out the masked half of attention, the patch
    embedding and the pooling's few products, and nothing else: 0.1 % here."""
    torch.set_num_threads(1)
    params = molmo(tiny=True)
    config = build_config(params)
    part = sequence(config, TINY, torch.Generator().manual_seed(0))
    model = build_model(params, 1).eval()
    products = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with torch.no_grad(), products, FlopCounterMode(display=False) as counter:
        model(
            input_ids=part["ids"][None],
            labels=part["labels"][None],
            image_ids=part["images"][None],
            pixel_values=part["pixels"],
            pooling=part["pooling"],
        )
    vision, text = config.vision_config, config.text_config
    patches = TINY.crops * (vision.image_size // vision.patch_size) ** 2
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    masked = text.num_hidden_layers * 2 * text.hidden_size * TINY.tokens**2
    expected = useful_flops(config, TINY) / 3 + embedding + masked
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_full_size():
    """The figure that published step times of these shapes were divided by: 37 TFLOP a sequence."""
    assert useful_flops(build_config(molmo(tiny=False)), FULL) / 1e12 == pytest.approx(37.0, abs=0.1)


@pytest.mark.slow
def test_it_ends_with_one_json_object(capsys):
    torch.set_num_threads(1)
    assert main(["--device", "cpu", "--tiny", "--no-compile", "--warmup", "1", "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["name"] == "gpu_train_step" and result["ours"] > 0 and result["peer"] > 0
    first, last = result["details"]["ours"]["losses"]
    assert last < first < 7 and result["block_against_dense"]["attention"]["forward"] < 1e-5
