"""What a right variant is, and all of them."""

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.registry import DType, Implementation, import_folder
from gaugeblock.conformance.engine.trial import Subject

SOFTMAX, GROUPED, EXPERTS = "routers.softmax_topk", "routers.grouped_sigmoid_topk", "experts.fused_swiglu"
SWITCH = "routers.switch_top1"
MIXTRAL, BALANCE, Z = "moe_layers.mixtral_moe", "moe_layers.load_balancing_loss", "moe_layers.router_z_loss"
NORM, GATED_NORM = "layers.layer_norm_modulate", "layers.gated_residual_layer_norm_modulate"
INTERPOLATE, VELOCITY, FLOW_LOSS = (f"objectives.rectified_flow_{name}" for name in ("interpolate", "velocity", "loss"))
DIT, STEP = "dit.dit", "train_image_diffusion.train_step"
EVERY_DTYPE: tuple[DType, ...] = ("float32", "float16", "bfloat16")
LOG2_E = 1.4426950408889634
PUBLIC = ("transformers", "diffusers")  # modules of these libraries, where they are installed
_variants: list["Variant"] = []


@dataclass(frozen=True)
class Variant:
    """A right implementation.

    Attributes:
        name: Of the implementation.
        contract: What it fulfils.
        candidate: Makes it.
        summary: How it differs, in one sentence.
        fits: Whether it is made for a case: some have no groups of one expert, or want aligned sizes.
        claims: Fields of `Implementation` other than the defaults.
    """

    name: str
    contract: str
    candidate: Callable[[], Callable[..., Any]]
    summary: str
    fits: Callable[[Case], bool]
    claims: Mapping[str, Any]

    def subjects(self) -> list[Subject]:
        """The variant at each of its dtypes."""
        implementation = Implementation(self.contract, self.name, self.candidate(), **self.claims)
        return [Subject(implementation, dtype, "cpu") for dtype in implementation.dtypes]


def every_case(case: Case) -> bool:
    """Fits every case."""
    return True


def right(
    contract: str, *, fits: Callable[[Case], bool] = every_case, dtypes: tuple[DType, ...] = EVERY_DTYPE, **claims: Any
) -> Callable[[type], type]:
    """Registers a class whose instances are right implementations of `contract`; the fields are those of `Variant`."""

    def register(candidate: type) -> type:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", candidate.__name__).lower()
        _variants.append(Variant(name, contract, candidate, str(candidate.__doc__), fits, {"dtypes": dtypes} | claims))
        return candidate

    return register


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every right variant; those made of transformers' modules where that is installed."""
    import_folder("gaugeblock.conformance.selftest.right")
    for name in PUBLIC:
        if importlib.util.find_spec(name):
            importlib.import_module(f"gaugeblock.conformance.peers.{name}")
    return tuple(_variants)
