"""torch's functions under the names and with the meanings of the Python Array API standard.

They come from `array-api-compat`, except for two functions that take indices, because torch needs
indices of 64 bits.
"""

from typing import Any

import torch
from array_api_compat.torch import *  # noqa: F403

float16, int8, bool = torch.float16, torch.int8, torch.bool


def take(x: Any, indices: Any, axis: int = 0) -> Any:
    return torch.index_select(x, axis, indices.long())


def take_along_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    return torch.take_along_dim(x, indices.long(), dim=axis)
