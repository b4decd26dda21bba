"""torchtitan's own MoE on trial; imported only where torchtitan is installed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.func import functional_call
from torchtitan.models.common import FeedForward, Linear, SigmoidGatedFeedForward
from torchtitan.models.common.config_utils import make_ffn_config, make_moe_config, make_routed_experts_config, make_router_config
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from gaugeblock.conformance.engine.vocabulary import DTYPES, DType, Tensors
from gaugeblock.conformance.peers.modules import sorted_by, without_parameters, without_projection
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.moe_states import CORRECTION_BIAS

TRAINED_IN: tuple[DType, ...] = ("float32", "bfloat16")
"""What its configs let a model be trained in; experts take bfloat16 and nothing else, whatever they are given."""
ROWS_OF_16_BYTES = "hidden_size % 8 == 0 and intermediate_size % 8 == 0"
"""What torch's grouped product asks of bfloat16."""
GROUPS_OF_TWO = "num_experts // num_groups >= 2"
EXPERTS = "routed_experts.inner_experts"


class TorchtitanRouter:
    """TokenChoiceTopKRouter, without its projection; it does not sort, so its result is sorted here."""

    score_func: str

    def choose(
        self,
        router_logits: torch.Tensor,
        choice_scores: torch.Tensor,
        bias: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Its choice by the scores of these logits, in descending order of `choice_scores`; weights in float32."""
        router = _router(router_logits.shape[1], score_func=self.score_func, **options)
        with without_projection():
            weights, ids, _ = functional_call(router, {}, (router_logits[None], bias))
        return sorted_by(choice_scores, weights[0].float(), ids[0])


@cache
def _router(num_experts: int, **options: Any) -> torch.nn.Module:
    return without_parameters(make_router_config(dim=num_experts, num_experts=num_experts, gate_param_init={}, **options).build)


@peer("routers.softmax_topk", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TorchtitanSoftmaxRouter(TorchtitanRouter):
    """As of Qwen3-MoE and gpt-oss."""

    score_func = "softmax"

    def __call__(self, router_logits, *, top_k, renormalize):
        return self.choose(router_logits, router_logits, top_k=top_k, route_norm=renormalize)


@peer("routers.sigmoid_topk", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TorchtitanSigmoidRouter(TorchtitanSoftmaxRouter):
    """The other of its two functions, without a bias."""

    score_func = "sigmoid"


@peer(
    "routers.grouped_sigmoid_topk", dtypes=DTYPES, only=GROUPS_OF_TWO, rounding="eager", oracle=True, right_in=("float32",)
)  # fmt: skip
class TorchtitanDeepseekV3Router(TorchtitanRouter):
    """As of DeepSeek-V3."""

    score_func = "sigmoid"

    def __call__(
        self, router_logits, e_score_correction_bias, *, top_k, num_groups, topk_groups, renormalize, routed_scaling_factor
    ):
        return self.choose(
            router_logits, router_logits.float().sigmoid() + e_score_correction_bias, e_score_correction_bias, top_k=top_k,
            num_expert_groups=num_groups, num_limited_groups=topk_groups, route_norm=renormalize,
            route_scale=routed_scaling_factor,
        )  # fmt: skip


@peer("routers.grouped_softmax_topk", dtypes=DTYPES, only=GROUPS_OF_TWO, rounding="eager", right_in=())
class TorchtitanDeepseekV2Router(TorchtitanRouter):
    """As of its DeepSeek-V2 with 236 billion parameters."""

    score_func = "softmax"

    def __call__(self, router_logits, *, top_k, num_groups, topk_groups, routed_scaling_factor):
        return self.choose(
            router_logits, router_logits, top_k=top_k, num_expert_groups=num_groups, num_limited_groups=topk_groups,
            route_scale=routed_scaling_factor,
        )  # fmt: skip


@peer("experts.fused_swiglu", dtypes=TRAINED_IN, only=ROWS_OF_16_BYTES, rounding="eager", right_in=("bfloat16",))
class TorchtitanRoutedExperts:
    """RoutedExperts; how many tokens each expert gets, which the layer around them counts, is counted here."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        experts, width, inner = w2.shape
        module = _experts(dim=width, hidden_dim=inner, num_experts=experts, top_k=topk_ids.shape[1])
        state = _swiglu("inner_experts", w13, w2)
        counts = topk_ids.flatten().bincount(minlength=experts)
        return functional_call(module, state, (hidden_states[None], topk_weights[None], topk_ids.long()[None], counts))[0]


@cache
def _experts(**sizes: int) -> torch.nn.Module:
    return without_parameters(make_routed_experts_config(**sizes, param_init={}, comm_backend="standard").build)


def _swiglu(prefix: str, w13: torch.Tensor, w2: torch.Tensor) -> dict[str, torch.Tensor]:
    gate, up = w13.chunk(2, dim=1)
    return {f"{prefix}.w1_EFD": gate, f"{prefix}.w3_EFD": up, f"{prefix}.w2_EDF": w2}


class TorchtitanBlock:
    """MoE, which hands on what its router returned; that does not sort, so its ids are sorted here."""

    score_func = "softmax"
    shared: str = ""
    """The prefix of the parameters of the expert that all tokens pass, if there is one."""

    def __call__(self, hidden_states, state, *, top_k, renormalize):
        return self.run(hidden_states, state, top_k=top_k, route_norm=renormalize)

    def run(self, hidden_states: torch.Tensor, state: Tensors, **router: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, logits and ids of a layer whose router has these options."""
        experts, width, inner = state["experts.down_proj"].shape
        layer, passed = _layer(
            width, inner, experts, shared=len(state.get(f"{self.shared}.up_proj.weight", ())),
            gated=f"{self.shared}_gate.weight" in state, biased=CORRECTION_BIAS in state, score_func=self.score_func, **router,
        )  # fmt: skip
        return _called(layer, passed, self.renamed(state), hidden_states, lambda logits: self.scores(logits, state))

    def scores(self, router_logits: torch.Tensor, state: Tensors) -> torch.Tensor:
        """What experts are chosen by."""
        return router_logits

    def renamed(self, state: Tensors) -> dict[str, torch.Tensor]:
        """The state by the layer's names."""
        theirs = {"router.gate.weight": state["gate.weight"]}
        theirs |= _swiglu(EXPERTS, state["experts.gate_up_proj"], state["experts.down_proj"])
        if self.shared:
            names = (("w1", "gate"), ("w2", "down"), ("w3", "up"))
            theirs |= {f"shared_experts.{name}.weight": state[f"{self.shared}.{ours}_proj.weight"] for name, ours in names}
        return theirs


Passed = list[torch.Tensor]
"""The logits and the ids that a layer's router returned last."""


@cache
def _layer(
    width: int, inner: int, experts: int, *, top_k: int, shared: int = 0, gated: bool = False, biased: bool = False,
    limit: float | None = None, **router: Any,
) -> tuple[torch.nn.Module, Passed]:  # fmt: skip
    """The layer of these sizes; with a limit gpt-oss'."""
    routed = make_routed_experts_config(
        dim=width, hidden_dim=inner, num_experts=experts, top_k=top_k, param_init={}, comm_backend="standard"
    )
    if limit is not None:
        routed.inner_experts = GptOssGroupedExperts.Config(dim=width, hidden_dim=inner, num_experts=experts, swiglu_limit=limit)
    config = make_moe_config(
        num_experts=experts,
        router=make_router_config(dim=width, num_experts=experts, gate_param_init={}, top_k=top_k, **router),
        routed_experts=routed,
        shared_experts=_feed_forward(width, shared, gated) if shared else None,
        load_balance_coeff=1e-3 if biased else None,
    )
    layer, passed = without_parameters(config.build), Passed()
    layer.router.gate.register_forward_hook(lambda module, inputs, logits: passed.append(logits[0]))
    layer.router.register_forward_hook(lambda module, inputs, results: passed.append(results[1][0]))
    return layer, passed


def _feed_forward(width: int, inner: int, gated: bool) -> FeedForward.Config:
    config = make_ffn_config(dim=width, hidden_dim=inner, w1_param_init={}, w2w3_param_init={})
    if not gated:
        return config
    gate = Linear.Config(in_features=width, out_features=1)
    return SigmoidGatedFeedForward.Config(w1=config.w1, w2=config.w2, w3=config.w3, gate=gate)


def _called(
    layer: torch.nn.Module,
    passed: Passed,
    state: Tensors,
    hidden_states: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    passed.clear()  # an earlier call may have raised
    out = functional_call(layer, dict(state), hidden_states[None])[0]
    logits, ids = passed
    return out, logits.float(), sorted_by(scores(logits), ids, ids)[1]


@peer("moe_layers.qwen3_moe", dtypes=TRAINED_IN, only=ROWS_OF_16_BYTES, rounding="eager", right_in=())
class TorchtitanQwen3Block(TorchtitanBlock):
    """As of Qwen3-MoE."""


@peer("moe_layers.qwen2_moe", dtypes=TRAINED_IN, only=ROWS_OF_16_BYTES, rounding="eager", right_in=())
class TorchtitanQwen35Block(TorchtitanBlock):
    """As of Qwen3.5, which has Qwen2-MoE's gated shared expert."""

    shared = "shared_expert"

    def renamed(self, state: Tensors) -> dict[str, torch.Tensor]:
        return super().renamed(state) | {"shared_experts.gate.weight": state["shared_expert_gate.weight"]}


@peer(
    "grouped_moe_layers.deepseek_v3_moe", dtypes=TRAINED_IN, only=f"{GROUPS_OF_TWO} and {ROWS_OF_16_BYTES}", rounding="eager",
    right_in=(),
)  # fmt: skip
class TorchtitanDeepseekV3Block(TorchtitanBlock):
    """As of DeepSeek-V3."""

    score_func, shared = "sigmoid", "shared_experts"

    def __call__(self, hidden_states, state, *, top_k, num_groups, topk_groups, renormalize, routed_scaling_factor):
        return self.run(
            hidden_states, state, top_k=top_k, num_expert_groups=num_groups, num_limited_groups=topk_groups,
            route_norm=renormalize, route_scale=routed_scaling_factor,
        )  # fmt: skip

    def scores(self, router_logits: torch.Tensor, state: Tensors) -> torch.Tensor:
        return router_logits.float().sigmoid() + state[CORRECTION_BIAS]

    def renamed(self, state: Tensors) -> dict[str, torch.Tensor]:
        return super().renamed(state) | {"expert_bias_E": state[CORRECTION_BIAS]}


@peer(
    "biased_moe_layers.gpt_oss_moe", dtypes=TRAINED_IN, only=f"alpha == 1.702 and {ROWS_OF_16_BYTES}", rounding="eager",
    right_in=(),
)  # fmt: skip
class TorchtitanGptOssBlock:
    """As of gpt-oss, whose matrices are the transposed ones, and whose alpha is no option; its ids are sorted here."""

    def __call__(self, hidden_states, state, *, top_k, alpha, limit):
        experts, inner, width = state["experts.down_proj"].shape
        options = {"score_func": "softmax", "route_norm": True, "bias": True}
        theirs = {
            "router.gate.weight": state["router.weight"], "router.gate.bias": state["router.bias"],
            f"{EXPERTS}.mlp1_weight_EGD": state["experts.gate_up_proj"].mT,
            f"{EXPERTS}.mlp1_bias_EG": state["experts.gate_up_proj_bias"],
            f"{EXPERTS}.mlp2_weight_EDF": state["experts.down_proj"].mT,
            f"{EXPERTS}.mlp2_bias_ED": state["experts.down_proj_bias"],
        }  # fmt: skip
        layer, passed = _layer(width, inner, experts, top_k=top_k, limit=limit, **options)
        return _called(layer, passed, theirs, hidden_states, lambda logits: logits)
