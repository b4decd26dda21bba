"""Bugs of experts: what is computed, and which rows and columns are forgotten."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.experts import Experts


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class GateAndUpSwapped(Experts):
    """The first half of w13 is taken for up."""

    def activate(self, gate, up):
        return super().activate(up, gate)


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class HalvesReadAsInterleaved(Experts):
    """Gate and up are taken from even and odd rows of w13."""

    def split(self, gate_up):
        return gate_up[:, 0::2], gate_up[:, 1::2]


@fault(caught_by="parity", kind="structural", source="gpt-oss: limit 7")
class Clamped(Experts):
    """Gate and up are clamped at 7, as gpt-oss does."""

    def activate(self, gate, up):
        return super().activate(gate.clamp(max=7), up.clamp(-7, 7))


@fault(caught_by="parity", kind="structural")
class GeluForSilu(Experts):
    """The gate passes a GELU."""

    def activate(self, gate, up):
        return torch.nn.functional.gelu(gate) * up


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class SigmoidSteeper(Experts):
    """gate · sigmoid(1.702 · gate), as gpt-oss has it."""

    def activate(self, gate, up):
        return gate * torch.sigmoid(1.702 * gate) * up


@fault(caught_by="parity", kind="structural", source="Llama-4 ports")
class WeightBeforeTheActivation(Experts):
    """The router weight scales an expert's input, as Llama 4 has it; SwiGLU is not linear."""

    def expert(self, hidden, w13, w2, weights, dtype):
        scale = torch.nn.functional.pad(weights, (0, len(hidden) - len(weights)))
        return super().expert(hidden * scale[:, None], w13, w2, weights, dtype)

    def combine(self, outs, topk_weights):
        return super().combine(outs, torch.ones_like(topk_weights))


@fault(caught_by="parity", kind="structural", source="Llama-4 ports")
class WeightAppliedTwice(Experts):
    """The router weight is in the second product's epilogue and in the combine."""

    def combine(self, outs, topk_weights):
        return super().combine(outs, topk_weights.square())


@fault(caught_by="parity", kind="structural", source="llama.cpp#26294", smallest=8)
class RepeatedIdDropped(Experts):
    """Weights are scattered over the experts, where of an id given twice in a row the last one stays."""

    def combine(self, outs, topk_weights):
        again = (self.ids[:, :, None] == self.ids[:, None, :]).triu(1).any(2)
        return super().combine(outs, topk_weights.masked_fill(again, 0))

    def dispatch(self, topk_ids, num_experts):
        self.ids = topk_ids
        return super().dispatch(topk_ids, num_experts)


@fault(caught_by="parity", kind="boundary", source="llama.cpp#26310", smallest=8)
class ListOfTokensForRows(Experts):
    """An expert's list has room for each token once; what repeated ids add is not computed."""

    def blocks(self, offsets):
        tokens = int(offsets[-1]) // self.top_k
        for expert, start, end in super().blocks(offsets):
            yield expert, start, max(start, min(end, int(offsets[expert]) + tokens))

    def dispatch(self, topk_ids, num_experts):
        self.top_k = topk_ids.shape[1]
        return super().dispatch(topk_ids, num_experts)

    def allocate(self, rows, columns):
        return torch.zeros(rows, columns)


@fault(caught_by="parity", kind="structural", source="Llama-4 ports", smallest=2)
class WeightIgnoredForOneChoice(Experts):
    """With top_k = 1 the combine is skipped, and the weight with it."""

    def combine(self, outs, topk_weights):
        return outs[:, 0] if outs.shape[1] == 1 else super().combine(outs, topk_weights)


@fault(caught_by="parity", kind="structural")
class InversePermutationForgotten(Experts):
    """Rows are put back by the permutation itself, which is its own inverse only by chance."""

    def dispatch(self, topk_ids, num_experts):
        rows, offsets = super().dispatch(topk_ids, num_experts)
        return rows.argsort(), offsets


@fault(caught_by="parity", kind="structural", source="ROCm/aiter: top_k of the wrong tensor")
class TokenOfTheNextChoice(Experts):
    """A routed row's token is its index modulo the number of tokens: choices are laid out [k, T], read [T, k]."""

    def gather(self, hidden_states, tokens):
        return super().gather(hidden_states, tokens.roll(1))


@fault(caught_by="parity", kind="boundary", smallest=2)
class LastPartialTileDropped(Experts):
    """An expert's rows behind its last full tile are not computed."""

    def blocks(self, offsets):
        return (block for block in super().blocks(offsets) if block[2] - block[1] == self.rows)

    def allocate(self, rows, columns):
        return torch.zeros(rows, columns)


@fault(caught_by="parity", kind="boundary", smallest=32)
class LastRowOfAFullTileDropped(Experts):
    """The mask of a full tile ends one row early."""

    def scatter(self, outs, routed, out):
        lost = len(routed) == self.rows
        return super().scatter(outs, routed, torch.cat([out[:-1], 0 * out[-1:]]) if lost else out)


