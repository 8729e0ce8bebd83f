"""Every module that knows its first weights is really asked: transformers passes over those that own no tensor."""

import pytest

from molmo_model.model_config import CropMode, Pooling, Projector, ScaleFusion, SelectorConfig, VisionPositions
from molmo_model.nn.build import build_model
from molmo_model.nn.molmo import MolmoPreTrainedModel


@pytest.fixture
def asked(monkeypatch):
    """The ids of all modules whose first weights were asked for."""
    seen, original = set(), MolmoPreTrainedModel._init_weights

    def spy(self, module):
        seen.add(id(module))
        return original(self, module)

    monkeypatch.setattr(MolmoPreTrainedModel, "_init_weights", spy)
    return seen


def check(model, asked):
    knowing = {name: module for name, module in model.named_modules() if hasattr(module, "first_weights")}
    assert [name for name, module in knowing.items() if id(module) not in asked] == []
    return {type(module).__name__ for module in knowing.values()}


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("pooling", list(Pooling))
def test_of_every_pooling(pooling, hierarchical, make_params, asked):
    params = make_params(connector={"pooling": pooling, "pooling_size": [1, 1] if pooling == "none" else [2, 2]})
    if hierarchical:
        params.preprocessing.crop_mode = CropMode.hierarchical
        params.connector.scale_fusion = ScaleFusion.concat if pooling == "none" else ScaleFusion.sum
    found = check(build_model(params, seed=1), asked)
    assert "PixelNormalize" in found and ("FanInLinear" in found) is (hierarchical or pooling == "c_abstractor")


@pytest.mark.parametrize(
    ("projector", "positions", "padding"),
    [("linear", "native", "pad_embed"), ("mlp", "rope_2d", "regress"), ("mlpx", "learned_2d", "pad_and_partial_pad")],
)
def test_of_projectors_positions_video_and_selector(projector, positions, padding, make_params, asked):
    params = make_params(vision={"positions": VisionPositions(positions)})
    params.connector.projector = Projector(projector)
    params.preprocessing.video.temporal_position_embedding = True
    params.preprocessing.video.temporal_attention_layers = 1
    params.selector = SelectorConfig(tokens=4, query=True, hidden_size=8)
    model = build_model(params, seed=1)
    found = check(model, asked)
    assert {"TemporalPositions", "InLinear", "OutLinear", "SmallLinear", "FanInLinear"} <= found
    assert ("LinearProjector" in found) is (projector == "linear")
    scorer = model.model.token_selector.scorer
    for linear in (scorer.query, scorer.scorer.down, scorer.prior.down):
        assert not linear.bias.any()
    assert scorer.query.weight.std().item() == pytest.approx(0.1 * scorer.query.in_features**-0.5, rel=0.1)
