"""Between a call of our Triton kernels and its result nothing waits for the device, forward or backward: CUDA graphs capture it.
What decodes language models waits only to ask whether a block is done.

On a CPU nothing waits: here what would is refused, outside of the launches that the interpreter carries out on the host.
"""

import math
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
from gaugeblock.optimized.compiled import sdar as compiled_sdar
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARConfig, SDARDecodingConfig
from gaugeblock.reference.torch import decoding, sdar
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
    torch.tensor,  # the other way: what is made of a list is copied to the device, and the host waits
    torch.from_numpy,
}


class HostRead(Exception):
    """What waits for the device."""


def refuse(name: str) -> None:
    raise HostRead(name)


class _Operations(TorchDispatchMode):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        counts = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        masks = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in WAITING or counts or masks:
            self.tell(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ON_THE_HOST:
            self.tell(func.__name__)
            with torch._C.DisableTorchFunction(), _disable_current_modes():  # told once
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(tell: Callable[[str], None] = refuse) -> Iterator[None]:
    """Refuses what waits for the device, or tells of it; tensors are taken for a GPU's, whose values no check reads."""
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Methods(tell), _Operations(tell):
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
        lambda tensor: tensor + torch.tensor([1, 2, 3]),
    ],
)
def test_what_waits_is_refused(read: Any) -> None:
    with pytest.raises(HostRead), no_host_reads():
        read(torch.tensor([1, 0, 2]))


MODEL = SDARConfig(
    vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, mask_token_id=11, block_length=4,
)  # fmt: skip
STATE = {name: torch.linspace(-1, 1, math.prod(each)).reshape(each) for name, each in sdar.state_shapes(MODEL).items()}
PROMPTS, EXAMPLES = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]), torch.tensor([0, 9])
DRAWN = {"mask_id": MODEL.mask_token_id, "new_tokens": 8, "temperature": 0.7}


@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential", "entropy_bounded"])
@pytest.mark.parametrize("sdar_cached", [sdar.sdar_cached, compiled_sdar.sdar_cached_by_library], ids=["reference", "library"])
def test_sdar_waits_to_ask_whether_a_block_is_done_and_for_nothing_else(sdar_cached: Any, strategy: Any) -> None:
    config = SDARDecodingConfig(**DRAWN, block_length=4, steps=2, top_k=5, top_p=0.9, strategy=strategy, forbidden_ids=(0,))
    model, asked, passes = decoding.with_cache(sdar_cached, STATE, config=MODEL), list[str](), list[str]()

    def denoise(*arguments: Any) -> torch.Tensor:
        passes.append("pass")
        return model.denoise(*arguments)

    with no_host_reads(asked.append), torch.no_grad():
        decoding.sdar_generate(replace(model, denoise=denoise), PROMPTS, EXAMPLES, config=config, seed=0)
    # once before each pass; once more that says a block is done, if it was not out of passes; once whether a row goes on
    blocks = config.new_tokens // config.block_length
    assert set(asked) == {"__bool__"} and len(passes) + blocks <= len(asked) <= len(passes) + 2 * blocks


@pytest.mark.parametrize(
    ("loop", "config"),
    [
        (decoding.llada_generate, LLaDADecodingConfig(**DRAWN, block_length=4, steps=4, cfg_scale=0.5)),
        (decoding.llada_generate, LLaDADecodingConfig(**DRAWN, block_length=4, steps=4, remasking="random", late_ids=(0,))),
        (decoding.dream_generate, DreamDecodingConfig(**DRAWN, steps=3)),
        (decoding.dream_generate, DreamDecodingConfig(**DRAWN, steps=3, algorithm="entropy", alg_temp=0.3, top_p=0.9)),
    ],
    ids=["llada", "llada, random", "dream, origin", "dream, entropy"],
)
def test_loops_of_given_length_wait_for_nothing(loop: Any, config: Any) -> None:
    with no_host_reads(), torch.no_grad():
        loop(partial(sdar.sdar, STATE, config=MODEL), PROMPTS, EXAMPLES, config=config, seed=0)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]
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
