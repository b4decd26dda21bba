"""Bugs of the steps of samplers."""

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.sampler_steps import Ddim, Ddpm, Denoiser, Edm, Euler, Flow, Heun


@fault(
    caught_by="parity", kind="structural", source="maxdiffusion's DDPM: always one timestep back; diffusers#9261, #11347, #12633"
)
class PreviousOfATable(Ddpm):
    """The previous rate is guessed from this one, not taken from the timestep visited next."""

    def __call__(self, noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, *, config):
        guessed = alphas_cumprod + (1 - alphas_cumprod) / 2
        return super().__call__(noised, prediction, noise, alphas_cumprod, guessed, config=config)


@fault(caught_by="parity", kind="structural", source="DDPM ports: sigma for its square")
class VarianceForDeviation(Ddpm):
    """Noise is multiplied by the variance."""

    def deviation(self, a, previous, beta, fraction, config):
        return super().deviation(a, previous, beta, fraction, config) ** 2


@fault(caught_by="parity", kind="structural", source="variance_type ignored")
class SmallVarianceAlways(Ddpm):
    """fixed_large is taken for fixed_small."""

    def deviation(self, a, previous, beta, fraction, config):
        small = ((1 - previous) / (1 - a) * beta).sqrt()
        return small if config.variance_type == "fixed_large" else super().deviation(a, previous, beta, fraction, config)


@fault(caught_by="parity", kind="structural", source="improved DDPM: the model's -1 to 1 taken for 0 to 1")
class ShareNotRescaled(Ddpm):
    """The share of the learned variance is the model's output itself."""

    def learned(self, posterior, beta, share):
        return super().learned(posterior, beta, 2 * share - 1)


@fault(caught_by="parity", kind="structural", source="learned variances: which end is which")
class EndsOfVarianceExchanged(Ddpm):
    """The learned variance goes from large to small."""

    def learned(self, posterior, beta, share):
        return super().learned(beta, posterior, share)


@fault(caught_by="parity", kind="structural", source="posterior mean with 1 - a of the wrong timestep")
class CoefficientOfAnotherTimestep(Ddpm):
    """1 - a is that of the previous timestep in the share of the data."""

    def mean(self, data, x, a, previous, beta):
        of_x = (a / previous).sqrt() * (1 - previous) / (1 - a)
        return previous.sqrt() * beta / (1 - previous / 2) * data + of_x * x


@fault(caught_by="parity", kind="structural", source="clip_sample ignored")
class NotClipped(Ddpm):
    """Data are taken as they are."""

    def clip(self, data, config):
        return self.threshold(data, config) if config.thresholding else data


@fault(caught_by="batch_invariance", kind="structural", smallest=2, source="dynamic thresholding over the whole batch")
class OneThresholdForTheBatch(Ddpm):
    """The quantile is that of all examples together."""

    def threshold(self, data, config):
        if not data.numel():
            return data
        limit = data.abs().flatten().quantile(config.dynamic_thresholding_ratio).clamp(1, config.sample_max_value)
        return data.clamp(-limit, limit) / limit


@fault(caught_by="parity", kind="structural", source="dynamic thresholding without its division")
class ThresholdWithoutDivision(Ddim):
    """Data are clipped to the quantile and stay as large as that."""

    def threshold(self, data, config):
        limits = data.abs().flatten(1).quantile(config.dynamic_thresholding_ratio, dim=1) if len(data) else data.sum((1, 2))
        limits = limits.clamp(1, config.sample_max_value).view(-1, 1, 1)
        return data.clamp(-limits, limits)


@fault(caught_by="parity", kind="structural", source="Glide's correction left out: epsilon not recomputed after clipping")
class EpsilonOfUnclippedData(Ddim):
    """use_clipped_model_output is ignored."""

    def epsilon_of(self, data, epsilon, x, a):
        return epsilon


@fault(caught_by="parity", kind="structural", source="DDIM's direction without its share of the new noise")
class NothingMadeUpForNewNoise(Ddim):
    """The direction is as long with new noise as without."""

    def step(self, data, epsilon, z, a, previous, eta):
        return previous.sqrt() * data + (1 - previous).sqrt() * epsilon + eta * self.deviation(a, previous) * z


@fault(caught_by="parity", kind="structural", source="v-prediction's epsilon with a minus")
class VelocitySignOfEpsilon(Ddim):
    """Noise of v: alpha v − sigma x."""

    def predicted(self, x, p, a, config):
        data, epsilon = super().predicted(x, p, a, config)
        return data, (a.sqrt() * p - (1 - a).sqrt() * x if config.prediction_type == "v_prediction" else epsilon)


@fault(caught_by="parity", kind="structural", source="final alpha: set_alpha_to_one ignored")
class LastAlphaOfTheTable(Ddim):
    """A step never leads to the data, but to 0.99915 of them."""

    def step(self, data, epsilon, z, a, previous, eta):
        return super().step(data, epsilon, z, a, previous.clamp(max=0.99915), eta)


