"""Two passes over layers that are FSDP2 units: two ranks, one of them without images, give one process's gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from molmo_model.preprocessing.collator import collate
from tests.nn.he_molmo import QUIET, build
from tests.preprocessing.examples import asked, example

WORLD = 2
SELECTORS = (
    {"tokens": 5, "low_res_layers": 2},
    {"tokens": 5, "query": True, "gradient_layers": [0, 3], "gradient_embedding": True},
)
"""A first pass without gradients over some layers, and one with gradients over all of them."""


def rank_batch(encode, rank: int) -> dict[str, torch.Tensor]:
    pictures = example([asked("what?", "it is 7"), asked("where?", "left")], ((90, 150),))
    text = replace(example([asked("no picture", "none at all")], ()), id="text")
    return collate([[encode.encode(text if rank else pictures)]], None, encode.config)


def train_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for number, selector in enumerate(SELECTORS):
        model, encode = build({**selector, **QUIET})
        model.train()
        for block in [*model.model.vision_backbone.encoder.blocks, *model.model.language_model.layers]:
            fully_shard(block, reshard_after_forward=True)
        fully_shard(model)
        losses = []
        for _ in range(2):  # the second step finds what the first one left
            model.zero_grad()
            output = model(**rank_batch(encode, rank))
            output.loss_sum.backward()
            losses.append(output.loss_sum.item())
        full = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        if rank == 0:
            torch.save({"grads": full, "losses": losses}, Path(folder) / f"result{number}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    """Worst difference of a gradient seen: 2.4e-7."""
    mp.spawn(train_rank, args=(str(tmp_path),), nprocs=WORLD)
    for number, selector in enumerate(SELECTORS):
        sharded = torch.load(tmp_path / f"result{number}.pt", weights_only=True)
        model, encode = build({**selector, **QUIET})
        model.train()
        losses = [model(**rank_batch(encode, rank)).loss_sum for rank in range(WORLD)]
        (sum(losses) / WORLD).backward()  # FSDP averages
        assert sharded["losses"] == pytest.approx([losses[0].item()] * 2, rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sharded["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
