"""Contracts of the routers that choose by noisy logits."""

from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import noisy_routers


@row
def noisy_topk() -> Contract:
    """The row of `noisy_routers.noisy_topk`."""
    return Contract(
        name="noisy_routers.noisy_topk",
        summary="Each token goes to the top_k experts of highest noisy logit; how noisy is learned.",
        formula="h = router_logits + noise * softplus(noise_logits); ids = topk(h); weights = softmax(h[ids])",
        source="Outrageously Large Neural Networks (arXiv:1701.06538) section 2.1, equations 3 to 5",
        reference=noisy_routers.noisy_topk,
        inputs=(of_routers.LOGITS, Input("noise_logits", PER_EXPERT, differentiable=True), NOISE),
        outputs=of_routers.OUTPUTS,
        options=("top_k",),
        batch="num_tokens",
        landmarks=(
            noisy_sizes(33, 60, 4),  # a number of experts that is no power of two
            noisy_sizes(17, 5, 3),
            noisy_sizes(17, 300, 8),  # ids above 255
            noisy_sizes(5, 3, 3),  # every expert chosen
            noisy_sizes(33, 32, 4),  # MoE-32
            noisy_sizes(9, 256, 4),  # MoE-256
        ),
        factors=(*FACTORS, of_routers.CHOSEN),
        build=noisy_point,
        traits=NOISY_TRAITS,
        regimes=(
            *map(_learned, of_routers.SOFTMAX_REGIMES),
            _learned(Regime("lattice", of_routers.lattice, "exact", differentiable=False)),
        ),
        flops=lambda sizes: 2 * of_routers.flops(sizes),
        workloads=(
            Workload("moe-32/train-4096", noisy_sizes(4096, 32, 4), "arXiv:1701.06538 section 5.1 and appendix C.1: MoE-32"),
            Workload("moe-256/train-4096", noisy_sizes(4096, 256, 4), "arXiv:1701.06538 section 5.1 and appendix C.1: MoE-256"),
        ),
        formulas=(_softplus_of_exponentials,),
        selection=Selection("topk_ids", _noisy_scores, "top_k"),
        relabel=of_routers.shuffled_experts,
        rejections=of_routers.SOFTMAX_REJECTIONS,
        implementations=(triton(),),
    )


@row
def ste_topk() -> Contract:
    """The row of `noisy_routers.ste_topk`."""
    return Contract(
        name="noisy_routers.ste_topk",
        summary="Each token goes to its top_k most probable experts under noise; one alone weighs 1, and has a gradient.",
        formula=(
            "p_clean = softmax(router_logits); p = softmax(router_logits + noise_std * noise) if training, else p_clean; "
            "ids = topk(p); weights = p[ids] / (sum + 1e-9), or 1 if top_k = 1, of which in training dweights = dp[ids]; "
            "entropy = -sum(p_clean * ln(p_clean + 1e-9))"
        ),
        source="sumitdotml/moe-emergence moe_emergence/moe.py",
        reference=noisy_routers.ste_topk,
        inputs=(of_routers.LOGITS, NOISE),
        outputs=(
            *of_routers.OUTPUTS,
            Output("router_probs", PER_EXPERT, dtype="float32", differentiable=True),
            Output("router_probs_clean", PER_EXPERT, dtype="float32", differentiable=True),
            Output("logits", PER_EXPERT, dtype="float32", differentiable=True),
            Output("entropy", ("num_tokens",), dtype="float32", differentiable=True),
        ),
        options=("top_k", "noise_std", "training"),
        batch="num_tokens",
        landmarks=(
            ste_sizes(33, 60, 4, 0.1, True),
            ste_sizes(17, 5, 1, 0.052, True),
            ste_sizes(17, 300, 8, 0.1, False),  # ids above 255
            ste_sizes(5, 3, 3, 1.0, True),  # every expert chosen
            ste_sizes(3, 2048, 2, 0.1, True),  # two of so many sum to little, and the constant beside it shows
            ste_sizes(33, 8, 1, 0.1, True),  # moe-emergence, moe-main
            ste_sizes(33, 8, 2, 0.1, True),  # moe-emergence, top2
            ste_sizes(33, 8, 1, 0.0, False),
        ),
        factors=(*FACTORS, of_routers.CHOSEN, either("noise_std", 0.0, 0.052, 0.1, 1.0), either("training", False, True)),
        build=ste_point,
        traits=STE_TRAITS,
        regimes=tuple(map(_noisy, of_routers.SOFTMAX_REGIMES)),
        flops=lambda sizes: 3 * of_routers.flops(sizes),
        workloads=(
            Workload("moe-emergence/train-top1", ste_sizes(1024, 8, 1, 0.1, True), "sumitdotml/moe-emergence preset moe-main"),
            Workload("moe-emergence/train-top2", ste_sizes(1024, 8, 2, 0.1, True), "sumitdotml/moe-emergence preset top2"),
        ),
        formulas=(_ste_of_exponentials,),
        selection=Selection("topk_ids", _ste_scores, "top_k"),
        relabel=of_routers.shuffled_experts,
        rejections=(
            *of_routers.SOFTMAX_REJECTIONS,
            Rejection("a negative deviation", "noise_std", lambda call: {"noise_std": -0.1}),
        ),
        implementations=(triton(),),
    )


PER_EXPERT = ("num_tokens", "num_experts")
NOISE = Input("noise", PER_EXPERT, dtype="float32", whole=("num_experts",))


