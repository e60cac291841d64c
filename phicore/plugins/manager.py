"""Finds plugins, which are distributions with an entry point in the group `phicore`."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pluggy

from phicore.errors import BackendError, PhicoreError, SourceError
from phicore.plugins import builtin, hookspecs
from phicore.plugins.blaming import GROUP, OWN, home, reason
from phicore.plugins.observers import Observers
from phicore.plugins.waiting import waiting_for

if TYPE_CHECKING:
    from phicore.backend import Backend, BackendOptions, ProcessGroup
    from phicore.network.architectures import Architecture
    from phicore.network.processors import LogitsProcessor
    from phicore.plugins.hookspecs import CreateProcessor, LoadedModel
    from phicore.sources import ModelFiles

DISABLE = "PHICORE_DISABLE_PLUGINS"
"""The environment variable that switches plugins off.

It has names of plugins or distributions, with commas between them. `*` switches off all plugins
except phicore's own.
"""
# If the user names no backend, these are tried in this order, then other backends by name.
DEVICES = ("cpu", "cuda", "gpu", "metal", "mps")  # names that people give as a backend
PREFERRED_BACKENDS = (
    ("mlx", "jax", "numpy") if sys.platform == "darwin" else ("jax", "mlx", "numpy")
)
NONE_INSTALLED = (
    "no backend is installed; install one with: "
    f"pip install 'phicore[{PREFERRED_BACKENDS[0]}]', or phicore[numpy] for tiny models"
)


log = logging.getLogger(__name__)

T = TypeVar("T")


class Owner(NamedTuple):
    """The name of a plugin, and the distribution that it comes from."""

    name: str
    distribution: str
    version: str


Registered = dict[str, tuple[Owner, T]]
"""Registered objects by name, each with the plugin that registered it."""


MakeCommand = Callable[[str, Callable[..., None]], Any]
"""A function that makes a command from its name and the function that runs it."""


def _as_is(name: str, function: Callable[..., None]) -> Any:
    return function


@dataclass(frozen=True)
class BackendInfo:
    """A backend that an installed distribution provides. Its tensor library is imported later."""

    name: str
    distribution: str
    version: str
    _create: Callable[[BackendOptions], Backend] = field(repr=False)
    _devices: Callable[[], list[str]] = field(repr=False)
    _notes: Callable[[], str] | None = field(repr=False, default=None)
    _join: Callable[[ProcessGroup], Callable[[], None]] | None = field(repr=False, default=None)

    def devices(self) -> list[str]:
        """Return the devices that the backend can use here. This imports its library.

        Raises:
            BackendError: If the backend cannot be used. The message has the reason.
        """

        def listed() -> list[str]:
            found = list(self._devices())
            for each in found:
                _check(each, str, "device")
            return found

        return self._guarded("list the devices of", listed)

    def notes(self) -> str:
        """Return the backend's notes for `phicore backends`, perhaps "". This imports its library.

        Raises:
            BackendError: If the backend cannot be used. The message has the reason.
        """
        notes = self._notes
        if notes is None:
            return ""
        return self._guarded("tell notes of", lambda: _check(notes(), str, "notes"))

    @property
    def can_join(self) -> bool:
        """Return whether several processes can compute a model with it."""
        return self._join is not None

    def check_can_join(self) -> None:
        """Check `can_join`.

        Raises:
            BackendError: If it cannot.
        """
        if not self.can_join:
            raise BackendError(f"backend {self.name}: one process computes a model")

    def join(self, group: ProcessGroup) -> Callable[[], None]:
        """Join this process with others; return a function that leaves them.

        Raises:
            BackendError: If the backend cannot do this, or the others do not come.
        """
        self.check_can_join()
        assert self._join is not None
        join = self._join
        leave: Callable[[], None] = self._guarded("join other processes with", lambda: join(group))
        return leave

    def create(self, options: BackendOptions | None = None) -> Backend:
        """Make the backend. None takes the default options.

        Raises:
            BackendError: If the backend, the device or another option cannot be used. The message
                has the reason.
        """
        from phicore.backend import DEFAULTS, Backend  # imports NumPy, which a list does not need

        chosen = DEFAULTS if options is None else options
        return self._guarded("create", lambda: _check(self._create(chosen), Backend, "result"))

    def _guarded(self, what: str, call: Callable[[], T]) -> T:
        try:
            with waiting_for(self.distribution, f"{what} the backend {self.name}"):
                return call()
        except PhicoreError:
            raise
        except (Exception, SystemExit) as error:
            raise BackendError(f"backend {self.name}: not usable: {reason(error)}") from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin, or a backend of a plugin, that cannot be used."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin, with texts such as `backend jax` or `sources hf, file` in `provides`."""

    name: str
    distribution: str
    version: str
    provides: tuple[str, ...]


