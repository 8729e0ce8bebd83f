"""Import of the 2024 layout, against a small forward written from the published description, on random weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.nn.convert_released import load_released, released_config
from molmo_model.nn.molmo import MolmoForConditionalGeneration

H, LAYERS, HEADS, V, EXTRA, VIT, SIDE = 32, 2, 4, 64, 8, 16, 4
VISION = {
    "image_default_input_size": [SIDE * 8, SIDE * 8],
    "image_patch_size": 8,
    "image_emb_dim": VIT,
    "image_num_heads": 2,
    "image_num_key_value_heads": 2,
    "image_num_layers": 4,
    "image_head_dim": VIT // 2,
    "image_mlp_dim": 24,
    "image_mlp_activations": "quick_gelu",
    "image_num_pos": SIDE**2 + 1,
    "image_norm_eps": 1e-5,
}
COMMON = {"model_type": "molmo", "layer_norm_type": "rms", "vision_backbone": VISION, "vit_layers": [-2, -3]}
NEWER = {
    **COMMON,
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "vocab_size": V - 6,
    "embedding_size": V,
    "additional_vocab_size": EXTRA,
    "layer_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # the configuration of Molmo-7B-D, Molmo-7B-O and MolmoE-1B, made small
    "7B-D": {**NEWER, "qkv_bias": True, "attention_layer_norm": False, "norm_after": False, "num_key_value_heads": 2,
             "rope_theta": 1000000.0},
    "7B-O": {**NEWER, "qkv_bias": False, "attention_layer_norm": True, "norm_after": True, "num_key_value_heads": None,
             "rope_theta": 500000.0},
    "E-1B": {**COMMON, "d_model": H, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": None, "mlp_hidden_size": None,
             "mlp_ratio": 1, "max_position_embeddings": 128, "max_sequence_length": 64, "vocab_size": V - 6,
             "embedding_size": V, "additional_vocab_size": EXTRA, "layer_norm_eps": 1e-5, "qkv_bias": False,
             "attention_layer_norm": True, "norm_after": False, "rope_theta": 10000.0, "rope_impl": "llama",
             "moe_num_experts": 6, "moe_top_k": 2, "weight_tying": False, "image_pooling_2d": "attention-meanq"},
}  # fmt: skip


def kv_heads(raw: dict[str, Any]) -> int:
    return raw.get("num_key_value_heads") or raw.get("n_kv_heads") or HEADS


def random_release(raw: dict[str, Any], fused_experts: bool = False) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return around + torch.randn(shape, generator=rng) * (0.3 if around else 0.25)

    moe, wide = "moe_num_experts" in raw, H + 2 * kv_heads(raw) * (H // HEADS)
    attn = "attn." if moe else ""  # the two files of modelling code nest differently
    out = {
        "model.transformer.wte.embedding": draw(V, H),
        "model.transformer.wte.new_embedding": draw(EXTRA, H),
        "model.transformer.ln_f.weight": draw(H, around=1),
        "lm_head.weight" if moe else "model.transformer.ff_out.weight": draw(V, H),
        "model.vision_backbone.pad_embed": draw(2, 2 * VIT),
    }
    for i in range(LAYERS):
        p = f"model.transformer.blocks.{i}."
        out[f"{p}{attn}att_proj.weight"] = draw(wide, H)
        if raw["qkv_bias"]:
            out[f"{p}{attn}att_proj.bias"] = draw(wide)
        if raw["attention_layer_norm"]:
            out[f"{p}{attn}q_norm.weight"] = draw(H, around=1)
            out[f"{p}{attn}k_norm.weight"] = draw(kv_heads(raw) * (H // HEADS), around=1)
        out[f"{p}{attn}attn_out.weight"] = draw(H, H)
        out[f"{p}{attn}attn_norm.weight"] = draw(H, around=1)
        out[f"{p}{'mlp.' if moe else ''}ff_norm.weight"] = draw(H, around=1)
        if moe:
            inner, count = H // 2, raw["moe_num_experts"]
            gates, ups, downs = draw(count, inner, H), draw(count, inner, H), draw(count, H, inner)
            out[f"{p}ffn.router.layer.weight" if fused_experts else f"{p}mlp.gate.weight"] = draw(count, H)
            if fused_experts:
                flat = {"w1": gates, "v1": ups, "w2": downs.transpose(1, 2)}
                out |= {f"{p}ffn.experts.mlp.{name}": x.reshape(count * inner, H) for name, x in flat.items()}
            for e in range(0 if fused_experts else count):
                out[f"{p}mlp.experts.{e}.gate_proj.weight"] = gates[e].clone()
                out[f"{p}mlp.experts.{e}.up_proj.weight"] = ups[e].clone()
                out[f"{p}mlp.experts.{e}.down_proj.weight"] = downs[e].clone()
        else:
            out[f"{p}ff_proj.weight"] = draw(96, H)
            out[f"{p}ff_out.weight"] = draw(H, 48)
    v = "model.vision_backbone.image_vit."
    out |= {
        f"{v}class_embedding": draw(VIT),
        f"{v}positional_embedding": draw(SIDE**2 + 1, VIT),
        f"{v}patch_embedding.weight": draw(VIT, 8 * 8 * 3) * 0.3,
        f"{v}pre_ln.weight": draw(VIT, around=1),
        f"{v}pre_ln.bias": draw(VIT),
    }
    for i in range(VISION["image_num_layers"]):
        p = f"{v}transformer.resblocks.{i}."
        for name in ("wq", "wk", "wv", "wo"):
            out |= {f"{p}attention.{name}.weight": draw(VIT, VIT), f"{p}attention.{name}.bias": draw(VIT)}
        out |= {f"{p}feed_forward.w1.weight": draw(24, VIT), f"{p}feed_forward.w1.bias": draw(24)}
        out |= {f"{p}feed_forward.w2.weight": draw(VIT, 24), f"{p}feed_forward.w2.bias": draw(VIT)}
        for name in ("attention_norm", "ffn_norm"):
            out |= {f"{p}{name}.weight": draw(VIT, around=1), f"{p}{name}.bias": draw(VIT)}
    for name, rows in (("wq", VIT), ("wk", VIT), ("wv", VIT)):
        out[f"model.vision_backbone.image_pooling_2d.{name}.weight"] = draw(rows, 2 * VIT)
        out[f"model.vision_backbone.image_pooling_2d.{name}.bias"] = draw(rows)
    out["model.vision_backbone.image_pooling_2d.wo.weight"] = draw(VIT, VIT)
    out["model.vision_backbone.image_pooling_2d.wo.bias"] = draw(VIT)
    hidden = 16 if moe else 48
    for name, shape in (("w1", (hidden, VIT)), ("w3", (hidden, VIT)), ("w2", (H, hidden))):
        out[f"model.vision_backbone.image_projector.{name}.weight"] = draw(*shape)
    return out


class Release:
    """The published computation, step by step, from the tensors by their published names."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.raw = raw
        self.t = {n.replace(".attn.", ".").replace("mlp.ff_", "ff_"): x for n, x in tensors.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.raw["layer_norm_eps"]) * self.t[f"{name}.weight"]

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], 1e-5)

    def attend(self, p: str, q_in: Tensor, kv_in: Tensor) -> Tensor:
        q, k, v = (self.linear(x, p + n).unflatten(-1, (2, -1)).transpose(-2, -3)
                   for n, x in (("wq", q_in), ("wk", kv_in), ("wv", kv_in)))  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear((weights @ v).transpose(-2, -3).flatten(-2), p + "wo")

    def image_tokens(self, pixels: Tensor, shares: Tensor) -> Tensor:
        """Normalised crops [C, H, W, 3] and shares of picture [C, patches] to 2 x 2 pooled tokens, crop by crop."""
        v = "model.vision_backbone.image_vit."
        patches = pixels.unflatten(2, (SIDE, 8)).unflatten(1, (SIDE, 8)).permute(0, 1, 3, 2, 4, 5)
        x = self.linear(patches.reshape(len(pixels), SIDE**2, -1), f"{v}patch_embedding")
        x = torch.cat([self.t[f"{v}class_embedding"].expand(len(x), 1, -1), x], 1) + self.t[f"{v}positional_embedding"]
        x, seen = self.layer_norm(x, f"{v}pre_ln"), []
        for i in range(4):
            p = f"{v}transformer.resblocks.{i}."
            y = self.layer_norm(x, p + "attention_norm")
            x = x + self.attend(p + "attention.", y, y)
            y = self.linear(self.layer_norm(x, p + "ffn_norm"), p + "feed_forward.w1")
            x = x + self.linear(y * torch.sigmoid(1.702 * y), p + "feed_forward.w2")
            seen.append(x)
        x = torch.cat([seen[-2], seen[-3]], -1)[:, 1:]
        pad = self.t["model.vision_backbone.pad_embed"]
        x = x + (shares == 0).float()[..., None] * pad[0] + ((shares < 1) & (shares > 0)).float()[..., None] * pad[1]
        x = x.reshape(len(x), SIDE // 2, 2, SIDE // 2, 2, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        x = self.attend("model.vision_backbone.image_pooling_2d.", x.mean(1, keepdim=True), x)[:, 0]
        p = "model.vision_backbone.image_projector."
        return self.linear(F.silu(self.linear(x, p + "w1")) * self.linear(x, p + "w3"), p + "w2")

    def logits(self, ids: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        t = self.t
        x = torch.cat([t["model.transformer.wte.embedding"], t["model.transformer.wte.new_embedding"]])[ids].clone()
        x[places] += tokens
        after = self.raw["norm_after"]
        for i in range(LAYERS):
            p = f"model.transformer.blocks.{i}."
            y = self.attention(x if after else self.rms(x, p + "attn_norm"), p)
            x = x + (self.rms(y, p + "attn_norm") if after else y)
            y = self.mlp(x if after else self.rms(x, p + "ff_norm"), p)
            x = x + (self.rms(y, p + "ff_norm") if after else y)
        head = "model.transformer.ff_out" if "model.transformer.ff_out.weight" in t else "lm_head"
        return self.linear(self.rms(x, "model.transformer.ln_f"), head)

    def attention(self, x: Tensor, p: str) -> Tensor:
        width = H // HEADS
        q, k, v = self.linear(x, p + "att_proj").split([H, kv_heads(self.raw) * width, kv_heads(self.raw) * width], -1)
        if self.raw["attention_layer_norm"]:
            q, k = self.rms(q, p + "q_norm"), self.rms(k, p + "k_norm")
        q, k, v = (y.unflatten(-1, (-1, width)).transpose(0, 1) for y in (q, k, v))
        angles = torch.arange(len(x))[:, None] * self.raw["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q, k = (y * cos + torch.cat([-y[..., width // 2 :], y[..., : width // 2]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(HEADS // len(y), 0) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)  # causal, on images too
        return self.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), p + "attn_out")

    def mlp(self, x: Tensor, p: str) -> Tensor:
        if "moe_num_experts" not in self.raw:
            first, second = self.linear(x, p + "ff_proj").chunk(2, -1)
            return self.linear(F.silu(second) * first, p + "ff_out")
        weights, chosen = self.linear(x, p + "mlp.gate").softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for row in range(len(x)):
            for weight, e in zip(weights[row], chosen[row].tolist(), strict=True):
                q = f"{p}mlp.experts.{e}."
                inner = F.silu(self.linear(x[row], q + "gate_proj")) * self.linear(x[row], q + "up_proj")
                out[row] += weight * self.linear(inner, q + "down_proj")
        return out


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):  # several files, as released
        save_file({n: tensors[n].contiguous() for n in chosen}, folder / f"model-{part:05d}-of-00002.safetensors")
    return folder


