"""Which tokens see which in masked and block diffusion language models: True where a query may look at a key.

Shapes: B batch_size, S tokens that look, T tokens that are looked at; of training S tokens of a row, noisy and clean ones 2S.
"""

import torch


def full_mask(is_real_query: torch.Tensor, is_real_key: torch.Tensor) -> torch.Tensor:
    """Let every real query [B, S] see every real key [B, T]: [B, S, T] bool."""
    return is_real_query[:, :, None] & is_real_key[:, None, :]


def block_causal_mask(query_places: torch.Tensor, key_places: torch.Tensor, *, block_length: int) -> torch.Tensor:
    """Let a token see its own block and all blocks before it, of places [..., S] and [..., T] from the prompt's start.

        mask[s, t] = query_places[s] // block_length >= key_places[t] // block_length

    Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.1; Cheng et al. 2025 (arXiv:2510.06303).
    """
    query_block_S, key_block_T = (torch.div(places, block_length, rounding_mode="floor") for places in (query_places, key_places))
    return query_block_S[..., :, None] >= key_block_T[..., None, :]


def noisy_clean_mask(sample_ids: torch.Tensor, *, block_length: int) -> torch.Tensor:
    """Let noisy and clean copies of packed samples [B, S] see each other as in decoding: [B, 2S, 2S] bool, noisy ones first.

        noisy sees noisy:  the same block
        noisy sees clean:  the blocks before
        clean sees clean:  its own block and those before
        clean sees noisy:  never

    All of it within a sample, whose blocks begin at its first token. A token whose sample is negative is padding, which neither
    sees nor is seen.

    Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.2 and figure 3; several samples as in SDAR's training code.
    """
    block_BS = torch.div(places_in_samples(sample_ids), block_length, rounding_mode="floor")
    query_block_BS1, key_block_B1S = block_BS[:, :, None], block_BS[:, None, :]
    is_together_BSS = (sample_ids[:, :, None] == sample_ids[:, None, :]) & (sample_ids >= 0)[:, :, None]
    noisy_to_noisy_BSS = is_together_BSS & (query_block_BS1 == key_block_B1S)
    noisy_to_clean_BSS = is_together_BSS & (query_block_BS1 > key_block_B1S)
    clean_to_clean_BSS = is_together_BSS & (query_block_BS1 >= key_block_B1S)
    noisy_BST = torch.cat([noisy_to_noisy_BSS, noisy_to_clean_BSS], dim=2)
    clean_BST = torch.cat([torch.zeros_like(is_together_BSS), clean_to_clean_BSS], dim=2)
    return torch.cat([noisy_BST, clean_BST], dim=1)


def places_in_samples(sample_ids: torch.Tensor) -> torch.Tensor:
    """Count for each token [B, S] how many of its sample come before it: [B, S] int64, 0 for the first."""
    is_together_BSS = sample_ids[:, :, None] == sample_ids[:, None, :]
    return is_together_BSS.tril(diagonal=-1).sum(dim=2)
