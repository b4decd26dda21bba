"""Rotary position embedding, alone or after an RMSNorm of each head of queries and keys: one kernel for either and direction.

    x', y' = (x, y) * rstd * weight,  rstd = 1 / sqrt(mean(head**2) + eps)
    out = x' cos - y' sin, y' cos + x' sin

All kernels are bound by memory. Forward reads queries and keys and writes the results, each once; a head is whole in registers.
Backward reads queries, keys and the gradients and writes the gradients, each once: rstd is computed again from what has to be
read anyway. Cosines and sines weigh as much as two heads of float32, so that a program turns up to eight heads of its tokens by
them. Gradients of the weights are sums over all heads: a grid that does not depend on their number has a sum for each program
in registers, and a second kernel adds these up in their order, without atomics. So every run gives the same bits, and no
example's bits depend on its batch. The gradient of a rotation is the rotation back: the same kernel.

Heads are addressed by their strides: queries and keys may be slices of one product. What is written lies in memory in the order
of what was read, so that heads which lie side by side in a token still do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.launch import device_of, multiprocessors_of, reject_float64, require_triton_device
from gaugeblock.optimized.triton.partial_sums import sum_chunks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import RotaryPairs

# Pairs of features of a program's block, for 4 warps: a thread has 8 of x and 8 of y, each a load of 16 bytes in bfloat16.
TILE = 1024
# Heads that a program turns by the same angles: these are then an eighth of what it reads of float32.
BLOCK_HEADS = 8
# Of backward, which is persistent: so many have registers at the same time.
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _place(item, num_heads, num_tokens, BLOCK_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Return the example of an item, its first head, and its tokens, [BLOCK_TOKENS, 1], all int64. Heads come first."""
    head_blocks, token_blocks = tl.cdiv(num_heads, BLOCK_HEADS), tl.cdiv(num_tokens, BLOCK_TOKENS)
    chunk = item // head_blocks  # of 32 bits: a GPU has no division of 64
    example = chunk // token_blocks
    first_head = (item - chunk * head_blocks).to(tl.int64) * BLOCK_HEADS
    first_token = (chunk - example * token_blocks).to(tl.int64) * BLOCK_TOKENS
    return example.to(tl.int64), first_head, first_token + tl.arange(0, BLOCK_TOKENS)[:, None]


@triton.jit
def _pairs(head_size, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the places of x and of y in a head, [1, BLOCK_PAIRS] int64, and which pairs there are."""
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :].to(tl.int64)
    exists = pairs < head_size // 2
    if INTERLEAVED:
        first = 2 * pairs
        second = first + 1
    else:
        first = pairs
        second = pairs + head_size // 2
    return first, second, exists


@triton.jit
def _load(pointers, mask):
    """Return float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_head(
    pointers, stride, head_size, token_exists, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Return x and y of a head of the tokens at these pointers, [BLOCK_TOKENS, BLOCK_PAIRS] float32, 0 where masked."""
    if INTERLEAVED:  # side by side in one load
        features = tl.arange(0, 2 * BLOCK_PAIRS)[None, :].to(tl.int64)
        both = _load(pointers + features * stride, token_exists & (features < head_size))
        x, y = tl.split(tl.reshape(both, [BLOCK_TOKENS, BLOCK_PAIRS, 2]))
    else:
        first, second, exists = _pairs(head_size, BLOCK_PAIRS, INTERLEAVED)
        x = _load(pointers + first * stride, token_exists & exists)
        y = _load(pointers + second * stride, token_exists & exists)
    return x, y


@triton.jit
def _store_head(
    pointers, stride, x, y, head_size, token_exists,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        features = tl.arange(0, 2 * BLOCK_PAIRS)[None, :].to(tl.int64)
        both = tl.reshape(tl.join(x, y), [BLOCK_TOKENS, 2 * BLOCK_PAIRS])
        tl.store(pointers + features * stride, both, mask=token_exists & (features < head_size))
    else:
        first, second, exists = _pairs(head_size, BLOCK_PAIRS, INTERLEAVED)
        tl.store(pointers + first * stride, x, mask=token_exists & exists)
        tl.store(pointers + second * stride, y, mask=token_exists & exists)


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, cos_token_stride, cos_stride, sin_token_stride, sin_stride,
    tokens, token_exists, head_size, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    pairs, _, exists = _pairs(head_size, BLOCK_PAIRS, False)
    cos = _load(cos_ptr + tokens * cos_token_stride + pairs * cos_stride, token_exists & exists)
    sin = _load(sin_ptr + tokens * sin_token_stride + pairs * sin_stride, token_exists & exists)
    return cos, sin


@triton.jit
def _load_weight(weight_ptr, stride, head_size, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the weights of x and of y, [1, BLOCK_PAIRS]."""
    first, second, exists = _pairs(head_size, BLOCK_PAIRS, INTERLEAVED)
    return _load(weight_ptr + first * stride, exists), _load(weight_ptr + second * stride, exists)


@triton.jit
def _rstd(x, y, head_size, eps):
    return tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1))[:, None] / head_size + eps)


