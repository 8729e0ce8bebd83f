"""transformers' `Molmo2ImageProcessor` behind lines of JSON; runs in the peers' environment, one thread.

Requests: `load` keeps pictures (an .npz of arrays [H, W, 3], or of the bytes of files), `time` measures the processor
on them, `save` writes what it makes of them, `parity` and `several` what it makes of noise of many sizes.
"""

import hashlib
import importlib.util
import io
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
torch.set_num_threads(1)


def image_processor() -> Any:
    """The processor. torchvision's compiled operators are built for another torch; it is content with their names."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is missing in the peers' environment")
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    names = set(re.findall(r'register_(?:meta|fake)\(\s*"(?:torchvision::)?(\w+)"', text))
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor x) -> Tensor")
    from transformers import Molmo2ImageProcessor

    processor = Molmo2ImageProcessor()
    processor.kept_library = library  # its operators go with it
    return processor


class Layout:
    """Flags of the processor's text under which it writes what Molmo's first generation does: column tokens in both
    views, one kind of start token. They are the processor's own options."""

    image_use_col_tokens = True
    use_single_crop_col_tokens = True
    use_single_crop_start_token = False


def image_tokens(grid: list[int]) -> list[str]:
    """The text that the processor writes for an image of these grids of windows."""
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    text = Molmo2Processor.replace_image_token(Layout(), {"image_grids": [grid]}, 0)
    return re.findall(r"<\w+>", text)


BYTES = {"do_rescale": False, "do_normalize": False}
"""Options under which the processor gives resized pixels as they are, uint8."""


class Server:
    """Answers requests."""

    def __init__(self) -> None:
        self.processor = image_processor()
        self.pictures: list[Any] = []

    def load(self, path: str, files: bool) -> dict[str, Any]:
        with np.load(path) as arrays:
            loaded = [arrays[name] for name in arrays.files]
        self.pictures = [one.tobytes() for one in loaded] if files else loaded
        return {"pictures": len(self.pictures)}

    def time(self, max_crops: int, as_bytes: bool) -> dict[str, Any]:
        """Wall and CPU seconds for each picture; those of files with PIL's decoding."""
        seconds = []
        for picture in self.pictures:
            wall, cpu = time.perf_counter(), time.process_time()
            self._process(picture, max_crops, as_bytes)
            seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        return {"seconds": seconds}

    def save(self, path: str, max_crops: int) -> dict[str, Any]:
        """uint8 patches, pooling and tokens of every picture."""
        results: dict[str, Any] = {}
        for number, picture in enumerate(self.pictures):
            made = self._process(picture, max_crops, as_bytes=True)
            results[f"patches{number}"] = made["pixel_values"].numpy()
            results[f"pooling{number}"] = made["image_token_pooling"].numpy()
            results[f"tokens{number}"] = np.array(image_tokens(made["image_grids"][0].tolist()))
        np.savez(path, **results)
        return {}

    def parity(self, path: str, cases: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
        """For noise of every [height, width, max_crops]: pooling, tokens and the digest of the uint8 patches."""
        results: dict[str, Any] = {}
        for number, (height, width, max_crops) in enumerate(cases):
            noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            made = self._process(noise, max_crops, as_bytes=True, **options)
            results[f"pooling{number}"] = made["image_token_pooling"].numpy()
            results[f"tokens{number}"] = np.array(image_tokens(made["image_grids"][0].tolist()))
            patches = made["pixel_values"].contiguous().numpy()
            results[f"digest{number}"] = np.array(hashlib.sha256(patches).hexdigest())
        np.savez(path, **results)
        return {}

    def several(self, path: str, sizes: list[list[int]]) -> dict[str, Any]:
        """Noise of every [height, width] as the images of one call, normalised float32 as the processor's default."""
        images = [
            np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            for number, (height, width) in enumerate(sizes)
        ]
        made = self.processor(images, return_tensors="pt")
        np.savez(path, patches=made["pixel_values"].numpy(), pooling=made["image_token_pooling"].numpy())
        return {}

    def versions(self) -> dict[str, Any]:
        import torchvision
        import transformers

        return {"transformers": transformers.__version__, "torchvision": torchvision.__version__}

    def _process(self, picture: Any, max_crops: int, as_bytes: bool, **options: Any) -> Any:
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture)).convert("RGB")
        options |= BYTES if as_bytes else {}
        return self.processor(picture, max_crops=max_crops, return_tensors="pt", **options)


def main() -> None:
    server = Server()
    answers, sys.stdout = sys.stdout, sys.stderr  # only answers go out
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("command"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
