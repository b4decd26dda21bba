"""Interpreted kernels give the same bits on every CPU, and an element's bits depend on what it is computed from alone."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from gaugeblock.conformance.engine.triton.interpreter import functions

# What libraries ask when they choose their code.
PRETENDED = [
    {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2"},
    {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NPY_DISABLE_CPU_FEATURES": " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name]),
    },
]
SCRIPT = """
import hashlib, warnings
warnings.filterwarnings("ignore")
import torch
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts
from gaugeblock.conformance.engine.trial import Subject, Trial, digest

for name, dtype in (
    ("experts.fused_swiglu", "float32"), ("experts.fused_swiglu", "bfloat16"),
    ("routers.softmax_topk", "float32"), ("auxiliary_losses.router_z_loss", "float32"),
    ("routers.grouped_sigmoid_topk", "float16"), ("layers.layer_norm_modulate", "bfloat16"),
):
    contract = contracts()[name]
    (triton,) = (each for each in builtin_implementations(contract) if each.name == "triton")
    case = Case(**contract.landmarks[0], regime=contract.regimes[0].name)
    print(name, dtype, digest(Trial(Subject(triton, dtype, "cpu"), case).run(gradients=True)))
"""


def bits_on(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True, check=True, timeout=150
    )
    return done.stdout


@pytest.fixture(scope="module")
def here() -> str:
    return bits_on({})


@pytest.mark.parametrize("environment", PRETENDED, ids=lambda each: " ".join(each))
def test_bits_are_those_of_every_machine(environment, here):
    assert here.count("\n") == 6
    assert bits_on(environment) == here


def matrices(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 1, 1), (1, 1, 64), (1, 2, 64), (16, 1, 33), (16, 64, 64), (128, 128, 64)]
)
def test_matrix_products_are_summed_in_the_order_of_the_depth(rows, columns, depth):
    left, right = matrices(rows, depth).astype(np.float64), matrices(depth, columns).astype(np.float64)
    expected = sum(left[:, k, None] * right[None, k] for k in range(depth))
    assert np.array_equal(functions.matrix_product(left.astype(np.float32), right.astype(np.float32)), expected)


@pytest.mark.parametrize("programs", [1, 7, 256])
def test_matrix_products_do_not_depend_on_the_number_of_programs_or_rows(programs):
    left, right = matrices(programs, 16, 48), matrices(1, 48, 32)
    products = functions.matrix_product(left, right)
    for program in (0, programs - 1):
        assert np.array_equal(products[program], functions.matrix_product(left[program], right[0]))
        assert np.array_equal(products[program, 3:4], functions.matrix_product(left[program, 3:4], right[0]))
        transposed = functions.matrix_product(left[program], np.asfortranarray(right[0]))
        assert np.array_equal(products[program], transposed)


def test_functions_of_float32_are_rounded_from_float64():
    values = matrices(4096) * 20
    for name in ("exp", "sin", "cos"):
        rounded = functions.in_float64(getattr(np, name))(values).astype(np.float32)
        assert np.array_equal(rounded, getattr(torch.from_numpy(values).double(), name)().float().numpy())


def test_the_larger_of_zeros_is_the_positive_one():
    zeros = np.array([0.0, -0.0], np.float32)
    left, right = np.repeat(zeros, 2), np.tile(zeros, 2)
    assert np.signbit(functions.maximum(left, right)).tolist() == [False, False, False, True]
    assert np.signbit(functions.minimum(left, right)).tolist() == [False, True, True, True]


def test_a_fused_multiplication_and_addition_rounds_once():
    x = np.array([1 + 2**-23, 3.0, np.inf, 1.0], np.float32)
    y = np.array([1 + 2**-23, 1 / 3, 0.0, 1.0], np.float32)
    z = np.array([-1.0, -1.0, 1.0, 2**-60], np.float32)
    with np.errstate(invalid="ignore"):
        results = functions.fused_multiply_add(x, y, z).astype(np.float32)
    exact = [2**-22 + 2**-46, float(np.float32(1 / 3)) * 3 - 1, np.nan, 1.0]
    assert np.array_equal(results, np.array(exact, np.float32), equal_nan=True)


def test_the_upper_half_of_a_product_is_exact():
    x, y = (np.random.default_rng(seed).integers(0, 2**64, 1000, dtype=np.uint64) for seed in range(2))
    expected = [int(a) * int(b) >> 64 for a, b in zip(x, y, strict=True)]
    assert functions.multiply_high(x, y).tolist() == expected
    signed = x.astype(np.uint32).view(np.int32)
    expected = [(int(a) % 2**32) * (int(b) % 2**32) >> 32 for a, b in zip(signed, signed[::-1], strict=True)]
    assert functions.multiply_high(signed, signed[::-1]).view(np.uint32).tolist() == expected
