"""CUDA's library of functions, as kernels of our interpreter call it: each against torch's in float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda.libdevice import tanh
from triton.language.extra.libdevice import rsqrt as inverse_root
from triton.language.math import exp as imported_exp
from triton.runtime.errors import InterpreterError

from gaugeblock.conformance.engine.triton.interpreter import watch
from tests.small_kernels import floats

UNARY = {
    **{name: getattr(torch, name) for name in (
        "rsqrt sqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc"
        " floor ceil trunc"
    ).split()},
    **{f"fast_{name}f": getattr(torch, name) for name in "exp log log2 log10 sin cos tan".split()},
    "exp10": lambda x: 10**x,
    "fast_exp10f": lambda x: 10**x,
    "cbrt": lambda x: x.abs().pow(1 / 3).copysign(x),
    "rcbrt": lambda x: x.abs().pow(-1 / 3).copysign(x),
    "abs": torch.abs,
    "rint": torch.round,
    "nearbyint": torch.round,
    "round": lambda x: x.sign() * (x.abs() + 0.5).floor(),
    "sqrt_rn": torch.sqrt,
    "rsqrt_rn": torch.rsqrt,
    "rcp_rn": torch.reciprocal,
    "saturatef": lambda x: x.clamp(0, 1),
}  # fmt: skip
BINARY = {
    **{name: getattr(torch, name) for name in "pow atan2 hypot fmod copysign".split()},
    "div_rn": torch.div,
    "fast_dividef": torch.div,
    "fast_powf": torch.pow,
    "fdim": lambda x, y: (x - y).clamp(min=0),
}
INTEGERS = {
    "isinf": torch.isinf,
    "finitef": torch.isfinite,
    "signbit": torch.signbit,
    "llrint": torch.round,
    "llround": lambda x: x.sign() * (x.abs() + 0.5).floor(),
    "float2int_rn": torch.round,
}
EDGES = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 1.0, -1.0, 0.49999997, 1e-30, 80.0, -80.0])


@triton.jit
def library_kernel(x, y, z, target, NAME: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    if COUNT == 1:
        result = getattr(libdevice, NAME)(tl.load(x + index))
    elif COUNT == 2:
        result = getattr(libdevice, NAME)(tl.load(x + index), tl.load(y + index))
    else:
        result = getattr(libdevice, NAME)(tl.load(x + index), tl.load(y + index), tl.load(z + index))
    tl.store(target + index, result)


@triton.jit
def imported_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, imported_exp(tanh(inverse_root(tl.load(source + index)))))


@triton.jit
def shadowing_kernel(source, target, tanh, BLOCK: tl.constexpr):
    """An argument that is named as what its module imports."""
    index = tl.arange(0, BLOCK)
    inverse_root = tl.load(source + index) * tanh
    tl.store(target + index, inverse_root)


def called(name: str, *operands: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    first, *others = operands
    target = torch.empty(len(first), dtype=dtype or first.dtype)
    padded = [*operands, *[first] * (3 - len(operands))]
    with watch() as seen:
        library_kernel[(1,)](*padded, target, name, 1 + len(others), len(first))
    assert not seen.unbatched
    return target


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether it is the exact value rounded, but for a tie or so: one neighbour in a thousand may be the other."""
    rounded = exact.to(found.dtype)
    same = (found == rounded) | (found.isnan() & rounded.isnan())
    neighbour = torch.isclose(found, rounded, rtol=2 * torch.finfo(found.dtype).eps, atol=0)
    return bool((same | neighbour).all()) and (found.dtype == torch.float64 or bool(same.double().mean() > 0.99))


def values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([EDGES, 3 * floats(256 - len(EDGES))]).to(dtype)


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_number(name):
    x = values()
    assert close(called(name, x), UNARY[name](x.double()))


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_numbers(name):
    x, y = values(), values().flip(0)
    assert close(called(name, x, y), BINARY[name](x.double(), y.double()))


@pytest.mark.parametrize("name", ["rsqrt", "tanh", "erf", "pow", "div_rn", "sqrt_rn", "fma"])
def test_functions_of_float64(name):
    x, y = values(torch.float64), values(torch.float64).flip(0)
    function = (UNARY | BINARY | {"fma": lambda x, y: x * y + x})[name]
    count = 3 if name == "fma" else 1 + (name in BINARY)
    assert close(called(name, *(x, y, x)[:count]), function(*(x, y)[: min(count, 2)]))


def test_a_product_and_sum_is_rounded_once():
    x, y, z = values(), values().flip(0), values().roll(1)
    assert torch.equal(called("fma", x, y, z), (x.double() * y.double() + z.double()).float())


@pytest.mark.parametrize("name", INTEGERS)
def test_functions_whose_results_are_integers(name):
    is_question = INTEGERS[name](torch.ones(1)).dtype == torch.bool
    x = torch.cat([values()[2:], torch.tensor([torch.inf, -torch.inf])]) if is_question else values()
    dtype = torch.int64 if name.startswith("ll") else torch.int32
    assert torch.equal(called(name, x, dtype=dtype), INTEGERS[name](x.double()).to(dtype))


def test_no_number_is_told():
    x = torch.tensor([torch.nan, 1.0, torch.inf, -torch.nan])
    assert called("isnan", x, dtype=torch.int32).tolist() == [1, 0, 0, 1]
    assert called("saturatef", x).tolist() == [0, 1, 1, 0]


def test_numbers_are_raised_to_whole_powers():
    x, y = values(), torch.arange(256, dtype=torch.int32) % 7 - 3
    assert close(called("pow", x, y), x.double() ** y.double())


def test_kernels_may_import_functions_by_name():
    source = floats(64).abs() + 0.1
    target = torch.empty(64)
    with watch() as seen:
        imported_kernel[(1,)](source, target, 64)
    exact = source.double().rsqrt().float().double().tanh().float().double().exp()
    assert close(target, exact) and not seen.unbatched


def test_names_of_a_kernel_s_own_are_its_own():
    source, target = floats(64), torch.empty(64)
    with watch():
        shadowing_kernel[(1,)](source, target, 3.0, 64)
    assert torch.equal(target, 3 * source)


def test_what_a_chip_s_library_does_not_take_is_refused():
    with watch(), pytest.raises(InterpreterError):
        called("rsqrt", floats(4, dtype=torch.bfloat16))
    with watch(), pytest.raises(InterpreterError):
        called("cyl_bessel_i0", floats(4))