@fault(caught_by="parity", kind="precision", source="alphas_cumprod in the model's dtype", dtypes=("bfloat16",))
class TableInBfloat16(Ddim):
    """The rates were held in bfloat16."""

    def step(self, data, epsilon, z, a, previous, eta):
        return super().step(data, epsilon, z, a.bfloat16().float(), previous.bfloat16().float(), eta)


@fault(caught_by="parity", kind="structural", source="k-diffusion ports: sigma for sigma_hat in the data")
class DataAtSigma(Euler):
    """Predicted noise is taken away as far as it was before the churn."""

    def data(self, x, p, sigma, higher, prediction_type):
        return super().data(x, p, sigma, sigma, prediction_type)


@fault(caught_by="parity", kind="structural", source="k-diffusion ports: sigma for sigma_hat in the step")
class StepFromSigma(Euler):
    """The step begins at sigma, not where the churn led."""

    def follow(self, x, data, sigma, higher, after):
        return x + (x - data) / higher * (after - sigma)


@fault(caught_by="parity", kind="structural", source="new noise of the sum's variance")
class NoiseOfTheHigherSigma(Euler):
    """The difference of the sigmas is taken for the root of the difference of their squares."""

    def added(self, sigma, higher, churn, noise_scale):
        return noise_scale * (higher - sigma)


@fault(caught_by="parity", kind="structural", source="s_noise ignored")
class NoiseNotScaled(Euler):
    """noise_scale is ignored."""

    def added(self, sigma, higher, churn, noise_scale):
        return super().added(sigma, higher, churn, 1.0)


@fault(caught_by="parity", kind="structural", source="v-prediction's sign in Euler's data")
class VelocityAdded(Euler):
    """Data of v: both are added."""

    def data(self, x, p, sigma, higher, prediction_type):
        return super().data(x, -p if prediction_type == "v_prediction" else p, sigma, higher, prediction_type)


@fault(caught_by="parity", kind="structural", source="diffusers#1512: Heun's second stage at the first one's sigma")
class SecondStageAtTheFirstSigma(Heun):
    """Data of the second stage are those at the first one's sigma, which epsilon hides: its slope is epsilon anyway."""

    def second(self, x, p, sigma, after, config):
        data = Euler().data(x, p, sigma, sigma, config.prediction_type)
        if config.prediction_type == "epsilon":
            return super().second(x, p, sigma, after, config)
        return (x - Denoiser().clip(data, config)) / after


@fault(caught_by="parity", kind="structural", source="Heun's second stage goes on from the first")
class GoesOnFromThePredictor(Heun):
    """The mean slope is followed from where the first one led."""

    def follow(self, x, euler, first, second, sigma, after):
        return super().follow(euler, euler, first, second, sigma, after)


@fault(caught_by="parity", kind="structural", source="the corrector left out")
class FirstSlopeAlone(Heun):
    """Euler's step, and the second slope counts for nothing."""

    def follow(self, x, euler, first, second, sigma, after):
        return super().follow(x, euler, first, first + 0 * second, sigma, after)


@fault(caught_by="parity", kind="structural", source="EDM v-prediction with epsilon's sign")
class SignOfTheScaledOutput(Edm):
    """The scaled output is added, whatever is predicted."""

    def scaled(self, x, p, sigma, higher, config):
        return super().scaled(x, -p if config.prediction_type == "v_prediction" else p, sigma, higher, config)


@fault(caught_by="parity", kind="structural", source="EDM: outputs scaled at sigma")
class ScaledAtSigma(Edm):
    """Outputs are scaled as before the churn."""

    def scaled(self, x, p, sigma, higher, config):
        return super().scaled(x, p, sigma, sigma, config)


@fault(caught_by="parity", kind="structural", source="EDM without its skip")
class NoSkip(Edm):
    """The data are the scaled output alone."""

    def scaled(self, x, p, sigma, higher, config):
        return super().scaled(0 * x, p, sigma, higher, config)


@fault(caught_by="parity", kind="structural", source="EasyDeL and SD3: velocity sign of loss and sampler")
class AgainstTheVelocity(Flow):
    """The velocity is taken for data − noise."""

    def follow(self, x, v, z, sigma, after):
        return super().follow(x, -v, z, sigma, after)


@fault(caught_by="parity", kind="structural", source="stochastic flow with the sigma of this step")
class NoisedAsBefore(Flow):
    """Data get as much noise as they had."""

    def anew(self, x, v, z, sigma, after):
        return super().anew(x, v, z, sigma, sigma)


@fault(caught_by="parity", kind="structural", source="the last step skipped")
class LastStepSkipped(Flow):
    """Nothing is done where the next sigma is 0."""

    def follow(self, x, v, z, sigma, after):
        return super().follow(x, v * (after > 0), z, sigma, after)


@fault(caught_by="parity", kind="precision", source="samplers in the model's dtype: diffusers casts to float32 for it",
       dtypes=("bfloat16",))  # fmt: skip
class StepLengthInBfloat16(Flow):
    """The length of the step is rounded to bfloat16."""

    def follow(self, x, v, z, sigma, after):
        return x + (after - sigma).bfloat16().float() * v
