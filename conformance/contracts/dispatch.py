"""Contracts of dispatch."""

from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.contracts import expert_load as of_load
from gaugeblock.conformance.contracts import moe_layers as of_layers
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, kind_of_count, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import dispatch


@row
def sort_by_expert() -> Contract:
    """The row of `dispatch.sort_by_expert`."""
    return Contract(
        name="dispatch.sort_by_expert",
        summary="Routed rows sorted by expert, those of one expert in the order of their tokens.",
        formula="order = stable argsort of topk_ids, flat; inverse = its inverse; group_sizes[e] = number of ids that are e",
        source="MegaBlocks (arXiv:2211.15841) section 4.2",
        reference=dispatch.sort_by_expert,
        inputs=(IDS,),
        outputs=(
            Output("order", (ROUTED,), dtype="int64"),
            Output("inverse", ("num_tokens", "top_k"), dtype="int64"),
            Output("group_sizes", ("num_experts",), dtype="int64"),
        ),
        options=("num_experts",),
        batch="num_tokens",
        landmarks=(
            sort_sizes(100, 5, 3),
            sort_sizes(33, 8, 2),  # Mixtral
            sort_sizes(17, 300, 8),  # ids above 255
            sort_sizes(707, 2, 1),  # more rows of one expert than a byte can count, or bfloat16
            sort_sizes(17, 128, 8),  # Qwen3
        ),
        factors=SORT_FACTORS,
        build=sort_point,
        traits=(of_experts.INT32, of_experts.UINT8),
        regimes=REGIMES,
        dtypes=("float32",),
        cases=0.5,
        flops=lambda parameters: float(_routed(parameters)),
        workloads=_workloads(lambda _, experts, top_k: sort_sizes(4096, experts, top_k)),
        rejections=SORT_REJECTIONS,
        without=IN_ORDER,
        implementations=(triton("sorting:sort_by_expert", dtypes=("float32",)),),
    )


@row
def align_to_blocks() -> Contract:
    """The row of `dispatch.align_to_blocks`."""
    return Contract(
        name="dispatch.align_to_blocks",
        summary="Routed rows sorted by expert, those of each padded to whole blocks; as many blocks as the worst routing has.",
        formula=(
            "blocks of expert e: ceil(rows of e / block_size); sorted_token_ids = rows of expert 0, padding up to a whole block, "
            "rows of expert 1, ...; padding is num_tokens * top_k, the expert of needless blocks -1"
        ),
        source="vLLM's and SGLang's moe_align_block_size",
        reference=dispatch.align_to_blocks,
        inputs=(IDS,),
        outputs=(
            Output("sorted_token_ids", (PLACES,), dtype="int64"),
            Output("expert_ids", (BLOCKS,), dtype="int64"),
            Output("num_tokens_post_padded", (), dtype="int64"),
        ),
        options=("num_experts", "block_size"),
        batch="num_tokens",
        landmarks=(
            align_sizes(100, 5, 3, 16),
            align_sizes(33, 8, 2, 64),  # Mixtral
            align_sizes(17, 300, 8, 16),  # ids above 255, most experts without rows
            align_sizes(64, 2, 1, 32),  # blocks may be just full
            align_sizes(707, 2, 1, 64),  # more rows of one expert than a byte can count, or bfloat16
            align_sizes(17, 128, 8, 16),  # Qwen3
        ),
        factors=(*SORT_FACTORS, edges("block_size", 1, 2, 16, 64, option=True)),
        build=align_point,
        traits=(of_experts.INT32, of_experts.UINT8),
        regimes=(*REGIMES, Regime("full blocks", full_blocks)),
        dtypes=("float32",),
        cases=0.5,
        flops=lambda parameters: float(_routed(parameters)),
        workloads=_workloads(lambda _, experts, top_k: align_sizes(4096, experts, top_k, 64)),
        rejections=(*SORT_REJECTIONS, Rejection("no rows in a block", "block_size", lambda call: {"block_size": 0})),
        without={**IN_ORDER, "nan_containment": "ids are no floating numbers"},
        implementations=(triton("sorting:align_to_blocks", dtypes=("float32",)),),
    )