def compare(model: MolmoForConditionalGeneration, release: Release, first_id: int) -> float:
    """Largest difference of logits on a row with two crops; `first_id` is the release's id of the image's start."""
    rng = torch.Generator().manual_seed(9)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=rng)
    shares = torch.where(torch.arange(16) < 4, 0.0, torch.where(torch.arange(16) < 8, 0.4, 1.0)).repeat(2, 1)
    grid = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    pooling = torch.cat([grid, grid + 16])
    text = torch.randint(0, V - 6, (7,), generator=rng).tolist()
    special = [0, 2, 2, 3, 2, 2, 3, 1, 0, 2, 2, 3, 2, 2, 3, 1]  # start, two rows with column tokens, end; twice
    ours = torch.tensor([5, *[V + s for s in special], *text])
    theirs = torch.tensor([5, *[first_id + s for s in special], *text])
    mean, std = (torch.tensor(x) for x in (model.config.image_mean, model.config.image_std))
    with torch.no_grad():
        tokens = release.image_tokens((pixels.float() / 255 - mean) / std, shares)
        expected = release.logits(theirs, theirs == first_id + 2, tokens)
        image_ids = (ours >= V).long()[None]
        found = model(
            input_ids=ours[None], pixel_values=pixels, pooling=pooling, patch_masks=shares, image_ids=image_ids
        )
    assert expected.abs().max() > 1
    return float((found.logits[0] - expected).abs().max())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_are_those_of_the_published_description(name: str, tmp_path: Path) -> None:
    raw, tensors = CONFIGS[name], random_release(CONFIGS[name])
    model = load_released(write(tmp_path / "release", raw, tensors))
    assert compare(model, Release(raw, tensors), V) < 5e-5  # measured: 1.6e-5, 3.6e-6, 8.4e-6, of logits up to 5.4
    model.save_pretrained(tmp_path / "ours")
    again = MolmoForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert compare(again, Release(raw, tensors), V) < 5e-5


