"""Finding plugins: distributions with an entry point in the group `phicore`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from phicore import hookspecs
from phicore.errors import BackendError, PhicoreError, SourceError
from phicore.observers import Observers

if TYPE_CHECKING:
    from phicore.protocol import Backend
    from phicore.sources import ModelFiles

GROUP = "phicore"
OWN = {"phicore-jax", "phicore-mlx", "phicore-numpy"}
"""The distributions that are kept when plugins are switched off."""
DISABLE = "PHICORE_DISABLE_PLUGINS"
"""Names of plugins or distributions, with commas between them; `*` is all but our own."""
# Tried in this order when no backend is asked for; others come after, by name.
PREFERRED_BACKENDS = (
    ("mlx", "jax", "numpy") if sys.platform == "darwin" else ("jax", "mlx", "numpy")
)


@dataclass(frozen=True)
class BackendInfo:
    """A backend that some installed distribution provides. Making one imports no tensor library."""

    name: str
    distribution: str
    version: str
    _create: Callable[[str | None], Backend] = field(repr=False)
    _devices: Callable[[], list[str]] = field(repr=False)
    _notes: Callable[[], str] | None = field(repr=False, default=None)

    def devices(self) -> list[str]:
        """The devices it can use here; imports its library.

        Raises:
            BackendError: If it cannot be used, with the reason.
        """
        return self._guarded(self._devices)

    def notes(self) -> str:
        """What it says of itself on this machine, perhaps nothing; imports its library.

        Raises:
            BackendError: If it cannot be used, with the reason.
        """
        return self._guarded(self._notes) if self._notes is not None else ""

    def create(self, device: str | None = None) -> Backend:
        """The backend on a device, or on the best one there is.

        Raises:
            BackendError: If it cannot be used, or the device cannot, with the reason.
        """
        return self._guarded(self._create, device)

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except PhicoreError:
            raise
        except Exception as error:
            raise BackendError(f"backend {self.name}: not usable: {_reason(error)}") from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin, or a backend of one, that cannot be used."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin, and the names of what it registers."""

    name: str
    distribution: str
    version: str
    provides: tuple[str, ...]


