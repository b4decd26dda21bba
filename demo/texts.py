"""This repository's documents and docstrings as they once were, as tokens that are characters, and how like them samples are.

    python demo/texts.py             writes documents.txt anew, from the documents as they are; the trained model goes with it

Of documents.txt every sixteenth stretch is held out: no model is trained on it.
"""

import ast
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gaugeblock.reference.torch import data_order

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "documents.txt"
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
MASK_ID = len(ALPHABET)  # the token after all characters
STRETCH, HELD_OUT = 1024, 16
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
SPELLED = str.maketrans({"–": "-", "×": "x", "→": "->", "·": "*", "σ": "sigma", "Σ": "sum", "µ": "u"})


def collect() -> str:
    """The documents without tables and code, and the docstrings of the references, each paragraph once, in ASCII."""
    documents = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "gaugeblock"} & {*path.relative_to(ROOT).parts})
    sources = sorted((ROOT / "reference" / "torch").glob("*.py"))
    paragraphs = [each for path in documents for each in prose(path.read_text())]
    for path in sources:
        with_docstring = ast.Module | ast.FunctionDef | ast.ClassDef
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, with_docstring)]
        paragraphs += [each for node in nodes for each in (ast.get_docstring(node) or "").split("\n\n")]
    text = "\n\n".join(dict.fromkeys(each.rstrip() for each in paragraphs if each.strip()))
    ascii_text = unicodedata.normalize("NFKD", text.translate(SPELLED)).encode("ascii", "ignore").decode()
    return "\n".join(line.rstrip() for line in ascii_text.split("\n"))


def prose(document: str) -> Iterator[str]:
    """The paragraphs of a Markdown document that are neither tables nor code."""
    for part in document.split("```")[::2]:
        yield from (
            "\n".join(line for line in each.split("\n") if line[:1] not in ("|", "!", "#")) for each in part.split("\n\n")
        )


def encode(text: str) -> torch.Tensor:
    """Token ids, [len(text)] int64."""
    return torch.tensor([ALPHABET.index(each) for each in text], dtype=torch.int64)


def decode(ids: torch.Tensor) -> str:
    """The text of ids [N]; a mask is an underscore."""
    return "".join((ALPHABET + "_")[each] for each in ids.tolist())


def texts() -> tuple[str, str]:
    """What is trained on, and what is held out."""
    text = FILE.read_text()
    stretches = [text[start : start + STRETCH] for start in range(0, len(text), STRETCH)]
    held_out = stretches[HELD_OUT - 1 :: HELD_OUT]
    return "".join(each for place, each in enumerate(stretches) if place % HELD_OUT != HELD_OUT - 1), "".join(held_out)


def batches(num_steps: int, batch_size: int, length: int, seed: int) -> Iterator[Batch]:
    """Each step's sequences: tokens, labels, samples and ids. A sequence begins at any place of the text, which is its id."""
    ids = encode(texts()[0])
    for step in range(num_steps):
        starts = data_order.batch_ids(step, batch_size=batch_size, num_examples=len(ids) - length + 1, seed=seed)
        tokens = ids[starts[:, None] + torch.arange(length)]
        yield tokens, tokens, torch.zeros_like(tokens), starts


def of_sequences(text: str, length: int) -> Batch:
    """A text cut into sequences, as `batches` has them; what is left at the end is left out."""
    ids = encode(text)
    tokens = ids[: len(ids) // length * length].view(-1, length)
    return tokens, tokens, torch.zeros_like(tokens), torch.arange(len(tokens))


def unigram_bits(text: str) -> float:
    """Bits per character of a text, by how often each character stands in it."""
    shares = np.array(list(Counter(text).values())) / len(text)
    return float(-(shares * np.log2(shares)).sum())


def likeness(samples: list[str]) -> tuple[float, float]:
    """The shares of the samples' words, and of all that is three characters long, that stand in the text trained on.

    Words are of three letters or more, and neither the first of a sample nor the last, which may be cut.
    """
    text = texts()[0]
    known_words, known_parts = set(words(text)), {text[place : place + 3] for place in range(len(text) - 2)}
    of_words = [each in known_words for sample in samples for each in words(sample)[1:-1]]
    of_parts = [sample[place : place + 3] in known_parts for sample in samples for place in range(len(sample) - 2)]
    return float(np.mean(of_words)), float(np.mean(of_parts))


def words(text: str) -> list[str]:
    """What stands between other characters than letters, in lower case; of three letters or more."""
    letters = "".join(each if each.isalpha() else " " for each in text.lower())
    return [each for each in letters.split() if len(each) > 2]


if __name__ == "__main__":
    FILE.write_text(collect())
    print(f"{FILE}: {len(FILE.read_text())} characters")
