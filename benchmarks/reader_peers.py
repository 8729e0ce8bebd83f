"""WebDataset, LitData and MosaicML Streaming behind lines of JSON; runs in the peers' environment, one process.

Requests: `write` makes each peer's own files of our shards (WebDataset reads the shards themselves), `time` measures
one pass over all samples, `digests` says what a pass brought, `versions` what is compared. A sample is its JSON and
the bytes of one picture; nobody decodes anything.
"""

import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "DISABLE_VERSION_CHECK", "LITDATA_DISABLE_VERSION_CHECK"):
    os.environ[name] = "1"

Sample = tuple[bytes, bytes]
CHUNK_BYTES = 64_000_000
"""Size of the peers' files: that of our shards."""


def torchvision_names() -> Any:
    """Lets torchvision, which Streaming imports and nothing here uses, be content with the names of its operators."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is missing in the peers' environment")
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "DEF")
    for operator in set(re.findall(r'register_(?:meta|fake)\(\s*"(?:torchvision::)?(\w+)"', text)):
        library.define(f"{operator}(Tensor x) -> Tensor")
    return library


def samples(shards: list[str]) -> Iterator[Sample]:
    """JSON and picture of every sample of our shards, in the order of the files."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            contents = (tar.extractfile(member).read() for member in tar)  # type: ignore[union-attr]
            yield from zip(contents, contents, strict=True)


class Server:
    def __init__(self) -> None:
        self.shards: list[str] = []
        self.folder = Path()
        self.datasets: dict[str, Any] = {}

    def write(self, shards: list[str], folder: str) -> dict[str, Any]:
        """Writes the same samples in every peer's form; seconds of each."""
        self.shards, self.folder = shards, Path(folder)
        writers: dict[str, Callable[[], None]] = {"litdata": self._write_litdata, "mds": self._write_mds}
        seconds = {}
        for peer, write in writers.items():
            started = time.perf_counter()
            write()
            seconds[peer] = round(time.perf_counter() - started, 2)
        return {"write_seconds": seconds}

    def _write_litdata(self) -> None:
        from litdata.streaming.cache import Cache

        cache = Cache(str(self.folder / "litdata"), chunk_bytes=CHUNK_BYTES)
        for number, (text, picture) in enumerate(samples(self.shards)):
            cache[number] = {"json": text, "picture": picture}
        cache.done()
        cache.merge()

    def _write_mds(self) -> None:
        from streaming import MDSWriter

        columns = {"json": "bytes", "picture": "bytes"}
        with MDSWriter(out=str(self.folder / "mds"), columns=columns, size_limit=CHUNK_BYTES) as writer:
            for text, picture in samples(self.shards):
                writer.write({"json": text, "picture": picture})

    def time(self, peer: str, seed: int) -> dict[str, Any]:
        """Seconds of one pass by wall clock and of CPU, its start and end included; checks that it was complete."""
        read = self._pass(peer, seed)
        if not peer.startswith("webdataset"):
            self._open(peer.removesuffix("_index"))  # not part of what is measured
        wall, cpu = time.perf_counter(), time.process_time()
        count = size = 0
        for text, picture in read():
            count, size = count + 1, size + len(text) + len(picture)
        return {
            "seconds": [time.perf_counter() - wall, time.process_time() - cpu],
            "samples": count,
            "bytes": size,
        }

    def digests(self, peer: str, seed: int) -> dict[str, Any]:
        """SHA-256 of JSON and picture by the example's id."""
        read = self._pass(peer, seed)
        return {
            json.loads(text)["id"]: hashlib.sha256(bytes(text) + bytes(picture)).hexdigest() for text, picture in read()
        }

    def close(self) -> dict[str, Any]:
        """Forgets the open datasets: what they map cannot be thrown out of the page cache."""
        self.datasets.clear()
        gc.collect()
        return {}

    def _pass(self, peer: str, seed: int) -> Callable[[], Iterator[Sample]]:
        """A function that goes once over all samples."""
        passes = {
            "webdataset": lambda: self._webdataset(0),
            "webdataset_shuffle": lambda: self._webdataset(1000),
            "litdata": lambda: self._litdata(seed),
            "litdata_index": lambda: self._index(self._open("litdata"), seed),
            "mds_index": lambda: self._index(self._open("mds"), seed),
        }
        return passes[peer]

    def _open(self, peer: str) -> Any:
        """The dataset of a peer, opened once: an epoch does not pay for that."""
        if peer not in self.datasets:
            if peer == "mds":
                from streaming import StreamingDataset as Mds

                self.datasets[peer] = Mds(local=str(self.folder / "mds"), shuffle=False, batch_size=1)
            else:
                from litdata import StreamingDataset

                self.datasets[peer] = StreamingDataset(str(self.folder / "litdata"), shuffle=True)
        return self.datasets[peer]

    def _webdataset(self, shuffle: int) -> Iterator[Sample]:
        import webdataset

        dataset = webdataset.WebDataset(self.shards, shardshuffle=False)
        for sample in dataset.shuffle(shuffle) if shuffle else dataset:
            yield sample["json"], sample["0.jpg"]

    def _litdata(self, seed: int) -> Iterator[Sample]:
        for sample in self._open("litdata"):
            yield sample["json"], sample["picture"]

    def _index(self, dataset: Any, seed: int) -> Iterator[Sample]:
        """By number, in a random order of the whole."""
        import numpy as np

        for number in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            sample = dataset[number]
            yield sample["json"], sample["picture"]

    def versions(self) -> dict[str, Any]:
        return {name: importlib.metadata.version(name) for name in ("webdataset", "litdata", "mosaicml-streaming")}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # only answers go out
    kept = torchvision_names()
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(server, request.pop("command"))(**request)), file=answers, flush=True)
    del kept


if __name__ == "__main__":
    main()
