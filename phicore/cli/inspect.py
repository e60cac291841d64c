"""`phicore inspect` and `phicore tokenize`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from phicore.cli.options import MODEL_HELP, JsonOption, ModelOption, TokenizerOption
from phicore.streams import read_text


def inspect(
    ref: Annotated[str | None, typer.Argument(metavar="REF", help=MODEL_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the hyperparameters, tensors and tokenizer of a GGUF file."""
    from phicore.console import Console
    from phicore.inspection import inspect_model, print_inspection

    found = inspect_model(ref or Console().default_model())
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        print_inspection(found)


def tokenize(
    text: Annotated[
        str | None, typer.Argument(help="The text; - (or nothing, in a pipe) reads standard input.")
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the chat template, as `generate` does.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens of a text: ids and pieces."""
    from phicore.console import Console
    from phicore.inspection import open_tokenizer

    text = read_text(text)
    tok, template = open_tokenizer(model or Console().default_model(), tokenizer)
    ids = tok.encode(template.render([{"role": "user", "content": text}]) if chat else text)
    if as_json:
        tokens = [{"id": i, "piece": _printable(tok.piece(i))} for i in ids]
        print(json.dumps(tokens, ensure_ascii=False))
    else:
        for i in ids:
            print(f"{i:>7}  {_printable(tok.piece(i))}")


def _printable(piece: str) -> str:
    """A piece on one line; bytes that are no UTF-8, and control characters, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)
