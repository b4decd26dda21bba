"""Verdicts of a gate that is larger than there is one: a hundred contracts, eight implementations of each, some of them wrong."""

import random
from collections.abc import Sequence

from gaugeblock.conformance.engine.judging.verdict import Coverage, Failure, Statistics, Status, Verdict

FAMILIES = "routers experts moe_layers layers attention positions dit samplers objectives quantization".split()
WORDS = (
    "softmax topk grouped sigmoid fused swiglu gated residual layer norm modulate rectified flow velocity cached prefill".split()
)
IMPLEMENTATIONS = (  # (kind, name): as many to a contract as are asked for; names that differ by contract have a {}
    ("reference", "reference"), ("reference", "reference-jax"), ("triton", "triton"), ("distributed", "expert-parallel"),
    ("jax", "jax-{}"), ("compiled", "compiled"), ("user", "mychip"), ("user", "another_vendors_kernel-v2"),
)  # fmt: skip
PROPERTIES = (
    "parity gradients accumulation batch_invariance determinism empty_and_one expert_relabelling far_strides fully_written "
    "grad_modes gradient_layout gradient_subsets hidden_state inputs_unchanged layout masked_lanes nan_containment out_of_bounds "
    "path_witness permutation_equivariance process_settings program_order races rejections same_pointer_new_data"
).split()
DTYPES = ("float32", "float16", "bfloat16")
CASE = {"num_tokens": 17, "hidden_size": 40, "top_k": 2, "regime": "dithered", "layout": "contiguous", "seed": 0}
ENVIRONMENT = {"time": "2026-11-20T12:00:00+00:00", "versions": {"gaugeblock": "0", "torch": "2"}, "platform": "a machine"}


def contract_names(number: int) -> list[str]:
    """Names as long as real ones, in families of unequal size."""
    draw = random.Random(0)
    return [
        f"{FAMILIES[place * len(FAMILIES) // number]}.{'_'.join(draw.sample(WORDS, draw.randint(2, 4)))}_{place}"
        for place in range(number)
    ]


def verdicts(
    contracts: int = 100, implementations: int = 8, devices: Sequence[str] = ("cpu",), broken: float = 0.01
) -> list[Verdict]:
    """Verdicts in the gate's order: by contract, then by property; `broken` is the share of subjects that fail somewhere."""
    draw = random.Random(1)
    found = []
    for contract in contract_names(contracts):
        variant = draw.choice(("jit", "grouped", "compiled"))
        subjects = [
            (kind, name.format(variant), dtype, device)
            for kind, name in IMPLEMENTATIONS[:implementations]
            for device in devices
            for dtype in DTYPES
        ]
        bad = {subject: draw.choice(PROPERTIES) for subject in subjects if draw.random() < broken}
        found += [
            _verdict(contract, prop, subject, bad.get(subject) == prop, draw) for prop in PROPERTIES for subject in subjects
        ]
    return found


def _verdict(contract: str, prop: str, subject: tuple[str, str, str, str], broken: bool, draw: random.Random) -> Verdict:
    kind, name, dtype, device = subject
    whose = {"contract": contract, "implementation": name, "kind": kind, "property": prop, "dtype": dtype, "device": device}
    if prop in ("masked_lanes", "path_witness", "program_order", "races") and kind != "triton":
        reason = "only for implementations of kind triton"
        return Verdict(**whose, status="not supported", reason=reason)
    status: Status = draw.choice(("fail", "fail", "crash")) if broken else "warning" if draw.random() < 0.001 else "pass"
    measured = prop in ("parity", "gradients")
    outputs = ("out", "topk_weights") if prop == "parity" else ("gradient of hidden_states", "gradient of w13", "gradient of w2")
    size = 1e4 if broken else 0.8
    statistics = {each: Statistics(*(draw.random() * size for _ in range(3)), 1200) for each in outputs} if measured else {}
    failure = Failure(
        "an element lies far from the oracle", "every element, too small in magnitude", ("worst element out[0, 1] = 0.02",),
        (CASE,), f"from gaugeblock.conformance import reproduction\n\n# {'-' * 1500}\nreproduction.run()\n",
    ) if broken else None  # fmt: skip
    return Verdict(
        **whose, status=status, cases=draw.randint(4, 40), seconds=draw.random(),
        reason="out: an element lies 2.14e+07 times its error budget from the oracle" if broken
        else "visits only 3 of 9 classes: the time was up" if status == "warning" else "",
        statistics=statistics, failure=failure,
        coverage=None if broken else Coverage(draw.randint(20, 149), 149, "pairs", sparing=True),
    )  # fmt: skip
