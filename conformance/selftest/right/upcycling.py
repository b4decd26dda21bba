"""Right ways to leave experts without tokens alone."""

import torch

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.selftest.variant import right


def is_finite_where_nothing_is_kept(case: Case) -> bool:
    """Not where torch's lerp makes NaN of an infinite gradient: it subtracts 0 times the distance from it if beta1 is 0."""
    return case.regime != "special" or case.parameters["beta1"] > 0


@right("upcycling.adamw_of_used_experts", dtypes=("float32",), validates=False, fits=is_finite_where_nothing_is_kept)
class ExpertByExpert:
    """torch.optim.AdamW of parameters of their own, which skips those whose gradient is None."""

    def __call__(self, parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options):
        new_steps = steps.long() + (tokens_per_expert > 0)
        experts = [torch.nn.Parameter(each.clone()) for each in parameter.detach()]
        optimizer = torch.optim.AdamW(
            [{"params": [each]} for each in experts] or [torch.zeros(())],
            lr=options["learning_rate"],
            betas=(options["beta1"], options["beta2"]),
            eps=options["adam_epsilon"],
            weight_decay=options["weight_decay"],
        )
        moments = exp_avg.clone(), exp_avg_sq.clone()
        for place, expert in enumerate(experts):
            if tokens_per_expert[place] > 0:
                expert.grad = gradient[place].clone()
            optimizer.state[expert] = {
                "step": steps[place].float(),
                "exp_avg": moments[0][place],
                "exp_avg_sq": moments[1][place],
            }
        optimizer.step()
        stepped = torch.stack([each.detach() for each in experts]) if experts else parameter
        return stepped, *moments, new_steps


@right("upcycling.adamw_of_used_experts", dtypes=("float32",), validates=False)
class UsedExpertsAlone:
    """Experts with tokens are cut out, updated with decay first, and put back."""

    def __call__(self, parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options):
        used = (tokens_per_expert > 0).nonzero()[:, 0]
        gradient, beta1, beta2 = gradient[used], options["beta1"], options["beta2"]
        new = parameter.clone(), exp_avg.clone(), exp_avg_sq.clone(), steps.to(torch.int64, copy=True)
        new[3][used] += 1
        new[1][used] = beta1 * exp_avg[used] + (1 - beta1) * gradient
        new[2][used] = beta2 * exp_avg_sq[used] + (1 - beta2) * gradient * gradient
        shares = [1 - beta ** new[3][used, None].double() for beta in (beta1, beta2)]
        step = (options["learning_rate"] / shares[0]).float()
        deviations = (new[2][used].sqrt() / shares[1].sqrt()).float() + options["adam_epsilon"]
        decayed = parameter[used] * (1 - options["learning_rate"] * options["weight_decay"])
        new[0][used] = decayed - step * new[1][used] / deviations
        return new
