"""What Python asks of a tensor: a condition, a number, the bounds of a loop. Where programs differ, they part."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.handle import Handle

MOST_QUESTIONS = 100_000  # of one batch: ten seconds and more; a kernel in which programs wait for each other asks without end


class Diverged(BaseException):
    """Programs of a batch differ in what Python does next. No Exception, which a kernel's caller may handle.

    Attributes:
        groups: The programs, by what they do.
    """

    def __init__(self, groups: list[np.ndarray]) -> None:
        super().__init__()
        self.groups = groups


class Unbatched(BaseException):
    """An operation that has no form for all programs at once."""


class WaitsForever(RuntimeError):
    """A loop does not end: programs wait for what others would do after them, or for something that never happens."""


class Programs:
    """The programs of a batch, which stay together as long as they agree."""

    def __init__(self, numbers: np.ndarray, describe: Callable[[int], str]) -> None:
        self.numbers, self._describe = numbers, describe
        self._questions = 0

    def agree_on(self, values: np.ndarray) -> Any:
        """The value that all programs have.

        Args:
            values: [programs or 1].

        Raises:
            Diverged: if they do not.
            WaitsForever: if they were asked too often.
        """
        self._questions += 1
        if self._questions > MOST_QUESTIONS:
            raise WaitsForever(
                f"{self._describe(self.numbers[0])}: a loop still turns after {MOST_QUESTIONS} conditions; "
                "programs that wait for each other cannot be interpreted"
            )
        if values.size == 1 or (values == values[0]).all():
            return values[0].item()
        distinct, group = np.unique(values, return_inverse=True)
        if len(distinct) == 1:  # NaN
            return values[0].item()
        raise Diverged([self.numbers[group == number] for number in range(len(distinct))])


def turns(programs: Programs, start: Any, stop: Any, step: Any) -> Iterable[Any]:
    """`range` of numbers or tensors: the programs part by how often they turn, not by where they begin."""
    tensors = [each for each in (start, stop) if isinstance(each, tl.tensor)]
    step = int(step)
    if not tensors:
        return range(int(start), int(stop), step)
    first, last = (
        each.handle.scalars.astype(np.int64) if isinstance(each, tl.tensor) else np.array([int(each)]) for each in (start, stop)
    )
    distance = last - first if step > 0 else first - last
    count = programs.agree_on(np.maximum(0, -(-distance // abs(step))))
    is_wide = any(tensor.dtype.primitive_bitwidth == 64 for tensor in tensors)
    if not is_wide and (first == first[0]).all():
        return range(int(first[0]), int(first[0]) + count * step, step)
    return _tensors(first, count, step, tl.int64 if is_wide else tl.int32)


def _tensors(first: np.ndarray, count: int, step: int, dtype: Any) -> Iterator[Any]:
    """A loop's variable in the dtype of its bounds: a product with it wraps, or does not, as on a GPU."""
    numpy_dtype = np.int64 if dtype == tl.int64 else np.int32
    for turn in range(count):
        yield tl.core.tensor(Handle((first + turn * step).astype(numpy_dtype), dtype), dtype)
