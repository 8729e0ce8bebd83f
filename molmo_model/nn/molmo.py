"""Molmo as a transformers model: configuration, body and head, composed of the rooms' parts and any language model.

    pixels -> VisionBackbone -> image tokens, ADDED to the embeddings of <im_patch> -> language model -> head

Importing this module registers the classes, after which transformers' `AutoConfig`, `AutoModel` and
`AutoModelForImageTextToText` load a checkpoint folder by themselves.

Shape suffixes: B rows, S tokens of a row, C crops, T pooling windows of the batch (each becomes
`num_queries` image tokens), V base vocabulary, E text width.
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
from molmo_model.model_config import GPU_CHUNK
from molmo_model.nn.attention import IMPLEMENTATION, LayerMasks, masks_for
from molmo_model.nn.dropout import PROBABILITY, add_residual_dropout, drop_probabilities
from molmo_model.nn.experts import experts_per_token, load_balancing_loss, router_z_loss
from molmo_model.nn.he_molmo import insert, reading_of, select, selector_inputs
from molmo_model.nn.loss import answered_loss
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.token_selector import TokenSelector, selector_config
from molmo_model.nn.vision_backbone import VisionBackbone


@dataclass
class MolmoOutput(ModelOutput):
    """What the model returns.

    Args:
        loss: `loss_sum / weight_sum`, or 0 where nothing is answered.
        loss_sum: sum over answered tokens of weight times (cross-entropy + z-loss), and `weight_sum` times the mean
            losses of experts; to be divided by the weight of the whole batch, over all micro-batches and ranks.
        weight_sum: sum of the weights of answered tokens.
        cross_entropy_sum: `loss_sum` without z-loss and losses of experts, detached, for logs.
        logits: [answered tokens, V] with labels, else [B, S, V]; None where the loss was computed in chunks.
        load_balancing_loss, router_z_loss: of a mixture of experts, before their factors, detached, for logs.
        selection_loss: the token selector's part of `loss_sum`, detached, for logs.
        importance: [M, K] of the tokens that a token selector kept of every image, 1 where there is none, detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    loss_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    cross_entropy_sum: Tensor | None = None
    last_hidden_state: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    selection_loss: Tensor | None = None
    importance: Tensor | None = None


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
        """First weights. A module of ours with `first_weights()` knows its own, through `transformers.initialization`,
        which leaves loaded parameters alone; encoder and language model have their own rules. transformers calls this
        only for modules that own a parameter or a buffer themselves: a `first_weights()` elsewhere would never run."""
        if callable(first_weights := getattr(module, "first_weights", None)):
            first_weights()
        elif isinstance(module, nn.Embedding | nn.Linear):  # the extra embedding and the head
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', under the names that the modules have. Its default would write the parts under names of the
        libraries that they came from (DINOv2's attention, OLMoE's experts), which sharded loading does not know."""
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class MolmoModel(MolmoPreTrainedModel):
    """The body: embeddings, image tokens and language model, without a head."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_backbone = VisionBackbone(config)
        self.language_model = AutoModel.from_config(text)
        add_residual_dropout(self.language_model, config.residual_dropout, config.response_residual_dropout)
        self.extra_embedding = nn.Embedding(config.extra_vocab_size, text.hidden_size)
        self.token_selector: TokenSelector | None = None
        if config.selector is not None:
            selector = selector_config(config.selector)
            layers, (height, width) = selector.low_res_layers or text.num_hidden_layers, config.pooling_size
            self.token_selector = TokenSelector(selector, text.hidden_size, layers, height * width)
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
        self,
        pixel_values: Tensor,
        pooling: Tensor,
        image_token_counts: Tensor | None = None,
        patch_masks: Tensor | None = None,
        crop_frames: Tensor | None = None,
        crop_videos: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Image tokens, where transformers' `generate` looks for them.

        Args:
            pixel_values: uint8 [C, H, W, 3].
            pooling: [T, window] indices into the patches of all crops, -1 for a hole.
            image_token_counts: tokens of each image of the batch; None gives one tensor for all.
            patch_masks, crop_frames, crop_videos: [C, ...], see `VisionBackbone.forward`.
        """
        tokens = self.vision_backbone(pixel_values, pooling, patch_masks, crop_frames, crop_videos)
        if image_token_counts is None:
            return BaseModelOutputWithPooling(pooler_output=tokens)
        return BaseModelOutputWithPooling(pooler_output=torch.split(tokens, image_token_counts.tolist()))

    def add_image_tokens(self, embeddings: Tensor, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """Adds the n-th image token to the n-th <im_patch> of the batch, rows first; without a host sync on a GPU.

        Raises:
            DataError: on a CPU, where it is free to look: there are more or fewer places than image tokens.
        """
        places = torch.eq(input_ids, self.config.image_token_id)
        dummy = self.config.num_queries  # the tokens of the one window of a batch without images
        if (
            places.device.type == "cpu"
            and (count := int(places.sum())) != len(tokens)
            and (count or len(tokens) != dummy)
        ):
            raise DataError(f"{count} <im_patch> tokens but {len(tokens)} image tokens; the batch is inconsistent")
        slot = places.flatten().cumsum(0).view_as(places) * places  # 0 where no image token belongs
        return insert(embeddings, tokens, slot)

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
        patch_masks: Tensor | None = None,
        crop_frames: Tensor | None = None,
        crop_videos: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the body.

        Args:
            input_ids: [B, S].
            pixel_values, pooling, patch_masks, crop_frames, crop_videos: see `VisionBackbone.forward`; a training batch
                without images still runs the encoder on one empty crop, so that sharded ranks stay in step.
            attention_mask: [B, S] 1 for tokens, 0 for padding; or masks as `masks_for` makes them.
            position_ids, example_ids, segment_ids, image_ids: [B, S], see `attention.allowed`.
            mm_token_type_ids: transformers' name of `image_ids` in `generate`.
            mm_encoder_outputs: image tokens that `generate` has encoded already.
            kwargs: goes to the language model, except `selector_*`, which a HeMolmo needs with crops.

        Raises:
            DataError: `input_ids` are missing, or a HeMolmo has images without `selector_*`.
        """
        self._check_attention()
        if input_ids is None:
            raise DataError("the model finds the places of image tokens by their ids; give input_ids")
        embeddings = self.embed(input_ids)
        image_ids = self.attended_images(mm_token_type_ids if image_ids is None else image_ids)
        tokens = self._image_tokens(pixel_values, pooling, patch_masks, (crop_frames, crop_videos), mm_encoder_outputs)
        where, selection = selector_inputs(kwargs), None
        if self.token_selector is not None and not where and not mm_encoder_outputs:
            self._check_no_images(pooling)
        if tokens is not None and where:
            reading = reading_of(input_ids, attention_mask, position_ids, example_ids, segment_ids, image_ids)
            selection = select(self, embeddings, tokens, reading, where)
            embeddings = insert(embeddings, tokens, selection.rows)
            position_ids, kwargs["value_gate"] = selection.position_ids, selection.value_gate
        elif tokens is not None:
            embeddings = self.add_image_tokens(embeddings, input_ids, tokens)
        if self.config.embedding_dropout:
            embeddings = F.dropout(embeddings, self.config.embedding_dropout, self.training)
        use_cache = bool(use_cache) and example_ids is None
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
        output = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if selection is not None:
            output.choice = selection.choice
        return output

    def attended_images(self, image_ids: Tensor | None) -> Tensor | None:
        """The images [B, S] whose tokens see each other in both directions; None where all see what is before them."""
        if image_ids is None or not self.config.bidirectional_images:
            return None
        return image_ids.clamp(max=1) if self.config.one_image_block else image_ids

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
        self,
        pixel_values: Tensor | None,
        pooling: Tensor | None,
        patch_masks: Tensor | None,
        crops: tuple[Tensor | None, Tensor | None],
        encoded: dict[str, Any] | None,
    ) -> Tensor | None:
        if encoded and encoded.get("image") is not None:
            tokens = encoded["image"].pooler_output
            if isinstance(tokens, Tensor):
                return tokens
            return torch.cat(tuple(tokens)) if tokens else None  # None: prompts without a picture
        if pixel_values is None and not self.training:
            return None
        size, device = self.config.vision_config.image_size, self.extra_embedding.weight.device
        if pixel_values is None or len(pixel_values) == 0:
            pixel_values, patch_masks = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device), None
            crops = (None, None)
        if pooling is None or len(pooling) == 0:
            pooling = torch.zeros(1, self.config.pooling_columns, dtype=torch.long, device=device)
            if patch_masks is None and self.config.padding_embedding != "none":
                patches = (size // self.config.vision_config.patch_size) ** 2
                patch_masks = torch.ones(len(pixel_values), patches, device=device)
        return self.vision_backbone(pixel_values, pooling, patch_masks, *crops)

    @staticmethod
    def _check_no_images(pooling: Tensor | None) -> None:
        """All candidates would be added to the places of those selected; a GPU does not count them."""
        if pooling is not None and len(pooling):  # text has one empty crop and no window
            raise DataError(
                f"{len(pooling)} image tokens but no selector_* arrays; a model with a token selector needs batches of "
                f"a preprocessor with selector_tokens, and answers by `python -m pipelines.generate`"
            )

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
        answered: Tensor | None = None,
        loss_chunk: int | None = None,
        image_token_counts: Tensor | None = None,
        patch_masks: Tensor | None = None,
        crop_frames: Tensor | None = None,
        crop_videos: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        value_gate: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MolmoOutput:
        """Logits, or with labels the loss of the answered tokens alone.

        Args:
            labels: [B, S] the token that each position must predict (already shifted), -100 for none.
            loss_weights: [B, S]; None weighs every answered token 1.
            z_loss: factor of the squared log-partition.
            answered: flat places of the answered tokens, which spares a GPU from waiting for them; see `answered_loss`.
            loss_chunk: answered tokens whose logits exist at a time; None is all of them, in training on a GPU
                `GPU_CHUNK`.
            value_gate: [B, S] multiplies values of the prompt; from `he_molmo.generation_inputs`.
            logits_to_keep: without labels, logits of the last N positions; 0 is all.
            Others: see `MolmoModel.forward`.
        """
        if value_gate is not None:
            kwargs["value_gate"] = value_gate
        if labels is not None:
            kwargs |= self._kwargs_of_training(labels)
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
            patch_masks=patch_masks,
            crop_frames=crop_frames,
            crop_videos=crop_videos,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = body.last_hidden_state
        output = MolmoOutput(past_key_values=body.past_key_values, last_hidden_state=hidden)
        if labels is None:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            return output
        if loss_chunk is None and hidden.is_cuda and self.training:
            loss_chunk = GPU_CHUNK
        sums = answered_loss(self.lm_head, hidden, labels, loss_weights, z_loss, answered, loss_chunk)
        output.logits, output.cross_entropy_sum = sums.logits, sums.cross_entropy_sum
        output.loss_sum, output.weight_sum = sums.loss_sum, sums.weight_sum
        if (router_logits := getattr(body, "router_logits", None)) is not None:
            mean = self._expert_losses(output, router_logits, _present(labels, attention_mask, example_ids))
            output.loss_sum = sums.loss_sum + mean * sums.weight_sum
        if (choice := getattr(body, "choice", None)) is not None:
            shares = kwargs["selector_shares"]
            output.loss_sum = output.loss_sum + (choice.penalty * shares).sum()
            output.selection_loss = (choice.penalty.detach() * shares).sum()
            output.importance = choice.importance.detach()
        output.loss = output.loss_sum / output.weight_sum.clamp(min=torch.finfo(torch.float32).tiny)
        return output

    def _kwargs_of_training(self, labels: Tensor) -> dict[str, Any]:
        """What the language model is told besides its inputs where a loss is wanted."""
        config, kwargs = self.config, dict[str, Any]()
        if self.training:
            dropped = drop_probabilities(labels, config.residual_dropout, config.response_residual_dropout)
            kwargs |= {} if dropped is None else {PROBABILITY: dropped}
        if experts_per_token(config.text_config) is not None:
            kwargs["output_router_logits"] = True
        return kwargs

    def _expert_losses(self, output: MolmoOutput, router_logits: Any, present: Tensor) -> Tensor:
        """The losses of a mixture of experts with their factors, a mean over this micro-batch; notes both."""
        config = self.config
        balance = load_balancing_loss(router_logits, config.text_config.num_experts_per_tok, present)
        square = router_z_loss(router_logits, present)
        output.load_balancing_loss, output.router_z_loss = balance.detach(), square.detach()
        return config.load_balancing_weight * balance + config.router_z_weight * square

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
        if blocks is not None and config.one_image_block:
            blocks = blocks.clamp(max=0)
        return create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, block_sequence_ids=blocks
        )


def _present(labels: Tensor, attention_mask: Any, example_ids: Tensor | None) -> Tensor:
    """[B, S] 1 on tokens, 0 on padding, as far as it is known."""
    if example_ids is not None:
        return example_ids >= 0
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask
    return torch.ones_like(labels)


def _prepared(attention_mask: Any) -> bool:
    if isinstance(attention_mask, dict | BlockMask):
        return True
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 4


AutoModel.register(MolmoConfig, MolmoModel)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration)
