"""transformers' own modules on trial; imported only where transformers is installed."""

from typing import Any
from unittest.mock import patch

import torch
from torch.func import functional_call
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    NllbMoeConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router, router_z_loss_func

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import sorted_by, without_parameters, without_projection
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.torch.capacity_routers import expert_capacity


def routed(router: torch.nn.Module, router_logits: torch.Tensor, **state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's weights, in float32 as our contracts have them, and ids."""
    with without_projection():
        _, weights, ids = functional_call(router, state, router_logits)
    return weights.float(), ids


def told_by_weights(case: Case) -> bool:
    """What is dropped is told by a weight of 0."""
    return case.regime in ("dithered", "skew")


@peer("routers.softmax_topk", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersQwen3Router:
    """Qwen3-MoE's router, without its projection."""

    router, config = Qwen3MoeTopKRouter, Qwen3MoeConfig

    def __call__(self, router_logits, *, top_k, renormalize):
        experts = router_logits.shape[1]
        config = self.config(num_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalize)
        return routed(without_parameters(self.router, config), router_logits)


@peer("routers.softmax_topk", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersOlmoeRouter(TransformersQwen3Router):
    """OLMoE's router, without its projection."""

    router, config = OlmoeTopKRouter, OlmoeConfig


@peer("routers.softmax_topk", dtypes=DTYPES, only="renormalize", oracle=True)
class TransformersMixtralRouter:
    """Mixtral's router, without its projection; it always normalizes."""

    def __call__(self, router_logits, *, top_k, renormalize):
        experts = router_logits.shape[1]
        config = MixtralConfig(num_local_experts=experts, hidden_size=experts, num_experts_per_tok=top_k)
        return routed(without_parameters(MixtralTopKRouter, config), router_logits)


@peer("capacity_routers.switch_top1", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersSwitchRouter:
    """Switch Transformers' router, without its classifier; it returns the weights of all, and a mask without the dropped.

    Ids of the dropped are found here, as inside.
    """

    def __call__(self, router_logits, *, capacity_factor):
        tokens, experts = router_logits.shape
        capacity = expert_capacity(tokens, experts, capacity_factor)
        config = SwitchTransformersConfig(num_experts=experts, d_model=experts, expert_capacity=capacity)
        with without_projection():
            kept, weights, _ = without_parameters(SwitchTransformersTop1Router, config)(router_logits)
        dropped = ~kept.any(1)
        ids = router_logits.softmax(1, torch.float32).to(router_logits.dtype).argmax(1)
        return weights[:, 0].float().masked_fill(dropped, 0), ids, dropped


@peer(
    "capacity_routers.gshard_top2",
    fits=told_by_weights,
    dtypes=("float32",),
    only="second_expert_policy != 'random' or not normalize_before_dropping",
    oracle=True,
)
class TransformersNllbRouter:
    """NLLB-MoE's router, whose draws are the noise; it returns the weights of all experts, 0 where not chosen or dropped.

    Its choices are made here once more: of equal logits the first, as inside; of padding, for which it chooses nothing, any.
    """

    def __call__(self, router_logits, noise, attention_mask, *, second_expert_policy, normalize_before_dropping, capacity_factor):
        tokens, experts = router_logits.shape
        logits = torch.where(attention_mask[:, None], router_logits, 0)
        first = logits.detach().softmax(1).argmax(1, keepdim=True)
        scores = logits.detach() + noise if second_expert_policy == "sampling" else logits.detach()
        ranked = scores.scatter(1, first, torch.inf)
        ids = ranked.argsort(dim=1, descending=True, stable=True)[:, :2]
        ids = torch.where(attention_mask[:, None], ids, ranked.topk(2).indices)
        config = NllbMoeConfig(
            num_experts=experts, d_model=experts, expert_capacity=expert_capacity(tokens, experts, capacity_factor),
            second_expert_policy=second_expert_policy, normalize_router_prob_before_dropping=normalize_before_dropping,
            moe_eval_capacity_token_fraction=0.0,
        )  # fmt: skip
        gumbel, uniform = torch.distributions.gumbel.Gumbel, noise.gather(1, ids)[:, 1]
        with patch.object(gumbel, "rsample", lambda *_: noise), patch.object(torch, "rand_like", lambda _: uniform):
            _, weights = without_parameters(NllbMoeTop2Router, config).route_tokens(logits.clone(), logits.dtype, ~attention_mask)
        chosen = weights.gather(1, ids)
        return chosen, ids, chosen == 0


@peer("routers.grouped_sigmoid_topk", dtypes=DTYPES, only="num_experts // num_groups >= 2", oracle=True)
class TransformersDeepseekRouter:
    """DeepSeek-V3's router, without its projection; it does not sort, so its result is sorted here."""

    def __call__(
        self, router_logits, e_score_correction_bias, *, top_k, num_groups, topk_groups, renormalize, routed_scaling_factor
    ):
        experts = router_logits.shape[1]
        config = DeepseekV3Config(
            n_routed_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, n_group=num_groups, topk_group=topk_groups,
            norm_topk_prob=renormalize, routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        router = without_parameters(DeepseekV3TopkRouter, config)
        weights, ids = routed(router, router_logits, e_score_correction_bias=e_score_correction_bias)
        return sorted_by(router_logits.float().sigmoid() + e_score_correction_bias, weights, ids)


@peer("routers.topk_softmax", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersGptOssRouter:
    """gpt-oss' router, without its projection."""

    def __call__(self, router_logits, *, top_k):
        experts = router_logits.shape[1]
        config = GptOssConfig(num_local_experts=experts, hidden_size=experts, num_experts_per_tok=top_k)
        return routed(without_parameters(GptOssTopKRouter, config), router_logits)


@peer("routers.sigmoid_input_scaling", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersLlama4Router:
    """Llama 4's router, without its projection; its scores of all experts are gathered at those of its choice."""

    def __call__(self, router_logits, *, top_k):
        experts = router_logits.shape[1]
        config = Llama4TextConfig(num_local_experts=experts, hidden_size=experts, num_experts_per_tok=top_k)
        with without_projection():
            scores, logits = without_parameters(Llama4Router, config)(router_logits)
        ids = logits.topk(top_k, 1).indices
        return scores.gather(1, ids).float(), ids


@peer("routers.grouped_softmax_topk", dtypes=DTYPES, oracle=True, fits=lambda case: case.regime != "lattice")
class TransformersDeepseekV2Router:
    """DeepSeek-V2's router, without its projection; it does not sort, so its result is sorted here."""

    def __call__(self, router_logits, *, top_k, num_groups, topk_groups, routed_scaling_factor):
        experts = router_logits.shape[1]
        config = DeepseekV2Config(
            n_routed_experts=experts, hidden_size=experts, num_attention_heads=1, num_experts_per_tok=top_k, n_group=num_groups,
            topk_group=topk_groups, topk_method="group_limited_greedy", routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        return sorted_by(router_logits, *routed(without_parameters(DeepseekV2TopkRouter, config), router_logits))


@peer("routers.biased_softmax_topk", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersErnieRouter:
    """Ernie 4.5's router, without its projection."""

    def __call__(self, router_logits, e_score_correction_bias, *, top_k, norm_min):
        experts = router_logits.shape[1]
        config = Ernie4_5_MoeConfig(
            moe_num_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, moe_k=top_k, moe_norm_min=norm_min
        )
        router = without_parameters(Ernie4_5_MoeTopKRouter, config)
        return routed(router, router_logits, **{"moe_statics.e_score_correction_bias": e_score_correction_bias[None]})


@peer("routers.zero_expert_topk", dtypes=DTYPES, oracle=True)
class TransformersLongcatRouter:
    """LongCat-Flash's router, without its projection; it does not sort; its layer adds up identities."""

    def __call__(self, router_logits, e_score_correction_bias, *, top_k, num_zero_experts, routed_scaling_factor):
        columns = router_logits.shape[1]
        experts = columns - num_zero_experts
        config = LongcatFlashConfig(
            hidden_size=columns, n_routed_experts=experts, zero_expert_num=num_zero_experts, moe_topk=top_k,
            num_experts_per_tok=top_k, routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        router = without_parameters(LongcatFlashTopkRouter, config)
        weights, ids = routed(router, router_logits, e_score_correction_bias=e_score_correction_bias)
        weights, ids = sorted_by(router_logits.float().softmax(1) + e_score_correction_bias, weights, ids)
        return weights, ids, weights.masked_fill(ids < experts, 0).sum(1)


@peer(
    "routers.sparsemixer",
    dtypes=DTYPES,
    right_in=("float32",),
    fits=lambda case: case.regime != "special",
    rounding="eager",
    oracle=True,
)
class TransformersSparsemixer:
    """Phi-3.5-MoE's function, as at inference."""

    def __call__(self, router_logits, *, jitter_eps):
        weights, ids = sparsemixer(router_logits, jitter_eps, training=False)
        return weights.float(), ids


class TransformersExperts:
    """An experts module with the given weights; its ids are int64."""

    module_class: Any = Qwen3MoeExperts
    config_class: Any = Qwen3MoeConfig
    implementation: str

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, **options):
        num_experts, hidden_size, intermediate_size = w2.shape
        sizes = {"intermediate_size": intermediate_size, "moe_intermediate_size": intermediate_size, **options}
        config = self.config_class(hidden_size=hidden_size, num_local_experts=num_experts, num_experts=num_experts, **sizes)
        config._experts_implementation = self.implementation
        module = without_parameters(self.module_class, config)
        return functional_call(module, {"gate_up_proj": w13, "down_proj": w2}, (hidden_states, topk_ids.long(), topk_weights))


@peer("experts.fused_swiglu", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersEagerExperts(TransformersExperts):
    """Mixtral's experts, one after the other."""

    module_class, config_class, implementation = MixtralExperts, MixtralConfig, "eager"


@peer("experts.fused_swiglu", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersBatchedExperts(TransformersExperts):
    """Qwen3-MoE's experts by batched products of copied matrices."""

    implementation = "batched_mm"


@peer("experts.fused_swiglu", only="hidden_size % 8 == 0 and intermediate_size % 8 == 0", dtypes=DTYPES, rounding="eager")
class TransformersGroupedExperts(TransformersExperts):
    """Qwen3-MoE's experts by torch's grouped products, which take rows that are multiples of 16 bytes."""

    implementation = "grouped_mm"


@peer("experts.fused_geglu", dtypes=("float32",), oracle=True)
class TransformersGegluExperts(TransformersExperts):
    """Mixtral's experts with another activation."""

    module_class, config_class, implementation = MixtralExperts, MixtralConfig, "eager"

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, approximate):
        activation = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[approximate]
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids, hidden_act=activation)


@peer("experts.fused_gelu_mlp", dtypes=("float32",), oracle=True)
class TransformersGpt2Experts:
    """GPT-2's MLP with the weights of one expert after the other, whose tokens are gathered."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, *, approximate):
        activation = {"none": "gelu", "tanh": "gelu_new"}[approximate]
        mlp = without_parameters(GPT2MLP, w1.shape[1], GPT2Config(n_embd=w1.shape[2], activation_function=activation))
        total = torch.zeros_like(hidden_states)
        for expert in range(len(w1)):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            state = {"c_fc.weight": w1[expert].mT, "c_fc.bias": b1[expert]}
            state |= {"c_proj.weight": w2[expert].mT, "c_proj.bias": b2[expert]}
            out = functional_call(mlp, state, hidden_states[tokens])
            total = total.index_add(0, tokens, topk_weights[tokens, choices, None] * out)
        return total


@peer("experts.fused_swiglu_oai", dtypes=("float32",), oracle=True)
class TransformersGptOssExperts:
    """gpt-oss' experts, whose matrices are the transposed ones."""

    def __call__(self, hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, *, alpha, limit):
        num_experts, hidden_size, intermediate_size = w2.shape
        config = GptOssConfig(
            num_local_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size,
            swiglu_alpha=alpha, swiglu_limit=limit,
        )  # fmt: skip
        config._experts_implementation = "eager"
        state = {"gate_up_proj": w13.mT, "gate_up_proj_bias": b13, "down_proj": w2.mT, "down_proj_bias": b2}
        return functional_call(without_parameters(GptOssExperts, config), state, (hidden_states, topk_ids.long(), topk_weights))


@peer("experts.shared_swiglu", dtypes=("float32",), oracle=True)
class TransformersDeepseekSharedExpert:
    """DeepSeek-V3's shared experts."""

    def __call__(self, hidden_states, w13, w2):
        gate, up = w13.chunk(2)
        config = DeepseekV3Config(hidden_size=len(w2), moe_intermediate_size=len(gate))
        module = without_parameters(DeepseekV3MLP, config, len(gate))
        state = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": w2}
        return functional_call(module, state, hidden_states)


@peer("experts.gated_shared_swiglu", dtypes=("float32",), oracle=True)
class TransformersQwen2SharedExpert:
    """Qwen2-MoE's block, whose one routed expert returns 0."""

    def __call__(self, hidden_states, w13, w2, shared_gate):
        gate, up = w13.chunk(2)
        config = Qwen2MoeConfig(
            hidden_size=len(w2), shared_expert_intermediate_size=len(gate), moe_intermediate_size=1, num_experts=1,
            num_experts_per_tok=1,
        )  # fmt: skip
        config._experts_implementation = "eager"
        block = without_parameters(Qwen2MoeSparseMoeBlock, config)
        state = {name: torch.zeros(each.shape, dtype=w2.dtype) for name, each in block.state_dict().items()}
        state |= {f"shared_expert.{name}_proj.weight": each for name, each in (("gate", gate), ("up", up), ("down", w2))}
        return functional_call(block, state | {"shared_expert_gate.weight": shared_gate}, hidden_states[None])[0]


@peer("auxiliary_losses.router_z_loss", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32", "bfloat16"))
class TransformersZLoss:
    """Switch's z-loss of the tokens that count, which are taken for one group."""

    def __call__(self, router_logits, attention_mask):
        kept = router_logits[attention_mask]
        return (router_z_loss_func(kept[None]) if len(kept) else kept.sum()).float()