@fault(caught_by="parity", kind="boundary", smallest=34)
class SecondTileOfAnExpertDropped(Experts):
    """An expert has one tile: what exceeds it is not computed."""

    def blocks(self, offsets):
        starts = set(offsets.tolist())
        return (block for block in super().blocks(offsets) if block[1] in starts)

    def allocate(self, rows, columns):
        return torch.zeros(rows, columns)


@fault(caught_by="parity", kind="boundary", source="scatter and gather kernels", smallest=4)
class EmptyExpertShiftsOffsets(Experts):
    """Offsets are those of the experts that have tokens; an empty one shifts all later."""

    def dispatch(self, topk_ids, num_experts):
        rows, offsets = super().dispatch(topk_ids, num_experts)
        used = torch.cat([offsets[:1], offsets[1:][offsets.diff() > 0]])
        return rows, torch.nn.functional.pad(used, (0, len(offsets) - len(used)), value=int(offsets[-1]))


@fault(caught_by="parity", kind="boundary", source="vllm#2453")
class DepthTailDropped(Experts):
    """Products behind the last full tile of the sum are left out."""

    def tiles(self, left, right):
        return [pair for pair in super().tiles(left, right) if pair[0].shape[1] == self.depth]


@fault(caught_by="parity", kind="boundary", smallest=2)
class LastDepthTileDropped(Experts):
    """The loop over the sum ends one tile early."""

    def tiles(self, left, right):
        return super().tiles(left, right)[:-1]


@fault(caught_by="parity", kind="boundary", smallest=130)
class DepthTileAddedTwice(Experts):
    """The pipelined loop adds its first tile in the prologue too."""

    def tiles(self, left, right):
        tiles = super().tiles(left, right)
        return tiles + tiles[:1] if len(tiles) > 2 else tiles


@fault(caught_by="parity", kind="boundary", smallest=2)
class ColumnTailDropped(Experts):
    """Columns behind the last full tile are not computed."""

    def matmul(self, left, right):
        out = super().matmul(left, right)
        full = out.shape[1] // self.columns * self.columns
        return out.where(torch.arange(out.shape[1]) < max(full, 1), 0.0)


@fault(caught_by="parity", kind="boundary", source="static capacity in dispatch buffers", smallest=34)
class CapacityExceeded(Experts):
    """The dispatch buffer has room for 16 rows of each expert; later tokens are lost."""

    def blocks(self, offsets):
        for expert, start, end in super().blocks(offsets):
            last = int(offsets[expert]) + 16
            yield expert, min(start, last), min(end, last)

    def allocate(self, rows, columns):
        return torch.zeros(rows, columns)


@fault(caught_by="parity", kind="boundary", source="int8 expert ids")
class BlockTakesItsFirstRowsExpert(Experts):
    """Tiles cross the experts' borders and take the matrix of their first row's expert."""

    def blocks(self, offsets):
        ends = offsets[1:]
        for start in range(0, int(offsets[-1]), self.rows):
            yield int((ends <= start).sum()), start, min(start + self.rows, int(offsets[-1]))


@fault(caught_by="empty_and_one", kind="boundary")
class OneTokenSqueezed(Experts):
    """A batch of one token loses its batch dimension."""

    def store(self, total, hidden_states):
        return super().store(total, hidden_states).squeeze(0)


@fault(caught_by="empty_and_one", kind="boundary", source="CUDA refuses a grid of 0")
class EmptyBatchRaises(Experts):
    """A launch without programs raises."""

    def combine(self, outs, topk_weights):
        if not len(outs):
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return super().combine(outs, topk_weights)


@fault(caught_by="expert_relabelling", kind="structural", source="expert maps of expert-parallel ranks")
class FirstExpertIsASentinel(Experts):
    """Id 0 marks padding, so the first expert computes nothing."""

    def blocks(self, offsets):
        return (block for block in super().blocks(offsets) if block[0])

    def allocate(self, rows, columns):
        return torch.zeros(rows, columns)


@fault(caught_by="batch_invariance", kind="state", source="vllm#36488, vllm#57016")
class TileChosenByTokens(Experts):
    """Small batches sum in shorter tiles: a token's bits depend on how many others there are."""

    def dispatch(self, topk_ids, num_experts):
        self.depth = 32 if len(topk_ids) > 8 else 16
        return super().dispatch(topk_ids, num_experts)


@fault(caught_by="batch_invariance", kind="state", source="stream-K schedules")
class OrderChosenByPlace(Experts):
    """The lower half of a tile adds up its products backwards: a token's bits depend on its place among the others."""

    def accumulate(self, left, right):
        upper, lower = super().accumulate(left[:8], right), torch.zeros(len(left) - 8, len(right))
        for left_tile, right_tile in reversed(self.tiles(left[8:], right)):
            lower = self.add(lower, self.dot(left_tile, right_tile))
        return torch.cat([upper, lower])


@fault(caught_by="determinism", kind="state", source="Diffulex#37's test_determinism")
class AtomicsOfSplitSums(Experts):
    """Parts of a sum are added up by float atomics, in whatever order they arrive."""

    def __init__(self):
        self.turn = 0

    def tiles(self, left, right):
        self.turn += 1  # stands for the scheduler
        tiles = super().tiles(left, right)
        first = self.turn % len(tiles)
        return tiles[first:] + tiles[:first]
