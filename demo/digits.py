"""The 1797 handwritten digits that scikit-learn ships, how well samples fit them, and pictures of these."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import training
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from gaugeblock.reference.torch import data_order

NAMES = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The images, [N, 1, 8, 8] float32 in [-1, 1], and their digits, [N] int64."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.int64)


def batches(num_steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Images, labels and ids of each step's batch: the data set again and again, each time in another order."""
    images, labels = digits()
    for step in range(num_steps):
        ids = data_order.batch_ids(step, batch_size=batch_size, num_examples=len(images), seed=seed)
        yield images[ids], labels[ids], ids


def accuracy(samples: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples [N, 8, 8] that a classifier trained on the real digits takes for the digit that was asked for."""
    images, real = digits()
    classifier = KNeighborsClassifier(5).fit(images.flatten(1).numpy(), real.numpy())
    return float(classifier.score(samples.reshape(len(samples), 64), labels))


def distances(samples: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How far the means and the deviations of samples [N, 8, 8] lie from those of the data, [2]: root mean squares over pixels.

    Means and deviations are those of each digit by itself; samples are as many of each.
    """
    images, real = digits()
    squares = []
    for digit in range(10):
        ours, theirs = samples[labels == digit], images[real == digit, 0].numpy()
        squares.append([(of(ours, axis=0) - of(theirs, axis=0)) ** 2 for of in (np.mean, np.std)])
    return np.sqrt(np.array(squares).mean(axis=(0, 2, 3)))


def draw_samples(samples: Mapping[str, np.ndarray], path: Path, rows: tuple[str, ...] = ()) -> None:
    """Write samples of each model, [10, samples of a digit, 8, 8], side by side: a row for each digit, named at the left."""
    pyplot = training.pyplot()
    figure, axes = pyplot.subplots(1, len(samples), figsize=(8, 5))
    for axis, (name, each) in zip(axes, samples.items(), strict=True):
        axis.imshow(each.transpose(0, 2, 1, 3).reshape(80, -1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks(8 * np.arange(len(rows)) + 3.5, rows)
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
