"""transformers' own MoE layers on trial; imported only where transformers is installed."""

from functools import cache
from typing import Any

import torch
from torch.func import functional_call
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.vocabulary import DTYPES, Tensors
from gaugeblock.conformance.peers.modules import sorted_by, without_parameters
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.moe_states import CORRECTION_BIAS


class TransformersBlock:
    """A sparse block, which hands on what its router returned."""

    block_class: Any
    config_class: Any

    def __init__(self, implementation: str = "eager"):
        self.implementation = implementation

    def __call__(self, hidden_states, state, *, top_k, renormalize=True):
        block, routed = self.block(state, num_experts_per_tok=top_k, norm_topk_prob=renormalize)
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, _, ids = routed.pop()
        return out, logits.float(), ids

    def block(self, state: Tensors, **options: Any) -> tuple[torch.nn.Module, list[Any]]:
        """The block of these sizes, and what its router returned last."""
        experts, width, inner = state["experts.down_proj"].shape
        shared = len(state.get("shared_expert.up_proj.weight", ()))
        sizes = dict(num_experts=experts, hidden_size=width, moe_intermediate_size=inner, shared_expert_intermediate_size=shared)
        alias = dict(num_local_experts=experts, intermediate_size=inner)  # as Mixtral's config has it
        return _block(self.block_class, self.config_class, self.implementation, **sizes, **alias, **options)


@cache
def _block(block_class: Any, config_class: Any, implementation: str, **options: Any) -> tuple[torch.nn.Module, list[Any]]:
    config = config_class(**options)
    config._experts_implementation = implementation
    block, routed = without_parameters(block_class, config), []
    router = block.router if hasattr(block, "router") else block.gate
    router.register_forward_hook(lambda module, inputs, results: routed.append(results))
    return block, routed


@peer("moe_layers.mixtral_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersMixtralBlock(TransformersBlock):
    """Mixtral's."""

    block_class, config_class = MixtralSparseMoeBlock, MixtralConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen3Block(TransformersBlock):
    """Qwen3-MoE's."""

    block_class, config_class = Qwen3MoeSparseMoeBlock, Qwen3MoeConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersOlmoeBlock(TransformersBlock):
    """OLMoE's."""

    block_class, config_class = OlmoeSparseMoeBlock, OlmoeConfig


@peer("moe_layers.qwen2_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen2Block(TransformersBlock):
    """Qwen2-MoE's."""

    block_class, config_class = Qwen2MoeSparseMoeBlock, Qwen2MoeConfig


class TransformersGroupedBlock(TransformersBlock):
    """A block with groups and shared experts, of any width; its router does not sort, so its ids are sorted here."""

    def scores(self, router_logits, state):
        """What experts are chosen by."""
        return router_logits.sigmoid() + state[CORRECTION_BIAS]

    def __call__(self, hidden_states, state, *, top_k, num_groups, topk_groups, renormalize, routed_scaling_factor):
        experts, width, inner = state["experts.down_proj"].shape
        block, routed = _block(
            self.block_class, self.config_class, self.implementation, hidden_size=width, moe_intermediate_size=inner,
            n_routed_experts=experts, num_attention_heads=1, num_experts_per_tok=top_k, n_group=num_groups,
            topk_group=topk_groups, topk_method="group_limited_greedy", norm_topk_prob=renormalize,
            routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, weights, ids = routed.pop()
        return out, logits, sorted_by(self.scores(logits, state), weights, ids)[1]


def no_underflow(case: Case) -> bool:
    """Not where probabilities are 0: DeepSeek-V2 excludes groups by that, and may choose from them."""
    return case.regime != "lattice"


@peer(
    "grouped_moe_layers.deepseek_v2_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",),
    only="not renormalize", fits=no_underflow,
)  # fmt: skip
class TransformersDeepseekV2Block(TransformersGroupedBlock):
    """DeepSeek-V2's, which never renormalizes."""

    block_class, config_class = DeepseekV2Moe, DeepseekV2Config

    def scores(self, router_logits, state):
        return router_logits


@peer(
    "grouped_moe_layers.deepseek_v3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",),
    only="num_experts // num_groups >= 2",
)  # fmt: skip
class TransformersDeepseekV3Block(TransformersGroupedBlock):
    """DeepSeek-V3's, whose groups have two experts at least."""

    block_class, config_class = DeepseekV3MoE, DeepseekV3Config


@peer(
    "grouped_moe_layers.deepseek_v3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",),
    only="num_experts // num_groups >= 2",
)  # fmt: skip
class TransformersGlm4Block(TransformersGroupedBlock):
    """GLM-4.5's."""

    block_class, config_class = Glm4MoeMoE, Glm4MoeConfig