def test_image_tokens_among_the_base_rows_are_moved(tmp_path: Path) -> None:
    """The tokenizers of Molmo-7B-O and MolmoE-1B end before the embedding does; image tokens stand in between."""
    raw, tensors = CONFIGS["7B-O"], random_release(CONFIGS["7B-O"])
    folder, first = write(tmp_path, raw, tensors), V - 6
    assert compare(load_released(folder, token_ids=range(first, first + 5)), Release(raw, tensors), first) < 5e-5
    assert compare(load_released(folder), Release(raw, tensors), first) > 0.01


def test_experts_in_one_matrix_are_read_too(tmp_path: Path) -> None:
    raw = CONFIGS["E-1B"]
    one, many = random_release(raw, fused_experts=True), random_release(raw)
    a, b = load_released(write(tmp_path / "a", raw, one)), load_released(write(tmp_path / "b", raw, many))
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_published_configurations_give_the_families() -> None:
    """The fields as they stand in the released files of Molmo-7B-D and MolmoE-1B."""
    d = {"model_type": "molmo", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "intermediate_size": 37888, "vocab_size": 152064, "embedding_size": 152064,
         "qkv_bias": True, "attention_layer_norm": False, "norm_after": False, "layer_norm_type": "rms",
         "layer_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 1000000.0, "clip_qkv": None,
         "tie_word_embeddings": False, "weight_tying": False}  # fmt: skip
    config = released_config(d)
    assert (config.text_config.model_type, config.text_config.intermediate_size) == ("qwen2", 18944)
    assert (config.vision_feature_layers, config.vision_config.num_hidden_layers) == ([21, 14], 22)
    assert (config.image_token_id, config.projector_hidden_size, config.pooling_num_heads) == (152066, 18944, 16)
    assert not config.bidirectional_images
    e = {"model_type": "molmo", "d_model": 2048, "n_layers": 16, "n_heads": 16, "n_kv_heads": None, "mlp_ratio": 1,
         "mlp_hidden_size": None, "moe_num_experts": 64, "moe_top_k": 8, "attention_layer_norm": True,
         "qkv_bias": False, "norm_after": False, "vocab_size": 50280, "embedding_size": 50304,
         "max_position_embeddings": 32768,
         "layer_norm_type": "rms", "rope_theta": 10000.0, "layer_norm_eps": 1e-5}  # fmt: skip
    config = released_config(e)
    assert (config.text_config.model_type, config.text_config.intermediate_size) == ("olmoe", 1024)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "molmo2"}, "model_type is 'molmo2'"),
        ({"rope_impl": "interleave"}, "rope_impl is 'interleave'"),
        ({"norm_after": True}, "no language model that transformers has"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        released_config({**CONFIGS["7B-D"], **change})


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    raw, tensors = CONFIGS["7B-D"], random_release(CONFIGS["7B-D"])
    odd = {**tensors, "model.transformer.blocks.0.surprise.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="surprise"):
        load_released(write(tmp_path / "odd", raw, odd))
    lacking = {name: x for name, x in tensors.items() if "blocks.1.ff_out" not in name}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        load_released(write(tmp_path / "lacking", raw, lacking))
