"""What a candidate's process prints: read without end, so that nobody waits, and kept as far as anybody will read it."""

import os
import select
import threading
import time

SHOW_SECONDS = 0.5  # for what was printed before an answer to be read
KEPT_OUTPUT = 64 << 10  # bytes of what is printed


class Output(threading.Thread):
    """Reads what a process prints, without end, and keeps the beginning."""

    def __init__(self, file: int) -> None:
        super().__init__(daemon=True, name="gaugeblock-output")
        self.file, self.lock = file, threading.Lock()
        self.kept, self.more = bytearray(), 0
        self.start()

    def run(self) -> None:
        """Until the last process that has the other end is gone."""
        while True:
            try:
                chunk = os.read(self.file, 1 << 16)
            except OSError:
                return
            if not chunk:
                os.close(self.file)
                return
            with self.lock:
                room = KEPT_OUTPUT - len(self.kept)
                self.kept += chunk[:room]
                self.more += max(0, len(chunk) - room)

    def taken(self, *, ended: bool) -> str:
        """What was printed since it was last asked; all of it, if the process has ended or answered."""
        deadline = time.monotonic() + SHOW_SECONDS
        while self.is_alive() and time.monotonic() < deadline and (ended or select.select([self.file], [], [], 0)[0]):
            self.join(0.005)
        with self.lock:
            text, more = self.kept.decode(errors="replace"), self.more
            self.kept, self.more = bytearray(), 0
        return text + (f"\n... and {more:,} bytes more" if more else "")
