"""The contracts of SDAR: dense and with experts, after a cached past, and in training."""

from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import flash_attention, language_models, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.implementation import Implementation, distributed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import LLADA_PRESETS, SDAR_MOE_PRESETS, SDAR_PRESETS, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch import sdar as reference


@row
def sdar() -> Contract:
    """The row of `sdar.sdar`."""
    return Contract(
        name="sdar.sdar",
        summary="Predicts masked tokens, each token seeing its block and those before it.",
        formula=FORMULA,
        source=SOURCE,
        reference=reference.sdar,
        inputs=(Input("state", leaves=DENSE.leaves, differentiable=True), IDS),
        outputs=(LOGITS,),
        landmarks=(
            DENSE.sizes(2, 7, DENSE.tiny((8, 4))),
            DENSE.sizes(1, 9, DENSE.tiny((3, 1), num_hidden_layers=1, rms_norm_eps=1e-2, block_length=2)),
        ),
        factors=(*language_models.FACTORS, language_models.BLOCKS),
        rounded_as=flash_attention.of(reference.sdar, decoder),
        workloads=(
            Workload("sdar-8b/prefill-512", DENSE.sizes(1, 512, SDAR_PRESETS["SDAR-8B"]), "JetLM/SDAR-8B-Chat"),
            Workload("two-cores/sdar-64-tokens", DENSE.sizes(1, 64, DENSE.tiny(**FOR_A_CPU)), "a size for a CPU"),
        ),
        implementations=(*trained("sdar"), language_models.tensor_parallel("sdar", dtypes=("float32", "bfloat16"))),
        **of_model(DENSE),
    )


@row
def sdar_moe() -> Contract:
    """The row of `sdar.sdar_moe`."""
    return Contract(
        name="sdar.sdar_moe",
        summary="Predicts masked tokens with experts, each token seeing its block and those before it; with the routers' logits.",
        formula=FORMULA.replace("down_proj(swiglu(gate_proj(y), up_proj(y)))", "qwen3_moe(y)"),
        source=f"{SOURCE}; Qwen3 (arXiv:2505.09388), section 2",
        reference=reference.sdar_moe,
        inputs=(Input("state", leaves=SPARSE.leaves, differentiable=True), IDS),
        outputs=(
            LOGITS,
            Output(
                "router_logits", ("num_hidden_layers", *language_models.IDS, "num_experts"), dtype="float32", differentiable=True
            ),
        ),
        landmarks=(
            SPARSE.sizes(2, 7, SPARSE.tiny((8, 4))),
            SPARSE.sizes(1, 9, SPARSE.tiny((3, 1), num_hidden_layers=1, num_experts=16, block_length=2, norm_topk_prob=False)),
        ),
        factors=(
            *language_models.FACTORS,
            language_models.BLOCKS,
            edges("num_experts", 1, 2, 4),
            edges("num_experts_per_tok", 1, 2, option=True),
            either("norm_topk_prob", True, False),
        ),
        rounded_as=flash_attention.of(reference.sdar_moe, decoder),
        chooses_inside=True,
        workloads=(
            Workload(
                "sdar-30b-a3b/prefill-512", SPARSE.sizes(1, 512, SDAR_MOE_PRESETS["SDAR-30B-A3B"]), "JetLM/SDAR-30B-A3B-Chat"
            ),
            Workload(
                "two-cores/sdar-moe-64-tokens",
                SPARSE.sizes(1, 64, SPARSE.tiny(**FOR_A_CPU, num_experts=16, num_experts_per_tok=4)),
                "a size for a CPU",
            ),
        ),
        implementations=(
            *trained("sdar_moe"),
            language_models.tensor_parallel("sdar_moe", EXPERTS_FIT),
            distributed("expert-parallel", "decoder_expert_parallel:sdar_moe", only="num_experts % 4 == 0", **OWN_EXAMPLES),
            # alone: tests/test_jax_sharded_decoders.py has the other models, whose text is the reference's
            model_states.jax_sharded("sharded_decoders:sdar_moe", only=EXPERTS_FIT),
        ),
        **of_model(SPARSE),
    )


