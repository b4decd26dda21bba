"""The filter of logits, by the highest of them and by counts, in PyTorch operations.

How a token's probability adds up is known from the sorted highest logits alone: what is kept are all tokens above one of these
logits, and of those that equal it the first ones. So nothing is scattered back, and where top_k is given nothing is sorted but
top_k logits: a row of a vocabulary is read a few times. Ties beyond the top_k are counted.

Shapes: N num_rows, V vocabulary_size, K the top_k, or V.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32


def filter_logits(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, top_k_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.token_choices.filter_logits`."""
    validation.filter_logits(logits, temperature, top_k, top_p, top_k_first)
    logits_NV = at_least_float32(logits)
    highest_NK = logits_NV.topk(top_k or logits.shape[1], dim=-1).values
    tempered_NV = logits_NV / temperature
    if top_p < 1:
        kept_NV = _most_probable(logits_NV, tempered_NV, highest_NK, temperature, top_p, top_k_first)
    else:
        kept_NV = logits_NV >= highest_NK[:, -1:]
    return torch.where(kept_NV, tempered_NV, -torch.inf), kept_NV


def _most_probable(
    logits_NV: torch.Tensor,
    tempered_NV: torch.Tensor,
    highest_NK: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k_first: bool,
) -> torch.Tensor:
    """Return which tokens [N, V] of the top_k are kept; the highest logits are sorted, a NaN first, which is never kept."""
    last_N1 = highest_NK[:, -1:]
    is_number_NK = highest_NK >= last_N1
    tempered_NK = (highest_NK / temperature).masked_fill(~is_number_NK, -torch.inf)
    num_last_N1 = (logits_NV == last_N1).sum(dim=-1, keepdim=True)
    is_last_NK = highest_NK == last_N1
    if top_k_first:
        largest_N1 = tempered_NK.amax(dim=-1, keepdim=True)
        weights_NK = torch.exp(tempered_NK - largest_N1)
        others_N1 = (num_last_N1 - is_last_NK.sum(dim=-1, keepdim=True)) * weights_NK[:, -1:]
        probs_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + others_N1)
    else:
        probs_NK = torch.exp(tempered_NK - tempered_NV.logsumexp(dim=-1, keepdim=True))
    before_NK = torch.nn.functional.pad(probs_NK.cumsum(dim=-1)[:, :-1], (1, 0))
    is_kept_NK = is_number_NK & (before_NK <= top_p)
    # the least kept logit, and how many tokens of that logit are kept
    least_N1 = highest_NK.masked_fill(~is_kept_NK, torch.inf).amin(dim=-1, keepdim=True)
    num_least_N1 = (is_kept_NK & (highest_NK == least_N1)).sum(dim=-1, keepdim=True)
    # ties beyond the top_k go on where those within end
    room_N1 = top_p - before_NK[:, -1:]
    more_N1 = torch.where(probs_NK[:, -1:] > 0, torch.floor(room_N1 / probs_NK[:, -1:]), num_last_N1)
    beyond_N1 = torch.minimum(more_N1, num_last_N1 - is_last_NK.sum(dim=-1, keepdim=True)).to(num_least_N1.dtype)
    num_least_N1 = num_least_N1 + torch.where(is_kept_NK[:, -1:], beyond_N1, 0)
    is_least_NV = logits_NV == least_N1
    return (logits_NV > least_N1) | (is_least_NV & (is_least_NV.cumsum(dim=-1) <= num_least_N1))
