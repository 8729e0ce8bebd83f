"""What looks across frames: it does nothing at first, then exactly what its definition says, clip by clip."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from molmo_model.errors import ConfigError
from molmo_model.model_config import VideoConfig
from molmo_model.nn.build import build_config, build_model, component_of
from molmo_model.nn.frame_selection import FrameScorer
from molmo_model.nn.generation import generate
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.video import TemporalMixer, equal_windows
from tests.nn.conftest import IM_PATCH, PATCHES, VOCAB, random_weights

WIDTH = 64
"""Of a patch feature of the tiny models: two layers of 32."""
FRAMES = torch.tensor([0, 1, 2, -1, 0, 1, -1])
VIDEOS = torch.tensor([0, 0, 0, -1, 1, 1, -1])


def mixer(positions: bool = True, layers: int = 2) -> TemporalMixer:
    torch.manual_seed(0)
    made = TemporalMixer(WIDTH, 4, 8, positions, layers)
    for module in made.modules():
        if callable(first := getattr(module, "first_weights", None)):
            first()
    return made


def by_hand(made: TemporalMixer, clip: torch.Tensor) -> torch.Tensor:
    """One clip [C, N, F], patch by patch, through torch's own attention module."""
    x = clip.clone()
    if made.positions is not None:
        x = x + made.positions.weight[: len(clip), None]
    for layer in made.layers:
        attention = torch.nn.MultiheadAttention(WIDTH, layer.num_heads, batch_first=True)
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        attention.in_proj_weight.data = torch.cat([one.weight.data for one in projections])
        attention.in_proj_bias.data = torch.cat([one.bias.data for one in projections])
        attention.out_proj.load_state_dict(layer.o_proj.state_dict())
        for patch in range(clip.shape[1]):
            y = layer.norm(x[:, patch])[None]
            x[:, patch] = x[:, patch] + attention(y, y, y, need_weights=False)[0][0]
    return x


@pytest.mark.parametrize(("positions", "layers"), [(True, 0), (False, 2), (True, 2)])
def test_clips_of_a_batch_are_mixed_one_by_one(positions, layers):
    made = random_weights(mixer(positions, layers)).eval()
    features = torch.randn(7, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = made(features, FRAMES, VIDEOS)
        for clip in (0, 1):
            expected = by_hand(made, features[clip == VIDEOS])
            torch.testing.assert_close(found[clip == VIDEOS], expected, atol=1e-5, rtol=1e-5)  # worst seen 9.5e-7
            assert (expected - features[clip == VIDEOS]).abs().max() > 0.05
        assert torch.equal(found[VIDEOS < 0], features[VIDEOS < 0])  # still images pass
        alone = made(features[4:6], FRAMES[4:6], VIDEOS[4:6])
        torch.testing.assert_close(found[4:6], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(made(features, None, None), features)


def test_it_adds_nothing_at_first():
    features = torch.randn(7, 3, WIDTH)
    assert torch.equal(mixer()(features, FRAMES, VIDEOS), features)


@pytest.mark.parametrize("clip", [True, False])
def test_every_parameter_has_a_gradient_in_every_batch(clip):
    made = random_weights(mixer()).train()
    features = torch.randn(7, 3, WIDTH)
    found = made(features, FRAMES, VIDEOS) if clip else made(features, None, None)
    found.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0) == clip or name.endswith("k_proj.bias"), name


def film_params(make_params, **video):
    params = make_params(connector={"window_position_embedding": False})
    params.preprocessing.video = VideoConfig(**{"max_frames": 4, **video})
    return params


TEMPORAL = {"temporal_position_embedding": True, "temporal_attention_layers": 1}


@pytest.mark.parametrize("encoder", ["siglip", "clip"])
def test_a_model_with_time_begins_as_the_one_without(make_params, encoder, tmp_path):
    plain_params, params = (film_params(make_params, **video) for video in ({}, TEMPORAL))
    plain_params.vision.encoder = params.vision.encoder = encoder
    plain, timed = build_model(plain_params, 3), build_model(params, 3)
    extra = {name for name, _ in timed.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert extra and all(".temporal." in name and component_of(name) == "connector" for name in extra)
    timed.load_state_dict(plain.state_dict(), strict=False)
    batch = film_batch()
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, timed.eval()(**batch).logits)
    random_weights(timed).save_pretrained(tmp_path)
    again = MolmoForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, timed(**batch).logits)
        assert not torch.allclose(plain(**batch).logits, timed(**batch).logits)


