"""Which tokenizer a model has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phicore.errors import TokenizerError
from phicore.sources import ModelFiles
from phicore.sources.hub import fetch_tokenizer
from phicore.text.tokenizer import Tokenizer
from phicore.text.tokenizer_keys import origin


def tokenizer_of(files: ModelFiles, metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model.

    Where the file's own cannot be used, a model from the Hub gets the tokenizer.json of the
    repository that it was made from, if the file names one.
    """
    try:
        return Tokenizer.of(files.tokenizer, metadata, explicit=files.tokenizer_is_given)
    except TokenizerError as own:
        repo = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?", origin(metadata) or "")
        if files.tokenizer_is_given or not files.is_from_hub or repo is None:
            raise
        path = fetch_tokenizer(repo.group(1))
        if path is None:
            raise
        try:
            return Tokenizer.from_file(path, metadata)
        except TokenizerError as error:
            raise TokenizerError(f"{own}; the one there is of no use: {error}") from error