@row
def sdar_cached() -> Contract:
    """The row of `sdar.sdar_cached`."""
    heads = ("num_hidden_layers", "batch_size", "num_key_value_heads")
    past, own = (*heads, "num_past_tokens", "head_dim"), (*heads, "num_tokens", "head_dim")
    return Contract(
        name="sdar.sdar_cached",
        summary="Predicts the tokens after blocks whose keys and values are kept, and returns their own.",
        formula=f"{FORMULA}, places counted on from the past, whose keys and values come first",
        source=f"{SOURCE}; JetAstra/SDAR generate.py",
        reference=reference.sdar_cached,
        inputs=(
            Input("state", leaves=CACHED.leaves, differentiable=True),
            IDS,
            Input("past_keys", past, differentiable=True),
            Input("past_values", past, differentiable=True),
        ),
        outputs=(LOGITS, Output("keys", own, differentiable=True), Output("values", own, differentiable=True)),
        landmarks=(
            CACHED.sizes(2, 4, CACHED.tiny((8, 4)), num_past_tokens=8),  # a block is denoised
            CACHED.sizes(1, 5, CACHED.tiny((3, 1), num_hidden_layers=1, block_length=2), num_past_tokens=0),  # a prompt
        ),
        factors=(*language_models.FACTORS, language_models.BLOCKS, PAST),
        rounded_as=flash_attention.of(reference.sdar_cached, decoder),
        workloads=(
            Workload(
                "sdar-8b/block-after-512",
                CACHED.sizes(1, 4, SDAR_PRESETS["SDAR-8B"], num_past_tokens=512),
                "JetLM/SDAR-8B-Chat: one denoising pass",
            ),
            Workload(
                "two-cores/sdar-block-after-64",
                CACHED.sizes(1, 4, CACHED.tiny(**FOR_A_CPU), num_past_tokens=64),
                "a size for a CPU",
            ),
        ),
        implementations=(*model_states.on_one_device("sdar", "sdar_cached"), language_models.tensor_parallel("sdar_cached")),
        **of_model(
            CACHED,
            Rejection("a past of no whole blocks", "past_keys", _a_token_more),
        ),
    )


@row
def sdar_training() -> Contract:
    """The row of `sdar.sdar_training`."""
    return Contract(
        name="sdar.sdar_training",
        summary="Predicts the tokens of all blocks at once, each from its noisy copy and the clean blocks before it.",
        formula=(
            f"{FORMULA.partition(';  q sees')[0]}, of the rows [noisy | clean], both at the places of their sample; within a "
            "sample noisy sees the same noisy block and clean blocks before, clean sees its own clean block and those before"
        ),
        source=f"Arriola et al. 2025 (arXiv:2503.09573), section 3.2; {SOURCE}",
        reference=reference.sdar_training,
        inputs=(
            Input("state", leaves=TRAINING.leaves, differentiable=True),
            Input("noisy_ids", language_models.IDS, dtype="int64", indexes="vocab_size"),
            Input("clean_ids", language_models.IDS, dtype="int64", indexes="vocab_size"),
            Input("sample_ids", language_models.IDS, dtype="int64"),
        ),
        outputs=(LOGITS,),
        landmarks=(
            TRAINING.sizes(2, 7, TRAINING.tiny((8, 4), block_length=2)),
            TRAINING.sizes(1, 9, TRAINING.tiny((3, 1), num_hidden_layers=1, rms_norm_eps=1e-2)),
        ),
        factors=(*language_models.FACTORS, language_models.BLOCKS),
        traits=SAMPLES,
        rounded_as=flash_attention.of(reference.sdar_training, decoder),
        workloads=(
            Workload("sdar-8b/training-512", TRAINING.sizes(1, 512, SDAR_PRESETS["SDAR-8B"]), "JetAstra/SDAR training"),
            Workload("two-cores/sdar-training-32", TRAINING.sizes(1, 32, TRAINING.tiny(**FOR_A_CPU)), "a size for a CPU"),
        ),
        implementations=model_states.on_one_device(
            "sdar", "sdar_training"
        ),  # over ranks it repeats what sdar has: tests/test_language_models_on_ranks.py
        **of_model(TRAINING),
    )


