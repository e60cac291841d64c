"""Tests of `phicore.load`, of a model's attributes and of closing a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import with_number, with_value, write_tiny

import phicore
from phicore import ArgumentError, BackendError, GGUFError, PhicoreError, Sampling, SourceError
from phicore.plugins import Plugins


def test_backends_lists_the_installed_ones() -> None:
    infos = {info.name: info for info in phicore.backends()}
    assert infos["numpy"].distribution == "phicore-numpy"
    assert infos["numpy"].devices() == ["cpu"]


def test_model_tells_what_it_is(tiny: Path) -> None:
    seen = []
    with phicore.load(tiny, backend="numpy", progress=lambda *args: seen.append(args)) as model:
        assert (model.backend, model.path, model.reference) == ("numpy", tiny, str(tiny))
        assert model.config.num_hidden_layers == 2
        assert model.tokenizer.vocab_size == model.vocab_size == 352
        assert model.metadata["general.architecture"] == "phi3"
        assert model.context == 320
        assert model.load_s > 0
        assert model.sampling == Sampling()
        peak = model.peak_memory_bytes()
        assert peak is None or peak > tiny.stat().st_size
    assert seen[-1][0] == "loading"
    assert seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_library_prints_nothing(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with phicore.load(tiny, backend="numpy") as model:
        model.generate("Hello", max_tokens=2).text()
    assert capfd.readouterr() == ("", "")


def test_closed_model_says_so(tiny: Path) -> None:
    with phicore.load(str(tiny), backend="numpy") as model:
        generation = model.generate("Hello", max_tokens=3, ignore_eos=True)
        next(generation)
    for use in (lambda: model.generate("Hello"), lambda: model.logits([1])):
        with pytest.raises(PhicoreError, match="the model is closed; load it again"):
            use()
    model.close()  # again does no harm
    assert model.encode("Hello")  # needs no weights


@pytest.mark.parametrize("ctx", [0, -1, 321, 2.5, True, "9"])
def test_ctx_outside_of_its_range(tiny: Path, ctx: object) -> None:
    with pytest.raises(ArgumentError, match="ctx: expected 1 to 320, the model's context, got "):
        phicore.load(tiny, backend="numpy", ctx=ctx)


def test_ctx_smaller_than_the_models(tiny: Path) -> None:
    with phicore.load(tiny, backend="numpy", ctx=12) as model:
        assert model.context == 12
        pieces = list(model.generate([1, 2], ignore_eos=True))
        assert len(pieces) == 10
        assert pieces[-1].finish_reason == "context"


def test_recommended_sampling_is_the_default(tmp_path: Path) -> None:
    def edit(writer) -> None:
        with_number("general.sampling.temp", 0.25)(writer)
        with_number("general.sampling.top_k", 1)(writer)
        with_number("general.sampling.top_p", 0.5)(writer)
        with_number("general.sampling.min_p", 0.125)(writer)
        with_number("general.sampling.penalty_repeat", 1.5)(writer)
        with_number("general.sampling.penalty_last_n", 32)(writer)

    with phicore.load(write_tiny(tmp_path / "m.gguf", edit), backend="numpy") as model:
        assert model.sampling == Sampling(
            temperature=0.25, top_k=1, top_p=0.5, min_p=0.125, repeat_penalty=1.5, repeat_last_n=32
        )
        options = {"max_tokens": 8, "ignore_eos": True}
        recommended = model.generate("Hello", seed=1, **options).text()
        # top_k = 1 leaves only the best token, whatever the seed.
        assert recommended == model.generate("Hello", seed=2, **options).text()
        other = model.generate(
            "Hello", seed=2, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, **options
        )
        assert other.text() != recommended


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("top_k", -1, "top_k", 0),  # llama.cpp and vLLM: all tokens
        ("top_k", 20.0, "top_k", 20),
        ("top_p", 1.0000001, "top_p", 1.0),
        ("top_p", 2.0, "top_p", 1.0),
        ("min_p", -0.5, "min_p", 0.0),
        ("temp", -1.0, "temperature", 0.0),  # llama.cpp: greedy
        ("temp", 0.0, "temperature", 0.0),
    ],
)
def test_recommended_sampling_that_turns_something_off(
    tmp_path: Path, caplog, name: str, value: float, field: str, expected: float
) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_number(f"general.sampling.{name}", value))
    with phicore.load(path, backend="numpy") as model:
        assert model.sampling == replace(Sampling(), **{field: expected})
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_p", 0.0), ("penalty_repeat", 0.0), ("penalty_last_n", -5), ("temp", float("nan"))),
        *(("mirostat", 2), ("xtc_probability", 0.5)),
    ],
)
def test_recommended_sampling_that_cannot_be_used_is_left_out(
    tmp_path: Path, caplog, name: str, value: float
) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_number(f"general.sampling.{name}", value))
    with phicore.load(path, backend="numpy") as model:
        assert model.sampling == Sampling()
    (line,) = caplog.messages
    assert line.startswith(f"m.gguf: recommended, but not used: general.sampling.{name} ")


def test_model_without_a_chat_template(tmp_path: Path) -> None:
    def edit(writer) -> None:
        del writer.kv_data[0]["tokenizer.chat_template"]
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[tokens.index("<|user|>")] = "<|someone|>"

    with phicore.load(write_tiny(tmp_path / "m.gguf", edit), backend="numpy") as model:
        with pytest.raises(PhicoreError, match="chat template: "):
            model.generate("Hello")
        assert len(list(model.generate("Hello", raw=True, max_tokens=2, ignore_eos=True))) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "mxl"}, BackendError, "no backend 'mxl'; installed: "),
        ({"ref": "no-such-model"}, SourceError, "'no-such-model' is not a file"),
        ({"ref": Path("none/m.gguf")}, SourceError, "no such file"),
        ({"tokenizer": "none.json"}, PhicoreError, "none.json: cannot be read"),
    ],
)
def test_load_of_what_is_not_there(tiny: Path, options, error, message: str) -> None:
    with pytest.raises(error) as caught:
        phicore.load(**({"ref": tiny, "backend": "numpy"} | options))
    assert message in str(caught.value)


def test_device_that_does_not_exist(tiny: Path, backend_name: str) -> None:
    with pytest.raises(BackendError, match="no device 'nonsense:7'"):
        phicore.load(tiny, backend=backend_name, device="nonsense:7")


@pytest.mark.parametrize("devices", [0, -1, 1.5, "2", True])
def test_devices_outside_of_their_range(tiny: Path, devices: object) -> None:
    with pytest.raises(ArgumentError, match=r"^devices: expected (int|1 or more), got "):
        phicore.load(tiny, "numpy", devices=devices)  # type: ignore[arg-type]


def test_devices_of_a_backend_that_has_one(tiny: Path, backend_name: str) -> None:
    """A process that sees a single device refuses two."""
    with pytest.raises(BackendError, match=r"^devices: "):
        phicore.load(tiny, backend_name, device="cpu", devices=2)


def test_unknown_architecture_names_the_file(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_value("general.architecture", "mamba"))
    with pytest.raises(GGUFError, match=r"m\.gguf: general\.architecture: 'mamba'"):
        phicore.load(path, backend="numpy")


def test_other_number_of_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    def drop_last(writer) -> None:
        for name in ("tokens", "scores", "token_type"):
            writer.kv_data[0][f"tokenizer.ggml.{name}"].value.pop()

    path = write_tiny(tmp_path / "m.gguf", drop_last)
    with pytest.raises(GGUFError, match=r"'token_embd.weight' has \d+ rows, the tokenizer \d+ tok"):
        phicore.load(path, backend="numpy")


@pytest.mark.parametrize("variables", [{"messages": []}, {"self": 1}, {1: 2}, 5])
def test_template_variables_that_are_none_are_refused(tmp_path: Path, variables: Any) -> None:
    with (
        phicore.load(write_tiny(tmp_path / "m.gguf"), backend="numpy") as model,
        pytest.raises(ArgumentError, match=r"^chat_template_kwargs: "),
    ):
        model.encode("Hi", chat_template_kwargs=variables)


def test_load_without_a_backend_says_so_before_a_model_is_downloaded(monkeypatch) -> None:
    class Nothing(Plugins):
        def __init__(self) -> None:
            super().__init__([])

    monkeypatch.setattr("phicore.loading.Plugins", Nothing)
    monkeypatch.setattr("phicore.loading.resolve", lambda *a, **k: pytest.fail("it was downloaded"))
    with pytest.raises(BackendError, match="no backend is installed; install one with: pip "):
        phicore.load("phi-3-mini")
