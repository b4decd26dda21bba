"""Runs Triton kernels on the CPU, all programs of a launch in lockstep. Read `watching.py`, then `launch.py`."""

from gaugeblock.conformance.engine.triton.interpreter.memory import OutOfBoundsAccess
from gaugeblock.conformance.engine.triton.interpreter.watching import Watch, watch

__all__ = ["OutOfBoundsAccess", "Watch", "watch"]
