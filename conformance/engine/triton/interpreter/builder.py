"""The builder: what Triton's front end calls in place of a compiler, for a batch of programs."""

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter as stock

from gaugeblock.conformance.engine.triton.interpreter import libdevice
from gaugeblock.conformance.engine.triton.interpreter.accesses import Accesses
from gaugeblock.conformance.engine.triton.interpreter.arithmetic import Arithmetic
from gaugeblock.conformance.engine.triton.interpreter.control_flow import Programs, Unbatched
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle
from gaugeblock.conformance.engine.triton.interpreter.memory import Memory
from gaugeblock.conformance.engine.triton.interpreter.shapes import Shapes


class NotBatched:
    """Raises `Unbatched` for each operation that Triton's own interpreter has: those that are batched stand before it."""


def _refuse(name: str) -> Any:
    def method(builder: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unbatched(name)

    return method


for _name in dir(stock.InterpreterBuilder):
    if _name.startswith("create_"):
        setattr(NotBatched, _name, _refuse(_name.removeprefix("create_")))


class Builder(Accesses, Arithmetic, Shapes, NotBatched, stock.InterpreterBuilder):
    """All operations of a launch; `start_batch` comes before the first."""

    def __init__(self, memory: Memory, grid: tuple[int, ...], poison: bool) -> None:
        super().__init__()
        # a dozen operations for each of int32, whose result is not looked at
        self.options = stock.InterpreterOptions(sanitize_overflow=False)
        self.memory, self.poison, self.has_atomics = memory, poison, False
        self.set_grid_dim(*grid)

    def start_batch(self, numbers: np.ndarray) -> None:
        """Takes the place of these programs."""
        self.programs, self.writes = numbers, []
        self.agreement = Programs(numbers, lambda number: f"{self.memory.kernel}, program {self.memory.name(number)}")
        indices = [each.astype(np.int32) for each in np.unravel_index(numbers, self.grid_dim)]
        self._ids = [each[:1] if (each == each[0]).all() else each for each in indices]

    def create_get_program_id(self, axis: int) -> Handle:
        return Handle(self._ids[axis], tl.int32)

    create_extern_elementwise = libdevice.call
    create_get_num_programs = stock.InterpreterBuilder.create_get_num_programs
    create_assert = stock.InterpreterBuilder.create_assert
    create_assume = stock.InterpreterBuilder.create_assume
    create_barrier = stock.InterpreterBuilder.create_barrier

    def create_print(self, prefix: str, hex: bool, values: list[Handle], is_signed: Any) -> None:
        for place, number in enumerate(self.programs):
            for value in values:
                shown = value.full[place if value.data.shape[0] > 1 else 0]
                text = np.array2string(shown, formatter={"int": lambda each: f"{each:#x}"} if hex else None)
                print(f"{self.memory.name(number)}{prefix}{text}")
