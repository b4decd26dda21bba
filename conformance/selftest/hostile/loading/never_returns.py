"""A file that takes for ever to be imported."""

import time

while True:
    time.sleep(1)
