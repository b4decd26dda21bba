"""transformers' own MoE layers on trial; imported only where transformers is installed."""

from typing import Any

import torch
from torch.func import functional_call
from transformers import DeepseekV2Config, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gaugeblock.conformance.engine.vocabulary import DTYPES, Parameters
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.conformance.peers.transformers import sorted_by, without_parameters


class TransformersBlock:
    """A sparse block; its router's results are those of the router called by itself."""

    block_class: Any
    config_class: Any

    def __call__(self, hidden_states, state, *, top_k, renormalize=True):
        experts, width, inner = state["experts.down_proj"].shape
        shared = state.get("shared_expert.up_proj.weight", state["experts.down_proj"][0].mT)
        config = self.config_class(
            hidden_size=width,
            intermediate_size=inner,
            moe_intermediate_size=inner,
            shared_expert_intermediate_size=shared.shape[0],
            num_experts=experts,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=renormalize,
        )
        config._experts_implementation = "eager"
        block = without_parameters(self.block_class, config)
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, _, ids = functional_call(block.gate, {"weight": state["gate.weight"]}, hidden_states)
        return out, logits.float(), ids


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


def _is_deepseek_v2s(parameters: Parameters) -> bool:
    """Whether the gate has the options of DeepSeek-V2's, and chooses from all experts, as the loss does."""
    all_groups = parameters["topk_groups"] == parameters["num_groups"]
    return parameters["scores"] == "softmax" and not parameters["renormalize"] and all_groups


@peer(
    "dit_moe_layers.dit_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",),
    fits=lambda case: case.regime != "lattice" and _is_deepseek_v2s(case.parameters),
)  # fmt: skip
class TransformersDeepseekV2Block:
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
