"""Tests of `phicore inspect`, `tokenize`, `backends`, `models` and `--version`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from api.tiny_models import Edit, with_value, without, write_tiny

import phicore as api
from phicore.lab import inspection


def test_inspect_shows_the_parts_of_a_file(phicore: Callable, tiny: Path) -> None:
    result = phicore("inspect", tiny)
    lines = [line.split() for line in result.out.splitlines()]
    assert (result.code, result.err) == (0, "")
    assert ["architecture", "phi3"] in lines
    assert ["bits", "per", "weight", "32.00"] in lines
    assert ["num_hidden_layers", "2"] in lines
    assert ["rms_norm_eps", "1e-05"] in lines
    assert ["end", "<|endoftext|>", "<|end|>"] in lines
    assert ["name", "type", "shape", "bytes"] in lines
    assert ["token_embd.weight", "F32", "352", "x", "64", "90112"] in lines
    assert "\x1b" not in result.out


def test_inspect_json_agrees_with_the_file(phicore, tiny: Path) -> None:
    found = json.loads(phicore("inspect", "--json", tiny).out)
    assert found["size_bytes"] == tiny.stat().st_size
    assert found["weights"] == sum(
        t["shape"][0] * (t["shape"][1] if len(t["shape"]) > 1 else 1) for t in found["tensors"]
    )
    assert 8 * sum(t["size_bytes"] for t in found["tensors"]) / found["weights"] == 32
    assert found["bits_per_weight"] == 32
    assert found["hyperparameters"]["num_key_value_heads"] == 2
    assert found["tokenizer"]["vocab_size"] == 352
    assert found["metadata"]["tokenizer.ggml.tokens"] == "array of 352"
    assert found["metadata"]["general.architecture"] == "phi3"


def test_inspect_shows_what_is_left_of_a_file_with_gaps(phicore, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", without("tokenizer.ggml.model"))
    result = phicore("inspect", path)
    assert result.code == 0
    assert "tokenizer.ggml.model: missing" in result.out
    assert "num_hidden_layers" in result.out


def test_inspect_of_another_architecture_shows_its_tensors(phicore, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_value("general.architecture", "mamba"))
    result = phicore("inspect", path)
    assert result.code == 0
    assert "'mamba' is not supported" in result.out
    assert "blk.1.ffn_down.weight" in result.out


def with_any(key: str, value: Any) -> Edit:
    """Set a key to a value of any type, even of one that the key does not allow."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(
            key,
            value,
            gguf.GGUFValueType.get_type(value),
            gguf.GGUFValueType.INT32 if isinstance(value, list) else None,
        )

    return edit


@pytest.mark.parametrize(
    "key",
    [
        *("general.architecture", "general.name", "phi3.expert_count", "phi3.block_count"),
        *("phi3.attention.value_length", "tokenizer.ggml.model", "tokenizer.chat_template"),
        *("tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.token_type"),
    ],
)
@pytest.mark.parametrize("value", [[1, 2], list(range(200))], ids=["short", "long"])
def test_array_in_place_of_a_value_is_no_traceback(
    phicore, tmp_path: Path, key: str, value: list[int]
) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_any(key, value))
    assert phicore("inspect", path).code == 0
    shown = json.loads(phicore("inspect", "--json", path).out)["metadata"][key]
    assert shown == (value if len(value) < 10 else "array of 200")
    for command in (["tokenize"], ["generate", "-b", "numpy", "-n", "1"]):
        result = phicore(*command, "-m", path, "the")
        assert result.code in (0, 1)
        assert (result.code == 1) == ("phicore: " in result.err)


def test_inspect_json_number_that_is_none_is_null(phicore, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_any("general.odd", float("nan")))
    out = phicore("inspect", "--json", path).out
    assert "NaN" not in out
    assert json.loads(out)["metadata"]["general.odd"] is None


def test_plain_values_inside_of_arrays() -> None:
    value = [np.array([1.5, np.inf]), ["a\udc80", [np.float32("nan")]], np.zeros(17)]
    expected = [[1.5, None], ["a\\udc80", [None]], "array of 17"]
    assert inspection._plain(value) == expected
    json.dumps(expected, allow_nan=False)


def test_tokenizer_that_was_found_gives_way_and_one_that_was_given_does_not(
    phicore, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    found = json.loads(phicore("inspect", "--json", path).out)["tokenizer"]
    assert found["source"].startswith(f"GGUF (llama) instead of {other}: not a tokenizer.json")
    assert phicore("tokenize", "-m", path, "the").code == 0
    result = phicore("tokenize", "-m", path, "--tokenizer", other, "the")
    assert (result.code, result.out) == (1, "")
    assert f"{other}: not a tokenizer.json" in result.err


def test_inspect_prints_no_control_characters_of_the_file(phicore, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", with_value("general.name", "a\x1b[31m\nb"))
    assert r"a\x1b[31m\nb" in phicore("inspect", path).out


def test_tokenize_prints_ids_and_pieces(phicore, tiny: Path) -> None:
    result = phicore("tokenize", "-m", tiny, "the é\n")
    assert (result.code, result.err) == (0, "")
    assert [line.split() for line in result.out.splitlines()] == [
        ["1", "<s>"],
        ["263", "▁the"],
        ["276", "▁"],
        ["198", "<0xC3>"],
        ["172", "<0xA9>"],
        ["13", "<0x0A>"],
    ]


def test_tokenize_json_and_stdin(phicore, tiny: Path) -> None:
    result = phicore("tokenize", "-m", tiny, "--json", stdin=b"the\n")
    assert json.loads(result.out) == [{"id": 1, "piece": "<s>"}, {"id": 263, "piece": "▁the"}]


def test_tokenize_chat_gives_the_prompt_of_generate(phicore, tiny: Path) -> None:
    tokens = json.loads(phicore("tokenize", "-m", tiny, "--chat", "--json", "the").out)
    generated = phicore("generate", "-m", tiny, "-b", "numpy", "-n", 1, "--json", "the")
    assert [t["id"] for t in tokens] == json.loads(generated.out)["prompt_ids"]
    assert tokens[1]["piece"] == "<|user|>"


def test_backends_lists_what_is_installed(phicore) -> None:
    rows = json.loads(phicore("backends", "--json").out)
    assert [row["name"] for row in rows] == [info.name for info in api.backends()]
    (row,) = [row for row in rows if row["name"] == "numpy"]
    assert row == {
        "name": "numpy",
        "distribution": "phicore-numpy",
        "version": version("phicore-numpy"),
        "devices": ["cpu"],
        "status": "usable",
    }
    lines = phicore("backends").out.splitlines()
    assert lines[0].split() == ["backend", "distribution", "devices", "status"]
    assert [line.split()[0] for line in lines[1:]] == [row["name"] for row in rows]


def test_models_lists_the_aliases_and_the_default(phicore, tiny: Path, monkeypatch) -> None:
    monkeypatch.setenv("PHICORE_MODEL", str(tiny))
    result = phicore("models")
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names[:4] == ["model", "phi-3-mini", "phi-3-mini-fp16", "smollm2"]
    assert result.err == f"without --model: {tiny} (from PHICORE_MODEL)\n"
    rows = json.loads(phicore("models", "--json").out)
    assert rows[0]["reference"].startswith("hf:microsoft/Phi-3-mini-4k-instruct-gguf/")


def test_version(phicore) -> None:
    result = phicore("--version")
    assert (result.code, result.out, result.err) == (0, f"phicore {version('phicore')}\n", "")
