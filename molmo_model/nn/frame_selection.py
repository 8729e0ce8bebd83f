"""Which frames of a clip go with a question: a frozen SigLIP or SigLIP 2 compares them (VideoOlmo's query selection).

A frame's score is the cosine of the question's embedding (at most 64 tokens) with the frame's pooled one. The
preprocessor takes a `FrameScorer` as a plain callable and gives the best frames the finer pooling. Every example is
scored by itself, so a batch selects what its rows would alone. Nothing is drawn: the same film and question always give
the same frames, in training too, where each worker process loads the scorer when it first meets a film.

The scorer is no part of the model: checkpoints name it and do not hold it, and no gradient reaches it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from molmo_model.errors import CheckpointError, ConfigError

TEXT_TOKENS = 64
FRAMES_AT_ONCE = 32
MODEL_TYPE = "siglip"
"""transformers' name of both generations at a fixed resolution; those of SigLIP 2 with variable ones (`naflex`) take
their pictures in another form."""


class FrameScorer:
    """Scores frames against a question; loads its model when it is first asked, so it travels cheaply to workers.

    Args:
        source: hub id or folder of a SigLIP or SigLIP 2 of a fixed resolution, tokenizer included.
        device: where it computes.

    Raises:
        ConfigError: `source` cannot be read, or is another kind of model.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        self.source, self.device = source, torch.device(device)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"video.select_frames_by_query: {source} cannot be read: {error}") from error
        if config.model_type != MODEL_TYPE:
            raise ConfigError(
                f"video.select_frames_by_query: {source} is a {config.model_type}; it must be a text-image model of "
                f"type {MODEL_TYPE}, that is a SigLIP, or a SigLIP 2 of a fixed resolution"
            )
        self._parts: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "device": self.device, "_parts": None}

    def __call__(self, frames: npt.NDArray[np.uint8], question: str) -> npt.NDArray[np.float32]:
        """[F] cosine of the question with every frame of `frames` uint8 [F, H, W, 3].

        Raises:
            CheckpointError: the model cannot be loaded.
        """
        model, tokenizer = self._parts = self._parts or self._load()
        length = min(TEXT_TOKENS, model.config.text_config.max_position_embeddings)
        # both generations were trained on text in lower case, padded to its full length and without a mask
        ids = tokenizer(
            question.lower(), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            text = F.normalize(model.text_model(input_ids=ids.to(self.device)).pooler_output, dim=-1)
            parts = torch.from_numpy(np.ascontiguousarray(frames)).split(FRAMES_AT_ONCE)
            images = torch.cat([model.vision_model(self._pixels(part, model)).pooler_output for part in parts])
            scores: Tensor = F.normalize(images, dim=-1) @ text[0]
        return scores.cpu().numpy()

    def _pixels(self, frames: Tensor, model: Any) -> Tensor:
        """[F, 3, S, S] in [-1, 1], squashed to the encoder's size, as transformers' SigLIP processor does."""
        size = model.config.vision_config.image_size
        planes = frames.to(self.device).permute(0, 3, 1, 2).float()
        if planes.shape[2:] != (size, size):
            planes = F.interpolate(planes, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
        return planes / 127.5 - 1

    def _load(self) -> tuple[Any, Any]:
        try:
            model = AutoModel.from_pretrained(self.source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"video.select_frames_by_query: {self.source} cannot be loaded: {error}") from error
        return model.to(self.device).eval().requires_grad_(False), tokenizer
