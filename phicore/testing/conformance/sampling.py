"""Tests of the sampler, compared with float64 and with the definition of each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phicore.backend import Backend
from phicore.network import sampler
from phicore.network.sampling import FILTERS
from phicore.testing.conformance.base import Conformance, examples

V = 16
DRAWS = 20_000

Host = dict[str, np.ndarray]


def noise(batch: int, size: int, seed: int = 7) -> np.ndarray:
    """Make the random numbers that the engine uses for the first steps of a seed."""
    return np.stack([sampler.uniforms(seed, step, size) for step in range(batch)])


def drawing(uniforms: np.ndarray, temperature: Any = 1.0, **filters: Any) -> Host:
    draw = {"temperature": temperature, **filters}
    dtypes = {"top_k": np.int32}
    rows = {n: np.full(len(uniforms), v, dtypes.get(n, np.float32)) for n, v in draw.items()}
    return {**rows, "uniforms": np.array(uniforms, np.float32)}


def filtered(uniforms: np.ndarray, **values: Any) -> Host:
    return drawing(uniforms, **{**FILTERS, **values})


def softmax(logits: Any, temperature: float = 1.0) -> np.ndarray:
    x = np.array(logits, np.float64) / temperature
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# ---- greedy --------------------------------------------------------------------------------


# ---- drawing -------------------------------------------------------------------------------


# ---- filters -------------------------------------------------------------------------------

steps = st.integers(-20, 20).map(lambda i: i / 4)  # few values, so that many are tied
grid = st.lists(st.one_of(steps, st.just(-np.inf)), min_size=V, max_size=V)


# ---- repeat penalty ------------------------------------------------------------------------


class SamplingConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def sample(cls, ops: Backend) -> Callable[..., np.ndarray]:
        """Return the compiled `sampler.sample`, for host arrays."""
        run = ops.compile(lambda *args: sampler.sample(ops, *args))

        def call(logits: Any, penalty: Host | None = None, draw: Host | None = None) -> np.ndarray:
            batch = len(logits)
            no_penalty = {
                "recent": np.full((batch, 1), -1, np.int32),
                "last_n": np.zeros(batch, np.int32),
                "repeat_penalty": np.ones(batch, np.float32),
            }
            moved = [
                None if names is None else {name: ops.asarray(a) for name, a in names.items()}
                for names in (penalty or no_penalty, draw)
            ]
            result = ops.to_numpy(run(ops.asarray(np.array(logits, np.float32)), *moved))
            assert result.dtype == np.int32
            return result

        return call

    @pytest.fixture(scope="class")
    @classmethod
    def kept(cls, ops: Backend) -> Callable[..., np.ndarray]:
        """Return a function that tells which tokens the three filters keep."""

        def run(logits: Any, temperature: Any, filters: dict[str, Any]) -> Any:
            largest = ops.xp.max(logits, axis=-1, keepdims=True)
            scaled = (logits - largest) / temperature[:, None]
            return sampler.keep_likely(ops, scaled, **filters)

        compiled = ops.compile(run)

        def call(logits: Any, temperature: float, **values: Any) -> np.ndarray:
            def column(value: Any, dtype: Any) -> Any:
                return ops.asarray(np.full(len(logits), value, dtype))

            filters = {
                name: column(value, np.int32 if isinstance(FILTERS[name], int) else np.float32)
                for name, value in {**FILTERS, **values}.items()
            }
            scores = ops.asarray(np.array(logits, np.float32))
            return ops.to_numpy(compiled(scores, column(temperature, np.float32), filters))

        return call

    @pytest.fixture(scope="class")
    @classmethod
    def penalized(cls, ops: Backend) -> Callable[..., np.ndarray]:
        """Return a function that applies the repeat penalty to logits."""
        run = ops.compile(lambda *args: sampler.apply_repeat_penalty(ops, *args))

        def call(logits: Any, recent: Any, last_n: Any, repeat_penalty: Any) -> np.ndarray:
            host = (
                np.array(logits, np.float32),
                np.array(recent, np.int32),
                np.array(last_n, np.int32),
                np.array(repeat_penalty, np.float32),
            )
            return ops.to_numpy(run(*map(ops.asarray, host)))

        return call

    def test_sample_greedy_is_argmax_lowest_index_on_ties(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        logits = [[0, 5, 5, 1], [-3, -1, -2, -1], [7, 7, 7, 7], [0, 1, 2, 3]]
        assert sample(logits).tolist() == [1, 1, 0, 3]
        assert sample(logits, None, drawing(noise(4, 4), temperature=0)).tolist() == [1, 1, 0, 3]

    def test_sample_greedy_and_drawn_rows_mix(self, sample: Callable[..., np.ndarray]) -> None:
        logits = np.log([[0.1, 0.2, 0.7]] * 6)
        uniforms = np.full((6, 3), 0.5)
        uniforms[[1, 3, 5], [0, 1, 2]] = 1e-6  # the smallest number makes the largest noise
        draw = drawing(uniforms, [0, 1, 0, 1, 0, 1])
        assert sample(logits, None, draw).tolist() == [2, 0, 2, 1, 2, 2]

    @examples(30)
    @given(
        logits=st.lists(st.integers(-40, 40), min_size=V, max_size=V, unique=True),
        seed=st.integers(0, 2**64 - 1),
    )
    def test_sample_top_k_of_one_is_greedy(
        self, sample: Callable[..., np.ndarray], logits: list[int], seed: int
    ) -> None:
        row, uniforms = [[x / 4 for x in logits]], noise(1, V, seed)
        assert sample(row, None, filtered(uniforms, top_k=1)) == sample(row)
        assert sample(row, None, filtered(uniforms, top_k=1, temperature=1e6)) == sample(row)
        assert sample(row, None, filtered(uniforms, top_p=1e-6)) == sample(row)
        assert sample(row, None, filtered(uniforms, min_p=1.0)) == sample(row)

    @pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
    def test_sample_tiny_temperature_is_greedy(
        self, sample: Callable[..., np.ndarray], temperature: float
    ) -> None:
        draw = drawing(noise(2, 4), temperature)
        assert sample([[1, 2, 3, 2.9]] * 2, None, draw).tolist() == [2, 2]

    def test_sample_frequencies_equal_softmax(self, sample: Callable[..., np.ndarray]) -> None:
        logits = [1.0, -1.5, 0.0, 2.5, 2.5, -4.0, 0.5, 1.5]
        tokens = sample([logits] * DRAWS, None, drawing(noise(DRAWS, 8), temperature=1.3))
        expected = softmax(logits, 1.3) * DRAWS
        chi_square = ((np.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
        assert chi_square < 24.3  # the 0.999 quantile for 7 degrees of freedom

    def test_sample_same_uniforms_same_token_as_float64(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        """Check that draws equal float64's, so that all backends draw the same tokens.

        If the two best scores are within 1e-5 of each other, rounding decides, and the draw is not
        compared. This concerns less than one in a thousand of the 20,000 draws.
        """
        logits = (np.sin(np.arange(40.0)) * 3).astype(np.float32)
        uniforms = noise(DRAWS, 40)
        tokens = sample([logits] * DRAWS, None, drawing(uniforms, temperature=0.8))
        scores = logits / np.float32(0.8) - np.log(-np.log1p(-uniforms.astype(np.float64)))
        second, first = np.sort(scores, axis=1)[:, -2:].T
        near = first - second < 1e-5
        assert near.mean() < 0.001
        assert np.array_equal(tokens[~near], scores.argmax(axis=1)[~near])

    def test_sample_all_equal_logits_take_the_smallest_number(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        uniforms = noise(10, 10)
        for value in (0, 1e4, -3e38):
            tokens = sample(np.full((10, 10), value), None, drawing(uniforms))
            assert tokens.tolist() == uniforms.argmin(axis=1).tolist()

    def test_sample_spread_of_ten_thousand_takes_the_largest(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        logits = [[-1e4, 1e4, 0, 9.9e3]] * 3
        draw = filtered(noise(3, 4), top_k=[0, 3, 0], top_p=[1, 1, 0.9])
        assert sample(logits, None, draw).tolist() == [1, 1, 1]

    def test_sample_infinitely_unlikely_tokens_are_never_drawn(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        logits = [[-np.inf, 0, -np.inf, 0, -np.inf]] * 4
        uniforms = np.full((4, 5), 1e-9)
        uniforms[[0, 1, 2, 3], [3, 3, 1, 1]] = 0.999
        draw = filtered(uniforms, top_k=[0, 4, 5, 0])
        assert sample(logits, None, draw).tolist() == [1, 1, 3, 3]

    def test_sample_vocabulary_of_one_gives_it(self, sample: Callable[..., np.ndarray]) -> None:
        assert sample([[3.0]]).tolist() == [0]
        draw = filtered(noise(1, 1), top_k=5, top_p=0.5, min_p=0.5)
        assert sample([[-1e30]], None, draw).tolist() == [0]

    def test_sample_large_vocabulary_counts_do_not_overflow(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        size = 200_064  # Phi-4-mini
        uniforms = noise(2, size)
        draw = filtered(uniforms, top_p=[1, 0.999])
        tokens = sample(np.zeros((2, size)), None, draw)
        assert tokens.tolist() == uniforms.argmin(axis=1).tolist()

    @pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
    def test_sample_large_vocabulary_equals_cutting_an_order(
        self, sample: Callable[..., np.ndarray], rng: np.random.Generator, spread: float
    ) -> None:
        size = 32_064  # Phi-3-mini
        logits = (rng.standard_normal((4, size)) * spread).astype(np.float32)
        filters: dict[str, Any] = {
            "top_k": [40, 0, 0, 1000],
            "top_p": [0.9, 0.9, 1, 0.5],
            "min_p": [0.05, 0, 0.1, 0],
        }
        uniforms = noise(4, size)
        expected = []
        for row, top_k, top_p, min_p, u in zip(logits, *filters.values(), uniforms, strict=True):
            order = np.argsort(-row)[: top_k or size]
            p = softmax(row[order])
            order = order[(np.cumsum(p) - p < top_p) & (p >= min_p * p[0])]
            scores = row[order] - np.log(-np.log1p(-u[order].astype(np.float64)))
            expected.append(order[scores.argmax()])
        assert sample(logits, None, filtered(uniforms, **filters)).tolist() == expected

    def test_sample_equal_scores_take_the_lowest_index(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        uniforms = np.full((2, 5), 0.5)
        uniforms[1, 3:] = 0.1
        assert sample(np.ones((2, 5)), None, drawing(uniforms)).tolist() == [0, 3]
        assert sample(np.ones((2, 5)), None, filtered(uniforms, top_k=5)).tolist() == [0, 3]

    @examples(300)
    @given(
        logits=grid.filter(lambda x: max(x) > -np.inf),
        temperature=st.sampled_from([1.0, 1.5, 3.0]),
        top_k=st.one_of(st.integers(0, V + 3), st.just(2**31 - 1)),
        top_p=st.one_of(st.just(1.0), st.floats(1 / 1024, 1, width=32)),
        min_p=st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
    )
    def test_keep_likely_equals_float64(
        self,
        kept: Callable[..., np.ndarray],
        logits: list[float],
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> None:
        p = softmax(logits, temperature)
        # Tied tokens are kept or dropped together.
        in_top_k = np.array([(p > x).sum() < (top_k or V) for x in p])
        likelier = np.array([p[in_top_k & (p > x)].sum() for x in p])
        share = top_p * p[in_top_k].sum()
        # Leave out examples in which rounding decides.
        assume(top_p == 1 or (np.abs(likelier - share) > 1e-5).all())
        assume((np.abs(p - min_p * p.max()) > 1e-6).all() or min_p in (0, 1))
        expected = in_top_k & ((likelier < share) | (top_p == 1)) & (p >= min_p * p.max())

        [found] = kept([logits], temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert np.array_equal(found, expected)

    def test_keep_likely_ties_with_the_last_are_kept(self, kept: Callable[..., np.ndarray]) -> None:
        logits = [[0, 2, 1, 2, 1, 0]]
        assert (kept(logits, 1, top_k=1)[0] > 0).tolist() == [0, 1, 0, 1, 0, 0]
        assert (kept(logits, 1, top_k=3)[0] > 0).tolist() == [0, 1, 1, 1, 1, 0]
        assert (kept(logits, 1, top_p=0.1)[0] > 0).tolist() == [0, 1, 0, 1, 0, 0]

    @pytest.mark.parametrize("top_p", [1e-6, 1e-40, 1e-46])
    def test_keep_likely_top_p_that_rounds_to_zero_keeps_the_best(
        self, kept: Callable[..., np.ndarray], top_p: float
    ) -> None:
        """Check a regression: a top-p that rounded to 0 kept all tokens.

        A share of 0 selected no token, and the bound was then read at index -1.
        """
        assert (kept([[0, 1, 2, 3, 1, 0]], 1, top_p=top_p)[0] > 0).tolist() == [0, 0, 0, 1, 0, 0]

    def test_keep_likely_rows_have_their_own_parameters(
        self, kept: Callable[..., np.ndarray]
    ) -> None:
        logits = np.log([[0.5, 0.3, 0.15, 0.05]] * 4)
        counts = kept(logits, 1, top_k=[2, 0, 0, 0], top_p=[1, 0.7, 1, 1], min_p=[0, 0, 0.2, 0])
        assert (counts > 0).astype(int).tolist() == [
            [1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
        ]

    def test_keep_likely_top_p_counts_what_top_k_left(
        self, kept: Callable[..., np.ndarray]
    ) -> None:
        """Check a token whose probability 0.4 is over 0.55 of 0.7 but under 0.55 of 1."""
        logits = np.log([[0.4, 0.3, 0.2, 0.1]])
        assert (kept(logits, 1, top_k=2, top_p=0.55)[0] > 0).tolist() == [1, 0, 0, 0]
        assert (kept(logits, 1, top_p=0.55)[0] > 0).tolist() == [1, 1, 0, 0]

    def test_repeat_penalty_divides_positive_and_multiplies_negative(
        self,
        penalized: Callable[..., np.ndarray],
    ) -> None:
        logits = [[3, -3, 0, 2, -2]]
        assert penalized(logits, [[0, 1, 2]], [3], [2]).tolist() == [[1.5, -6, 0, 2, -2]]

    def test_repeat_penalty_below_one_makes_likelier(
        self, penalized: Callable[..., np.ndarray]
    ) -> None:
        assert penalized([[3, -3, 1]], [[0, 1]], [2], [0.5]).tolist() == [[6, -1.5, 1]]

    @pytest.mark.parametrize("last_n", [0, 1, 2, 3, 4, 9])
    def test_repeat_penalty_sees_the_newest_last_n(
        self, penalized: Callable[..., np.ndarray], last_n: int
    ) -> None:
        recent = [5, 1, 1, 4]  # newest last
        hit = set(recent[max(0, 4 - last_n) :]) if last_n else set()
        expected = [4 if i in hit else 8 for i in range(6)]
        assert penalized([[8] * 6], [recent], [last_n], [2]).tolist() == [expected]

    def test_repeat_penalty_padding_hits_no_token(
        self, penalized: Callable[..., np.ndarray]
    ) -> None:
        assert penalized([[8, 8, 8]], [[-1, -1, 1]], [3], [2]).tolist() == [[8, 4, 8]]

    def test_repeat_penalty_repeated_token_is_penalized_once(
        self, penalized: Callable[..., np.ndarray]
    ) -> None:
        assert penalized([[8, 8, 8]], [[1, 1, 1]], [3], [2]).tolist() == [[8, 4, 8]]

    def test_repeat_penalty_rows_have_their_own_parameters(
        self, penalized: Callable[..., np.ndarray]
    ) -> None:
        result = penalized([[8, 8]] * 3, [[0, 1], [0, 1], [-1, 0]], [2, 1, 2], [2, 4, 1])
        assert result.tolist() == [[4, 4], [8, 2], [8, 8]]

    def test_repeat_penalty_infinite_logits_stay(
        self, penalized: Callable[..., np.ndarray]
    ) -> None:
        assert penalized([[-np.inf, 1]], [[0, 1]], [2], [2]).tolist() == [[-np.inf, 0.5]]

    def test_sample_penalty_changes_the_greedy_choice(
        self, sample: Callable[..., np.ndarray]
    ) -> None:
        penalty = {
            "recent": np.array([[-1, 1]], np.int32),
            "last_n": np.array([2], np.int32),
            "repeat_penalty": np.array([1.5], np.float32),
        }
        assert sample([[1, 4, 3]]).tolist() == [1]
        assert sample([[1, 4, 3]], penalty).tolist() == [2]
        assert sample([[1, 4, 3]], penalty, drawing(noise(1, 3), temperature=0)).tolist() == [2]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
    def test_sample_logits_that_are_no_numbers_give_minus_one(
        self, sample: Callable[..., np.ndarray], bad: float, temperature: float | None
    ) -> None:
        draw = None if temperature is None else filtered(noise(3, 3), temperature=temperature)
        logits = [[0, bad, 1], [0, 2, 1], [-np.inf] * 3]
        first, second, third = sample(logits, None, draw).tolist()
        assert first == -1, f"sample of {logits[0]}: expected -1, got {first}: is max blind to it?"
        assert third == -1, f"sample of {logits[2]}: expected -1, got {third}"
        assert second >= 0

    @pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
    def test_sample_penalty_beyond_float32_gives_minus_one(
        self, sample: Callable[..., np.ndarray], temperature: float | None
    ) -> None:
        """Check a regression: infinite logits gave NaN differences, and a token was drawn."""
        penalty = {
            "recent": np.array([[1]], np.int32),
            "last_n": np.array([1], np.int32),
            "repeat_penalty": np.array([1e-6], np.float32),
        }
        draw = None if temperature is None else filtered(noise(1, 3), temperature=temperature)
        assert sample([[1, 1e38, 3]], penalty, draw).tolist() == [-1]
