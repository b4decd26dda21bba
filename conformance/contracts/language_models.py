"""What the contracts of SDAR, LLaDA and Dream have in common: sizes, parameters, values, costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from gaugeblock.conformance.contracts import model_states
from gaugeblock.conformance.engine.contract import Input, Regime, Rejection
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.implementation import Implementation, distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DType, Parameters, Tensors
from gaugeblock.reference.configs import LanguageModelConfig, SDARMoEConfig

Make = Callable[[Draw, Parameters], Tensors]

TABLES = ("embed_tokens", ".wte.")
NORM_SCALES = ("norm.weight", "_norm.weight", "layernorm.weight", "ln_f.weight")
HEADS = ((2, 1), (8, 4), (2, 2), (3, 1))  # of queries; of keys and values; four ranks can share the second
WITHOUT = {"nan_containment": "an example has no floating numbers: it is ids"}
IDS = ("batch_size", "num_tokens")
HEADS_FIT = "num_key_value_heads % 4 == 0 and vocab_size % 4 == 0"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's part in its row: functions of a case's parameters."""

    config_class: type[Any]
    state_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    pairs: Callable[[Parameters], float]
    """How many keys all queries of an example see together."""
    rows: Callable[[Parameters], int] = lambda parameters: parameters["num_tokens"]
    """Tokens of an example that pass the layers."""
    ids: tuple[str, ...] = ("input_ids",)
    """Arguments that are tokens."""
    also_of_tokens: tuple[str, ...] = ()
    """Other arguments with a row and a column for each token."""
    more: Make = lambda draw, parameters: {}
    """Draws the other arguments."""

    def configuration(self, parameters: Parameters) -> Any:
        """The model at given parameters."""
        return self.config_class(**{field.name: parameters[field.name] for field in fields(self.config_class)})

    def options(self, parameters: Parameters) -> dict[str, Any]:
        """The keyword arguments."""
        return {"config": self.configuration(parameters)}

    def leaves(self, parameters: Parameters) -> dict[str, Input]:
        """The model's parameters."""
        return model_states.leaves(self.state_shapes(self.configuration(parameters)))

    def flops(self, parameters: Parameters) -> float:
        """Matrix products of tokens and attention; the head's are of the tokens whose logits are returned."""
        config = self.configuration(parameters)
        total = 4.0 * config.num_hidden_layers * self.pairs(parameters) * config.num_attention_heads * config.head_dim
        for name, shape in self.state_shapes(config).items():
            rows = parameters["num_tokens"] if shape[0] == config.vocab_size else self.rows(parameters)
            if not any(each in name for each in TABLES):
                total += used(name, config) * model_states.product_flops(shape, rows)
        return float(parameters["batch_size"] * total)

    def moved(self, parameters: Parameters, itemsize: int) -> float:
        """Parameters and results, once each, of the table the rows of all tokens, and of the experts those that may be used."""
        config, batch_size = self.configuration(parameters), parameters["batch_size"]
        rows = batch_size * self.rows(parameters)
        shapes = self.state_shapes(config).items()
        read = sum(min(1.0, rows * used(name, config)) * math.prod(shape) for name, shape in shapes if not is_table(name))
        past = parameters.get("num_past_tokens")
        kept = 0 if past is None else 2 * (past + parameters["num_tokens"]) * config.num_key_value_heads * config.head_dim
        results = parameters["num_tokens"] * config.vocab_size + config.num_hidden_layers * kept
        return itemsize * (read + rows * config.hidden_size + batch_size * results)

    def dithered(self, draw: Draw, parameters: Parameters) -> Tensors:
        """Weights scaled by fan-in, none of them 0; random tokens."""
        config = self.configuration(parameters)
        tensors = model_states.drawn(draw, self.state_shapes(config), tables=TABLES, around_one=NORM_SCALES)
        if isinstance(config, SDARMoEConfig):
            choosing(draw, tensors, config)
        shape = parameters["batch_size"], parameters["num_tokens"]
        ids = {name: draw.integers(0, config.vocab_size, *shape) for name in self.ids}
        return tensors | ids | self.more(draw, parameters)

    def near_constants(self, draw: Draw, parameters: Parameters) -> Tensors:
        """Where constants count: mean squares stay near the eps of every RMSNorm, those of heads as well."""
        tensors = self.dithered(draw, parameters)
        for name, tensor in tensors.items():
            of_heads = self.config_class.has_qk_norm and name.endswith(("q_proj.weight", "k_proj.weight"))
            if is_table(name) or writes(name) or of_heads:
                tensor *= 2.0**-8
        return tensors

    def extreme(self, draw: Draw, parameters: Parameters) -> Tensors:
        """Attention that picks single tokens; one feature of all tokens that is far larger than others."""
        tensors = self.dithered(draw, parameters)
        sharp = ("q_norm.weight",) if self.config_class.has_qk_norm else ("q_proj.weight", "k_proj.weight")
        for name, tensor in tensors.items():
            if name.endswith(sharp):
                tensor *= 3
            elif is_table(name):
                tensor[:, -1] += 2.0**5
        return tensors

    def special(self, draw: Draw, parameters: Parameters) -> Tensors:
        """A token that is NaN, in the middle of an example, and one that is infinite, at the end of another."""
        tensors = self.dithered(draw, parameters)
        table = next(tensor for name, tensor in tensors.items() if is_table(name))
        table[0, 0], table[1, -1] = torch.nan, torch.inf
        for name in self.ids:
            ids = tensors[name] = tensors[name].clamp(min=2)
            ids[0, ids.shape[1] // 2] = 0
            if len(ids) > 1:
                ids[1, -1] = 1
        return tensors

    def regimes(self) -> tuple[Regime, ...]:
        """Those of its row."""
        return (
            Regime("dithered", self.dithered),
            Regime("constants", self.near_constants, "worst element"),
            Regime("adversarial", self.extreme, "worst element"),
            Regime("special", self.special, "worst element", differentiable=False),
        )

    def sizes(self, batch_size: int, num_tokens: int, config: Any, **others: int) -> dict[str, Any]:
        """One point of the input space."""
        return {"batch_size": batch_size, "num_tokens": num_tokens, **vars(config), **others}

    def tiny(self, heads: tuple[int, int] = (8, 4), **others: Any) -> Any:
        """A config small enough for an interpreter; heads together are wider than a token."""
        own = {field.name for field in fields(self.config_class)}
        small = {
            "vocab_size": 12,
            "hidden_size": 16,
            "intermediate_size": 20,
            "moe_intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "mask_token_id": 11,
            "block_length": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        return self.config_class(**{name: each for name, each in (small | others).items() if name in own})

    def build(self, batch_size: int, num_tokens: int, heads: tuple[int, int], **others: Any) -> dict[str, Any] | None:
        """The point with these values of the factors; None where more experts are chosen than there are."""
        if others.get("num_experts_per_tok", 1) > others.get("num_experts", math.inf):
            return None
        return self.sizes(batch_size, num_tokens, self.tiny(heads, **others))

    def rejections(self, other: LanguageModelConfig) -> tuple[Rejection, ...]:
        """Bad calls of every model; of the config of another one."""
        names = [f"state/{name}" for name in self.state_shapes(self.tiny())]
        table = next(filter(is_table, names))
        first = self.ids[0]
        return (
            Rejection("a parameter transposed", table.removeprefix("state/"), changed(table, lambda each: each.mT)),
            Rejection("a parameter too many", "layers.99", lambda call: {"state/model.layers.99.mlp": call[names[-1]]}),
            Rejection(
                "sequences without tokens",
                first,
                lambda call: {name: call[name][:, :0] for name in (*self.ids, *self.also_of_tokens)},
            ),
            Rejection("the config of another model", "config", lambda call: {"config": other}),
        )


def tensor_parallel(operation: str, only: str = "", dtypes: tuple[DType, ...] = ("float32",)) -> Implementation:
    """The row of a model whose ranks share heads, hidden features or experts, and the vocabulary.

    SDAR's is judged in bfloat16, too: what it adds, all share.
    """
    claims = model_states.ON_RANKS | {"dtypes": dtypes, "only": only or f"{HEADS_FIT} and intermediate_size % 4 == 0"}
    return distributed("tensor-parallel", f"decoder_tensor_parallel:{operation}", **claims)


def is_table(name: str) -> bool:
    """Whether a parameter is the table of tokens' embeddings."""
    return any(each in name for each in TABLES)


def writes(name: str) -> bool:
    """Whether a parameter is the last of a branch, whose result is added to a token."""
    ends = ("o_proj.weight", "attn_out.weight", "down_proj.weight", "experts.down_proj")
    return name.endswith(ends) or (".blocks." in name and name.endswith("ff_out.weight"))


def used(name: str, config: LanguageModelConfig) -> float:
    """The part of a parameter that a token passes."""
    of_experts = isinstance(config, SDARMoEConfig) and "mlp.experts" in name
    return config.num_experts_per_tok / config.num_experts if of_experts and isinstance(config, SDARMoEConfig) else 1.0


def choosing(draw: Draw, tensors: Tensors, config: SDARMoEConfig) -> None:
    """Make gates look at one feature first, in turns of their own, which hardly anything moves: else one choice of many is always
    near a tie in bfloat16."""
    table = tensors["state/model.embed_tokens.weight"]
    table[:, 0] = torch.where(draw.uniform(len(table)) < 0.5, 1.0, -1.0) * (1.0 + 0.25 * draw.uniform(len(table)))
    turns = torch.arange(config.num_experts) - (config.num_experts - 1) / 2
    for index in range(config.num_hidden_layers):
        prefix = f"state/model.layers.{index}"
        tensors[f"{prefix}.self_attn.o_proj.weight"][0] *= 0.125
        tensors[f"{prefix}.mlp.experts.down_proj"][:, 0] *= 0.125
        tensors[f"{prefix}.post_attention_layernorm.weight"][0] = 1.0 + 0.25 * draw.uniform(1)[0]
        gate = tensors[f"{prefix}.mlp.gate.weight"]
        gate *= 0.125
        gate[:, 0] = turns[draw.permutation(config.num_experts)] * min(1.5, 4 / config.num_experts)


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", 1, 2, 7, 9),
    Factor("heads", str, values=HEADS, of=lambda sizes: (sizes["num_attention_heads"], sizes["num_key_value_heads"])),
    edges("num_hidden_layers", 1, 2),
    either("rms_norm_eps", 1e-6, 1e-2),
    either("rope_theta", 1e4, 1e6),
)
BLOCKS = edges("block_length", 1, 2, 4, 9, option=True)
INT32 = Trait("int32", "dtype of input_ids", dtypes={"input_ids": "int32"})


def _mask(value: bool) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {"attention_mask": torch.full_like(tensors["attention_mask"], value)}


def _padded_left(tensors: Tensors) -> Tensors:
    mask = torch.ones_like(tensors["attention_mask"])
    mask[:, : mask.shape[1] // 2] = False
    return {"attention_mask": mask}


MASK_TRAITS = (
    INT32,
    Trait("no padding", "values of attention_mask", _mask(True)),
    Trait("padding alone", "values of attention_mask", _mask(False)),
    Trait("padding on the left", "values of attention_mask", _padded_left),
)


def padding(draw: Draw, parameters: Parameters) -> Tensors:
    """Padding here and there."""
    return {"attention_mask": draw.uniform(parameters["batch_size"], parameters["num_tokens"]) < 0.8}


def all_pairs(parameters: Parameters) -> float:
    """Every token sees every token."""
    return float(parameters["num_tokens"] ** 2)


def block_causal_pairs(parameters: Parameters) -> float:
    """Every token sees its block and those before it, of the past too."""
    num_tokens, length, past = parameters["num_tokens"], parameters["block_length"], parameters.get("num_past_tokens", 0)
    return float(sum(past + min(num_tokens, (place // length + 1) * length) for place in range(num_tokens)))
