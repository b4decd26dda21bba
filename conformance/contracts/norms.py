"""Contracts of norms with parameters."""

import math
from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed, of_another_dtype
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import norms


@row
def rms_norm() -> Contract:
    """The row of `norms.rms_norm`."""
    return Contract(
        name="norms.rms_norm",
        summary="Each row is divided by its root mean square, then scaled; rows may be tokens or heads, of any leading axes.",
        formula="out = x / sqrt(mean(x**2) + eps) * weight",
        source="Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4",
        reference=norms.rms_norm,
        inputs=(TOKENS, _parameter("weight", "hidden_size")),
        outputs=(Output("out", TOKENS.shape, differentiable=True),),
        regimes=_regimes(TOKENS, _of_all_sizes, "weight"),
        flops=lambda parameters: 4.0 * elements(TOKENS, parameters),
        rejections=REJECTIONS,
        **OF_ROWS,
    )


@row
def layer_norm_affine() -> Contract:
    """The row of `norms.layer_norm_affine`."""
    return Contract(
        name="norms.layer_norm_affine",
        summary="Each row is normalized to mean 0 and variance 1, then scaled and shifted.",
        formula="out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias",
        source="Ba et al. 2016 (arXiv:1607.06450), equation 4",
        reference=norms.layer_norm_affine,
        inputs=(TOKENS, _parameter("weight", "hidden_size"), _parameter("bias", "hidden_size")),
        outputs=(Output("out", TOKENS.shape, differentiable=True),),
        regimes=_regimes(TOKENS, _far_from_zero, "weight", "bias"),
        flops=lambda parameters: 8.0 * elements(TOKENS, parameters),
        rejections=(*REJECTIONS, Rejection("bias of another dtype", "bias", changed("bias", of_another_dtype))),
        **OF_ROWS,
    )


@row
def group_norm() -> Contract:
    """The row of `norms.group_norm`."""
    return Contract(
        name="norms.group_norm",
        summary="Groups of an image's channels are normalized to mean 0 and variance 1, then each channel is scaled and shifted.",
        formula="out[b, c] = (x[b, c] - mean) / sqrt(variance + eps) * weight[c] + bias[c], of all pixels in c's group of x[b]",
        source="Wu and He 2018 (arXiv:1803.08494), section 3",
        reference=norms.group_norm,
        flops=lambda parameters: 8.0 * elements(IMAGES, parameters),
        **OF_IMAGES,
    )


@row
def group_norm_silu() -> Contract:
    """The row of `norms.group_norm_silu`."""
    return Contract(
        name="norms.group_norm_silu",
        summary="A GroupNorm, and silu of its result before that is rounded.",
        formula="out = silu(group_norm(x, weight, bias)), silu(y) = y * sigmoid(y)",
        source="Ho et al. 2020 (arXiv:2006.11239), appendix B; diffusers resnet.py, class ResnetBlock2D",
        reference=norms.group_norm_silu,
        flops=lambda parameters: 13.0 * elements(IMAGES, parameters),
        **OF_IMAGES,
    )


def elements(spec: Input, parameters: Parameters) -> int:
    """Of an input."""
    return math.prod(spec.sizes(parameters))


