"""Bugs in the text of our Triton experts of int8 weights."""

from gaugeblock.conformance.selftest.edits import mutant

INT8 = "quantized_experts.fused_swiglu_int8"
PRODUCTS, GATE_UP = "quantized_experts._add_products", "quantized_experts._gate_and_up"
ROWS, BACKWARD = "quantized_experts._rows_times_quantized_kernel", "quantized_experts._through_activation_kernel"

mutant(
    INT8, "ups-have-the-scales-of-gates", "Up rows are scaled as the gate rows of their columns.", GATE_UP,
    "scales_ptr + ups * scales_stride", "scales_ptr + columns * scales_stride", "parity", "structural",
)  # fmt: skip
mutant(
    INT8, "scales-of-the-first-expert", "The second product has the scales of expert 0.", ROWS,
    "expert * scales_expert_stride", "expert * 0", "parity", "structural", "vllm#57092",
)  # fmt: skip
mutant(
    INT8, "weights-without-signs", "Weights are read as integers of 0 to 255.", PRODUCTS,
    "matrix.to(left.dtype)", "matrix.to(tl.uint8).to(left.dtype)", "parity", "structural",
)  # fmt: skip
mutant(
    INT8, "scale-stride-ignored", "The scales of columns are taken to lie side by side.", ROWS,
    "columns * scales_stride", "columns", "layout", "memory", "Liger-Kernel#1377",
)  # fmt: skip
mutant(
    INT8, "scales-past-the-end", "The mask of a sum is off by one: a row and a scale too many.", PRODUCTS,
    "steps < depth", "steps <= depth", "out_of_bounds", "memory",
)  # fmt: skip
mutant(
    INT8, "gradients-without-scales", "Backward, weights are the integers that they are held in.", PRODUCTS,
    "(matrix * scales[:, None]).to(left.dtype)", "matrix.to(left.dtype)", "gradients", "gradient",
)  # fmt: skip
mutant(
    INT8, "scales-of-the-depth-not-moved-on", "Backward, every tile of rows has the scales of the first.", PRODUCTS,
    "scales_ptr + steps * scales_stride", "scales_ptr + (steps - first) * scales_stride", "gradients", "gradient", "vllm#49596",
)  # fmt: skip
mutant(
    INT8, "router-weight-forgotten", "The gradient of a token does not know its router weights.", BACKWARD,
    "slope = tl.load(weight_ptrs) * product", "slope = product", "gradients", "gradient",
)  # fmt: skip
mutant(
    INT8, "tf32-left-on", "Operands are rounded to tf32, as is tl.dot's default.", PRODUCTS,
    'input_precision="ieee"', 'input_precision="tf32"', "parity", "precision", "triton#5895",
)  # fmt: skip
