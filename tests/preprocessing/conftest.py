"""Small preprocessors for the tests of this room."""

import copy
from collections.abc import Callable

import pytest

from molmo_model.model_config import PreprocessingConfig
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer

TOKENIZER = "molmo_model/preprocessing/tokenizers/bytes512"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    """The same with the two tokens of ChatML, ids 512 and 513; its end of text stays another one."""
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return chat


@pytest.fixture(scope="session")
def build(tokenizer) -> Callable[..., Preprocessor]:
    """A preprocessor for 64-pixel crops of 16-pixel patches; keywords change the params' section."""

    def make(vocab_size: int = 520, image_size: int = 64, **section) -> Preprocessor:
        preprocessing = PreprocessingConfig(**{"max_crops": 4, "overlap_margins": [1, 1], **section})
        config = PreprocessorConfig.build(
            preprocessing, image_size=image_size, patch_size=16, pooling_size=2, resize="siglip", vocab_size=vocab_size
        )
        return Preprocessor(config, tokenizer)

    return make
