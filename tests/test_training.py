"""What training steps share: the libraries' optimizers, the average, precision, what is frozen, saved runs."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from gaugeblock.reference.configs import EMAConfig, TrainingConfig
from gaugeblock.reference.jax import training as jax_training
from gaugeblock.reference.torch import training

CONFIG = TrainingConfig(learning_rate=1e-2, weight_decay=0.1)
EPS = np.finfo(np.float64).eps
BOTH = pytest.mark.parametrize("module", [training, jax_training], ids=["torch", "jax"])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def to_jax(tensors: dict[str, torch.Tensor]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(tensor.numpy()) for name, tensor in tensors.items()}


def largest_difference(actual, expected) -> float:
    """In roundings of the largest number of each tensor."""
    assert set(actual) == set(expected)
    pairs = ((np.asarray(actual[name]), np.asarray(expected[name])) for name in expected)
    return max(np.abs(one - other).max() / max(np.abs(other).max(), EPS) / EPS for one, other in pairs)


@BOTH
def test_the_first_gradient_that_is_not_finite_is_named(module):
    array = torch.tensor if module is training else jnp.array
    good, bad = array([1.0, 2.0]), array([1.0, -float("inf")])
    gradients, losses = {"b": good, "c": bad, "a": bad}, {"loss": array(1.0)}
    with pytest.raises(FloatingPointError, match=r"^step 3: gradient of c is not finite \(loss 1.0, gradient_norm inf\)"):
        module.require_finite(array(3), losses, gradients, module.global_norm(gradients))
    huge = {"a": array([1e30])}  # whose square is too large for float32
    with pytest.raises(FloatingPointError, match=r"^step 3: gradient_norm is not finite"):
        module.require_finite(array(3), losses, huge, module.global_norm(huge))
    with pytest.raises(FloatingPointError, match=r"^step 3: second is not finite"):
        module.require_finite(array(3), losses | {"second": array(float("nan"))}, {"a": good}, module.global_norm({"a": good}))
    module.require_finite(array(3), losses, {"a": good}, module.global_norm({"a": good}))


def optimizers(config: TrainingConfig, parameter: torch.nn.Parameter):
    """Torch's and optax's own, of one parameter."""
    decay = optax.add_decayed_weights(config.weight_decay)
    rate, of_torch = config.learning_rate, {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW([parameter], **of_torch), optax.adamw(rate, weight_decay=config.weight_decay)
        case "adam":
            return torch.optim.Adam([parameter], **of_torch), optax.chain(decay, optax.adam(rate))
        case "sgd":
            return torch.optim.SGD([parameter], momentum=0.9, **of_torch), optax.chain(decay, optax.sgd(rate, momentum=0.9))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("max_gradient_norm", [0.5, 100.0])
def test_updates_are_those_of_the_libraries_used_directly(optimizer, max_gradient_norm):
    config = replace(CONFIG, optimizer=optimizer, max_gradient_norm=max_gradient_norm)
    weight = torch.ones(3, 4, dtype=torch.float64)
    state = training.initial_state({"w": weight}, config=config)
    parameter = torch.nn.Parameter(weight.clone())
    of_torch, of_optax = optimizers(config, parameter)
    with jax.enable_x64(True):
        jax_state, jax_parameters = to_jax(state), {"w": jnp.asarray(weight.numpy())}
        transformation = optax.chain(optax.clip_by_global_norm(max_gradient_norm), of_optax)
        optax_state = transformation.init(jax_parameters)
        for seed in range(5):
            gradients = {"w": draws(3, 4, seed=seed)}
            state = training.update(state, gradients, training.global_norm(gradients), config=config)
            parameter.grad = gradients["w"].clone()
            torch.nn.utils.clip_grad_norm_([parameter], max_gradient_norm)
            of_torch.step()
            assert largest_difference({"w": state["model.w"]}, {"w": parameter.detach()}) <= 4

            jax_gradients = to_jax(gradients)
            jax_state = jax_training.update(jax_state, jax_gradients, jax_training.global_norm(jax_gradients), config=config)
            assert largest_difference(jax_state, state) <= 16
            updates, optax_state = transformation.update(jax_gradients, optax_state, jax_parameters)
            jax_parameters = optax.apply_updates(jax_parameters, updates)
            # optax clips without torch's 1e-6, which is 2e-6 of the smaller norm; SGD moves by that part of what is added up
            np.testing.assert_allclose(jax_state["model.w"], jax_parameters["w"], rtol=2e-6 * 15 * config.learning_rate)


SCHEDULES = [
    ("constant", {}),
    ("constant_with_warmup", {"num_warmup_steps": 7}),
    ("linear", {"num_warmup_steps": 7, "num_training_steps": 20}),
    ("linear", {"num_training_steps": 20}),
    ("cosine", {"num_warmup_steps": 7, "num_training_steps": 20}),
    ("cosine", {"num_training_steps": 1}),
    ("cosine", {"num_warmup_steps": 5, "num_training_steps": 5}),
]


@pytest.mark.parametrize(("name", "steps"), SCHEDULES)
def test_learning_rates_are_those_of_diffusers(name, steps):
    config = replace(CONFIG, learning_rate_schedule=name.removesuffix("_with_warmup"), **steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(name, optimizer, **{"num_warmup_steps": 0} | steps)
    end = steps.get("num_training_steps", 20)
    for step in range(end + 1):
        ours = training.learning_rate_of(step, config)
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=4 * EPS, abs=EPS * config.learning_rate)
        assert float(jax_training.learning_rate_of(jnp.array(step), config)) == pytest.approx(ours, rel=8 * EPS, abs=EPS)
        optimizer.step()
        schedule.step()
    if name in ("linear", "cosine"):  # diffusers' cosine would rise again
        after = [
            module.learning_rate_of(step, config) for module, step in ((training, end + 3), (jax_training, jnp.array(end + 3)))
        ]
        assert [float(each) for each in after] == [0.0, 0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_an_update_is_made_at_the_learning_rate_of_its_step(optimizer):
    config = replace(
        CONFIG, optimizer=optimizer, learning_rate_schedule="cosine", num_warmup_steps=2, num_training_steps=5, weight_decay=0.25
    )
    gradients = {"w": draws(3, 4, seed=1)}
    state = training.initial_state({"w": draws(3, 4)}, config=config)
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for step in range(6):
            constant = replace(config, learning_rate_schedule="constant", num_warmup_steps=0)
            rate = training.learning_rate_of(step, config)
            expected = training.update(
                state, gradients, training.global_norm(gradients),
                config=replace(constant, learning_rate=rate) if rate else replace(constant, learning_rate=1e-300),
            )  # fmt: skip
            state = training.update(state, gradients, training.global_norm(gradients), config=config)
            assert largest_difference(state, expected) <= 4
            jax_gradients = to_jax(gradients)
            jax_state = jax_training.update(jax_state, jax_gradients, jax_training.global_norm(jax_gradients), config=config)
            assert largest_difference(jax_state, state) <= 16
        assert all(each.dtype == jnp.float64 for name, each in jax_state.items() if name != "step")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EMAConfig(), {1: 0, 2: 0.1818182, 10: 0.5263158, 1000: 0.9910803, 10**6: 0.9999}),
        (EMAConfig(warmup=True), {1: 0, 2: 0.3700395, 10: 0.7845565, 1000: 0.99, 10**7: 0.9999}),
        (EMAConfig(update_after_step=8, min_decay=0.25), {1: 0, 9: 0, 10: 0.25, 18: 10 / 19}),
    ],
)
def test_the_average_keeps_what_diffusers_keeps(config, expected):
    average = EMAModel(
        [], decay=config.decay, min_decay=config.min_decay, update_after_step=config.update_after_step,
        use_ema_warmup=config.warmup, inv_gamma=config.inv_gamma, power=config.power,
    )  # fmt: skip
    for step, decay in expected.items():
        assert training.decay_of(step, config) == pytest.approx(decay, abs=6e-8)
        assert training.decay_of(step, config) == pytest.approx(average.get_decay(step), rel=1e-15)
        with jax.enable_x64(True):
            assert float(jax_training.decay_of(jnp.array(step), config)) == pytest.approx(decay, abs=6e-8)


def test_the_average_follows_diffusers_over_a_run():
    config = replace(CONFIG, ema=EMAConfig(update_after_step=1))
    parameter = torch.nn.Parameter(draws(3, 4))
    average = EMAModel([parameter], decay=0.9999, update_after_step=1)
    state = training.initial_state({"w": parameter.detach()}, config=config)
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for seed in range(6):
            gradients = {"w": draws(3, 4, seed=seed)}
            state = training.update(state, gradients, training.global_norm(gradients), config=config)
            jax_gradients = to_jax(gradients)
            jax_state = jax_training.update(jax_state, jax_gradients, jax_training.global_norm(jax_gradients), config=config)
            parameter.data.copy_(state["model.w"])
            average.step([parameter])
            assert largest_difference({"w": state["ema.w"]}, {"w": average.shadow_params[0]}) <= 4
            assert largest_difference(jax_state, state) <= 16
    assert not torch.equal(state["ema.w"], state["model.w"])


def shares(parameters, x, *, batch_size, step, config):
    """Of mean((w x + b)**2) over the examples; b is frozen."""
    out = x @ parameters["w"].T + parameters["b"]
    loss = (out * out).sum() / batch_size
    return loss, {"loss": loss}


@BOTH
def test_what_is_frozen_gets_no_gradient_and_stays(module):
    config = replace(CONFIG, ema=EMAConfig())
    parameters = {"w": draws(3, 4), "b": draws(3, seed=1)}
    x = draws(5, 4, seed=2)
    with jax.enable_x64(True):
        if module is jax_training:
            parameters, x = to_jax(parameters), jnp.asarray(x.numpy())
        state = module.initial_state(parameters, config=config, frozen=("b",))
        assert set(state) == {"model.w", "model.b", "exp_avg.w", "exp_avg_sq.w", "ema.w", "ema.b", "step"}
        losses, gradients = module.metrics_and_gradients(shares, state, (x,), config=config)
        assert set(gradients) == {"w"}
        new_state, _ = module.finish(state, losses, gradients, config=config)
        assert np.array_equal(new_state["model.b"], parameters["b"]) and not np.array_equal(new_state["model.w"], parameters["w"])
        assert np.array_equal(new_state["ema.b"], parameters["b"])


@BOTH
def test_masters_stay_wide_and_the_scale_of_a_loss_changes_no_bit(module):
    config = replace(CONFIG, compute_dtype="bfloat16", accumulation_steps=2)
    seen = []

    def watched(parameters, x, **how):
        seen.append(str(parameters["w"].dtype).removeprefix("torch."))
        loss, _ = shares(parameters, module.in_compute_dtype(x, config), **how)
        loss = loss.float() if module is training else loss.astype("float32")
        return loss, {"loss": loss}

    parameters, x = {"w": draws(3, 4).float(), "b": draws(3, seed=1).float()}, draws(5, 4, seed=2).float()
    if module is jax_training:
        parameters, x = to_jax(parameters), jnp.asarray(x.numpy())
    state = module.initial_state(parameters, config=config)
    results = []
    for loss_scale in (1.0, 2.0**10):
        scaled = replace(config, loss_scale=loss_scale)
        losses, gradients = module.metrics_and_gradients(watched, state, (x,), config=scaled)
        new_state, norm = module.finish(state, losses, gradients, config=scaled)
        results.append({**new_state, **losses, "norm": norm})
    assert set(seen) == {"bfloat16"}
    for name, each in results[0].items():
        assert np.array_equal(each, results[1][name]), name
        assert name == "step" or str(each.dtype).removeprefix("torch.") == "float32"
    exact = module.metrics_and_gradients(shares, state, (x,), config=replace(config, compute_dtype=None))[1]
    far = max(float(abs(exact[name] - gradients[name]).max() / abs(exact[name]).max()) for name in exact)
    assert 1e-4 < far < 2e-2  # bfloat16's rounding, and not more


def test_the_scale_saves_gradients_that_float16_would_lose():
    config = replace(CONFIG, compute_dtype="float16")
    state = training.initial_state({"w": torch.ones(3, 4), "b": torch.zeros(3)}, config=config)
    tiny = torch.full((5, 4), 2.0**-14)

    def gradient(loss_scale: float) -> torch.Tensor:
        narrow = lambda parameters, x, **how: shares(parameters, x.half(), **how)  # noqa: E731
        return training.metrics_and_gradients(narrow, state, (tiny,), config=replace(config, loss_scale=loss_scale))[1]["w"]

    assert (gradient(1.0) == 0).all()
    torch.testing.assert_close(gradient(2.0**12), torch.full((3, 4), 2 * 4 * 2.0**-28), rtol=2e-3, atol=0)


@BOTH
def test_a_file_that_is_cut_off_or_foreign_is_told_apart(module, tmp_path):
    path = tmp_path / "run.safetensors"
    array = torch.ones(100) if module is training else jnp.ones(100)
    module.save_state({"model.w": array, "step": 2 * array[0]}, path)
    content = path.read_bytes()
    for some in (content[:0], content[:7], content[:50], content[:-1], b"no safetensors file, but long enough to be one"):
        path.write_bytes(some)
        with pytest.raises(ValueError, match=r"path must be a whole safetensors file, got .*run\.safetensors"):
            module.load_state(path)
    module.save_state({"model.w": array}, path)
    with pytest.raises(ValueError, match=r"path must be a file with the state of a run, got .*no entry 'step'"):
        module.load_state(path)
    with pytest.raises(FileNotFoundError):
        module.load_state(tmp_path / "none")
    with pytest.raises(OSError, match="nowhere"):
        module.save_state({"step": 2 * array[0]}, tmp_path / "nowhere" / "run.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["run.safetensors"]  # nothing half-written is left


@BOTH
def test_a_file_says_of_which_config_its_run_is(module, tmp_path):
    path, config = tmp_path / "run.safetensors", replace(CONFIG, ema=EMAConfig())
    array = torch.ones(3) if module is training else jnp.ones(3)
    state = {"model.w": array, "step": 2 * array[0]}
    module.save_state(state, path, config=config)
    assert module.load_state(path, config=replace(config, activation_checkpointing=True)).keys() == state.keys()
    with pytest.raises(ValueError, match=r"whose config has ema\.decay 0\.5, got .*run\.safetensors, whose has 0\.9999"):
        module.load_state(path, config=replace(config, ema=EMAConfig(decay=0.5)))
    module.save_state(state, path)
    with pytest.raises(ValueError, match=r"path must hold a run and its config, got .*, which has no config"):
        module.load_state(path, config=config)


@BOTH
def test_a_run_can_be_saved_before_its_first_step(module, tmp_path):
    config = replace(CONFIG, ema=EMAConfig())
    parameters = {"w": torch.ones(3) if module is training else jnp.ones(3)}
    state = module.initial_state(parameters, config=config)
    module.save_state(state, tmp_path / "run.safetensors")
    loaded = module.load_state(tmp_path / "run.safetensors")
    assert loaded.keys() == state.keys() and all(np.array_equal(loaded[name], each) for name, each in state.items())


SAVES_FOREVER = """
import sys, torch
from pathlib import Path
from gaugeblock.reference.torch import training
step = 0
while True:
    step += 1
    training.save_state({"model.w": torch.full((500_000,), float(step)), "step": torch.tensor(step)}, Path(sys.argv[1]))
    print(step, flush=True)
