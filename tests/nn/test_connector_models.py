"""Whole models with every pooling, projector and padding embedding: built from params, trained, saved, reloaded,
sharded from the meta device; what contradicts itself is refused; and images encoded without tiling."""

import pytest
import torch

from molmo_model.errors import ConfigError, DataError
from molmo_model.model_config import CropMode, PaddingEmbedding, Pooling, Projector, ScaleFusion
from molmo_model.nn.build import build_config, build_model, component_of, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.vision_backbone import grid_windows
from tests.nn.conftest import PATCHES, Conversation, crops_and_pooling, lay_out, pack, random_weights, tensors

QUERIES = 4


def params_of(make_params, pooling="attention_meanq", hierarchical=False, **connector):
    queries = QUERIES if pooling in ("learned_queries", "c_abstractor") else 1
    settings = {"pooling": Pooling(pooling), "num_queries": queries, **connector}
    if pooling == "none":
        settings["pooling_size"] = [1, 1]
    params = make_params(connector=settings)
    if hierarchical:
        params.preprocessing.crop_mode = CropMode.hierarchical
    return params


def batch_for(config, windows=(3, 2), text_only=False):
    """One pack with images of so many windows, or none, as the model wants them."""
    rng = torch.Generator().manual_seed(5)
    windows = [] if text_only else list(windows)
    images = [count * config.num_queries for count in windows]
    batch = tensors([pack([lay_out(Conversation(images, 2, [4, 3]), rng)], 60)])
    pixels, pooling = crops_and_pooling(windows, rng)
    columns = config.pooling_size[0] * config.pooling_size[1]
    pooling = pooling[:, :columns]
    if config.hierarchical:
        pooling = torch.cat([pooling, pooling[:, :1] // PATCHES * PATCHES + 3], dim=1)
    batch |= {"pixel_values": pixels, "pooling": pooling}
    if config.padding_embedding != "none":
        batch["patch_masks"] = torch.tensor([0.0, 0.5, 1.0, 1.0]).repeat(len(pixels) * PATCHES // 4).view(-1, PATCHES)
    return batch


def check_trains_and_reloads(params, folder):
    """One step changes every parameter; the saved model computes the same; so does one filled from the meta device."""
    model = build_model(params, seed=1).train()
    batch = batch_for(model.config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = model(**batch).loss
    first.backward()
    torch.optim.SGD(model.parameters(), lr=0.002).step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # keys' biases shift all scores of a softmax alike
        assert not torch.equal(parameter, before[name]) or name.endswith("k_proj.bias"), f"{name} does not move"
    assert model(**batch).loss < first
    model.eval()
    expected = model(**batch).logits
    model.save_pretrained(folder)
    assert torch.equal(MolmoForConditionalGeneration.from_pretrained(folder).eval()(**batch).logits, expected)
    with torch.device("meta"):
        shell = MolmoForConditionalGeneration(model.config).float()
    shell.to_empty(device="cpu")
    restore_buffers(shell)
    shell.load_state_dict(model.state_dict())
    assert torch.equal(shell.eval()(**batch).logits, expected)
    return model


@pytest.mark.parametrize("projector", list(Projector))
@pytest.mark.parametrize("pooling", list(Pooling))
def test_every_pooling_and_projector_trains_and_reloads(pooling, projector, make_params, tmp_path):
    model = check_trains_and_reloads(params_of(make_params, pooling.value, projector=projector), tmp_path)
    connector = [name for name, _ in model.named_parameters() if ".connector." in name]
    assert connector and {component_of(name) for name in connector} == {"connector"}


@pytest.mark.parametrize("pooling", ["none", "attention_meanq", "c_abstractor"])
@pytest.mark.parametrize("fusion", list(ScaleFusion))
def test_hierarchical_models_train_and_reload(pooling, fusion, make_params, tmp_path):
    params = params_of(make_params, pooling, hierarchical=True, scale_fusion=fusion)
    assert check_trains_and_reloads(params, tmp_path).config.hierarchical


@pytest.mark.parametrize("kind", [kind for kind in PaddingEmbedding if kind.value != "none"])
def test_padding_embeddings_train_and_reload(kind, make_params, tmp_path):
    params = params_of(make_params, padding_embedding=kind, feature_dropout=0.0)
    model = check_trains_and_reloads(params, tmp_path)
    batch = batch_for(model.config)
    del batch["patch_masks"]
    with pytest.raises(DataError, match="needs patch_masks"):
        model(**batch)


def test_first_weights_keep_the_scale(make_params):
    """They reach the model: transformers passes over modules that hold no tensor of their own."""
    wide = {"hidden_size": 128, "intermediate_size": 64}
    for pooling, fusion in (("c_abstractor", "sum"), ("learned_queries", "concat")):
        params = params_of(make_params, pooling, True, scale_fusion=ScaleFusion(fusion), projector=Projector.linear)
        for name, value in wide.items():
            setattr(params.vision, name, value)
        connector = build_model(params, seed=1).model.vision_backbone.connector
        fused = connector.fusion.coarse_proj if fusion == "sum" else connector.fusion.merge_proj
        assert fused.weight.std().item() == pytest.approx(fused.in_features**-0.5, rel=0.05)
        bound = (6 / (128 + 32)) ** 0.5  # Xavier's
        assert 0.95 * bound < connector.projector.weight.abs().max() <= bound
        if pooling == "c_abstractor":
            block = connector.pooling.before[0]
            assert block.expand.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
            assert not block.gate.bias.any()
        else:
            assert connector.pooling.queries.std().item() == pytest.approx(1, rel=0.15)
            assert connector.pooling.k_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize("pooling", ["none", "learned_queries", "c_abstractor", "stack"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_batch_without_images_reaches_every_parameter(pooling, bare, make_params):
    """Text alone runs one empty crop, from the collator or of the model's own, so that sharded ranks stay in step."""
    params = params_of(
        make_params,
        pooling,
        hierarchical=True,
        padding_embedding=PaddingEmbedding.pad_and_partial_pad,
        feature_dropout=0.1,
    )
    model = build_model(params, seed=1).train()
    batch = batch_for(model.config, text_only=True)
    batch["pooling"] = torch.zeros(0, model.config.pooling_columns, dtype=torch.long)
    for name in ("pixel_values", "pooling", "patch_masks") if bare else ("patch_masks",):
        del batch[name]
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("pooling", "settings", "message"),
    [
        ("none", {"pooling_size": [2, 2]}, r"pooling none keeps every patch, but pooling_size is \[2, 2\]"),
        ("mean", {"num_queries": 4}, "num_queries is 4, but pooling mean makes 1 token"),
        ("attention_meanq", {"num_heads": 5}, "5 does not divide the encoder's width 32"),
        ("learned_queries", {"num_heads": 5}, "5 does not divide the encoder's width 32"),
        ("c_abstractor", {"num_queries": 6}, "num_queries is 6; c_abstractor needs a square number"),
        ("c_abstractor", {"num_queries": 9}, r"num_queries 9 is 3 rows of tokens from a window of \[2, 2\] patches"),
        ("mean", {"pooling_size": [0, 2]}, r"pooling_size is \[0, 2\]; write height and width"),
        ("mean", {"pooling_size": [2]}, r"pooling_size is \[2\]; write height and width"),
    ],
)
def test_contradictions_are_refused(pooling, settings, message, make_params):
    with pytest.raises(ConfigError, match=message):
        build_config(make_params(connector={"pooling": Pooling(pooling), **settings}))


def test_settings_that_a_pooling_does_not_use_are_no_contradiction(make_params):
    assert build_config(make_params(connector={"pooling": Pooling.mean, "num_heads": 5})).pooling_num_heads == 5


def test_a_window_as_large_as_a_crop(make_params):
    params = params_of(make_params, "learned_queries", pooling_size=[0, 0], num_queries=7)
    config = build_config(params)
    assert config.pooling_size == [4, 4] and config.pooling_columns == PATCHES
    model = build_model(params, seed=1)
    tokens = model.model.get_image_features(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(32).view(2, 16))
    assert tokens.pooler_output.shape == (14, 32)


def test_rows_and_columns_of_a_window_are_told_apart(make_params):
    """1-D pooling: [1, 4] and [4, 1] hold as many patches, and grids that are not square are laid out by rows."""
    for size in ([1, 4], [4, 1]):
        config = build_config(params_of(make_params, "mean", pooling_size=size))
        windows = grid_windows(4, tuple(config.pooling_size), False)
        expected = torch.arange(16).view(4, 4) if size == [1, 4] else torch.arange(16).view(4, 4).T
        assert torch.equal(windows, expected)


def test_layers_are_concatenated_in_the_listed_order(make_params):
    """The first half of a feature is the first layer that is listed, also if that is a later block."""
    params = make_params(vision={"feature_layers": [-1, -3]})
    backbone = random_weights(build_model(params, seed=1)).model.vision_backbone.eval()
    outputs = {}
    for number, block in enumerate(backbone.encoder.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: outputs.__setitem__(number, output))
    features = backbone.encoder(backbone.normalize(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)))
    assert torch.equal(features, torch.cat([outputs[3], outputs[1]], dim=-1))


class TestEncodeImages:
    @staticmethod
    def images(count=3):
        rng = torch.Generator().manual_seed(2)
        return torch.randint(0, 256, (2, count, 32, 32, 3), dtype=torch.uint8, generator=rng)

    @pytest.mark.parametrize("hierarchical", [False, True])
    @pytest.mark.parametrize("size", [[2, 2], [3, 3], [0, 0], [1, 4]])
    @pytest.mark.parametrize("pooling", ["attention_meanq", "learned_queries"])
    @torch.no_grad()
    def test_equals_each_image_by_itself(self, pooling, size, hierarchical, make_params):
        params = params_of(make_params, pooling, hierarchical, pooling_size=size)
        backbone = random_weights(build_model(params, seed=1)).model.vision_backbone.eval()
        windows = windows_by_hand(backbone.window, hierarchical)
        images = self.images()
        features, shown = backbone.encode_images(images)
        queries = QUERIES if pooling == "learned_queries" else 1
        assert (
            features.shape == (2, 3, len(windows) * queries, 32)
            and shown.all()
            and shown.shape == (*features.shape[:3],)
        )
        for row in range(2):
            for number in range(3):
                alone = backbone(images[row, number][None], windows)
                torch.testing.assert_close(features[row, number], alone, atol=1e-5, rtol=1e-4)
        floats = backbone.normalize(images.flatten(0, 1)).unflatten(0, (2, 3))
        assert torch.equal(backbone.encode_images(floats)[0], features)

    @torch.no_grad()
    def test_masks(self, make_params):
        params = params_of(make_params, padding_embedding=PaddingEmbedding.pad_embed)
        backbone = random_weights(build_model(params, seed=1)).model.vision_backbone.eval()
        images = self.images()
        per_image = torch.tensor([[1, 0, 1], [1, 1, 0]])
        features, shown = backbone.encode_images(images, per_image)
        assert torch.equal(shown, per_image.bool()[..., None].expand(2, 3, 4))
        per_patch = torch.ones(2, 3, 4, 4)
        per_patch[0, 0, 2:] = 0  # the lower half of the first image
        per_patch[0, 0, 2, 3] = 0.5
        features, shown = backbone.encode_images(images, per_patch.flatten(2))
        assert shown[0, 0].tolist() == [True, True, False, True] and shown.sum() == 23
        expected = backbone(images[0, 0][None], windows_by_hand((2, 2), False), per_patch[0, 0].view(1, 16))
        torch.testing.assert_close(features[0, 0], expected, atol=1e-5, rtol=1e-4)

    def test_other_sizes_are_refused(self, make_params):
        backbone = build_model(make_params(), seed=1).model.vision_backbone
        for images in (torch.zeros(2, 3, 3, 16, 32), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)):
            with pytest.raises(DataError, match=r"give \[B, I, 3, 32, 32\] floats"):
                backbone.encode_images(images)
        with pytest.raises(DataError, match=r"image_masks are \[2, 3, 4\]; give \[2, 3\] or \[2, 3, 16\]"):
            backbone.encode_images(self.images(), torch.ones(2, 3, 4))


def windows_by_hand(window, hierarchical):
    """Windows over 4 x 4 patches, in loops."""
    height, width = window
    tops = range(-((-4 % height) // 2), 4, height)
    lefts = range(-((-4 % width) // 2), 4, width)
    rows = []
    for top in tops:
        for left in lefts:
            places = [(y, x) for y in range(top, top + height) for x in range(left, left + width)]
            row = [y * 4 + x if 0 <= y < 4 and 0 <= x < 4 else -1 for y, x in places]
            if hierarchical:
                ys, xs = zip(*[place for place, index in zip(places, row, strict=True) if index >= 0], strict=True)
                row.append((min(ys) + max(ys) + 1) // 2 * 4 + (min(xs) + max(xs) + 1) // 2)
            rows.append(row)
    return torch.tensor(rows)
