"""Molmo as a transformers model: configuration, body and head, composed of the rooms' parts and any language model.

    pixels -> VisionBackbone -> image tokens, ADDED to the embeddings of <im_patch> -> language model -> head

Importing this module registers the classes, after which transformers' `AutoConfig`, `AutoModel` and
`AutoModelForImageTextToText` load a checkpoint folder by themselves.

Shape suffixes: B rows, S tokens of a row, C crops, T image tokens of the batch, V base vocabulary, E text width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput

from molmo_model.errors import ConfigError, DataError
from molmo_model.nn.attention import IMPLEMENTATION, LayerMasks, masks_for
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.vision_backbone import VisionBackbone


@dataclass
class MolmoOutput(ModelOutput):
    """What the model returns.

    Args:
        loss: `loss_sum / weight_sum`, or 0 where nothing is answered.
        loss_sum: sum over answered tokens of weight times (cross-entropy + z-loss); to be divided by the weight of
            the whole batch, over all micro-batches and ranks.
        weight_sum: sum of the weights of answered tokens.
        cross_entropy_sum: `loss_sum` without z-loss, detached, for logs.
        logits: [answered tokens, V] with labels, else [B, S, V].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    loss_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    cross_entropy_sum: Tensor | None = None
    last_hidden_state: Tensor | None = None


class MolmoPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the classes below."""

    config: MolmoConfig
    config_class = MolmoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ("past_key_values",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights. A module of ours with `first_weights()` knows its own, through `transformers.initialization`,
        which leaves loaded parameters alone; encoder and language model have their own rules."""
        if callable(first_weights := getattr(module, "first_weights", None)):
            first_weights()
        elif isinstance(module, nn.Embedding | nn.Linear):  # the extra embedding and the head
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))


