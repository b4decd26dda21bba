"""The 1797 handwritten digits that scikit-learn ships, and how well samples fit them."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The images, [N, 1, 8, 8] float32 in [-1, 1], and their digits, [N] int64."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.int64)


def batches(num_steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Images, labels and ids of each step's batch: the data set again and again, each time in another order."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-num_steps * batch_size // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for chosen in order[: num_steps * batch_size].view(num_steps, batch_size):
        yield images[chosen], labels[chosen], chosen


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
