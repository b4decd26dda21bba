"""Rotary embeddings, simulated: a block of tokens of a head is in registers, normalized, turned and stored."""

import torch

from gaugeblock.reference import validation


class Rotate:
    """`rotary.rotate`."""

    contract = "rotary.rotate"

    block_tokens = 16

    def __call__(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: str) -> torch.Tensor:
        self.validate(heads, cos, sin, pairs)
        return self.store(self.turn_blocks(heads.float(), cos, sin, pairs), heads)

    def validate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> None:
        """Raises what the contract demands."""
        validation.rotate(heads, cos, sin, pairs)

    def turn_blocks(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
        """Block by block of tokens; heads are `[B, A, S, F]` float32."""
        blocks = zip(*(each.split(self.block_tokens, -2) for each in (heads, cos, sin)), strict=True)
        return torch.cat([self.turn(each, cosines, sines, pairs) for each, cosines, sines in blocks], -2)

    def turn(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
        """One block."""
        return self.join(*self.rotated(*self.split(heads, pairs), cos, sin), pairs)

    def split(self, heads: torch.Tensor, pairs: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second features of the pairs."""
        first, second = heads.unflatten(-1, (-1, 2)).unbind(-1) if pairs == "interleaved" else heads.chunk(2, -1)
        return first, second

    def rotated(
        self, x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, turned."""
        return x * cos - y * sin, y * cos + x * sin

    def join(self, x: torch.Tensor, y: torch.Tensor, pairs: str) -> torch.Tensor:
        """Heads of first and second features."""
        return torch.stack([x, y], -1).flatten(-2) if pairs == "interleaved" else torch.cat([x, y], -1)

    def store(self, result: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """What is returned, in the dtype of the heads."""
        return result.to(heads.dtype)


class QkNormRotary(Rotate):
    """`rotary.qk_norm_rotary`."""

    contract = "rotary.qk_norm_rotary"

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        eps: float,
        pairs: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps, pairs)
        queries = self.of_heads(query, query_weight, cos, sin, eps, pairs)
        return queries, self.of_heads(key, key_weight, cos, sin, eps, pairs)

    def of_heads(
        self, heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, pairs: str
    ) -> torch.Tensor:
        """Of queries, or of keys."""
        normalized = self.kept(self.scale(self.normalize(heads.float(), eps), weight.float()), heads)
        return self.store(self.turn_blocks(normalized, cos, sin, pairs), heads)

    def normalize(self, heads: torch.Tensor, eps: float) -> torch.Tensor:
        """Heads of a root mean square of 1."""
        return heads * self.rstd(self.mean_square(heads), eps)

    def mean_square(self, heads: torch.Tensor) -> torch.Tensor:
        """Of each head, `[B, A, S, 1]`."""
        return (heads.double() * heads.double()).mean(-1, keepdim=True).float()

    def rstd(self, mean_square: torch.Tensor, eps: float) -> torch.Tensor:
        """One over the root."""
        return (mean_square.double() + eps).rsqrt().float()

    def scale(self, normalized: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Times the weight `[F]`."""
        return normalized * weight

    def kept(self, normalized: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """What the rotation reads of the norm."""
        return normalized
