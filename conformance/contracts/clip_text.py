"""The contract of CLIP's text encoder."""

from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import CLIP_TEXT_PRESETS, LEGACY_EOS_TOKEN_ID, CLIPTextConfig
from gaugeblock.reference.torch import clip_text as model


@row
def clip_text() -> Contract:
    """The row of `clip_text.clip_text`."""
    return Contract(
        name="clip_text.clip_text",
        summary="A causal transformer on the tokens of a caption, pooled at the token that ends it.",
        formula=(
            "x = token embedding + position embedding; x = layer(x), num_hidden_layers times; hidden_states = x of the returned "
            "layer, normalized or not; pooled = projection(layer_norm(x) at the place of the token that ends the caption)"
        ),
        source="Radford et al. 2021 (arXiv:2103.00020), section 2.4; transformers models/clip/modeling_clip.py",
        reference=model.clip_text,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("input_ids", ("batch_size", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("attention_mask", ("batch_size", "num_tokens"), dtype="bool"),
        ),
        outputs=(
            Output("hidden_states", ("batch_size", "num_tokens", "hidden_size"), differentiable=True),
            Output("pooled", ("batch_size", "pooled_size"), differentiable=True),
        ),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(3, 7, tiny_model(eos_token_id=5, projection_dim=20, returned_layer=-2, normalize_returned=False)),
            sizes(2, 5, tiny_model(24, 3, hidden_act="gelu", layer_norm_eps=1e-3)),
            sizes(1, 9, tiny_model(64, 1, num_hidden_layers=1, returned_layer=0)),  # a head as wide as the published ones
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_constants, "worst element"),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.clip_text, model),
        cases=0.2,  # a budget with the gradients of all parameters takes about a second
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("clip-l/batch-8", sizes(8, 77, CLIP_TEXT_PRESETS["clip-l"]), "openai/clip-vit-large-patch14 (ViT-L/14)"),
            Workload(
                "openclip-bigg/batch-2",
                sizes(2, 77, CLIP_TEXT_PRESETS["openclip-bigg"]),
                "Podell et al. 2023 (arXiv:2307.01952), table 1: OpenCLIP ViT-bigG",
            ),
            Workload("two-cores/clip-l-batch-1", sizes(1, 77, CLIP_TEXT_PRESETS["clip-l"]), "a size for a CPU"),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        without={"nan_containment": "an example has no floating numbers: it is ids and a mask"},
        implementations=(
            *model_states.on_one_device("clip_text"),
            model_states.fsdp2("clip_text"),
            model_states.jax_sharded("sharded_clip_text:clip_text", only=FOUR_CAN_SHARE),
        ),
    )


FOUR_CAN_SHARE = "num_attention_heads % 4 == 0 and intermediate_size % 4 == 0"
TOKENS, PLACES = "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"
TABLES = ("_embedding.weight",)
NORM_SCALES = ("norm1.weight", "norm2.weight", "norm.weight")


def configuration(parameters: Parameters) -> CLIPTextConfig:
    """The model at given parameters."""
    return CLIPTextConfig(**{field.name: parameters[field.name] for field in fields(CLIPTextConfig)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens, that of what is pooled, and attention of each to those before it."""
    config, num_tokens = configuration(parameters), parameters["num_tokens"]
    pairs = num_tokens * (num_tokens + 1) / 2
    total = 4.0 * config.num_hidden_layers * pairs * config.hidden_size
    for name, shape in model.state_shapes(config).items():
        if not name.endswith(TABLES):
            total += model_states.product_flops(shape, 1 if name.startswith("text_projection") else num_tokens)
    return float(parameters["batch_size"] * total)


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters and results, once each, and of the tables the rows of all tokens."""
    config = configuration(parameters)
    tokens = parameters["batch_size"] * parameters["num_tokens"] * config.hidden_size
    rows = tokens + parameters["num_tokens"] * config.hidden_size
    results = tokens + parameters["batch_size"] * config.pooled_size
    return itemsize * (model_states.moved(model.state_shapes(config), without=TABLES) + rows + results)


def sizes(batch_size: int, num_tokens: int, config: CLIPTextConfig) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, **vars(config), "pooled_size": config.pooled_size}


def tiny_model(hidden_size: int = 32, num_attention_heads: int = 4, **others: Any) -> CLIPTextConfig:
    """A model small enough for an interpreter."""
    small = CLIPTextConfig(
        vocab_size=12,
        hidden_size=hidden_size,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=17,
    )
    return replace(small, **others)


HEADS = ((32, 4), (16, 1), (24, 3), (64, 1))
NUM_TOKENS = (7, 1, 2, 16, 17)
PROJECTION_DIMS = (None, 1, 20)
RETURNED = ((-1, True), (-2, False), (-2, True), (0, False))
FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", *sorted(NUM_TOKENS)),
    Factor("heads", str, values=HEADS, of=lambda sizes: (sizes["hidden_size"], sizes["num_attention_heads"])),
    edges("num_hidden_layers", 1, 2),
    Factor("projection_dim", str, values=PROJECTION_DIMS),
    Factor("returned", str, values=RETURNED, of=lambda sizes: (sizes["returned_layer"], sizes["normalize_returned"])),
    either("hidden_act", "quick_gelu", "gelu"),
    either("eos_token_id", LEGACY_EOS_TOKEN_ID, 5),
    either("layer_norm_eps", 1e-5, 1e-3),
)


