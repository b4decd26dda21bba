"""Right but different MoE layers and losses."""

import torch
from torch.nn.functional import one_hot, silu

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.moe_layers import BalanceLoss, MixtralMoe, ZLoss
from gaugeblock.conformance.selftest.variant import right


@right()
class SoftmaxOfTheChosen(MixtralMoe):
    """Experts are chosen by their logits, whose softmax are the weights."""

    def route(self, router_logits, top_k):
        chosen, ids = router_logits.topk(top_k)
        return chosen.softmax(1), ids


@right(batch_invariant=False)
class LogitsOfTheLibrary(MixtralMoe):
    """The gate's product in the library's order."""

    def logits(self, hidden_states, gate):
        return hidden_states.float() @ gate.float().mT


@right()
class LogitsInFloat64(MixtralMoe):
    """The gate's product in float64."""

    def logits(self, hidden_states, gate):
        return (hidden_states.double() @ gate.double().mT).float()

    def route(self, router_logits, top_k):
        weights, ids = router_logits.double().softmax(1).topk(top_k)
        return (weights / weights.sum(1, keepdim=True)).float(), ids


@right()
class LogitsOfSmallTiles(MixtralMoe):
    """The gate's product in tiles of 8, from the last to the first."""

    def logits(self, hidden_states, gate):
        class Backwards(Experts):
            depth = 8

            def tiles(self, left, right):
                return super().tiles(left, right)[::-1]

        return Backwards().matmul(hidden_states.float(), gate.float())


@right(fits=lambda case: case.regime != "special", batch_invariant=False)
class EveryExpertOnEveryToken(MixtralMoe):
    """Experts that were not chosen count with weight 0."""

    def __call__(self, hidden_states, state, *, top_k):
        gate, w13, w2 = (each.float() for each in self.entries(state))
        router_logits = self.logits(hidden_states, gate)
        weights, ids = self.route(router_logits, top_k)
        spread = torch.zeros_like(router_logits).scatter(1, ids, weights)
        halves = torch.einsum("eih,th->tei", w13, hidden_states.float()).chunk(2, -1)
        active = (silu(halves[0]) * halves[1]).to(hidden_states.dtype).float()
        out = torch.einsum("te,ehi,tei->th", spread, w2, active)
        return out.to(hidden_states.dtype), router_logits, ids


@right()
class OneHotMeans(BalanceLoss):
    """Shares are means of one-hot rows."""

    def counts(self, ids, mask, num_experts):
        return (one_hot(ids.long(), num_experts) * mask[:, None, None]).sum((0, 1))

    def sum(self, values):
        return values.sum(0)


@right()
class TokenByToken(BalanceLoss):
    """The mean of each token's own loss."""

    def __call__(self, router_logits, topk_ids, attention_mask):
        counts = self.counts(topk_ids, attention_mask, router_logits.shape[1])
        shares = self.shares(counts, attention_mask, topk_ids.shape[1])
        logits = self.masked(router_logits.float(), attention_mask)
        losses = (shares * self.probabilities(logits, attention_mask)).sum(1)
        return router_logits.shape[1] * losses.sum() / self.tokens(attention_mask)


@right()
class BalanceInFloat64(BalanceLoss):
    """Everything in float64, rounded once."""

    def probabilities(self, logits, mask):
        return super().probabilities(logits.double(), mask)

    def sum(self, values):
        return values.sum(0)

    def shares(self, counts, mask, top_k):
        return counts.double() / (self.tokens(mask) * top_k)


@right(differentiable=False)
class TokensThatCountAlone(BalanceLoss):
    """Padding is cut out before anything else."""

    def __call__(self, router_logits, topk_ids, attention_mask):
        kept = attention_mask.nonzero()[:, 0]
        return super().__call__(router_logits[kept], topk_ids[kept], attention_mask[kept])


@right()
class LogsumexpOfTorch(ZLoss):
    """torch's logsumexp and mean."""

    def logsumexp(self, logits):
        return logits.logsumexp(1)

    def mean(self, z, mask):
        return torch.where(mask, z, 0.0).square().sum() / mask.sum().clamp(min=1)


@right()
class ZInFloat64(ZLoss):
    """Everything in float64, rounded once."""

    def logsumexp(self, logits):
        return logits.double().logsumexp(1)


@right()
class OnlineLogsumexp(ZLoss):
    """Maximum and sum are updated tile by tile."""

    def logsumexp(self, logits):
        highest, total = torch.full((len(logits),), -torch.inf), torch.zeros(len(logits))
        for tile in logits.split(4, 1):
            new = torch.maximum(highest, tile.detach().amax(1))
            finite = new.masked_fill(new == -torch.inf, 0.0)
            total = total * (highest - finite).exp() + (tile - finite[:, None]).exp().sum(1)
            highest = new
        return highest + total.log()


@right()
class SquaresScaledFirst(ZLoss):
    """Each token's square is divided by the number of tokens, then added."""

    def mean(self, z, mask):
        return (torch.where(mask, z, 0.0) * z.masked_fill(~mask, 0.0) / mask.sum().clamp(min=1)).sum()
