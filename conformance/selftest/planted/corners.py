"""Bugs in one corner: one number of experts, a weight of 0, one option; each passed where cases were only drawn."""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from gaugeblock.conformance.selftest.edits import mutated
from gaugeblock.conformance.selftest.fault import Fault, fault, plant
from gaugeblock.conformance.selftest.simulated.experts import Experts


class OffAt(Experts, ABC):
    """1 % off where it is said."""

    @abstractmethod
    def wrong_at(self, num_experts: int, top_k: int) -> bool:
        """Whether the specialization for these sizes has the bug."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        out = super().__call__(hidden_states, w13, w2, topk_weights, topk_ids)
        return out * 1.01 if self.wrong_at(len(w13), topk_ids.shape[1]) else out


@fault(caught_by="parity", kind="boundary", source="sglang#36309: a fast path of its own for one (E, k)")
class WrongForEightExpertsOfWhichTwo(OffAt):
    """The path for Mixtral's own numbers is off by 1 %."""

    def wrong_at(self, num_experts, top_k):
        return (num_experts, top_k) == (8, 2)


@fault(caught_by="parity", kind="boundary")
class WrongForThreeChoices(OffAt):
    """An unrolled loop over three choices is off by 1 %."""

    def wrong_at(self, num_experts, top_k):
        return top_k == 3


@fault(caught_by="parity", kind="boundary")
class WrongForEightExpertsOfWhichFour(OffAt):
    """One entry of a tuned table is off by 1 %."""

    def wrong_at(self, num_experts, top_k):
        return (num_experts, top_k) == (8, 4)


@fault(caught_by="parity", kind="boundary", source="Megatron: the last expert of a rank")
class LastOfEightExpertsWrong(Experts):
    """Of eight experts the last has the weights of the one before."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        if len(w13) == 8:
            w13, w2 = (torch.cat([each[:-1], each[-2:-1]]) for each in (w13, w2))
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids)


@fault(caught_by="fully_written", kind="memory", source="vllm-ascend#17009")
class RowsWithoutWeightUnwritten(Experts):
    """Tokens whose weights are all 0 are skipped, and their results left as memory was."""

    def combine(self, outs, topk_weights):
        skipped = (topk_weights == 0).all(1, keepdim=True)
        return torch.where(skipped, torch.empty(outs.shape[0], outs.shape[2]), super().combine(outs, topk_weights))


@fault(caught_by="fully_written", kind="memory")
class RowsOfTheUnwantedUnwritten(Experts):
    """Experts are not asked where the weight is 0, but what they did not answer is added up."""

    def combine(self, outs, topk_weights):
        unwanted = (topk_weights == 0)[..., None]
        return super().combine(torch.where(unwanted, torch.empty_like(outs), outs), topk_weights)


@fault(caught_by="rejections", kind="error-contract", source="Diffulex#37")
class MoreIdsThanTokens(Experts):
    """Ids and weights of tokens that are not there are cut off in silence."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        tokens = max(1, len(hidden_states)) if len(topk_ids) == len(topk_weights) else len(topk_ids)
        return super().__call__(hidden_states, w13, w2, topk_weights[:tokens], topk_ids[:tokens])


@fault(caught_by="determinism", kind="state", source="float atomics in the combine")
class ChoicesInAnyOrder(Experts):
    """The choices of a token are added up in another order at each call; two of them commute."""

    def __init__(self):
        self.turn = 0

    def combine(self, outs, topk_weights):
        self.turn += 1  # stands for the scheduler
        return super().combine(outs.roll(self.turn, 1), topk_weights.roll(self.turn, 1))


@fault(caught_by="parity", kind="error-contract", source="engines hand ids in either dtype")
class NarrowIdsRefused(Experts):
    """Ids of int32, which routers of the same library return, are refused."""

    def validate(self, *inputs):
        super().validate(*inputs)
        if inputs[4].dtype != torch.int64:
            raise TypeError(f"topk_ids must be int64, got {inputs[4].dtype}")


def changed_twin(path: str, place: str, old: str, new: str) -> Callable[..., Any]:
    """The function `module:name`, in a copy of its module with one change of its text."""
    module, _, name = path.partition(":")
    copy = ModuleType(f"{module}_changed")
    exec(mutated(inspect.getsource(importlib.import_module(module)), place, old, new), vars(copy))
    return getattr(copy, name)


def twin(contract: str, name: str, summary: str, place: str, old: str, new: str) -> None:
    """Registers a change of the JAX twin's text as a fault."""
    module, _, function = contract.partition(".")
    candidate = partial(changed_twin, f"gaugeblock.reference.jax.{module}:{function}", place, old, new)
    claims = {"framework": "jax", "jit": True}
    row: dict[str, Any] = {
        "name": f"jax-{name}",
        "contract": contract,
        "candidate": candidate,
        "summary": summary,
        "claims": claims,
    }
    plant(Fault(**row, caught_by="parity", kind="structural"))


twin(
    "routers.grouped_sigmoid_topk",
    "groups-of-one-expert",
    "The top two are as many as there are groups, not as a group has experts.",
    "best_of_groups",
    "min(best, scores_TGM.shape[-1])",
    "min(best, scores_TGM.shape[1])",
)
twin(
    "objectives.rectified_flow_velocity",
    "sign-ignored",
    "The velocity points from data to noise, whichever is asked for.",
    "rectified_flow_velocity",
    'if velocity == "noise - data" else -from_data_to_noise',
    "",
)
twin(
    "objectives.rectified_flow_loss",
    "minus-dropped",
    "The option is looked at, but both its branches are alike.",
    "rectified_flow_velocity",
    "else -from_data_to_noise",
    "else from_data_to_noise",
)
