"""What MoE layers are built of, by name: routers, runners of experts and dispatchers, and which of them fit together."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from gaugeblock.reference.expert_layouts import INTERLEAVED, LAYOUTS

Routed = Literal["ids and weights", "ids and input weights", "logits"]
"""What goes from a router to a runner: ids and the weights of the experts' outputs; ids and the weights of their inputs (of an
expert that is not linear these are another thing); or nothing but the router's logits."""

SharedExpert = Literal["none", "shared_swiglu", "gated_shared_swiglu"]
"""The expert that all tokens pass: none, one that is added, or one that is added as far as a gate of each token is open."""

BIAS = "e_score_correction_bias"
"""What balances a router's choice: part of a layer's state, under its gate's name."""


class Router(NamedTuple):
    """One way to choose experts."""

    hands_on: Routed
    options: tuple[str, ...]
    """Its keyword arguments, all of which are needed."""
    needs: tuple[str, ...] = ()
    """The arrays that it takes beside the logits, in their order."""
    reads_logits: bool = True
    """False where the choice has nothing to do with what a token means."""
    of_batch: bool = False
    """Whether a token's choice depends on the other tokens: on half of them it is another one."""


class Runner(NamedTuple):
    """One way to apply experts."""

    takes: Routed
    weights: tuple[str, ...] = ("w13", "w2")
    """What an expert has, in the order in which they are taken."""
    options: tuple[str, ...] = ()
    """Its keyword arguments, all of which are needed."""
    interleaved: bool = False
    """Whether rows of w13 are gate, up, gate, up, …"""


class Dispatcher(NamedTuple):
    """One way to spread experts over ranks."""

    carries: tuple[Routed, ...]
    splits_tokens: bool = False
    """Whether each rank routes tokens of its own, and sees no others."""
    splits_experts: bool = False
    """Whether each rank has whole experts, and not all of them."""


_GROUPS = ("num_groups", "topk_groups")
ROUTERS: Mapping[str, Router] = MappingProxyType({
    "softmax_topk": Router("ids and weights", ("top_k", "renormalize")),
    "topk_softmax": Router("ids and weights", ("top_k",)),
    "sigmoid_topk": Router("ids and weights", ("top_k", "renormalize")),
    "grouped_softmax_topk": Router("ids and weights", ("top_k", *_GROUPS, "routed_scaling_factor")),
    "grouped_sigmoid_topk": Router("ids and weights", ("top_k", *_GROUPS, "renormalize", "routed_scaling_factor"), (BIAS,)),
    "biased_softmax_topk": Router("ids and weights", ("top_k", "norm_min"), (BIAS,)),
    "sparsemixer": Router("ids and weights", ("jitter_eps",)),
    "hash_router": Router("ids and weights", (), ("token_ids", "table"), reads_logits=False),
    "noisy_topk": Router("ids and weights", ("top_k",), ("noise_logits", "noise")),
    "ste_topk": Router("ids and weights", ("top_k", "noise_std", "training"), ("noise",)),
    "switch_top1": Router("ids and weights", ("capacity_factor",), of_batch=True),
    "gshard_top2": Router(
        "ids and weights", ("second_expert_policy", "normalize_before_dropping", "capacity_factor"), ("noise", "attention_mask"),
        of_batch=True,
    ),
    "sinkhorn": Router("ids and weights", ("top_k", "num_iterations", "score_function"), of_batch=True),
    "sigmoid_input_scaling": Router("ids and input weights", ("top_k",)),
    "bypass": Router("logits", ()),
})  # fmt: skip
"""The routers that hand on experts for each token, and `bypass`, which leaves the choice to the runner. An expert that has no
room for a token has the weight 0."""

RUNNERS: Mapping[str, Runner] = MappingProxyType({
    "fused_swiglu": Runner("ids and weights"),
    "fused_geglu": Runner("ids and weights", options=("approximate",)),
    "fused_gelu_mlp": Runner("ids and weights", ("w1", "b1", "w2", "b2"), ("approximate",)),
    "fused_swiglu_oai": Runner("ids and weights", ("w13", "b13", "w2", "b2"), ("alpha", "limit"), interleaved=True),
    "input_scaled_swiglu": Runner("ids and input weights"),
    "routing_swiglu": Runner("logits", options=("top_k", "renormalize")),
})  # fmt: skip
"""The experts of `experts.py`; those whose inputs are weighted (Llama 4); those that choose for themselves, by `softmax_topk`."""

_IDS: tuple[Routed, ...] = ("ids and weights", "ids and input weights")
DISPATCHERS: Mapping[str, Dispatcher] = MappingProxyType({
    "local": Dispatcher((*_IDS, "logits")),
    "all_to_all": Dispatcher(_IDS, splits_tokens=True, splits_experts=True),
    "all_gather": Dispatcher(_IDS, splits_tokens=True, splits_experts=True),
    "replicated_tokens": Dispatcher(_IDS, splits_experts=True),
    "tensor_parallel": Dispatcher((*_IDS, "logits")),
})  # fmt: skip
"""Where experts are: all on this rank; whole experts on ranks that exchange tokens, gather them, or have them all; a slice of
each expert on each rank, which has all tokens. A runner that chooses for itself cannot be told which experts are elsewhere."""


