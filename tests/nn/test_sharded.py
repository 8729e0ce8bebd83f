"""The model does not know that it is sharded: FSDP2 per block on two ranks gives the gradients of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from molmo_model.model_config import ConnectorConfig, ModelConfig, PaddingEmbedding, Pooling
from molmo_model.nn.build import build_model
from tests.nn.conftest import PATCHES, Conversation, crops_and_pooling, lay_out, pack, random_weights, tensors

WORLD = 2


def rank_batch(rank: int, connector: ConnectorConfig) -> dict[str, torch.Tensor]:
    """Rank 0 has images, rank 1 has text alone and one dummy crop."""
    rng = torch.Generator().manual_seed(rank)
    if rank == 0:
        batch = tensors([pack([lay_out(Conversation([3 * connector.num_queries], 2, [4, 3]), rng)], 24)])
        pixels, pooling = crops_and_pooling([3], rng)
    else:
        batch = tensors([pack([lay_out(Conversation([], 3, [5]), rng)], 24)])
        pixels, pooling = crops_and_pooling([], rng)
    if connector.padding_embedding is not PaddingEmbedding.none:
        batch["patch_masks"] = torch.ones(1, PATCHES)
    return {**batch, "pixel_values": pixels, "pooling": pooling}


def train_rank(rank: int, params: ModelConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    model = random_weights(build_model(params, 1)).train()
    for block in [*model.model.vision_backbone.encoder.blocks, *model.model.language_model.layers]:
        fully_shard(block)
    fully_shard(model)
    output = model(**rank_batch(rank, params.connector))
    output.loss_sum.backward()
    full = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"grads": full, "loss_sum": output.loss_sum.detach()}, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "connector"),
    [
        ("siglip", {}),
        ("clip", {}),
        (
            "clip",
            {
                "pooling": Pooling.c_abstractor,
                "num_queries": 4,
                "padding_embedding": PaddingEmbedding.pad_and_partial_pad,
            },
        ),
    ],
)
def test_two_ranks_equal_one_process(encoder, connector, make_params, tmp_path):
    params = make_params(encoder=encoder, connector=connector)
    mp.spawn(train_rank, args=(params, str(tmp_path)), nprocs=WORLD)
    sharded = torch.load(tmp_path / "result.pt", weights_only=True)
    model = random_weights(build_model(params, 1)).train()
    losses = [model(**rank_batch(rank, params.connector)).loss_sum for rank in range(WORLD)]
    (sum(losses) / WORLD).backward()  # FSDP averages
    assert sharded["loss_sum"].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
