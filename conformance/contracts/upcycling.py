"""Contract of the optimizer's step that leaves experts without tokens alone."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either, kind_of_count, kind_of_width, kinds
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import upcycling


@row
def adamw_of_used_experts() -> Contract:
    """The row of `upcycling.adamw_of_used_experts`."""
    return Contract(
        name="upcycling.adamw_of_used_experts",
        summary="A step of AdamW for the experts that had tokens; parameters, moments and steps of the others stay as they are.",
        formula=(
            "of experts with tokens: steps + 1; exp_avg = beta1 exp_avg + (1 - beta1) gradient; exp_avg_sq = beta2 exp_avg_sq + "
            "(1 - beta2) gradient**2; parameter - learning_rate (exp_avg / (1 - beta1**steps) / (sqrt(exp_avg_sq / "
            "(1 - beta2**steps)) + adam_epsilon) + weight_decay parameter)"
        ),
        source="torch.optim.AdamW, which skips parameters without gradient; sumitdotml/moe-emergence moe_emergence/train.py",
        reference=upcycling.adamw_of_used_experts,
        formulas=(as_torch_has_it,),
        inputs=(*(Input(name, OF_EXPERT) for name in ("parameter", "gradient", *MOMENTS)), *COUNTS),
        outputs=(
            *(Output(f"new_{name}", OF_EXPERT) for name in ("parameter", *MOMENTS)),
            Output("new_steps", ("num_experts",), dtype="int64"),
        ),
        options=("learning_rate", "beta1", "beta2", "adam_epsilon", "weight_decay"),
        batch="num_experts",
        landmarks=(
            sizes(5, 70),
            sizes(8, 96, **USUAL),  # what moe-emergence trains with; none of it is exact in float32
            sizes(3, 1, weight_decay=0.0, beta1=0.0),
            sizes(300, 3, beta2=0.0),
        ),
        factors=(
            kinds("num_experts", kind_of_count, 1, 2, 8, 5, 257),
            kinds("expert_size", kind_of_width, 1, 16, 31, 24, 100),
            either("weight_decay", 0.0, 2**-3),
            either("beta1", 0.0, 1 - 2**-3),
            either("beta2", 0.0, 1 - 2**-10),
            either("adam_epsilon", 2**-8, 2**-5),
        ),
        build=sizes,
        traits=(
            Trait("steps of int32", "dtype of steps", dtypes={"steps": "int32"}),
            Trait(
                "steps of int8, up to 127",  # where int8 ends, and steps go on
                "dtype of steps",
                lambda tensors: {"steps": tensors["steps"].clamp(max=127)},
                dtypes={"steps": "int8"},
            ),
            Trait("tokens of int32", "dtype of tokens_per_expert", dtypes={"tokens_per_expert": "int32"}),
            Trait("all have tokens", "tokens", lambda tensors: {"tokens_per_expert": tensors["tokens_per_expert"].clamp(min=1)}),
            Trait("none has tokens", "tokens", lambda tensors: {"tokens_per_expert": 0 * tensors["tokens_per_expert"]}),
        ),
        regimes=(
            Regime("under way", under_way, differentiable=False),
            Regime("fresh", fresh, differentiable=False),
            Regime("special", special, "worst element", differentiable=False),
        ),
        dtypes=("float32",),
        cases=0.5,
        flops=lambda parameters: 14.0 * parameters["num_experts"] * parameters["expert_size"],
        workloads=(
            Workload(
                "moe-emergence/layer",
                sizes(8, 768 * 3072, **USUAL),
                "openai-community/gpt2 config.json; sumitdotml/moe-emergence moe_emergence/train.py",
            ),
            Workload("two-cores/layer", sizes(8, 2**19, **USUAL), "a size for a CPU"),
        ),
        relabel=of_experts.shuffled,
        rejections=(
            *(
                Rejection(f"{name} of fewer experts", name, changed(name, lambda each: each[:-1]))
                for name in ("gradient", "steps")
            ),
            *(Rejection(f"{name} of 1", name, lambda call, name=name: {name: 1.0}) for name in ("beta1", "beta2")),  # type: ignore[misc]
            Rejection("a negative rate", "learning_rate", lambda call: {"learning_rate": -1.0}),
            Rejection("parameters of bfloat16", "parameter", changed("parameter", torch.Tensor.bfloat16)),
        ),
        without={"nan_containment": "no example is differentiable; experts of NaN are in the regime special"},
    )


OF_EXPERT = ("num_experts", "expert_size")
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTS = tuple(Input(name, ("num_experts",), dtype="int64") for name in ("steps", "tokens_per_expert"))
USUAL = {"learning_rate": 5e-5, "beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01}
GRADIENT_SIZE = 0.03  # of one element: moments have it, and adam_epsilon is not far from it


def sizes(num_experts: int, expert_size: int, **others: float) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value, of which adam_epsilon is a gradient's size."""
    ordinary = {
        "num_experts": num_experts,
        "expert_size": expert_size,
        "learning_rate": 2**-5,
        "beta1": 1 - 2**-3,
        "beta2": 1 - 2**-10,
        "adam_epsilon": 2**-8,
        "weight_decay": 2**-3,
    }
    return ordinary | others


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of a run: experts have had different numbers of steps, and a third of them has no tokens now."""
    experts, shape = parameters["num_experts"], (parameters["num_experts"], parameters["expert_size"])
    return {
        "parameter": draw.normal(*shape),
        "gradient": GRADIENT_SIZE * draw.normal(*shape),
        "exp_avg": GRADIENT_SIZE * draw.normal(*shape),
        "exp_avg_sq": GRADIENT_SIZE**2 * (0.5 + draw.uniform(*shape)),
        "steps": draw.integers(0, 1000, experts),
        "tokens_per_expert": draw.integers(0, 3, experts),
    }


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps, with the largest corrections of moments; parameters are 0, so that an update has all its digits."""
    tensors = under_way(draw, parameters)
    few = draw.integers(0, 8, parameters["num_experts"])
    return {**tensors, "parameter": 0 * tensors["parameter"], "exp_avg": 0 * tensors["exp_avg"], "steps": few}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """Experts without tokens have gradients of NaN, and one with tokens has an infinite one."""
    tensors = under_way(draw, parameters)
    tensors["gradient"][tensors["tokens_per_expert"] == 0] = torch.nan
    tensors["gradient"][tensors["tokens_per_expert"].argmax(), 0] = torch.inf
    return tensors


def as_torch_has_it(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    *,
    learning_rate: float,
    weight_decay: float,
    **others: float,
) -> tuple[torch.Tensor, ...]:
    """torch.optim.AdamW decays first, by a factor that is rounded, and interpolates the average of gradients."""
    used = (tokens_per_expert > 0)[:, None]
    decay = 1 - learning_rate * weight_decay * parameter.new_ones(())  # one number, whose error all parameters share
    decayed = torch.where(used, decay * parameter, parameter)
    stepped, _, new_sq, new_steps = upcycling.adamw_of_used_experts(
        decayed, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, learning_rate=learning_rate, weight_decay=0.0, **others
    )
    new_avg = torch.where(used, exp_avg + (1 - others["beta1"]) * (gradient - exp_avg), exp_avg)
    return stepped, new_avg, new_sq, new_steps
