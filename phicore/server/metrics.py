"""What a server counts and measures, with the names of vLLM's metrics, so that dashboards fit."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phicore.server.jobs import Job
from phicore.server.worker import Worker

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 320.0)


class Metrics:
    """The metrics of a model that is served. The threads of a process may share it.

    Args:
        name: The model's id, which all metrics of the model have as their label.
    """

    def __init__(self, name: str) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(metric: str, about: str) -> Gauge:
            return Gauge(f"vllm:{metric}", about, ["model_name"], registry=registry)

        def counter(metric: str, about: str, *labels: str) -> Counter:
            return Counter(f"vllm:{metric}", about, ["model_name", *labels], registry=registry)

        def seconds(metric: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"vllm:{metric}_seconds", about, ["model_name"], registry=registry, buckets=buckets
            )
            return made.labels(name)

        self._running = gauge("num_requests_running", "Answers that are computed.").labels(name)
        self._waiting = gauge("num_requests_waiting", "Answers that wait for a row.").labels(name)
        self._usage = gauge(
            "kv_cache_usage_perc", "The share of the memory for keys and values that is in use."
        ).labels(name)

        def size(metric: str, about: str) -> Gauge:
            made = Gauge(f"phicore:{metric}_bytes", about, ["model_name"], registry=registry)
            return made.labels(name)

        self._keys = size("kv_cache", "The keys and values of answers that are computed.")
        self._prefixes = size("prefix_cache", "The size of the prefix cache.")
        self._compiled = size("compiled_functions", "Compiled steps, as far as it is known.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.").labels(name)
        self._generated = counter("generation_tokens", "Tokens of answers.").labels(name)
        self._queries = counter(
            "prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache."
        ).labels(name)
        self._hits = counter(
            "prefix_cache_hits", "Tokens of prompts that were in the prefix cache."
        ).labels(name)
        self._drafts = counter("spec_decode_num_drafts", "Guesses that were checked.").labels(name)
        self._drafted = counter(
            "spec_decode_num_draft_tokens", "Guessed tokens that were checked."
        ).labels(name)
        self._accepted = counter(
            "spec_decode_num_accepted_tokens", "Guessed tokens that were right."
        ).labels(name)
        ended = counter("request_success", "Answers that have ended.", "finished_reason")
        # vLLM counts all ends but errors; the context is told as length.
        self._ends = {r: ended.labels(name, r) for r in ("stop", "length", "abort", "error")}
        self._first = seconds("time_to_first_token", "From request to first token.", LONG_S)
        self._between = seconds("inter_token_latency", "Between tokens.", SHORT_S)
        self._whole = seconds("e2e_request_latency", "From request to last token.", LONG_S)
        self._queue = seconds("request_queue_time", "From request to a row.", LONG_S)
        self.responses = Counter(
            "phicore:http_responses",
            "Answers of HTTP.",
            ["method", "path", "status"],
            registry=registry,
        )

    def text(self, worker: Worker | None) -> bytes:
        """Return the metrics in Prometheus' format.

        Args:
            worker: The thread that computes, if it is there.
        """
        if worker is not None:
            waiting = worker.waiting
            self._waiting.set(waiting)
            self._running.set(max(worker.count - waiting, 0))
        return generate_latest(self.registry)

    # ---- called by the thread that computes ------------------------------------------------

    def stepped(self, worker: Worker) -> None:
        """Note what memory is in use."""
        self._compiled.set(worker.model.engine.compiled_bytes)
        running, prefixes, most = worker.model.engine.kv_usage
        self._keys.set(running)
        self._prefixes.set(prefixes)
        self._usage.set((running + prefixes) / most if most else 0.0)

    def advanced(self, job: Job, tokens: int) -> None:
        """Note that an answer has new tokens."""
        now, timings = time.perf_counter(), job.timings
        self._generated.inc(tokens)
        if job.first_s is None:
            job.first_s = now
            self._first.observe(now - job.added_s)
            self._queue.observe(max(now - job.added_s - timings.first_token_s, 0.0))
            self._prompt.inc(timings.prompt_tokens)
            self._queries.inc(timings.prompt_tokens)
            self._hits.inc(timings.cached_tokens)
        else:
            for _ in range(tokens):  # a step may give several
                self._between.observe((now - job.last_s) / tokens)
        job.last_s = now

    def ended(self, job: Job, reason: str) -> None:
        """Note that an answer has ended."""
        self._drafts.inc(job.timings.drafts)
        self._drafted.inc(job.timings.drafted_tokens)
        self._accepted.inc(job.timings.accepted_tokens)
        self._ends["length" if reason == "context" else reason].inc()
        if reason in ("stop", "length", "context"):
            self._whole.observe(time.perf_counter() - job.added_s)
