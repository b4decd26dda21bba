"""What an operation must do, as data: a contract is a row that people read and the engine obeys.

Nothing here knows of a particular operation, framework or property. Sizes are named by strings
(`"num_tokens"`); a case gives each name a number, and the same names appear in the shapes of the inputs
and outputs, so that the engine can find the batch dimension, permute experts or slice tokens by itself.

An argument is a tensor or a flat dict of tensors (a state dict). The engine keeps arguments and results as flat dicts
keyed by `"hidden_states"` or `"state/blocks.0.weight"`; `nest` and `flatten` are the two ways across.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from gaugeblock.conformance.cases import Draw

Tensors = dict[str, "torch.Tensor"]
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """One argument of an operation.

    Attributes:
        name: The argument's name in the public signature.
        shape: Names of its dimensions.
        dtype: `"tested"` (the dtype under test), or a fixed dtype such as `"float32"` or `"int64"`.
        differentiable: Whether a gradient with respect to it is due.
        indexes: The dimension whose indices its values are (`topk_ids` indexes `"num_experts"`), if any.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str = "tested"
    differentiable: bool = False
    indexes: str | None = None


@dataclass(frozen=True)
class Output(Input):
    """One result of an operation; the fields are those of `Input`.

    An output that `indexes` a dimension is a choice: it is right if and only if the scores allow it
    (`Selection`), and the other outputs are judged at the choice that the candidate made.
    """


@dataclass(frozen=True)
class Selection:
    """How the reference chooses ids: the best `top_k` of the scores, perhaps within the best groups.

    Attributes:
        scores: Function of the operation's arguments giving the selection scores `[T, E]`.
        group_scores: Function of the same arguments giving `[T, G]`; None without groups.
    """

    scores: Callable[..., "torch.Tensor"]
    group_scores: Callable[..., "torch.Tensor"] | None = None


@dataclass(frozen=True)
class Regime:
    """A kind of values (JUDGING.md section 2.7).

    Attributes:
        name: As the report prints it.
        make: Draws every input in float64 (integers in int64); the engine rounds to the dtype under test.
        judged: `"budget"`: max, and with enough elements rms and bias; `"worst element"`: max alone, where
            the statistical model does not hold; `"exact"`: bit for bit, since every partial sum is exact.
        differentiable: False where gradients do not exist or are not judged (ties, NaN).
    """

    name: str
    make: Callable[["Draw", Parameters], Tensors]
    judged: Literal["budget", "worst element", "exact"] = "budget"
    differentiable: bool = True


@dataclass(frozen=True)
class Rejection:
    """A bad call, made from a good one, that must raise ValueError or TypeError naming `argument`."""

    name: str
    argument: str
    spoil: Callable[[dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What an operation cannot avoid: floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """A named size from a published model, e.g. `mixtral-8x7b/prefill-4096`."""

    name: str
    parameters: Parameters
    source: str


@dataclass(frozen=True)
class Builtin:
    """An implementation of ours, imported only when it is run; the fields are those of `Implementation`."""

    name: str
    function: str
    kind: str
    framework: str = "torch"
    claims: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Contract:
    """An operation and all that is demanded of its implementations.

    Attributes:
        name: `subject.operation`.
        summary: One sentence.
        formula: The mathematics, in plain text.
        source: The paper and section, or the public model followed.
        reference: The PyTorch reference; in float64 it is the oracle.
        twin: Import path `module:function` of the JAX reference.
        inputs, outputs: The signature.
        options: Names of the keyword arguments; their values are among a case's parameters.
        batch: The dimension along which examples are independent.
        parameters: Strategy of sizes and options.
        landmarks: Sizes and options that are always worth a visit; the first is an ordinary one. JAX, which compiles
            for every new shape, visits only these.
        regimes: Kinds of values; the first is the main one.
        formulas: Other ways to write the reference, equal in exact arithmetic; a budget allows for the rounding of each.
        selection: For operations that choose.
        relabel: Draws a permutation of `"num_experts"` under which the operation is equivariant; None if
            it has no experts.
        rejections: Bad calls.
        without: Properties that do not apply, each with the reason.
        cost: Of a forward pass, from parameters and bytes per element.
        workloads: Published sizes, for benchmarks.
        builtins: Implementations of ours.
    """

    name: str
    summary: str
    formula: str
    source: str
    reference: Callable[..., Any]
    twin: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    options: tuple[str, ...]
    batch: str
    parameters: Callable[[], "SearchStrategy[dict[str, Any]]"]
    landmarks: tuple[Parameters, ...]
    regimes: tuple[Regime, ...]
    cost: Callable[[Parameters, int], Cost]
    workloads: tuple[Workload, ...]
    formulas: tuple[Callable[..., Any], ...] = ()
    selection: Selection | None = None
    relabel: Callable[["Draw", Parameters], "torch.Tensor"] | None = None
    rejections: tuple[Rejection, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    builtins: tuple[Builtin, ...] = ()

    @property
    def signature(self) -> str:
        """The public call, as text."""
        arguments = [spec.name for spec in self.inputs]
        return f"{self.name}({', '.join([*arguments, *(['*'] if self.options else []), *self.options])})"

    def regime(self, name: str) -> Regime:
        """The regime of that name."""
        return next(regime for regime in self.regimes if regime.name == name)

    def differentiable(self, tensors: Mapping[str, Any]) -> list[str]:
        """Keys of `tensors` (flat inputs or outputs) through which gradients flow."""
        flowing = {spec.name for spec in (*self.inputs, *self.outputs) if spec.differentiable}
        return [key for key in tensors if argument_of(key) in flowing]

    def spec(self, key: str) -> Input:
        """The input or output that the flat key `key` belongs to."""
        return next(spec for spec in (*self.inputs, *self.outputs) if spec.name == argument_of(key))


def argument_of(key: str) -> str:
    """The argument that a flat key belongs to: `"state/blocks.0.weight"` to `"state"`."""
    return key.partition("/")[0]


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys to arguments: `{"x": a, "state/w": b}` to `{"x": a, "state": {"w": b}}`."""
    arguments: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name, nested, leaf = key.partition("/")
        if nested:
            arguments.setdefault(name, {})[leaf] = tensor
        else:
            arguments[name] = tensor
    return arguments


def flatten(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a function returned to flat keys: a value, or a tuple or list of them, in the order of `names`.

    Raises:
        TypeError: If the number of results is not that of `names`.
    """
    values = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(values) != len(names):
        raise TypeError(f"returned {len(values)} values, expected {len(names)}: ({', '.join(names)})")
    flat: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Mapping):
            flat |= {f"{name}/{leaf}": tensor for leaf, tensor in value.items()}
        else:
            flat[name] = value
    return flat
