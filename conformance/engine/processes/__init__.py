"""Where candidates are called: in processes of their own, which get inputs and give results back, and hold nothing else.

Read `perform.py` first (what one call is), then `handle.py` (the judge's side of a candidate's process).
"""
