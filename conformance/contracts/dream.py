"""The contract of Dream."""

from gaugeblock.conformance.contracts import flash_attention, language_models, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Workload, row
from gaugeblock.reference.configs import DREAM_PRESETS, LLADA_PRESETS, DreamConfig
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch import dream as reference


@row
def dream() -> Contract:
    """The row of `dream.dream`."""
    return Contract(
        name="dream.dream",
        summary="Predicts masked tokens, each token seeing all others, and each being predicted by the one before it.",
        formula=(
            "x = token embedding; x = x + o_proj(attention(query, key, value)) of rms_norm(x), query and key rotated; x = x + "
            "down_proj(swiglu(gate_proj(y), up_proj(y))), y = rms_norm(x); logits[i] = lm_head(rms_norm(x))[max(i - 1, 0)]; "
            "padding neither sees nor is seen, and has no place"
        ),
        source="Ye et al. 2025 (arXiv:2508.15487), section 3; HKUNLP/Dream",
        reference=reference.dream,
        inputs=(
            Input("state", leaves=MODEL.leaves, differentiable=True),
            Input("input_ids", language_models.IDS, dtype="int64", indexes="vocab_size"),
            Input("attention_mask", language_models.IDS, dtype="bool"),
        ),
        outputs=(Output("logits", (*language_models.IDS, "vocab_size"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        landmarks=(
            MODEL.sizes(3, 7, MODEL.tiny((3, 1))),
            MODEL.sizes(1, 9, MODEL.tiny((8, 4), num_hidden_layers=1, rms_norm_eps=1e-2)),
        ),
        factors=language_models.FACTORS,
        build=MODEL.build,
        traits=language_models.MASK_TRAITS,
        regimes=MODEL.regimes(),
        rounded_as=flash_attention.of(reference.dream, decoder),
        cases=0.1,
        configure=MODEL.options,
        flops=MODEL.flops,
        moved=MODEL.moved,
        rigid=True,
        workloads=(
            Workload("dream-7b/512-tokens", MODEL.sizes(1, 512, DREAM_PRESETS["Dream-7B"]), "Dream-org/Dream-v0-Base-7B"),
            Workload(
                "two-cores/dream-64-tokens",
                MODEL.sizes(1, 64, MODEL.tiny((4, 4), hidden_size=256, head_dim=64, intermediate_size=768, vocab_size=2048)),
                "a size for a CPU",
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=MODEL.rejections(LLADA_PRESETS["LLaDA-8B"]),
        without=language_models.WITHOUT,
        implementations=(
            *model_states.on_one_device("dream"),
            model_states.fsdp2("dream"),
            language_models.tensor_parallel("dream"),
        ),
    )


MODEL = language_models.Model(
    config_class=DreamConfig,
    state_shapes=reference.state_shapes,
    pairs=language_models.all_pairs,
    also_of_tokens=("attention_mask",),
    more=language_models.padding,
)
