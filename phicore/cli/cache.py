"""The command `phicore cache`: what lies in phicore's cache folder, and clearing it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phicore.cli.options import JsonOption
from phicore.errors import ArgumentError

if TYPE_CHECKING:
    from phicore.disk.folders import Item

EXAMPLES = """
\b
Examples:
  phicore cache
  phicore cache clear packed
  phicore cache clear --unused-days 30 --dry-run
"""
DOWNLOADS = "downloads"

cache = typer.Typer(
    rich_markup_mode=None,
    epilog=EXAMPLES,
    help="List what phicore keeps on disk, and clear it. All of it is made again when it is "
    "needed: packed weights, compiled programs and synthetic models.",
)


def complete_kind(incomplete: str) -> list[str]:
    """Complete the name of a kind of contents in the shell."""
    from phicore.disk.folders import KINDS

    return [name for name in KINDS if name.startswith(incomplete)]


@cache.callback(invoke_without_command=True)
def listing(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from phicore.cli.terminal import Console, size, table
    from phicore.disk.folders import KINDS, cache_folder, items

    found = [*items(), *_downloads()]
    if as_json:
        print(json.dumps([_as_json(item) for item in found], ensure_ascii=False, indent=2))
        return
    if found:
        table(["kind", "name", "size", "last use"], _rows(found))
    console = Console()
    for kind, about in KINDS.items():
        total = sum(item.size_bytes for item in found if item.kind == kind)
        if total:
            console.say(f"{kind}: {about.about}, {size(total)}; phicore cache clear {kind}")
    if any(item.kind == DOWNLOADS for item in found):
        console.say(f"{DOWNLOADS}: models of the Hugging Face Hub; hf cache rm removes them")
    console.say(f"folder: {cache_folder()}")


@cache.command("dir")
def folder() -> None:
    """Print the path of the cache folder."""
    from phicore.disk.folders import cache_folder

    print(cache_folder())


@cache.command()
def clear(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KIND",
            help="What to remove: packed, compiled, synthetic. [all]",
            autocompletion=complete_kind,
            show_default=False,
        ),
    ] = None,
    unused_days: Annotated[
        float,
        typer.Option(metavar="N", min=0, help="Remove only what was not used for N days."),
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove what phicore keeps on disk.

    Models in use go on; the next start makes again what it needs. Downloads from the Hub stay:
    `hf cache rm` removes them.
    """
    from phicore.cli.terminal import Console, size
    from phicore.disk.folders import KINDS, unused
    from phicore.disk.folders import clear as remove

    for kind in kinds or ():
        if kind not in KINDS:
            expected = f"one of {', '.join(KINDS)}"
            if kind == DOWNLOADS:
                expected += "; `hf cache rm` removes downloads"
            raise ArgumentError(parameter="kind", expected=expected, got=kind)
    found = unused(list(dict.fromkeys(kinds or KINDS)), unused_days * 86400)
    if not dry_run:
        remove(found)
    for item in found:
        print(item.path)
    verb = "would remove" if dry_run else "removed"
    files, total = sum(item.files for item in found), sum(item.size_bytes for item in found)
    Console().say(f"{verb} {files} file{'s' * (files != 1)}, {size(total)}")


def _rows(found: list[Item]) -> list[list[str]]:
    """Return the rows of the table; what has been compiled for other versions is one row."""
    from phicore.cli.terminal import size

    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in found:
        folder = item.path.parent.name
        groups[item.kind, folder if folder == "kernels" else item.path.name].append(item)
    return [
        [kind, name, size(sum(i.size_bytes for i in each)), _ago(max(i.used_s for i in each))]
        for (kind, name), each in groups.items()
    ]


def _as_json(item: Item) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "path": str(item.path),
        "size_bytes": item.size_bytes,
        "last_use": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(item.used_s)),
    }


def _downloads() -> list[Item]:
    """Return the models in the Hub's cache, which is not phicore's."""
    from phicore.disk.folders import Item
    from phicore.sources import known_models

    return [
        Item(DOWNLOADS, model.path, model.size_bytes, 1, model.path.stat().st_atime)
        for model in known_models()
        if model.path is not None and model.size_bytes and model.reference.startswith("hf:")
    ]


def _ago(used_s: float) -> str:
    """Format the time since a use, in one unit."""
    seconds = max(time.time() - used_s, 0)
    for unit, length_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length_s)
        if count:
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "now"
