"""Plugins: the hooks, the search for installed plugins, and phicore's built-in plugin."""

from phicore.plugins.hookspecs import hookimpl
from phicore.plugins.manager import (
    DISABLE,
    GROUP,
    NONE_INSTALLED,
    BackendInfo,
    BrokenPlugin,
    PluginInfo,
    Plugins,
    choose_backend,
    usable_backends,
)

__all__ = [
    "DISABLE",
    "GROUP",
    "NONE_INSTALLED",
    "BackendInfo",
    "BrokenPlugin",
    "PluginInfo",
    "Plugins",
    "choose_backend",
    "hookimpl",
    "usable_backends",
]
