"""Planted bugs and right variants: what the suite is measured by."""
