"""A file that takes memory while it is imported, until there is no more."""

import mmap

taken = []
while True:
    taken.append(mmap.mmap(-1, 2**30))  # reserved, never touched