def point(
    batch_size: int, num_tokens: int, heads: tuple[int, int], returned: tuple[int, bool], **others: Any
) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    layer, normalized = returned
    return sizes(batch_size, num_tokens, tiny_model(*heads, returned_layer=layer, normalize_returned=normalized, **others))


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models with one to three heads."""
    values: dict[str, Any] = {factor.name: draw(st.sampled_from(factor.values)) for factor in FACTORS}
    return point(**values) or {}


def _mask(value: bool) -> Any:
    return lambda tensors: {"attention_mask": torch.full_like(tensors["attention_mask"], value)}


TRAITS = (
    Trait("int32", "dtype of input_ids", dtypes={"input_ids": "int32"}),
    Trait("no padding", "values of attention_mask", _mask(True)),
    Trait("padding alone", "values of attention_mask", _mask(False)),
    Trait("not a first token", "values of attention_mask", lambda tensors: without_first(tensors)),
)


def without_first(tensors: Tensors) -> Tensors:
    """The first token is padding, so that it sees nothing."""
    mask = torch.ones_like(tensors["attention_mask"])
    mask[:, 0] = False
    return {"attention_mask": mask}


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Weights scaled by fan-in, none of them 0; captions of random ids and lengths, with padding here and there."""
    config = configuration(parameters)
    state = model_states.drawn(draw, model.state_shapes(config), tables=TABLES, around_one=NORM_SCALES)
    shape = parameters["batch_size"], parameters["num_tokens"]
    input_ids = draw.integers(0, config.vocab_size, *shape)
    if config.eos_token_id != LEGACY_EOS_TOKEN_ID:
        place = draw.integers(0, parameters["num_tokens"], parameters["batch_size"], 1)
        input_ids.scatter_(1, place, config.eos_token_id)
    return {**state, "input_ids": input_ids, "attention_mask": draw.uniform(*shape) < 0.8}


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: variances stay near the eps of every LayerNorm; inputs of the activation are near -2.

    There the exact GELU, its approximation by tanh and quick-GELU differ by a tenth and more.
    """
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if name.endswith(TABLES) or "self_attn.out_proj" in name or "mlp.fc2" in name:
            tensor *= 2.0**-8
        elif name.endswith("mlp.fc1.weight"):
            tensor *= 2.0**-4
        elif name.endswith("mlp.fc1.bias"):
            tensor.mul_(0.25).sub_(2)
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; one feature of all tokens that is far larger than the others, as in trained models."""
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 3
    tensors[f"state/{PLACES}"][:, -1] += 2.0**5
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """A token that is NaN, in the middle of an example, and a place that is infinite."""
    tensors = dithered(draw, parameters)
    ids = tensors["input_ids"]
    tensors[f"state/{TOKENS}"][0, 0] = torch.nan
    tensors["input_ids"] = torch.where(ids == 0, 1, ids)
    if parameters["num_tokens"] > 2:
        tensors["input_ids"][0, 1] = 0
        tensors["input_ids"][0, -1] = max(parameters["eos_token_id"], 1)
        tensors[f"state/{PLACES}"][2, -1] = torch.inf
    return tensors


def _caption(call: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}


QUERIES = "state/text_model.encoder.layers.0.self_attn.q_proj.weight"
FC1 = "state/text_model.encoder.layers.0.mlp.fc1.weight"
REJECTIONS = (
    Rejection("a parameter transposed", "layers.0.mlp.fc1.weight", changed(FC1, lambda each: each.T)),
    Rejection("a parameter too many", "layers.99.mlp", lambda call: {"state/text_model.encoder.layers.99.mlp": call[QUERIES]}),
    Rejection("a caption too long", "input_ids", lambda call: _caption(call, call["input_ids"].repeat(1, 18))),
    Rejection("a caption without tokens", "input_ids", lambda call: _caption(call, call["input_ids"][:, :0])),
    Rejection(
        "a caption that does not end",
        "input_ids",
        lambda call: {  # with the token of old configs any caption ends
            "input_ids": torch.where(call["input_ids"] == 5, 4, call["input_ids"]),
            "config": replace(call["config"], eos_token_id=5),
        },
        by_values=True,
    ),
)
