"""Which tokens a language model's logits choose, and how sure it is of them.

What is drawn is drawn by given uniform numbers. Of equal logits the token of the lowest id comes first.

Shapes: N num_rows, V vocabulary_size.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import TokenConfidence
from gaugeblock.reference.torch.precision import at_least_float32


def filter_logits(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, top_k_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide logits by the temperature and drop all tokens but the most probable ones.

        z = logits / temperature
        p = softmax(z), of the top_k alone if top_k_first
        before[v] = sum of the p of the tokens with higher logits, and of those with lower ids among equal ones
        kept = (logits >= the top_k-th highest logit) and (before <= top_p)
        out = z where kept, else -inf

    Args:
        logits: [num_rows, vocabulary_size], any floating dtype; -inf forbids a token.
        temperature: Positive.
        top_k: How many are kept, and all that equal the last of them; 0 for all.
        top_p: How much of the probability is kept, in (0, 1], and the token with which it is exceeded; 1 for all.
        top_k_first: Whether probabilities are those of the top_k alone, as in SDAR, or of all, as in Dream.

    Returns:
        filtered: [num_rows, vocabulary_size], float32 (float64 for float64 logits).
        kept: [num_rows, vocabulary_size], bool.

    Raises:
        TypeError: `logits` is not a floating array, or an option is of another kind.
        ValueError: `logits` is not of rank 2 or has no columns, or an option is out of its range.

    Source: Holtzman et al. (arXiv:1904.09751), section 3.1; JetLM/SDAR, generate.py; Dream, generation_utils.py.
    """
    validation.filter_logits(logits, temperature, top_k, top_p, top_k_first)

    before_NV = probability_before(logits, temperature=temperature, top_k=top_k, top_p=top_p, top_k_first=top_k_first)
    kept_NV = before_NV <= top_p
    return torch.where(kept_NV, at_least_float32(logits) / temperature, -torch.inf), kept_NV


def probability_before(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, top_k_first: bool) -> torch.Tensor:
    """Return by what `filter_logits` keeps tokens, `before`: 0 of all in the top_k if top_p is 1, infinity outside of them."""
    logits_NV = at_least_float32(logits)
    ids_NV = torch.sort(logits_NV, dim=-1, descending=True, stable=True).indices
    last_N1 = logits_NV.gather(-1, ids_NV[:, (top_k or logits_NV.shape[1]) - 1, None])
    in_top_k_NV = logits_NV >= last_N1
    before_NV = torch.zeros_like(logits_NV)
    if top_p < 1:
        tempered_NV = logits_NV / temperature
        probs_NV = torch.softmax(tempered_NV.masked_fill(~in_top_k_NV, -torch.inf) if top_k_first else tempered_NV, dim=-1)
        sums_NV = probs_NV.gather(-1, ids_NV).cumsum(dim=-1)
        before_NV = before_NV.scatter(-1, ids_NV, torch.nn.functional.pad(sums_NV[:, :-1], (1, 0)))
    return before_NV.masked_fill(~in_top_k_NV, torch.inf)


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor | None, *, temperature: float, confidence: TokenConfidence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of softmax(logits / temperature) in each row, and say how sure the model is, without the draw.

        id = argmax(logits / temperature - ln(-ln(uniforms)))  at a positive temperature
        id = argmax(logits)                                    at 0
        confidence: as `token_confidence`

    Args:
        logits: [num_rows, vocabulary_size], any floating dtype; -inf forbids a token.
        uniforms: [num_rows, vocabulary_size], float32 in [0, 1); None at temperature 0.
        temperature: 0 or more.
        confidence: Of what kind: see `token_confidence`.

    Returns:
        token_ids: [num_rows], int64; of equal scores the lowest id. A row with a NaN gets any.
        confidences: [num_rows], float32 (float64 for float64 logits).

    Raises:
        TypeError: An array is not of the dtype above, or `temperature` is not a number.
        ValueError: A shape or device is wrong, a value is out of its range, or uniforms are missing.

    Source: Gumbel-max: Maddison et al. (arXiv:1411.0030), section 2. LLaDA draws in float64, argmax(exp(l) / (-ln u)**T).
    """
    validation.draw_tokens(logits, uniforms, temperature, confidence)

    scores_NV = at_least_float32(logits)
    if uniforms is not None and temperature > 0:
        scores_NV = scores_NV / temperature + gumbel(uniforms.to(scores_NV.dtype))
    ids_N = scores_NV.argmax(dim=-1)
    return ids_N, token_confidence(logits, ids_N, confidence=confidence)


def token_confidence(logits: torch.Tensor, token_ids: torch.Tensor, *, confidence: TokenConfidence) -> torch.Tensor:
    """Return how sure a model is of a token, by p = softmax(logits).

        probability       p[token_id]
        margin            the highest p less the second
        negative_entropy  sum(p * ln(p))

    Public loops add 1e-10 to the p within the logarithm (Dream), or take 1e-12 at least (SDAR).

    Args:
        logits: [num_rows, vocabulary_size], any floating dtype; for a margin at least two tokens.
        token_ids: [num_rows], integer.
        confidence: Of what kind.

    Returns:
        [num_rows], float32 (float64 for float64 logits).
    """
    probs_NV = torch.softmax(at_least_float32(logits), dim=-1)
    match confidence:
        case "probability":
            return probs_NV.gather(-1, token_ids[:, None].to(torch.int64))[:, 0]
        case "margin":
            best_N2 = probs_NV.topk(2, dim=-1).values
            return best_N2[:, 0] - best_N2[:, 1]
        case "negative_entropy":
            return torch.special.xlogy(probs_NV, probs_NV).sum(dim=-1)


def gumbel(uniforms: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel numbers, -ln(-ln(uniforms)), in the dtype of uniforms; -inf of 0."""
    return -torch.log(-torch.log(uniforms))


def without_tokens(logits: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """Return logits, [..., vocabulary_size], in which these tokens have -inf."""
    allowed = logits.clone()
    for token_id in ids:
        allowed[..., token_id] = -torch.inf
    return allowed


def guided_logits(logits: torch.Tensor, unconditional: torch.Tensor, *, cfg_scale: float) -> torch.Tensor:
    """Return unconditional + (cfg_scale + 1) * (logits - unconditional), in at least float32, of any equal shapes."""
    u = at_least_float32(unconditional)
    return u + (cfg_scale + 1) * (at_least_float32(logits) - u)
