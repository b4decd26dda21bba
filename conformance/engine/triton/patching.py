"""How the checks reach into Triton: by wrapping a method for a while."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def wrapped(owner: type, name: str, wrapper: Callable) -> Iterator[None]:
    """Replaces the method `name` of `owner` by `wrapper(original, self, ...)` and puts it back."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)
