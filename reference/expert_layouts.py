"""How public checkpoints hold the weights of experts, and how they become ours and theirs again.

Ours is what `experts.fused_swiglu` takes: w13 [E, 2I, H], w2 [E, H, I]. A layout is a name and never guessed: where 2I = H, or
H = I, two of them have the same shapes.

Shapes: E num_experts, I intermediate_size, H hidden_size; R rows of gate and up together, R = 2I.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from gaugeblock.reference.validation.arrays import dtype_name, require_between, require_one_of, require_shape

ExpertLayout = Literal["linear", "mixtral-linear", "stacked", "transposed", "interleaved", "w13", "w13-interleaved"]


@dataclass(frozen=True)
class ExpertWeights:
    """All experts of a layer, or a rank's share of them, as our operations take them.

    Attributes:
        w13: [num_experts, 2 * intermediate_size, hidden_size].
        w2: [num_experts, hidden_size, intermediate_size].
        b13: [num_experts, 2 * intermediate_size], or None.
        b2: [num_experts, hidden_size], or None.
        interleaved: Whether rows of w13 are gate, up, gate, up, … (`experts.fused_swiglu_oai`) and not all gates first
            (`experts.fused_swiglu`).
    """

    w13: Any
    w2: Any
    b13: Any = None
    b2: Any = None
    interleaved: bool = False

    def map(self, change: Callable[[Any], Any]) -> "ExpertWeights":
        """The same of each array."""
        return replace(self, **{name: change(getattr(self, name)) for name in OURS if getattr(self, name) is not None})


class Entry(NamedTuple):
    """A tensor of a checkpoint, or one per expert: which of ours it holds, and how."""

    name: str
    """After the prefix; `{expert}` stands for an expert's number, and then the tensor is one expert's."""
    holds: str
    """The field of `ExpertWeights`."""
    half: int | None = None
    """0 where it holds the gates alone, 1 where it holds the ups."""
    transposed: bool = False
    """Whether its last two axes are in the other order than ours."""

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def axes(self) -> str:
        """A letter for each axis."""
        axes = OURS[self.holds][1:] if self.per_expert else OURS[self.holds]
        axes = axes if self.half is None else axes.replace("R", "I")
        return axes[:-2] + axes[:-3:-1] if self.transposed else axes

    def names(self, prefix: str, num_experts: int) -> list[str]:
        """In a checkpoint with so many experts."""
        if not self.per_expert:
            return [prefix + self.name]
        return [prefix + self.name.format(expert=expert) for expert in range(num_experts)]


OURS = MappingProxyType({"w13": "ERH", "w2": "EHI", "b13": "ER", "b2": "EH"})
LAYOUTS: Mapping[str, tuple[Entry, ...]] = MappingProxyType({
    "linear": (
        Entry("{expert}.gate_proj.weight", "w13", half=0),
        Entry("{expert}.up_proj.weight", "w13", half=1),
        Entry("{expert}.down_proj.weight", "w2"),
    ),
    "mixtral-linear": (
        Entry("{expert}.w1.weight", "w13", half=0),
        Entry("{expert}.w3.weight", "w13", half=1),
        Entry("{expert}.w2.weight", "w2"),
    ),
    "stacked": (Entry("gate_up_proj", "w13"), Entry("down_proj", "w2")),
    "transposed": (Entry("gate_up_proj", "w13", transposed=True), Entry("down_proj", "w2", transposed=True)),
    "interleaved": (
        Entry("gate_up_proj", "w13", transposed=True),
        Entry("down_proj", "w2", transposed=True),
        Entry("gate_up_proj_bias", "b13"),
        Entry("down_proj_bias", "b2"),
    ),
    "w13": (Entry("w13_weight", "w13"), Entry("w2_weight", "w2")),
    "w13-interleaved": (
        Entry("w13_weight", "w13"),
        Entry("w2_weight", "w2"),
        Entry("w13_bias", "b13"),
        Entry("w2_bias", "b2"),
    ),
})  # fmt: skip
INTERLEAVED = ("interleaved", "w13-interleaved")


@dataclass(frozen=True)
class Shard:
    """One rank's share: whole experts by `ep_rank`, and of each the columns of its hidden layer by `tp_rank`.

    Raises:
        TypeError: A rank or size is not an integer.
        ValueError: A size is below 1, or a rank is not below its size.
    """

    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for kind in ("ep", "tp"):
            size = getattr(self, f"{kind}_size")
            require_between(f"{kind}_size", size, 1, sys.maxsize)
            require_between(f"{kind}_rank", getattr(self, f"{kind}_rank"), 0, size - 1, f"{kind}_size - 1 = ")

    def experts(self, num_experts: int) -> slice:
        """This rank's."""
        return _part("num_experts", num_experts, "ep", self.ep_rank, self.ep_size)

    def columns(self, intermediate_size: int) -> slice:
        """This rank's."""
        return _part("intermediate_size", intermediate_size, "tp", self.tp_rank, self.tp_size)


