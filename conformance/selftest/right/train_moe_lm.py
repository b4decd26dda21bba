"""Right but different training steps of an upcycled GPT-2."""

from typing import Any

import torch
from torch.nn.functional import one_hot

from gaugeblock.conformance.selftest.simulated.train_moe_lm import MoELMTrainer
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.configs import IGNORED_LABEL
from gaugeblock.reference.torch import training


@right(dtypes=("float32",))
class LossesWrittenOut(MoELMTrainer):
    """Cross entropy as logsumexp less the label's logit; losses of one layer after the other, in float64."""

    def lm_loss(self, logits, labels):
        logits, labels = self.shifted(logits.double(), labels)
        counts = labels != IGNORED_LABEL
        picked = (one_hot(labels * counts, logits.shape[-1]) * logits).sum(-1)
        return ((logits.logsumexp(-1) - picked) * counts).sum() / counts.sum()

    def balance(self, probs, load):
        layers = zip(probs.double().unbind(2), load.unbind(0), strict=True)
        return torch.stack([each.shape[-1] * (each * share).sum(-1).mean() for each, share in layers])

    def z(self, router_logits):
        return router_logits.double().exp().sum(-1).log() ** 2


@right(dtypes=("float32",))
class ExpertsAsParametersOfTheirOwn(MoELMTrainer):
    """torch.optim, to which an expert without tokens has no gradient."""

    def update(self, state, gradients):
        config, counts = self.config, self.part(state, "num_updates")
        self.now = self.next_step(state["step"])
        places: list[tuple[str, Any]] = [
            (name, row) for name, each in gradients.items() for row in (range(len(each)) if name in counts else [...])
        ]
        parameters = {(name, row): torch.nn.Parameter(state[f"model.{name}"][row].clone()) for name, row in places}
        common: dict[str, Any] = {"lr": self.rate(self.now), "weight_decay": config.weight_decay}
        adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.adam_epsilon}
        optimizer: Any = {
            "adamw": lambda: torch.optim.AdamW(parameters.values(), **common, **adam),
            "adam": lambda: torch.optim.Adam(parameters.values(), **common, **adam),
            "sgd": lambda: torch.optim.SGD(parameters.values(), momentum=config.momentum, **common),
        }[config.optimizer]()
        for (name, row), parameter in parameters.items():
            step = counts[name][row] if name in counts else state["step"]
            moments = {each: state[f"{each}.{name}"][row].clone() for each in config.moments}
            optimizer.state[parameter] = {"step": step.float().clone(), **moments}
            if name not in counts or not self.idle[name][row]:
                parameter.grad = gradients[name][row].clone()
        optimizer.step()

        def stacked(part: str, name: str) -> torch.Tensor:
            rows = [each for place, each in parameters.items() if place[0] == name]
            values = [each.detach() if part == "model" else optimizer.state[each][part] for each in rows]
            return torch.stack(values) if name in counts else values[0]

        parts = {part: {name: stacked(part, name) for name in gradients} for part in ("model", *config.moments)}
        if config.ema is not None:
            keep = self.kept_by_average(int(state["step"]) + 1)
            averages = self.part(state, "ema").items()
            parts["ema"] = {name: each.lerp(parts["model"][name], 1 - keep) for name, each in averages}
        parts["num_updates"] = {name: each + ~self.idle[name] for name, each in counts.items()}
        return training.join_state(parts, state["step"] + 1)


@right(dtypes=("float32",))
class StepInFloat64(MoELMTrainer):
    """Norm, clipping and update in float64, each result rounded once."""

    def clip(self, gradients, norm):
        exact = torch.cat([each.double().flatten() for each in gradients.values()]).norm()
        factor = (self.config.max_gradient_norm / (exact + 1e-6)).clamp(max=1)
        return {name: factor * each.double() for name, each in gradients.items()}

    def update(self, state, gradients):
        wide = {name: each.double() if each.is_floating_point() else each for name, each in state.items()}
        new = super().update(wide, gradients)
        return {name: each.float() if each.is_floating_point() else each for name, each in new.items()}
