"""The options of a backend, which the user chooses, and the capabilities that a backend has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phicore.backend.host import cpu_count
from phicore.backend.shapes import PROMPT_CHUNKS
from phicore.errors import BackendError
from phicore.settings import check_settings, setting

THREADS_OF_A_CPU = 4
"""More threads than this for each CPU only wait for each other."""
MOST_THREADS = THREADS_OF_A_CPU * cpu_count()


@dataclass(frozen=True)
class BackendOptions:
    """The options of a backend. None leaves a choice to the backend.

    The command line and `phicore.load` take options by these names. A backend reads
    `Backend.options`, in which device, cache type and dtype are never None.
    """

    device: str | None = setting(
        None,
        "The device to compute on, such as cpu, cuda:1 or metal; `phicore backends` lists them.",
        metavar="NAME",
    )
    devices: int = setting(
        1,
        "Number of GPUs to split the model over, counted from --device (JAX).",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="N",
    )
    cache_type: str | None = setting(
        None,
        "The type of the key-value cache: f32, f16, i16 (16-bit integers with scales) or q8_0; "
        "with JAX also i24, with MLX on a GPU bf16.",
        metavar="TYPE",
        shown_default="the backend's",
    )
    dtype: str | None = setting(
        None,
        "The type of numbers in matrix products while a prompt is read: float32 or, with MLX on a "
        "GPU, float16 or bfloat16.",
        metavar="TYPE",
        shown_default="the backend's",
    )
    fast_prefill: bool = setting(
        False,
        "Read prompts up to twice as fast and less exactly, with logits no less exact than "
        "llama.cpp's on a CPU (JAX).",
    )
    compact: bool = setting(
        False,
        "Round the scales of quantized weights to float16. This saves up to a sixth of the "
        "weights' memory, at a relative error of 3e-4 (MLX).",
    )
    threads: int | None = setting(
        None,
        "Number of CPU threads that compute (JAX).",
        expected=f"1 to {MOST_THREADS}, {THREADS_OF_A_CPU} for each CPU",
        check=lambda n: 1 <= n <= MOST_THREADS,
        metavar="N",
        shown_default="one for each logical CPU",
    )

    packed_cache: bool = setting(
        True,
        "Keep a large model's packed weights in the user's cache folder, so that the next start "
        "maps them (JAX on a CPU). `phicore cache` lists and clears it. [yes]",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes whose devices compute a model together.

    Attributes:
        address: Where the tensor library's processes meet, HOST:PORT; it is the first one's.
        count: The number of processes.
        number: The number of this process, from 0 on.
    """

    address: str
    count: int
    number: int


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
    random_on_device: bool = False
    """Whether the device makes random numbers (`Backend.uniforms`). Otherwise the host makes them,
    V for each row and step, and they are copied. The numbers are the same. It pays where the host
    would take more than a few hundredths of a step."""

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
                    parameter=name,
                    expected=f"{', '.join(known)} with this backend on {self.device}",
                    got=value,
                )
        if options.fast_prefill and not self.has_fast_prefill:
            raise BackendError(
                f"this backend has only exact products on {self.device}", parameter="fast_prefill"
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
