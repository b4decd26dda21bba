"""What chooses tokens, simulated: float32 inside, sums in float64."""

import torch

from gaugeblock.reference import validation


class LogitsFilter:
    """`token_choices.filter_logits`."""

    contract = "token_choices.filter_logits"

    def __call__(
        self, logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, top_k_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.filter_logits(logits, temperature, top_k, top_p, top_k_first)
        z = self.tempered(logits.float(), temperature)
        in_top_k = self.in_top_k(logits.float(), top_k or logits.shape[1])
        shared = z.masked_fill(~in_top_k, -torch.inf) if top_k_first else z
        kept = in_top_k & self.in_top_p(logits.float(), self.probabilities(shared), top_p)
        return torch.where(kept, z, -torch.inf), kept

    def tempered(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Divided by the temperature."""
        return logits / temperature

    def in_top_k(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        """All that reach the last of the top_k."""
        return logits >= logits.sort(dim=-1, descending=True).values[:, top_k - 1, None]

    def probabilities(self, z: torch.Tensor) -> torch.Tensor:
        """Softmax."""
        return z.double().softmax(-1)

    def in_top_p(self, logits: torch.Tensor, p: torch.Tensor, top_p: float) -> torch.Tensor:
        """By the probability of those before, in the order of logits and ids."""
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        ordered = p.gather(-1, order)
        return torch.empty_like(p).scatter(-1, order, self.before(ordered)) <= top_p if top_p < 1 else torch.ones_like(p).bool()

    def before(self, ordered: torch.Tensor) -> torch.Tensor:
        """The sum of those before."""
        return torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(-1)[:, :-1]], -1)


class TokenDraw:
    """`token_choices.draw_tokens`."""

    contract = "token_choices.draw_tokens"

    def __call__(
        self, logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, confidence: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.draw_tokens(logits, uniforms, temperature, confidence)
        scores = self.scores(logits.float(), uniforms, temperature) if temperature > 0 else logits.float()
        ids = scores.argmax(-1)
        p = self.probabilities(logits.float(), scores, temperature)
        match confidence:
            case "probability":
                return ids, p.gather(-1, ids[:, None])[:, 0].float()
            case "margin":
                return ids, self.margin(p, ids).float()
            case _:
                return ids, self.negative_entropy(p, ids, logits).float()

    def scores(self, logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
        """Tempered logits and Gumbel noise."""
        return logits / temperature - (-uniforms.log()).log()

    def probabilities(self, logits: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        """Softmax of the logits themselves."""
        return logits.double().softmax(-1)

    def margin(self, p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The best less the second."""
        best = p.sort(dim=-1, descending=True).values
        return best[:, 0] - best[:, 1]

    def negative_entropy(self, p: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Sum of p ln(p)."""
        return torch.where(p == 0, 0.0, p * p.log()).sum(-1)
