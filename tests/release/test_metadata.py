"""Tests of what distributions declare: what they import, versions, licenses, extras."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from release.building import ROOT, Project, projects

from phicore import PhicoreError, extras

ALL = projects()
each_project = pytest.mark.parametrize("project", ALL, ids=lambda project: project.name)
DISTRIBUTIONS = {"markdown_it": "markdown-it-py"}
"""Distributions whose names are not those of their modules."""


def imported(project: Project) -> dict[str, set[str]]:
    """Return the distributions whose modules a package imports, each with the files that do so."""
    found: dict[str, set[str]] = {}
    for path in project.package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name != project.package.name:
                    needed = canonicalize_name(DISTRIBUTIONS.get(name, name))
                    found.setdefault(needed, set()).add(path.name)
    return found


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


@each_project
def test_what_a_package_imports_is_what_its_distribution_asks_for(project: Project) -> None:
    found = imported(project)
    asked = names(project.about["dependencies"])
    optional = {canonicalize_name(n) for each in extras.LIBRARIES.values() for n in each}
    if project.name == "phicore":
        assert optional <= found.keys()
        asked |= optional
    missing = {name: sorted(files) for name, files in found.items() if name not in asked}
    assert not missing


def test_libraries_that_are_optional_are_in_the_extra_that_a_message_names(monkeypatch) -> None:
    [core] = (project for project in ALL if project.name == "phicore")
    declared = core.about["optional-dependencies"]
    for extra, libraries in extras.LIBRARIES.items():
        assert {canonicalize_name(name) for name in libraries} == names(declared[extra])
        for name in libraries:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, name, None)
                with pytest.raises(PhicoreError) as caught:
                    extras.check(extra, "something")
            assert str(caught.value) == (
                f"{name} is missing for something; install it with: pip install 'phicore[{extra}]'"
            )


@each_project
def test_distributions_of_this_repository_ask_for_releases_that_fit(project: Project) -> None:
    [core] = (each for each in ALL if each.name == "phicore")
    asked = [*project.about["dependencies"]]
    for extra in project.about.get("optional-dependencies", {}).values():
        asked += extra
    own = {each.name: each.about["version"] for each in ALL}
    found = [r for r in map(Requirement, asked) if r.name in own]
    assert found or project.name == "phicore-array-api-strict"
    assert project.about["version"] == core.about["version"]
    for needed in found:
        now = Version(own[needed.name])
        assert now in needed.specifier
        assert Version(f"{now.major}.{now.minor}.99") in needed.specifier
        assert Version(f"{now.major}.{now.minor + 1}.0") not in needed.specifier


@each_project
def test_license_and_python_are_the_same_everywhere(project: Project) -> None:
    about = project.about
    assert about["license"] == "Apache-2.0"
    assert "LICENSE" in about["license-files"]
    license = (project.folder / "LICENSE").read_text()
    assert license == (ROOT / "LICENSE").read_text()
    assert about["requires-python"] == ">=3.11"
    assert (project.folder / about["readme"]).is_file()
    assert not [c for c in about["classifiers"] if c.startswith("License ::")]
    assert (project.package / "py.typed").is_file()
    assert "Typing :: Typed" in about["classifiers"]


def test_readme_of_a_distribution_says_what_it_is() -> None:
    for project in ALL:
        assert (project.folder / "README.md").read_text().startswith(f"# {project.name}\n")


def test_an_import_in_a_function_is_found(tmp_path: Path) -> None:
    package = tmp_path / "phicore_mine"
    package.mkdir()
    (package / "a.py").write_text(
        "import os\nfrom . import b\n\ndef f():\n    import scipy.stats\n"
    )
    assert imported(Project(tmp_path, {"name": "phicore-mine"})).keys() == {"scipy"}