class MolmoModel(MolmoPreTrainedModel):
    """The body: embeddings, image tokens and language model, without a head."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_backbone = VisionBackbone(config)
        self.language_model = AutoModel.from_config(text)
        self.extra_embedding = nn.Embedding(config.extra_vocab_size, text.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, S, E]; ids from the vocabulary size on are rows of the extra embedding."""
        first_extra = self.config.text_config.vocab_size
        base = self.get_input_embeddings()(input_ids.clamp(max=first_extra - 1))
        extra = self.extra_embedding((input_ids - first_extra).clamp(min=0))
        return torch.where((input_ids >= first_extra)[..., None], extra, base)

    def get_image_features(
        self, pixel_values: Tensor, pooling: Tensor, image_token_counts: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Image tokens, where transformers' `generate` looks for them.

        Args:
            pixel_values: uint8 [C, H, W, 3].
            pooling: [T, window] indices into the patches of all crops, -1 for a hole.
            image_token_counts: tokens of each image of the batch; None gives one tensor for all.
        """
        tokens = self.vision_backbone(pixel_values, pooling)
        if image_token_counts is None:
            return BaseModelOutputWithPooling(pooler_output=tokens)
        return BaseModelOutputWithPooling(pooler_output=torch.split(tokens, image_token_counts.tolist()))

    def add_image_tokens(self, embeddings: Tensor, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """Adds the n-th image token to the n-th <im_patch> of the batch, rows first; without a host sync on a GPU.

        Raises:
            DataError: on a CPU, where it is free to look: there are more or fewer places than image tokens.
        """
        places = torch.eq(input_ids, self.config.image_token_id)
        if places.device.type == "cpu" and (count := int(places.sum())) != len(tokens) and (count or len(tokens) > 1):
            raise DataError(f"{count} <im_patch> tokens but {len(tokens)} image tokens; the batch is inconsistent")
        slot = places.flatten().cumsum(0).view_as(places) * places  # 0 where no image token belongs
        table = torch.cat([tokens.new_zeros(1, tokens.shape[-1]), tokens])
        return embeddings + F.embedding(slot, table).to(embeddings.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pooling: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        example_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_token_counts: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the body.

        Args:
            input_ids: [B, S].
            pixel_values, pooling: see `VisionBackbone.forward`; a training batch without images still runs the encoder
                on one empty crop, so that sharded ranks stay in step.
            attention_mask: [B, S] 1 for tokens, 0 for padding; or masks as `masks_for` makes them.
            position_ids, example_ids, segment_ids, image_ids: [B, S], see `attention.allowed`.
            mm_token_type_ids: transformers' name of `image_ids` in `generate`.
            mm_encoder_outputs: image tokens that `generate` has encoded already.
        """
        self._check_attention()
        if input_ids is None:
            raise DataError("the model finds the places of image tokens by their ids; give input_ids")
        embeddings = self.embed(input_ids)
        if (tokens := self._image_tokens(pixel_values, pooling, mm_encoder_outputs)) is not None:
            embeddings = self.add_image_tokens(embeddings, input_ids, tokens)
        use_cache = bool(use_cache) and example_ids is None
        image_ids = mm_token_type_ids if image_ids is None else image_ids
        if not self.config.bidirectional_images:
            image_ids = None
        if not _prepared(attention_mask):
            if past_key_values is None and not use_cache:
                position_ids, attention_mask = self._plain_masks(
                    embeddings, attention_mask, position_ids, example_ids, segment_ids, image_ids
                )
            elif image_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
                attention_mask = create_masks_for_generate(
                    self.config,
                    embeddings,
                    attention_mask,
                    past_key_values,
                    position_ids,
                    block_sequence_ids=image_ids - 1,
                )
        return self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _plain_masks(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        example_ids: Tensor | None,
        segment_ids: Tensor | None,
        image_ids: Tensor | None,
    ) -> tuple[Tensor, LayerMasks]:
        """Positions and masks without a cache, from the attention rule. Never None: transformers would guess a mask."""
        rows, length = embeddings.shape[:2]
        if example_ids is None:
            present = embeddings.new_ones(rows, length, dtype=torch.long) if attention_mask is None else attention_mask
            example_ids = present.long() - 1  # padding is -1
            if position_ids is None:
                position_ids = (present.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is None:
            raise DataError("a packed batch (example_ids) needs position_ids; they restart with every example")
        masks = masks_for(
            self.config.text_config,
            example_ids=example_ids,
            segment_ids=segment_ids,
            image_ids=image_ids,
            position_ids=position_ids,
        )
        return position_ids, masks

    def _image_tokens(
        self, pixel_values: Tensor | None, pooling: Tensor | None, encoded: dict[str, Any] | None
    ) -> Tensor | None:
        if encoded and encoded.get("image") is not None:
            tokens = encoded["image"].pooler_output
            return tokens if isinstance(tokens, Tensor) else torch.cat(tuple(tokens))
        if pixel_values is None and not self.training:
            return None
        size, device = self.config.vision_config.image_size, self.extra_embedding.weight.device
        if pixel_values is None or len(pixel_values) == 0:
            pixel_values = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)
        if pooling is None or len(pooling) == 0:
            height, width = self.config.pooling_size
            pooling = torch.zeros(1, height * width, dtype=torch.long, device=device)
        return self.vision_backbone(pixel_values, pooling)

    def _check_attention(self) -> None:
        found = self.language_model.config._attn_implementation
        if found != IMPLEMENTATION:
            raise ConfigError(
                f"the language model attends with {found!r}, which drops Molmo's rules silently; "
                f'load with attn_implementation={{"text_config": "{IMPLEMENTATION}"}}, or without that argument'
            )


class MolmoForConditionalGeneration(MolmoPreTrainedModel, GenerationMixin):
    """Molmo with its head over the base vocabulary: the extra ids can be read but never said."""

    _tied_weights_keys = {  # noqa: RUF012 - read by transformers from the class
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    accepts_loss_kwargs = False

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = MolmoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pooling: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        example_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        z_loss: float = 0.0,
        image_token_counts: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MolmoOutput:
        """Logits, or with labels the loss of the answered tokens alone.

        Args:
            labels: [B, S] the token that each position must predict (already shifted), -100 for none.
            loss_weights: [B, S]; None weighs every answered token 1.
            z_loss: factor of the squared log-partition.
            logits_to_keep: without labels, logits of the last N positions; 0 is all.
            Others: see `MolmoModel.forward`.
        """
        body = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pooling=pooling,
            attention_mask=attention_mask,
            position_ids=position_ids,
            example_ids=example_ids,
            segment_ids=segment_ids,
            image_ids=image_ids,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            image_token_counts=image_token_counts,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = body.last_hidden_state
        output = MolmoOutput(past_key_values=body.past_key_values, last_hidden_state=hidden)
        if labels is None:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            return output
        return self._loss(output, hidden, labels, loss_weights, z_loss)

    def _loss(
        self, output: MolmoOutput, hidden: Tensor, labels: Tensor, loss_weights: Tensor | None, z_loss: float
    ) -> MolmoOutput:
        answered = (labels.flatten() >= 0).nonzero().squeeze(1)
        targets = labels.flatten()[answered]
        logits = self.lm_head(hidden.flatten(0, 1)[answered]).float()
        weights = logits.new_ones(len(targets)) if loss_weights is None else loss_weights.flatten()[answered].float()
        cross_entropy = F.cross_entropy(logits, targets, reduction="none")
        output.logits = logits
        output.cross_entropy_sum = (weights * cross_entropy.detach()).sum()
        per_token = cross_entropy + z_loss * logits.logsumexp(-1).square() if z_loss else cross_entropy
        output.loss_sum = (weights * per_token).sum()
        output.weight_sum = weights.sum()
        output.loss = output.loss_sum / output.weight_sum.clamp(min=torch.finfo(torch.float32).tiny)
        return output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Image ids matter where the image tokens are computed: in the prefill, or always without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        inputs["mm_token_type_ids"] = kwargs.get("mm_token_type_ids") if is_first_iteration or not use_cache else None
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: MolmoConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> LayerMasks:
        """Masks over a cache of fixed size, with images bidirectional in the prefill."""
        prefill = mm_token_type_ids is not None and inputs_embeds.shape[1] != 1 and config.bidirectional_images
        blocks = mm_token_type_ids - 1 if prefill and mm_token_type_ids is not None else None
        return create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, block_sequence_ids=blocks
        )


def _prepared(attention_mask: Any) -> bool:
    if isinstance(attention_mask, dict | BlockMask):
        return True
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 4


AutoModel.register(MolmoConfig, MolmoModel)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration)
