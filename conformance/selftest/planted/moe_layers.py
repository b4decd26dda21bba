"""Bugs of MoE layers and of their losses."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.moe_layers import BalanceLoss, MixtralMoe, ZLoss
from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter


@fault(caught_by="parity", kind="structural", source="norm_topk_prob of Qwen3-MoE and OLMoE, which are unlike")
class WeightsNotRenormalized(MixtralMoe):
    """The weights of the chosen are their probabilities among all."""

    def route(self, router_logits, top_k):
        return SoftmaxRouter()(router_logits, top_k=top_k, renormalize=False)


@fault(caught_by="parity", kind="structural", smallest=2)
class WeightsOfTheSigmoid(MixtralMoe):
    """Weights are sigmoids of the chosen logits, as DeepSeek-V3 and Llama 4 have them."""

    def route(self, router_logits, top_k):
        weights, ids = super().route(router_logits, top_k)
        return router_logits.gather(1, ids).sigmoid() + 0 * weights, ids


@fault(caught_by="parity", kind="structural")
class ProbabilitiesReturned(MixtralMoe):
    """What is returned as logits has passed the softmax: the losses take it again."""

    def store(self, router_logits):
        return router_logits.softmax(1)


@fault(caught_by="parity", kind="structural", source="torch.topk(sorted=False)")
class IdsInAscendingOrder(MixtralMoe):
    """The best expert comes last."""

    def route(self, router_logits, top_k):
        weights, ids = super().route(router_logits, top_k)
        return weights.flip(1), ids.flip(1)


@fault(caught_by="parity", kind="precision", source="the gate as a Linear of a bfloat16 model", dtypes=("bfloat16",))
class LogitsRounded(MixtralMoe):
    """The logits are rounded to bfloat16, and so are chosen from and weighted."""

    def logits(self, hidden_states, gate):
        return super().logits(hidden_states, gate).bfloat16().float()


@fault(caught_by="determinism", kind="state", source="router_jitter_noise of Mixtral, Switch")
class JitterInInference(MixtralMoe):
    """The router sees tokens times a random factor near 1, with or without training."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def logits(self, hidden_states, gate):
        return super().logits(hidden_states * (0.99 + 0.02 * torch.rand(1, generator=self.generator)), gate)


@fault(caught_by="hidden_state", kind="state", source="weights packed once, at load")
class ParametersKeptByName(MixtralMoe):
    """Entries are packed at the first call with their shape, and never again."""

    def __init__(self):
        self.packed = {}

    def entries(self, state):
        return tuple(
            self.packed.setdefault((place, each.shape), each.detach().clone()) + (each - each.detach())
            for place, each in enumerate(super().entries(state))
        )


@fault(caught_by="state_dict_round_trip", kind="state", source="checkpoints read as lists of tensors")
class EntriesByPlace(MixtralMoe):
    """Entries are taken in the order in which the dict holds them."""

    def entries(self, state):
        return tuple(state.values())


@fault(caught_by="gradients", kind="gradient", source="routers under torch.no_grad")
class RouterWithoutGradient(MixtralMoe):
    """The experts' weights are constants: only the losses train the gate."""

    def route(self, router_logits, top_k):
        return super().route(router_logits.detach(), top_k)


@fault(caught_by="gradients", kind="gradient")
class LogitsDetachTheTokens(MixtralMoe):
    """No gradient of the logits reaches the tokens."""

    def logits(self, hidden_states, gate):
        return super().logits(hidden_states.detach(), gate)


@fault(caught_by="rejections", kind="error-contract", source="load_state_dict(strict=False)")
class UnexpectedEntriesIgnored(MixtralMoe):
    """A state may hold more than the layer has."""

    def validate(self, hidden_states, state, top_k):
        known = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        super().validate(hidden_states, {name: state[name] for name in known if name in state}, top_k)


@fault(caught_by="rejections", kind="error-contract", source="load_state_dict(strict=False)")
class MissingGateIsZero(MixtralMoe):
    """A layer without a gate sends all tokens to the first experts."""

    def __call__(self, hidden_states, state, *, top_k):
        if "gate.weight" not in state and "experts.down_proj" in state:
            state = {"gate.weight": torch.zeros(state["experts.down_proj"].shape[:2]), **state}
        return super().__call__(hidden_states, state, top_k=top_k)


@fault(caught_by="rejections", kind="error-contract", source="`-W` for `W.T`: square matrices hide it")
class GateTransposedWhereItFits(MixtralMoe):
    """A gate of another width is cut to fit, silently."""

    def __call__(self, hidden_states, state, *, top_k):
        gate = state.get("gate.weight")
        if gate is not None and gate.ndim == 2 and gate.shape[1] < hidden_states.shape[1]:
            short = hidden_states.shape[1] - gate.shape[1]
            state = {**state, "gate.weight": torch.nn.functional.pad(gate, (0, short))}
        return super().__call__(hidden_states, state, top_k=top_k)


