"""The Stable Diffusion step on many ranks: each has a part of the batch, of every parameter and of its moments (FSDP2).

The UNet and the text encoders that are trained are one sharded module, whose blocks are theirs. Of what is frozen each rank has a
part as well, in modules of their own. As in `train_image_diffusion`, the ranks first agree on the parts' sizes and on bad calls,
and run as many microbatches, some of them empty.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import fully_sharded_models
from gaugeblock.optimized.distributed.fully_sharded_models import CLIP_LAYERS, UNET_BLOCKS, Shardable
from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.optimized.distributed.training import ShardedRun
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.torch import train_stable_diffusion as reference
from gaugeblock.reference.torch.train_image_diffusion import draw_latents
from gaugeblock.reference.torch.train_stable_diffusion import Metrics, Tensors

Texts = tuple[torch.Tensor, torch.Tensor | None]


def train_step(
    state: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    input_ids: torch.Tensor,
    time_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: StableDiffusionConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """Make one update on the mean loss of a batch that lies on all ranks; the given state is not written to.

    Scatters and gathers the whole state; a training run keeps a `ShardedTrainer`.

    Args:
        state, frozen: As of the reference, the same on every rank.
        images, input_ids, time_ids, example_ids: As of the reference, of this rank's examples. Any number, also 0.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        new_state: As state, the same on every rank.
        metrics: In the dtype of the state; of the whole batch, the same on every rank.

    Raises:
        TypeError, ValueError: As the reference; or no rank has an example, or another rank's call raises, or does not fit to this
            one. Then all ranks raise, before any work.
        FloatingPointError: As the reference, on every rank; raised before any update.

    Source: `gaugeblock.reference.torch.train_stable_diffusion.train_step`; the sharding is that of ZeRO (arXiv:1910.02054),
    stage 3, by torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, frozen, config=config, mesh=mesh)
    metrics = trainer.step(images, input_ids, time_ids, example_ids)
    return trainer.state(), metrics


class ShardedTrainer:
    """A training run of which each rank holds its part; every rank makes the same calls.

    Args:
        state, frozen: As of `train_step`: whole, the same on every rank. A run on embeddings alone has no text encoders in
            `frozen`, nor in its config.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Raises:
        TypeError, ValueError: As `train_step`, of the state and of what is frozen.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        frozen: Mapping[str, torch.Tensor],
        *,
        config: StableDiffusionConfig,
        mesh: DeviceMesh,
    ) -> None:
        self.config, unused = config, reference.unused_names(config)
        shapes = reference.state_shapes(config)
        self.run = ShardedRun(TRAINED, state, shapes, model_config=config, config=config, mesh=mesh, frozen=unused)
        self._agree_on_frozen(frozen)
        if config.vae is not None:
            of_vae = states.part(frozen, "vae")
            self.vae = fully_sharded_models.encode.sharded(of_vae, config=config.vae, mesh=mesh, frozen=of_vae)
        if config.text_encoders and not config.train_text_encoder:
            encoders = {name: each for name, each in frozen.items() if name.startswith("text_encoder")}
            self.text_encoders = TEXT_ENCODERS.sharded(encoders, config=config, mesh=mesh, frozen=encoders)

    def step(self, images: torch.Tensor, input_ids: torch.Tensor, time_ids: torch.Tensor, example_ids: torch.Tensor) -> Metrics:
        """Make one update on the mean loss of the batch of all ranks; arguments, result and errors as of `train_step`."""
        check = partial(validation.stable_diffusion_batch, images, input_ids, time_ids, example_ids, self.config)
        batch_sizes = self.run.agree_on_batch(check, {"images": images})
        if self.config.train_text_encoder:
            return self._step(batch_sizes, images, input_ids, None, None, time_ids, example_ids)
        with torch.no_grad():
            hidden_states, *pooled = self.text_encoders(input_ids)
        return self._step(batch_sizes, images, None, hidden_states, pooled[0] if pooled else None, time_ids, example_ids)

    def step_on_embeddings(
        self,
        images: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None,
        time_ids: torch.Tensor,
        example_ids: torch.Tensor,
    ) -> Metrics:
        """As `step`, on captions that are encoded already; as of the reference."""
        others = encoder_hidden_states, text_embeds, time_ids, example_ids
        check = partial(validation.stable_diffusion_batch_on_embeddings, images, *others, self.config)
        return self._step(self.run.agree_on_batch(check, {"images": images}), images, None, *others)

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        return self.run.state()

    def _step(self, batch_sizes: list[int], images: torch.Tensor, *others: torch.Tensor | None) -> Metrics:
        step, *_, example_ids = int(self.run.updates), *others
        assert example_ids is not None
        latents = self._encode_images(images, example_ids, step)

        def shares(_: int, latents: torch.Tensor, *others: Any) -> tuple[torch.Tensor, Tensors]:
            losses_B = reference.example_losses(self.run.model, latents, *others, step=step, config=self.config)
            loss = losses_B.sum() / sum(batch_sizes)
            return loss, {"loss": loss}

        metrics, gradient_norm = self.run.step(shares, (latents, *others), len(self.run.microbatch_sizes(batch_sizes)))
        return Metrics(**metrics, gradient_norm=gradient_norm)

    def _encode_images(self, images: torch.Tensor, example_ids: torch.Tensor, step: int) -> torch.Tensor:
        if self.config.vae is None:
            return images
        with torch.no_grad():
            mean, logvar = self.vae(images)
            return draw_latents(mean, logvar, example_ids, step, seed=self.config.seed, config=self.config.vae)

    def _agree_on_frozen(self, frozen: Mapping[str, torch.Tensor]) -> None:
        shapes = reference.frozen_shapes(self.config)
        like = next(iter(self.run.shards["model"].values()))
        check = partial(validation.state_entries, frozen, shapes, like=like, name="frozen")
        agree_on_model_call("frozen", lambda: next(iter(frozen.values()), like), check, {}, self.run.mesh)


def _predict(
    gathered: Callable[..., Any], state: Any, *arrays: Any, config: StableDiffusionConfig, mesh: DeviceMesh
) -> torch.Tensor:
    encode = partial(fully_sharded_models.clip_text.predict, gathered, mesh=mesh)
    unet = fully_sharded_models.unet_text_time if config.is_told_sizes else fully_sharded_models.unet
    denoise = partial(unet.predict, gathered, mesh=mesh)
    return reference.predict(encode, denoise, state, *arrays, config=config)


def _encode(
    gathered: Callable[..., Any], state: Any, input_ids: torch.Tensor, *, config: StableDiffusionConfig, mesh: DeviceMesh
) -> tuple[torch.Tensor, ...]:
    """Return hidden states, and the pooled result where the UNet is told it."""
    encode = partial(fully_sharded_models.clip_text.predict, gathered, mesh=mesh)
    hidden_states, pooled = reference.tell_texts(encode, state, input_ids, config=config)
    return (hidden_states,) if pooled is None else (hidden_states, pooled)


ENCODER_LAYERS = rf"text_encoder(?:_\d+)?\.{CLIP_LAYERS}"
TRAINED = Shardable(predict=_predict, blocks=rf"unet\.{UNET_BLOCKS}|{ENCODER_LAYERS}")
TEXT_ENCODERS = Shardable(predict=_encode, blocks=ENCODER_LAYERS)
