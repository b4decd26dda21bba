"""Calling an implementation, whatever framework it is written in: torch tensors in, torch tensors on the CPU out."""

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_map

from gaugeblock.conformance.engine.budget.dispatch import Watching
from gaugeblock.conformance.engine.budget.operations import CONVOLUTIONS, MATRIX_PRODUCTS, SUMS, ULPS
from gaugeblock.conformance.engine.budget.oracle import gradient_key
from gaugeblock.conformance.engine.calls import ResultCount, apply
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.pull_back import pull_back
from gaugeblock.conformance.engine.suggestion import one_line
from gaugeblock.conformance.engine.vocabulary import Tensors

UNSAID = "(no message"  # begins what stands for a text that could not be had
KEPT_TEXT = 64 << 10  # characters of what an error says


class BadResult(Exception):
    """What came back is not what the signature promises."""


NOT_THE_CANDIDATES = r"/(gaugeblock/conformance(?!/selftest|/peers)|site-packages|python3\.\d+)/"  # files


class Raised(Exception):
    """What a candidate raised: the names of the classes that its error is of, its message, and where."""

    def __init__(self, kinds: Sequence[str], message: str, where: str) -> None:
        super().__init__(f"raised {kinds[0]}: {(message.strip().splitlines() or ['(no message)'])[0]}")
        self.kinds, self.message, self.where = tuple(kinds), message, where

    @property
    def place(self) -> str:
        """The innermost line of the candidate's own, or an empty string."""
        frames = re.findall(r'File "([^"<>]+)", line (\d+), in (\S+)', self.where)
        own = [each for each in frames if not re.search(NOT_THE_CANDIDATES, each[0])]
        return f"in {own[-1][2]} ({os.path.basename(own[-1][0])}:{own[-1][1]})" if own else ""

    @staticmethod
    def of(error: BaseException) -> "Raised":
        """The same of an error that was caught."""
        return Raised([each.__name__ for each in type(error).__mro__], _said(error, str), _said(error, _traceback))


def _said(error: BaseException, how: Callable[[BaseException], str]) -> str:
    """What an error of a candidate's own class says, which may raise in its turn."""
    try:
        said = how(error)
        return f"{said[:KEPT_TEXT]}..." if len(said) > 2 * KEPT_TEXT else said
    except BaseException as another:
        return f"{UNSAID}: that raises {type(another).__name__})"


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-2 * KEPT_TEXT :]


@contextmanager
def candidates_own() -> Iterator[None]:
    """Tells what a candidate raises from what the engine around it does."""
    try:
        yield
    except (BadResult, Raised):
        raise
    except (Exception, SystemExit) as error:
        raise Raised.of(error) from error


@dataclass(frozen=True)
class Call:
    """One call of an operation."""

    inputs: Tensors
    """Flat inputs, laid out in memory as they are to be passed."""
    options: dict[str, Any]
    """Keyword arguments."""
    cotangents: Tensors | None = None
    """For each differentiable output, or None if only the outputs are wanted."""
    wanted: tuple[str, ...] | None = None
    """Keys of the inputs whose gradients are wanted; None for all that have one."""
    jit: bool = False
    """Whether to compile a JAX function, with the options static."""


def call_torch(contract: Contract, function: Callable[..., Any], call: Call) -> Tensors:
    """Outputs of a PyTorch function, and gradients through autograd; a gradient that does not exist raises `BadResult`."""
    wanted = _wanted(contract, call)
    leaves = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in call.inputs.items()}
    outputs = _returned(contract, function, leaves, call, torch.stack, torch.Tensor)
    device = next((each.device for each in leaves.values()), torch.device("cpu"))
    for key, output in outputs.items():
        if type(output) not in (torch.Tensor, torch.nn.Parameter):
            raise BadResult(f"{key} is a {type(output).__name__}, expected a plain torch.Tensor")
        if output.device.type != device.type:
            raise BadResult(f"{key} is on {output.device}, expected {device}")
    if not wanted:
        return {key: tensor.detach() for key, tensor in outputs.items()}
    assert call.cotangents is not None
    through = [key for key in contract.differentiable(outputs) if outputs[key].requires_grad]
    if not through:
        without = ", ".join(contract.differentiable(outputs))
        raise BadResult(f"{without} has no gradient function, so no gradient reaches {', '.join(wanted)}")
    for key in through:
        if outputs[key].shape != call.cotangents[key].shape:
            raise BadResult(f"{key} has shape {tuple(outputs[key].shape)}, expected {tuple(call.cotangents[key].shape)}")
    cotangents = [call.cotangents[key].to(outputs[key].dtype) for key in through]
    with candidates_own():
        gradients = pull_back([outputs[key] for key in through], [leaves[key] for key in wanted], cotangents)
    for key, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            raise BadResult(f"{key} gets no gradient")
        if gradient.device.type != leaves[key].device.type:
            raise BadResult(f"the gradient of {key} is on {gradient.device}, expected {leaves[key].device}")
    return {key: tensor.detach() for key, tensor in outputs.items()} | _gradients(wanted, gradients)


