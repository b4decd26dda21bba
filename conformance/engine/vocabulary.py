"""The words that rows, claims and options share, each list in one place. Nothing else is imported here: the command starts with
it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "float16", "bfloat16"]
Device = str  # one of torch's device types: the CPU, or what an accelerator's backend has brought
Framework = Literal["torch", "jax"]
Kind = Literal["reference", "triton", "distributed", "jax", "compiled", "user"]
Rounding = Literal["strict", "eager"]
ProfileName = Literal["quick", "ci", "thorough"]

DTYPES: tuple[DType, ...] = get_args(DType)
DEVICES: tuple[Device, ...] = ("cpu", "cuda")  # that optimized versions claim, as far as they say nothing else
FRAMEWORKS: tuple[Framework, ...] = get_args(Framework)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)  # the tightest first
PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)
# Of an element, where a contract fixes the dtype.
BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float8_e4m3fn": 1, "int8": 1, "bool": 1}

Parameters = Mapping[str, Any]  # sizes and options of a case
Tensors = dict[str, "torch.Tensor"]
