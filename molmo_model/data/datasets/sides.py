"""Divides a dataset that has no split of its own between training and evaluation: by a hash of the bytes of its images
and films, so that what shows one picture always stands on one side, and more data never move what was there."""

import hashlib
from collections.abc import Sequence

from molmo_model.artifacts import digest_of
from molmo_model.data.example import Example


class Sides:
    """Which side, training or evaluation, every image belongs to.

    Images that stand in one example are joined, so that they and whatever they are joined to get one side: that which
    was asked for, else by a hash of the smallest digest among them.
    """

    def __init__(self, eval_fraction: float) -> None:
        self.eval_fraction = eval_fraction
        self._parents: dict[str, str] = {}
        self._asked: dict[str, str] = {}

    def join(self, digests: Sequence[str], asked: str | None) -> None:
        """The images of these digests stand on one side: `asked`, unless another was asked for before."""
        roots = sorted({self._root(digest) for digest in digests})
        for other in roots[1:]:
            self._parents[other] = roots[0]
            if other in self._asked:
                self._asked.setdefault(roots[0], self._asked.pop(other))
        if roots and asked is not None:
            self._asked.setdefault(roots[0], asked)

    def side(self, digest: str) -> str:
        """The side of an image."""
        root = self._root(digest)
        return self._asked.get(root) or drawn_side(root, self.eval_fraction)

    def _root(self, digest: str) -> str:
        while (parent := self._parents.get(digest, digest)) != digest:
            digest = parent
        return digest


def drawn_side(digest: str, eval_fraction: float) -> str:
    """The side that a digest falls on; `eval` with probability `eval_fraction`."""
    share = int.from_bytes(hashlib.sha256(f"side {digest}".encode()).digest()[:8], "big") / 2**64
    return "eval" if share < eval_fraction else "train"


def content_digest(example: Example) -> str:
    """What decides the side of an example: its first image or film, or its first conversation where it has none."""
    if example.files:
        return example.files[0].sha256
    return digest_of([[message.role, message.text] for message in example.conversations[0].messages])