class Plugins:
    """The installed plugins, and what they register. Two objects of this class share no state."""

    def __init__(self, points: list[EntryPoint] | None = None) -> None:
        self.manager = pluggy.PluginManager("phicore")
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[BrokenPlugin] = []
        self.disabled: list[tuple[str, str]] = []
        self._owners: dict[int, Owner] = {}
        self.manager.register(builtin, name="phicore:built-in")
        self._owners[id(builtin)] = Owner("built-in", "phicore", version("phicore"))
        points = list(entry_points(group=GROUP)) if points is None else points
        off = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
        for point in sorted(points, key=lambda p: p.name):
            distribution = point.dist.name if point.dist else "?"
            is_off = {point.name, distribution} & off or ("*" in off and distribution not in OWN)
            if is_off:
                self.disabled.append((point.name, distribution))
            else:
                self._load(point)

    def _load(self, point: EntryPoint) -> None:
        dist = point.dist
        owner = Owner(point.name, dist.name if dist else "?", dist.version if dist else "?")
        name = f"{owner.distribution}:{owner.name}"
        is_registered = False
        try:
            with _watched(owner, "be imported"):
                plugin = point.load()
            if (other := self._owners.get(id(plugin))) is not None:
                why = f"{point.value} is loaded already, as {other.name} of {other.distribution}"
                self._report(owner.name, owner.distribution, f"{why}; remove one")
                return
            self.manager.register(plugin, name=name)
            is_registered = True
            self.manager.check_pending()  # raises for a misspelt hook, which would never be called
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it must not stop other plugins
            self._report(owner.name, owner.distribution, reason(error))
            if is_registered:
                self.manager.unregister(name=name)
            return
        self._owners[id(plugin)] = owner

    def backends(self) -> dict[str, BackendInfo]:
        """Return the backends by name, the preferred ones first.

        Two kinds of backends are added to `broken` instead: those for another version of the
        protocol, and those whose name several distributions claim.
        """
        from phicore.backend import VERSION  # imports NumPy, which help texts do not need

        found: dict[str, BackendInfo] = {}
        claims: dict[str, list[str]] = {}
        for plugin, owner in self._plugins():

            def register(
                name: str,
                *,
                create: Callable[[BackendOptions], Backend],
                devices: Callable[[], list[str]],
                protocol: int,
                notes: Callable[[], str] | None = None,
                join: Callable[[ProcessGroup], Callable[[], None]] | None = None,
                owner: Owner = owner,
            ) -> None:
                if protocol != VERSION:
                    reason = f"made for version {protocol} of the protocol, phicore has {VERSION}"
                    fix = f"install a {owner.distribution} that fits"
                    self._report(name, owner.distribution, f"{reason}; {fix}")
                    return
                claims.setdefault(name, []).append(owner.distribution)
                found[name] = BackendInfo(
                    name, owner.distribution, owner.version, create, devices, notes, join
                )

            self._call(plugin, owner, "phicore_register_backends", register)
        for name, owners in claims.items():
            if len(owners) > 1:
                del found[name]
                for owner_name in owners:
                    others = f"claimed by two distributions, {' and '.join(owners)}"
                    self._report(name, owner_name, f"{others}; uninstall one")
        rank = {name: i for i, name in enumerate(PREFERRED_BACKENDS)}
        return {n: found[n] for n in sorted(found, key=lambda n: (rank.get(n, len(rank)), n))}

    def sources(self) -> dict[str, Callable[[str], ModelFiles]]:
        """Return the functions that resolve model references, by scheme."""
        return _values(self._sources())

    def architectures(self) -> dict[str, Architecture]:
        """Return the architectures by their names in `general.architecture`."""
        return _values(self._architectures())

    def logits_processors(self) -> dict[str, CreateProcessor]:
        """Return the functions that make logits processors, by name."""
        return _values(self._logits_processors())

    def commands(self, make: MakeCommand = _as_is, taken: Collection[str] = ()) -> dict[str, Any]:
        """Return the commands that plugins register, by name.

        Args:
            make: Makes a command from its name and function. If it raises, the plugin is added to
                `broken`.
            taken: Names that plugins cannot register.
        """
        return _values(self._commands(make, taken))

    def _sources(self) -> Registered[Callable[[str], ModelFiles]]:
        def entry(
            owner: Owner, scheme: str, *, resolve: Callable[[str], ModelFiles]
        ) -> tuple[str, Callable[[str], ModelFiles]]:
            is_own = owner.distribution == "phicore"
            return scheme, resolve if is_own else _guarded_source(resolve, owner.distribution)

        return self._registered("phicore_register_sources", "model source", entry)

    def _architectures(self) -> Registered[Architecture]:
        from phicore.network.architectures import Architecture  # imports NumPy

        def entry(owner: Owner, architecture: Architecture) -> tuple[str, Architecture]:
            if not isinstance(architecture, Architecture):
                raise TypeError(f"expected an Architecture, got {architecture!r:.60}")
            return architecture.name, architecture

        return self._registered("phicore_register_architectures", "architecture", entry)

    def _logits_processors(self) -> Registered[CreateProcessor]:
        def entry(
            owner: Owner, name: str, *, create: CreateProcessor
        ) -> tuple[str, CreateProcessor]:
            def watched(argument: str, model: LoadedModel) -> LogitsProcessor:
                with waiting_for(owner.distribution, f"create the logits processor {name}"):
                    return create(argument, model)

            return name, create if owner.distribution == "phicore" else watched

        return self._registered("phicore_register_logits_processors", "logits processor", entry)

    def _commands(self, make: MakeCommand, taken: Collection[str]) -> Registered[Any]:
        def entry(owner: Owner, name: str, function: Callable[..., None]) -> tuple[str, Any]:
            if not callable(function):
                raise TypeError(f"command {name!r}: expected a function, got {function!r:.60}")
            return name, make(name, function)

        return self._registered("phicore_register_commands", "command", entry, taken)

    def _registered(
        self,
        hook: str,
        what: str,
        entry: Callable[..., tuple[str, T]],
        taken: Collection[str] = (),
    ) -> Registered[T]:
        """Call a hook of all plugins, and return what they register.

        If several plugins register a name, the first gets it, and the others are added to `broken`.

        Args:
            hook: The name of the hook.
            what: The kind of the registered objects, for messages.
            entry: Called with the owner and the arguments of `register`; returns name and value.
            taken: Names that plugins cannot register.
        """
        found: Registered[T] = {}
        for plugin, owner in self._plugins():

            def register(*args: Any, owner: Owner = owner, **kwargs: Any) -> None:
                name, value = entry(owner, *args, **kwargs)
                if not isinstance(name, str) or not name:
                    raise TypeError(f"the name of a {what} is {name!r}, expected a string")
                if name in found or name in taken:
                    reason = f"the {what} {name!r} exists already"
                    self._report(owner.name, owner.distribution, reason)
                    return
                found[name] = owner, value

            self._call(plugin, owner, hook, register)
        return found

    def observers(self) -> Observers | None:
        """Return the plugins that observe generations, or None if there are none."""
        hooks = {
            name: getattr(self.manager.hook, name).get_hookimpls()
            for name in (
                "phicore_generation_started",
                "phicore_piece_generated",
                "phicore_generation_ended",
            )
        }
        return Observers(hooks) if any(hooks.values()) else None

    def installed(
        self, make: MakeCommand = _as_is, taken: Collection[str] = ()
    ) -> list[PluginInfo]:
        """List the loaded plugins, sorted by name, with what they register.

        Args:
            make, taken: Arguments of `commands`.
        """
        kinds: list[tuple[str, Iterable[tuple[str, str]]]] = [
            ("backend", [(i.name, i.distribution) for i in self.backends().values()]),
            ("source", _owned(self._sources())),
            ("architecture", _owned(self._architectures())),
            ("logits processor", _owned(self._logits_processors())),
            ("command", _owned(self._commands(make, taken))),
        ]
        provides: dict[str, list[str]] = {}
        for kind, found in kinds:
            names: dict[str, list[str]] = {}
            for name, distribution in found:
                names.setdefault(distribution, []).append(name)
            for distribution, own in names.items():
                text = f"{kind}{'s' * (len(own) > 1)} {', '.join(own)}"
                provides.setdefault(distribution, []).append(text)
        if (observers := self.observers()) is not None:
            for plugin_name in observers.names:
                provides.setdefault(plugin_name.partition(":")[0], []).append("observer")
        return [
            PluginInfo(*owner, tuple(provides.get(owner.distribution, [])))
            for owner in sorted(self._owners.values())
        ]

    def blame(self, error: BaseException) -> str | None:
        """Return a message that names the plugin whose code raised an error, and the line.

        Return None if no plugin other than phicore's own was involved.
        """
        owners = [
            (home(plugin), owner)
            for plugin, owner in self._plugins()
            if owner.distribution not in {"phicore", *OWN}
        ]
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            for folder, owner in owners:
                if folder is not None and Path(frame.filename).is_relative_to(folder):
                    where = f"{Path(frame.filename).name}, line {frame.lineno}"
                    return f"{owner.distribution} failed: {reason(error)} ({where})"
        return None

    def _report(self, name: str, distribution: str, reason: str) -> None:
        broken = BrokenPlugin(name, distribution, reason)
        if broken not in self.broken:  # a hook may be called several times
            self.broken.append(broken)

    def _plugins(self) -> list[tuple[object, Owner]]:
        return [
            (plugin, self._owners[id(plugin)])
            for _, plugin in self.manager.list_name_plugin()
            if plugin is not None
        ]

    def _call(self, plugin: Any, owner: Owner, hook: str, register: Callable[..., None]) -> None:
        """Call the hook of a single plugin. If it fails, only this plugin is added to `broken`."""
        others = [p for p, _ in self._plugins() if p is not plugin]
        try:
            with _watched(owner, f"return from {hook}"):
                self.manager.subset_hook_caller(hook, others)(register=register)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it must not stop other plugins
            self._report(owner.name, owner.distribution, reason(error))


