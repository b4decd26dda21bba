"""transformers' own modules as right variants; imported only where transformers is installed."""

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
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router, router_z_loss_func

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch.capacity_routers import expert_capacity


def finite(case: Case) -> bool:
    """A projection turns infinities into NaN."""
    return case.regime not in ("special", "lattice")


def finite_groups(case: Case) -> bool:
    """DeepSeek's groups have at least two experts."""
    return case.regime != "special" and case.parameters["num_experts"] > case.parameters["num_groups"]


def ordinary_weights(case: Case) -> bool:
    """What is dropped is told by a weight of 0. With "random", transformers normalizes the first weight alone before dropping."""
    options = case.parameters
    quirk = options["second_expert_policy"] == "random" and options["normalize_before_dropping"]
    return case.regime in ("dithered", "skew") and not quirk


def aligned(case: Case) -> bool:
    """torch's grouped products want rows that are multiples of 16 bytes."""
    return case.parameters["hidden_size"] % 4 == 0 and case.parameters["intermediate_size"] % 4 == 0


@right("routers.softmax_topk", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False)
class TransformersQwen3Router:
    """Qwen3-MoE's router, whose projection is the identity."""

    def __call__(self, router_logits, *, top_k, renormalize):
        experts = router_logits.shape[1]
        module = Qwen3MoeTopKRouter(
            Qwen3MoeConfig(num_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalize)
        )
        return functional_call(module, {"weight": torch.eye(experts)}, router_logits)[1:]


@right("capacity_routers.switch_top1", fits=finite, dtypes=("float32",), oracle=True)
class TransformersSwitchRouter:
    """Switch Transformers' router, whose classifier is the identity; it returns a mask without the dropped, and their weights."""

    def __call__(self, router_logits, *, capacity_factor):
        tokens, experts = router_logits.shape
        capacity = expert_capacity(tokens, experts, capacity_factor)
        config = SwitchTransformersConfig(num_experts=experts, d_model=experts, expert_capacity=capacity)
        module = SwitchTransformersTop1Router(config).eval()
        kept, weights, _ = functional_call(module, {"classifier.weight": torch.eye(experts)}, router_logits)
        dropped = ~kept.any(1)
        return weights[:, 0].masked_fill(dropped, 0), router_logits.softmax(1).argmax(1), dropped


@right("capacity_routers.gshard_top2", fits=ordinary_weights, dtypes=("float32",), oracle=True)
class TransformersNllbRouter:
    """NLLB-MoE's router, whose draws are the noise; it returns the weights of all experts, 0 where not chosen or dropped."""

    def __call__(self, router_logits, noise, attention_mask, *, second_expert_policy, normalize_before_dropping, capacity_factor):
        tokens, experts = router_logits.shape
        logits = torch.where(attention_mask[:, None], router_logits, 0)
        first = logits.detach().softmax(1).argmax(1, keepdim=True)
        scores = logits.detach() + noise if second_expert_policy == "sampling" else logits.detach()
        ids = scores.scatter(1, first, torch.inf).topk(2).indices
        config = NllbMoeConfig(
            num_experts=experts, d_model=experts, expert_capacity=expert_capacity(tokens, experts, capacity_factor),
            second_expert_policy=second_expert_policy, normalize_router_prob_before_dropping=normalize_before_dropping,
            moe_eval_capacity_token_fraction=0.0,
        )  # fmt: skip
        gumbel, uniform = torch.distributions.gumbel.Gumbel, noise.gather(1, ids)[:, 1]
        with patch.object(gumbel, "rsample", lambda *_: noise), patch.object(torch, "rand_like", lambda _: uniform):
            _, weights = NllbMoeTop2Router(config).route_tokens(logits.clone(), logits.dtype, ~attention_mask)
        chosen = weights.gather(1, ids)
        return chosen, ids, chosen == 0


