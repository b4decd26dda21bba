"""Parameters of the UNets by name, as diffusers saves them."""

from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.states import Shapes, convolution_shapes, linear_shapes, norm_shapes, under

MLP_RATIO = 4  # width of a transformer block's hidden layer, in units of its channels


def state_shapes(config: UNetConfig) -> Shapes:
    """Return the shape of every parameter by name, in the order in which a UNet uses them."""
    channels, embedded = config.block_out_channels, config.time_embed_dim
    shapes = under("conv_in", convolution_shapes(channels[0], config.in_channels, 3))
    shapes |= under("time_embedding", embedding_shapes(embedded, channels[0]))
    if config.addition_time_embed_dim:
        shapes |= under("add_embedding", embedding_shapes(embedded, config.projection_class_embeddings_input_dim))
    kept = [channels[0]]  # channels of what is kept on the way down
    for level, width in enumerate(channels):
        widths = [kept[-1], *[width] * (config.layers_per_block - 1)]
        shapes |= under(f"down_blocks.{level}", layers_shapes(widths, level=level, config=config))
        kept += [width] * config.layers_per_block
        if level < config.num_levels - 1:
            shapes |= under(f"down_blocks.{level}.downsamplers.0.conv", convolution_shapes(width, width, 3))
            kept.append(width)
    for index in range(2):
        shapes |= under(f"mid_block.resnets.{index}", resnet_shapes(channels[-1], channels[-1], embedded))
    shapes |= under("mid_block.attentions.0", transformer_shapes(config.num_levels - 1, config))
    below = channels[-1]
    for index, level in enumerate(reversed(range(config.num_levels))):
        width = channels[level]
        widths = [each + kept.pop() for each in (below, *[width] * config.layers_per_block)]
        shapes |= under(f"up_blocks.{index}", layers_shapes(widths, level=level, config=config))
        if level > 0:
            shapes |= under(f"up_blocks.{index}.upsamplers.0.conv", convolution_shapes(width, width, 3))
        below = width
    shapes |= under("conv_norm_out", norm_shapes(channels[0]))
    return shapes | under("conv_out", convolution_shapes(config.out_channels, channels[0], 3))


def embedding_shapes(out_features: int, in_features: int) -> Shapes:
    """Return the shapes of two linear layers one after the other."""
    second = linear_shapes(out_features, out_features)
    return under("linear_1", linear_shapes(out_features, in_features)) | under("linear_2", second)


def layers_shapes(in_channels: list[int], *, level: int, config: UNetConfig) -> Shapes:
    """Return the shapes of a level's ResNet blocks, which read so many channels each, and of the transformers behind them."""
    shapes: Shapes = {}
    for index, width in enumerate(in_channels):
        own = resnet_shapes(config.block_out_channels[level], width, config.time_embed_dim)
        shapes |= under(f"resnets.{index}", own)
        if config.has_transformers(level):
            shapes |= under(f"attentions.{index}", transformer_shapes(level, config))
    return shapes


def resnet_shapes(out_channels: int, in_channels: int, time_embed_dim: int) -> Shapes:
    """Return the shapes of a ResNet block, whose shortcut is a convolution where the number of channels changes."""
    shapes = (
        under("norm1", norm_shapes(in_channels))
        | under("conv1", convolution_shapes(out_channels, in_channels, 3))
        | under("time_emb_proj", linear_shapes(out_channels, time_embed_dim))
        | under("norm2", norm_shapes(out_channels))
        | under("conv2", convolution_shapes(out_channels, out_channels, 3))
    )
    return (
        shapes
        if in_channels == out_channels
        else shapes | under("conv_shortcut", convolution_shapes(out_channels, in_channels, 1))
    )


def transformer_shapes(level: int, config: UNetConfig) -> Shapes:
    """Return the shapes of a level's transformer."""
    width = config.block_out_channels[level]
    project = linear_shapes(width, width) if config.use_linear_projection else convolution_shapes(width, width, 1)
    shapes = under("norm", norm_shapes(width)) | under("proj_in", project)
    for index in range(config.transformer_layers_per_block[level]):
        shapes |= under(f"transformer_blocks.{index}", transformer_block_shapes(width, config.cross_attention_dim))
    return shapes | under("proj_out", project)


def transformer_block_shapes(width: int, cross_attention_dim: int) -> Shapes:
    """Return the shapes of a block of two attentions and a feed-forward network."""
    return (
        under("norm1", norm_shapes(width))
        | under("attn1", attention_shapes(width, width))
        | under("norm2", norm_shapes(width))
        | under("attn2", attention_shapes(width, cross_attention_dim))
        | under("norm3", norm_shapes(width))
        | under("ff.net.0.proj", linear_shapes(2 * MLP_RATIO * width, width))
        | under("ff.net.2", linear_shapes(width, MLP_RATIO * width))
    )


def attention_shapes(width: int, asked_width: int) -> Shapes:
    """Return the shapes of an attention of tokens to others of another width."""
    shapes = under("to_q", linear_shapes(width, width, bias=False))
    for name in ("to_k", "to_v"):
        shapes |= under(name, linear_shapes(width, asked_width, bias=False))
    return shapes | under("to_out.0", linear_shapes(width, width))
