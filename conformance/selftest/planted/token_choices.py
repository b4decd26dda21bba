"""Bugs of what chooses tokens."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.token_choices import LogitsFilter, TokenDraw


@fault(caught_by="parity", kind="boundary", source="top-p ports")
class WithoutTheTokenThatExceeds(LogitsFilter):
    """The token with which top_p is exceeded is dropped, though the most probable one never is."""

    def before(self, ordered):
        sums = ordered.cumsum(-1)
        return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, 1:]], -1)


@fault(caught_by="parity", kind="boundary", source="top-k by indices")
class TiesCutOff(LogitsFilter):
    """Of tokens that equal the last of the top_k, all but the first are dropped."""

    def in_top_k(self, logits, top_k):
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        return torch.zeros_like(logits).bool().scatter(-1, ids, True)


@fault(caught_by="parity", kind="structural", source="SDAR ports: top-p of all tokens, as Dream has it")
class ProbabilitiesOfAll(LogitsFilter):
    """top_p is of all tokens even where top_k comes first."""

    def __call__(self, logits, *, temperature, top_k, top_p, top_k_first):
        return super().__call__(logits, temperature=temperature, top_k=top_k, top_p=top_p, top_k_first=top_k_first and top_k == 0)


@fault(caught_by="parity", kind="structural", source="temperature after the filters")
class TopPWithoutTemperature(LogitsFilter):
    """top_p is of the probabilities without temperature."""

    def tempered(self, logits, temperature):
        self.temperature = temperature
        return super().tempered(logits, temperature)

    def probabilities(self, z):
        return super().probabilities(z * self.temperature)


@fault(caught_by="parity", kind="structural", source="LLaDA ports: confidence of the tempered logits")
class TemperedConfidence(TokenDraw):
    """Confidence is a probability at the temperature of the draw."""

    def probabilities(self, logits, scores, temperature):
        return (logits.double() / (temperature or 1)).softmax(-1)


@fault(caught_by="parity", kind="structural", source="LLaDA ports: confidence of the noisy logits")
class NoisyConfidence(TokenDraw):
    """Confidence is a probability with the noise of the draw."""

    def probabilities(self, logits, scores, temperature):
        return scores.double().softmax(-1)


@fault(caught_by="parity", kind="structural", source="noise before the temperature")
class TemperatureWithoutEffect(TokenDraw):
    """The noise is divided by the temperature too, which then changes no choice."""

    def scores(self, logits, uniforms, temperature):
        return super().scores(logits, uniforms, 1.0) / temperature


@fault(caught_by="parity", kind="precision", source="noise in the dtype of the model")
class NoiseInBfloat16(TokenDraw):
    """Draws are rounded to bfloat16, and those near 1 become 1: their noise is infinite."""

    def scores(self, logits, uniforms, temperature):
        return super().scores(logits, uniforms.bfloat16().float(), temperature)


@fault(caught_by="parity", kind="precision", source="an epsilon within the logarithms")
class NoiseWithAnEpsilon(TokenDraw):
    """1e-5 is added within both logarithms, so that a draw near 1 has not the noise it should."""

    def scores(self, logits, uniforms, temperature):
        return logits / temperature - (-(uniforms + 1e-5).log() + 1e-5).log()


@fault(caught_by="parity", kind="structural", source="JetLM/SDAR generate.py: the entropy of the drawn probability alone")
class EntropyOfTheDraw(TokenDraw):
    """The entropy is that of the chosen token alone."""

    def negative_entropy(self, p, ids, logits):
        chosen = p.gather(-1, ids[:, None])[:, 0]
        return chosen * chosen.log()


@fault(caught_by="parity", kind="structural", source="Dream ports: margin of the drawn token")
class MarginOfTheDraw(TokenDraw):
    """The margin begins with the drawn token, which may not be the most probable one."""

    def margin(self, p, ids):
        return p.gather(-1, ids[:, None])[:, 0] - p.sort(dim=-1, descending=True).values[:, 1]


@fault(caught_by="parity", kind="state", source="one maximum for a block")
class MaximumOfTheBatch(TokenDraw):
    """What is subtracted from logits is the maximum of all rows: a NaN in one is in all."""

    def probabilities(self, logits, scores, temperature):
        return super().probabilities(logits - logits.amax() + logits.amax(), scores, temperature)
