"""Which rank holds what: layouts of a model over ranks, for any framework."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

Kind = Literal["base_model_only", "pure_ep", "ep_per_dp_shard", "global_ep", "ep_times_tp"]
Array = TypeVar("Array", bound=Any)


class Coordinates(NamedTuple):
    """Where a rank stands."""

    dp_rank: int
    """Which part of the batch it has."""
    tp_rank: int
    """Which slice of the dense layers."""
    ep_rank: int
    """Which of the experts."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How many ways a model is split, and over which ranks.

    Its dense layers lie over `dp_size` groups of `tp_size` ranks, which count through a group first: rank = dp_rank * tp_size +
    tp_rank; ranks of a group have the same tokens. Its experts lie over groups of `ep_size` of the same ranks, each of them
    whole, or over groups of ep_size * expert_tp_size, each in slices:

    kind               where                                      ranks       an expert-parallel group
    base_model_only    ep_size == 1                               tp * dp     one rank, but experts are dealt to tensor-
                                                                              parallel ranks if they are whole
    pure_ep            tp_size == dp_size == 1                    ep          all ranks, which have the same tokens
    ep_per_dp_shard    ep_size == tp_size                         tp * dp     a tensor-parallel group
    global_ep          ep_size == tp_size * dp_size               tp * dp     all ranks
    ep_times_tp        expert_tp_size == tp_size > 1              tp * dp     ep ranks of one tp_rank and successive dp_rank

    Raises:
        ValueError: A size is no positive integer, or they fit to none of these.

    Source: the first four are those of Diffulex (diffulex/distributed/parallel_state.py), the last one that of Megatron-LM's
    expert-tensor-parallel groups.
    """

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    expert_tp_size: int = 1

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tp_size", "dp_size", "ep_size", "expert_tp_size")}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if self.expert_tp_size not in (1, self.tp_size):
            raise ValueError(f"expert_tp_size must be 1 or tp_size, got {told}")
        if self.expert_tp_size > 1 and self.dp_size % self.ep_size:
            raise ValueError(f"ep_size must divide dp_size where experts are in slices, got {told}")
        is_known = self.ep_size in (1, self.tp_size, self.tp_size * self.dp_size) or self.tp_size == self.dp_size == 1
        if self.expert_tp_size == 1 and not is_known:
            raise ValueError(f"ep_size must be 1, tp_size or tp_size * dp_size, got {told}")

    @property
    def kind(self) -> Kind:
        """Which row of the table it is."""
        if self.ep_size == 1:
            return "base_model_only"
        if self.expert_tp_size > 1:
            return "ep_times_tp"
        if self.tp_size == self.dp_size == 1:
            return "pure_ep"
        return "ep_per_dp_shard" if self.ep_size == self.tp_size else "global_ep"

    @property
    def world_size(self) -> int:
        """How many ranks it takes."""
        return self.ep_size if self.kind == "pure_ep" else self.tp_size * self.dp_size

    @property
    def axes(self) -> dict[str, int]:
        """The ranks as a grid, from the slowest axis to the fastest, as `jax.make_mesh` takes it."""
        if self.kind == "pure_ep":
            return {"ep": self.ep_size}
        if self.kind == "ep_times_tp":
            return {"dp": self.dp_size // self.ep_size, "ep": self.ep_size, "tp": self.tp_size}
        return {"dp": self.dp_size, "tp": self.tp_size}

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Over which of these axes experts are dealt."""
        of_base: tuple[str, ...] = ("tp",) if self.expert_tp_size == 1 else ()
        of_kind: dict[Kind, tuple[str, ...]] = {
            "base_model_only": of_base,
            "ep_per_dp_shard": ("tp",),
            "global_ep": ("dp", "tp"),
        }
        return of_kind.get(self.kind, ("ep",))

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands.

        Raises:
            ValueError: There is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {rank}")
        dp_rank, tp_rank = (0, 0) if self.kind == "pure_ep" else divmod(rank, self.tp_size)
        ep_ranks: dict[Kind, int] = {"base_model_only": 0, "ep_per_dp_shard": tp_rank, "ep_times_tp": dp_rank % self.ep_size}
        return Coordinates(dp_rank, tp_rank, ep_ranks.get(self.kind, rank))

    def groups(self, way: Literal["tp", "dp", "ep"]) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that share work in one way; every rank is in one of them.

        `"tp"` have the same tokens (of pure_ep, all ranks), `"dp"` the same slice of the dense layers, `"ep"` all experts among
        them.
        """
        found: dict[int, list[int]] = {}
        for rank in range(self.world_size):
            dp_rank, tp_rank, ep_rank = self.coordinates(rank)
            if way == "ep":
                group = rank - ep_rank * self.expert_tp_size  # its first rank
            elif self.kind == "pure_ep":
                group = 0 if way == "tp" else rank
            else:
                group = dp_rank if way == "tp" else tp_rank
            found.setdefault(group, []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())

    def experts_of(self, rank: int, num_experts: int) -> slice:
        """The experts that a rank holds, whole or a slice of each.

        Raises:
            ValueError: They cannot be dealt evenly.
        """
        coordinates = self.coordinates(rank)
        if self.kind == "base_model_only" and self.expert_tp_size == 1:
            return _part(num_experts, "num_experts", coordinates.tp_rank, self.tp_size, "tp_size")
        return _part(num_experts, "num_experts", coordinates.ep_rank, self.ep_size, "ep_size")

    def features_of(self, rank: int, intermediate_size: int) -> slice:
        """The intermediate features of its experts that a rank holds.

        Raises:
            ValueError: They cannot be split evenly.
        """
        tp_rank = self.coordinates(rank).tp_rank if self.expert_tp_size > 1 else 0
        return _part(intermediate_size, "intermediate_size", tp_rank, self.expert_tp_size, "expert_tp_size")


def _part(size: int, name: str, number: int, parts: int, of: str) -> slice:
    if size % parts:
        raise ValueError(f"{name} must be a multiple of {of} ({parts}), got {size}")
    each = size // parts
    return slice(number * each, (number + 1) * each)


def slice_of_gate_and_up(w13: Array, features: slice, *, interleaved: bool = False) -> Array:
    """Take the gate and up rows of some intermediate features.

    Args:
        w13: [num_experts, 2 * intermediate_size, ...], of any framework: gate rows, then up rows; or biases of them.
        features: Which.
        interleaved: Whether gate and up rows take turns.

    Raises:
        ValueError: There are not as many gate rows as up rows.
    """
    num_experts, rows, *width = w13.shape
    if rows % 2:
        raise ValueError(f"w13 must hold as many gate rows as up rows, got {rows} rows")
    if interleaved:
        return w13.reshape(num_experts, rows // 2, 2, *width)[:, features].reshape(num_experts, -1, *width)
    return w13.reshape(num_experts, 2, rows // 2, *width)[:, :, features].reshape(num_experts, -1, *width)