@peer(
    "input_scaled_moe_layers.llama4_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",),
    fits=lambda case: case.regime != "special",
)  # fmt: skip
class TransformersLlama4Block:
    """Llama 4's: every expert gets every token, times 0 where it was not chosen, so that one that is no number spoils all."""

    def __call__(self, hidden_states, state, *, top_k):
        experts, inner, width = state["experts.down_proj"].shape
        config = Llama4TextConfig(
            hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top_k
        )  # fmt: skip
        out, logits = functional_call(without_parameters(Llama4TextMoe, config), dict(state), hidden_states[None])
        return out, logits.float(), logits.topk(top_k, 1).indices


@peer("biased_moe_layers.gpt_oss_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersGptOssBlock(TransformersBlock):
    """gpt-oss'."""

    block_class, config_class = GptOssMLP, GptOssConfig

    def __call__(self, hidden_states, state, *, top_k, alpha, limit):
        experts, inner, width = state["experts.down_proj"].shape
        block, routed = _block(
            self.block_class, self.config_class, self.implementation, hidden_size=width, intermediate_size=inner,
            num_local_experts=experts, num_experts_per_tok=top_k, swiglu_alpha=alpha, swiglu_limit=limit,
        )  # fmt: skip
        out, _ = functional_call(block, dict(state), hidden_states[None])
        logits, _, ids = routed.pop()
        return out[0], logits.float(), ids


DEEPSEEK_V2S = "scores == 'softmax' and not renormalize and topk_groups == num_groups"  # the loss chooses from all experts


@peer("dit_moe_layers.dit_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",), only=DEEPSEEK_V2S)
class TransformersDeepseekV2AndLoss:
    """DeepSeek-V2's, whose router does not sort; the loss is Mixtral's, which is top_k times ours."""

    def __call__(self, hidden_states, state, *, config):
        experts, width, inner = state["experts.down_proj"].shape
        theirs = DeepseekV2Config(
            hidden_size=width, moe_intermediate_size=inner, n_routed_experts=experts, n_shared_experts=1, num_attention_heads=1,
            num_experts_per_tok=config.top_k, n_group=config.num_groups, topk_group=config.topk_groups,
            topk_method="group_limited_greedy", routed_scaling_factor=config.routed_scaling_factor,
        )  # fmt: skip
        theirs._experts_implementation = "eager"
        block = without_parameters(DeepseekV2Moe, theirs)
        out = functional_call(block, dict(state), hidden_states)
        logits, weights, ids = functional_call(block.gate, {"weight": state["gate.weight"]}, hidden_states)
        ids = sorted_by(logits, weights, ids)[1]
        samples = logits.reshape(*hidden_states.shape[:2], experts) if config.per_sample else logits[None]
        losses = [load_balancing_loss_func((each,), experts, config.top_k) for each in samples]
        loss = config.aux_loss_alpha / config.top_k * torch.stack(losses).mean()
        logits, ids = (each.reshape(*hidden_states.shape[:2], each.shape[1]) for each in (logits, ids))
        return out, logits.float(), ids, loss
