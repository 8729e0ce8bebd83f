"""One decode step of one sequence in six Triton kernels per layer: what batch 1 on a GPU is worth.

At one row every matrix is read once for one vector, so a step takes as long as its weights take to arrive, plus what
stands between two reads. Compiled layers leave gaps there (14 kernels a layer, attention over the whole static cache);
these kernels read each matrix in one pass with the norm in front of it and the residual behind it inside, and the
cache only as far as it is filled:

    norm + matrix of q, k, v | rotation, cache write and attention over parts of the cache | parts together |
    output matrix + residual | norm + gate and up + SiLU | down matrix + residual

For language models that are built as Qwen2, Qwen3 and Llama are (`unsupported` says what stands in the way), weights in
bf16. Sums are in fp32, and values are rounded to bf16 where transformers' layers round them, but for the rotation and
the attention's weights. `nn.slots` computes the same with the model's own layers: that is the path of every other
machine, and what these kernels are compared with.

Needs Triton, which comes with torch's GPU builds: import this module only on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

SPLIT = 64
"""Cached positions that one program attends to."""
WIDEST = 4096
"""Widest hidden state: a program holds a whole row of it."""
TILE = 16384
"""Weights that a program holds at a time, over all its rows."""
LINE = 1024
"""Columns of a matrix that a program reads at a time, where rows are longer than a hidden state."""
FAMILIES = ("qwen2", "qwen3", "llama")


def unsupported(language_model: nn.Module, head: nn.Linear) -> str | None:
    """Why these kernels cannot compute a language model's step, or None if they can."""
    config: Any = language_model.config
    if config.model_type not in FAMILIES:
        return f"layers of {config.model_type} are built in another way"
    layer: Any = language_model.layers[0]  # type: ignore[index]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    fits = {
        "weights are not in bf16": all(one.dtype == torch.bfloat16 for one in (head.weight, *layer.parameters())),
        f"heads are {width} wide": not width & (width - 1) and 16 <= width <= 256,
        f"{group} heads share one key": group <= 16,
        f"the hidden state is {config.hidden_size} wide": config.hidden_size <= WIDEST,
        "a layer sees a window only": set(getattr(config, "layer_types", None) or ()) <= {"full_attention"},
        f"the activation is {config.hidden_act}": config.hidden_act == "silu",
        "output and MLP matrices have biases": attention.o_proj.bias is None and layer.mlp.gate_proj.bias is None,
    }
    return next((reason for reason, good in fits.items() if not good), None)


