"""The words that rows, claims and options share, each list in one place. Nothing is imported here: the command starts with it."""

from typing import Literal, get_args

DType = Literal["float32", "float16", "bfloat16"]
Device = Literal["cpu", "cuda"]
Framework = Literal["torch", "jax"]
Kind = Literal["reference", "triton", "distributed", "jax", "compiled", "user"]
Rounding = Literal["strict", "eager"]
ProfileName = Literal["quick", "ci", "thorough"]

DTYPES: tuple[DType, ...] = get_args(DType)
DEVICES: tuple[Device, ...] = get_args(Device)
FRAMEWORKS: tuple[Framework, ...] = get_args(Framework)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)  # the tightest first
PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)
