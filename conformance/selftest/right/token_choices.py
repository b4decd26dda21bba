"""Right but different ways to choose tokens."""

import torch

from gaugeblock.conformance.selftest.simulated.token_choices import LogitsFilter, TokenDraw
from gaugeblock.conformance.selftest.variant import right


@right()
class EachComparedWithEach(LogitsFilter):
    """What comes before a token is summed over all, without a sort."""

    def in_top_p(self, logits, p, top_p):
        ids = torch.arange(logits.shape[1])
        mine, others = logits[:, :, None], logits[:, None, :]
        ahead = (others > mine) | ((others == mine) & (ids[None, :] < ids[:, None]))
        return torch.where(ahead, p[:, None, :], 0.0).sum(-1) <= top_p if top_p < 1 else torch.ones_like(p).bool()


@right()
class KthValue(LogitsFilter):
    """The last of the top_k is found by selection."""

    def in_top_k(self, logits, top_k):
        return logits >= logits.kthvalue(logits.shape[1] - top_k + 1, dim=-1, keepdim=True).values


@right()
class ExponentialRace(TokenDraw):
    """As LLaDA draws, in float64: the highest exponential over a power of a standard exponential draw."""

    def scores(self, logits, uniforms, temperature):
        wide = (logits.double() - logits.double().amax(-1, keepdim=True)).exp()
        return wide / (-uniforms.double().log()) ** temperature


@right()
class EntropyOfLogits(TokenDraw):
    """Sum of p times the logit, less the logarithm of the sum of exponentials."""

    def negative_entropy(self, p, ids, logits):
        wide = logits.double()
        total = wide.logsumexp(-1)
        return (torch.where(p == 0, 0.0, p * (wide - total[:, None]))).sum(-1)


@right()
class TwoMaxima(TokenDraw):
    """The second probability is the highest without the first."""

    def margin(self, p, ids):
        best = p.max(-1, keepdim=True)
        return (best.values - p.scatter(-1, best.indices, -1.0).amax(-1, keepdim=True))[:, 0]