class Plugins:
    """The installed plugins, and what they register. Nothing is kept between two of these."""

    def __init__(self, points: list[EntryPoint] | None = None) -> None:
        self.manager = pluggy.PluginManager("phicore")
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[BrokenPlugin] = []
        self.disabled: list[tuple[str, str]] = []
        self._owners: dict[int, tuple[str, str, str]] = {}
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
        owner = (point.name, dist.name if dist else "?", dist.version if dist else "?")
        try:
            plugin = point.load()
            if (other := self._owners.get(id(plugin))) is not None:
                reason = f"{point.value} is loaded already, as {other[0]} of {other[1]}"
                self.broken.append(BrokenPlugin(owner[0], owner[1], f"{reason}; one must go"))
                return
            self.manager.register(plugin, name=f"{owner[1]}:{point.name}")
            self.manager.check_pending()  # a misspelt hook would otherwise be silently dead
        except Exception as error:  # noqa: BLE001 - one broken plugin must not stop the rest
            self.broken.append(BrokenPlugin(owner[0], owner[1], _reason(error)))
            if (loaded := self.manager.get_plugin(f"{owner[1]}:{point.name}")) is not None:
                self.manager.unregister(loaded)
            return
        self._owners[id(plugin)] = owner

    def backends(self) -> dict[str, BackendInfo]:
        """Backends by name, the preferred ones first.

        What is not usable is in `broken`: backends for another protocol, and all that claim a name
        that another one claims.
        """
        from phicore.protocol import VERSION  # imports NumPy, which help need not wait for

        found: dict[str, BackendInfo] = {}
        claims: dict[str, list[str]] = {}
        for plugin, owner in self._plugins():

            def register(
                name: str,
                *,
                create: Callable[[str | None], Backend],
                devices: Callable[[], list[str]],
                protocol: int,
                notes: Callable[[], str] | None = None,
                owner: tuple[str, str, str] = owner,
            ) -> None:
                if protocol != VERSION:
                    reason = f"made for version {protocol} of the protocol, phicore has {VERSION}"
                    self._report(name, owner[1], f"{reason}; install a {owner[1]} that fits")
                    return
                claims.setdefault(name, []).append(owner[1])
                found[name] = BackendInfo(name, owner[1], owner[2], create, devices, notes)

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
        """What resolves a model reference, by scheme: the built-in ones and those of plugins.

        A scheme that is claimed twice is the first one's.
        """
        from phicore.sources import SCHEMES

        return SCHEMES | {scheme: resolve for scheme, (_, resolve) in self._sources().items()}

    def _sources(self) -> dict[str, tuple[str, Callable[[str], ModelFiles]]]:
        """Those of plugins, each with its distribution."""
        from phicore.sources import SCHEMES

        found: dict[str, tuple[str, Callable[[str], ModelFiles]]] = {}
        for plugin, owner in self._plugins():

            def register(
                scheme: str,
                *,
                resolve: Callable[[str], ModelFiles],
                owner: tuple[str, str, str] = owner,
            ) -> None:
                if scheme in found or scheme in SCHEMES:
                    reason = f"the model source {scheme!r} exists already"
                    self._report(owner[0], owner[1], reason)
                    return
                found[scheme] = owner[1], _guarded_source(resolve, owner[1])

            self._call(plugin, owner, "phicore_register_sources", register)
        return found

    def commands(self) -> dict[str, Callable[..., None]]:
        """Commands of plugins by name. One that is claimed twice is the first one's."""
        return {name: function for name, (_, function) in self._commands().items()}

    def _commands(self) -> dict[str, tuple[str, Callable[..., None]]]:
        """The same, each with its distribution."""
        found: dict[str, tuple[str, Callable[..., None]]] = {}
        for plugin, owner in self._plugins():

            def register(
                name: str, function: Callable[..., None], owner: tuple[str, str, str] = owner
            ) -> None:
                if name in found or name in self._own_commands():
                    self._report(owner[0], owner[1], f"the command {name!r} exists already")
                    return
                found[name] = owner[1], function

            self._call(plugin, owner, "phicore_register_commands", register)
        return found

    @staticmethod
    def _own_commands() -> set[str]:
        from phicore.cli import app  # which reads the plugins' commands from here

        return {str(c.name or getattr(c.callback, "__name__", "")) for c in app.registered_commands}

    def observers(self) -> Observers | None:
        """Those that watch generations; None if there are none."""
        hooks = {
            name: getattr(self.manager.hook, name).get_hookimpls()
            for name in (
                "phicore_generation_started",
                "phicore_piece_generated",
                "phicore_generation_ended",
            )
        }
        return Observers(hooks) if any(hooks.values()) else None

    def installed(self) -> list[PluginInfo]:
        """The plugins that were loaded, by name, with what they register."""
        provides: dict[str, list[str]] = {}
        for info in self.backends().values():
            provides.setdefault(info.distribution, []).append(f"backend {info.name}")
        for scheme, (distribution, _) in self._sources().items():
            provides.setdefault(distribution, []).append(f"source {scheme}")
        for name, (distribution, _) in self._commands().items():
            provides.setdefault(distribution, []).append(f"command {name}")
        if (observers := self.observers()) is not None:
            for plugin_name in observers.names:
                provides.setdefault(plugin_name.partition(":")[0], []).append("observer")
        return [
            PluginInfo(name, distribution, version, tuple(provides.get(distribution, [])))
            for name, distribution, version in sorted(self._owners.values())
        ]

    def _report(self, name: str, distribution: str, reason: str) -> None:
        broken = BrokenPlugin(name, distribution, reason)
        if broken not in self.broken:  # a hook may be called again
            self.broken.append(broken)

    def _plugins(self) -> list[tuple[object, tuple[str, str, str]]]:
        return [
            (plugin, self._owners[id(plugin)])
            for _, plugin in self.manager.list_name_plugin()
            if plugin is not None
        ]

    def _call(
        self, plugin: Any, owner: tuple[str, str, str], hook: str, register: Callable[..., None]
    ) -> None:
        """Call one plugin's hook, so that a failure is that plugin's alone."""
        others = [p for p, _ in self._plugins() if p is not plugin]
        try:
            self.manager.subset_hook_caller(hook, others)(register=register)
        except PhicoreError:
            raise
        except Exception as error:  # noqa: BLE001 - one broken plugin must not stop the rest
            self._report(owner[0], owner[1], _reason(error))


def usable_backends() -> list[str]:
    """The names of the installed backends that work here."""
    names = []
    for info in Plugins().backends().values():
        with suppress(BackendError):
            info.devices()
            names.append(info.name)
    return names


def choose_backend(name: str | None, plugins: Plugins) -> BackendInfo:
    """The backend of a name, or the first that is usable here for None.

    Raises:
        BackendError: If it is not installed, or none is.
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
            f"no backend {name!r}; installed: {', '.join(backends) or 'none'}; "
            f"a backend comes with its package, such as phicore-{name}"
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
    raise BackendError("no backend is installed; install one, such as phicore-jax")


def _guarded_source(
    resolve: Callable[[str], ModelFiles], distribution: str
) -> Callable[[str], ModelFiles]:
    """The same function, with a failure of the plugin as a SourceError that names it."""
    from phicore.sources import ModelFiles

    def guarded(reference: str) -> ModelFiles:
        try:
            files = resolve(reference)
        except PhicoreError:
            raise
        except Exception as error:
            raise SourceError(f"{reference}: {distribution} failed: {_reason(error)}") from error
        if not isinstance(files, ModelFiles):
            found = type(files).__name__
            raise SourceError(f"{reference}: {distribution} gave {found}, expected ModelFiles")
        return files

    return guarded


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
