"""Bugs in the text of our experts that are scheduled for a CPU."""

from functools import partial

from gaugeblock.conformance.selftest import edits

SWIGLU, GEGLU, MLP, OAI = (f"experts.fused_{name}" for name in ("swiglu", "geglu", "gelu_mlp", "swiglu_oai"))
GPT_OSS = "biased_moe_layers.gpt_oss_moe"

mutant = partial(edits.mutant, implementation="torch-grouped")

mutant(
    SWIGLU, "weight-forgotten", "Nothing is weighted.", "expert_passes._forward",
    "activation.activate(rows, borrow).mul_(batch.weight_B1)", "activation.activate(rows, borrow)", "parity", "structural",
)  # fmt: skip
mutant(
    SWIGLU, "half-of-a-batch", "The second half of a batch's rows is not added.", "expert_passes._forward",
    "out_TH.index_add_(0, batch.token_B, out_BH)",
    "out_TH.index_add_(0, batch.token_B[: len(out_BH) // 2], out_BH[: len(out_BH) // 2])", "parity", "boundary",
)  # fmt: skip
mutant(
    SWIGLU, "weight-missing-in-a-gradient", "The gradient of w2 is of activations without their weights.",
    "expert_passes._SumOfExperts", "batch.each(activation_Bi.mul_(batch.weight_B1))", "batch.each(activation_Bi)",
    "gradients", "gradient",
)  # fmt: skip
mutant(
    SWIGLU, "slope-of-the-sigmoid-alone", "The gate's derivative is its sigmoid.", "expert_activations.Swish",
    "sigmoid_Bi.addcmul_(value_Bi, 1 - sigmoid_Bi, value=self.alpha)", "sigmoid_Bi", "gradients", "gradient",
)  # fmt: skip
mutant(
    GEGLU, "tanh-for-erf", "The approximation is taken for the GELU, whatever is asked for.", "expert_activations.gelu",
    'GeluByTanh() if approximate == "tanh" else GeluByErf()', "GeluByTanh()", "parity", "structural",
)  # fmt: skip
mutant(
    GEGLU, "gradients-swapped", "Gate and up get the gradient of each other.", "expert_activations.Gated",
    "return d_activation_Bi.mul_(up_Bi).mul_(slope_Bi), d_up_Bi", "return d_up_Bi, d_activation_Bi.mul_(up_Bi).mul_(slope_Bi)",
    "gradients", "gradient",
)  # fmt: skip
mutant(
    MLP, "density-not-normalized", "The derivative has the exponential without its factor.", "expert_activations.GeluByErf",
    ".mul_(1 / math.sqrt(2 * math.pi))", "", "gradients", "gradient",
)  # fmt: skip
mutant(
    MLP, "cube-differentiated-as-a-number", "The derivative of x**3 is taken for x**2.", "expert_activations.GeluByTanh",
    "3 * self.CUBIC", "self.CUBIC", "gradients", "gradient",
)  # fmt: skip
mutant(
    MLP, "bias-not-weighted", "The second bias is added once for each choice.", "expert_passes._forward",
    "per_sample_weights=topk_weights.to(hidden_TH.dtype)", "per_sample_weights=torch.ones_like(topk_weights).to(hidden_TH.dtype)",
    "parity", "structural",
)  # fmt: skip
mutant(
    MLP, "bias-of-the-first-expert", "Every expert adds expert 0's bias.", "expert_passes._forward",
    "biases_ES1f[product][expert]", "biases_ES1f[product][0]", "parity", "structural", "vllm#57092",
)  # fmt: skip
mutant(
    MLP, "bias-gradient-not-weighted", "The second bias gets the gradients of its rows without their weights.",
    "expert_rows.Routes", "per_sample_weights=self.weight_N, ", "per_sample_weights=torch.ones_like(self.weight_N), ",
    "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "bias-missing-in-a-gradient", "A weight's gradient has nothing of the second bias.", "expert_passes._SumOfExperts",
    "if d_topk_weights is not None and b2 is not None:", "if False:", "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "up-before-gate", "Even rows are taken for up.", "expert_activations.ClampedGated",
    "gate_Bi, up_1_Bi = self._clamped(rows[0], borrow)", "gate_Bi, up_1_Bi = self._clamped(rows[0].roll(1, 1), borrow)",
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "clamp-from-below-too", "The gate is clamped on either side, as up is.", "expert_activations.ClampedGated",
    "torch.clamp(rows[:, 0::2], max=self.limit", "torch.clamp(rows[:, 0::2], -self.limit, self.limit",
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "one-forgotten", "The gate is multiplied by up, not by up + 1.", "expert_activations.ClampedGated", ".add_(1)", "",
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "gradient-passes-the-clamp", "A clamped gate gets a gradient as if it were not.", "expert_activations.ClampedGated",
    "rows[0][:, 0::2] <= self.limit", "rows[0][:, 0::2] < torch.inf", "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "up-passes-the-clamp-from-below", "Up gets a gradient below its lower limit.", "expert_activations.ClampedGated",
    ".abs() <= self.limit", " <= self.limit", "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "alpha-missing-in-the-slope", "The gate's derivative is that of a SiLU.", "expert_activations.Swish",
    "value=self.alpha", "value=1", "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "experts-without-rows-unwritten", "The gradients of experts without rows are whatever memory holds.",
    "expert_rows.gradient_of", "gradient[before + 1 : after].zero_()", "pass", "fully_written", "memory",
)  # fmt: skip
mutant(
    GPT_OSS, "weights-not-renormalized", "The weights of the chosen are their probabilities among all.",
    "biased_moe_layers.PARTS", "routers.topk_softmax", "partial(routers.softmax_topk, renormalize=False)",
    "parity", "structural",
)  # fmt: skip
