"""Tests of tokens of type BYTE, with any tokenizer model."""

import numpy as np
import pytest

from phicore.errors import TokenizerError
from phicore.text.tokenizer import Tokenizer


def test_byte_token_with_an_ordinary_spelling_is_an_error():
    """Such a token once loaded in a gpt2 vocabulary, and printing it failed with a ValueError."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": np.array([1, 6]),
        "tokenizer.ggml.merges": [],
    }
    with pytest.raises(TokenizerError, match="expected a byte such as '<0x0A>', found 'b'"):
        Tokenizer.from_gguf(metadata)
