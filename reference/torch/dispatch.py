"""Dispatch: routed rows sorted by expert, padded to blocks of one expert each, gathered, and summed up for their tokens.

Routed row n is choice n % K of token n // K. Its *place* is where it stands when rows are sorted by expert.

Shapes: T num_tokens, K top_k, N = T * K routed rows, E num_experts, H hidden_size, B num_blocks, P = B * block_size places.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32


def sort_by_expert(topk_ids: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed rows by expert; rows of one expert stay in the order of their tokens, and of a token in that of its choices.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice has two rows.
        num_experts: Number of experts, of whom some may have no row.

    Returns:
        order: [num_tokens * top_k], int64, the routed row at each place.
        inverse: [num_tokens, top_k], int64, the place of each routed row.
        group_sizes: [num_experts], int64, the rows of each expert.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_experts` is no integer.
        ValueError: Ranks or sizes are wrong, an id names no expert, or there are none.

    Source: MegaBlocks (arXiv:2211.15841), section 4.2; `torch.argsort(stable=True)` of the ids.
    """
    validation.sort_by_expert(topk_ids, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True)
    inverse_TK = order_N.argsort().reshape(topk_ids.shape)
    group_sizes_E = expert_N.bincount(minlength=num_experts)
    return order_N, inverse_TK, group_sizes_E


def most_blocks(num_rows: int, num_experts: int, block_size: int) -> int:
    """Return how many blocks the worst routing needs: each expert with rows has one that may be short, all others are full."""
    num_short = min(num_rows, num_experts)
    return num_short + (num_rows - num_short) // block_size


def align_to_blocks(
    topk_ids: torch.Tensor, *, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed rows by expert, and pad those of each expert to whole blocks, so that a block has one expert.

    There are as many blocks as the worst routing of so many rows needs (`most_blocks`), so that sizes are known without the
    routing. Blocks that this routing does not need come last.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.
        num_experts: Number of experts.
        block_size: Rows of a block.

    Returns:
        sorted_token_ids: [num_blocks * block_size], int64, the routed row at each place; num_tokens * top_k for padding.
        expert_ids: [num_blocks], int64, the expert of each block; -1 for those that are not needed.
        num_tokens_post_padded: [], int64, the places of all blocks that are needed.

    Raises:
        TypeError: An argument is not an array of the dtype above, or an option is no integer.
        ValueError: Ranks or sizes are wrong, an id names no expert, or there are no experts or no rows in a block.

    Source: vLLM's and SGLang's `moe_align_block_size`, of which these are the names; they return more blocks than the worst
    routing needs, and leave open what the experts of needless ones are.
    """
    validation.align_to_blocks(topk_ids, num_experts, block_size)
    order_N, _, group_sizes_E = sort_by_expert(topk_ids, num_experts=num_experts)
    num_rows = order_N.shape[0]
    num_blocks = most_blocks(num_rows, num_experts, block_size)

    num_blocks_E = (group_sizes_E + block_size - 1) // block_size
    block_ends_E = num_blocks_E.cumsum(0)
    expert_B = torch.searchsorted(block_ends_E, torch.arange(num_blocks, device=topk_ids.device), right=True)
    expert_ids_B = torch.where(expert_B < num_experts, expert_B, -1)

    # how far padding moves the rows of each expert
    shift_E = (block_ends_E - num_blocks_E) * block_size - (group_sizes_E.cumsum(0) - group_sizes_E)
    expert_N = topk_ids.flatten().to(torch.int64)[order_N]
    place_N = torch.arange(num_rows, device=topk_ids.device) + shift_E[expert_N]
    padding_P = torch.full((num_blocks * block_size,), num_rows, device=topk_ids.device)
    return padding_P.index_put((place_N,), order_N), expert_ids_B, block_ends_E[-1] * block_size


def permute(hidden_states: torch.Tensor, order: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """Gather the token of each place: the rows that an expert computes on lie side by side.

        rows[n] = hidden_states[order[n] // top_k]

    Args:
        hidden_states: [num_tokens, hidden_size], floating.
        order: [num_rows], integer in 0..num_tokens * top_k - 1: the routed row at each place, as from `sort_by_expert`. Some
            may be missing, or come twice.
        top_k: Choices of a token.

    Returns:
        [num_rows, hidden_size], dtype as hidden_states; its gradient is added up in float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `top_k` is no integer.
        ValueError: Ranks, sizes or devices do not fit together, or `order` names no routed row.

    Source: MegaBlocks (arXiv:2211.15841), section 4.2, its gather.
    """
    validation.permute(hidden_states, order, top_k)
    validation.routed_rows_in_range(order, num_rows=hidden_states.shape[0] * top_k)

    token_N = order.to(torch.int64) // top_k
    # in float32 for the sake of the gradient, which is a sum over the choices of a token
    return at_least_float32(hidden_states)[token_N].to(hidden_states.dtype)


def unpermute(rows: torch.Tensor, inverse: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Add up the rows of each token, weighted.

        out[t] = sum over j of topk_weights[t, j] * rows[inverse[t, j]]

    Args:
        rows: [num_rows, hidden_size], floating; those that no token has (padding) may hold any values, NaN too.
        inverse: [num_tokens, top_k], integer in 0..num_rows - 1: the place of each routed row, as from `sort_by_expert`.
        topk_weights: [num_tokens, top_k], floating, usually float32.

    Returns:
        [num_tokens, hidden_size], dtype as rows; computed in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or `inverse` names no row.

    Source: MegaBlocks (arXiv:2211.15841), section 4.2, its scatter; the sum is equation 1 of Shazeer et al. (arXiv:1701.06538).
    """
    validation.unpermute(rows, inverse, topk_weights)
    validation.places_in_range(inverse, num_rows=rows.shape[0])

    rows_TKH = at_least_float32(rows)[inverse.to(torch.int64)]
    out_TH = (at_least_float32(topk_weights)[..., None] * rows_TKH).sum(dim=1)
    return out_TH.to(rows.dtype)