def require_fit(router: str, runner: str, dispatcher: str = "local") -> None:
    """Check that a router hands on what a runner takes, and that a dispatcher carries it.

    Raises:
        ValueError: A name is unknown, or two of them do not fit: which, and what fits.
    """
    for name, part, known in (("router", router, ROUTERS), ("runner", runner, RUNNERS), ("dispatcher", dispatcher, DISPATCHERS)):
        if part not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {part!r}")
    handed = ROUTERS[router].hands_on
    if handed != RUNNERS[runner].takes:
        fitting = ", ".join(name for name, each in RUNNERS.items() if each.takes == handed)
        raise ValueError(
            f"runner {runner!r} needs {RUNNERS[runner].takes}, but router {router!r} hands on {handed}; it fits {fitting}"
        )
    if handed not in DISPATCHERS[dispatcher].carries:
        needed = " or ".join(DISPATCHERS[dispatcher].carries)
        raise ValueError(
            f"dispatcher {dispatcher!r} needs {needed}, but runner {runner!r} takes {handed}; "
            f"it fits {_dispatchers(router, runner)}"
        )
    if ROUTERS[router].of_batch and DISPATCHERS[dispatcher].splits_tokens:
        raise ValueError(
            f"dispatcher {dispatcher!r} shows each rank a part of the tokens, but router {router!r} chooses by all of them; "
            f"it fits {_dispatchers(router, runner)}"
        )


def _dispatchers(router: str, runner: str) -> str:
    taken, of_batch = RUNNERS[runner].takes, ROUTERS[router].of_batch
    fitting = [name for name, each in DISPATCHERS.items() if taken in each.carries and not (of_batch and each.splits_tokens)]
    return ", ".join(fitting)


def require_options(kind: str, name: str, options: Mapping[str, Any]) -> None:
    """Check that a router, or a runner, is given its options and no others.

    Raises:
        ValueError: One is missing, or one too many.
    """
    known = (ROUTERS if kind == "router" else RUNNERS)[name].options
    _require_names(f"{kind}_options", f"{kind} {name!r}", known, options)


def require_arrays(router: str, arrays: Mapping[str, Any]) -> None:
    """Check that a router is given the arrays that it takes beside logits, and no others; they are named as its arguments are.

    Raises:
        ValueError: One is missing, or one too many.
    """
    _require_names("arrays", f"router {router!r}", ROUTERS[router].needs, arrays)


def _require_names(argument: str, part: str, known: Collection[str], given: Collection[str]) -> None:
    for wrong, names in (("lacks", [name for name in known if name not in given]), ("has no", sorted(set(given) - set(known)))):
        if names:
            raise ValueError(f"{argument} must be {', '.join(known) or 'empty'} of {part}, which {wrong} {names[0]}")


def dispatched(
    run: Callable[..., Any], dispatcher: str, mesh: Any, dispatchers: Mapping[str, Callable[[Callable[..., Any], Any], Any]]
) -> Callable[..., Any]:
    """Return the runner of experts that a dispatcher has spread over a mesh.

    Raises:
        ValueError: The mesh is missing, or the dispatcher is not among those that are built.
    """
    if dispatcher != "local" and mesh is None:
        raise ValueError(f"mesh must be given for dispatcher {dispatcher!r}, which spreads experts over ranks, got none")
    if dispatcher not in dispatchers:
        raise ValueError(f"dispatchers must have {dispatcher!r}, got {', '.join(dispatchers)}")
    return dispatchers[dispatcher](run, mesh)


def local(run: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Return a runner as it is."""
    return run


LOCAL: Mapping[str, Callable[[Callable[..., Any], Any], Any]] = MappingProxyType({"local": local})
"""From a runner and a mesh to the runner over that mesh: realms that spread experts bring a table of their own."""


def require_layout(runner: str, layout: str, dispatcher: str = "local") -> None:
    """Check that a layout of experts' weights holds what a runner takes, in its order, and can be a rank's share of experts.

    Raises:
        ValueError: No such layout, or it holds something else: what, and which layouts fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"expert_layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not _holds(layout, runner):
        held = ", ".join(dict.fromkeys(entry.holds for entry in LAYOUTS[layout]))
        fitting = ", ".join(each for each in LAYOUTS if _holds(each, runner)) or "none: `build_moe_layer` takes them one by one"
        raise ValueError(
            f"expert_layout {layout!r} holds {held}, {_order(layout in INTERLEAVED)}, but runner {runner!r} takes "
            f"{', '.join(RUNNERS[runner].weights)}, {_order(RUNNERS[runner].interleaved)}; it fits {fitting}"
        )
    if DISPATCHERS[dispatcher].splits_experts and _numbers(layout):
        fitting = ", ".join(each for each in LAYOUTS if _holds(each, runner) and not _numbers(each))
        raise ValueError(
            f"expert_layout {layout!r} has all experts by their numbers, but dispatcher {dispatcher!r} leaves a rank some; "
            f"it fits {fitting}"
        )


def _numbers(layout: str) -> bool:
    return any(entry.per_expert for entry in LAYOUTS[layout])


def _holds(layout: str, runner: str) -> bool:
    held = {entry.holds for entry in LAYOUTS[layout]}
    return held == set(RUNNERS[runner].weights) and (layout in INTERLEAVED) == RUNNERS[runner].interleaved


def _order(interleaved: bool) -> str:
    return "gate and up in turn" if interleaved else "gates first"
