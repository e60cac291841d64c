"""Compilation of kernels by LLVM for this processor, with a cache of compiled code on disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import platformdirs

from phicore.backend import cache_types
from phicore.gguf import blocks
from phicore_jax import cache as jax_cache
from phicore_jax import code_files
from phicore_jax.kernels.lang import Module, Target

# The features that a target requires of an x86 processor.
X86_FEATURES = {
    "avx512vnni": (
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512vnni",
        "avx2",
        "fma",
        "f16c",
    ),
    "avxvnni": ("avxvnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}


class Library:
    """Compiled functions. Their code stays in memory as long as this object exists."""

    def __init__(self, jit: Any, name: str, code: bytes, exports: Sequence[str]) -> None:
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for function in exports:
            builder.export_symbol(function)
        self._tracker = builder.link(jit, name)

    def address(self, name: str) -> int:
        """Return the address of a function or a variable."""
        return int(self._tracker[name])


class Compiler:
    """Compiler of modules for one of the targets that this processor supports."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._libraries: dict[str, Library] = {}
        self._lock = threading.RLock()  # several threads may ask for a module

    @cached_property
    def machine(self) -> Any:
        return target_machine(self.target)

    @cached_property
    def _jit(self) -> Any:
        # LLVM's older linker may lay code and its constants further apart than 32 bits reach.
        return llvm.create_lljit_compiler(target_machine(self.target), use_jit_link=True)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that compiled code depends on.

        It covers the sources of the kernels and of the modules that describe their data, the
        version of llvmlite, the target and the processor.
        """
        digest = hashlib.sha256()
        described = (blocks.__file__, cache_types.__file__, jax_cache.__file__)
        for path in (*sorted(Path(__file__).parent.glob("*.py")), *map(Path, described)):
            digest.update(path.read_bytes())
        host = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
        for part in (llvmlite.__version__, self.target.name, llvm.get_process_triple(), *host):
            digest.update(part.encode())
        return digest.hexdigest()[:16]

    @cached_property
    def folder(self) -> Path:
        """Folder of the compiled modules on disk."""
        return platformdirs.user_cache_path("phicore") / "kernels" / self.digest

    def library(self, name: str, emit: Callable[[Module], None], exports: Sequence[str]) -> Library:
        """Return the functions of a module: from memory, from disk, or compiled now.

        Args:
            name: Name of the module and of its file.
            emit: Writes the module's functions.
            exports: Names of the functions and variables whose addresses are needed.
        """
        found = self._libraries.get(name)  # without the lock, which is held while others compile
        if found is not None:
            return found
        with self._lock:
            if name not in self._libraries:
                path = self.folder / f"{name}.o"
                code = code_files.read(path)
                if code is None:
                    module = Module(self.target)
                    emit(module)
                    code = optimized(module, self.machine, lambda m, ir: m.emit_object(ir))
                    code_files.write(path, code)
                self._libraries[name] = Library(self._jit, name, code, exports)
            return self._libraries[name]


@cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@cache
def supported_targets() -> list[str]:
    """Return the names of the targets that this processor supports, fastest first."""
    names = [name for name in X86_FEATURES if not lacking(name)]
    if llvm.get_process_triple().split("-")[0] in ("aarch64", "arm64"):
        names.append("neon")
    return [*names, "generic"]


def lacking(name: str) -> list[str]:
    """Return the features that a target of x86 needs and this processor does not have."""
    features = llvm.get_host_cpu_features()
    return [feature for feature in X86_FEATURES[name] if not features.get(feature)]


def passed_over(used: str) -> str:
    """Say why the targets of x86 that are faster than the one that is used are not.

    Returns:
        A text such as "not avx512vnni: the processor lacks avx512vnni", or "" on other processors
        and where none is faster.
    """
    if "neon" in supported_targets():
        return ""
    said = []
    for name in X86_FEATURES:
        if name == used:
            break
        missing = " ".join(lacking(name))
        reason = f"the processor lacks {missing}" if missing else f"PHICORE_CPU={used}"
        said.append(f"not {name}: {reason}")
    return "; ".join(said)


def target_machine(target: Target, triple: str | None = None) -> Any:
    """Return LLVM's description of a processor with the features of a target.

    On this platform, the best supported target gets all features of this processor.

    Args:
        triple: The platform to compile for; this one if None.
    """
    _initialize()
    host = llvm.get_process_triple()
    cpu, features = "", ",".join(f"+{f}" for f in X86_FEATURES.get(target.name, ()))
    if triple in (None, host) and target.name == supported_targets()[0]:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        if target.name == "avx512vnni":
            features += ",-prefer-256-bit"
    return llvm.Target.from_triple(triple or host).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small"
    )


def optimized(module: Module, machine: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """Optimize a module and return `emit(machine, module)`: object code, or assembly to look at."""
    parsed = llvm.parse_assembly(str(module.ir))
    parsed.triple = machine.triple
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return emit(machine, parsed)