@fault(caught_by="parity", kind="structural", source="transformers: load_balancing_loss_func before attention_mask")
class PaddingCounted(BalanceLoss):
    """Padding has a load and a probability like any token."""

    def __call__(self, router_logits, topk_ids, attention_mask):
        return super().__call__(router_logits, topk_ids, torch.ones_like(attention_mask))


@fault(caught_by="parity", kind="structural", source="transformers' own fixes")
class PaddingInTheAssignments(BalanceLoss):
    """Padding is left out of the probabilities, not of the assignments."""

    def counts(self, ids, mask, num_experts):
        return super().counts(ids, torch.ones_like(mask), num_experts)


@fault(caught_by="parity", kind="structural")
class MeanOverPaddingToo(BalanceLoss):
    """Sums over the tokens that count are divided by all."""

    def tokens(self, mask):
        return torch.tensor(max(1, len(mask)))


@fault(caught_by="parity", kind="structural", source="transformers: load_balancing_loss_func")
class AssignmentsPerToken(BalanceLoss):
    """Assignments are divided by tokens: top_k times the loss."""

    def shares(self, counts, mask, top_k):
        return super().shares(counts, mask, 1)


@fault(caught_by="parity", kind="structural", source="Switch Transformers, where top_k is 1")
class FirstChoiceAlone(BalanceLoss):
    """Only each token's first choice is a load."""

    def counts(self, ids, mask, num_experts):
        return ids.shape[1] * super().counts(ids[:, :1], mask, num_experts)


@fault(caught_by="parity", kind="structural")
class MinimumIsNotOne(BalanceLoss):
    """The number of experts is no factor: the loss of an even load depends on it."""

    def loss(self, shares, probabilities):
        return super().loss(shares, probabilities) / len(shares)


@fault(caught_by="parity", kind="boundary", source="kekzl/imp#2056")
class IdsInEightBits(BalanceLoss):
    """Ids above 255 wrap."""

    def counts(self, ids, mask, num_experts):
        return super().counts(ids.to(torch.uint8), mask, num_experts)


@fault(caught_by="gradients", kind="gradient", source="`0 * NaN` is NaN")
class PaddingMaskedAfterTheSoftmax(BalanceLoss):
    """Padding of NaN has no probability, but its gradient is NaN."""

    def masked(self, logits, mask):
        return logits


@fault(caught_by="gradients", kind="gradient", source="probabilities taken from no_grad")
class ConstantProbabilities(BalanceLoss):
    """The loss is a number for the log: nothing is trained by it."""

    def probabilities(self, logits, mask):
        return super().probabilities(logits, mask).detach()


@fault(caught_by="empty_and_one", kind="boundary")
class EmptyBatchIsNotANumber(BalanceLoss):
    """No tokens: 0 / 0."""

    def tokens(self, mask):
        return mask.sum()


@fault(caught_by="layout", kind="memory", source="masks sliced from a longer sequence")
class MaskStrideIgnored(BalanceLoss):
    """The mask is addressed as if it were contiguous."""

    def __call__(self, router_logits, topk_ids, attention_mask):
        flat = attention_mask.as_strided(attention_mask.shape, (1,)) if len(attention_mask) else attention_mask
        return super().__call__(router_logits, topk_ids, flat)


@fault(caught_by="expert_relabelling", kind="structural", source="expert 0 as a sink for padding")
class FirstExpertLeftOut(BalanceLoss):
    """What the first expert is assigned does not count."""

    def counts(self, ids, mask, num_experts):
        return super().counts(ids, mask, num_experts) * (torch.arange(num_experts) > 0)


@fault(caught_by="parity", kind="structural")
class ZOfNormalizedLogits(ZLoss):
    """The logits have passed a log-softmax: their logsumexp is 0."""

    def logsumexp(self, logits):
        return super().logsumexp(logits.log_softmax(1))


@fault(caught_by="parity", kind="structural", smallest=2)
class SquareOfTheMean(ZLoss):
    """The mean is squared."""

    def mean(self, z, mask):
        return (torch.where(mask, z, 0.0).sum() / mask.sum().clamp(min=1)).square()


@fault(caught_by="parity", kind="precision")
class MaximumNotSubtracted(ZLoss):
    """Exponentials overflow."""

    def logsumexp(self, logits):
        return logits.exp().sum(1).log()


@fault(caught_by="parity", kind="structural", source="ST-MoE: mean over groups and tokens")
class PaddingInTheMean(ZLoss):
    """Padding counts as a token whose logits are 0."""

    def mean(self, z, mask):
        return super().mean(z, torch.ones_like(mask))


@fault(caught_by="parity", kind="precision", dtypes=("bfloat16",), source="losses in the model's dtype")
class ZRounded(ZLoss):
    """Each token's logsumexp is rounded to bfloat16."""

    def logsumexp(self, logits):
        return super().logsumexp(logits).bfloat16().float()


@fault(caught_by="gradients", kind="gradient", source="derivative of the square")
class GradientHalved(ZLoss):
    """The derivative of z² is z."""

    def mean(self, z, mask):
        return super().mean((z + z.detach()) / 2, mask)