@right("routers.grouped_sigmoid_topk", fits=finite_groups, dtypes=("float32",), oracle=True, batch_invariant=False)
class TransformersDeepseekRouter:
    """DeepSeek-V3's router, whose projection is the identity; it does not sort, so its result is sorted here."""

    def __call__(
        self, router_logits, e_score_correction_bias, *, top_k, num_groups, topk_groups, renormalize, routed_scaling_factor
    ):
        experts = router_logits.shape[1]
        config = DeepseekV3Config(
            n_routed_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, n_group=num_groups, topk_group=topk_groups,
            norm_topk_prob=renormalize, routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        state = {"weight": torch.eye(experts), "e_score_correction_bias": e_score_correction_bias}
        _, weights, ids = functional_call(DeepseekV3TopkRouter(config), state, router_logits)
        return sorted_by(router_logits.sigmoid() + e_score_correction_bias, weights, ids)


@right("routers.topk_softmax", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersGptOssRouter:
    """gpt-oss' router, whose projection is the identity without a bias."""

    def __call__(self, router_logits, *, top_k):
        experts = router_logits.shape[1]
        module = GptOssTopKRouter(GptOssConfig(num_local_experts=experts, hidden_size=experts, num_experts_per_tok=top_k))
        return functional_call(module, {"weight": torch.eye(experts), "bias": torch.zeros(experts)}, router_logits)[1:]


@right("routers.sigmoid_input_scaling", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersLlama4Router:
    """Llama 4's router, whose projection is the identity; its scores of all experts are gathered at those of its choice."""

    def __call__(self, router_logits, *, top_k):
        experts = router_logits.shape[1]
        config = Llama4TextConfig(num_local_experts=experts, hidden_size=experts, num_experts_per_tok=top_k)
        scores, logits = functional_call(Llama4Router(config), {"weight": torch.eye(experts)}, router_logits)
        ids = logits.topk(top_k, 1).indices
        return scores.gather(1, ids), ids


def sorted_by(scores, weights, ids):
    """The choice in descending order of the scores that it was made by."""
    order = scores.detach().gather(1, ids).argsort(1, descending=True)
    return weights.gather(1, order), ids.gather(1, order)


@right("routers.grouped_softmax_topk", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersDeepseekV2Router:
    """DeepSeek-V2's router, whose projection is the identity; it does not sort, so its result is sorted here."""

    def __call__(self, router_logits, *, top_k, num_groups, topk_groups, routed_scaling_factor):
        experts = router_logits.shape[1]
        config = DeepseekV2Config(
            n_routed_experts=experts, hidden_size=experts, num_attention_heads=1, num_experts_per_tok=top_k, n_group=num_groups,
            topk_group=topk_groups, topk_method="group_limited_greedy", routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        _, weights, ids = functional_call(DeepseekV2TopkRouter(config), {"weight": torch.eye(experts)}, router_logits)
        return sorted_by(router_logits, weights, ids)


@right("routers.biased_softmax_topk", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersErnieRouter:
    """Ernie 4.5's router, whose projection is the identity."""

    def __call__(self, router_logits, e_score_correction_bias, *, top_k, norm_min):
        experts = router_logits.shape[1]
        config = Ernie4_5_MoeConfig(
            moe_num_experts=experts, hidden_size=experts, num_experts_per_tok=top_k, moe_k=top_k, moe_norm_min=norm_min
        )
        state = {"weight": torch.eye(experts), "moe_statics.e_score_correction_bias": e_score_correction_bias[None]}
        return functional_call(Ernie4_5_MoeTopKRouter(config), state, router_logits)[1:]


@right("routers.zero_expert_topk", fits=finite, dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersLongcatRouter:
    """LongCat-Flash's router, whose projection is the identity; it does not sort; its layer adds up identities."""

    def __call__(self, router_logits, e_score_correction_bias, *, top_k, num_zero_experts, routed_scaling_factor):
        columns = router_logits.shape[1]
        experts = columns - num_zero_experts
        config = LongcatFlashConfig(
            hidden_size=columns, n_routed_experts=experts, zero_expert_num=num_zero_experts, moe_topk=top_k,
            num_experts_per_tok=top_k, routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        state = {"classifier.weight": torch.eye(columns), "e_score_correction_bias": e_score_correction_bias}
        _, weights, ids = functional_call(LongcatFlashTopkRouter(config), state, router_logits)
        weights, ids = sorted_by(router_logits.softmax(1) + e_score_correction_bias, weights, ids)
        return weights, ids, (weights * (ids >= experts)).sum(1)


@right("routers.sparsemixer", fits=finite, dtypes=("float32",), oracle=True, validates=False)
class TransformersSparsemixer:
    """Phi-3.5-MoE's function, as at inference."""

    def __call__(self, router_logits, *, jitter_eps):
        return sparsemixer(router_logits, jitter_eps, training=False)


class TransformersExperts:
    """An experts module with the given weights."""

    def __init__(self, module_class, config_class, implementation):
        self.module_class, self.config_class, self.implementation = module_class, config_class, implementation

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, **options):
        num_experts, hidden_size, intermediate_size = w2.shape
        sizes = {"intermediate_size": intermediate_size, "moe_intermediate_size": intermediate_size, **options}
        config = self.config_class(hidden_size=hidden_size, num_local_experts=num_experts, num_experts=num_experts, **sizes)
        config._experts_implementation = self.implementation
        state = {"gate_up_proj": w13, "down_proj": w2}
        return functional_call(self.module_class(config), state, (hidden_states, topk_ids.long(), topk_weights))


@right("experts.fused_swiglu", dtypes=("float32",), oracle=True, batch_invariant=False)
class TransformersMixtralExperts(TransformersExperts):
    """Mixtral's experts, one after the other."""

    def __init__(self):
        super().__init__(MixtralExperts, MixtralConfig, "eager")


@right("experts.fused_swiglu", dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class TransformersMixtralExpertsEager(TransformersMixtralExperts):
    """Mixtral's experts in low precision, which rounds every result."""


@right("experts.fused_swiglu", dtypes=("float32",), oracle=True, batch_invariant=False)
class TransformersQwen3Experts(TransformersExperts):
    """Qwen3-MoE's experts by batched products of copied matrices."""

    def __init__(self):
        super().__init__(Qwen3MoeExperts, Qwen3MoeConfig, "batched_mm")


@right("experts.fused_swiglu", fits=aligned, dtypes=("float32",), batch_invariant=False)
class TransformersGroupedExperts(TransformersExperts):
    """Qwen3-MoE's experts by torch's grouped products."""

    def __init__(self):
        super().__init__(Qwen3MoeExperts, Qwen3MoeConfig, "grouped_mm")


@right("experts.fused_geglu", dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersGegluExperts(TransformersExperts):
    """Mixtral's experts with another activation."""

    def __init__(self):
        super().__init__(MixtralExperts, MixtralConfig, "eager")

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, approximate):
        activation = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[approximate]
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids, hidden_act=activation)


@right("experts.fused_gelu_mlp", dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersGpt2Experts:
    """GPT-2's MLP with the weights of one expert after the other, whose tokens are gathered."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, *, approximate):
        activation = {"none": "gelu", "tanh": "gelu_new"}[approximate]
        mlp = GPT2MLP(w1.shape[1], GPT2Config(n_embd=w1.shape[2], activation_function=activation)).eval()
        total = torch.zeros_like(hidden_states)
        for expert in range(len(w1)):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            state = {"c_fc.weight": w1[expert].mT, "c_fc.bias": b1[expert]}
            state |= {"c_proj.weight": w2[expert].mT, "c_proj.bias": b2[expert]}
            out = functional_call(mlp, state, hidden_states[tokens])
            total = total.index_add(0, tokens, topk_weights[tokens, choices, None] * out)
        return total


@right("experts.fused_swiglu_oai", dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
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
        return functional_call(GptOssExperts(config), state, (hidden_states, topk_ids.long(), topk_weights))


@right("experts.shared_swiglu", dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersDeepseekSharedExpert:
    """DeepSeek-V3's shared experts."""

    def __call__(self, hidden_states, w13, w2):
        gate, up = w13.chunk(2)
        module = DeepseekV3MLP(DeepseekV3Config(hidden_size=len(w2), moe_intermediate_size=len(gate)), len(gate))
        state = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": w2}
        return functional_call(module, state, hidden_states)


@right("experts.gated_shared_swiglu", dtypes=("float32",), oracle=True, batch_invariant=False, validates=False)
class TransformersQwen2SharedExpert:
    """Qwen2-MoE's block, whose one routed expert returns 0."""

    def __call__(self, hidden_states, w13, w2, shared_gate):
        gate, up = w13.chunk(2)
        config = Qwen2MoeConfig(
            hidden_size=len(w2), shared_expert_intermediate_size=len(gate), moe_intermediate_size=1, num_experts=1,
            num_experts_per_tok=1,
        )  # fmt: skip
        config._experts_implementation = "eager"
        block = Qwen2MoeSparseMoeBlock(config).eval()
        state = {name: torch.zeros_like(each) for name, each in block.state_dict().items()}
        state |= {f"shared_expert.{name}_proj.weight": each for name, each in (("gate", gate), ("up", up), ("down", w2))}
        return functional_call(block, state | {"shared_expert_gate.weight": shared_gate}, hidden_states[None])[0]


@right("moe_layers.mixtral_moe", dtypes=("float32",), oracle=True, batch_invariant=False)
class TransformersMixtralBlock:
    """Mixtral's sparse block; its router's results are those of the router called by itself."""

    def __call__(self, hidden_states, state, *, top_k):
        experts, width, inner = state["experts.down_proj"].shape
        config = MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top_k)
        config._experts_implementation = "eager"
        block = MixtralSparseMoeBlock(config).eval()
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, _, ids = functional_call(block.gate, {"weight": state["gate.weight"]}, hidden_states)
        return out, logits, ids


def ordinary_padding(case: Case) -> bool:
    """transformers multiplies padding by 0, where ours may hold NaN."""
    return case.regime != "special" and bool(case.parameters["num_tokens"])


@right("auxiliary_losses.router_z_loss", fits=ordinary_padding, dtypes=("float32",), oracle=True)
class TransformersZLoss:
    """Switch's z-loss of the tokens that count, which are taken for one group."""

    def __call__(self, router_logits, attention_mask):
        kept = router_logits[attention_mask]
        return router_z_loss_func(kept[None]) if len(kept) else 0 * router_logits.sum()
