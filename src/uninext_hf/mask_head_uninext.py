"""Dynamic mask head without parameters: predicted kernels x mask features -> mask logits -> masks at any size.

Sources: paper section 3.3 (condition convolution); official `models/ddetrs_dn.py` 52-70 and 755-807 (layout and
coordinates), 1148-1212 (convolutions, aligned upsampling), `uninext_img.py` 367-485 (masks of an image).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def num_kernel_values(mask_feature_dim: int, mask_head_layers: int) -> int:
    """Values a query predicts: weights and biases of `mask_head_layers` 1x1 convolutions (169 officially).

    The first convolution reads two relative coordinates and `mask_feature_dim` features, the last one writes one
    logit, those between have `mask_feature_dim` channels.
    """
    return sum(inputs * outputs + outputs for inputs, outputs in _layer_shapes(mask_feature_dim, mask_head_layers))


def _layer_shapes(channels: int, layers: int) -> list[tuple[int, int]]:
    inputs = [channels + 2] + [channels] * (layers - 1)
    outputs = [channels] * (layers - 1) + [1]
    return list(zip(inputs, outputs, strict=True))


def _split_kernels(kernels: Tensor, channels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (N, out, in) and biases (N, out) per layer; all weights are stored first, then all biases."""
    layers = 1
    while num_kernel_values(channels, layers) < kernels.shape[-1]:
        layers += 1
    shapes = _layer_shapes(channels, layers)
    if num_kernel_values(channels, layers) != kernels.shape[-1]:
        raise ValueError(
            f'"kernels" must hold the values of 1x1 convolutions over {channels} mask features '
            f"({[num_kernel_values(channels, n) for n in range(1, 5)]} for 1 to 4 layers), got {kernels.shape[-1]}."
        )
    parts = kernels.split([i * o for i, o in shapes] + [o for _, o in shapes], dim=-1)
    weights = [part.reshape(-1, o, i) for part, (i, o) in zip(parts[:layers], shapes, strict=True)]
    return weights, list(parts[layers:])


def dynamic_mask_logits(
    kernels: Tensor, features: Tensor, origins: Tensor, stride: int = 8, chunk_size: int = 32
) -> Tensor:
    """Mask logits of some instances of one picture, at twice the resolution of the mask features.

    Works in float32 whatever comes in: coordinates reach the picture's width, which bfloat16 resolves to 4 pixels.

    Args:
        kernels: (N, K) values predicted per query, see `num_kernel_values`.
        features: (C, h, w) mask features of the picture.
        origins: (N, 2) x, y in pixels of the un-padded network input: centre of the box that entered the last
            decoder layer. Relative coordinates are `origin - location`, not normalised.
        stride: input pixels per feature, so feature (i, j) lies at `stride * (j, i) + stride / 2`.
        chunk_size: instances per block, so that intermediate values stay small.

    Returns:
        (N, 2h, 2w) float32 logits; pixel (i, j) covers `stride / 2` input pixels.
    """
    channels, height, width = features.shape
    kernels, features, origins = kernels.float(), features.float(), origins.float()
    ys = torch.arange(height, device=features.device, dtype=torch.float32) * stride + stride // 2
    xs = torch.arange(width, device=features.device, dtype=torch.float32) * stride + stride // 2
    # The first convolution of (origin - location) is linear in the location, so locations join the features as two
    # rows with negative weights and origins move into the bias: one GEMM instead of N concatenated inputs.
    # Both are taken from the middle of the picture, which halves the numbers that cancel.
    middle = torch.stack([xs[-1:], ys[-1:]], dim=-1) / 2
    xs, ys, origins = xs - middle[0, 0], ys - middle[0, 1], origins - middle
    grid = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)])
    inputs = torch.cat([features, grid]).flatten(1)

    def run(kernels: Tensor, origins: Tensor) -> Tensor:
        weights, biases = _split_kernels(kernels, channels)
        first = torch.cat([weights[0][..., 2:], -weights[0][..., :2]], dim=-1)
        bias = biases[0] + (weights[0][..., :2] * origins[:, None]).sum(-1)
        hidden = torch.addmm(bias.reshape(-1, 1), first.flatten(0, 1), inputs)
        hidden = hidden.view(kernels.shape[0], weights[0].shape[1], height * width)
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            hidden = torch.baddbmm(bias[..., None], weight, hidden.relu())
        return aligned_upsample(hidden.view(-1, 1, height, width), 2)[:, 0]

    # Autocast would turn the float32 products back into half precision ones.
    with torch.autocast(features.device.type, enabled=False):
        if kernels.shape[0] <= chunk_size or torch.compiler.is_compiling():
            return run(kernels, origins)
        blocks = zip(kernels.split(chunk_size), origins.split(chunk_size), strict=True)
        return torch.cat([run(*block) for block in blocks])


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling by an integer factor that keeps the sampling grid where the official code has it.

    Args:
        maps: (N, C, h, w). One more row and column is replicated at the lower right, the map is resized to
            `factor * h + 1` with aligned corners, then shifted by `factor // 2` and cropped.
        factor: at least 1.

    Returns:
        (N, C, factor * h, factor * w).
    """
    if factor == 1:
        return maps
    height, width = maps.shape[-2:]
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    maps = F.interpolate(maps, size=(factor * height + 1, factor * width + 1), mode="bilinear", align_corners=True)
    maps = F.pad(maps, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return maps[..., : factor * height, : factor * width]


def _taps(output: int, inputs: int, size: int, step: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of two neighbouring logits and the weight of the second, for each of `output` pixels of one axis.

    Official: logits x4 bilinear, crop to `inputs` pixels, then nearest to `output`. Nearest picks one of the x4
    pixels, and each of those is a blend of two logits, so both steps are one blend.
    """
    position = torch.arange(output, device=device, dtype=torch.float32)
    position = (position * (inputs / output)).floor().clamp(max=inputs - 1)
    source = ((position + 0.5) / step - 0.5).clamp(min=0)
    low = source.floor().clamp(max=size - 1)
    return low.long(), (low + 1).clamp(max=size - 1).long(), source - low


def masks_at_size(
    logits: Tensor,
    input_size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
    threshold: float = 0.5,
    step: int = 4,
) -> Tensor:
    """Binary masks in the size of the original picture, straight from low-resolution logits.

    Equal to the official three steps (bilinear x4, threshold, crop to the un-padded input, nearest to the original
    size), of which only the pixels that survive are computed.

    Args:
        logits: (N, h, w) float32.
        input_size: height and width of the un-padded network input.
        output_size: height and width of the result; `None` for `input_size`.
        threshold: probability above which a pixel belongs to the instance, in (0, 1).
        step: input pixels per logit.

    Returns:
        (N, H, W) bool.
    """
    if not 0 < threshold < 1:
        raise ValueError(f'"threshold" must be in (0, 1), got {threshold}.')
    height, width = input_size
    out_height, out_width = output_size or input_size
    top, bottom, down = _taps(out_height, height, logits.shape[-2], step, logits.device)
    left, right, across = _taps(out_width, width, logits.shape[-1], step, logits.device)
    level = torch.tensor(threshold, dtype=torch.float64).logit().item()
    masks = []
    for block in logits.split(16):
        columns = torch.lerp(block[..., left], block[..., right], across)
        masks.append(torch.lerp(columns[:, top], columns[:, bottom], down[:, None]) > level)
    return torch.cat(masks) if masks else logits.new_zeros((0, out_height, out_width), dtype=torch.bool)


__all__ = ["aligned_upsample", "dynamic_mask_logits", "masks_at_size", "num_kernel_values"]
