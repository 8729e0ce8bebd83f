"""Blocks that are compiled one by one: the same numbers and names, one graph per kind of block, also below FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from molmo_model.config import Precision
from molmo_model.nn.build import build_model
from molmo_model.train.parallelize import compile_blocks, shard
from tests.nn.conftest import batch, make_params, random_weights, tokenizer_dir  # noqa: F401 - fixtures
from tests.nn.families import FAMILIES


class Graphs:
    """A backend that runs what it is given and counts the graphs."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def step(model, batch):  # noqa: F811
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss_sum.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return output.loss_sum.item(), {name: grad.clone() for name, grad in full.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "olmo3", "olmoe"])
def test_compiled_sharded_blocks_equal_plain_ones(family, checkpointing, make_params, batch, alone, monkeypatch):  # noqa: F811
    """Two graphs, of a vision and a text block (a third where sliding layers differ); experts break theirs up."""
    monkeypatch.setattr("molmo_model.train.parallelize.SMALL_BLOCK", 0)
    model = random_weights(build_model(make_params(family=family, language=FAMILIES[family]), 1)).train()
    names = set(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, grads = step(model, batch)
    shard(model, Precision.fp32, alone)
    graphs = Graphs()
    compile_blocks(model, backend=graphs)
    counts = []
    for _ in range(2):
        compiled_loss, compiled_grads = step(model, batch)
        counts.append(graphs.count)
        assert compiled_loss == pytest.approx(loss, rel=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(compiled_grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)
    assert counts[0] == counts[1] and (counts[0] <= 3 or family == "olmoe")
    assert set(model.state_dict()) == names
