"""A small run, its steps, and what becomes of saved ones that is none any more; for torch and for JAX."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from gaugeblock.reference.configs import DiTConfig, EMAConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import data_order
from gaugeblock.reference.torch import train_image_diffusion as trainer

MODEL = DiTConfig(
    input_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False,
    frequency_embedding_size=8,
)  # fmt: skip
CONFIG = ImageDiffusionConfig(MODEL, seed=5, learning_rate=1e-2, label_dropout=0.4, weight_decay=0.1, ema=EMAConfig())
STEPS, BATCH_SIZE, EXAMPLES = 5, 6, 10


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(config: ImageDiffusionConfig = CONFIG) -> dict[str, torch.Tensor]:
    """In float64, nothing of which is 0."""
    return {
        name: each if name == "step" else each.double() + 0.1 * draws(*each.shape, seed=config.seed + place).abs()
        for place, (name, each) in enumerate(trainer.initial_state(config).items())
    }


def batch_of_step(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and ids, in the order of the run."""
    ids = data_order.batch_ids(step, batch_size=BATCH_SIZE, num_examples=EXAMPLES, seed=CONFIG.seed)
    return draws(EXAMPLES, 3, 4, 4)[ids], ids % 3, ids


def spoil(path: Path, how: str) -> None:
    """Make a saved run one that is none."""
    files = sorted(each for each in (path / "state").rglob("*") if each.is_file())
    largest = max(files, key=lambda each: each.stat().st_size)
    match how:
        case "cut off":
            largest.write_bytes(largest.read_bytes()[:-1])
        case "a file less":
            largest.unlink()
        case "no description":
            (path / "run.json").unlink()
        case "a foreign description":
            (path / "run.json").write_text('{"name": "not a run"}')
        case "half a description":
            (path / "run.json").write_bytes((path / "run.json").read_bytes()[:100])
        case "other content":
            largest.write_bytes(bytes(largest.stat().st_size))
        case "another shape":
            description = json.loads((path / "run.json").read_text())
            description["entries"]["model.final_layer.linear.bias"][1] = [7]
            (path / "run.json").write_text(json.dumps(description))


SPOILT = {
    "cut off": r"path must hold state/.* of \d+ bytes, got .*step_00000000, where it has \d+",
    "a file less": r"path must hold state/.* of \d+ bytes, got .*, where it has None",
    "no description": r"path must be a folder with a saved run, got .*, whose run\.json does not say so: FileNotFoundError",
    "a foreign description": r"path must be a folder with a saved run, got .*, whose run\.json does not say so: KeyError",
    "half a description": r"path must be a folder with a saved run, got .*, whose run\.json does not say so: JSONDecodeError",
    "another shape": r"path must hold model\.final_layer\.linear\.bias as \['float64', \[12\]\], got .* \['float64', \[7\]\]",
    "other content": r"path must hold whole files of a saved run, got ",
}
OTHERS = {
    "learning_rate": ({"learning_rate": 0.5}, r"learning_rate 0\.5, got .*, whose has 0\.01"),
    "model.depth": ({"model": replace(CONFIG.model, depth=2)}, r"model\.depth 2, got .*, whose has 1"),
    "ema": ({"ema": EMAConfig(decay=0.5)}, r"ema\.decay 0\.5, got .*, whose has 0\.9999"),
    "no ema": ({"ema": None}, r"ema null, got .*, whose has no such field"),
    "optimizer": ({"optimizer": "sgd"}, r"optimizer \"sgd\", got .*, whose has \"adamw\""),
}
