"""Contracts of the experts that have a gate and no biases."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts.routed_experts import sizes
from gaugeblock.conformance.engine.contract import Contract, Regime, Workload, row
from gaugeblock.conformance.engine.implementation import compiled, distributed, jax, triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import experts


@row
def fused_swiglu() -> Contract:
    """The row of `experts.fused_swiglu`."""
    return Contract(
        name="experts.fused_swiglu",
        summary="Each token passes the SwiGLU experts that its router chose; their weighted outputs are added up.",
        formula=(
            "gate, up = halves of w13[e] @ hidden_states[t]; out[t] = sum over j of topk_weights[t, j] * w2[e] @ "
            "(silu(gate) * up), e = topk_ids[t, j]"
        ),
        source="Shazeer et al. 2017 (arXiv:1701.06538) equation 1; Shazeer 2020 (arXiv:2002.05202) eq. 6; weights as in vLLM",
        reference=experts.fused_swiglu,
        inputs=(of_experts.HIDDEN_STATES, of_experts.W13, of_experts.W2, *of_experts.ROUTES),
        outputs=of_experts.OUTPUTS,
        options=(),
        batch="num_tokens",
        parameters=of_experts.parameters,
        landmarks=(
            *of_experts.LANDMARKS,
            sizes(17, 24, 16, 8, 2),  # Mixtral's experts
            sizes(16, 16, 8, 128, 8),  # Qwen3's, with rows for more than 64 experts
            of_experts.MANY_TILES,
            of_experts.IDS_ABOVE_255,
        ),
        factors=of_experts.FACTORS,
        build=of_experts.point,
        traits=of_experts.TRAITS,
        regimes=(
            *of_experts.regimes(of_experts.dithered, down=-5),
            Regime("lattice", of_experts.lattice, "exact", differentiable=False),
        ),
        flops=of_experts.flops,
        moved=of_experts.moved,
        workloads=(
            *of_experts.published("mixtral-8x7b", (4096, 14336, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json"),
            *of_experts.published("qwen3-30b-a3b", (2048, 768, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
            *of_experts.published("deepseek-v3", (7168, 2048, 256, 8), "deepseek-ai/DeepSeek-V3 config.json"),
            *of_experts.published("olmoe-1b-7b", (2048, 1024, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json"),
            Workload("two-cores/prefill-2048", sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
            *(
                Workload(f"{model}/small-{use}", sizes(num_tokens, *shape), f"a size for a CPU: {source}")
                for model, shape, source in SMALL_MODELS
                for use, num_tokens in (("decode-1", 1), ("decode-8", 8), ("decode-64", 64), ("prefill-1024", 1024))
            ),
        ),
        relabel=of_experts.shuffled,
        cases=0.5,
        shardings=of_experts.SHARDINGS,
        rejections=(of_experts.IDS_FOR_MORE_TOKENS, of_experts.ODD_ROWS),
        implementations=(
            triton(),
            # bfloat16 first: float32 has no descriptors
            triton("experts:fused_swiglu_fast", name="triton-fast", dtypes=("bfloat16", "float32"), batch_invariant=False),
            triton("experts:fused_swiglu_recomputed", name="triton-recomputed", dtypes=("bfloat16",)),
            compiled("torch-grouped"),
            jax("jax-grouped", dtypes=COMPILED_DTYPES),
            of_experts.EXPERT_PARALLEL,
            distributed("expert-parallel-overlapped", "experts:fused_swiglu_overlapped", **of_experts.ON_RANKS),
            distributed("gathered-tokens", "experts_gathered_tokens:fused_swiglu", **of_experts.ON_RANKS),
            distributed(
                "replicated-tokens",
                "experts_replicated_tokens:fused_swiglu",
                sharding="replicated_tokens",
                **of_experts.ON_RANKS,
            ),
            of_experts.tensor_parallel("fused_swiglu"),
            # each number of devices takes a compilation: tests/test_jax_sharding.py has 1 and 2
            distributed("jax-expert-parallel", "expert_parallel:fused_swiglu", framework="jax", world_sizes=(4,)),
            *(
                distributed(
                    f"jax-{way.replace('_', '-')}",
                    f"sharded_experts:fused_swiglu_{way}",
                    framework="jax",
                    world_sizes=(4,),
                    sharding=sharding,
                )
                for way, sharding in (
                    ("gathered_tokens", "expert_parallel"),
                    ("replicated_tokens", "replicated_tokens"),
                    ("tensor_parallel", "tensor_parallel"),
                )
            ),
        ),
    )


@row
def fused_geglu() -> Contract:
    """The row of `experts.fused_geglu`."""
    return Contract(
        name="experts.fused_geglu",
        summary="Each token passes the GEGLU experts that its router chose; their weighted outputs are added up.",
        formula=(
            "gate, up = halves of w13[e] @ hidden_states[t]; out[t] = sum over j of topk_weights[t, j] * w2[e] @ "
            "(gelu(gate) * up), e = topk_ids[t, j]; gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), or x / 2 * (1 + tanh(sqrt(2 / pi) "
            "* (x + 0.044715 * x**3)))"
        ),
        source="Shazeer 2020 (arXiv:2002.05202) equation 6, GEGLU; with tanh: Hendrycks and Gimpel 2016 (arXiv:1606.08415)",
        reference=experts.fused_geglu,
        inputs=(of_experts.HIDDEN_STATES, of_experts.W13, of_experts.W2, *of_experts.ROUTES),
        outputs=of_experts.OUTPUTS,
        options=("approximate",),
        batch="num_tokens",
        landmarks=of_experts.dealt(
            (*of_experts.LANDMARKS, sizes(3, 16, 8, 64, 8), of_experts.IDS_ABOVE_255),
            {"approximate": "none"},
            {"approximate": "tanh"},
        ),
        factors=(*of_experts.FACTORS, of_experts.APPROXIMATE),
        build=geglu_point,
        traits=of_experts.TRAITS,
        regimes=(
            *of_experts.regimes(of_experts.dithered, down=-5),
            # a library's erf errs to one side in so narrow a range, so that errors are no sample
            Regime("constant-probing", in_the_tail, "worst element"),
            Regime("lattice", of_experts.lattice, "exact", differentiable=False),
        ),
        flops=of_experts.flops,
        moved=of_experts.moved,
        workloads=(
            Workload("olmoe-1b-7b/prefill-4096", geglu_sizes(4096, 2048, 1024, 64, 8), OLMOE),
            Workload("olmoe-1b-7b/decode-64", geglu_sizes(64, 2048, 1024, 64, 8), OLMOE),
            Workload("two-cores/prefill-2048", geglu_sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
        ),
        formulas=(geglu_by_sums,),
        relabel=of_experts.shuffled,
        cases=0.5,
        shardings=of_experts.SHARDINGS,
        rejections=(of_experts.IDS_FOR_MORE_TOKENS, of_experts.ODD_ROWS),
        implementations=(triton(), compiled("torch-grouped"), of_experts.EXPERT_PARALLEL),
    )


SMALL_MODELS = (  # as many experts and choices, narrower by the same factor inside and outside
    ("mixtral-8x7b", (512, 1792, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json, widths 1/8"),
    ("qwen3-30b-a3b", (512, 192, 128, 8), "Qwen/Qwen3-30B-A3B config.json, widths 1/4"),
    ("deepseek-v3", (448, 128, 256, 8), "deepseek-ai/DeepSeek-V3 config.json, widths 1/16"),
    ("olmoe-1b-7b", (512, 256, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json, widths 1/4"),
)
COMPILED_DTYPES = ("float32", "bfloat16")  # each shape and dtype takes JAX a compilation
OLMOE = "allenai/OLMoE-1B-7B-0924 config.json, for its sizes: its experts are SwiGLU"


def geglu_sizes(num_tokens: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space of `fused_geglu`, with tanh, as most published models have it."""
    return sizes(num_tokens, hidden_size, intermediate_size, num_experts, top_k) | {"approximate": "tanh"}


