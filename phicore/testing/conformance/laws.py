"""Tests of laws that hold for all weights, such as: dividing a sequence changes no logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from phicore.backend import Array, Backend, LayerCache, Params
from phicore.gguf.reader import open_gguf
from phicore.network import graph
from phicore.network.architectures import architecture_of
from phicore.network.config import Phi3Config
from phicore.network.rope import rope_tables
from phicore.network.weights import load_params, read_config
from phicore.testing import tolerances
from phicore.testing.compare import assert_close, relative_error
from phicore.testing.conformance.base import Conformance, examples
from phicore.testing.tiny_models import Tiny, write_model

TINY = Tiny(
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=6,
    num_key_value_heads=3,
    vocab_size=23,
    max_position_embeddings=40,
    rope_dimension_count=6,
)
CAPACITY = 9
MAX_LENGTH = 5  # small, since each length of a chunk is compiled

prompts = st.lists(st.integers(0, TINY.vocab_size - 1), min_size=2, max_size=MAX_LENGTH)


@dataclass
class Runner:
    """Runs chunks of tokens through the graph, for one model on one backend."""

    ops: Backend
    config: Phi3Config
    params: Params

    def __post_init__(self) -> None:
        self._forward = self.ops.compile(self._compiled, donate=(1,))
        self._tables = rope_tables(self.config, np.arange(TINY.max_position_embeddings))

    def _compiled(
        self,
        params: Params,
        cache: list[LayerCache],
        rope: tuple[Array, Array],
        tokens: Array,
        slots: Array,
    ) -> tuple[Array, list[LayerCache]]:
        hidden, cache = graph.forward(self.ops, self.config, params, rope, tokens, slots, cache)
        return graph.logits(self.ops, params, hidden), cache

    def new_cache(self, batch: int = 1, capacity: int = CAPACITY) -> list[LayerCache]:
        c = self.config
        shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
        return [self.ops.new_cache(*shape) for _ in range(c.num_hidden_layers)]

    def __call__(
        self,
        cache: list[LayerCache],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: Sequence[int] = (0,),
    ) -> tuple[np.ndarray, list[LayerCache]]:
        """Compute the logits (B, T, V) of tokens (B, T), and the new cache.

        Args:
            starts: The position of the first token in each row.
            first: The position in slot 0 of each row, or one position for all rows.
        """
        ids = np.array(tokens, np.int32)
        positions = np.array(starts, np.int32)[:, None] + np.arange(ids.shape[1], dtype=np.int32)
        slots = positions - np.array(first, np.int32)[:, None]
        args = self.ops.asarray(ids), self.ops.asarray(slots)
        rope = tuple(self.ops.asarray(table[positions]) for table in self._tables)
        logits, cache = self._forward(self.params, cache, rope, *args)
        return self.ops.to_numpy(logits), cache

    def whole(self, tokens: Sequence[int]) -> np.ndarray:
        """Compute the logits (T, V) of a sequence in one chunk."""
        return self(self.new_cache(), [tokens], [0])[0][0]


def runner_of(ops: Backend, path: Path, window: int | None) -> Runner:
    with open_gguf(path) as file:
        architecture = architecture_of(file.metadata)
        config = read_config(file, architecture)
        params = load_params(ops, architecture, config, file, lambda *_: None)
    return Runner(ops, replace(config, sliding_window=window), params)


def padded(tokens: Sequence[int], padding: int = 0) -> list[int]:
    return [*tokens, *[padding] * (MAX_LENGTH - len(tokens))]


class LawsConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def make_runner(
        cls, ops: Backend, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[int | None], Runner]:
        path = tmp_path_factory.mktemp("laws") / "tiny.gguf"
        write_model(path, TINY, Type.F32, tokenizer=False)
        return lambda window: runner_of(ops, path, window)

    @pytest.fixture(scope="class")
    @classmethod
    def runner(cls, make_runner: Callable[[int | None], Runner]) -> Runner:
        return make_runner(None)

    @examples(20)
    @given(tokens=prompts, cuts=st.sets(st.integers(1, MAX_LENGTH - 1)))
    def test_logits_any_split_into_chunks_equal_one_piece(
        self, runner: Runner, tokens: list[int], cuts: set[int]
    ) -> None:
        bounds = [0, *sorted(c for c in cuts if c < len(tokens)), len(tokens)]
        cache, pieces = runner.new_cache(), []
        for start, end in pairwise(bounds):
            logits, cache = runner(cache, [tokens[start:end]], [start])
            pieces.append(logits[0])
        assert_close(np.concatenate(pieces), runner.whole(tokens), tolerances.SAME_GRAPH)

    @pytest.mark.parametrize(
        ("kv_heads", "window", "arch"),
        [(1, 2, "phi3"), (2, None, "phi3"), (6, 4, "phi3"), (3, 1, "phi3"), (3, 2, "phimoe")],
    )
    def test_logits_any_split_whatever_the_window_and_the_heads(
        self,
        ops: Backend,
        tmp_path_factory: pytest.TempPathFactory,
        kv_heads: int,
        window: int | None,
        arch: str,
    ) -> None:
        path = tmp_path_factory.mktemp("laws") / "tiny.gguf"
        tiny = replace(TINY, num_key_value_heads=kv_heads, arch=arch)
        if arch == "phimoe":
            tiny = replace(tiny, num_local_experts=4)
        write_model(path, tiny, Type.F32, tokenizer=False)
        runner = runner_of(ops, path, window)

        @examples(8)
        @given(tokens=prompts, cut=st.integers(1, MAX_LENGTH - 1), is_shifted=st.booleans())
        def check(tokens: list[int], cut: int, is_shifted: bool) -> None:
            cut = min(cut, len(tokens) - 1)
            first, cache = runner(runner.new_cache(), [tokens[:cut]], [0])
            if is_shifted and window is not None and cut >= window:
                # Free the slots of tokens that the next token does not see.
                unseen = cut - (window - 1)
                count = ops.asarray(np.array([unseen], np.int32))
                cache = [ops.shift_cache(layer, count) for layer in cache]
                second, _ = runner(cache, [tokens[cut:]], [cut], first=[unseen])
            else:
                second, _ = runner(cache, [tokens[cut:]], [cut])
            pieces = np.concatenate([first[0], second[0]])
            assert_close(pieces, runner.whole(tokens), tolerances.SAME_GRAPH)

        check()

    def test_logits_rows_with_different_freed_slots_and_angles_equal_each_alone(
        self, make_runner: Callable[[int | None], Runner]
    ) -> None:
        """Check that each row has its own slots and its own rotation."""
        runner, window = make_runner(2), 2
        rows, starts = [[3, 1, 4, 1], [5, 9, 2, 6]], [0, 20]
        alone = []
        for tokens, start in zip(rows, starts, strict=True):
            _, cache = runner(runner.new_cache(), [tokens], [start], first=[start])
            alone.append(runner(cache, [[7]], [start + 4], first=[start])[0][0])
        _, cache = runner(runner.new_cache(batch=2), rows, starts, first=starts)
        counts = [4 - (window - 1), 0]
        shift = runner.ops.asarray(np.array(counts, np.int32))
        cache = [runner.ops.shift_cache(layer, shift) for layer in cache]
        first = [start + count for start, count in zip(starts, counts, strict=True)]
        both, _ = runner(cache, [[7], [7]], [start + 4 for start in starts], first=first)
        assert_close(both, np.stack(alone), tolerances.SAME_GRAPH)

    @examples(10)
    @given(first=prompts, second=prompts, following=st.tuples(*[st.integers(0, 22)] * 2))
    def test_logits_two_sequences_in_a_batch_equal_each_alone(
        self, runner: Runner, first: list[int], second: list[int], following: tuple[int, int]
    ) -> None:
        cache = runner.new_cache(batch=2)
        prompt, cache = runner(cache, [padded(first), padded(second)], [0, 0])
        step, _ = runner(cache, [[n] for n in following], [len(first), len(second)])
        for row, (tokens, token) in enumerate(zip((first, second), following, strict=True)):
            alone, cache = runner(runner.new_cache(), [padded(tokens)], [0])
            assert_close(prompt[row], alone[0], tolerances.SAME_GRAPH)
            alone, _ = runner(cache, [[token]], [len(tokens)])
            assert_close(step[row], alone[0], tolerances.SAME_GRAPH)

    @examples(10)
    @given(tokens=prompts, padding=st.integers(0, 22), following=st.integers(0, 22))
    def test_logits_padding_at_the_end_of_a_chunk_changes_nothing(
        self, runner: Runner, tokens: list[int], padding: int, following: int
    ) -> None:
        n = len(tokens)
        logits, cache = runner(runner.new_cache(), [padded(tokens, padding)], [0])
        assert_close(logits[0, :n], runner.whole(tokens), tolerances.SAME_GRAPH)
        logits, _ = runner(cache, [[following]], [n])  # overwrites the padding's first entry
        _, cache = runner(runner.new_cache(), [tokens], [0])
        expected, _ = runner(cache, [[following]], [n])
        assert_close(logits, expected, tolerances.SAME_GRAPH)

    @examples(10)
    @given(tokens=prompts, following=st.integers(0, 22))
    def test_logits_larger_or_grown_cache_changes_nothing(
        self, runner: Runner, tokens: list[int], following: int
    ) -> None:
        results = []
        for capacity, grown in ((CAPACITY, None), (2 * CAPACITY, None), (CAPACITY, 2 * CAPACITY)):
            cache = runner.new_cache(capacity=capacity)
            _, cache = runner(cache, [padded(tokens)], [0])
            if grown is not None:
                first, count = np.array([0], np.int32), np.array([len(tokens)], np.int32)
                rows, slots = runner.ops.asarray(first), runner.ops.asarray(count)
                cache = [runner.ops.copy_rows(layer, rows, slots, grown) for layer in cache]
            results.append(runner(cache, [[following]], [len(tokens)])[0])
        assert_close(results[1], results[0], tolerances.SAME_GRAPH)
        assert_close(results[2], results[0], tolerances.SAME_GRAPH)

    def test_logits_window_as_long_as_the_sequence_equals_no_window(
        self, make_runner: Callable[[int | None], Runner], runner: Runner
    ) -> None:
        tokens = [3, 1, 4, 1, 5]
        full = runner.whole(tokens)
        for window in (len(tokens), 100):
            assert_close(make_runner(window).whole(tokens), full, tolerances.SAME_GRAPH)

    def test_logits_shorter_window_changes_only_what_it_hides(
        self, make_runner: Callable[[int | None], Runner], runner: Runner
    ) -> None:
        tokens = [3, 1, 4, 1, 5]
        full, windowed = runner.whole(tokens), make_runner(3).whole(tokens)
        assert_close(windowed[:3], full[:3], tolerances.SAME_GRAPH)
        assert all(relative_error(windowed[i], full[i]) > 1e-3 for i in (3, 4))

    def test_logits_each_token_and_its_place_matter(self, runner: Runner) -> None:
        """Check what the laws above do not: a graph that reads only the last token obeys them."""
        last = [runner.whole(tokens)[-1] for tokens in ([3, 1, 4], [1, 3, 4], [2, 1, 4])]
        assert relative_error(last[1], last[0]) > 1e-3
        assert relative_error(last[2], last[0]) > 1e-3
