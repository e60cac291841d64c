"""Answers to a file of requests: one JSON object a line in, one JSON object a line out."""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from phicore.cli.terminal import ProgressLine, duration
from phicore.disk.replacing import replacing
from phicore.errors import ArgumentError, PhicoreError

if TYPE_CHECKING:
    from phicore.engine import Request
    from phicore.generation import Answer
    from phicore.model import Model
    from phicore.text.logprobs import TokenLogprobs
    from phicore.text.tokenizer import Tokenizer

_PROMPTS = ("prompt", "messages")
_BEGINNING = '{"id": '  # of every answer
OPTIONS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
    *("seed", "stop", "ignore_eos", "system", "raw", "tools", "documents", "chat_template_kwargs"),
    *("processors", "rope_factors", "logprobs", "json_schema", "regex", "grammar"),
    *("tool_choice", "parallel_tool_calls", "speculation", "prediction"),
)
"""The keys of a line that are arguments of `Model.generate`."""


class Batch:
    """The requests of a file, and the answers that are there already.

    Attributes:
        source: The file of requests.
        out: The file of answers; None is standard output, which starts anew every time.
        total: The number of lines with a request.
        problems: What is wrong with lines, "line 3: ...".
    """

    def __init__(self, source: Path, out: Path | None) -> None:
        """Read the identifiers of the answers that are there, and count the requests.

        Raises:
            ArgumentError: If a file cannot be read.
        """
        self.source = source
        self.out = out
        self.problems: list[str] = []
        self._lines = _read(source, "batch").split("\n")
        self.total = sum(bool(line.strip()) for line in self._lines)
        self._answered: dict[Any, str | None] = {}
        self._clean: str | None = None
        if out is not None and out.exists():
            if out.samefile(source):
                raise ArgumentError("the file of requests is no place for answers", parameter="out")
            self._answered, self._clean = _answered(out)

    @property
    def done(self) -> int:
        """Return the number of answers that were there already."""
        return len(self._answered)

    def prepare(self, reference: str) -> None:
        """Check that the answers that are there come from the same model, and remove the others.

        Raises:
            ArgumentError: If they come from another one, or the file cannot be written.
        """
        others = {model for model in self._answered.values() if model != reference}
        if others:
            raise ArgumentError(
                f"{self.out} has answers of {others.pop()}; name another file", parameter="out"
            )
        if self.out is not None and self._clean is not None:
            with _writing(self.out), replacing(self.out) as new:
                new.write_text(self._clean, encoding="utf-8")

    def requests(self, make: Callable[..., Request], ids: list[Any]) -> Iterator[Request]:
        """Make the requests that have no answer yet, one by one; bad lines are noted.

        Args:
            make: `Model.request`, with the defaults of the command line.
            ids: Gets the identifier of each request.
        """
        seen: set[Any] = set()
        for number, line in enumerate(self._lines, start=1):
            if not line.strip():
                continue
            try:
                id, prompt, options = _parsed(line, number)
                if id in seen:
                    raise ArgumentError(f"id {id!r} occurs twice")
                seen.add(id)
                if id in self._answered:
                    continue
                request = make(prompt, **options)
            except PhicoreError as error:
                self.problems.append(f"line {number}: {error}")
                continue
            ids.append(id)
            yield request


