"""Steps of samplers, simulated: float32 inside, rounded once."""

import torch

from gaugeblock.conformance.selftest.simulated.predictions import per_example
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig


class Denoiser:
    """What DDPM and DDIM have in common: data and noise that a prediction means."""

    def predicted(
        self, x: torch.Tensor, p: torch.Tensor, a: torch.Tensor, config: DiffusionScheduleConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Data, clipped, and noise, as it was."""
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        match config.prediction_type:
            case "epsilon":
                data, epsilon = (x - sigma * p) / alpha, p
            case "sample":
                data, epsilon = p, (x - alpha * p) / sigma
            case _:
                data, epsilon = alpha * x - sigma * p, alpha * p + sigma * x
        return self.clip(data, config), epsilon

    def clip(self, data: torch.Tensor, config: DiffusionScheduleConfig) -> torch.Tensor:
        """As the config says."""
        if config.thresholding:
            return self.threshold(data, config)
        if config.clip_sample:
            return data.clamp(-config.clip_sample_range, config.clip_sample_range)
        return data

    def threshold(self, data: torch.Tensor, config: DiffusionScheduleConfig) -> torch.Tensor:
        """By a quantile of each example."""
        if not len(data):
            return data
        quantiles = torch.quantile(data.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        limits = quantiles.clamp(1, config.sample_max_value).view(-1, 1, 1)
        return data.clamp(-limits, limits) / limits


class Ddpm(Denoiser):
    """`sampler_steps.ddpm_step`."""

    contract = "sampler_steps.ddpm_step"

    def __call__(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        previous_alphas_cumprod: torch.Tensor,
        *,
        config: DiffusionScheduleConfig,
    ) -> torch.Tensor:
        validation.ddpm_step(noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, config)
        x, z = noised.float(), noise.float()
        a, previous = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
        output, fraction = prediction.float()[:, : x.shape[1]], prediction.float()[:, x.shape[1] :]
        data, _ = self.predicted(x, output, a, config)
        beta = self.beta(a, previous)
        mean = self.mean(data, x, a, previous, beta)
        return (mean + self.deviation(a, previous, beta, fraction, config) * z).to(noised.dtype)

    def beta(self, a: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """The variance that is added on the way back."""
        return (previous - a) / previous

    def mean(
        self, data: torch.Tensor, x: torch.Tensor, a: torch.Tensor, previous: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        """Of the posterior."""
        of_x = (a / previous).sqrt() * (1 - previous) / (1 - a)
        return previous.sqrt() * beta / (1 - a) * data + of_x * x

    def deviation(
        self,
        a: torch.Tensor,
        previous: torch.Tensor,
        beta: torch.Tensor,
        fraction: torch.Tensor,
        config: DiffusionScheduleConfig,
    ) -> torch.Tensor:
        """As the config says."""
        posterior = (1 - previous) / (1 - a) * beta
        match config.variance_type:
            case "fixed_small":
                return posterior.sqrt()
            case "fixed_large":
                return beta.sqrt()
            case _:
                return self.learned(posterior.clamp(min=1e-20), beta, (fraction + 1) / 2)

    def learned(self, posterior: torch.Tensor, beta: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Between the two, in logarithms."""
        return (0.5 * (share * beta.log() + (1 - share) * posterior.log())).exp()


class Ddim(Denoiser):
    """`sampler_steps.ddim_step`."""

    contract = "sampler_steps.ddim_step"

    def __call__(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        previous_alphas_cumprod: torch.Tensor,
        *,
        config: DiffusionScheduleConfig,
        eta: float,
        use_clipped_model_output: bool = False,
    ) -> torch.Tensor:
        rates = alphas_cumprod, previous_alphas_cumprod
        validation.ddim_step(noised, prediction, noise, *rates, config, eta, use_clipped_model_output)
        x, p, z = noised.float(), prediction.float(), noise.float()
        a, previous = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
        data, epsilon = self.predicted(x, p, a, config)
        if use_clipped_model_output:
            epsilon = self.epsilon_of(data, epsilon, x, a)
        return self.step(data, epsilon, z, a, previous, eta).to(noised.dtype)

    def epsilon_of(self, data: torch.Tensor, epsilon: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """What is left of x without the data."""
        return (x - a.sqrt() * data) / (1 - a).sqrt()

    def step(
        self, data: torch.Tensor, epsilon: torch.Tensor, z: torch.Tensor, a: torch.Tensor, previous: torch.Tensor, eta: float
    ) -> torch.Tensor:
        """To the last formula, but that what is left beside the new noise is found without a difference."""
        kept = (1 - eta**2) + eta**2 * a * (1 - previous) / (previous * (1 - a))
        direction = ((1 - previous) * kept).sqrt() * epsilon
        return previous.sqrt() * data + direction + eta * self.deviation(a, previous) * z

    def deviation(self, a: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Of DDPM."""
        return ((1 - previous) / (1 - a) * ((previous - a) / previous)).sqrt()


class Euler:
    """`sampler_steps.euler_step`."""

    contract = "sampler_steps.euler_step"

    def __call__(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        next_sigmas: torch.Tensor,
        *,
        prediction_type: str,
        churn: float = 0.0,
        noise_scale: float = 1.0,
    ) -> torch.Tensor:
        validation.euler_step(noised, prediction, noise, sigmas, next_sigmas, prediction_type, churn, noise_scale)
        sigma, after = per_example(sigmas, noised), per_example(next_sigmas, noised)
        higher = sigma * (1 + churn)
        x = noised.float() + self.added(sigma, higher, churn, noise_scale) * noise.float()
        data = self.data(x, prediction.float(), sigma, higher, prediction_type)
        return self.follow(x, data, sigma, higher, after).to(noised.dtype)

    def added(self, sigma: torch.Tensor, higher: torch.Tensor, churn: float, noise_scale: float) -> torch.Tensor:
        """How much new noise."""
        return noise_scale * (churn * (churn + 2)) ** 0.5 * sigma

    def data(
        self, x: torch.Tensor, p: torch.Tensor, sigma: torch.Tensor, higher: torch.Tensor, prediction_type: str
    ) -> torch.Tensor:
        """Kind by kind."""
        match prediction_type:
            case "epsilon":
                return x - higher * p
            case "sample":
                return p
            case _:
                return x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * p

    def follow(
        self, x: torch.Tensor, data: torch.Tensor, sigma: torch.Tensor, higher: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """The slope."""
        return x + (x - data) / higher * (after - higher)


class Heun:
    """`sampler_steps.heun_step`."""

    contract = "sampler_steps.heun_step"

    def __call__(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        euler_noised: torch.Tensor,
        euler_prediction: torch.Tensor,
        sigmas: torch.Tensor,
        next_sigmas: torch.Tensor,
        *,
        config: DiffusionScheduleConfig,
    ) -> torch.Tensor:
        validation.heun_step(noised, prediction, euler_noised, euler_prediction, sigmas, next_sigmas, config)
        sigma, after = per_example(sigmas, noised), per_example(next_sigmas, noised)
        x, euler = noised.float(), euler_noised.float()
        first = self.first(x, prediction.float(), sigma, config)
        second = self.second(euler, euler_prediction.float(), sigma, after, config)
        return self.follow(x, euler, first, second, sigma, after).to(noised.dtype)

    def first(self, x: torch.Tensor, p: torch.Tensor, sigma: torch.Tensor, config: DiffusionScheduleConfig) -> torch.Tensor:
        """The slope here."""
        data = Euler().data(x, p, sigma, sigma, config.prediction_type)
        return (x - Denoiser().clip(data, config)) / sigma

    def second(
        self, x: torch.Tensor, p: torch.Tensor, sigma: torch.Tensor, after: torch.Tensor, config: DiffusionScheduleConfig
    ) -> torch.Tensor:
        """The slope there."""
        return self.first(x, p, after, config)

    def follow(
        self,
        x: torch.Tensor,
        euler: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        sigma: torch.Tensor,
        after: torch.Tensor,
    ) -> torch.Tensor:
        """The mean of both."""
        return x + 0.5 * (first + second) * (after - sigma)


class Edm(Euler):
    """`sampler_steps.edm_step`."""

    contract = "sampler_steps.edm_step"

    def __call__(self, noised, prediction, noise, sigmas, next_sigmas, *, config, churn=0.0, noise_scale=1.0):
        validation.edm_step(noised, prediction, noise, sigmas, next_sigmas, config, churn, noise_scale)
        sigma, after = per_example(sigmas, noised), per_example(next_sigmas, noised)
        higher = sigma * (1 + churn)
        x = noised.float() + self.added(sigma, higher, churn, noise_scale) * noise.float()
        data = self.scaled(x, prediction.float(), sigma, higher, config)
        return self.follow(x, data, sigma, higher, after).to(noised.dtype)

    def scaled(
        self, x: torch.Tensor, p: torch.Tensor, sigma: torch.Tensor, higher: torch.Tensor, config: EDMScheduleConfig
    ) -> torch.Tensor:
        """The data."""
        square = higher**2 + config.sigma_data**2
        sign = 1 if config.prediction_type == "epsilon" else -1
        return config.sigma_data**2 / square * x + sign * higher * config.sigma_data / square.sqrt() * p


class Flow:
    """`sampler_steps.flow_step`."""

    contract = "sampler_steps.flow_step"

    def __call__(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        next_sigmas: torch.Tensor,
        *,
        stochastic_sampling: bool,
    ) -> torch.Tensor:
        validation.flow_step(noised, prediction, noise, sigmas, next_sigmas, stochastic_sampling)
        sigma, after = per_example(sigmas, noised), per_example(next_sigmas, noised)
        step = self.anew if stochastic_sampling else self.follow
        return step(noised.float(), prediction.float(), noise.float(), sigma, after).to(noised.dtype)

    def follow(self, x: torch.Tensor, v: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The velocity."""
        return x - (sigma - after) * v

    def anew(self, x: torch.Tensor, v: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Data with new noise."""
        return (1 - after) * (x - sigma * v) + after * z
