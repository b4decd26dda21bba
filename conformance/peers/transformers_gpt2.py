"""transformers' GPT-2 with moe-emergence's layers in it, and the loop that trains them; imported only where transformers is.

The layers are written here after the public files, a module for each expert, so that one to which no token came has no gradient
and is left alone by torch.optim; noise is handed in, as it is drawn by example.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig, UpcycledGPT2Config
from gaugeblock.reference.torch import train_moe_lm, training, upcycled_gpt2
from gaugeblock.reference.torch.train_moe_lm import Metrics

State = Mapping[str, torch.Tensor]
HEAD, TOKENS = "lm_head.weight", "transformer.wte.weight"


class EmergenceMoE(torch.nn.Module):
    """A layer of experts in the place of an MLP; what its router says of a call stays on it."""

    def __init__(self, config: Any, intermediate_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = torch.nn.ModuleDict({"gate": torch.nn.Linear(config.n_embd, num_experts, bias=False)})
        self.experts = torch.nn.ModuleList(GPT2MLP(intermediate_size, config) for _ in range(num_experts))
        self.top_k = top_k
        self.noise: Any = None
        self.said: Any = ()

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router["gate"](tokens)
        clean = logits.softmax(-1)
        probs = (logits + self.noise.to(logits.dtype).flatten(0, 1)).softmax(-1) if self.training else clean
        weights, ids = probs.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)
        else:
            weights = 1 + (weights - weights.detach()) if self.training else torch.ones_like(weights)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (ids == number).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, weights[rows, places, None] * expert(tokens[rows]))
        entropy = -(clean * torch.log(clean + 1e-9)).sum(-1)
        load = torch.stack(
            [(ids == number).sum(-1).reshape(hidden_states.shape[:2]).sum(1) for number in range(probs.shape[1])], 1
        )
        per_token = (each.reshape(*hidden_states.shape[:2], *each.shape[1:]) for each in (logits, probs, entropy))
        self.said = *per_token, load.to(logits.dtype) / (hidden_states.shape[1] * self.top_k)
        return out.reshape(hidden_states.shape)


@functools.cache
def model(config: UpcycledGPT2Config) -> Any:
    """Of any parameters."""
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_position_embeddings, n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_inner=config.intermediate_size,
        layer_norm_epsilon=config.layer_norm_eps, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    module = with_buffers_alone(transformers.GPT2LMHeadModel, theirs)
    for index in config.moe_layers:
        with torch.device("meta"):
            layer = EmergenceMoE(theirs, config.intermediate_size, config.num_experts, config.top_k)
        module.transformer.h[index].mlp = layer
    return module


def outputs_of(
    parameters: State, input_ids: torch.Tensor, noise: torch.Tensor, *, training: bool, config: UpcycledGPT2Config
) -> tuple[torch.Tensor, ...]:
    """What the operation returns, of parameters with one for each expert."""
    module = model(config).train(training)
    layers = [module.transformer.h[index].mlp for index in config.moe_layers]
    for place, layer in enumerate(layers):
        layer.noise = noise[:, :, place]
    own = {**parameters, HEAD: parameters[TOKENS]}
    logits = functional_call(module, own, (input_ids,), {"use_cache": False}, tie_weights=False).logits
    said = [torch.stack(each, 2) for each in zip(*(layer.said[:3] for layer in layers), strict=True)]
    return logits, *said, torch.stack([layer.said[3] for layer in layers], 1)


def one_by_one(parameters: State, config: UpcycledGPT2Config) -> Tensors:
    """A parameter for each expert, in place of the stacked ones."""
    named = dict(parameters)
    for name in upcycled_gpt2.expert_names(config):
        prefix, _, own = name.partition(".experts.")
        named |= {f"{prefix}.experts.{number}.{own}": row for number, row in enumerate(named.pop(name))}
    return named


def stacked(parameters: State, config: UpcycledGPT2Config) -> Tensors:
    """The inverse of `one_by_one`."""
    named = dict(parameters)
    for name in upcycled_gpt2.expert_names(config):
        prefix, _, own = name.partition(".experts.")
        named[name] = torch.stack([named.pop(f"{prefix}.experts.{number}.{own}") for number in range(config.num_experts)])
    return named


@peer("upcycled_gpt2.upcycled_gpt2", dtypes=("float32",), rounding="eager", oracle=True)
class TransformersUpcycledGpt2:
    """GPT2LMHeadModel with these layers."""

    def __call__(self, state, input_ids, noise, *, training, config):
        return outputs_of(one_by_one(state, config), input_ids, noise, training=training, config=config)


class EmergenceTrainingLoop:
    """One round of moe-emergence's loop: torch.optim, clip_grad_norm_, get_cosine_schedule_with_warmup.

    Draws are by example; for AdamW and the cosine schedule alone.
    """

    def __call__(self, state, input_ids, labels, example_ids, *, config):
        step, of_model = int(state["step"]), config.model
        own = one_by_one(training.part_of_state(state, "model"), of_model)
        parameters = {name: torch.nn.Parameter(each.detach().clone()) for name, each in own.items()}
        optimizer = optimizer_of(parameters, state, config)
        batch, count = (input_ids, labels, example_ids), config.accumulation_steps
        sums: dict[str, torch.Tensor] = {}
        for ids, their_labels, examples in zip(*(each.chunk(count) for each in batch), strict=True):
            noise = train_moe_lm.noise(examples, ids.shape[1], step, dtype=own[TOKENS].dtype, config=config)
            outputs = outputs_of(parameters, ids, noise, training=True, config=of_model)
            found = losses(outputs, their_labels)
            loss = found["lm_loss"] + config.balance_coefficient * found["balance_loss"] + config.z_coefficient * found["z_loss"]
            (loss / count).backward()
            sums = {name: sums.get(name, 0) + each.detach() / count for name, each in found.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_gradient_norm)
        optimizer.step()
        return state_of(state, parameters, optimizer, config), Metrics(**sums, gradient_norm=norm)


def losses(outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a micro-batch, as the public loop computes them, each layer by itself."""
    logits, router_logits, probs, entropy, load = outputs
    lm_loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
    num_experts = probs.shape[-1]
    of_layers = [
        (num_experts * (load[:, place].mean(0) * probs[:, :, place].mean((0, 1))).sum(), router_logits[:, :, place].logsumexp(-1))
        for place in range(probs.shape[2])
    ]
    balance = torch.stack([balance for balance, _ in of_layers]).mean()
    z_loss = torch.stack([(normalizers**2).mean() for _, normalizers in of_layers]).mean()
    reported = {"entropy": entropy.mean((0, 1)), "load": load.mean(0)}
    return {"lm_loss": lm_loss, "balance_loss": balance, "z_loss": z_loss, **reported}


