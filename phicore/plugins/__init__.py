"""Plugins: the hooks, what is found installed, and phicore's own, which use the same hooks."""

from phicore.plugins.hookspecs import hookimpl
from phicore.plugins.manager import (
    DISABLE,
    GROUP,
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
    "BackendInfo",
    "BrokenPlugin",
    "PluginInfo",
    "Plugins",
    "choose_backend",
    "hookimpl",
    "usable_backends",
]