def _part(name: str, count: int, kind: str, rank: int, size: int) -> slice:
    if count % size:
        raise ValueError(f"{kind}_size must divide {name}={count}, got {size}")
    return slice(rank * count // size, (rank + 1) * count // size)


def to_w13(
    tensors: Mapping[str, Any], layout: ExpertLayout, *, prefix: str = "experts.", num_experts: int | None = None
) -> ExpertWeights:
    """Convert the experts of a public checkpoint to ours.

    Tensors after the prefix, by layout:

    - linear (Qwen, OLMoE, DeepSeek): `{expert}.gate_proj.weight`, `{expert}.up_proj.weight` [I, H], `{expert}.down_proj.weight`
      [H, I]
    - mixtral-linear: the same, named `{expert}.w1.weight`, `{expert}.w3.weight`, `{expert}.w2.weight`
    - stacked (transformers 5): `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]
    - transposed (Llama 4): `gate_up_proj` [E, H, 2I], `down_proj` [E, I, H]
    - interleaved (gpt-oss): as transposed, but gate and up columns take turns; `gate_up_proj_bias` [E, 2I], `down_proj_bias`
      [E, H]
    - w13 (vLLM, SGLang, Diffulex; ours): `w13_weight` [E, 2I, H], `w2_weight` [E, H, I]
    - w13-interleaved (vLLM's gpt-oss; ours): as w13, but gate and up rows take turns; `w13_bias` [E, 2I], `w2_bias` [E, H]

    Rows of gpt-oss stay interleaved: `experts.fused_swiglu_oai` reads them so, and the conversion transposes alone.

    Args:
        tensors: Arrays of torch, JAX or NumPy by name; names that do not begin with the prefix are left alone.
        layout: The layout's name.
        prefix: With what the names of the layer's experts begin, as "model.layers.3.mlp.experts.".
        num_experts: How many there must be; by default as many as there are. In a layout with tensors for each expert, nothing
            else tells that the last expert is missing.

    Returns:
        The weights, of the arrays' dtype; they may share memory with the arrays.

    Raises:
        ValueError: No such layout; a tensor is missing, superfluous, or has another shape or dtype than the others ask for.

    Source: state dicts of transformers (versions 4 and 5); FusedMoE of vLLM.
    """
    return read_experts(tensors, layout, prefix, num_experts, Shard())


def with_stacked_experts(state: Mapping[str, Any], prefix: str, num_experts: int) -> dict[str, Any]:
    """Return a state dict in which the experts of one layer are stacked, where it has them one by one as of `to_w13`'s linear."""
    if f"{prefix}gate_up_proj" in state:
        return dict(state)
    weights = to_w13(state, "linear", prefix=prefix, num_experts=num_experts)
    others = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return others | {f"{prefix}gate_up_proj": weights.w13, f"{prefix}down_proj": weights.w2}


def from_w13(weights: ExpertWeights, layout: ExpertLayout, *, prefix: str = "experts.") -> dict[str, Any]:
    """Convert our experts to the tensors of a public checkpoint: the inverse of `to_w13`, bit for bit.

    Args:
        weights: The weights, all experts of the layer.
        layout: The layout's name.
        prefix: With what names begin.

    Returns:
        Arrays by name; they may share memory with the weights.

    Raises:
        ValueError: No such layout; sizes do not fit together; or the layout has no place for what the weights have (biases, rows
            that are interleaved or are not), or they lack what it has.
    """
    require_one_of("layout", layout, ExpertLayout)
    _require_fitting(weights, layout)
    tensors: dict[str, Any] = {}
    for entry in LAYOUTS[layout]:
        array = getattr(weights, entry.holds)
        if entry.half is not None:
            intermediate_size = array.shape[1] // 2
            array = array[:, entry.half * intermediate_size :][:, :intermediate_size]
        array = array.swapaxes(-1, -2) if entry.transposed else array
        parts: Iterable[Any] = array if entry.per_expert else [array]
        tensors |= dict(zip(entry.names(prefix, len(array)), parts, strict=True))
    return tensors


def read_experts(
    tensors: Mapping[str, Any], layout: ExpertLayout, prefix: str, num_experts: int | None, shard: Shard
) -> ExpertWeights:
    """Read one rank's share of what `to_w13` converts, and nothing else.

    Args:
        tensors: By name, anything with a shape and a dtype that is read by indexing with a tuple of slices.
        layout: The layout's name.
        prefix: With what the names of the layer's experts begin.
        num_experts: How many there must be in all, or None.
        shard: What to read.
    """
    require_one_of("layout", layout, ExpertLayout)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if num_experts is None:
        num_experts = _count_experts(inside, LAYOUTS[layout][0], prefix)
    require_between("num_experts", num_experts, 1, sys.maxsize)
    expected = [name for entry in LAYOUTS[layout] for name in entry.names(prefix, num_experts)]
    require_names(inside, expected, f"layout {layout!r} with num_experts={num_experts}")
    sizes = _sizes(inside, LAYOUTS[layout], prefix, num_experts)

    experts, columns = shard.experts(num_experts), shard.columns(sizes["I"])
    rows = [slice(2 * columns.start, 2 * columns.stop)]
    if layout not in INTERLEAVED and shard.tp_size > 1:
        rows = [slice(first + columns.start, first + columns.stop) for first in (0, sizes["I"])]
    ours: dict[str, Any] = {}
    for entry in LAYOUTS[layout]:
        parts = _read(inside, entry, entry.names(prefix, num_experts), experts, rows if "R" in entry.axes else [columns])
        ours[entry.holds] = _concatenate([ours[entry.holds], *parts] if entry.holds in ours else parts)
    if shard.tp_rank and "b2" in ours:  # ranks' outputs are added up: the bias counts once
        ours["b2"] = _framework(ours["b2"]).zeros_like(ours["b2"])
    return ExpertWeights(**ours, interleaved=layout in INTERLEAVED)


def _read(tensors: Mapping[str, Any], entry: Entry, names: list[str], experts: slice, places: list[slice]) -> list[Any]:
    """Of a tensor, or of each expert's, what lies at each of the places along the hidden layer."""
    parts = []
    for place in places:
        at = {"E": experts, "H": slice(None), "I": place, "R": place}
        index = tuple(at[axis] for axis in entry.axes)
        part = stack([tensors[name][index] for name in names[experts]]) if entry.per_expert else tensors[names[0]][index]
        parts.append(part.swapaxes(-1, -2) if entry.transposed else part)
    return parts


def _count_experts(tensors: Mapping[str, Any], entry: Entry, prefix: str) -> int:
    """As many as the first tensor has, or as there are numbers in names up to the highest."""
    if not entry.per_expert:
        name = prefix + entry.name
        return tensors[name].shape[0] if name in tensors and tensors[name].shape else 1
    numbers = [int(part) for part in (name[len(prefix) :].partition(".")[0] for name in tensors) if part.isdecimal()]
    return max(numbers, default=0) + 1


def require_names(tensors: Collection[str], expected: list[str], of: str) -> None:
    """Check that a checkpoint has just the expected names, as `of` has."""
    problems = {
        "is missing": [name for name in expected if name not in tensors],
        "is superfluous": sorted(set(tensors) - set(expected)),
    }
    for problem, names in problems.items():
        if names:
            also = f", and so are {len(names) - 1} others" if names[1:] else ""
            raise ValueError(f"{names[0]} {problem}{also}: {of} has {_list(expected)}; got {_list(sorted(tensors))}")


def _list(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:3], "…", names[-1]]) or "none"


