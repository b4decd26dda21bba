"""Quantized experts, simulated: weights are scaled before they are multiplied, in the tiles of experts."""

import torch

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.quantization import TokenGroups
from gaugeblock.reference import validation


class Int8Experts(Experts):
    """`quantized_experts.fused_swiglu_int8`: each weight times the scale of its row, then as experts."""

    contract = "quantized_experts.fused_swiglu_int8"

    def __call__(self, hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids):
        validation.fused_swiglu_int8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids)
        validation.expert_ids_in_range(topk_ids, num_experts=len(w13))
        scaled_w13, scaled_w2 = self.scaled_gate_up(w13, w13_scales), self.scaled(w2, w2_scales)
        return super().__call__(hidden_states, scaled_w13, scaled_w2, topk_weights, topk_ids)

    def validate(self, *inputs: torch.Tensor) -> None:
        """Done before weights are scaled."""

    def scaled_gate_up(self, w13: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What w13 stands for."""
        return self.scaled(w13, scales)

    def scaled(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What weights stand for, `[E, rows, columns]`, with scales `[E, rows]`."""
        return weights * scales.float()[..., None]


class Fp8Experts(Experts):
    """`quantized_experts.fused_swiglu_fp8`: weights are scaled first; tokens and activations pass through eight bits."""

    contract = "quantized_experts.fused_swiglu_fp8"

    def __call__(self, hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids, *, block_size):
        validation.fused_swiglu_fp8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids, block_size)
        validation.expert_ids_in_range(topk_ids, num_experts=len(w13))
        self.block_size = block_size
        scaled_w13, scaled_w2 = self.scaled_gate_up(w13, w13_scales), self.scaled(w2, w2_scales)
        return super().__call__(hidden_states, scaled_w13, scaled_w2, topk_weights, topk_ids)

    def validate(self, *inputs: torch.Tensor) -> None:
        """Done before weights are scaled."""

    def scaled_gate_up(self, w13: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What w13 stands for."""
        return self.scaled(w13, scales)

    def scaled(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What weights stand for, with a scale for each block."""
        rows, columns = (self.block_of(torch.arange(size)) for size in weights.shape[1:])
        return weights.float() * scales[:, rows][:, :, columns]

    def block_of(self, places: torch.Tensor) -> torch.Tensor:
        """In which block rows or columns lie."""
        return places // self.block_size

    def gather(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """A tile of quantized rows."""
        return super().gather(self.through_eight_bits(hidden_states), tokens)

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the second product gets, quantized."""
        return self.through_eight_bits(super().activate(gate, up))

    def through_eight_bits(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows quantized in groups of columns, and back."""
        quantized, scales = TokenGroups()(rows, group_size=self.block_size)
        return quantized.float() * scales.repeat_interleave(self.block_size, 1)[:, : rows.shape[1]]

    def expert(
        self, hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """As of experts, but that the second product gets eight bits and scales, whatever the dtype of the tokens."""
        return super().expert(hidden, w13, w2, weights, torch.float32)
