"""How masked and block diffusion language models are decoded; the defaults are those of the public loops."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from gaugeblock.reference.configs.options import DreamAlgorithm, PlaceStrategy, Remasking


@dataclass(frozen=True, kw_only=True)
class LLaDADecodingConfig:
    """LLaDA's decoding: blocks from left to right, in each the most confident tokens first.

    Attributes:
        mask_id: The token that stands where nothing is decided; it is never chosen.
        new_tokens: How many are made; a multiple of block_length.
        block_length: How many are open at a time.
        steps: Of all blocks together; a multiple of their number.
        temperature: Of the draw; 0 takes the most probable token.
        cfg_scale: Of guidance by the logits without the prompt; 0 for none.
        remasking: Whether the most confident tokens are kept, or random ones.
        forbidden_ids: Tokens that are never chosen.
        late_ids: Tokens that are kept only where no other is left, such as the end of the text.

    Raises:
        ValueError: A value is out of its range.

    Source: Nie et al. (arXiv:2502.09992), appendix A.3; ML-GSAI/LLaDA, generate.py.
    """

    mask_id: int = 126336
    new_tokens: int = 128
    block_length: int = 128
    steps: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    forbidden_ids: tuple[int, ...] = ()
    late_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_integers(self, 0, "mask_id")
        _require_integers(self, 1, "new_tokens", "block_length", "steps")
        _require_from_0(self, "temperature", "cfg_scale")
        _require_name("remasking", self.remasking, Remasking)
        if self.new_tokens % self.block_length:
            raise ValueError(f"new_tokens must be a multiple of block_length={self.block_length}, got {self.new_tokens}")
        if self.steps % self.num_blocks:
            raise ValueError(f"steps must be a multiple of the number of blocks, {self.num_blocks}, got {self.steps}")

    @property
    def num_blocks(self) -> int:
        """How many blocks the new tokens make."""
        return self.new_tokens // self.block_length


@dataclass(frozen=True, kw_only=True)
class SDARDecodingConfig:
    """SDAR's decoding: blocks from left to right, finished ones in a cache.

    Attributes:
        mask_id: The token that stands where nothing is decided; it is never chosen.
        new_tokens: How many are made at most.
        block_length: As the model was trained; blocks are counted from the prompt's start.
        steps: By how many passes a block is filled at most; "entropy_bounded" may need one for each token.
        temperature: Of the draw; 0 takes the most probable token.
        top_k: How many of the most probable tokens are drawn from; 0 for all.
        top_p: How much of the probability is drawn from.
        strategy: Which tokens of a pass are kept.
        threshold: Of "dynamic": the probability from which on a token is kept.
        entropy_bound: Of "entropy_bounded": what the entropies of the kept places may add up to.
        forbidden_ids: Tokens that are never chosen.
        stop_ids: Tokens after whose block decoding ends.

    Raises:
        ValueError: A value is out of its range.

    Source: Cheng et al. (arXiv:2510.06303), section 3; JetLM/SDAR, generate.py.
    """

    mask_id: int = 151669
    new_tokens: int = 128
    block_length: int = 8
    steps: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    strategy: PlaceStrategy = "dynamic"
    threshold: float = 0.85
    entropy_bound: float = 0.35
    forbidden_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_integers(self, 0, "mask_id", "top_k")
        _require_integers(self, 1, "new_tokens", "block_length", "steps")
        _require_from_0(self, "temperature", "threshold", "entropy_bound")
        _require_share("top_p", self.top_p)
        _require_name("strategy", self.strategy, PlaceStrategy)

    @property
    def bound(self) -> float:
        """What the strategy compares with."""
        return self.entropy_bound if self.strategy == "entropy_bounded" else self.threshold

    @property
    def passes(self) -> int:
        """The most passes that fill a block."""
        return max(self.steps, self.block_length)


@dataclass(frozen=True, kw_only=True)
class DreamDecodingConfig:
    """Dream's decoding: times from 1 to eps, and by each the share of the masks that is left.

    Attributes:
        mask_id: The token that stands where nothing is decided; it is never chosen.
        new_tokens: How many are made.
        steps: How many times are visited.
        eps: The last time, above 0.
        algorithm: Which tokens of a step are kept: random ones, or those of the highest probability, the largest margin before
            the second or the least entropy.
        alg_temp: Of a draw of the kept places by their confidence; 0 keeps the most confident.
        temperature: Of the draw of tokens; 0 takes the most probable one.
        top_k: How many of the most probable tokens are drawn from; 0 for all.
        top_p: How much of the probability is drawn from.
        forbidden_ids: Tokens that are never chosen.

    Raises:
        ValueError: A value is out of its range.

    Source: Ye et al. (arXiv:2508.15487); the public model's generation_utils.py.
    """

    mask_id: int = 151666
    new_tokens: int = 128
    steps: int = 512
    eps: float = 1e-3
    algorithm: DreamAlgorithm = "origin"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_integers(self, 0, "mask_id", "top_k")
        _require_integers(self, 1, "new_tokens", "steps")
        _require_from_0(self, "temperature", "alg_temp")
        _require_share("top_p", self.top_p)
        _require_share("eps", self.eps)
        _require_name("algorithm", self.algorithm, DreamAlgorithm)

    @property
    def rates(self) -> tuple[float, ...]:
        """The share of the masks that each step decides: 1 - s / t from time t to the next one, s, and at last all."""
        times = [1 + (self.eps - 1) * n / self.steps for n in range(self.steps + 1)]
        return (*(1 - s / t for t, s in pairwise(times[:-1])), 1.0)


def _require_integers(config: Any, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def _require_from_0(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _require_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


def _require_name(name: str, value: Any, names: Any) -> None:
    if value not in get_args(names):
        raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(names)))}, got {value!r}")
