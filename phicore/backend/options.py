"""The options of a backend, which the user chooses, and the capabilities that a backend has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phicore.backend.shapes import PROMPT_CHUNKS
from phicore.errors import BackendError
from phicore.settings import check_settings, setting


@dataclass(frozen=True)
class BackendOptions:
    """The options of a backend. None leaves a choice to the backend.

    The command line and `phicore.load` take options by these names. A backend reads
    `Backend.options`, in which device, cache type and dtype are never None.
    """

    device: str | None = setting(
        None, "A device of the backend, such as cpu, cuda:1 or metal.", metavar="NAME"
    )
    devices: int = setting(
        1,
        "Number of GPUs to split the model over (JAX): --device and those after it.",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="N",
    )
    cache_type: str | None = setting(
        None,
        "How keys and values are stored in the cache, such as f32, i16 or q8_0; each backend has "
        "some of the types, and docs/models.md says what each rounds.",
        metavar="TYPE",
        shown_default="the backend's",
    )
    dtype: str | None = setting(
        None,
        "The dtype that prompts are multiplied in: float32 or, on a GPU with MLX, float16 or "
        "bfloat16.",
        metavar="TYPE",
        shown_default="the backend's",
    )
    fast_prefill: bool = setting(
        False,
        "Read prompts faster and less exactly: the logits have a relative error of up to 1.3e-2, "
        "as llama.cpp's have.",
    )
    compact: bool = setting(
        False,
        "Round the scales of quantized weights to float16: weights take up to a sixth less memory "
        "and have an error of 2e-4.",
    )
    threads: int | None = setting(
        None,
        "Number of CPU threads that compute.",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="N",
        shown_default="one for each processor",
    )

    def __post_init__(self) -> None:
        check_settings(self)


DEFAULTS = BackendOptions()
"""The options of a user who chose nothing."""


@dataclass(frozen=True)
class Capabilities:
    """The features of a backend on its device. The defaults describe the simplest backend."""

    device: str = "cpu"
    """The name of the device, in the form that `BackendOptions.device` takes."""
    cache_types: tuple[str, ...] = ("f32",)
    """The supported cache types, the default first. The protocol's default operations store the
    types of `cache_types.py` if `xp` has their dtypes; a backend may also have types of its own."""
    dtypes: tuple[str, ...] = ("float32",)
    """The dtypes that prompts can be multiplied in, the default first."""
    has_fast_prefill: bool = False
    """Whether prompts can be multiplied faster and less exactly."""
    has_compact: bool = False
    """Whether the scales of weights can be rounded to float16."""
    has_threads: bool = False
    """Whether the number of threads can be chosen."""
    has_devices: bool = False
    """Whether a model can be split over several devices. Each device then runs the graph with its
    share of the heads and channels (`Phi3Config.share`), and `linear` combines the products of a
    matrix that has a `split`. The devices' shares of weights, biases and caches are sharded arrays;
    all other arrays are replicated."""

    compiles: bool = False
    """Whether the first call of a compiled function with new shapes compiles, which takes long.
    The user is then told."""
    compiled_tokens: int | None = None
    """Steps with more tokens than this run uncompiled. None: every step is compiled."""
    prompt_chunks: tuple[int, ...] = PROMPT_CHUNKS
    """Chunk sizes for prompts, ascending from 1; each divides the next. If every step is compiled,
    chunks have these sizes only. Otherwise chunks have any size up to the last."""
    asynchronous: bool = False
    """Whether a compiled call returns before its result is computed. The engine then starts the
    next step before it reads the last token."""
    steps: int = 1
    """Number of decode steps that one compiled call runs. It should be 8 or fewer, since text
    appears only when a call has ended. More than 1 pays where the overhead of a call is large;
    `while_loop` must then work under `compile`."""

    linear_error: float = 5e-6
    """A bound of the relative error of `linear` on random numbers, for tests. The default is
    right for float32."""

    def accept(self, options: BackendOptions) -> BackendOptions:
        """Check options against what this backend can do, and fill in its defaults.

        Raises:
            BackendError: If the backend cannot do what an option asks for.
        """
        if options.devices != 1 and not self.has_devices:
            raise BackendError("this backend computes on one device", parameter="devices")
        if options.threads is not None and not self.has_threads:
            raise BackendError("the library chooses the number on this device", parameter="threads")
        for name, known in (("cache_type", self.cache_types), ("dtype", self.dtypes)):
            value = getattr(options, name)
            if value is not None and value not in known:
                raise BackendError(
                    parameter=name, expected=f"{', '.join(known)} on this device", got=value
                )
        if options.fast_prefill and not self.has_fast_prefill:
            raise BackendError(
                "this backend has only the exact products on this device", parameter="fast_prefill"
            )
        if options.compact and not self.has_compact:
            raise BackendError("this backend has only exact weights", parameter="compact")
        return replace(
            options,
            device=self.device,
            cache_type=options.cache_type or self.cache_types[0],
            dtype=options.dtype or self.dtypes[0],
        )


SIMPLEST = Capabilities()
"""The capabilities of the protocol's default operations."""
