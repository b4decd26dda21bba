"""Between a call of our Triton kernels and its result nothing waits for the device, forward or backward: CUDA graphs capture it.

On a CPU nothing waits: here what would is refused, outside of the launches that the interpreter carries out on the host.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from gaugeblock.conformance.engine.budget.oracle import rounded_cotangents
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.registry import contracts, implementations, load
from gaugeblock.reference import validation
from gaugeblock.reference.validation import arrays

TRITON = [each for name in contracts() for each in implementations(name) if each.kind == "triton"]
# Operations whose result, or whose size, the host must know before it goes on.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
}
ON_THE_HOST = {
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
}


class HostRead(Exception):
    """What waits for the device."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        counts = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        masks = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in WAITING or counts or masks:
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ON_THE_HOST:
            raise HostRead(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Refuses what waits for the device; tensors are taken for a GPU's, whose values no check reads."""
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Methods(), _Operations():
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(arrays, "_is_readable", lambda array: False)
        yield


@pytest.mark.parametrize("implementation", TRITON, ids=lambda each: each.contract)
def test_a_call_waits_for_nothing(implementation: Implementation) -> None:
    contract = contracts()[implementation.contract]
    case = Case(**contract.landmarks[0], regime=contract.regimes[0].name)
    inputs = make_inputs(contract, case, "float32")
    call = Call(inputs, options(contract, case), rounded_cotangents(contract, case, "float32"))
    function = load(implementation)
    with no_host_reads():
        call_torch(contract, function, call)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.unique(),
        lambda tensor: torch.repeat_interleave(tensor, torch.tensor([1, 2, 0])),
        lambda tensor: torch.zeros(5)[: int(tensor.max())],
    ],
)
def test_what_waits_is_refused(read: Any) -> None:
    with pytest.raises(HostRead), no_host_reads():
        read(torch.tensor([1, 0, 2]))


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_values_on_a_gpu_are_checked_only_where_the_caller_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    bad = torch.tensor([3, 9]).as_subclass(OnGpu)
    validation.expert_ids_in_range(bad, num_experts=4)
    with validation.gpu_values_checked():
        with pytest.raises(ValueError, match=r"topk_ids must be in 0\.\.3, got 3\.\.9"):
            validation.expert_ids_in_range(bad, num_experts=4)
        capturing[0] = True
        validation.expert_ids_in_range(bad, num_experts=4)
    capturing[0] = False
    validation.expert_ids_in_range(bad, num_experts=4)
