"""The engine, which accepts requests and runs them step by step, many at a time.

A sequence waits, is read (its prompt runs in chunks, in a row of its own), is ready, and then runs
as a row of a batch until it ends. Rows share each decode step. The text of a sequence does not
depend on the others: a row sees its own slots, and its random numbers follow from its own seed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from phicore.backend import Backend, Params, ProgramStore
from phicore.engine import logprobs
from phicore.engine.batches import Batches
from phicore.engine.calls import NOT_FINITE, Calls
from phicore.engine.drafts import Drafter
from phicore.engine.loading import Weights
from phicore.engine.memory import Memory
from phicore.engine.places import Places
from phicore.engine.prefixes import Prefixes
from phicore.engine.prompts import Prompts
from phicore.engine.request import Request, check_logprobs
from phicore.engine.runner import Runner
from phicore.engine.scheduler import Scheduler
from phicore.engine.sequence import Output, Sequence
from phicore.engine.speculation import Speculation
from phicore.engine.team import Team
from phicore.engine.warming import decode_each_size
from phicore.errors import ArgumentError, ContextError, PhicoreError, SessionError
from phicore.gguf.reader import GGUFFile
from phicore.network.architectures import Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.network.weights import load_params, read_config
from phicore.progress import Progress, silent
from phicore.text.logprobs import TokenLogprobs

PAUSE_S = 0.001
"""For how long a lock is left to others. One that is taken again at once stays with its thread."""


class Engine:
    """Runs the requests of one model on one backend. Several threads may use it.

    Attributes:
        runner: The runner, which runs tokens on the device.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        progress: Progress = silent,
        scheduler: Scheduler | None = None,
        prefix_bytes: int = 0,
        kv_bytes: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """Make an engine.

        Args:
            scheduler: The queue; None makes one with the defaults.
            prefix_bytes: The largest number of bytes of the prefix cache.
            kv_bytes: The largest number of bytes of all caches of keys and values together; None
                sets no limit. A sequence waits until it fits beside the others. A single sequence
                is never kept from growing, unless `fit_context` is called.
            drafter: Guesses tokens, which are then checked several at a time. None guesses none.
                The answers are the same in any case.
        """
        self.runner = runner
        self._lock = threading.Lock()
        self._aborted: deque[Sequence] = deque()
        of_drafter = 0 if drafter is None else drafter.slot_bytes
        self._memory = Memory(runner, context, kv_bytes, prefix_bytes, of_drafter)
        self._places = Places(self._memory, scheduler or Scheduler(), progress)
        self._speculation = Speculation(runner, drafter)
        calls = Calls(runner, self._places, self._speculation)
        self._batches = Batches(runner, self._places, self._speculation, calls)
        self._prompts = Prompts(runner, self._places, calls)

    @classmethod
    def load(
        cls,
        ops: Backend,
        file: GGUFFile,
        architecture: Architecture | None = None,
        config: Phi3Config | None = None,
        *,
        context: int | None = None,
        progress: Progress = silent,
        scheduler: Scheduler | None = None,
        prefix_bytes: int = 0,
        kv_bytes: int | None = None,
        drafter: Drafter | None = None,
        programs: ProgramStore | None = None,
    ) -> Self:
        """Load the model of a file.

        If compiled steps are kept, this returns while a thread still loads the weights, and the
        first step waits for them. So steps are compiled meanwhile.

        Args:
            architecture: The file's architecture. None takes the built-in one that the file names.
            config: The result of `read_config` for the file. None calls it.
            context: The largest number of tokens. None takes the context that the model was made
                for.
            scheduler, prefix_bytes, kv_bytes, drafter: Arguments of `Engine`.
            programs: What keeps compiled steps for later processes; None keeps nothing.
        Raises:
            GGUFError: If the file is damaged or not supported.
            BackendError: If the backend cannot hold the model.
        """
        architecture = architecture or architecture_of(file.metadata)
        config = config or read_config(file, architecture)
        # Raise the errors that are possible here before a long load.
        share = config.share(ops.options.devices)
        ops.new_cache(1, 1, 1, config.head_dim)  # not every cache type supports every head size
        factors = architecture.rope_factors(config, file)
        weights = _weights(ops, architecture, config, file, progress, programs)
        return cls(
            Runner(ops, share, weights, factors, progress, programs),
            context=config.max_position_embeddings if context is None else context,
            progress=progress,
            scheduler=scheduler,
            prefix_bytes=prefix_bytes,
            kv_bytes=kv_bytes,
            drafter=drafter,
        )

    def fit_context(self) -> None:
        """Reduce the context to what fits into `kv_bytes`.

        Raises:
            ArgumentError: If no text fits.
        """
        self._memory.fit_context()

    @property
    def vocab_size(self) -> int:
        """Return V, the number of tokens that the embedding has."""
        return self.runner.config.vocab_size

    @property
    def context(self) -> int:
        """Return the largest number of tokens that a prompt and its answer may have together."""
        return self._memory.context

    @property
    def prefixes(self) -> Prefixes:
        """Return what ended sequences have computed."""
        return self._memory.prefixes

    @property
    def scheduler(self) -> Scheduler:
        """Return the queue of the sequences that wait. While the engine is idle, it can be set."""
        return self._places.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._places.scheduler = scheduler

    @property
    def progress(self) -> Progress:
        """Return the function that is called while prompts are read. It can be set."""
        return self._places.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._places.progress = progress

    @property
    def drafter(self) -> Drafter | None:
        """Return what guesses the next tokens; None guesses none. It can be set."""
        return self._speculation.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        self._speculation.drafter = drafter

    @property
    def team(self) -> Team:
        """Return what the engine tells those that compute the same model. It can be set."""
        return self._places.team

    @team.setter
    def team(self, team: Team) -> None:
        self._places.team = team

    # ---- requests --------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Add a request. It takes no memory on the device until its first step.

        Raises:
            ArgumentError: If the prompt has a token outside of the vocabulary, or the request asks
                for rotary factors that the model does not have, or cannot be told to the team.
            ContextError: If the prompt leaves no room for an answer.
            BusyError: If too many requests wait already.
        """
        self._check_fits(request.prompt_ids, 1)
        room = self.context - len(request.prompt_ids)
        limit, at_limit = request.max_tokens, "length"
        if limit == -1 or limit > room:
            limit, at_limit = room, "context"
        tables = self.runner.tables
        if request.rope_factors != "auto" and not tables.has_two_parts:
            raise ArgumentError(
                "this model has one set of rotary factors; leave the option out",
                parameter="rope_factors",
            )
        is_long = request.rope_factors == "long" or tables.is_long(len(request.prompt_ids))
        sequence = Sequence(request, limit, at_limit, is_long)
        with self._lock:
            self.scheduler.add(sequence)
            try:
                self.team.added(sequence)
            except ArgumentError:
                self._places.end(sequence, "abort")
                raise
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a sequence and free its slots. Nothing happens if the sequence has ended already.

        This never waits for a step, since Python may call it at any time, for example while it
        frees objects.
        """
        if sequence.finish_reason is None:
            self._aborted.append(sequence)
            self._end_aborted_if_free()

    def _end_aborted_if_free(self) -> None:
        while self._aborted and self._lock.acquire(blocking=False):
            try:
                self._end_aborted()
            finally:
                self._lock.release()

    def _end_aborted(self) -> None:
        while self._aborted:
            sequence = self._aborted.popleft()
            if sequence.finish_reason is None:
                self.team.aborted(sequence)
                self._places.end(sequence, "abort")

    def step(self) -> list[Output]:
        """Run one step: a decode call of each batch, then a chunk of a prompt.

        A sequence that finishes or fails is ended. Errors do not leave this method: they are the
        output of the sequences that they concern.

        Returns:
            The outputs of the sequences that went on. Each is also added to the sequence's own
            outputs, so that several callers can each wait for their sequence.
        """
        with self._lock:
            self._end_aborted()
            outputs = self.team.step(self._advance)
        self._end_aborted_if_free()
        return outputs

    def _advance(self) -> list[Output]:
        return [*self._batches.advance(), *self._prompts.read()]

    def outputs(self, sequence: Sequence) -> Generator[Output]:
        """Run steps, and yield the outputs of a sequence until it ends.

        If the iterator is closed early, the sequence is ended.

        Raises:
            Exception: The error that has ended the sequence.
        """
        try:
            while True:
                while sequence.outputs:
                    output = sequence.outputs.popleft()
                    if output.error is not None:
                        raise output.error
                    yield output
                    if output.finish_reason is not None:
                        return
                if sequence.finish_reason is None:
                    self.step()
                    continue
                with self._lock:  # another thread may be about to add the last output
                    if not sequence.outputs:
                        return
        finally:
            self.abort(sequence)

    def generate(self, request: Request) -> Iterator[int]:
        """Add a request, run it until it finishes, and yield the tokens of its answer."""
        for output in self.outputs(self.add(request)):
            yield from output.tokens

    def warm_up(
        self,
        samplings: Tokens[Sampling],
        *,
        has_logprobs: bool = False,
        processors: Tokens[LogitsProcessor] = (),
    ) -> None:
        """Compile the steps that sequences with these sampling parameters need, for short texts.

        Afterwards nothing is compiled when sequences come and go, until a text is longer than the
        smallest cache.

        Args:
            has_logprobs: Whether some sequences ask for log probabilities. Their steps are compiled
                beside the others.
            processors: Logits processors that sequences have, one at a time. The steps with each of
                them are compiled beside the others.
        """
        args = samplings, has_logprobs, processors
        self.team.call("_warm_up", args, lambda: self._warm_up(*args))

    def _warm_up(
        self,
        samplings: Tokens[Sampling],
        has_logprobs: bool,
        processors: Tokens[LogitsProcessor],
    ) -> None:
        requests = [Request([0], sampling, max_tokens=2, seed=0) for sampling in samplings]
        requests += [
            *(replace(request, logprobs=0) for request in requests if has_logprobs),
            *(replace(request, processors=[p]) for p in processors for request in requests),
        ]
        sizes = [n for n in self.runner.ops.capabilities.prompt_chunks if n < self.context]
        for number, request in enumerate(requests):
            # Chunks of all sizes are read by the same steps for all requests.
            for size in sizes if number == 0 else sizes[:2]:
                list(self.generate(replace(request, prompt_ids=[0] * size, max_tokens=1)))
        decode_each_size(requests, self._memory, self.scheduler, self._speculation)

    def _check_fits(self, prompt: Tokens[int], answer: int) -> None:
        for token in prompt:
            if not 0 <= token < self.vocab_size:
                raise ArgumentError(f"token id {token}: expected 0 to {self.vocab_size - 1}")
        if len(prompt) + answer > self.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}, "
                "the answer included; shorten the prompt or raise the context",
                expected=f"{self.context - answer} tokens or fewer",
                got=len(prompt),
            )

    # ---- sessions --------------------------------------------------------------------------

    def save_session(self, path: Path, tokens: Tokens[int], model: str) -> int:
        """Save what is known of a sequence's first tokens, for another process.

        Args:
            path: The file, which is replaced at once when it is complete.
            tokens: The tokens of the sequence.
            model: A text that only this model has.
        Returns:
            The number of tokens that were saved, 0 if nothing is known; there is then no file.
        Raises:
            SessionError: If the backend's arrays cannot be saved, or the file cannot be written.
        """
        from phicore.engine import sessions  # safetensors is seldom needed

        self._check_alone()
        with self._lock:  # nobody may go on with this cache meanwhile
            known = self.prefixes.longest(tokens)
            if known is None:
                return 0
            sessions.save(path, known, self.runner, model)
            return len(known.tokens)

    def load_session(self, path: Path, model: str) -> Tokens[int]:
        """Load a session into the prefix cache, and return its tokens.

        Raises:
            SessionError: If the file cannot be read, is damaged, or does not fit.
        """
        from phicore.engine import sessions

        self._check_alone()
        known = sessions.load(path, self.runner, model)
        with self._lock:
            self.prefixes.add(known)
            if known not in self.prefixes:
                raise SessionError(
                    f"{path}: {known.cache.bytes} bytes, more than the prefix cache may have"
                )
        return list(map(int, known.tokens))

    def _check_alone(self) -> None:
        if not self.team.is_alone:
            raise SessionError("several processes compute this model; they keep no sessions")

    # ---- who runs --------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Return whether no sequence waits or runs. Then only the prefix cache has memory."""
        return self._places.is_idle

    @property
    def kv_usage(self) -> tuple[int, int, int | None]:
        """Return the bytes of keys and values of running sequences, those of the prefix cache, and
        the largest number of both together; None if there is no limit.

        Only the thread that runs the steps may ask.
        """
        running = sum(rows.cache.bytes for rows in self._places.all_rows)
        return running, self.prefixes.bytes, self._memory.most_bytes

    @property
    def compiled_bytes(self) -> int:
        """Return about how much memory compiled functions take, as far as the backend tells."""
        of_drafter = 0 if self.drafter is None else self.drafter.compiled_bytes
        return self.runner.steps.held_bytes + of_drafter

    # ---- scores ----------------------------------------------------------------------------

    def logits(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or a token is outside of the vocabulary.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        self._check_scored(tokens)
        with self._lock:
            args = (list(tokens),)
            scores = self.team.call("logits", args, lambda: self.runner.scores(tokens))
        if not np.isfinite(scores).all():
            raise PhicoreError(NOT_FINITE)
        return scores

    def score(self, tokens: Tokens[int], count: int = 0) -> list[TokenLogprobs | None]:
        """Compute the log probability of each token after the tokens before it.

        This takes less memory than `logits`: the scores of 64 tokens at a time. In between, other
        threads may run steps.

        Args:
            count: The number of alternatives, 0 to 20, that each result has.
        Returns:
            One result for each token. The first is None, since nothing comes before it.
        Raises:
            ArgumentError: If there is no token, a token is outside of the vocabulary, or the count
                is not allowed.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a log probability is not a finite number.
        """
        self._check_scored(tokens)
        check_logprobs(count)
        with self._lock:
            args = (list(tokens),)
            # The processes of a team must all make the same calls in the same order.
            pause = self._let_others if self.team.is_alone else None
            found = self.team.call("score", args, lambda: self.runner.logprobs(tokens, pause))
        if not all(np.isfinite(found[name]).all() for name in ("chosen", "likeliest")):
            raise PhicoreError(NOT_FINITE)
        return [None, *logprobs.of_tokens(tokens[1:], found, count)]

    def _let_others(self) -> None:
        """Let another thread run a step, which a long text would keep from it for minutes."""
        self._lock.release()
        try:
            time.sleep(PAUSE_S)
        finally:
            self._lock.acquire()

    def _check_scored(self, tokens: Tokens[int]) -> None:
        if not len(tokens):
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        self._check_fits(tokens, 0)


def _weights(
    ops: Backend,
    architecture: Architecture,
    config: Phi3Config,
    file: GGUFFile,
    progress: Progress,
    programs: ProgramStore | None,
) -> Weights:
    """Load the weights of a file, or begin to load them if programs can be compiled meanwhile.

    Raises:
        GGUFError: If a tensor is missing, unknown or misshapen, or has a type that cannot be read.
    """
    if programs is None:
        return Weights(load_params(ops, architecture, config, file, progress))
    forms = load_params(programs.outline, architecture, config, file.outline(), silent)
    kept = file.again()  # the caller may close its own

    def load(report: Progress) -> Params:
        with kept:
            return load_params(ops, architecture, config, kept, report)

    return Weights(forms, load)
