"""The end of an error message about a name."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """The nearest known name, first of those that go on from there, or all of them."""
    known = sorted(known, key=lambda each: not each.startswith(name))
    near = known[:1] if name and known and known[0].startswith(name) else difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["(no message)"])[0]
