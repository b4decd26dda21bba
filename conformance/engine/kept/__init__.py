"""Verdicts that are kept: what a verdict depends on, found without importing it, and where verdicts wait for the next run."""
