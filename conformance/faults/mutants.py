"""Bugs planted into the text of our own Triton kernels, which proves that the kernels we ship are guarded.

Not here, since nobody could see them: `other=` of loads whose lanes are masked again later (router logits and bias), the row
mask of a store that writes the last row again with the same value, the key of NaN (its bits are the largest integer anyway),
and `input_precision="tf32"`, which the interpreter computes as "ieee".
"""

import ast
import importlib
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from gaugeblock.conformance.faults.fault import Fault, Kind, plant

KERNELS = "gaugeblock.optimized.triton"
SOFTMAX, GROUPED, EXPERTS = "routers.softmax_topk", "routers.grouped_sigmoid_topk", "experts.fused_swiglu"


def mutated(source: str, place: str, old: str, new: str) -> str:
    """The text of a module in which `old` is `new` wherever it occurs inside the function or constant `place`.

    Raises:
        ValueError: If there is no such place, or `old` does not occur there: the kernel has changed, and so must the mutant.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        if place in (getattr(target, "name", None), getattr(target, "id", None)):
            assert node.end_lineno is not None  # ast.parse sets it
            inside = "".join(lines[node.lineno - 1 : node.end_lineno])
            if old in inside:
                return "".join((*lines[: node.lineno - 1], inside.replace(old, new), *lines[node.end_lineno :]))
    raise ValueError(f"no {old!r} in {place}")


def load_mutant(function: str, name: str, place: str, old: str, new: str) -> Callable[..., Any]:
    """A function from a copy of our kernels with one change of their text.

    Args:
        function: `module.function`, as in `routers.softmax_topk`.
        name: Of the copy.
        place: `module.function` or `module.CONSTANT` where the text is changed.
    """
    module, _, attribute = function.partition(".")
    package = f"gaugeblock_mutant_{module}_{name.replace('-', '_')}"
    folder = _folder() / package
    if not folder.exists():
        folder.mkdir()
        changed, _, inside = place.partition(".")
        for file in files(KERNELS).iterdir():
            if file.name.endswith(".py"):
                text = file.read_text()
                text = mutated(text, inside, old, new) if file.name == f"{changed}.py" else text
                (folder / file.name).write_text(text.replace(KERNELS, package))
    return getattr(importlib.import_module(f"{package}.{module}"), attribute)


@cache
def _folder() -> Path:
    """A folder for the copies, on the import path: Triton reads a kernel's text from its file."""
    _folders.append(tempfile.TemporaryDirectory(prefix="gaugeblock-mutants-"))
    sys.path.insert(0, _folders[0].name)
    return Path(_folders[0].name)


_folders: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def mutant(
    contract: str,
    name: str,
    summary: str,
    place: str,
    old: str,
    new: str,
    caught_by: str,
    kind: Kind,
    source: str = "",
    **claims: Any,
) -> None:
    """Registers a change of text as a fault."""
    candidate = partial(load_mutant, contract, name, place, old, new)
    plant(Fault(f"triton-{name}", contract, candidate, caught_by, kind, source, summary, claims={"kind": "triton"} | claims))


mutant(
    SOFTMAX, "lane-mask-off-by-one", "One lane behind the last expert takes part.", "routers._softmax_topk_forward",
    "experts < num_experts", "experts <= num_experts", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    SOFTMAX, "maximum-not-subtracted", "Exponentials overflow.", "routers._softmax_topk_forward",
    " - highest", "", "parity", "precision",
)  # fmt: skip
mutant(
    SOFTMAX, "lane-chosen-twice", "The chosen lane stays selectable.", "topk.choose_lanes",
    "tl.where(lanes == best, no_key(keys.dtype), keys)", "keys", "parity", "structural", "vllm#52679",
)  # fmt: skip
mutant(
    SOFTMAX, "batch-mask-dropped", "Rows behind the last token are stored.", "routers._store_choice",
    "in_batch & (columns < top_k)", "columns < top_k", "parity", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "column-stride-ignored", "Neighbouring logits are taken to lie side by side.", "routers._load_logits",
    " * column_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "routers._load_grads",
    "pointers += column_stride", "pointers += 1", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    SOFTMAX, "weights-through-float16", "Exponentials of the chosen are rounded to float16.", "routers._softmax_topk_forward",
    "tl.exp(chosen_logits - highest)", "tl.exp(chosen_logits - highest).to(tl.float16).to(tl.float32)", "parity", "precision",
    "gpt-oss ports",
)  # fmt: skip
mutant(
    SOFTMAX, "gradient-not-centered", "The mean is not subtracted from the gradient.", "routers._softmax_topk_backward",
    "static_range(2)", "static_range(0)", "gradients", "gradient",
)  # fmt: skip
mutant(
    GROUPED, "padded-lanes-selectable", "Lanes behind the last member of a group can be chosen.", "topk.keys_of",
    "tl.where(selectable, keys, no_key(keys.dtype))", "keys", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    GROUPED, "negative-keys-reversed", "Negative scores are compared by their bits.", "topk.keys_of",
    "keys ^ highest_key(keys.dtype)", "keys", "parity", "structural",
)  # fmt: skip
mutant(
    GROUPED, "second-best-forgotten", "A group's score is its best expert's alone.", "routers._grouped_sigmoid_topk_forward",
    "if group_size > 1:", "if group_size > 1000000:", "parity", "structural", "DeepSeek-V2 and V3 mixed up",
)  # fmt: skip
mutant(
    GROUPED, "epsilon-of-float32", "10^-12 is added to the sum of the weights.", "routers.RENORMALIZE_EPSILON",
    "1e-20", "1e-12", "parity", "precision", "Diffulex#37",
)  # fmt: skip
mutant(
    GROUPED, "bias-stride-ignored", "The bias is taken to be contiguous.", "routers._grouped_sigmoid_topk_forward",
    " * bias_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    GROUPED, "factor-without-gradient", "The factor is left out of the backward pass.", "routers._grouped_sigmoid_topk_backward",
    "grads *= routed_scaling_factor", "grads *= 1.0", "gradients", "gradient",
)  # fmt: skip

