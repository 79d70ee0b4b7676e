"""Multi-scale deformable attention: the parameter-free op in pure torch, and the registry of faster ones.

The op: every query samples `L * P` points per head bilinearly (zeros outside, `align_corners=False`) and sums the
samples with its attention weights.

Sources: Zhu et al., "Deformable DETR", ICLR 2021, equation 3; official `ops/modules/ms_deform_attn.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import use_kernel_forward_from_hub

SpatialShapes = tuple[tuple[int, int], ...]
Implementation = Callable[[Tensor, SpatialShapes, Tensor, Tensor], Tensor]

QUERY_CHUNK = 1024


def deformable_attention_grid_sample(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The op through `grid_sample`, level by level: the form other implementations are tested against.

    Args:
        value: (B, S, H, D) with S the positions of all levels, level after level, rows first.
        spatial_shapes: height and width of each level, as Python numbers.
        sampling_locations: (B, Q, H, L, P, 2) x, y relative to the (padded) level, float32.
        attention_weights: (B, Q, H, L, P) float32.

    Returns:
        (B, Q, H * D) in the dtype of `value`. Samples and sums are float32 (float64 for float64 values).
    """
    batch, _, heads, dim = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grids = 2 * sampling_locations.to(compute) - 1
    samples = []
    parts = value.to(compute).split([height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        image = parts[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.to(compute).transpose(1, 2).flatten(3).flatten(0, 1)[:, None]
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return output.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def _axis(points: Tensor, size: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Lower and upper pixel around each point of one axis, each with its bilinear weight, pixels clamped to the level.

    Args:
        points: (...) relative coordinates. Not-a-number and infinite ones count as outside.
        size: pixels of the level, broadcastable.
    """
    # Two pixels beyond the border every weight is 0 already, so the clamp changes no result, and it bounds the rows.
    points = torch.minimum(torch.nan_to_num(points * size - 0.5, nan=-2.0).clamp(min=-2.0), size + 1)
    low, last = points.detach().floor(), size - 1
    high, upper = low + 1, points - low
    return (
        (torch.minimum(low.clamp(min=0), last), torch.where((low >= 0) & (low <= last), 1 - upper, 0.0)),
        (torch.minimum(high.clamp(min=0), last), torch.where((high >= 0) & (high <= last), upper, 0.0)),
    )


def deformable_attention_gather(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The op as one gather-and-sum over the `4 * L * P` pixels of every query and head, in chunks of queries.

    `embedding_bag` is that gather-and-sum in one kernel: no sample is ever written to memory. On a CPU this is many
    times faster than `grid_sample` (`benchmarks/msda.py`). Same arguments and result as
    `deformable_attention_grid_sample`.
    """
    batch, length, heads, dim = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    # Rows of the table are computed as floats, beside the coordinates; float32 counts to 2**24 exactly.
    counting = compute if batch * length * heads < 2**24 else torch.float64
    table = value.to(compute).reshape(batch * length * heads, dim)

    def per_point(numbers: list[int]) -> Tensor:
        # Constants in the layout of the points, (heads * levels * points,): broadcasting them would leave inner loops
        # of a few elements.
        column = torch.tensor(numbers, device=value.device, dtype=compute).view(1, levels, 1)
        return column.expand(heads, levels, points).reshape(-1)

    starts, start = [], 0
    for height, width in spatial_shapes:
        starts.append(start)
        start = start + height * width
    height = per_point([height for height, _ in spatial_shapes])
    width = per_point([width for _, width in spatial_shapes])
    head = torch.arange(heads, device=value.device, dtype=counting).view(heads, 1).expand(heads, levels * points)
    picture = torch.arange(batch, device=value.device, dtype=counting).view(batch, 1, 1) * (length * heads)
    origin = per_point(starts).to(counting) * heads + head.reshape(-1) + picture

    def run(locations: Tensor, weights: Tensor) -> Tensor:
        x, y = locations.to(compute).flatten(2, 4).unbind(-1)
        weights = weights.to(compute).flatten(2)
        columns = [(pixel * heads, blend) for pixel, blend in _axis(x, width)]
        rows, blends = [], []
        for pixel, blend in _axis(y, height):
            row, share = origin + pixel.to(counting) * (width * heads), blend * weights
            for column, column_blend in columns:
                rows.append((row + column).unflatten(-1, (heads, -1)))
                blends.append((share * column_blend).unflatten(-1, (heads, -1)))
        bags = torch.stack(rows, dim=3).to(torch.int32 if batch * length * heads < 2**31 else torch.int64)
        sums = F.embedding_bag(
            bags.flatten(3).flatten(0, 2),
            table,
            per_sample_weights=torch.stack(blends, dim=3).flatten(3).flatten(0, 2),
            mode="sum",
        )
        return sums.view(batch, -1, heads * dim)

    if queries <= QUERY_CHUNK or torch.compiler.is_compiling():
        output = run(sampling_locations, attention_weights)
    else:
        chunks = zip(
            sampling_locations.split(QUERY_CHUNK, dim=1), attention_weights.split(QUERY_CHUNK, dim=1), strict=True
        )
        output = torch.cat([run(*chunk) for chunk in chunks], dim=1)
    return output.to(value.dtype)


_IMPLEMENTATIONS: dict[str, Implementation] = {
    "gather": deformable_attention_gather,
    "grid_sample": deformable_attention_grid_sample,
}
_AUTOMATIC = {"cpu": "gather"}


def register_implementation(name: str, function: Implementation, device_types: tuple[str, ...] = ()) -> None:
    """Add an implementation of the op; `"auto"` then chooses it on the given device types.

    Args:
        name: for `UninextConfig.msda_implementation`.
        function: same arguments and result as `deformable_attention_grid_sample`.
        device_types: "cpu", "cuda", ... where it is the best one known.
    """
    _IMPLEMENTATIONS[name] = function
    _AUTOMATIC.update(dict.fromkeys(device_types, name))


def available_implementations() -> tuple[str, ...]:
    """Names that `UninextConfig.msda_implementation` may hold besides "auto"."""
    return tuple(_IMPLEMENTATIONS)


def implementation(name: str) -> Implementation:
    """The function behind a name from `available_implementations`."""
    return _IMPLEMENTATIONS[choose_implementation(name, "cpu")]


def choose_implementation(name: str, device_type: str) -> str:
    """Name of the implementation that runs for a configured name on a device type.

    Raises:
        ValueError: the configured name is unknown. A named implementation is never replaced silently.
    """
    if name == "auto":
        return _AUTOMATIC.get(device_type, "grid_sample")
    if name not in _IMPLEMENTATIONS:
        raise ValueError(
            f'"msda_implementation" must be "auto" or one of {available_implementations()}, got {name!r}.'
        )
    return name


@use_kernel_forward_from_hub("MultiScaleDeformableAttention")
class MultiScaleDeformableAttention(nn.Module):
    """The op as a layer under the name and with the signature that hub kernels replace; it has no parameters.

    Args:
        implementation: "auto" or one of `available_implementations()`.
    """

    def __init__(self, implementation: str = "auto"):
        super().__init__()
        choose_implementation(implementation, "cpu")
        self.implementation = implementation

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: SpatialShapes,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sample and sum, see `deformable_attention_grid_sample` for shapes.

        `value_spatial_shapes`, `level_start_index` (tensors) and `im2col_step` are for compiled kernels; the torch
        forms read the Python numbers of `value_spatial_shapes_list`, so nothing waits for the device.
        """
        name = choose_implementation(self.implementation, value.device.type)
        shapes = tuple((height, width) for height, width in value_spatial_shapes_list)
        return _IMPLEMENTATIONS[name](value, shapes, sampling_locations, attention_weights)


__all__ = [
    "MultiScaleDeformableAttention",
    "available_implementations",
    "choose_implementation",
    "deformable_attention_gather",
    "deformable_attention_grid_sample",
    "implementation",
    "register_implementation",
]