def rows(batch_size: int, num_tokens: int, hidden_size: int, eps: float = 1e-6) -> dict[str, Any]:
    """One point of the input space of a norm of rows."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, "hidden_size": hidden_size, "eps": eps}


def groups(
    batch_size: int, num_groups: int, channels_per_group: int, height: int, width: int, eps: float = 1e-6
) -> dict[str, Any]:
    """One point of the input space of a norm of groups."""
    sizes = {"batch_size": batch_size, "num_groups": num_groups, "channels": num_groups * channels_per_group}
    return sizes | {"height": height, "width": width, "eps": eps}


def _of_several_numbers(channels_per_group: int, height: int, width: int, **others: Any) -> dict[str, Any] | None:
    """None where a group is one number, which is always 0 and which torch refuses."""
    if channels_per_group * height * width == 1:
        return None
    return groups(channels_per_group=channels_per_group, height=height, width=width, **others)


def _at_start(tensors: Tensors) -> Tensors:
    return {name: torch.full_like(tensors[name], mean) for name, mean in MEANS.items() if name in tensors}


def _channels_apart(tensors: Tensors) -> Tensors:
    """Images of which each channel has values around a mean of its own: those of a group differ by more than their pixels."""
    means = 4 * torch.arange(tensors["images"].shape[1], dtype=torch.float64).remainder(5)[:, None, None]
    return {"images": means + (tensors["images"] + 2).remainder(4) - 2}


def _rows_of(spec: Input, parameters: Parameters) -> tuple[int, int, int]:
    """Examples, rows or groups of each, and how many numbers are normalized together."""
    each = parameters["num_groups" if spec is IMAGES else "num_tokens"]
    size = math.prod(spec.sizes(parameters)[1:]) // each
    return parameters["batch_size"], each, size


Values = Callable[[Draw, tuple[int, int, int], float], torch.Tensor]


def _ordinary(draw: Draw, shape: tuple[int, int, int], eps: float) -> torch.Tensor:
    return draw.normal(*shape)


def _near_constant(draw: Draw, shape: tuple[int, int, int], eps: float) -> torch.Tensor:
    """Rows whose variance is from a hundredth to a hundred times eps."""
    return draw.normal(*shape) * eps**0.5 * 10 ** (2 * draw.uniform(*shape[:2], 1) - 1)


def _of_all_sizes(draw: Draw, shape: tuple[int, int, int], eps: float) -> torch.Tensor:
    """Rows from 2^-8 to 2^12, whose squares float16 does not hold."""
    return draw.normal(*shape) * torch.exp2(draw.integers(-8, 13, *shape[:2], 1).to(torch.float64))


def _far_from_zero(draw: Draw, shape: tuple[int, int, int], eps: float) -> torch.Tensor:
    """Rows whose mean is up to a thousand times their deviation, which is from 2^-4 to 2^4."""
    means = (1 - 2 * draw.integers(0, 2, *shape[:2], 1)) * 10 ** (3 * draw.uniform(*shape[:2], 1))
    return (draw.normal(*shape) + means) * torch.exp2(draw.integers(-4, 5, *shape[:2], 1).to(torch.float64))


def _with_a_bad_row(draw: Draw, shape: tuple[int, int, int], eps: float) -> torch.Tensor:
    """A row with a NaN in one example, one with an infinity in the last."""
    values = draw.normal(*shape)
    values[shape[0] // 2, 0, -1] = torch.nan
    values[-1, -1, 0] = torch.inf
    return values


def _regimes(spec: Input, adversarial: Values, *steering: str) -> tuple[Regime, ...]:
    """Of a norm of this input; values are drawn row by row, or group by group."""

    def made(values: Values) -> Callable[[Draw, Parameters], Tensors]:
        def make(draw: Draw, parameters: Parameters) -> Tensors:
            drawn = values(draw, _rows_of(spec, parameters), parameters["eps"])
            width = parameters[STEERED[spec.name]]
            steers = {name: MEANS[name] + 0.5 * draw.normal(width) for name in steering}
            return {spec.name: drawn.reshape(spec.sizes(parameters)), **steers}

        return make

    return (
        Regime("dithered", made(_ordinary)),
        Regime("constants", made(_near_constant)),
        # without gradients, as of layers.layer_norm_modulate
        Regime("adversarial", made(adversarial), "worst element", differentiable=False),
        Regime("special", made(_with_a_bad_row), "worst element", differentiable=False),
    )


def _no_divisor(channels: int) -> int:
    return channels - 1 if channels > 2 else channels + 1


def _parameter(name: str, size: str) -> Input:
    return Input(name, (size,), differentiable=True)


MEANS = {"weight": 1.0, "bias": 0.0}
STEERED = {"hidden_states": "hidden_size", "images": "channels"}
TOKENS = Input("hidden_states", ("batch_size", "num_tokens", "hidden_size"), differentiable=True, any_rank=True)
IMAGES = Input("images", ("batch_size", "channels", "height", "width"), differentiable=True)
OURS = (triton(), compiled("compiled", devices=("cuda",)))  # on a CPU every kind of call takes seconds to compile
REJECTIONS = (
    Rejection("hidden_states of no axes", "hidden_states", changed("hidden_states", lambda each: each.flatten()[0])),
    Rejection("weight of another dtype", "weight", changed("weight", of_another_dtype)),
    Rejection("eps of 0", "eps", lambda call: {"eps": 0.0}),
)
OF_ROWS: dict[str, Any] = {
    "options": ("eps",),
    "batch": "batch_size",
    "landmarks": (
        rows(2, 17, 100),  # tails everywhere
        rows(2, 48, 64),  # heads of an attention: many rows to a program
        rows(3, 4, 128, 1e-5),
        rows(3, 7, 1152),  # more rows than programs
        rows(1, 1025, 4),
        rows(2, 1, 8200),  # wider than a program's registers
    ),
    "factors": (
        edges("batch_size", 1, 2, 3),
        edges("num_tokens", 1, 2, 15, 16, 17, 33),
        kinds("hidden_size", kind_of_width, 2, 16, 31, 100),
        either("eps", 1e-6, 1e-5, 1e-3),
    ),
    "build": rows,
    "traits": (Trait("1, as at the start of a training", "weight", _at_start),),
    "workloads": (
        Workload(
            "flux-1/1024px-queries", rows(4608, 24, 128), "black-forest-labs/FLUX.1-dev, 24 heads of 128; 4096 + 512 tokens"
        ),
        Workload("mixtral-8x7b/prefill-4096", rows(4096, 1, 4096, 1e-5), "mistralai/Mixtral-8x7B-v0.1 config.json"),
        Workload("deepseek-v3/prefill-4096", rows(4096, 1, 7168), "deepseek-ai/DeepSeek-V3 config.json"),
        Workload("two-cores/prefill-512", rows(512, 1, 1024), "a size for a CPU"),
        Workload("llama-3.1-405b/prefill-1024", rows(1024, 1, 16384, 1e-5), "meta-llama/Llama-3.1-405B config.json"),
    ),
    "cases": 0.3,
    "implementations": OURS,
}
OF_IMAGES: dict[str, Any] = {
    "inputs": (IMAGES, _parameter("weight", "channels"), _parameter("bias", "channels")),
    "outputs": (Output("out", IMAGES.shape, differentiable=True),),
    "options": ("num_groups", "eps"),
    "batch": "batch_size",
    "landmarks": (
        groups(2, 3, 5, 7, 9),  # tails everywhere
        groups(2, 1, 16, 32, 48),  # a group that several programs share
        groups(3, 32, 2, 4, 4, 1e-5),
        groups(2, 2, 40, 8, 8, 1e-5),  # the proportions of Stable Diffusion's deepest level
        groups(1, 2, 3, 67, 93),  # such a group, with tails
        groups(2, 4, 70, 1, 1),
    ),
    "factors": (
        edges("batch_size", 1, 2, 3),
        edges("num_groups", 1, 2, 3, 4),
        edges("channels_per_group", 1, 2, 3, 8, 17, of=lambda sizes: sizes["channels"] // sizes["num_groups"]),
        kinds("height", kind_of_width, 1, 2, 5, 16),
        kinds("width", kind_of_width, 1, 2, 7, 16),
        either("eps", 1e-6, 1e-5, 1e-3),
    ),
    "build": _of_several_numbers,
    "traits": (
        Trait("1 and 0, as at the start of a training", "parameters", _at_start),
        Trait("means of their own", "channels", _channels_apart),
    ),
    "regimes": _regimes(IMAGES, _far_from_zero, "weight", "bias"),
    "workloads": (
        Workload(
            "stable-diffusion-1/64px-batch-8", groups(8, 32, 10, 64, 64, 1e-5), "runwayml/stable-diffusion-v1-5 unet/config.json"
        ),
        Workload("stable-diffusion-1/8px-batch-64", groups(64, 32, 40, 8, 8, 1e-5), "the same, its deepest level"),
        Workload(
            "sdxl/128px-batch-8", groups(8, 32, 10, 128, 128, 1e-5), "stabilityai/stable-diffusion-xl-base-1.0 unet/config.json"
        ),
        Workload("sdxl/vae-1024px", groups(1, 32, 4, 1024, 1024), "the same, vae/config.json: its last level"),
        Workload("two-cores/32px", groups(1, 32, 10, 32, 32, 1e-5), "a size for a CPU"),
    ),
    "rejections": (
        Rejection("weight of another dtype", "weight", changed("weight", of_another_dtype)),
        Rejection("bias of another dtype", "bias", changed("bias", of_another_dtype)),
        Rejection("groups of unequal sizes", "num_groups", lambda call: {"num_groups": _no_divisor(call["images"].shape[1])}),
        Rejection("no groups", "num_groups", lambda call: {"num_groups": 0}),
        Rejection("eps of 0", "eps", lambda call: {"eps": 0.0}),
    ),
    "cases": 0.3,
    "implementations": OURS,
}