"""


def test_a_run_that_is_killed_at_any_moment_leaves_the_last_whole_state(tmp_path):
    path, random = tmp_path / "run.safetensors", np.random.default_rng(0)
    with subprocess.Popen([sys.executable, "-c", SAVES_FOREVER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        for moment in random.uniform(0, 0.02, size=20):
            time.sleep(moment)
            process.send_signal(signal.SIGSTOP)  # what would be there if it were killed now
            state = training.load_state(path)
            assert (state["model.w"] == state["step"]).all()
            process.send_signal(signal.SIGCONT)
        process.kill()
        written = [int(each) for each in process.stdout.read().split()]
    state = training.load_state(path)
    assert (state["model.w"] == state["step"]).all() and int(state["step"]) in (written[-1], written[-1] + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must"),
        ({"accumulation_steps": 0}, "accumulation_steps must be positive"),
        ({"loss_scale": 0.0}, "loss_scale must be positive"),
        ({"num_warmup_steps": -1}, "num_warmup_steps must not be negative"),
        ({"learning_rate_schedule": "cosine"}, "num_training_steps must be given for learning_rate_schedule 'cosine', got None"),
        ({"num_training_steps": 0}, "num_training_steps must be at least 1 and num_warmup_steps, 0, got 0"),
        (
            {"num_warmup_steps": 5, "num_training_steps": 4},
            "num_training_steps must be at least 1 and num_warmup_steps, 5, got 4",
        ),
        ({"learning_rate_schedule": "polynomial", "num_training_steps": 9}, "learning_rate_schedule must be"),
        ({"optimizer": "lion"}, "optimizer must be 'adamw' or 'adam' or 'sgd', got 'lion'"),
        ({"compute_dtype": "float64"}, "compute_dtype must be"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 1.5}, "min_decay and decay must rise"),
        ({"min_decay": 0.99999}, "min_decay and decay must rise"),
        ({"update_after_step": -1}, "update_after_step must not be negative"),
        ({"power": 0.0}, "power must be positive"),
    ],
)
def test_a_bad_average_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(EMAConfig(), **changes)
