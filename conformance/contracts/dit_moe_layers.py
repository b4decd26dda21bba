"""The contract of the MoE layer of DiT-MoE."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import grouped_routers as of_groups
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts import routed_layers as of_layers
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import compiled, distributed, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.shardings import EvenMultiple
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import moe_states
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.torch import dit_moe_layers, routers


@row
def dit_moe() -> Contract:
    """The row of `dit_moe_layers.dit_moe`."""
    return Contract(
        name="dit_moe_layers.dit_moe",
        summary="Each token passes the SwiGLU experts that its gate scores highest, and a shared one; with a loss of their load.",
        formula=(
            "s = softmax(hidden_states @ gate.weight.T), or sigmoid; ids = topk(s) of the groups of highest single s; weights = "
            "s[ids] (/ (sum + 1e-20) if renormalize) * routed_scaling_factor; hidden_states_out = fused_swiglu(hidden_states, "
            "experts, weights, ids) + shared_swiglu(hidden_states, shared_experts); auxiliary_loss = aux_loss_alpha * "
            "sequence_balance_loss(router_logits), of all samples as one or, if per_sample, of each"
        ),
        source="Fei et al. 2024 (arXiv:2407.11633) section 2; feizc/DiT-MoE models.py; the gate's options as EasyDeL names them",
        reference=dit_moe_layers.dit_moe,
        inputs=(
            Input("hidden_states", (*TOKENS, "hidden_size"), differentiable=True),
            of_layers.inputs(moe_states.DIT_MOE)[1],
        ),
        outputs=(
            Output("hidden_states_out", (*TOKENS, "hidden_size"), differentiable=True),
            Output("router_logits", (*TOKENS, "num_experts"), dtype="float32", differentiable=True, whole=("num_experts",)),
            Output("topk_ids", (*TOKENS, "top_k"), dtype="int64", indexes="num_experts"),
            Output("auxiliary_loss", (), dtype="float32", differentiable=True),
        ),
        options=("config",),
        configure=lambda parameters: {"config": configuration(parameters)},
        batch="batch_size",
        landmarks=(
            sizes((3, 11, 40, 24, 5), 28, DiTMoEConfig()),  # tails everywhere
            sizes((2, 35, 16, 32, 8), 17, DiTMoEConfig(per_sample=True)),  # DiT-MoE's experts
            sizes((1, 5, 40, 24, 16), 40, DiTMoEConfig(top_k=1, aux_loss_alpha=1.0)),  # DiT-MoE-G's
            sizes((2, 8, 24, 16, 6), 8, DiTMoEConfig(3, 0.001, True, "sigmoid", 3, 2, True, 2.5)),
            sizes((3, 4, 24, 16, 64), 8, DiTMoEConfig(6, 0.001, False, "softmax", 8, 4, True, 1.0)),
            sizes((2, 9, 16, 8, 6), 16, DiTMoEConfig(2, 0.01, False, "sigmoid", 2, 1, False, 2.5)),
        ),
        factors=FACTORS,
        build=point,
        traits=(gate_in_turn(),),
        regimes=tuple(
            replace(each, make=of_samples(each.make), judged="worst element" if each.judged == "exact" else each.judged)
            for each in of_layers.regimes(ENTRIES, more=of_layers.and_shared)
        ),
        cases=0.25,
        flops=lambda parameters: of_layers.flops(_all(parameters)),
        moved=lambda parameters, itemsize: of_layers.moved(_all(parameters), itemsize),
        workloads=(
            Workload("dit-moe-s-8e2a/train-32x256", sizes((32, 256, 384, 1536, 8), 768, DiTMoEConfig()), PUBLIC),
            Workload("dit-moe-xl-8e2a/train-8x256", sizes((8, 256, 1152, 4608, 8), 2304, DiTMoEConfig()), PUBLIC),
            Workload("dit-moe-g-16e2a/sample-2x1024", sizes((2, 1024, 1408, 5632, 16), 2816, DiTMoEConfig()), PUBLIC),
            Workload("two-cores/prefill-2048", sizes((8, 256, 384, 512, 8), 768, DiTMoEConfig()), "a size for a CPU"),
        ),
        selection=Selection("topk_ids", scores, "top_k", group_scores=group_scores, group_count="topk_groups"),
        relabel=of_groups.shuffled_groups,
        shardings={"expert_parallel": {"batch_size": "uneven", "num_experts": EvenMultiple("num_groups")}},
        rejections=REJECTIONS,
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:dit_moe", **of_experts.ON_RANKS),
        ),
    )


TOKENS = ("batch_size", "num_tokens")
PUBLIC = "feizc/DiT-MoE models.py"
ENTRIES: of_layers.Entries = {**of_layers.ROUTED, **of_layers.shared_entries("shared_experts")}
FACTORS = (
    edges("batch_size", 1, 2, 3),
    *of_experts.FACTORS,
    of_layers.SHARED_WIDTH,
    either("scores", "softmax", "sigmoid"),
    either("per_sample", False, True),
    kinds("num_groups", kind_of_count, 1, 2, 4, 3),
    edges("topk_groups", 1, 2, 3, option=True),
    either("renormalize", False, True),
    either("routed_scaling_factor", 1.0, 2.5),
)


def sizes(shape: tuple[int, int, int, int, int], shared_intermediate_size: int, config: DiTMoEConfig) -> dict[str, Any]:
    """One point of the input space: [batch_size, num_tokens, hidden_size, intermediate_size, num_experts]."""
    batch_size, num_tokens, hidden_size, intermediate_size, num_experts = shape
    of_routed = of_experts.sizes(num_tokens, hidden_size, intermediate_size, num_experts, config.top_k)
    return {"batch_size": batch_size, **of_routed, "shared_intermediate_size": shared_intermediate_size, **vars(config)}


def point(batch_size: int, shared_intermediate_size: int, num_groups: int, topk_groups: int, **values: Any) -> Any:
    """The point with these values of the factors."""
    options = {name: values.pop(name) for name in ("scores", "per_sample", "renormalize", "routed_scaling_factor")}
    experts, top_k = values["num_experts"], values.pop("top_k")
    if experts % num_groups or topk_groups > num_groups or top_k > topk_groups * experts // num_groups:
        return None
    config = DiTMoEConfig(top_k, num_groups=num_groups, topk_groups=topk_groups, **options)
    shape = (batch_size, *(values[name] for name in ("num_tokens", "hidden_size", "intermediate_size", "num_experts")))
    return sizes(shape, shared_intermediate_size, config)


def configuration(parameters: Parameters) -> DiTMoEConfig:
    """The options at given parameters."""
    return DiTMoEConfig(**{field.name: parameters[field.name] for field in fields(DiTMoEConfig)})


def _all(parameters: Parameters) -> Parameters:
    """The sizes of a batch of samples, as those of a batch of tokens."""
    return {**parameters, "num_tokens": parameters["batch_size"] * parameters["num_tokens"]}


def of_samples(make: of_layers.Make) -> of_layers.Make:
    """All tokens of the samples are drawn as those of one batch."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        # an empty batch has the values of no token, but most regimes look at one
        drawn = make(draw, _all({**parameters, "batch_size": max(1, parameters["batch_size"])}))
        shape = (-1, parameters["num_tokens"], parameters["hidden_size"])
        return {**drawn, "hidden_states": drawn["hidden_states"].reshape(shape)[: parameters["batch_size"]]}

    return made