def call_jax(contract: Contract, function: Callable[..., Any], call: Call) -> Tensors:
    """Outputs of a JAX function, and gradients by `jax.vjp`, as torch tensors."""
    import jax
    import jax.numpy as jnp

    function = _jitted(function, tuple(call.options)) if call.jit else function
    wanted = _wanted(contract, call)
    arrays = {key: _to_jax(tensor) for key, tensor in call.inputs.items()}

    def differentiable(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        outputs = _returned(contract, function, arrays | leaves, call, jnp.stack, jax.Array)
        through = contract.differentiable(outputs)
        return {key: outputs[key] for key in through}, {key: outputs[key] for key in outputs if key not in through}

    if not wanted:
        outputs = _returned(contract, function, arrays, call, jnp.stack, jax.Array)
        return {key: _from_jax(array) for key, array in outputs.items()}
    assert call.cotangents is not None
    with candidates_own():
        flowing, pull_back, others = jax.vjp(differentiable, {key: arrays[key] for key in wanted}, has_aux=True)
    cotangents = {
        key: jax.device_put(_to_jax(call.cotangents[key]).astype(array.dtype), array.sharding) for key, array in flowing.items()
    }
    with candidates_own():
        gradients = pull_back(cotangents)[0]
    results = {key: _from_jax(array) for key, array in (flowing | others).items()}
    return results | _gradients(wanted, [_from_jax(gradients[key]) for key in wanted])


@cache
def _jitted(function: Callable[..., Any], options: tuple[str, ...]) -> Callable[..., Any]:
    import jax

    return jax.jit(function, static_argnames=options)


class LibraryInFloat64(Watching):
    """Torch's own matrix products, convolutions, sums and functions in float64, each rounded once to its dtype.

    On a CPU their bits depend on the batch: products choose a summation order by the number of rows, functions have one code for
    whole vectors and another for the rest. That is not the candidate's doing; what depends on the batch under this mode is.
    """

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        floating = args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        if name not in {*MATRIX_PRODUCTS, *CONVOLUTIONS, *SUMS, *ULPS} or not floating:
            return func(*args, **(kwargs or {}))
        widened = [each.to(torch.float64) if isinstance(each, torch.Tensor) else each for each in args]
        others = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        product = _grouped_mm if name == "_grouped_mm" else func.overloadpacket
        result = tree_map(lambda each: each.to(args[0].dtype), product(*widened, **others))
        return kwargs["out"].copy_(result) if kwargs and "out" in kwargs else result


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    """Torch's own, which takes no float64: groups of rows by a matrix each, or groups of columns by groups of rows."""
    groups = [slice(*ends) for ends in pairwise([0, *offs.long().tolist()])]
    if right.ndim == 2:
        return torch.stack([left[:, group] @ right[group] for group in groups])
    out = left.new_zeros(left.shape[0], right.shape[2])  # rows behind the last group belong to none
    for group, matrix in zip(groups, right, strict=True):
        out[group] = left[group] @ matrix
    return out


CALLERS: dict[str, Callable[[Contract, Callable[..., Any], Call], Tensors]] = {"torch": call_torch, "jax": call_jax}


def _wanted(contract: Contract, call: Call) -> list[str]:
    if call.cotangents is None:
        return []
    return contract.differentiable(call.inputs) if call.wanted is None else list(call.wanted)


def _returned(
    contract: Contract, function: Callable[..., Any], inputs: dict[str, Any], call: Call, stack: Any, kind: type
) -> dict[str, Any]:
    """Flat outputs, all of them arrays of the framework."""

    def guarded(*arguments: Any, **options: Any) -> Any:
        with candidates_own():
            return function(*arguments, **options)

    def stacked(steps: list[Any]) -> Any:
        for each in steps:
            require_kind("of a step, a result", each)
        if len({(tuple(each.shape), each.dtype) for each in steps}) > 1:
            raise BadResult(
                f"of one result, steps return shapes and dtypes {[(tuple(each.shape), each.dtype) for each in steps]}"
            )
        try:
            return stack(steps)
        except (RuntimeError, ValueError) as error:  # on different devices
            raise BadResult(f"one result of all steps cannot be stacked: {one_line(error)}") from None

    def require_kind(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise BadResult(f"{name} is a {type(value).__name__}, expected a {kind.__module__}.{kind.__name__}")

    try:
        outputs = apply(contract, guarded, inputs, call.options, stacked)
    except ResultCount as error:
        raise BadResult(str(error)) from None
    for key, value in outputs.items():
        require_kind(key, value)
    return outputs


def _gradients(wanted: list[str], gradients: Any) -> Tensors:
    return {gradient_key(key): gradient for key, gradient in zip(wanted, gradients, strict=True)}


def _to_jax(tensor: torch.Tensor) -> Any:
    import jax

    # a copy, since jax must not see torch write into its arrays; int64 becomes int32, as everywhere in jax
    narrow = tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor
    return jax.dlpack.from_dlpack(narrow.detach().clone(memory_format=torch.contiguous_format))


def _from_jax(array: Any) -> torch.Tensor:
    import jax

    on_one = array if len(array.devices()) == 1 else jax.device_put(array, jax.devices()[0])
    return torch.from_dlpack(on_one).clone()  # jax would compile a program for each shape that it copies