SOURCE = "Cheng et al. 2025 (arXiv:2510.06303)"
FORMULA = (
    "x = token embedding; x = x + o_proj(attention(query, key, value)) of rms_norm(x), each head of query and key normalized, "
    "then rotated; x = x + down_proj(swiglu(gate_proj(y), up_proj(y))), y = rms_norm(x); logits = lm_head(rms_norm(x));  q sees "
    "k where q // block_length >= k // block_length"
)
IDS = Input("input_ids", language_models.IDS, dtype="int64", indexes="vocab_size")
LOGITS = Output("logits", (*language_models.IDS, "vocab_size"), differentiable=True)
FOR_A_CPU: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 768, "vocab_size": 2048}
EXPERTS_FIT = f"{language_models.HEADS_FIT} and num_experts % 4 == 0"
OWN_EXAMPLES: dict[str, Any] = model_states.ON_RANKS | {"sharding": "data_parallel", "dtypes": ("float32",)}
PAST = Factor("num_past_blocks", str, values=(0, 1, 3), of=lambda sizes: sizes["num_past_tokens"] // sizes["block_length"])


def of_model(model: language_models.Model, *rejections: Rejection) -> dict[str, Any]:
    """What a row has of its model."""
    of_ids = () if "input_ids" not in model.ids else (language_models.INT32,)
    return {
        "options": ("config",),
        "batch": "batch_size",
        "build": model.build if model is not CACHED else after_past,
        "regimes": model.regimes(),
        "cases": 0.05,
        "configure": model.options,
        "flops": model.flops,
        "moved": model.moved,
        "rigid": True,
        "shardings": model_states.SHARDINGS,
        "rejections": (*model.rejections(LLADA_PRESETS["LLaDA-8B"]), *rejections),
        **({"traits": of_ids} if of_ids else {}),
        **({"without": language_models.WITHOUT} if model is not CACHED else {}),
    }


def trained(operation: str) -> tuple[Implementation, ...]:
    """The rows of an operation that models are trained by."""
    return *model_states.on_one_device("sdar", operation), model_states.fsdp2(operation)


def after_past(num_past_blocks: int, **others: Any) -> dict[str, Any]:
    """The point with these values of the factors."""
    return (CACHED.build(**others) or {}) | {"num_past_tokens": num_past_blocks * others["block_length"]}


def past(draw: Draw, parameters: Parameters) -> Tensors:
    """Keys and values as they are kept."""
    heads = parameters["num_hidden_layers"], parameters["batch_size"], parameters["num_key_value_heads"]
    shape = *heads, parameters["num_past_tokens"], parameters["head_dim"]
    return {"past_keys": draw.normal(*shape), "past_values": draw.normal(*shape)}


def _a_token_more(call: dict[str, Any]) -> dict[str, Any]:
    """A past that is one token longer, and still shorter than a block."""
    past = {key: torch.nn.functional.pad(call[key], (0, 0, 0, 1)) for key in ("past_keys", "past_values")}
    return past | {"config": replace(call["config"], block_length=past["past_keys"].shape[3] + 1)}


def packed(draw: Draw, parameters: Parameters) -> Tensors:
    """One to three samples of random lengths in each row, and now and then padding behind them."""
    shape = parameters["batch_size"], parameters["num_tokens"]
    ids = (draw.uniform(*shape) < 0.3).long().cumsum(1).clamp(max=2)
    end = draw.integers(shape[1] // 2, 2 * shape[1], shape[0], 1)
    return {"sample_ids": torch.where(torch.arange(shape[1]) > end, -1, ids)}


def noisy_clean_pairs(parameters: Parameters) -> float:
    """A noisy token sees its block, and as many tokens as a clean one sees: of one sample."""
    num_tokens, length = parameters["num_tokens"], parameters["block_length"]
    own = sum(min(num_tokens, (place // length + 1) * length) for place in range(num_tokens))
    return 2.0 * own


def _all_of(sample: Any) -> Any:
    return lambda tensors: {"sample_ids": sample(tensors["sample_ids"])}


SAMPLES = (
    Trait("int32", "dtype of noisy_ids", dtypes={"noisy_ids": "int32"}),
    Trait("one", "samples", _all_of(torch.zeros_like)),
    Trait("padding alone", "samples", _all_of(lambda ids: torch.full_like(ids, -1))),
    Trait("a token each", "samples", _all_of(lambda ids: torch.arange(ids.shape[1]).expand(ids.shape).clone())),
)
SHAPES = reference.state_shapes
CAUSAL = language_models.block_causal_pairs
DENSE = language_models.Model(config_class=SDARConfig, state_shapes=SHAPES, pairs=CAUSAL)
SPARSE = language_models.Model(config_class=SDARMoEConfig, state_shapes=SHAPES, pairs=CAUSAL)
CACHED = language_models.Model(config_class=SDARConfig, state_shapes=SHAPES, pairs=CAUSAL, more=past)
TRAINING = language_models.Model(
    config_class=SDARConfig,
    state_shapes=SHAPES,
    pairs=noisy_clean_pairs,
    rows=lambda parameters: 2 * parameters["num_tokens"],
    ids=("noisy_ids", "clean_ids"),
    also_of_tokens=("sample_ids",),
    more=packed,
)
