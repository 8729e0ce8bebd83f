"""Finding a tokenizer by name, and the few things that preprocessing wants of it.

Any tokenizer with a `tokenizer.json` will do: a transformers hub id, a folder of yours, or the small `bytes512` that
lies beside this file for models trained from scratch (made by `molmo_model.preprocessing.bytes512`).
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import molmo_model
from molmo_model.errors import ConfigError
from molmo_model.preprocessing.marked import Marked
from molmo_model.preprocessing.token_counts import TokenCounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(molmo_model.__file__).parent.parent


def tokenizer_folder(name: str) -> Path | None:
    """The local folder that a tokenizer's name means: in the working directory, or else in the repository; None for a
    hub id."""
    for folder in (Path(name), REPOSITORY / name):
        if folder.is_dir():
            return folder
    return None


def load_tokenizer(name: str, own: bool = False) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder (see `tokenizer_folder`) or of a hub id.

    Args:
        own: the folder is a checkpoint of this project, whose `config.json` says nothing about tokenizers; transformers
            would warn that it does not know the model.

    Raises:
        ConfigError: it does not exist, is not a `tokenizer.json` tokenizer, or has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    folder = tokenizer_folder(name)
    try:
        config = PreTrainedConfig() if own else None
        tokenizer = AutoTokenizer.from_pretrained(folder or name, config=config, trust_remote_code=False)
    except Exception as error:  # the hub client and the parsers have no common base
        raise ConfigError(
            f"tokenizer {name!r} cannot be loaded; it is neither a folder here, nor one in {REPOSITORY.name}/, "
            f"nor a hub id that can be read: {error}"
            if folder is None
            else f"tokenizer in {name!r} cannot be loaded: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {name!r} has no tokenizer.json; convert it to a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no eos_token; every answer ends with it")
    return tokenizer


class Vocabulary:
    """Text to ids and back, for one tokenizer, without its own templates or special tokens.

    Special tokens that appear in a text are spelled out: data cannot end an answer or begin an image. Only the markers
    of a `Marked` text are special.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", end: str | None = None) -> None:
        """
        Args:
            end: the token that ends answers; None is the tokenizer's end of text.

        Raises:
            ConfigError: the tokenizer has no such special token.
        """
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the settings below are ours
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        end_of_text = int(tokenizer.eos_token_id)
        self._special = {
            str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.eos_id = end_of_text if end is None else self.special_id(end)
        """Ends every answer."""
        self.bos_id = int(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else end_of_text
        """Begins every sequence; falls back to the end-of-text token."""
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else end_of_text
        self.size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """Ids are below this."""
        self._counts = TokenCounts(backend)
        self._remember()

    def _remember(self) -> None:
        """Memories, because questions repeat; typed, because a marked text equals its plain reading."""
        self.encode: Callable[[str], npt.NDArray[np.int64]] = lru_cache(maxsize=16384, typed=True)(self._encode)
        self.length: Callable[[str], int] = lru_cache(maxsize=16384, typed=True)(self._length)

    def _length(self, text: str) -> int:
        """As many ids as `encode` gives, several times faster where the text is Latin 1."""
        if isinstance(text, Marked):
            return sum(1 if place % 2 else self._spelled_length(part) for place, part in enumerate(text.parts))
        return self._spelled_length(text)

    def _spelled_length(self, text: str) -> int:
        count = self._counts.count(text)
        return len(self._spelled_out(text)) if count is None else count

    def _encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text, read-only.

        Raises:
            ConfigError: a marker that the tokenizer does not have.
        """
        if isinstance(text, Marked):
            found = [
                [self.special_id(part)] if place % 2 else self._spelled_out(part)
                for place, part in enumerate(text.parts)
            ]
            ids = np.array([number for part in found for number in part], dtype=np.int64)
        else:
            ids = np.array(self._spelled_out(text), dtype=np.int64)
        ids.flags.writeable = False
        return ids

    def _spelled_out(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def special_id(self, token: str) -> int:
        """The id of a special token.

        Raises:
            ConfigError: the tokenizer does not have it.
        """
        if token not in self._special:
            known = ", ".join(sorted(self._special)) or "none"
            raise ConfigError(
                f"the tokenizer has no special token {token}, which the message format wants; it has {known}. Choose "
                "another preprocessing.message_format, or the tokenizer of a model that was trained with it"
            )
        return self._special[token]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("encode", "length")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the one setting that a pickled tokenizer forgets
        self._remember()
