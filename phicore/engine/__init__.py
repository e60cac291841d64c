"""Running the network: sequences, the steps that are compiled, and their time."""

from phicore.engine.engine import Engine

__all__ = ["Engine"]
