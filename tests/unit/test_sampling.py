"""Tests of the host's part of sampling: parameters and random numbers."""

from dataclasses import asdict

import numpy as np
import pytest

from phicore.errors import ArgumentError
from phicore.network.sampler import uniforms
from phicore.network.sampling import OTHER_KEYS, Sampling, recommended

BAD = [
    ("temperature", -0.1, "temperature: expected 0 (greedy), or 1e-6 to 1e6, got -0.1"),
    ("temperature", float("nan"), "temperature: expected 0 (greedy), or 1e-6 to 1e6, got nan"),
    ("temperature", float("inf"), "temperature: expected 0 (greedy), or 1e-6 to 1e6, got inf"),
    ("temperature", 1e-50, "temperature: expected 0 (greedy), or 1e-6 to 1e6, got 1e-50"),
    ("temperature", "0.7", "temperature: expected float, got '0.7'"),
    ("temperature", True, "temperature: expected float, got True"),
    ("top_k", -1, "top_k: expected 0 (all) to 2**31 - 1, got -1"),
    ("top_k", 2**31, "top_k: expected 0 (all) to 2**31 - 1, got 2147483648"),
    ("top_k", 1.0, "top_k: expected int, got 1.0"),
    ("top_p", 0, "top_p: expected more than 0, at most 1, got 0"),
    ("top_p", 1.01, "top_p: expected more than 0, at most 1, got 1.01"),
    ("top_p", float("nan"), "top_p: expected more than 0, at most 1, got nan"),
    ("top_p", None, "top_p: expected float, got None"),
    ("min_p", -0.5, "min_p: expected 0 to 1, got -0.5"),
    ("min_p", 1.5, "min_p: expected 0 to 1, got 1.5"),
    ("repeat_penalty", 0, "repeat_penalty: expected 1e-6 to 1e6, got 0"),
    ("repeat_penalty", 1e39, "repeat_penalty: expected 1e-6 to 1e6, got 1e+39"),
    ("repeat_penalty", -1.1, "repeat_penalty: expected 1e-6 to 1e6, got -1.1"),
    ("repeat_penalty", float("inf"), "repeat_penalty: expected 1e-6 to 1e6, got inf"),
    ("repeat_last_n", -2, "repeat_last_n: expected -1 (all) or more, got -2"),
    ("repeat_last_n", 64.0, "repeat_last_n: expected int, got 64.0"),
    ("repeat_last_n", False, "repeat_last_n: expected int, got False"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda v: str(v)[:20])
def test_sampling_bad_argument_says_what_is_allowed(name: str, value: object, message: str):
    with pytest.raises(ArgumentError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_last_n": 0},
        {"temperature": 1e3, "top_k": 2**31 - 1, "top_p": 1e-6, "min_p": 1.0},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "repeat_last_n": -1},
        {"repeat_penalty": 0.5},
    ],
    ids=["lowest", "highest", "numpy", "reward"],
)
def test_sampling_allowed_arguments_are_kept(arguments: dict[str, float]):
    sampling = Sampling(**arguments)
    assert all(getattr(sampling, name) == value for name, value in arguments.items())


def test_sampling_defaults_are_those_of_llama_cpp():
    """Older defaults had no filter, and a third of the demo model's answers went wrong."""
    assert asdict(Sampling()) == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
    }


def test_sampling_properties_tell_what_has_an_effect():
    assert Sampling(temperature=0).is_greedy
    assert not Sampling(temperature=1e-6).is_greedy
    none = {"top_k": 0, "top_p": 1, "min_p": 0}
    assert not Sampling(**none).has_filter
    one = ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1})
    assert all(Sampling(**none | filter_).has_filter for filter_ in one)
    assert Sampling(repeat_penalty=1.1).has_penalty
    assert not Sampling(repeat_penalty=1.0).has_penalty
    assert not Sampling(repeat_last_n=0).has_penalty


def test_uniforms_of_a_known_seed_and_step_never_change():
    """Every later version must give the same text for a seed.

    NumPy's Philox increments its counter before it computes, so the words are Philox4x64-10 of key
    42 and counter (7 << 64) + 1. `test_uniforms_equal_the_published_philox` checks the generator
    itself.
    """
    words = [round(float(x) * 2**32 - 0.5) for x in uniforms(42, 7, 3).astype(np.float64)]
    raw = np.random.Philox(key=42, counter=7 << 64).random_raw(2)
    expected = [int(raw[0]) & 0xFFFFFFFF, int(raw[0]) >> 32, int(raw[1]) & 0xFFFFFFFF]
    assert all(abs(w - e) <= 256 for w, e in zip(words, expected, strict=True))  # float32 rounds
    assert words == [3148464128, 1933879808, 2825394688]


def test_uniforms_equal_the_published_philox():
    """Philox4x64-10 of key 0 and counter 0 gives 16554d9eca36314c... (Random123, kat_vectors)."""
    assert int(np.random.Philox(key=0, counter=2**256 - 1).random_raw()) == 0x16554D9ECA36314C


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 1), (2**64 - 1, 10**6)])
def test_uniforms_are_the_middles_of_2_to_the_32_intervals(seed: int, step: int):
    raw = np.random.Philox(key=seed, counter=step << 64).random_raw(5000)
    words = [half for word in raw.tolist() for half in (word & 0xFFFFFFFF, word >> 32)][:-1]
    middles = np.float32([(word + 0.5) / 2**32 for word in words])
    assert np.array_equal(uniforms(seed, step, 9999), np.minimum(middles, np.float32(1 - 2**-24)))


@pytest.mark.parametrize("size", [1, 2, 5, 32064])
def test_uniforms_are_in_range_and_of_the_size(size: int):
    numbers = uniforms(2**64 - 1, 500, size)
    assert numbers.shape == (size,)
    assert numbers.dtype == np.float32
    assert ((numbers > 0) & (numbers < 1)).all()


def test_uniforms_of_other_steps_and_seeds_are_others():
    rows = [uniforms(seed, step, 64) for seed in (0, 1) for step in range(100)]
    assert len(np.unique(rows)) > 0.999 * 200 * 64


def test_uniforms_largest_raw_number_is_below_one(monkeypatch: pytest.MonkeyPatch):
    class Largest:
        def __init__(self, **_: int) -> None: ...

        def random_raw(self, count: int) -> np.ndarray:
            return np.full(count, 2**64 - 1, np.uint64)

    monkeypatch.setattr(np.random, "Philox", Largest)
    assert (uniforms(0, 0, 3) < 1).all()


@pytest.mark.parametrize("key", sorted(OTHER_KEYS))
@pytest.mark.parametrize("value", [np.array([0, 0]), [0, 0], "0", 1])
def test_recommended_value_of_any_type_that_cannot_be_used_is_left_out(key: str, value: object):
    sampling, (left_out,) = recommended({key: value})
    assert sampling == Sampling()
    assert left_out.startswith(f"{key} ")
    assert recommended({key: OTHER_KEYS[key]}) == (Sampling(), [])


def test_recommended_value_in_an_array_or_as_another_number_is_used():
    values = {"general.sampling.temp": [0.5], "general.sampling.top_k": np.array([7.0])}
    assert recommended(values) == (Sampling(temperature=0.5, top_k=7), [])