@row
def permute() -> Contract:
    """The row of `dispatch.permute`."""
    return Contract(
        name="dispatch.permute",
        summary="The token of each place, so that the rows of an expert lie side by side.",
        formula="rows[n] = hidden_states[order[n] // top_k]",
        source="MegaBlocks (arXiv:2211.15841) section 4.2",
        reference=dispatch.permute,
        inputs=(
            Input("hidden_states", ("num_tokens", "hidden_size"), differentiable=True),
            Input("order", ("num_rows",), dtype="int64", indexes="num_routed"),
        ),
        outputs=(Output("rows", ("num_rows", "hidden_size"), differentiable=True),),
        options=("top_k",),
        batch="num_rows",
        landmarks=(
            permute_sizes(99, 70, 3, 33),
            permute_sizes(34, 300, 2, 17),  # several tiles of columns
            permute_sizes(61, 16, 4, 40),  # a rank's part of the rows
            permute_sizes(40, 64, 8, 5),  # Qwen3's choices
        ),
        factors=(edges("num_rows", 1, 2, 15, 16, 17), *ROW_FACTORS),
        build=permute_point,
        traits=(Trait("int32", "dtype of order", dtypes={"order": "int32"}),),
        regimes=(Regime("dithered", tokens), Regime("special", special_tokens, "worst element")),
        cases=0.5,
        flops=lambda parameters: 0.0,
        workloads=_workloads(lambda width, _, top_k: permute_sizes(4096 * top_k, width, top_k, 4096)),
        rejections=(Rejection("no choices", "top_k", lambda call: {"top_k": 0}),),
        implementations=(triton(),),
    )