@contextmanager
def _watched(owner: Owner, what: str) -> Iterator[None]:
    """Tell in a line what a plugin prints, which belongs into nobody's output, or that it blocks.

    Only phicore itself prints answers to standard output.

    Args:
        what: What the plugin is to do.
    """
    if owner.distribution in {"phicore", *OWN}:
        yield
        return
    advice = f"{DISABLE}={owner.name} leaves it out"
    printed = io.StringIO()
    try:
        with waiting_for(owner.distribution, what, advice), redirect_stdout(printed):
            yield
    finally:
        if text := " ".join(printed.getvalue().split()):
            log.warning("plugin %s:%s printed: %.200s", owner.distribution, owner.name, text)


def _check(value: T, kind: Any, what: str) -> T:
    """Return what a plugin gave.

    Raises:
        TypeError: If it is of another class.
    """
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise TypeError(f"{what}: expected {expected}, got {type(value).__name__}")
    return value


def _owned(registered: Registered[Any]) -> list[tuple[str, str]]:
    """List each name with the distribution that registered it."""
    return [(name, owner.distribution) for name, (owner, _) in registered.items()]


def _values(registered: Registered[T]) -> dict[str, T]:
    return {name: value for name, (_, value) in registered.items()}


def usable_backends() -> list[str]:
    """Return the names of the installed backends that work here."""
    names = []
    for info in Plugins().backends().values():
        with suppress(BackendError):
            info.devices()
            names.append(info.name)
    return names