def gate_in_turn() -> Trait:
    """As of other layers, of all tokens."""
    of_tokens = of_layers.gate_in_turn()

    def change(tensors: Tensors) -> Tensors:
        assert of_tokens.change is not None
        tokens = tensors["hidden_states"]
        changed = of_tokens.change({**tensors, "hidden_states": tokens.flatten(0, 1)})
        return {**changed, "hidden_states": changed["hidden_states"].reshape(tokens.shape)}

    return replace(of_tokens, change=change, fits=lambda parameters: of_tokens.fits(_all(parameters)))


def _of_tokens(function: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, state: Tensors) -> torch.Tensor:
    """A function of all tokens' logits, with the samples' axes."""
    values = function(hidden_states.flatten(0, 1) @ state[of_layers.GATE].mT)
    return values.reshape(*hidden_states.shape[:2], values.shape[1])


def scores(hidden_states: torch.Tensor, state: Tensors, *, config: DiTMoEConfig) -> torch.Tensor:
    """What experts are chosen by."""
    function = torch.sigmoid if config.scores == "sigmoid" else lambda logits: torch.softmax(logits, -1)
    return _of_tokens(function, hidden_states, state)


def group_scores(hidden_states: torch.Tensor, state: Tensors, *, config: DiTMoEConfig) -> torch.Tensor:
    """What groups are chosen by."""
    chosen_by = scores(hidden_states, state, config=config)
    return routers.best_of_groups(chosen_by.flatten(0, 1), config.num_groups, 1).reshape(
        *hidden_states.shape[:2], config.num_groups
    )


def _options(**changes: Callable[[int], int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replaces options by functions of the number of experts."""

    def spoil(call: dict[str, Any]) -> dict[str, Any]:
        experts = call[f"state/{of_layers.GATE}"].shape[0]
        return {"config": replace(call["config"], **{name: change(experts) for name, change in changes.items()})}

    return spoil


SHARED_DOWN = "shared_experts.down_proj.weight"
REJECTIONS = (
    *(each for each in of_layers.rejections() if each.argument not in ("hidden_size", "top_k")),
    Rejection("tokens of another width", "hidden_size", changed("hidden_states", lambda each: torch.cat([each, each], -1))),
    Rejection("tokens of no sample", "hidden_states", changed("hidden_states", lambda each: each.flatten(0, 1))),
    Rejection("a shared expert of two widths", SHARED_DOWN, changed(f"state/{SHARED_DOWN}", lambda each: each[:, :-1])),
    Rejection("top_k above num_experts", "top_k", _options(top_k=lambda experts: experts + 1)),
    Rejection("groups that do not divide", "num_groups", _options(num_groups=lambda experts: experts + 1)),
    Rejection(
        "top_k above what the kept groups hold",
        "top_k",
        _options(num_groups=lambda experts: experts, topk_groups=lambda experts: 1, top_k=lambda experts: 2),
    ),
)
