"""The engine, which runs the network: requests, sequences, compiled steps and timings."""

from phicore.engine.engine import Engine
from phicore.engine.request import Request
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence
from phicore.engine.timings import Timings

__all__ = ["Engine", "Output", "Request", "Runner", "Sequence", "Timings"]
