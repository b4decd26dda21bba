"""A file whose process dies while it is imported."""

import os

print("I have decided to leave", flush=True)
os._exit(0)