def geglu_point(approximate: str, **values: int) -> dict[str, Any] | None:
    """The point of `fused_geglu` with these values of the factors."""
    point = of_experts.point(**values)
    return None if point is None else point | {"approximate": approximate}


def in_the_tail(draw: Draw, parameters: Parameters) -> Tensors:
    """Gates about -3 to -2.5, where the two GELUs lie 3 to 10 % apart."""
    tensors, inner = of_experts.dithered(draw, parameters), parameters["intermediate_size"]
    hidden = tensors["hidden_states"] / 16
    hidden[:, 0] = 1
    tensors["w13"][:, :inner, 0] = -3 + draw.uniform(parameters["num_experts"], inner) / 2
    tensors["w13"][:, inner:, 0] = 1
    return tensors | {"hidden_states": hidden}


def geglu_by_sums(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: str,
) -> torch.Tensor:
    """`fused_geglu` with the GELU of libraries."""

    def geglu_experts(rows: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        gate, up = experts.grouped_matmul(rows, w13, group_sizes).chunk(2, dim=-1)
        return experts.grouped_matmul(of_experts.gelu_by_sums(gate, approximate) * up, w2, group_sizes)

    return experts.sum_of_experts(geglu_experts, hidden_states, topk_weights, topk_ids, num_experts=len(w2))