@triton.jit
def _turn_kernel(
    heads_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, num_heads, num_tokens, head_size, eps,
    example_stride, head_stride, token_stride, stride, weight_stride,
    out_example_stride, out_head_stride, out_token_stride, out_stride,
    cos_token_stride, cos_stride, sin_token_stride, sin_stride,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Turn heads, normalized if there is a weight."""
    example, first_head, tokens = _place(tl.program_id(0), num_heads, num_tokens, BLOCK_HEADS, BLOCK_TOKENS)
    token_exists = tokens < num_tokens
    cos, sin = _load_angles(
        cos_ptr, sin_ptr, cos_token_stride, cos_stride, sin_token_stride, sin_stride, tokens, token_exists, head_size, BLOCK_PAIRS
    )
    if BACK:
        sin = -sin
    if weight_ptr is not None:
        x_weight, y_weight = _load_weight(weight_ptr, weight_stride, head_size, BLOCK_PAIRS, INTERLEAVED)
    heads_ptr += example * example_stride + first_head * head_stride + tokens * token_stride
    out_ptr += example * out_example_stride + first_head * out_head_stride + tokens * out_token_stride
    for _ in range(tl.minimum(BLOCK_HEADS, num_heads - first_head)):
        x, y = _load_head(heads_ptr, stride, head_size, token_exists, BLOCK_TOKENS, BLOCK_PAIRS, INTERLEAVED)
        if weight_ptr is not None:
            rstd = _rstd(x, y, head_size, eps)
            x = x * rstd * x_weight
            y = y * rstd * y_weight
        _store_head(
            out_ptr, out_stride, x * cos - y * sin, y * cos + x * sin, head_size, token_exists,
            BLOCK_TOKENS, BLOCK_PAIRS, INTERLEAVED,
        )  # fmt: skip
        heads_ptr += head_stride
        out_ptr += out_head_stride


@triton.jit
def _norm_backward_kernel(
    heads_ptr, weight_ptr, gradient_ptr, heads_gradient_ptr, sums_ptr, cos_ptr, sin_ptr,
    num_items, num_heads, num_tokens, head_size, eps,
    example_stride, head_stride, token_stride, stride, weight_stride,
    gradient_example_stride, gradient_head_stride, gradient_token_stride, gradient_stride,
    out_example_stride, out_head_stride, out_token_stride, out_stride,
    cos_token_stride, cos_stride, sin_token_stride, sin_stride,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Write this program's share of the gradients of heads, and its sum of the weight's.

    With n = heads * rstd and h the gradient turned back: dweight = sum of h * n, dn = h * weight,
    dheads = rstd * (dn - n * mean(dn * n)).
    """
    x_weight, y_weight = _load_weight(weight_ptr, weight_stride, head_size, BLOCK_PAIRS, INTERLEAVED)
    x_sums = tl.full([BLOCK_TOKENS, BLOCK_PAIRS], 0.0, tl.float32)
    y_sums = tl.full([BLOCK_TOKENS, BLOCK_PAIRS], 0.0, tl.float32)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        example, first_head, tokens = _place(item, num_heads, num_tokens, BLOCK_HEADS, BLOCK_TOKENS)
        token_exists = tokens < num_tokens
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, cos_token_stride, cos_stride, sin_token_stride, sin_stride,
            tokens, token_exists, head_size, BLOCK_PAIRS,
        )  # fmt: skip
        ptrs = heads_ptr + example * example_stride + first_head * head_stride + tokens * token_stride
        gradient_ptrs = gradient_ptr + example * gradient_example_stride
        gradient_ptrs += first_head * gradient_head_stride + tokens * gradient_token_stride
        if heads_gradient_ptr is not None:
            out_ptrs = heads_gradient_ptr + example * out_example_stride
            out_ptrs += first_head * out_head_stride + tokens * out_token_stride
        for _ in range(tl.minimum(BLOCK_HEADS, num_heads - first_head)):
            x, y = _load_head(ptrs, stride, head_size, token_exists, BLOCK_TOKENS, BLOCK_PAIRS, INTERLEAVED)
            x_out, y_out = _load_head(
                gradient_ptrs, gradient_stride, head_size, token_exists, BLOCK_TOKENS, BLOCK_PAIRS, INTERLEAVED
            )
            ptrs += head_stride
            gradient_ptrs += gradient_head_stride
            rstd = _rstd(x, y, head_size, eps)
            x *= rstd
            y *= rstd
            x_gradient = x_out * cos + y_out * sin
            y_gradient = y_out * cos - x_out * sin
            if sums_ptr is not None:
                x_sums += x_gradient * x
                y_sums += y_gradient * y
            if heads_gradient_ptr is not None:
                x_gradient *= x_weight
                y_gradient *= y_weight
                projection = (tl.sum(x_gradient * x, axis=1) + tl.sum(y_gradient * y, axis=1))[:, None] / head_size
                _store_head(
                    out_ptrs, out_stride, rstd * (x_gradient - x * projection), rstd * (y_gradient - y * projection),
                    head_size, token_exists, BLOCK_TOKENS, BLOCK_PAIRS, INTERLEAVED,
                )  # fmt: skip
                out_ptrs += out_head_stride
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * head_size
        first, second, exists = _pairs(head_size, BLOCK_PAIRS, INTERLEAVED)
        tl.store(sums_ptr + first, tl.sum(x_sums, axis=0)[None, :], mask=exists)
        tl.store(sums_ptr + second, tl.sum(y_sums, axis=0)[None, :], mask=exists)


