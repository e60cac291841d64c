"""The commands `phicore inspect` and `phicore tokenize`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from phicore.cli.options import (
    MODEL_HELP,
    JsonOption,
    ModelOption,
    TokenizerOption,
    model_or_default,
)
from phicore.cli.stdin import read_text
from phicore.cli.terminal import Console, size, table


def inspect(
    ref: Annotated[str | None, typer.Argument(metavar="REF", help=MODEL_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a GGUF file holds."""
    from phicore.lab.inspection import inspect_model

    found = inspect_model(model_or_default(ref, Console().say))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_inspection(found)


def tokenize(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT|-",
            help="The text. With -, or without this argument in a pipe, it is read from standard "
            "input.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Apply the chat template first, as `generate` does. Without this the text is "
            "taken as with `generate --raw`.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens of a text: ids and pieces."""
    from phicore.lab.inspection import open_tokenizer

    text = read_text(text)
    tok, template = open_tokenizer(model_or_default(model, Console().say), tokenizer)
    ids = tok.encode(template.render([{"role": "user", "content": text}]) if chat else text)
    if as_json:
        tokens = [{"id": i, "piece": _printable(tok.piece(i))} for i in ids]
        print(json.dumps(tokens, ensure_ascii=False))
    else:
        for i in ids:
            print(f"{i:>7}  {_printable(tok.piece(i))}")


def _printable(piece: str) -> str:
    """Escape a piece's control characters and bytes that are not UTF-8, so it fits on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def _print_inspection(found: dict[str, Any]) -> None:
    """Print the result of `inspect_model` as text and a table."""
    bits = found["bits_per_weight"]
    print(f"file             {found['file']}")
    print(f"name             {_shown(found['name'])}")
    print(f"architecture     {_shown(found['architecture'])}")
    print(f"size             {size(found['size_bytes'])}")
    print(f"weights          {found['weights'] / 1e6:.1f} M")
    print(f"bits per weight  {f'{bits:.2f}' if bits else '-'}")
    for title in ("hyperparameters", "tokenizer"):
        print(f"\n{title}")
        for key, value in found[title].items():
            print(f"  {key:<32} {_shown(value)}")
    types = Counter(t["type"] for t in found["tensors"])
    print(f"\ntensors: {len(found['tensors'])} ({', '.join(f'{n} {t}' for t, n in types.items())})")
    table(
        ["name", "type", "shape", "bytes"],
        [
            [t["name"], t["type"], " x ".join(map(str, t["shape"])), str(t["size_bytes"])]
            for t in found["tensors"]
        ],
    )


def _shown(value: Any) -> str:
    """Format a value as readable text on one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"  # files hold float32
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