def _sizes(tensors: Mapping[str, Any], entries: tuple[Entry, ...], prefix: str, num_experts: int) -> dict[str, int]:
    """The sizes by letter: of the first tensor, and checked of all."""
    first = prefix + entries[0].name.format(expert=0)
    require_shape(first, tensors[first], **{WORDS[axis]: None for axis in entries[0].axes})
    sizes = dict(zip(entries[0].axes, tensors[first].shape, strict=True)) | {"E": num_experts}
    if "I" not in sizes:
        if sizes["R"] % 2:
            raise ValueError(f"{first} must hold as many gates as ups, got {tuple(tensors[first].shape)}")
        sizes["I"] = sizes["R"] // 2
    sizes["R"] = 2 * sizes["I"]
    for entry in entries:
        for name in entry.names(prefix, num_experts):
            require_shape(name, tensors[name], **{WORDS[axis]: sizes[axis] for axis in entry.axes})
            if dtype_name(tensors[name]) != dtype_name(tensors[first]):
                raise ValueError(f"{name} must be {dtype_name(tensors[first])} like {first}, got {dtype_name(tensors[name])}")
    return sizes


WORDS = {"E": "num_experts", "I": "intermediate_size", "R": "two_intermediate_sizes", "H": "hidden_size"}


def _require_fitting(weights: ExpertWeights, layout: ExpertLayout) -> None:
    orders = {False: "gates first", True: "gate and up in turn"}
    if weights.interleaved != (layout in INTERLEAVED):
        wanted, got = orders[layout in INTERLEAVED], orders[weights.interleaved]
        raise ValueError(f"w13 must have its rows {wanted} in layout {layout!r}, got {got}")
    held = {entry.holds for entry in LAYOUTS[layout]}
    for name in OURS:
        if (getattr(weights, name) is not None) != (name in held):
            raise ValueError(f"{name} must be {'an array' if name in held else 'None'} in layout {layout!r}")
    ours = {name: getattr(weights, name) for name in OURS if name in held}
    _sizes(ours, tuple(Entry(name, name) for name in ours), "", len(weights.w13))


def stack(arrays: list[Any]) -> Any:
    return _framework(arrays[0]).stack(arrays)


def _concatenate(halves: list[Any]) -> Any:
    return halves[0] if len(halves) == 1 else _framework(halves[0]).concat(halves, axis=1)


def _framework(array: Any) -> Any:
    """The module of functions on an array; a tensor of torch does not tell it as the others do."""
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else sys.modules["torch"]
