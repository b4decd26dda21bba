"""MoE layers as configurations: of what parts, with presets of published models, and read from a public model's config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, get_args

from gaugeblock.reference.expert_layouts import LAYOUTS, WORDS, ExpertLayout
from gaugeblock.reference.moe_parts import BIAS, DISPATCHERS, ROUTERS, SharedExpert, require_fit, require_layout, require_options


@dataclass(frozen=True, kw_only=True)
class MoELayerConfig:
    """The parts of an MoE layer, and the names of its parameters. Its sizes are those of the parameters.

    Attributes:
        router: A name of `moe_parts.ROUTERS`.
        router_options: The keyword arguments of the router: `top_k`, ...
        runner: A name of `moe_parts.RUNNERS` that takes what the router hands on.
        runner_options: Those of the runner.
        shared: The expert that all tokens pass, if there is one.
        dispatcher: Where the experts are, a name of `moe_parts.DISPATCHERS`; a rank's state has the experts that it holds, or
            its slice of each, and all else.
        gate: What the router's matrix is named, without `.weight`.
        gate_bias: Whether the router's logits have a bias, `.bias` of the same name.
        experts: What names of the experts' weights begin with, without the dot.
        expert_layout: How they lie, a name of `expert_layouts`.
        shared_expert: What names of the expert that all tokens pass begin with; its gate is `{shared_expert}_gate.weight`.

    Raises:
        ValueError: A name is unknown, two parts do not fit, or an option is missing or one too many.

    Source: the parts of vLLM's and Diffulex's fused MoE layers.
    """

    router: str
    router_options: Mapping[str, Any] = field(hash=False)
    runner: str = "fused_swiglu"
    runner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shared: SharedExpert = "none"
    dispatcher: str = "local"
    gate: str = "gate"
    gate_bias: bool = False
    experts: str = "experts"
    expert_layout: ExpertLayout = "stacked"
    shared_expert: str = "shared_experts"

    def __post_init__(self) -> None:
        require_fit(self.router, self.runner, self.dispatcher)
        require_options("router", self.router, self.router_options)
        require_options("runner", self.runner, self.runner_options)
        require_layout(self.runner, self.expert_layout, self.dispatcher)
        if not ROUTERS[self.router].reads_logits:
            raise ValueError(
                f"router must read the logits of a gate, got {self.router!r}: `build_moe_layer` takes it without one"
            )
        if self.shared not in get_args(SharedExpert):
            raise ValueError(f"shared must be {' or '.join(map(repr, get_args(SharedExpert)))}, got {self.shared!r}")

    def axes(self, num_experts: int) -> dict[str, tuple[str, ...]]:
        """The names of the layer's parameters, but for the router's correction bias, and the axes of each."""
        axes: dict[str, tuple[str, ...]] = {f"{self.gate}.weight": ("num_experts", "hidden_size")}
        if self.gate_bias:
            axes[f"{self.gate}.bias"] = ("num_experts",)
        for entry in sorted(
            LAYOUTS[self.expert_layout], key=lambda each: "R" in each.axes
        ):  # intermediate_size before its double
            words = tuple("experts_of_rank" if axis == "E" and self.splits_experts else WORDS[axis] for axis in entry.axes)
            axes |= dict.fromkeys(entry.names(f"{self.experts}.", num_experts), words)
        if self.shared != "none":
            name, wide = self.shared_expert, ("shared_intermediate_size", "hidden_size")
            axes |= {f"{name}.gate_proj.weight": wide, f"{name}.up_proj.weight": wide, f"{name}.down_proj.weight": wide[::-1]}
        if self.shared == "gated_shared_swiglu":
            axes[f"{self.shared_expert}_gate.weight"] = ("one", "hidden_size")
        return axes

    @property
    def splits_experts(self) -> bool:
        """Whether a rank's state has some of the experts alone."""
        return DISPATCHERS[self.dispatcher].splits_experts

    @property
    def bias(self) -> str | None:
        """The name of what balances the router's choice, if it takes that."""
        return f"{self.gate}.{BIAS}" if BIAS in ROUTERS[self.router].needs else None


def _softmax(top_k: int, renormalize: bool, **others: Any) -> MoELayerConfig:
    return MoELayerConfig(router="softmax_topk", router_options={"top_k": top_k, "renormalize": renormalize}, **others)


def _qwen2(top_k: int, renormalize: bool) -> MoELayerConfig:
    return _softmax(top_k, renormalize, shared="gated_shared_swiglu", shared_expert="shared_expert")


def _deepseek_v3(top_k: int, num_groups: int, topk_groups: int, renormalize: bool, factor: float) -> MoELayerConfig:
    options = {
        "top_k": top_k, "num_groups": num_groups, "topk_groups": topk_groups, "renormalize": renormalize,
        "routed_scaling_factor": factor,
    }  # fmt: skip
    return MoELayerConfig(router="grouped_sigmoid_topk", router_options=options, shared="shared_swiglu")


def _gpt_oss(top_k: int, alpha: float, limit: float) -> MoELayerConfig:
    return MoELayerConfig(
        router="topk_softmax", router_options={"top_k": top_k}, runner="fused_swiglu_oai",
        runner_options={"alpha": alpha, "limit": limit}, gate="router", gate_bias=True, expert_layout="interleaved",
    )  # fmt: skip


