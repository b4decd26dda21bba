"""Let the small SDAR of `train_text.py` write, by each way to decode it.

    python demo/sample_text.py [--new-tokens 48]

SDAR's loops keep finished blocks in a cache. LLaDA's and Dream's pass over the whole sequence, of which each token sees its block
and those before it, so that they too go block by block. Prints a sample of each, how many characters a pass decided, and which
share of twelve samples' words and of all that is three characters long stand in the text that was trained on.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import texts
import torch
from safetensors.torch import load_file
from train_text import LENGTH, MODEL, SEED

from gaugeblock.optimized.jax import sdar as jax_sdar
from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARDecodingConfig
from gaugeblock.reference.jax import decoding as jax_decoding
from gaugeblock.reference.torch import decoding, sdar

FILE = Path(__file__).parent / "text_model.safetensors"
SIZE = MODEL.block_length
TEMPERATURE = 0.6
COMMON: dict[str, Any] = {"mask_id": texts.MASK_ID, "temperature": TEMPERATURE}
OF_SDAR = SDARDecodingConfig(  # a model of characters is seldom as sure as one of words
    **COMMON, block_length=SIZE, steps=SIZE, threshold=0.5, entropy_bound=1.0
)
OF_DREAM = DreamDecodingConfig(**COMMON, new_tokens=SIZE, steps=SIZE, algorithm="entropy")
HALF = SIZE // 2  # passes of what decides two characters in each


@dataclass(frozen=True)
class Framework:
    """What loops need of one."""

    decoding: ModuleType
    model: ModuleType
    to_array: Callable[[torch.Tensor], Any]


TORCH = Framework(decoding, sdar, lambda tensor: tensor)
JAX = Framework(jax_decoding, jax_sdar, lambda tensor: jnp.asarray(tensor.numpy()))


def load(path: Path) -> dict[str, torch.Tensor]:
    """The parameters, float32."""
    return {name: each.float() for name, each in load_file(path).items()}


def ways(new_tokens: int) -> dict[str, SDARDecodingConfig | LLaDADecodingConfig | DreamDecodingConfig]:
    """How samples of so many characters, a whole number of blocks, are decoded."""
    of_sdar = replace(OF_SDAR, new_tokens=new_tokens)
    of_llada = LLaDADecodingConfig(**COMMON, new_tokens=new_tokens, block_length=SIZE, steps=new_tokens)
    return {
        "SDAR, static": replace(of_sdar, strategy="static"),
        "SDAR, static, 2 at a time": replace(of_sdar, strategy="static", steps=HALF),
        "SDAR, sequential": replace(of_sdar, strategy="sequential"),
        "SDAR, dynamic": replace(of_sdar, strategy="dynamic"),
        "SDAR, entropy-bounded": replace(of_sdar, strategy="entropy_bounded"),
        "LLaDA, low confidence": of_llada,
        "LLaDA, random": replace(of_llada, remasking="random"),
        "Dream, entropy": OF_DREAM,
        "Dream, margin": replace(OF_DREAM, algorithm="topk_margin"),
        "Dream, origin": replace(OF_DREAM, algorithm="origin"),
    }


def sample(
    parameters: dict[str, torch.Tensor], prompts: torch.Tensor, new_tokens: int, how: Any, framework: Framework = TORCH
) -> tuple[torch.Tensor, int]:
    """Decode after prompts, [N, whole blocks], and count the passes that decide something.

    Returns:
        ids: [N, new_tokens].
        passes: Over all blocks together.
    """
    passes = [0]

    def counted(model: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            passes[0] += 1
            return model(*arguments)

        return call

    loops, state = framework.decoding, {name: framework.to_array(each) for name, each in parameters.items()}
    whole = counted(partial(framework.model.sdar, state, config=MODEL))
    ids, examples = framework.to_array(prompts), framework.to_array(torch.arange(len(prompts)))
    with torch.no_grad():
        if isinstance(how, SDARDecodingConfig):
            model = loops.with_cache(framework.model.sdar_cached, state, config=MODEL)
            model = replace(model, denoise=counted(model.denoise))
            ids = loops.sdar_generate(model, ids, examples, config=how, seed=SEED)
        elif isinstance(how, LLaDADecodingConfig):
            ids = loops.llada_generate(whole, ids, examples, config=how, seed=SEED)
        else:
            for block in range(new_tokens // SIZE):
                ids = loops.dream_generate(whole, ids, examples, config=how, seed=SEED + block)
    made = ids if framework is TORCH else torch.tensor(ids.tolist())
    return made[:, prompts.shape[1] :], passes[0]


def prompts_of(text: str, count: int, length: int) -> torch.Tensor:
    """How as many paragraphs of a text begin, [count, length]; of the first one the beginning may be missing."""
    paragraphs = [each for each in text.split("\n\n")[1:] if len(each) >= length]
    return torch.stack([texts.encode(each[:length]) for each in paragraphs[:count]])


def main(arguments: list[str]) -> int:
    """Samples, and says how good they are."""
    parser = argparse.ArgumentParser(description="Let the small SDAR write.")
    parser.add_argument("--model", type=Path, default=FILE, help="the parameters (default: text_model.safetensors here)")
    parser.add_argument("--new-tokens", type=int, default=48, help="characters of a sample, a multiple of 4 (default: 48)")
    options = parser.parse_args(arguments)
    parameters, prompts = load(options.model), prompts_of(texts.texts()[1], 12, LENGTH - 48)
    print(f"after {texts.decode(prompts[0])!r}:")
    for name, how in ways(options.new_tokens).items():
        ids, _ = sample(parameters, prompts, options.new_tokens, how)
        alone, passes = sample(parameters, prompts[:1], options.new_tokens, how)  # together, all wait for the least sure
        known_words, known_parts = texts.likeness([texts.decode(row) for row in ids])
        of_text = f"{known_words:.0%} of words and {known_parts:.0%} of three characters are the text's"
        print(f"{name}: {options.new_tokens / passes:.1f} characters a pass; {of_text}")
        print(f"    {texts.decode(alone[0])!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
