"""Candidates that cheat or do harm, each in one way, and what the gate must say of each.

Read `table.py` first. The other files are what a user's own would be: none of them is imported by the engine, all are judged.
"""
