"""What a judge raises."""


class Violation(AssertionError):
    """A broken promise: one line, and what helps to find the cause."""

    def __init__(self, message: str, diagnosis: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message, self.diagnosis, self.details = message, diagnosis, details
