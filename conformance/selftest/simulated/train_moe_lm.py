"""The training step of an upcycled GPT-2, simulated: draws, losses, and which experts are updated, each overridable.

The model itself is the reference's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from gaugeblock.conformance.selftest.simulated.training import Run, Tensors
from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig
from gaugeblock.reference.torch import random, training, upcycled_gpt2
from gaugeblock.reference.torch.train_moe_lm import Metrics


class MoELMTrainer(Run):
    """`train_moe_lm.train_step`; of one microbatch."""

    contract = "train_moe_lm.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}
    config: MoELMConfig

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: MoELMConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config, self.model = config, config.model
        stacked = upcycled_gpt2.expert_names(self.model)
        shapes = upcycled_gpt2.state_shapes(self.model)
        validation.moe_lm_step(state, input_ids, labels, example_ids, config, shapes, stacked)
        leaves = {name: each.detach().requires_grad_() for name, each in self.part(state, "model").items()}
        metrics, objective = self.learned(leaves, input_ids, labels.long(), example_ids, int(state["step"]))
        found = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
        norm = self.norm(gradients)
        metrics = {name: each.detach().float() for name, each in metrics.items()}
        training.require_finite(state["step"], metrics, gradients, norm)
        self.idle = {name: ~each for name, each in self.used(metrics["load"]).items()}
        return self.update(state, self.clip(gradients, norm)), Metrics(**metrics, gradient_norm=norm)

    # --------------------------------------------------------------------------------------------------------- losses

    def learned(
        self, parameters: Tensors, input_ids: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor, step: int
    ) -> tuple[Tensors, torch.Tensor]:
        """The metrics, and what is minimized."""
        noise = self.noise(self.ids(example_ids), input_ids.shape[1], step)
        logits, router_logits, probs, entropy, load = self.outputs(parameters, input_ids, noise)
        lm_loss = self.lm_loss(logits, labels)
        balance = self.over_layers(self.balance(self.probabilities(probs, router_logits), load.mean(0)))
        z_loss = self.over_layers(self.z(self.of_z(router_logits, noise)).mean((0, 1)))
        metrics = {
            "lm_loss": lm_loss, "balance_loss": balance, "z_loss": z_loss, "entropy": self.entropy(entropy, router_logits),
            "load": load.mean(0),
        }  # fmt: skip
        return metrics, self.objective(lm_loss, balance, z_loss)

    def outputs(self, parameters: Tensors, input_ids: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the model."""
        return upcycled_gpt2.upcycled_gpt2(parameters, input_ids, noise, training=True, config=self.model)

    def lm_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the labels that count."""
        logits, labels = self.shifted(logits, labels)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)

    def shifted(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's logits beside the label after it."""
        return logits[:, :-1], labels[:, 1:]

    def probabilities(self, probs: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Of the balance loss."""
        return probs

    def balance(self, probs: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Of each layer, `[L]`."""
        return probs.shape[-1] * (load * probs.mean((0, 1))).sum(-1)

    def of_z(self, router_logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The logits of the z-loss."""
        return router_logits

    def z(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Of each token and layer, `[B, S, L]`."""
        return router_logits.logsumexp(-1).square()

    def over_layers(self, losses: torch.Tensor) -> torch.Tensor:
        """One of all layers."""
        return losses.mean()

    def entropy(self, entropy: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Of each layer, `[L]`."""
        return entropy.mean((0, 1))

    def objective(self, lm_loss: torch.Tensor, balance: torch.Tensor, z_loss: torch.Tensor) -> torch.Tensor:
        """What is minimized."""
        return lm_loss + self.config.balance_coefficient * balance + self.config.z_coefficient * z_loss

    # ---------------------------------------------------------------------------------------------------------- draws

    def ids(self, example_ids: torch.Tensor) -> torch.Tensor:
        """By which examples random numbers are drawn."""
        return example_ids

    def noise(self, ids: torch.Tensor, num_tokens: int, step: int) -> torch.Tensor:
        """`[B, S, L, E]`."""
        return self.std(step) * self.normals(ids, (num_tokens, len(self.model.moe_layers), self.model.num_experts), step)

    def normals(self, ids: torch.Tensor, shape: tuple[int, ...], step: int) -> torch.Tensor:
        """Of each example."""
        return random.normal(shape, seed=self.config.seed, step=step, example=ids, purpose=purposes.ROUTER_NOISE)

    def std(self, step: int) -> float:
        """Of the noise."""
        return self.config.noise_std * max(0.0, 1 - step / self.noised_steps()) if self.noised_steps() else 0.0

    def noised_steps(self) -> int:
        """How many steps have noise."""
        return int((self.config.num_training_steps or 0) * self.config.anneal_fraction)

    # --------------------------------------------------------------------------------------------------------- update

    def used(self, load: torch.Tensor) -> Tensors:
        """Which experts had tokens, by the names of their parameters."""
        names = upcycled_gpt2.expert_names(self.model)
        return {name: load[place] > 0 for name, place in zip(names, self.layer_of_names(len(names)), strict=True)}

    def layer_of_names(self, count: int) -> list[int]:
        """The places of the layers of so many parameters."""
        return [place * len(self.model.moe_layers) // count for place in range(count)]

    def update(self, state: Mapping[str, torch.Tensor], gradients: Tensors) -> Tensors:
        """The optimizer for everything but experts without tokens, then the average."""
        self.now = self.next_step(state["step"])
        parts = {part: self.part(state, part) for part in self.config.parts}
        counts = {name: each.clone() for name, each in self.part(state, "num_updates").items()}
        trained = {part: each for part, each in parts.items() if part != "ema"}
        for name, gradient in gradients.items():
            if name not in counts:
                self.update_one(trained, name, gradient, self.now)
                continue
            rows: dict[str, list[torch.Tensor]] = {part: [] for part in trained}
            for expert, count in enumerate(counts[name].tolist()):
                own = {part: {name: each[name][expert]} for part, each in trained.items()}
                if not self.idle[name][expert]:
                    self.update_one(own, name, gradient[expert], self.step_of_expert(count))
                else:
                    self.update_idle(own, name, self.step_of_expert(count))
                for part in trained:
                    rows[part].append(own[part][name])
            for part in trained:
                trained[part][name] = torch.stack(rows[part])
            counts[name] = self.counted(counts[name], self.idle[name])
        if self.config.ema is not None:
            keep = self.kept_by_average(int(state["step"]) + 1)
            parts["ema"] = {name: each + (1 - keep) * (parts["model"][name] - each) for name, each in parts["ema"].items()}
        return training.join_state(parts | {"num_updates": counts}, state["step"] + 1)

    def rate(self, step: int) -> float:
        """That of the run's step, whatever that of an expert."""
        return super().rate(self.now)

    def step_of_expert(self, count: int) -> int:
        """By which its moments are corrected, after so many updates of its own."""
        return count + 1

    def update_idle(self, parts: Mapping[str, Tensors], name: str, step: int) -> None:
        """Of an expert without tokens: nothing."""

    def counted(self, counts: torch.Tensor, idle: torch.Tensor) -> torch.Tensor:
        """Numbers of updates, with this one."""
        return counts + ~idle
