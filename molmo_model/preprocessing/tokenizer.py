"""Finding a tokenizer by name, and the few things that preprocessing wants of it.

Any tokenizer with a `tokenizer.json` will do: a transformers hub id, a folder of yours, or the small `bytes512` that
lies beside this file for models trained from scratch (made by `molmo_model.preprocessing.bytes512`).
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import molmo_model
from molmo_model.errors import ConfigError

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

    Special tokens that appear in a text are spelled out: data cannot end an answer or begin an image.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the settings below are ours
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = int(tokenizer.eos_token_id)
        self.bos_id = int(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else self.eos_id
        """Begins every sequence; falls back to the end-of-text token."""
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else self.eos_id
        self.size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """Ids are below this."""
        self.encode = lru_cache(maxsize=16384)(self._encode)

    def _encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text, read-only; kept, because questions repeat."""
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        ids.flags.writeable = False
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["encode"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the one setting that a pickled tokenizer forgets
        self.encode = lru_cache(maxsize=16384)(self._encode)