class OneSlotStep:
    """The layers and the head for one token, over a static cache of one sequence.

    The q, k, v matrices of a layer, and gate and up, are laid into one tensor each; the model's own parameters become
    views of them, so nothing is held twice and the prefill goes on as before.
    """

    def __init__(
        self, language_model: nn.Module, head: nn.Linear, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Takes the model and its cache.

        Args:
            keys, values: per layer bf16 [1, key heads, context, width], contiguous; context is a multiple of `SPLIT`.

        Raises:
            ValueError: the model or the cache does not fit (`unsupported`).
        """
        if reason := unsupported(language_model, head):
            raise ValueError(f"no kernels for this model: {reason}")
        config: Any = language_model.config
        self.layers = [_Layer(layer) for layer in language_model.layers]  # type: ignore[union-attr]
        self.keys, self.values = list(keys), list(values)
        _, self.key_heads, self.context, self.width = keys[0].shape
        if self.context % SPLIT or not all(one.is_contiguous() for one in (*keys, *values)):
            raise ValueError(f"a cache of {self.context} positions; it must be contiguous, a multiple of {SPLIT} long")
        self.hidden, self.inner, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.eps, self.padded = config.rms_norm_eps, triton.next_power_of_2(config.hidden_size)
        self.rows = max(1, TILE // self.padded)
        self.norm, self.head = language_model.norm.weight, head  # type: ignore[union-attr]
        self.parts = self.context // SPLIT
        new = head.weight.new_empty
        self.qkv = new((self.heads + 2 * self.key_heads) * self.width)
        self.attended, self.gated = new(self.heads * self.width), new(self.inner)
        self.states = [new(self.hidden), new(self.hidden)]
        self.logits = new(head.out_features, dtype=torch.float32)
        self.best, self.total = (new(self.heads * self.parts, dtype=torch.float32) for _ in range(2))
        self.partial = new(self.heads * self.parts, self.width, dtype=torch.float32)

    def __call__(self, embedding: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Logits fp32 [1, V] of the next token; writes the keys and values of this one. Launches only: may be captured.

        Args:
            embedding: bf16 [1, 1, E] of the token.
            position: int64 [1], its place in the cache.
            cos, sin: [1, 1, width] of its rotation.
        """
        state, other = self.states
        state.copy_(embedding.view(-1))
        cos, sin = cos.reshape(-1).float(), sin.reshape(-1).float()
        wide = (self.heads + 2 * self.key_heads) * self.width
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            _norm_matvec[(triton.cdiv(wide, self.rows),)](
                state, layer.first_norm, layer.qkv, layer.bias, self.qkv, wide, self.hidden, self.padded, self.rows,
                self.eps, layer.has_bias, num_warps=8,
            )  # fmt: skip
            _attend[(self.key_heads, self.parts)](
                self.qkv, cos, sin, layer.query_norm, layer.key_norm, position, keys, values, self.best, self.total,
                self.partial, layer.scaling, self.eps, self.context, self.heads, self.key_heads, self.width,
                self.heads // self.key_heads, 16, SPLIT, self.parts, layer.has_head_norms, num_warps=4,
            )  # fmt: skip
            _together[(self.heads,)](
                self.best, self.total, self.partial, self.attended, self.width, self.parts,
                triton.next_power_of_2(self.parts), num_warps=4,
            )  # fmt: skip
            _matvec_residual[(triton.cdiv(self.hidden, 2),)](
                self.attended, layer.output, state, other, self.hidden, self.heads * self.width, LINE, 2, num_warps=4
            )
            _gate_up[(triton.cdiv(self.inner, self.rows),)](
                other, layer.second_norm, layer.gate_up, self.gated, self.inner, self.hidden, self.padded, self.rows,
                self.eps, num_warps=8,
            )  # fmt: skip
            _matvec_residual[(triton.cdiv(self.hidden, 2),)](
                self.gated, layer.down, other, state, self.hidden, self.inner, LINE, 2, num_warps=8
            )
        vocabulary = self.head.out_features
        _norm_matvec[(triton.cdiv(vocabulary, 2 * self.rows),)](
            state, self.norm, self.head.weight, self.head.weight, self.logits, vocabulary, self.hidden, self.padded,
            2 * self.rows, self.eps, False, num_warps=8,
        )  # fmt: skip
        return self.logits[None]


class _Layer:
    """A decoder layer's tensors as the kernels read them."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], "weight")
        self.has_bias = attention.q_proj.bias is not None
        self.bias = (
            _joined([attention.q_proj, attention.k_proj, attention.v_proj], "bias") if self.has_bias else self.qkv
        )
        self.gate_up = _joined([mlp.gate_proj, mlp.up_proj], "weight")
        self.output, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.first_norm, self.second_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.has_head_norms = hasattr(attention, "q_norm")
        self.query_norm = attention.q_norm.weight if self.has_head_norms else self.first_norm
        self.key_norm = attention.k_norm.weight if self.has_head_norms else self.first_norm
        self.scaling = float(attention.scaling)


def _joined(modules: Sequence[nn.Module], name: str) -> Tensor:
    """One tensor of the modules' parameters, one below the other, which become views of it."""
    parts: list[Tensor] = [getattr(module, name).data for module in modules]
    base = parts[0]
    if all(part.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for part in parts):
        rows = sum(len(part) for part in parts)  # joined before
        return base.as_strided((rows, *base.shape[1:]), base.stride(), base.storage_offset())
    joined = torch.cat(parts)
    for module, part in zip(modules, joined.split([len(part) for part in parts]), strict=True):
        getattr(module, name).data = part
    return joined


@triton.jit
def _norm_matvec(
    x, norm, matrix, bias, y, rows,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE_ROWS: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[rows] = matrix [rows, WIDTH] @ rmsnorm(x) (+ bias)."""
    n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    k = tl.arange(0, PADDED)
    inside = k < WIDTH
    weights = tl.load(
        matrix + n[:, None].to(tl.int64) * WIDTH + k[None, :], mask=(n[:, None] < rows) & inside[None, :], other=0.0
    ).to(tl.float32)
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / WIDTH + EPS)
    value = value.to(tl.bfloat16).to(tl.float32) * tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    value = value.to(tl.bfloat16).to(tl.float32)
    total = tl.sum(weights * value[None, :], 1)
    if BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < rows)


@triton.jit
def _gate_up(
    x, norm, matrix, y, inner,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE_ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """y[inner] = silu(gate @ rmsnorm(x)) * (up @ rmsnorm(x)), gate and up one below the other in `matrix`."""
    n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    k = tl.arange(0, PADDED)
    inside = k < WIDTH
    there = (n[:, None] < inner) & inside[None, :]
    gate = tl.load(matrix + n[:, None].to(tl.int64) * WIDTH + k[None, :], mask=there, other=0.0).to(tl.float32)
    up = tl.load(matrix + (n[:, None] + inner).to(tl.int64) * WIDTH + k[None, :], mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / WIDTH + EPS)
    value = value.to(tl.bfloat16).to(tl.float32) * tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    value = value.to(tl.bfloat16).to(tl.float32)
    gated = tl.sum(gate * value[None, :], 1).to(tl.bfloat16).to(tl.float32)
    raised = tl.sum(up * value[None, :], 1).to(tl.bfloat16).to(tl.float32)
    gated = (gated * tl.sigmoid(gated)).to(tl.bfloat16).to(tl.float32)
    tl.store(y + n, (gated * raised).to(tl.bfloat16), mask=n < inner)


@triton.jit
def _matvec_residual(
    x, matrix, residual, y, rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """y[rows] = residual + matrix [rows, WIDTH] @ x."""
    n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    total = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        inside = k < WIDTH
        there = (n[:, None] < rows) & inside[None, :]
        weights = tl.load(matrix + n[:, None].to(tl.int64) * WIDTH + k[None, :], mask=there, other=0.0).to(tl.float32)
        total += weights * tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    product = tl.sum(total, 1).to(tl.bfloat16).to(tl.float32)
    before = tl.load(residual + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + n, (product + before).to(tl.bfloat16), mask=n < rows)


@triton.jit
def _attend(
    qkv, cosines, sines, query_norm, key_norm, position, keys, values,
    best, total, partial, scaling,
    EPS: tl.constexpr, CONTEXT: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Attention of the heads of one key head over one part of the cache: per head the largest score, the sum of the
    weights and the weighted values. The program of the part that `position` lies in writes the new key and value."""
    head, part = tl.program_id(0), tl.program_id(1)
    place = tl.load(position).to(tl.int32)
    d = tl.arange(0, WIDTH)
    other = (d + WIDTH // 2) % WIDTH
    cos, sin = tl.load(cosines + d), tl.load(sines + d)
    sign = tl.where(d < WIDTH // 2, -1.0, 1.0)
    group = tl.arange(0, GROUP_PADDED)
    row = (head * GROUP + group) * WIDTH
    known = group[:, None] < GROUP
    query = tl.load(qkv + row[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
    turned = tl.load(qkv + row[:, None] + other[None, :], mask=known, other=0.0).to(tl.float32)
    new_key = tl.load(qkv + (HEADS + head) * WIDTH + d).to(tl.float32)
    new_turned = tl.load(qkv + (HEADS + head) * WIDTH + other).to(tl.float32)
    new_value = tl.load(qkv + (HEADS + KEY_HEADS + head) * WIDTH + d)
    if NORMS:
        by_row = tl.rsqrt(tl.sum(query * query, 1) / WIDTH + EPS)[:, None]
        by_key = tl.rsqrt(tl.sum(new_key * new_key) / WIDTH + EPS)
        query_weight, turned_weight = tl.load(query_norm + d), tl.load(query_norm + other)
        query = (query * by_row).to(tl.bfloat16).to(tl.float32) * query_weight.to(tl.float32)[None, :]
        turned = (turned * by_row).to(tl.bfloat16).to(tl.float32) * turned_weight.to(tl.float32)[None, :]
        new_key = (new_key * by_key).to(tl.bfloat16).to(tl.float32) * tl.load(key_norm + d).to(tl.float32)
        new_turned = (new_turned * by_key).to(tl.bfloat16).to(tl.float32) * tl.load(key_norm + other).to(tl.float32)
    query = (query * cos[None, :] + sign[None, :] * turned * sin[None, :]).to(tl.bfloat16)
    new_key = (new_key * cos + sign * new_turned * sin).to(tl.bfloat16)
    start = part * PART
    if start <= place:
        i = start + tl.arange(0, PART)
        cache = head * CONTEXT * WIDTH + i[:, None] * WIDTH + d[None, :]
        key = tl.load(keys + cache, mask=i[:, None] < place, other=0.0)
        value = tl.load(values + cache, mask=i[:, None] < place, other=0.0)
        key = tl.where((i == place)[:, None], new_key[None, :], key)
        value = tl.where((i == place)[:, None], new_value[None, :], value)
        if place < start + PART:
            tl.store(keys + head * CONTEXT * WIDTH + place * WIDTH + d, new_key)
            tl.store(values + head * CONTEXT * WIDTH + place * WIDTH + d, new_value)
        scores = tl.where((i <= place)[None, :], tl.dot(query, tl.trans(key)) * scaling, float("-inf"))
        largest = tl.max(scores, 1)
        weights = tl.exp(scores - largest[:, None])
        summed = tl.sum(weights, 1)
        found = tl.dot(weights.to(tl.bfloat16), value)
    else:
        largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        summed = tl.zeros([GROUP_PADDED], tl.float32)
        found = tl.zeros([GROUP_PADDED, WIDTH], tl.float32)
    out = (head * GROUP + group) * PARTS + part
    tl.store(best + out, largest, mask=group < GROUP)
    tl.store(total + out, summed, mask=group < GROUP)
    tl.store(partial + out[:, None] * WIDTH + d[None, :], found, mask=known)


@triton.jit
def _together(best, total, partial, y, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """The parts of one head in one: y[head] = sum of parts / sum of weights, on the scale of the largest score."""
    head, d, part = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, PADDED)
    there = part < PARTS
    largest = tl.load(best + head * PARTS + part, mask=there, other=float("-inf"))
    summed = tl.load(total + head * PARTS + part, mask=there, other=0.0)
    scale = tl.where(there, tl.exp(largest - tl.max(largest, 0)), 0.0)
    found = tl.load(partial + (head * PARTS + part)[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
    tl.store(y + head * WIDTH + d, (tl.sum(found * scale[:, None], 0) / tl.sum(summed * scale)).to(tl.bfloat16))
