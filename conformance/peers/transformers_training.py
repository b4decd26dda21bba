"""A loop that trains a masked or block diffusion language model, one round of which is a training step.

As public loops have it: tokens are masked, the model is transformers', cross-entropies are those of masked tokens alone, which
are picked; then clip_grad_norm_ and torch.optim. Imported only where transformers is installed.
"""

from collections.abc import Mapping
from functools import partial

import torch
import transformers

from gaugeblock.conformance.peers.training_loops import round_of_loop
from gaugeblock.conformance.peers.transformers_decoders import TransformersLlama, TransformersQwen2, TransformersQwen3Training
from gaugeblock.reference.configs import BlockDiffusionConfig, DreamConfig, LLaDAConfig
from gaugeblock.reference.torch import train_block_diffusion, training
from gaugeblock.reference.torch.train_block_diffusion import Metrics


class TransformersTrainingLoop:
    """LlamaModel, Qwen2Model or Qwen3Model, torch.optim, clip_grad_norm_, get_scheduler; without an average of parameters."""

    def __call__(self, state, input_ids, labels, sample_ids, example_ids, *, config):
        if config.ema is not None:
            raise NotImplementedError("config.ema must be None: transformers has no average of parameters")
        step = int(state["step"])
        dtype = state[next(name for name in state if name.startswith("model."))].dtype
        batch = train_block_diffusion.weighted_batch(input_ids, labels, sample_ids, example_ids, step, dtype=dtype, config=config)
        parameters = {name: torch.nn.Parameter(each.clone()) for name, each in training.part_of_state(state, "model").items()}
        parts, loss, norm = round_of_loop(
            parameters, partial(loss_of, parameters, config=config), state, batch, config, transformers.get_scheduler
        )
        return training.join_state(parts, state["step"] + 1), Metrics(loss, norm)


def loss_of(
    parameters: Mapping[str, torch.Tensor],
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    config: BlockDiffusionConfig,
) -> torch.Tensor:
    """The weighted sum over masked tokens, []."""
    match config.model:
        case LLaDAConfig():
            logits = TransformersLlama()(parameters, noisy_ids, sample_ids >= 0, config=config.model)
        case DreamConfig():
            logits = TransformersQwen2()(parameters, noisy_ids, sample_ids >= 0, config=config.model)
        case _:
            logits = TransformersQwen3Training()(parameters, noisy_ids, clean_ids, sample_ids, config=config.model)
    if config.excludes_mask_token:
        logits[..., config.model.mask_token_id] = -torch.inf
    is_masked = weights != 0
    losses = torch.nn.functional.cross_entropy(logits[is_masked], labels[is_masked].long(), reduction="none")
    return (weights[is_masked] * losses).sum()