def noisy_sizes(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}


def ste_sizes(num_tokens: int, num_experts: int, top_k: int, noise_std: float, training: bool) -> dict[str, Any]:
    """One point of the input space."""
    return noisy_sizes(num_tokens, num_experts, top_k) | {"noise_std": noise_std, "training": training}


def noisy_point(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return noisy_sizes(num_tokens, num_experts, top_k) if top_k <= num_experts else None


def ste_point(num_tokens: int, num_experts: int, top_k: int, noise_std: float, training: bool) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return ste_sizes(num_tokens, num_experts, top_k, noise_std, training) if top_k <= num_experts else None


FACTORS = (of_routers.TOKENS, kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257))


def _of_few_digits(tensors: Tensors) -> Tensors:
    return {"noise": tensors["noise"].to(torch.bfloat16).to(torch.float64)}


def _below(bound: float, logits: torch.Tensor) -> torch.Tensor:
    """Logits that lie below a negative bound: as far as they are from 0, where they do not already."""
    return torch.where(logits <= bound, logits, bound - logits.abs())


def _small(numbers: torch.Tensor) -> torch.Tensor:
    """What 64ths leave, of numbers beyond one of them."""
    return torch.where(numbers.abs() <= 1 / 64, numbers, numbers.fmod(1 / 64))


def _noise_decides(tensors: Tensors) -> Tensors:
    """Logits are 0 and deviations of the noise near 10^-8, which must have all their digits."""
    return {"router_logits": torch.zeros_like(tensors["router_logits"]), "noise_logits": _below(-18, tensors["noise_logits"])}


def _loud(tensors: Tensors) -> Tensors:
    """Exponentials of the deviations' logits overflow; the draws are small, so that no weight is all but 1."""
    return {"noise_logits": -_below(-90, -tensors["noise_logits"]), "noise": _small(tensors["noise"])}


def _flat(tensors: Tensors) -> Tensors:
    """Probabilities are nearly the same, so that those of the chosen sum to little."""
    return {name: _small(tensors[name]) for name in ("router_logits", "noise")}


IN_BFLOAT16 = Trait("bfloat16", "dtype of noise", _of_few_digits, dtypes={"noise": "bfloat16"})
NOISY_TRAITS = (
    Trait("negative", "router_logits", of_routers.negative),
    Trait("alone, near 10^-8", "noise_logits", _noise_decides),
    Trait("large", "noise_logits", _loud),
    Trait("very negative", "noise_logits", lambda tensors: {"noise_logits": _below(-120, tensors["noise_logits"])}),
    IN_BFLOAT16,
)
STE_TRAITS = (
    *of_routers.SOFTMAX_TRAITS[1:],
    Trait("nearly equal", "router_logits", _flat),
    IN_BFLOAT16,
)


def _noisy(regime: Regime) -> Regime:
    """The same logits, and noise; where logits tie, noisy ones tie as well."""

    def make(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, shape = regime.make(draw, parameters), of_routers.logits_shape(parameters)
        if regime.name == "ties":
            return tensors | {"noise": draw.integers(-1, 2, *shape).to(torch.float64)}
        return tensors | {"noise": torch.zeros(shape).double() if regime.name == "lattice" else draw.normal(*shape)}

    return replace(regime, make=make)


def _learned(regime: Regime) -> Regime:
    """The same, and logits of the noise's deviation."""

    def make(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, shape = _noisy(regime).make(draw, parameters), of_routers.logits_shape(parameters)
        return tensors | {"noise_logits": torch.zeros(shape).double() if regime.name == "ties" else 2 * draw.normal(*shape)}

    return replace(regime, make=make)


def _noisy_scores(router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, **_: Any) -> torch.Tensor:
    return noisy_routers.noisy_logits(router_logits, noise_logits, noise)


def _softplus_of_exponentials(
    router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels have it, which have no softplus."""
    deviation = noise_logits.clamp(min=0) + torch.log1p(torch.exp(-noise_logits.abs()))
    noisy = router_logits + noise * deviation
    topk_ids = noisy.topk(top_k, -1).indices
    return noisy.gather(-1, topk_ids).softmax(-1), topk_ids


def _ste_scores(router_logits: torch.Tensor, noise: torch.Tensor, *, noise_std: float, training: bool, **_: Any) -> torch.Tensor:
    return noisy_routers.noisy_probs(router_logits, noise, noise_std if training else 0.0)


def _ste_of_exponentials(
    router_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int, noise_std: float, training: bool
) -> tuple[torch.Tensor, ...]:
    """As kernels have it: what is wrong with the sum of exponentials is wrong with all probabilities of a token."""

    def softmax(logits: torch.Tensor) -> torch.Tensor:
        exponentials = torch.exp(logits - logits.amax(-1, keepdim=True))
        return exponentials / exponentials.sum(-1, keepdim=True)

    clean = softmax(router_logits)
    probs = softmax(router_logits + noise_std * noise) if training else clean
    topk_ids = probs.topk(top_k, -1).indices
    chosen = probs.gather(-1, topk_ids)
    if top_k > 1:
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-9)
    else:
        weights = 1 + (chosen - chosen.detach()) if training else torch.ones_like(chosen)
    return weights, topk_ids, probs, clean, router_logits, -(clean * torch.log(clean + 1e-9)).sum(-1)