def _blocks(heads: torch.Tensor, pairs: RotaryPairs) -> tuple[int, dict[str, Any]]:
    """Return how many blocks of an example's tokens and heads there are, and the constants of the kernels."""
    batch_size, num_heads, num_tokens, head_size = heads.shape
    block_pairs = triton.next_power_of_2(max(1, head_size // 2))
    block_tokens = max(1, TILE // block_pairs)
    items = batch_size * triton.cdiv(num_tokens, block_tokens) * triton.cdiv(num_heads, BLOCK_HEADS)
    blocks = {"BLOCK_HEADS": BLOCK_HEADS, "BLOCK_TOKENS": block_tokens, "BLOCK_PAIRS": block_pairs}
    return items, {"INTERLEAVED": pairs == "interleaved", **blocks}


def _turn(
    heads: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    pairs: RotaryPairs,
    *,
    back: bool = False,
) -> torch.Tensor:
    out = torch.empty_like(heads)
    items, constants = _blocks(heads, pairs)
    _turn_kernel[(items,)](
        heads, weight, out, cos, sin, *heads.shape[1:], eps,
        *heads.stride(), weight.stride(0) if weight is not None else 0, *out.stride(), *cos.stride(), *sin.stride(),
        BACK=back, **constants,
    )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: RotaryPairs) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turn(heads, None, cos, sin, 0.0, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, None, cos, sin, 0.0, ctx.pairs, back=True), None, None, None


class _QkNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        pairs: RotaryPairs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(query, key, query_weight, key_weight, cos, sin)
        ctx.options = eps, pairs
        ctx.set_materialize_grads(False)  # a result that nobody used is not worth reading zeros
        return _turn(query, query_weight, cos, sin, eps, pairs), _turn(key, key_weight, cos, sin, eps, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out_gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        query, key, *weights, cos, sin = ctx.saved_tensors
        eps, pairs = ctx.options
        given = [gradient is not None for gradient in out_gradients]
        of_heads = [
            torch.empty_like(heads) if used and needed else None
            for heads, used, needed in zip((query, key), given, ctx.needs_input_grad[:2], strict=True)
        ]
        wanted = [used and needed for used, needed in zip(given, ctx.needs_input_grad[2:4], strict=True)]
        blocks = [_blocks(heads, pairs) for heads in (query, key)]
        programs = min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors_of(query), max(items for items, _ in blocks))
        sums = query.new_empty(sum(wanted), programs, query.shape[3], dtype=torch.float32)
        each = iter(sums)
        sums_of = [next(each) if needed else None for needed in wanted]
        for heads, weight, gradient, of_head, of_weight, (items, constants) in zip(
            (query, key), weights, out_gradients, of_heads, sums_of, blocks, strict=True
        ):
            if of_head is not None or of_weight is not None:
                _norm_backward_kernel[(programs,)](
                    heads, weight, gradient, of_head, of_weight, cos, sin, items, *heads.shape[1:], eps,
                    *heads.stride(), weight.stride(0), *gradient.stride(), *(heads if of_head is None else of_head).stride(),
                    *cos.stride(), *sin.stride(), **constants,
                )  # fmt: skip
        each = iter(sum_chunks(sums, query.dtype)) if any(wanted) else iter(())
        return *of_heads, *(next(each) if needed else None for needed in wanted), None, None, None, None


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: RotaryPairs) -> torch.Tensor:
    """Turn each pair of features of each head by the angle of its token, in one kernel.

        (x, y) becomes (x cos - y sin, y cos + x sin)

    Args:
        heads: [batch_size, num_heads, num_tokens, head_size], bfloat16, float16 or float32; any strides.
        cos: [num_tokens, head_size / 2], float32; any strides.
        sin: [num_tokens, head_size / 2], float32; any strides.
        pairs: "interleaved" or "half-split".

    Returns:
        [batch_size, num_heads, num_tokens, head_size], dtype as heads and in memory in the order of theirs; computed in float32
        and rounded once, as is the gradient. Differentiable once, by heads.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, head_size is odd, pairs is another name, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.rotary.rotate`.
    """
    validation.rotate(heads, cos, sin, pairs)
    _require_kernel("heads", heads, cos)
    with device_of(heads):
        return _Rotate.apply(heads, cos, sin, pairs)


def qk_norm_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    pairs: RotaryPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize each head of queries and keys, then turn it, in a kernel for each of both.

        (x, y) becomes (x' cos - y' sin, y' cos + x' sin),  x' = x / sqrt(mean over the head of x**2 + eps) * weight

    Args:
        query: [batch_size, num_heads, num_tokens, head_size], bfloat16, float16 or float32; any strides.
        key: [batch_size, num_key_heads, num_tokens, head_size]; same dtype, any strides.
        query_weight: [head_size]; same dtype, any stride.
        key_weight: [head_size]; same dtype, any stride.
        cos: [num_tokens, head_size / 2], float32; any strides.
        sin: [num_tokens, head_size / 2], float32; any strides.
        eps: Added to the mean square; positive.
        pairs: "interleaved" or "half-split".

    Returns:
        query, key: shapes and dtypes as given, in memory in the order of what was given; each is computed in float32 and rounded
        once, as is each gradient. Differentiable once, by all but cos and sin.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, head_size is odd, eps is not positive, pairs is another name, or
            Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.rotary.qk_norm_rotary`.
    """
    validation.qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps, pairs)
    _require_kernel("query", query, cos)
    with device_of(query):
        return _QkNormRotary.apply(query, key, query_weight, key_weight, cos, sin, eps, pairs)


def _require_kernel(name: str, heads: torch.Tensor, cos: torch.Tensor) -> None:
    reject_float64(name, heads)
    if cos.dtype != torch.float32:
        raise TypeError(f"cos must be float32, got {cos.dtype}")
    require_triton_device(name, heads)
