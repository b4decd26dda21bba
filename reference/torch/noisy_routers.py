"""Routers that choose by noisy logits; the draw is an input.

Shapes: T num_tokens, E num_experts, K top_k.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32


def noisy_topk(
    router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` experts of highest noisy logit, with noise whose deviation is learned.

        h = router_logits + noise * softplus(noise_logits)
        ids = top_k(h)
        weights = softmax(h[ids])

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        noise_logits: [num_tokens, num_experts], of the dtype of router_logits.
        noise: [num_tokens, num_experts], any floating dtype; draws of a standard normal. It gets no gradient.
        top_k: Experts per token, 1 to num_experts.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending h; equal ones in any order. A token with a NaN in h
            gets any distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, or `top_k` not an integer.
        ValueError: A rank, size or device is wrong, or `top_k` is not in 1..num_experts.

    Source: Outrageously Large Neural Networks (arXiv:1701.06538), section 2.1, equations 3 to 5.
    """
    validation.noisy_topk(router_logits, noise_logits, noise, top_k)

    noisy_TE = noisy_logits(router_logits, noise_logits, noise)
    ids_TK = torch.topk(noisy_TE, top_k, dim=-1).indices
    return torch.softmax(noisy_TE.gather(-1, ids_TK), dim=-1), ids_TK


def noisy_logits(router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return what experts are chosen by, h = router_logits + noise * softplus(noise_logits), [num_tokens, num_experts]."""
    logits_TE = at_least_float32(router_logits)
    deviation_TE = torch.nn.functional.softplus(at_least_float32(noise_logits))
    return logits_TE + noise.detach().to(logits_TE.dtype) * deviation_TE


def ste_topk(
    router_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int, noise_std: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the `top_k` most probable experts of noisy logits; the weight of one alone is 1, its gradient straight through.

        p_clean = softmax(router_logits)
        entropy = -sum(p_clean * ln(p_clean + 1e-9))
        p = softmax(router_logits + noise_std * noise)  in training, else p_clean
        ids = top_k(p)
        weights = p[ids] / (sum(p[ids]) + 1e-9)         if top_k > 1
        weights = 1 + (p[ids] - stop_gradient(p[ids]))  if top_k = 1, in training
        weights = 1                                     if top_k = 1, else

    Args:
        router_logits: [num_tokens, num_experts] or [batch_size, sequence_length, num_experts], any floating dtype; of the
            latter, num_tokens = batch_size * sequence_length.
        noise: Of the shape of router_logits, any floating dtype; draws of a standard normal. It gets no gradient.
        top_k: Experts per token, 1 to num_experts.
        noise_std: Deviation of the noise, as `noise_std_at` has it; 0 or more.
        training: Whether there is noise, and a gradient through the weight of one expert alone.

    Returns:
        All but the ids in float32 (float64 for float64 logits):
        topk_weights: [num_tokens, top_k].
        topk_ids: [num_tokens, top_k], int64, by descending p; equal ones in any order. A token with a NaN gets any distinct ids.
        router_probs: p, [num_tokens, num_experts].
        router_probs_clean: p_clean, [num_tokens, num_experts].
        router_logits: Those that were given, without noise, [num_tokens, num_experts].
        entropy: Of p_clean, in nats, [num_tokens].

    Raises:
        TypeError: `router_logits` or `noise` is not a floating array, or an option is of another kind.
        ValueError: A rank, size or device is wrong, `top_k` is not in 1..num_experts, or `noise_std` is negative or not finite.

    Source: sumitdotml/moe-emergence, `moe_emergence/moe.py`, whose router takes [batch_size, sequence_length, hidden_size].
    """
    validation.ste_topk(router_logits, noise, top_k, noise_std)

    logits_TE = at_least_float32(router_logits).reshape(-1, router_logits.shape[-1])
    probs_clean_TE = torch.softmax(logits_TE, dim=-1)
    entropy_T = -(probs_clean_TE * torch.log(probs_clean_TE + 1e-9)).sum(dim=-1)
    probs_TE = noisy_probs(logits_TE, noise, noise_std) if training else probs_clean_TE

    ids_TK = torch.topk(probs_TE, top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, ids_TK)
    if top_k > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-9)
    else:
        weights_TK = 1 + (weights_TK - weights_TK.detach()) if training else torch.ones_like(weights_TK)
    return weights_TK, ids_TK, probs_TE, probs_clean_TE, logits_TE, entropy_T


def noisy_probs(router_logits: torch.Tensor, noise: torch.Tensor, noise_std: float) -> torch.Tensor:
    """Return what experts are chosen by in training, softmax(router_logits + noise_std * noise), in the former's dtype."""
    noise_TE = noise.detach().to(router_logits.dtype).reshape(router_logits.shape)
    return torch.softmax(router_logits + noise_std * noise_TE, dim=-1)


def noise_std_at(step: int, total_steps: int, anneal_fraction: float, noise_std: float) -> float:
    """Return the deviation of the noise after `step` finished steps: it falls from `noise_std` to 0 on a line.

        anneal_steps = int(total_steps * anneal_fraction)
        deviation = noise_std * (1 - step / anneal_steps)  if step < anneal_steps, else 0

    Args:
        step: Finished steps of the optimizer.
        total_steps: Of the whole training.
        anneal_fraction: Part of it that has noise, 0 to 1.
        noise_std: At the first step; 0 or more.

    Raises:
        TypeError: An argument is not a number, or of the steps not an integer.
        ValueError: An argument is negative or not finite, or `anneal_fraction` above 1.

    Source: sumitdotml/moe-emergence, `moe_emergence/moe.py`.
    """
    validation.noise_std_at(step, total_steps, anneal_fraction, noise_std)
    anneal_steps = int(total_steps * anneal_fraction)
    return noise_std * (1 - step / anneal_steps) if step < anneal_steps else 0.0
