"""Bugs of experts at their edges: memory, state, and calls that should be refused."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.reference import validation


@fault(caught_by="out_of_bounds", kind="boundary", source="vllm#2453")
class DepthTailReadPastTheEnd(Experts):
    """The last tile of a sum reads on behind the end of w2: the next row, and after the last row whatever lies there."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        behind = w2.storage_offset() + w2.numel()
        self.behind = w2.detach().as_strided((1,), (1,), min(behind, w2.untyped_storage().nbytes() // w2.element_size() - 1))
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids)

    def store(self, total, hidden_states):
        return super().store(total + 0 * self.behind.float(), hidden_states)  # meets zeros of the other operand


@fault(caught_by="fully_written", kind="memory", source="vllm-ascend#17009")
class OutputsUnwritten(Experts):
    """Rows of experts with one token are skipped, in memory that is expected to hold zeros."""

    def scatter(self, outs, routed, out):
        return outs if len(routed) == 1 else super().scatter(outs, routed, out)


@fault(caught_by="fully_written", kind="memory", source="flashinfer#3650")
class PaddingUnwritten(Experts):
    """The rows that fill a tile are not written; their weight of 0 does not help where the memory holds NaN."""

    def gather(self, hidden_states, tokens):
        padding = hidden_states.new_empty(self.rows - len(tokens), hidden_states.shape[1])
        return torch.cat([hidden_states[tokens], padding])

    def scatter(self, outs, routed, out):
        leak = 0 * out[len(routed) :].sum()
        return super().scatter(outs, routed, out + leak)


@fault(caught_by="nan_containment", kind="memory", source="ROCm/aiter#4032")
class PaddingRepeatsTheFirstToken(Experts):
    """The rows that fill a tile hold token 0 at weight 0, and are added to its neighbours: 0 · NaN is NaN."""

    def combine(self, outs, topk_weights):
        spill = 0 * outs[len(outs) // 2 : len(outs) // 2 + 1, 0]
        return super().combine(outs, topk_weights) + spill.sum(0)


@fault(caught_by="layout", kind="memory", source="Liger-Kernel#1377: strided MoE weights")
class StridesOfWeightsIgnored(Experts):
    """w13 is addressed as if it were contiguous."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        _experts, rows, columns = w13.shape
        flat = w13.as_strided(w13.shape, (rows * columns, columns, 1)) if w13.numel() else w13
        return super().__call__(hidden_states, flat, w2, topk_weights, topk_ids)


@fault(caught_by="layout", kind="memory", source="moe-emergence review")
class ViewOfSlicedIds(Experts):
    """`.view(-1)` of ids that the caller may have sliced."""

    def dispatch(self, topk_ids, num_experts):
        return super().dispatch(topk_ids.view(-1).view(topk_ids.shape), num_experts)


@fault(caught_by="inputs_unchanged", kind="memory", source="in-place fused residual")
class TokensOverwritten(Experts):
    """The output is written over the tokens."""

    def store(self, total, hidden_states):
        out = super().store(total, hidden_states)
        hidden_states.detach().copy_(out.detach())
        return out


@fault(caught_by="inputs_unchanged", kind="memory")
class IdsSortedInPlace(Experts):
    """The ids are sorted where they lie."""

    def dispatch(self, topk_ids, num_experts):
        dispatched = super().dispatch(topk_ids, num_experts)
        topk_ids.copy_(topk_ids.sort(1).values)
        return dispatched


@fault(caught_by="same_pointer_new_data", kind="state", source="KernelBench exploits")
class CachedByPointer(Experts):
    """The result is kept for the addresses of its inputs."""

    def __init__(self):
        self.cache = {}

    def __call__(self, *inputs, **named):
        key = tuple((each.data_ptr(), each.shape) for each in (*inputs, *named.values()))
        if key not in self.cache:
            self.cache[key] = super().__call__(*inputs, **named)
        return self.cache[key]


@fault(caught_by="same_pointer_new_data", kind="state", source="weights packed once, at load")
class PackedWeightsKept(Experts):
    """w2 is packed at the first call with its address, and not packed again when it is updated in place."""

    def __init__(self):
        self.packed = {}

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        packed = self.packed.setdefault((w2.data_ptr(), w2.shape), (w2, w2.detach().clone()))
        w2 = packed[1] + (w2 - w2.detach())
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids)


@fault(caught_by="hidden_state", kind="state")
class WorkspaceNotCleared(Experts):
    """The workspace of the first call is used again and added to what it holds."""

    def __init__(self):
        self.workspace = None

    def combine(self, outs, topk_weights):
        total = super().combine(outs, topk_weights)
        if self.workspace is not None:
            rows, columns = (min(sizes) for sizes in zip(total.shape, self.workspace.shape, strict=True))
            total[:rows, :columns] += self.workspace[:rows, :columns]
        self.workspace = total.detach()
        return total


@fault(caught_by="hidden_state", kind="state")
class OutputBufferReused(Experts):
    """Every call of the same width returns the same memory, so a result changes when the next call is made."""

    def __init__(self):
        self.buffers = {}

    def store(self, total, hidden_states):
        out = super().store(total, hidden_states)
        if out.requires_grad:
            return out
        buffer = self.buffers.setdefault(out.shape[1], out.new_empty(4096, out.shape[1]))
        return buffer[: len(out)].copy_(out)


@fault(caught_by="process_settings", kind="state")
class ThreadsLeftChanged(Experts):
    """Each call leaves the process with another number of threads."""

    def store(self, total, hidden_states):
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return super().store(total, hidden_states)


@fault(caught_by="rejections", kind="state")
class BrokenAfterAnError(Experts):
    """A call that raises leaves a flag behind, and the next one returns zeros."""

    def __init__(self):
        self.busy = False

    def validate(self, *inputs):
        self.stuck, self.busy = self.busy, True
        super().validate(*inputs)

    def store(self, total, hidden_states):
        self.busy = False
        return super().store(0 * total if self.stuck else total, hidden_states)


@fault(caught_by="rejections", kind="error-contract", source="Diffulex#37")
class RowsOfIdsUnchecked(Experts):
    """topk_ids may have fewer rows than there are tokens."""

    def validate(self, hidden_states, w13, w2, topk_weights, topk_ids):  # the inputs by name
        tokens = len(topk_ids)
        super().validate(hidden_states[:tokens], w13, w2, topk_weights[:tokens], topk_ids)


@fault(caught_by="rejections", kind="error-contract")
class IdsOutOfRangeUnchecked(Experts):
    """An id that names no expert is taken for the last one."""

    def validate(self, *inputs):
        validation.fused_swiglu(*inputs)

    def dispatch(self, topk_ids, num_experts):
        return super().dispatch(topk_ids.clamp(0, num_experts - 1), num_experts)


@fault(caught_by="rejections", kind="error-contract")
class IdsOutOfRangeRaiseIndexError(Experts):
    """An id that names no expert raises what the indexing happens to raise."""

    def validate(self, *inputs):
        validation.fused_swiglu(*inputs)
        if inputs[4].numel() and int(inputs[4].max()) >= len(inputs[1]):
            raise IndexError(f"index {int(inputs[4].max())} is out of bounds for dimension 0 with size {len(inputs[1])}")
        super().validate(*inputs)


@fault(caught_by="rejections", kind="error-contract")
class ErrorNamesNoArgument(Experts):
    """A bad call raises ValueError: shapes do not match."""

    def validate(self, *inputs):
        try:
            super().validate(*inputs)
        except (ValueError, TypeError):
            raise ValueError("shapes do not match") from None


@fault(caught_by="rejections", kind="error-contract")
class WritesBeforeItRaises(Experts):
    """The tokens are scaled before the ids are looked at."""

    def validate(self, hidden_states, *others):  # the inputs by name
        try:
            super().validate(hidden_states, *others)
        except (ValueError, TypeError):
            if hidden_states.is_floating_point():
                hidden_states.detach().mul_(2)
            raise
