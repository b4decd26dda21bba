"""Layers that the diffusion models share: modulation, attention, feed-forward, embeddings, patches.

Shapes: B batch_size, S tokens of a sequence, D hidden_size, I intermediate_size, A num_heads, F features of a head,
C channels, H height, W width, P patch_size, Y and X rows and columns of patches (S = Y * X).
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.precision import at_least_float32

LONGEST_PERIOD = 10000  # of both sinusoidal embeddings, in units of 2 pi


def layer_norm_modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize each token to mean 0 and variance 1, then scale and shift it as its example asks (adaptive LayerNorm).

        out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * (1 + scale) + shift

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], floating; shift and scale have its dtype.
        shift: [batch_size, hidden_size].
        scale: [batch_size, hidden_size]; 0 leaves the normalized token as it is.
        eps: Added to the variance; positive.

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, or eps is not positive.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3.2, "adaLN"; LayerNorm of Ba et al. (arXiv:1607.06450)
    without its own scale and shift.
    """
    validation.layer_norm_modulate(hidden_states, shift, scale, eps)
    normalized_BSD = layer_norm(at_least_float32(hidden_states), eps=eps)
    out_BSD = normalized_BSD * (1 + at_least_float32(scale)[:, None]) + at_least_float32(shift)[:, None]
    return out_BSD.to(hidden_states.dtype)


