"""The gate: contracts of operations, and one engine that checks any implementation against any of them."""

from gaugeblock.conformance.engine.registry import implements

__all__ = ["implements"]