def _read(path: Path, parameter: str, *, is_cut: bool = False) -> str:
    """Read a text.

    Args:
        is_cut: Whether the last character may be cut, since a program that wrote it was killed.
    Raises:
        ArgumentError: If the file cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not is_cut)
        return text.replace("\r\n", "\n")
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", parameter=parameter) from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not UTF-8 text", parameter=parameter) from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the system into one that names the file of answers.

    Raises:
        ArgumentError: If the file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except OSError as error:
        problem = f"{path}: cannot be written: {error.strerror}; the answers in it stay"
        raise ArgumentError(problem, parameter="out") from error


def _parsed(line: str, number: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return the identifier, the prompt and the options of a line.

    Raises:
        ArgumentError: If the line is no JSON object, has no prompt, or has an unknown key.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentError("expected a JSON object")
    if unknown := found.keys() - {"id", *_PROMPTS, *OPTIONS}:
        known = ", ".join(("id", *_PROMPTS, *OPTIONS))
        raise ArgumentError(f"unknown key {min(unknown)!r}; the keys are {known}")
    prompts = [found[name] for name in _PROMPTS if name in found]
    if len(prompts) != 1:
        raise ArgumentError("expected 'prompt' or 'messages'")
    id = found.get("id", number)
    if not _is_id(id):
        raise ArgumentError(f"id: expected text or a whole number, found {id!r:.40}")
    options = {name: value for name, value in found.items() if name in OPTIONS}
    return id, prompts[0], {name: value for name, value in options.items() if value is not None}


def _is_id(id: Any) -> bool:
    """Return whether a value can identify a request: a whole number, or valid text."""
    if isinstance(id, str):
        return not any("\ud800" <= character <= "\udfff" for character in id)
    return isinstance(id, int) and not isinstance(id, bool)


def _answered(out: Path) -> tuple[dict[Any, str | None], str | None]:
    """Read a file of answers.

    Returns:
        The models of the answers by identifier; and the text of the file without the last line, if
        an interruption has cut it, and without errors, or None if it has none of these.
    Raises:
        ArgumentError: If the file has something else in it.
    """
    found: dict[Any, str | None] = {}
    kept, is_clean = [], True
    *lines, last = _read(out, "out", is_cut=True).split("\n")
    if last and _is_whole(last):  # all of it was written but the end of the line
        lines.append(last)
        last, is_clean = "", False
    for line in lines:
        try:
            answer = json.loads(line)
            id, model = answer["id"], answer["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            id = model = None
        if not _is_id(id) or not isinstance(model, str):
            raise _no_answers(out)
        if "error" in answer:
            is_clean = False
            continue
        found[id] = model
        kept.append(f"{line}\n")
    if last:
        is_clean = False
        if not last.startswith(_BEGINNING[: len(last)]):
            raise _no_answers(out)
    return found, None if is_clean else "".join(kept)


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _no_answers(out: Path) -> ArgumentError:
    return ArgumentError(f"{out}: its lines are no answers; name another file", parameter="out")


def run(
    batch: Batch,
    model: Model,
    defaults: Mapping[str, Any],
    *,
    ordered: bool,
    line: ProgressLine,
    swallowed: Collection[object] = (),
) -> int:
    """Write the answers; return the number of requests without an answer.

    Args:
        defaults: Options of `Model.request` for requests that do not give them.
        ordered: Whether answers are written in the order of the requests.
        line: Shows progress.
        swallowed: The interrupts that a library has swallowed so far.
    """
    batch.prepare(model.reference)
    ids: list[Any] = []

    def make(prompt: Any, **options: Any) -> Request:
        return model.request(prompt, **{**defaults, **options})

    answers = model.generate_many(batch.requests(make, ids), ordered=ordered)
    if batch.out is None:
        return _write(answers, sys.stdout, ids, batch, model, line, swallowed)
    with _writing(batch.out), batch.out.open("a", encoding="utf-8") as file:
        return _write(answers, file, ids, batch, model, line, swallowed)


def _write(
    answers: Iterable[Answer],
    file: TextIO,
    ids: list[Any],
    batch: Batch,
    model: Model,
    line: ProgressLine,
    swallowed: Collection[object],
) -> int:
    started, tokens, failed = time.perf_counter(), 0, 0
    for done, answer in enumerate(answers, start=1):
        tokens += len(answer.token_ids)
        if answer.error is not None:
            failed += 1
            batch.problems.append(f"id {ids[answer.index]!r}: {answer.error}")
        print(json.dumps(_line(ids[answer.index], answer, model), ensure_ascii=False), file=file)
        file.flush()
        took_s = time.perf_counter() - started
        left = batch.total - batch.done - done - len(batch.problems)
        left_s = took_s / done * max(left, 0)
        line.tell(
            f"{batch.done + done} of {batch.total} answers, {tokens / took_s:.1f} tokens/s, "
            f"{duration(left_s)} left"
        )
        if swallowed:
            raise KeyboardInterrupt
    return failed


def _line(id: Any, answer: Answer, model: Model) -> dict[str, Any]:
    found: dict[str, Any] = {"id": id, "model": model.reference}
    if answer.error is not None:
        return {**found, "error": str(answer.error)}
    assert answer.generation is not None, "there is no error"
    found |= {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "seed": answer.generation.seed,
        "prompt_tokens": len(answer.generation.prompt_ids),
        "generated_tokens": len(answer.token_ids),
    }
    if answer.generation.request.tools is not None:
        found["message"] = answer.message()
    if answer.logprobs:
        found["logprobs"] = [_logprobs(known, model.tokenizer) for known in answer.logprobs]
    return found


def _logprobs(known: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "piece": tokenizer.piece(token), "logprob": logprob}

    return {**one(known.token, known.logprob), "top": [one(*pair) for pair in known.top]}
