"""Requests to the engine, made of the arguments of `Model.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from phicore.engine import Request
from phicore.engine.request import ROPE_FACTORS
from phicore.errors import ArgumentError, TokenizerError
from phicore.extras import missing
from phicore.grammar import AllowedTokens, Constraint, Vocabulary, constrained, constraint_of
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.prompting.arguments import checked_ids
from phicore.prompting.prompts import Prompt, Prompts
from phicore.text.stop_strings import checked_stops
from phicore.tools import Tool, ToolUse, tool_use
from phicore.tools.choices import checked_tools
from phicore.tools.formats import GENERIC


class Requests:
    """Makes the requests to a model.

    Args:
        prompts: Makes the prompts.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._tokenizer = prompts.tokenizer

    def request(
        self,
        prompt: Prompt,
        defaults: Sampling,
        processor: Callable[[LogitsProcessor | str], LogitsProcessor],
        *,
        max_tokens: int = 256,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processors: Sequence[LogitsProcessor | str] = (),
        rope_factors: str = ROPE_FACTORS[0],
        logprobs: int | None = None,
        speculation: bool = True,
        prediction: str | Sequence[int] | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> Request:
        """Make a request from the arguments of `Model.generate`, and check it.

        Args:
            defaults: The parameters of the sampler that are not given.
            processor: Returns a logits processor, also for `NAME=ARGUMENT`.
        """
        known = {field.name for field in fields(Sampling)}
        if unknown := sampling.keys() - known:
            raise ArgumentError(
                f"unknown parameter; the parameters of the sampler are {', '.join(sorted(known))}",
                parameter=min(unknown),
            )
        if isinstance(processors, str) or not isinstance(processors, Sequence):
            raise ArgumentError(parameter="processors", expected="a list", got=processors)
        chosen = {name: value for name, value in sampling.items() if value is not None}
        ends = frozenset() if ignore_eos else self._tokenizer.end_token_ids
        all_processors = [processor(p) for p in processors]
        constraint = constraint_of(json_schema=json_schema, regex=regex, grammar=grammar)
        use = self._tool_use(checked_tools(tools), tool_choice, parallel_tool_calls)
        if use is not None:
            if constraint is not None:
                raise ArgumentError("not together with tools", parameter=constraint.name)
            use, constraint = self._constrained(use, ignore_eos)
        if constraint is not None:
            if ignore_eos:
                raise ArgumentError("not together with ignore_eos", parameter=constraint.name)
            all_processors.append(AllowedTokens(self.grammar_vocabulary, constraint))
        return Request(
            self._prompts.encode(
                prompt,
                system=system,
                raw=raw,
                tools=None if use is None else tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            ),
            replace(defaults, **chosen),
            max_tokens=max_tokens,
            seed=seed,
            ends=ends | self._stop_tokens(checked_stops(stop)),
            stop=stop,
            processors=all_processors,
            rope_factors=rope_factors,
            logprobs=logprobs,
            tools=use,
            speculation=speculation,
            prediction=self._predicted(prediction),
        )

    def _predicted(self, prediction: Any) -> Sequence[int]:
        if prediction is None:
            return ()
        if isinstance(prediction, str):
            try:
                return self._tokenizer.encode(prediction, add_bos=False, parse_special=False)
            except TokenizerError as error:
                raise ArgumentError(str(error), parameter="prediction") from error
        return checked_ids(
            prediction, self._tokenizer.vocab_size, "prediction", "a string or token ids"
        )

    def _tool_use(self, tools: Sequence[Tool], choice: Any, is_parallel: Any) -> ToolUse | None:
        """Return what an answer may call, None if it may call nothing."""
        if not isinstance(is_parallel, bool):
            parameter = "parallel_tool_calls"
            raise ArgumentError(parameter=parameter, expected="True or False", got=is_parallel)
        if not tools:  # the template is not asked, since it may be malformed
            return tool_use(GENERIC, tools, choice)
        return tool_use(self._prompts.call_format, tools, choice, is_parallel=is_parallel)

    def _constrained(self, use: ToolUse, ignore_eos: bool) -> tuple[ToolUse, Constraint | None]:
        """Constrain the calls of an answer, if the library is there or the request needs it."""
        is_there = find_spec("llguidance") is not None
        if not use.needs_grammar:
            if ignore_eos or not is_there or not self._tokenizer.end_token_ids:
                return use, None
        elif not is_there:
            problem = missing("llguidance", "forced and strict calls")
            raise ArgumentError(problem, parameter="tools")
        return constrained(use, self.grammar_vocabulary, self._tokenizer.control_id)

    @cached_property
    def grammar_vocabulary(self) -> Vocabulary:
        """Return the tokens as constraints need them."""
        return Vocabulary(self._tokenizer)

    def _stop_tokens(self, stops: Sequence[str]) -> frozenset[int]:
        """Return the control tokens among the stop strings: they are no text, but end it too.

        Raises:
            ArgumentError: If a stop string has a control token and text, which no text can match.
        """
        found = set()
        for stop in stops:
            for id in self._tokenizer.control_tokens_in(stop):
                piece = self._tokenizer.piece(id)
                if stop.rstrip() != piece:  # the token comes before white space
                    raise ArgumentError(
                        f"{stop!r:.40} has the control token {piece!r} in it, which is no text; "
                        f"give {piece!r} alone",
                        parameter="stop",
                    )
                found.add(id)
        return frozenset(found)