mutant(
    EXPERTS, "gate-and-up-swapped", "The first half of w13 is taken for up.", "experts._gate_up_kernel",
    "silu * up", "up / (1.0 + tl.exp(-up)) * gate", "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    EXPERTS, "depth-mask-dropped", "The last tile of a sum reads on behind the row.", "grouped_matmul._rows_times_matrices_kernel",
    "steps < depth", "steps >= 0", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    EXPERTS, "other-missing", "Lanes behind the end of the sum hold whatever the load leaves there.", "experts._gate_up_kernel",
    ", other=0.0", "", "parity", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "one-depth-tile-less", "The loop over the sum ends one tile early.", "experts._gate_up_kernel",
    "range(0, hidden_size, BLOCK_DEPTH)", "range(0, hidden_size - BLOCK_DEPTH, BLOCK_DEPTH)", "parity", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "column-mask-dropped", "Columns behind the last are stored over the next row's.", "grouped_matmul._rows_times_matrices_kernel",
    "mask=row_exists & column_exists", "mask=row_exists & (columns >= 0)", "parity", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "store-past-the-end", "The column mask of the combine is off by one.", "dispatch._sum_rows_kernel",
    "columns < width", "columns <= width", "out_of_bounds", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "float16-accumulator", "Gate and up are rounded to float16 after each tile.", "experts._gate_up_kernel",
    'input_precision="ieee")', 'input_precision="ieee").to(tl.float16).to(tl.float32)', "parity", "precision", "pytorch/helion#2141",
    dtypes=("float16",),
)  # fmt: skip
mutant(
    EXPERTS, "partial-blocks-dropped", "An expert's rows behind its last full block are not computed.", "dispatch.split_into_blocks",
    ".add(block_rows - 1) // block_rows", " // block_rows", "fully_written", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "blocks-overlap", "A block runs on into the next expert's rows, whose own block may come before or after.",
    "dispatch.split_into_blocks", "(starts_B + block_rows).minimum(expert_ends_B)", "(starts_B + block_rows).clamp(max=num_rows)",
    "program_order", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "last-choice-forgotten", "The combine leaves out each token's last choice.", "dispatch._sum_rows_kernel",
    "range(top_k)", "range(top_k - 1)", "parity", "structural",
)  # fmt: skip
mutant(
    EXPERTS, "weight-stride-ignored", "Router weights of a token are taken to lie side by side.", "dispatch._sum_rows_kernel",
    "weight_ptrs += weights_choice_stride", "weight_ptrs += 1", "layout", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "matrix-stride-ignored", "The rows of w13 are taken to lie one behind the other.", "experts._gate_up_kernel",
    " * w13_row_stride", " * hidden_size", "layout", "memory", "Liger-Kernel#1377",
)  # fmt: skip
mutant(
    EXPERTS, "tiles-chosen-by-tokens", "Small batches sum in shorter tiles.", "grouped_matmul.choose_tiles",
    "Tiles(16, 64, 64, 1, 1)", "Tiles(16, 64, 64 if operands[0].shape[0] > 8 else 32, 1, 1)", "batch_invariance", "state", "vllm#36488",
)  # fmt: skip
mutant(
    EXPERTS, "silu-without-the-product-rule", "silu' is taken for the sigmoid.", "experts._gate_up_backward_kernel",
    " * (1.0 + gate * (1.0 - sigmoid))", "", "gradients", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "weight-gradient-misses-the-last-row", "An expert's last row is left out of the gradients of w13 and w2.",
    "grouped_matmul._sum_of_products_kernel", "positions < end", "positions < end - 1", "gradients", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "gradient-of-unused-experts-unwritten", "Experts without rows write no gradient.", "grouped_matmul._sum_of_products_kernel",
    "    tl.store(", "    if start == end:\n        return\n    tl.store(", "fully_written", "memory", "vllm-ascend#17009",
)  # fmt: skip
mutant(
    EXPERTS, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "experts._gate_up_backward_kernel",
    "steps * gradient_hidden_stride", "steps", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "ids-unchecked", "An id out of range addresses memory that is not there.", "experts.fused_swiglu",
    "validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])", "pass", "rejections", "error-contract",
)  # fmt: skip
mutant(
    EXPERTS, "silent-fallback", "The reference computes, and no kernel is launched.", "experts.fused_swiglu",
    "return _FusedSwiglu.apply(", "from gaugeblock.reference.torch import experts\n        return experts.fused_swiglu(",
    "path_witness", "structural",
)  # fmt: skip