def test_the_temporal_parts_build_on_the_meta_device(make_params):
    config = build_config(film_params(make_params, **TEMPORAL))
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config)
    assert any(".temporal.layers.0." in name for name, _ in model.named_parameters())


def film_batch(rows: int = 1, frames: int = 3) -> dict[str, torch.Tensor]:
    """Rows of one clip each: every frame is one window of nine patches and one of four, then text."""
    rng = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (rows * frames, 32, 32, 3), dtype=torch.uint8, generator=rng)
    windows = []
    for crop in range(rows * frames):
        windows.append(torch.arange(9) + crop * PATCHES)
        windows.append(torch.cat([torch.arange(4) + 9 + crop * PATCHES, torch.full((5,), -1)]))
    text = torch.randint(0, VOCAB - 1, (rows, 5), generator=rng)
    ids = torch.cat([torch.full((rows, 2 * frames), IM_PATCH), text], dim=1)
    images = torch.cat([torch.arange(1, frames + 1).repeat_interleave(2), torch.zeros(5, dtype=torch.long)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_ids": images.expand(rows, -1).contiguous(),
        "pixel_values": pixels,
        "pooling": torch.stack(windows),
        "crop_frames": torch.arange(frames).repeat(rows),
        "crop_videos": torch.arange(rows).repeat_interleave(frames),
    }


def test_holes_that_fill_up_small_windows_change_nothing(make_params):
    model = random_weights(build_model(film_params(make_params), 3)).eval()
    batch = film_batch()
    with torch.no_grad():
        wide = model.model.vision_backbone(batch["pixel_values"], batch["pooling"])
        narrow = model.model.vision_backbone(batch["pixel_values"], batch["pooling"][1::2, :4])
    torch.testing.assert_close(wide[1::2], narrow, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_encoding_in_parts_is_encoding_at_once(make_params, size):
    params = film_params(make_params, frames_per_batch=size, **TEMPORAL)
    model = random_weights(build_model(params, 3)).eval()
    whole = random_weights(build_model(film_params(make_params, **TEMPORAL), 3)).eval()
    batch, seen = film_batch(rows=2), []
    model.model.vision_backbone.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, atol=1e-5, rtol=1e-5)  # worst 4.8e-7
    assert max(seen) == min(size, 6) and sum(seen) == 6
    seen.clear()
    model.train()(**batch)
    assert seen == [6]  # in training memory is bounded by checkpointing, not by this


def test_clips_of_different_lengths_are_answered_as_one_by_one(make_params):
    model = random_weights(build_model(film_params(make_params, **TEMPORAL), 3)).eval()
    long, short = film_batch(frames=4), film_batch(frames=2)
    alone = [
        generate(model, one | {"image_token_counts": torch.tensor([2] * n)}, 6, [VOCAB - 1])[0]
        for one, n in ((long, 4), (short, 2))
    ]
    padding = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    batch = {
        name: torch.cat([long[name], F.pad(short[name], (padding, 0))])
        for name in ("input_ids", "attention_mask", "image_ids")
    }
    shifted = torch.where(short["pooling"] >= 0, short["pooling"] + 4 * PATCHES, -1)
    batch |= {
        "pixel_values": torch.cat([long["pixel_values"], short["pixel_values"]]),
        "pooling": torch.cat([long["pooling"], shifted]),
        "crop_frames": torch.cat([long["crop_frames"], short["crop_frames"]]),
        "crop_videos": torch.tensor([0, 0, 0, 0, 1, 1]),
        "image_token_counts": torch.tensor([2] * 6),
    }
    assert generate(model, batch, 6, [VOCAB - 1]) == alone


def test_a_training_step_reaches_the_temporal_parts_also_without_clips(make_params, batch):
    model = random_weights(build_model(film_params(make_params, **TEMPORAL), 3)).train()
    model(**batch).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("pooling", "masked", "positions", "reason"),
    [
        ("attention_meanq", True, False, ""),
        ("attention", True, False, ""),
        ("learned_queries", True, False, ""),
        ("mean", True, False, ""),
        ("mean", False, False, "connector.pooling mean with pooling_attention_mask: false"),
        ("attention_meanq", False, False, "connector.pooling attention_meanq with pooling_attention_mask: false"),
        ("stack", True, False, "connector.pooling stack"),
        ("none", True, False, "connector.pooling none"),
        ("c_abstractor", True, False, "connector.pooling c_abstractor"),
        ("attention_meanq", True, True, "connector.window_position_embedding"),
    ],
)
def test_what_needs_windows_of_one_size(pooling, masked, positions, reason):
    assert equal_windows(pooling, masked, positions) == reason


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    """A tiny SigLIP with random weights, saved as transformers does, and a tokenizer beside it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained("molmo_model/preprocessing/tokenizers/bytes512")
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 600, "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    folder = tmp_path_factory.mktemp("siglip")
    random_weights(SiglipModel(config), 1).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def frames(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_scores_are_the_cosines_of_transformers_own_model(siglip):
    shown, question = frames(5), "Where does the Dog run?"
    model, tokenizer = SiglipModel.from_pretrained(siglip).eval(), AutoTokenizer.from_pretrained(siglip)
    ids = tokenizer([question.lower()], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    pixels = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        output = model(input_ids=ids.input_ids, pixel_values=pixels)
    expected = (output.image_embeds @ output.text_embeds.T)[:, 0].numpy()
    np.testing.assert_allclose(FrameScorer(str(siglip))(shown, question), expected, atol=1e-6)  # worst seen 6e-8


def test_scores_depend_on_the_question_and_on_nothing_beside_the_frame(siglip):
    scorer, shown = FrameScorer(str(siglip)), frames(70, 48)
    questions = ["dog", "a red car", "what is it?", "x" * 500]
    scores = np.stack([scorer(shown, question) for question in questions])
    orders = {tuple(np.argsort(-row)[:8].tolist()) for row in scores}
    assert len(orders) == len(questions)
    for row, question in zip(scores, questions, strict=True):
        alone = np.concatenate([scorer(shown[i : i + 1], question) for i in (0, 33, 69)])
        np.testing.assert_allclose(row[[0, 33, 69]], alone, atol=1e-5)
    assert np.array_equal(scorer(shown, "dog"), scores[0])


def test_other_models_are_refused_by_name(make_params, tmp_path):
    with pytest.raises(ConfigError, match=r"select_frames_by_query: .*nowhere cannot be read"):
        FrameScorer(str(tmp_path / "nowhere"))
    build_config(make_params()).text_config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a qwen2"):
        FrameScorer(str(tmp_path))


def clip_rank(rank: int) -> dict[str, torch.Tensor]:
    """Rank 0 has a clip, rank 1 text alone."""
    if rank == 0:
        batch = film_batch()
        labels = torch.where(batch["image_ids"] > 0, -100, batch["input_ids"])
        return {**batch, "labels": labels}
    ids = torch.arange(7)[None] + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train_clip_rank(rank: int, params, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = random_weights(build_model(params, 1)).train()
    for block in [*model.model.vision_backbone.encoder.blocks, *model.model.language_model.layers]:
        fully_shard(block)
    fully_shard(model)
    model(**clip_rank(rank)).loss_sum.backward()
    full = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(full, f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_with_a_clip_and_one_without_stay_in_step(make_params, tmp_path):
    params = film_params(make_params, **TEMPORAL)
    mp.spawn(train_clip_rank, args=(params, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "grads.pt", weights_only=True)
    model = random_weights(build_model(params, 1)).train()
    (sum(model(**clip_rank(rank)).loss_sum for rank in range(2)) / 2).backward()  # FSDP averages
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert sharded["model.vision_backbone.temporal.layers.0.o_proj.weight"].abs().max() > 1e-4
