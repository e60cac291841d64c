"""Tests of the chunks of a prompt and the capacity of a cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.backend.shapes import PROMPT_CHUNKS
from phicore.engine.chunks import LOGITS_CHUNKS, capacity_for, capacity_of_window, chunks

SIZES = [PROMPT_CHUNKS, LOGITS_CHUNKS, (1, 256, 2048)]  # the last are the sizes on GPUs


@given(length=st.integers(1, 5000), is_padded=st.booleans())
@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_cover_the_prompt_in_order_and_fit_the_cache(sizes, length: int, is_padded: bool):
    prompt = list(range(1000, 1000 + length))
    seen: list[int] = []
    for tokens, positions, last in chunks(prompt, sizes, is_padded=is_padded):
        assert tokens.shape == positions.shape
        assert {tokens.dtype, positions.dtype, last.dtype} == {np.dtype(np.int32)}
        size, count = tokens.shape[1], int(last[0]) + 1
        assert size in sizes if is_padded else size == count <= sizes[-1]
        assert size <= max(2 * count, sizes[1])
        assert positions[0].tolist() == list(range(len(seen), len(seen) + size))
        assert positions[0, -1] < capacity_for(length)
        seen += tokens[0, :count].tolist()
    assert seen == prompt


def test_chunks_of_65_tokens_are_not_padded_to_256():
    found = [c[0].shape[1] for c in chunks([0] * 65, PROMPT_CHUNKS, is_padded=True)]
    assert found == [64, 1]


@pytest.mark.parametrize(
    ("positions", "capacity"), [(1, 256), (256, 256), (257, 512), (513, 1024), (4096, 4096)]
)
def test_capacity_is_256_times_a_power_of_two(positions: int, capacity: int):
    assert capacity_for(positions) == capacity


@pytest.mark.parametrize(("window", "capacity"), [(1, 288), (2, 288), (3, 320), (2047, 2336)])
def test_capacity_of_a_window_holds_it_and_a_chunk(window: int, capacity: int):
    assert capacity_of_window(window, 256) == capacity
