"""Image tokens by picture: several questions about one picture, in one batch or in later ones, encode it once.

An entry's key is a digest of exactly what the encoder would see (crops, pooling windows, patch masks), so it can never
be the wrong one, whatever the file was called; decoding and cropping are still done for every question. The oldest
entries make room, by bytes. A cache belongs to one model in one precision: whoever changes either makes a new one.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

if TYPE_CHECKING:
    from molmo_model.nn.molmo import MolmoForConditionalGeneration

DEFAULT_BYTES = 512 * 2**20
"""About 25 pictures of 1,196 tokens (12 crops) at a width of 4,096 in fp32; none of a batch is lost on the way."""
KNOWN = {"pixel_values", "pooling", "image_token_counts", "patch_masks"}
"""Batch keys that decide the tokens of still pictures, each picture by itself."""
ELSEWHERE = {"input_ids", "attention_mask", "position_ids", "image_ids", "image_counts"}
"""Batch keys that the encoder does not see."""


@dataclass(frozen=True)
class _Picture:
    """What the encoder sees of one picture."""

    pixels: Tensor
    """uint8 [C, H, W, 3]"""
    pooling: Tensor
    """int64 [T, W], counted from the picture's own first patch; -1 for a hole."""
    masks: Tensor | None
    """float32 [C, N]"""
    tokens: int

    def digest(self) -> str:
        found = xxhash.xxh3_128()  # quick: a GPU waits for it
        for tensor in (self.pixels, self.pooling, self.masks):
            if tensor is not None:
                array = tensor.cpu().contiguous().numpy()
                found.update(f"{array.dtype}{array.shape}".encode())
                found.update(array.data)
        return found.hexdigest()


class ImageTokenCache:
    """Least recently used image tokens, at most `max_bytes` of them.

    Attributes:
        encoded: pictures that were encoded so far.
        reused: pictures that were not, because their tokens were known.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.encoded = self.reused = 0
        self._tokens: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def bytes(self) -> int:
        """Memory of all entries."""
        return sum(tokens.nbytes for tokens in self._tokens.values())

    def encode(self, model: "MolmoForConditionalGeneration", batch: Mapping[str, Any]) -> list[Tensor] | None:
        """The tokens [tokens, E] of every picture of a batch, those that are new encoded together.

        None where pictures are not encoded each by itself (clips, token selection by the question).
        """
        if set(batch) - KNOWN - ELSEWHERE:
            return None
        vision = model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        pictures = _pictures(batch, patches)
        keys = [picture.digest() for picture in pictures]
        found = {key: self._tokens[key] for key in keys if key in self._tokens}
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in found}
        if new:
            found |= dict(zip(new, _encode(model, list(new.values()), patches), strict=True))
        self.encoded += len(new)
        self.reused += len(keys) - len(new)
        for key in keys:
            self._tokens[key] = found[key]
            self._tokens.move_to_end(key)
        while self._tokens and self.bytes > self.max_bytes:
            self._tokens.popitem(last=False)
        return [found[key] for key in keys]


def _pictures(batch: Mapping[str, Any], patches: int) -> list[_Picture]:
    """A batch taken apart. The crops of a picture are those that its windows point into, and follow each other.

    Args:
        patches: of one crop.
    """
    pixels, pooling, masks = batch["pixel_values"], batch["pooling"], batch.get("patch_masks")
    counts = batch["image_token_counts"].tolist()
    per_window = sum(counts) // len(pooling)  # several tokens come of each window with `num_queries`
    found, start = [], 0
    for count in counts:
        windows = pooling[start : start + count // per_window]
        start += count // per_window
        crops = windows[windows >= 0] // patches
        first, end = int(crops.min()), int(crops.max()) + 1
        own = torch.where(windows >= 0, windows - first * patches, -1)
        found.append(_Picture(pixels[first:end], own, None if masks is None else masks[first:end], count))
    return found


def _encode(model: "MolmoForConditionalGeneration", pictures: list[_Picture], patches: int) -> tuple[Tensor, ...]:
    """The tokens of some pictures, as one batch. The host does not wait for the device."""
    windows, start = [], 0
    for picture in pictures:
        windows.append(torch.where(picture.pooling >= 0, picture.pooling + start * patches, -1))
        start += len(picture.pixels)
    inputs = {
        "pixel_values": _moved([picture.pixels for picture in pictures], model.device),
        "pooling": _moved(windows, model.device),
        "image_token_counts": torch.tensor([picture.tokens for picture in pictures]),  # read on the host
    }
    masks = [picture.masks for picture in pictures if picture.masks is not None]
    if masks:
        inputs["patch_masks"] = _moved(masks, model.device)
    encoded = model.model.get_image_features(**inputs)
    # a copy each: a slice of the batch's tensor would keep all of it alive
    return tuple(tokens.clone() for tokens in encoded.pooler_output)


def _moved(parts: list[Tensor], device: torch.device) -> Tensor:
    """The parts in one tensor on the device; parts in pinned memory are copied while the host goes on."""
    return torch.cat([part.to(device, non_blocking=True) for part in parts])