def _llama4(top_k: int) -> MoELayerConfig:
    return MoELayerConfig(
        router="sigmoid_input_scaling", router_options={"top_k": top_k}, runner="input_scaled_swiglu", shared="shared_swiglu",
        gate="router", expert_layout="transposed", shared_expert="shared_expert",
    )  # fmt: skip


MOE_LAYER_PRESETS: Mapping[str, MoELayerConfig] = MappingProxyType(
    {
        "mixtral_8x7b": _softmax(2, True),
        "qwen3_30b_a3b": _softmax(8, True),
        "qwen2_57b_a14b": _qwen2(8, False),
        "olmoe_1b_7b": _softmax(8, False),
        "deepseek_v3": _deepseek_v3(8, 8, 4, True, 2.5),
        "gpt_oss_120b": _gpt_oss(4, 1.702, 7.0),
        "llama4_scout": _llama4(1),
    }
)
"""Layers of published models, by their public configs; parameters are named as in transformers 5."""


def from_public_config(config: Mapping[str, Any], *, dispatcher: str = "local") -> MoELayerConfig:
    """Read a model's MoE layer from its public config.

    Args:
        config: The config, with upstream's names: `model_type`, `num_experts_per_tok`, `norm_topk_prob`, `n_group`, ...; of a
            model with several towers, that of the text is read.
        dispatcher: Where the experts are, of which such a config says nothing.

    Returns:
        The layer, with parameters named as in transformers 5.

    Raises:
        ValueError: `model_type` is missing or unknown, a field is missing, or it asks for what the layer does not do.

    Source: transformers 5's configuration classes of these models, and the configs beside the checkpoints.
    """
    model_type: Any = config.get("model_type")
    if model_type == "llama4" and "text_config" in config:
        return from_public_config(config["text_config"], dispatcher=dispatcher)
    if model_type not in READERS:
        raise ValueError(f"model_type must be one of {', '.join(READERS)}, got {model_type!r}")
    fields = _Fields(config)
    fields.only("hidden_act", "silu")
    return replace(READERS[model_type](fields), dispatcher=dispatcher)


@dataclass(frozen=True)
class _Fields:
    """Of a public config."""

    config: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A field that must be there; null is as good as none."""
        if self.config.get(name) is None:
            raise ValueError(f"config of model_type {self.config['model_type']!r} must have {name}, got none")
        return self.config[name]

    def only(self, name: str, *values: Any) -> Any:
        """A field that may be missing, and then is the first of what it may be."""
        value = self.config.get(name, values[0])
        if value not in values:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, values))} of model_type {self.config['model_type']!r}, got {value!r}"
            )
        return value


def _read_mixtral(fields: _Fields) -> MoELayerConfig:
    return _softmax(fields["num_experts_per_tok"], True)


def _read_softmax(fields: _Fields) -> MoELayerConfig:
    return _softmax(fields["num_experts_per_tok"], fields["norm_topk_prob"])


def _read_qwen2(fields: _Fields) -> MoELayerConfig:
    return _qwen2(fields["num_experts_per_tok"], fields["norm_topk_prob"])


def _read_deepseek_v2(fields: _Fields) -> MoELayerConfig:
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)  # what its weights would be divided by, no two public codes agree on
    greedy = fields.only("topk_method", "greedy", "group_limited_greedy") == "greedy"
    options = {
        "top_k": fields["num_experts_per_tok"],
        "num_groups": 1 if greedy else fields["n_group"],
        "topk_groups": 1 if greedy else fields["topk_group"],
        "routed_scaling_factor": fields["routed_scaling_factor"],
    }
    shared: SharedExpert = "shared_swiglu" if fields["n_shared_experts"] else "none"
    return MoELayerConfig(router="grouped_softmax_topk", router_options=options, shared=shared)


def _read_deepseek_v3(fields: _Fields) -> MoELayerConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    groups = fields["num_experts_per_tok"], fields["n_group"], fields["topk_group"]
    layer = _deepseek_v3(*groups, fields["norm_topk_prob"], fields["routed_scaling_factor"])
    return layer if fields["n_shared_experts"] else replace(layer, shared="none")


def _read_gpt_oss(fields: _Fields) -> MoELayerConfig:
    # the first config of gpt-oss has no swiglu_alpha: it was a constant of the code
    alpha = fields.config.get("swiglu_alpha", 1.702)
    return _gpt_oss(fields["num_experts_per_tok"], alpha, fields["swiglu_limit"])


def _read_llama4(fields: _Fields) -> MoELayerConfig:
    return _llama4(fields["num_experts_per_tok"])


READERS: Mapping[str, Callable[[_Fields], MoELayerConfig]] = MappingProxyType(
    {
        "mixtral": _read_mixtral,
        "qwen3_moe": _read_softmax,
        "qwen2_moe": _read_qwen2,
        "olmoe": _read_softmax,
        "deepseek_v2": _read_deepseek_v2,
        "deepseek_v3": _read_deepseek_v3,
        "gpt_oss": _read_gpt_oss,
        "llama4_text": _read_llama4,
    }
)