def choose_backend(name: str | None, plugins: Plugins) -> BackendInfo:
    """Return the backend with this name. None takes the first that is usable here.

    Raises:
        BackendError: If the backend is not installed or is broken, or if no backend is usable.
    """
    backends = plugins.backends()
    broken = {b.name: b for b in plugins.broken}
    if name is not None:
        if name in backends:
            return backends[name]
        if name in broken:
            raise BackendError(
                f"backend {name!r}: {broken[name].distribution} is not usable: "
                f"{broken[name].reason}"
            )
        raise BackendError(
            f"no backend {name!r}; installed: {', '.join(backends) or 'none'}"
            + _hint(name, plugins)
        )
    reasons = []
    for info in backends.values():
        try:
            info.devices()
        except BackendError as error:
            reasons.append(str(error))
        else:
            return info
    if reasons:
        raise BackendError(f"no usable backend: {'; '.join(reasons)}")
    raise BackendError(NONE_INSTALLED)


def _hint(name: str, plugins: Plugins) -> str:
    """Return what to do about the name of a backend that is not there, to append to a message."""
    if name in DEVICES:
        return f"; {name} is a device: --device {name}"
    if any(name == point for point, _ in plugins.disabled):
        return f"; {name} is switched off by {DISABLE}"
    if name in PREFERRED_BACKENDS:
        return f"; install it with: pip install 'phicore[{name}]'"
    return ""


def _guarded_source(
    resolve: Callable[[str], ModelFiles], distribution: str
) -> Callable[[str], ModelFiles]:
    """Wrap a plugin's function so that a failure becomes a SourceError that names the plugin."""
    from phicore.sources import ModelFiles

    def guarded(reference: str) -> ModelFiles:
        try:
            with waiting_for(distribution, f"resolve {reference}"):
                files = resolve(reference)
            _check(files, ModelFiles, "result")
            _check(files.path, Path, "path")
            _check(files.tokenizer, Path | None, "tokenizer")
            _check(files.reference, str, "reference")
        except PhicoreError:
            raise
        except (Exception, SystemExit) as error:
            raise SourceError(f"{reference}: {distribution} failed: {reason(error)}") from error
        return files

    return guarded
