"""Contracts of noise schedules, as far as they are functions of arrays."""

import torch

from gaugeblock.conformance.contracts.noised_examples import all_equal, by_value
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import noise_schedules


@row
def shift_sigmas() -> Contract:
    """The row of `noise_schedules.shift_sigmas`."""
    return Contract(
        name="noise_schedules.shift_sigmas",
        summary="Moves the sigmas of a flow towards noise, so that their odds are `shift` times as large.",
        formula="out = shift sigma / (1 + (shift - 1) sigma)",
        source="Esser et al. 2024 (arXiv:2403.03206) equation 23",
        reference=noise_schedules.shift_sigmas,
        inputs=(Input("sigmas", ("batch_size",), differentiable=True),),
        outputs=(Output("shifted", ("batch_size",), differentiable=True),),
        options=("shift",),
        batch="batch_size",
        landmarks=(sizes(65), sizes(33, 1.0), sizes(33, 0.25)),
        factors=(edges("batch_size", 1, 2, 3, 32, 65), either("shift", 3.0, 1.0, 0.25, 1.15)),
        build=sizes,
        traits=(all_equal("sigmas", sigmas=0.0), all_equal("sigmas", sigmas=1.0)),
        regimes=(Regime("dithered", dithered), Regime("adversarial", near_ends, "worst element")),
        flops=lambda parameters: 4.0 * parameters["batch_size"],
        workloads=(
            Workload("sd3/training-table", sizes(1000), "stabilityai/stable-diffusion-3-medium scheduler/scheduler_config.json"),
        ),
        cases=0.2,
        without={"nan_containment": "a sigma that is no number is refused"},
        rejections=(by_value("more than nothing but noise", "sigmas", {"sigmas": 1.5}),),
    )


def sizes(batch_size: int, shift: float = 3.0) -> dict[str, object]:
    """One point of the input space."""
    return {"batch_size": batch_size, "shift": shift}


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Anywhere between data and noise."""
    return {"sigmas": draw.uniform(parameters["batch_size"])}


def near_ends(draw: Draw, parameters: Parameters) -> Tensors:
    """Nearly data and nearly noise."""
    nearly = torch.exp2(-1 - 12 * draw.uniform(parameters["batch_size"]))
    return {"sigmas": torch.where(draw.integers(0, 2, parameters["batch_size"]) == 1, nearly, 1 - nearly)}