@row
def unpermute() -> Contract:
    """The row of `dispatch.unpermute`."""
    return Contract(
        name="dispatch.unpermute",
        summary="The rows of each token added up, weighted.",
        formula="out[t] = sum over j of topk_weights[t, j] * rows[inverse[t, j]]",
        source="Shazeer et al. 2017 (arXiv:1701.06538) equation 1; MegaBlocks (arXiv:2211.15841) section 4.2",
        reference=dispatch.unpermute,
        inputs=(
            Input("rows", ("num_rows", "hidden_size"), differentiable=True),
            Input("inverse", ("num_tokens", "top_k"), dtype="int64", indexes="num_rows"),
            Input("topk_weights", ("num_tokens", "top_k"), dtype="float32", differentiable=True),
        ),
        outputs=(Output("hidden_states_out", ("num_tokens", "hidden_size"), differentiable=True),),
        options=(),
        batch="num_tokens",
        landmarks=(
            unpermute_sizes(33, 70, 3),
            unpermute_sizes(17, 300, 2),  # several tiles of columns
            unpermute_sizes(20, 16, 4, 32),  # padded to blocks
            unpermute_sizes(5, 64, 8),  # Qwen3's choices
        ),
        factors=(edges("num_tokens", 1, 2, 15, 16, 17), *ROW_FACTORS),
        build=unpermute_sizes,
        traits=(Trait("int32", "dtype of inverse", dtypes={"inverse": "int32"}),),
        regimes=(
            Regime("dithered", expert_outputs),
            Regime("adversarial", cancelling, "worst element"),
            Regime("special", special_rows, "worst element"),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        cases=0.5,
        flops=lambda parameters: 2.0 * parameters["num_tokens"] * parameters["top_k"] * parameters["hidden_size"],
        workloads=_workloads(lambda width, _, top_k: unpermute_sizes(4096, width, top_k)),
        implementations=(triton(),),
    )


def _routed(parameters: Parameters) -> int:
    return parameters["num_tokens"] * parameters["top_k"]


def _blocks(parameters: Parameters) -> int:
    return dispatch.most_blocks(_routed(parameters), parameters["num_experts"], parameters["block_size"])


ROUTED = Derived("num_tokens * top_k", _routed)
BLOCKS = Derived("most_blocks", _blocks)
PLACES = Derived("most_blocks * block_size", lambda parameters: _blocks(parameters) * parameters["block_size"])


IDS = Input("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts")


MODELS = (
    ("mixtral-8x7b/prefill-4096", (4096, 8, 2), of_layers.MIXTRAL_8X7B),
    ("qwen3-30b-a3b/prefill-4096", (2048, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
    ("deepseek-v3/prefill-4096", (7168, 256, 8), "deepseek-ai/DeepSeek-V3 config.json"),
)


def _workloads(sizes_of: Callable[[int, int, int], Parameters]) -> tuple[Workload, ...]:
    """Published models, from hidden_size, num_experts and top_k."""
    return tuple(Workload(name, sizes_of(*of_model), source) for name, of_model, source in MODELS)


def sort_sizes(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the space of routings."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}


def sort_point(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sort_sizes(num_tokens, num_experts, top_k) if top_k <= num_experts else None


def align_sizes(num_tokens: int, num_experts: int, top_k: int, block_size: int) -> dict[str, Any]:
    """The same with blocks."""
    return sort_sizes(num_tokens, num_experts, top_k) | {"block_size": block_size}


def align_point(num_tokens: int, num_experts: int, top_k: int, block_size: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return align_sizes(num_tokens, num_experts, top_k, block_size) if top_k <= num_experts else None


def permute_sizes(num_rows: int, hidden_size: int, top_k: int, num_tokens: int) -> dict[str, Any]:
    """One point of the space of gathers."""
    sizes = {"num_rows": num_rows, "hidden_size": hidden_size, "top_k": top_k, "num_tokens": num_tokens}
    return sizes | {"num_routed": num_tokens * top_k}


def permute_point(num_rows: int, hidden_size: int, top_k: int) -> dict[str, Any]:
    """The point with these values of the factors: as many tokens as the rows need."""
    return permute_sizes(num_rows, hidden_size, top_k, -(-num_rows // top_k))


def unpermute_sizes(num_tokens: int, hidden_size: int, top_k: int, padding: int = 0) -> dict[str, Any]:
    """One point of the space of sums; so many rows more than there are choices."""
    sizes = {"num_tokens": num_tokens, "hidden_size": hidden_size, "top_k": top_k}
    return sizes | {"num_rows": num_tokens * top_k + padding}


SORT_FACTORS = (
    edges("num_tokens", 1, 2, 15, 16, 17, 65),
    kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 256, 257),  # 256 is 0 in eight bits
    edges("top_k", 1, 2, 3, 4),
)
ROW_FACTORS = (
    kinds("hidden_size", kind_of_width, 1, 16, 31, 24, 100),
    edges("top_k", 1, 2, 3, 4),
)


def _ids_alone(make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    return lambda draw, parameters: {"topk_ids": make(draw, parameters)["topk_ids"]}


REGIMES = (
    Regime("dithered", _ids_alone(of_load.chosen)),
    Regime("skew", _ids_alone(of_load.at_the_ends)),
    Regime("repeated ids", _ids_alone(of_load.repeated)),
)


def full_blocks(draw: Draw, parameters: Parameters) -> Tensors:
    """Experts have a block of rows, one less, or one more; the last has what is left."""
    num_rows, experts = parameters["num_tokens"] * parameters["top_k"], parameters["num_experts"]
    sizes = (parameters["block_size"] + draw.integers(-1, 2, experts - 1)).cumsum(0)
    ids = torch.searchsorted(sizes, draw.permutation(num_rows), right=True)
    return {"topk_ids": ids.reshape(parameters["num_tokens"], parameters["top_k"])}


def tokens(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens in any order, each for each of its choices once; more rows than that are some again."""
    num_rows, num_routed = parameters["num_rows"], parameters["num_routed"]
    order = draw.permutation(max(num_rows, num_routed))[:num_rows] % num_routed
    return {"hidden_states": draw.normal(parameters["num_tokens"], parameters["hidden_size"]), "order": order}


def special_tokens(draw: Draw, parameters: Parameters) -> Tensors:
    """A token of NaN, and one with an infinity."""
    tensors = tokens(draw, parameters)
    tensors["hidden_states"][parameters["num_tokens"] // 2] = torch.nan
    tensors["hidden_states"][-1:, 0] = -torch.inf
    return tensors


def expert_outputs(draw: Draw, parameters: Parameters) -> Tensors:
    """Random rows in any order, one for each choice; more choices than that have some again; weights sum to about 1."""
    num_tokens, top_k, num_rows = (parameters[name] for name in ("num_tokens", "top_k", "num_rows"))
    order = draw.permutation(max(num_rows, num_tokens * top_k))[: num_tokens * top_k] % num_rows
    return {
        "rows": draw.normal(num_rows, parameters["hidden_size"]),
        "inverse": order.reshape(num_tokens, top_k),
        "topk_weights": (0.2 + draw.uniform(num_tokens, top_k)) / top_k,
    }


def cancelling(draw: Draw, parameters: Parameters) -> Tensors:
    """Weights of both signs and rows of magnitudes from 2^-8 to 2^8."""
    tensors = expert_outputs(draw, parameters)
    scale = torch.exp2(draw.integers(-8, 9, parameters["num_rows"], 1).to(torch.float64))
    signs = 1 - 2 * draw.integers(0, 2, *tensors["topk_weights"].shape)
    return tensors | {"rows": tensors["rows"] * scale, "topk_weights": tensors["topk_weights"] * signs}


def special_rows(draw: Draw, parameters: Parameters) -> Tensors:
    """A row of NaN and one with an infinity, which have a token; rows that no token has are all NaN."""
    tensors = expert_outputs(draw, parameters)
    needed = torch.zeros(parameters["num_rows"], 1, dtype=torch.bool)
    needed[tensors["inverse"].flatten()] = True
    rows = torch.where(needed, tensors["rows"], torch.nan)
    rows[tensors["inverse"][:1, 0]] = torch.nan
    rows[tensors["inverse"][-1:, -1], 0] = torch.inf
    return tensors | {"rows": rows}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Small integers, and powers of two for weights."""
    tensors = expert_outputs(draw, parameters)
    powers = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)[draw.integers(0, 3, *tensors["topk_weights"].shape)]
    return tensors | {"rows": draw.integers(-4, 5, *tensors["rows"].shape).to(torch.float64), "topk_weights": powers}


SORT_REJECTIONS = (
    Rejection("no ids", "topk_ids", changed("topk_ids", lambda each: each[:, :0])),
    Rejection("no experts", "num_experts", lambda call: {"num_experts": 0}),
)


IN_ORDER = dict.fromkeys(("batch_invariance", "permutation_equivariance"), "a row's place depends on all others")
