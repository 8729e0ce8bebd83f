"""A model with each encoder trains, saves, loads, and is sharded over ranks without ever being whole in memory."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from molmo_model.config import Precision
from molmo_model.model_config import VisionPositions
from molmo_model.nn.build import build_model, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.vision_encoder import ENCODER_ALIASES, VISION_ENCODERS
from molmo_model.train.checkpoint import load_weights, weight_tensors
from molmo_model.train.parallelize import shard
from molmo_model.train.weights import read_shapes
from tests.nn.conftest import Conversation, crops_and_pooling, lay_out, pack, random_weights, tensors

WORLD = 2

CASES = [
    *((encoder, VisionPositions.native) for encoder in (*VISION_ENCODERS, *ENCODER_ALIASES)),
    *((encoder, VisionPositions.learned_2d) for encoder in ("siglip", "clip", "dinov2_small")),
    *((encoder, VisionPositions.rope_2d) for encoder in ("siglip", "clip", "dinov2_small", "dinov2_registers")),
]


@pytest.mark.parametrize(("encoder", "positions"), CASES)
def test_trains_saves_and_loads(encoder, positions, make_params, batch, tmp_path):
    """A step along the gradients lowers the loss, every parameter has one, and what is saved is what is loaded."""
    params = make_params(encoder=encoder, vision={"positions": positions, "intermediate_size": 64})
    model = build_model(params, 1).train()
    before = model(**batch)
    before.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert all("k_proj.bias" in name for name in still)  # the softmax does not see it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    assert model(**batch).loss < before.loss
    model.save_pretrained(tmp_path)
    assert set(read_shapes(tmp_path)) == set(weight_tensors(model))  # transformers would rename DINOv2's
    again = MolmoForConditionalGeneration.from_pretrained(tmp_path)
    expected, found = model.state_dict(), again.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert again.config.vision_encoder == ENCODER_ALIASES.get(encoder, encoder)


@pytest.mark.parametrize("encoder", ["clip", "dinov2_small", "dinov2_registers"])
def test_gradient_checkpointing_computes_the_same(encoder, make_params, batch):
    params = make_params(encoder=encoder, vision={"intermediate_size": 64})
    model = random_weights(build_model(params, 1)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def rank_batch(rank: int) -> dict[str, torch.Tensor]:
    """Rank 0 has an image of three tokens, rank 1 text alone."""
    rng = torch.Generator().manual_seed(rank)
    images = [3] if rank == 0 else []
    batch = tensors([pack([lay_out(Conversation(images, 2, [4, 3]), rng)], 24)])
    pixels, pooling = crops_and_pooling(images, rng)
    return {**batch, "pixel_values": pixels, "pooling": pooling}


def train_rank(rank: int, folder: str) -> None:
    """The way of `train.parallelize`: built on the meta device, sharded, filled from the files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(MolmoConfig.from_pretrained(Path(folder) / "model")).float()
    model.train()
    shard(model, Precision.fp32, init_device_mesh("cpu", (WORLD,)))
    model.to_empty(device="cpu")
    restore_buffers(model)
    load_weights(model, Path(folder) / "model")
    output = model(**rank_batch(rank))
    output.loss_sum.backward()
    full = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"grads": full, "loss_sum": output.loss_sum.detach()}, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_from_the_meta_device_equal_one_process(make_params, tmp_path):
    vision = {"positions": VisionPositions.rope_2d, "intermediate_size": 64}
    params = make_params(encoder="dinov2_registers", vision=vision)
    model = random_weights(build_model(params, 1)).train()
    model.save_pretrained(tmp_path / "model")
    mp.spawn(train_rank, args=(str(tmp_path),), nprocs=WORLD)
    sharded = torch.load(tmp_path / "result.pt", weights_only=True)
    losses = [model(**rank_batch(rank)).loss_sum for rank in range(WORLD)]
    sum(losses).backward()
    assert sharded["loss_sum"].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