def optimizer_of(parameters: Mapping[str, torch.nn.Parameter], state: State, config: MoELMConfig) -> Any:
    """AdamW in the middle of the run, at the learning rate of its step; experts have had updates of their own number."""
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    moments = {each: one_by_one(training.part_of_state(state, each), config.model) for each in config.moments}
    updates = one_by_one(training.part_of_state(state, "num_updates"), config.model)
    for name, parameter in parameters.items():
        num_updates = updates.get(name, state["step"]).to(torch.float32)
        optimizer.state[parameter] = {"step": num_updates.clone(), **{each: own[name].clone() for each, own in moments.items()}}
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, config.num_warmup_steps, config.num_training_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * schedule.lr_lambdas[0](int(state["step"]))
    return optimizer


def state_of(state: State, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, config: MoELMConfig) -> Tensors:
    """The state after the update."""
    parts = {"model": stacked({name: each.detach() for name, each in parameters.items()}, config.model)}
    for moment in config.moments:
        parts[moment] = stacked({name: optimizer.state[each][moment] for name, each in parameters.items()}, config.model)
    counts = stacked({name: optimizer.state[each]["step"].long() for name, each in parameters.items()}, config.model)
    parts["num_updates"] = {name: counts[name] for name in upcycled_gpt2.expert_names(config.model)}
    return training.join_state(parts, state["step"] + 1)
