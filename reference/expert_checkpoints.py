"""Reading the experts that are a rank's from files of safetensors, and nothing else."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

from gaugeblock.reference.expert_layouts import ExpertLayout, ExpertWeights, Shard, read_experts
from gaugeblock.reference.validation.arrays import require_one_of

Framework = Literal["torch", "jax", "numpy"]
_NAMES = {"torch": "pt", "jax": "flax", "numpy": "numpy"}  # safetensors has others


def resolve_expert_weights(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    layout: ExpertLayout,
    *,
    prefix: str = "experts.",
    num_experts: int | None = None,
    ep_rank: int = 0,
    ep_size: int = 1,
    tp_rank: int = 0,
    tp_size: int = 1,
    framework: Framework = "torch",
) -> ExpertWeights:
    """Read one rank's share of a layer's experts.

    Rank ep_rank has experts ep_rank * E / ep_size and following, whole; of each of these, rank tp_rank has gates, ups and columns
    of w2 from tp_rank * I / tp_size on, so that the ranks' outputs are added up. b2 counts once: tp_rank 0 has it, the
    others have zeros.

    Args:
        files: A file, or the files that a checkpoint was split into, in any order.
        layout: What the files hold, as in `expert_layouts.to_w13`.
        prefix: With what the names of the layer's experts begin, as "model.layers.3.mlp.experts.".
        num_experts: How many there must be on all ranks; by default as many as there are.
        ep_rank, ep_size: The rank's place among those that share the experts.
        tp_rank, tp_size: Its place among those that share each expert.
        framework: Whose arrays are returned.

    Returns:
        w13 [E / ep_size, 2 * I / tp_size, H], w2 [E / ep_size, H, I / tp_size] and their biases, where the layout has some;
        contiguous, on the CPU (JAX: where it puts arrays).

    Raises:
        TypeError: A rank or size is not an integer.
        ValueError: As `expert_layouts.to_w13`; two files have a tensor of one name; a rank is out of range; ep_size does not
            divide E, or tp_size I.

    Source: the shares are those of vLLM's FusedMoE.
    """
    require_one_of("framework", framework, Framework)
    shard = Shard(ep_rank, ep_size, tp_rank, tp_size)
    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    with ExitStack() as opened:
        tensors: dict[str, _Unread] = {}
        for name, tensor in _unread_tensors(opened, paths, framework):
            if name in tensors and name.startswith(prefix):
                raise ValueError(f"files must have {name} once, got it twice in {', '.join(map(str, paths))}")
            tensors[name] = tensor
        return read_experts(tensors, layout, prefix, num_experts, shard).map(_own)


def _unread_tensors(opened: ExitStack, paths: list[Any], framework: Framework) -> Iterator[tuple[str, "_Unread"]]:
    from safetensors import safe_open  # only who reads files needs it

    for path in paths:
        file = opened.enter_context(safe_open(path, framework=_NAMES[framework]))
        for name in file.keys():  # noqa: SIM118 (a file is no dict)
            yield name, _Unread(file.get_slice(name))


class _Unread:
    """A tensor in a file: its shape and dtype are in the file's header, its elements are read where it is indexed."""

    def __init__(self, part: Any) -> None:
        self.part, self.shape, self.dtype = part, tuple(part.get_shape()), part.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        return self.part[index]


def _own(array: Any) -> Any:
    """A copy that does not keep the file mapped, as slices of torch do."""
    if hasattr(array, "contiguous"):
        return array.clone(memory_format=sys.modules["torch"].contiguous_format)
    return array.copy()