def gated_residual(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Add a branch's result to the residual stream, as far as its example's gate is open.

        out = residual + gate * branch

    Args:
        residual: [batch_size, num_tokens, hidden_size], floating; branch and gate have its dtype.
        branch: [batch_size, num_tokens, hidden_size].
        gate: [batch_size, hidden_size].

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as residual; computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises: as `layer_norm_modulate`.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3.2, "adaLN-Zero".
    """
    validation.gated_residual(residual, branch, gate)
    out_BSD = at_least_float32(residual) + at_least_float32(gate)[:, None] * at_least_float32(branch)
    return out_BSD.to(residual.dtype)


def gated_residual_layer_norm_modulate(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """End one branch of a block and begin the next: `gated_residual`, and `layer_norm_modulate` of its result.

    The norm sees the sum before it is rounded.

    Args: as of `gated_residual` and `layer_norm_modulate`.

    Returns:
        hidden_states, modulated: [batch_size, num_tokens, hidden_size] each, dtype as residual; each is computed in
        float32 (float64 for float64 inputs) and rounded once.

    Raises: as `layer_norm_modulate`.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), figure 3, the middle of the block.
    """
    validation.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)
    hidden_BSD = gated_residual(at_least_float32(residual), at_least_float32(branch), at_least_float32(gate))
    modulated_BSD = layer_norm_modulate(hidden_BSD, at_least_float32(shift), at_least_float32(scale), eps=eps)
    return hidden_BSD.to(residual.dtype), modulated_BSD.to(residual.dtype)


def layer_norm(hidden_states: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize the last axis to mean 0 and variance 1; [..., hidden_size], dtype as hidden_states."""
    # two passes: E[x**2] - E[x]**2 loses (mean / deviation)**2 of the digits
    centred = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the last axis by a matrix [out_features, in_features] and add a bias [out_features], if there is one."""
    # contiguous: in bfloat16 on a CPU torch's product goes astray where rows of the weight lie 2^31 elements apart (2.13)
    out = inputs @ weight.contiguous().mT
    return out if bias is None else out + bias


def self_attention(
    hidden_states: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *,
    num_heads: int,
) -> torch.Tensor:
    """Let each token attend to all tokens of its example, with several heads.

        q, k, v = thirds of qkv_weight @ x + qkv_bias, each cut into num_heads heads
        out = proj_weight @ concat over heads of softmax(q k^T / sqrt(features of a head)) v + proj_bias

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], floating; the weights and biases have its dtype.
        qkv_weight: [3 * hidden_size, hidden_size], rows of the queries, then keys, then values.
        qkv_bias: [3 * hidden_size].
        proj_weight: [hidden_size, hidden_size].
        proj_bias: [hidden_size].
        num_heads: Divides hidden_size.

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or num_heads is no integer.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2.
    """
    validation.self_attention(hidden_states, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
    qkv_BS3D = linear(at_least_float32(hidden_states), at_least_float32(qkv_weight), at_least_float32(qkv_bias))
    query_BASF, key_BASF, value_BASF = (split_heads(each, num_heads) for each in qkv_BS3D.chunk(3, dim=-1))
    attended_BSD = join_heads(attention(query_BASF, key_BASF, value_BASF))
    out_BSD = linear(attended_BSD, at_least_float32(proj_weight), at_least_float32(proj_bias))
    return out_BSD.to(hidden_states.dtype)


def gelu_mlp(
    hidden_states: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    """Apply a feed-forward network of one hidden layer, whose GELU is the tanh approximation.

        out = fc2_weight @ gelu(fc1_weight @ x + fc1_bias) + fc2_bias

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], floating; the weights and biases have its dtype.
        fc1_weight: [intermediate_size, hidden_size].
        fc1_bias: [intermediate_size].
        fc2_weight: [hidden_size, intermediate_size].
        fc2_bias: [hidden_size].

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2; facebookresearch/DiT models.py, class DiTBlock.
    """
    validation.gelu_mlp(hidden_states, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    inner_BSI = linear(at_least_float32(hidden_states), at_least_float32(fc1_weight), at_least_float32(fc1_bias))
    out_BSD = linear(gelu(inner_BSI), at_least_float32(fc2_weight), at_least_float32(fc2_bias))
    return out_BSD.to(hidden_states.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), dtype as x."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def timestep_embedding(timesteps: torch.Tensor, *, embedding_size: int, frequency_shift: int) -> torch.Tensor:
    """Embed times as cosines and sines of geometrically spaced frequencies, cosines first.

        out[b] = cos(timesteps[b] * frequency_0), ..., sin(timesteps[b] * frequency_0), ...
        frequency_i = 10000 ** (-i / (n - frequency_shift)),  i = 0 .. n - 1,  n = embedding_size / 2

    Args:
        timesteps: [batch_size], float32 or float64, usually in [0, 1000). Of lower precision, 998 and 999 are the same.
        embedding_size: Even, at least 4.
        frequency_shift: 0 (the paper's code) or 1 (diffusers' DiT).

    Returns:
        [batch_size, embedding_size], dtype as timesteps.

    Raises:
        TypeError: timesteps is not an array of the dtype above, or an option is no integer.
        ValueError: timesteps is not of rank 1, or an option is out of its range.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5; Ho et al. 2020 (arXiv:2006.11239), appendix B;
    facebookresearch/DiT models.py, class TimestepEmbedder.
    """
    validation.timestep_embedding(timesteps, embedding_size, frequency_shift)
    half = embedding_size // 2
    index_F = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    frequency_F = torch.exp(-math.log(LONGEST_PERIOD) * index_F / (half - frequency_shift))
    angle_BF = timesteps[:, None] * frequency_F
    return torch.cat([torch.cos(angle_BF), torch.sin(angle_BF)], dim=-1)


def sincos_position_embedding(grid_size: int, *, like: torch.Tensor, spacing: float = 1.0) -> torch.Tensor:
    """Return the fixed table that tells each patch of a square grid its place.

        table[row * grid_size + column] = sincos(column), sincos(row)
        sincos(p) = sin(p * spacing * frequency_0), ..., cos(p * spacing * frequency_0), ...
        frequency_i = 10000 ** (-i / n),  i = 0 .. n - 1,  n = hidden_size / 4

    Args:
        grid_size: Rows and columns of patches.
        like: [..., hidden_size], an array of the dtype and on the device that the table shall have.
        spacing: How far apart neighbours are; 1 in the paper.

    Returns:
        [grid_size**2, hidden_size]; computed in float64, rounded once.

    Raises:
        TypeError: grid_size is no integer, or like is not a floating array.
        ValueError: grid_size is not positive, or hidden_size is no multiple of 4.

    Source: facebookresearch/DiT models.py, get_2d_sincos_pos_embed; the two-dimensional form of Vaswani et al. 2017
    (arXiv:1706.03762), section 3.5. The column comes first.
    """
    validation.sincos_position_embedding(grid_size, like)
    quarter = like.shape[-1] // 4
    index_F = torch.arange(quarter, dtype=torch.float64, device=like.device)
    place_Y = spacing * torch.arange(grid_size, dtype=torch.float64, device=like.device)
    angle_YF = place_Y[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * index_F / quarter)
    sincos_YF = torch.cat([torch.sin(angle_YF), torch.cos(angle_YF)], dim=-1).to(like.dtype)
    column_SF, row_SF = sincos_YF.repeat(grid_size, 1), sincos_YF.repeat_interleave(grid_size, dim=0)
    return torch.cat([column_SF, row_SF], dim=-1)


def patchify(images: torch.Tensor, *, patch_size: int) -> torch.Tensor:
    """Cut images into square patches, row by row; inside a patch: channel, row, column, as in a convolution's kernel.

    Args:
        images: [batch_size, channels, height, width], floating.
        patch_size: Divides height and width.

    Returns:
        [batch_size, num_patches, channels * patch_size**2], dtype of images.

    Raises:
        TypeError: images is not a floating array, or patch_size is no integer.
        ValueError: images is not of rank 4, or patch_size does not divide its height and width.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3.2, "Patchify".
    """
    validation.patchify(images, patch_size)
    batch_size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    tiles_BCYPXP = images.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    tiles_BYXCPP = tiles_BCYPXP.permute(0, 2, 4, 1, 3, 5)
    return tiles_BYXCPP.reshape(batch_size, rows * columns, channels * patch_size**2)


def unpatchify(patches: torch.Tensor, *, patch_size: int, num_rows: int | None = None) -> torch.Tensor:
    """Put a grid of patches together; inside a patch: row, column, channel, as DiT's final layer has them.

    Not the inverse of `patchify`, whose patches have the channel first.

    Args:
        patches: [batch_size, num_patches, patch_size**2 * channels], floating.
        patch_size: Height and width of a patch.
        num_rows: Rows of patches, which divide num_patches; by default as many as columns.

    Returns:
        [batch_size, channels, height, width], dtype of patches.

    Raises:
        TypeError: patches is not a floating array, or an option is no integer.
        ValueError: patches is not of rank 3, num_patches is no square or num_rows does not divide it, or patch_size**2 does
            not divide the last size.

    Source: facebookresearch/DiT models.py, DiT.unpatchify.
    """
    validation.unpatchify(patches, patch_size, num_rows)
    rows = math.isqrt(patches.shape[1]) if num_rows is None else num_rows
    columns = rows if num_rows is None else patches.shape[1] // num_rows
    channels = patches.shape[2] // patch_size**2
    tiles_BYXPPC = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, channels)
    tiles_BCYPXP = tiles_BYXPPC.permute(0, 5, 1, 3, 2, 4)
    return tiles_BCYPXP.reshape(patches.shape[0], channels, rows * patch_size, columns * patch_size)
