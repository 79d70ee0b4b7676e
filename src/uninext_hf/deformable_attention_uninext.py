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


def _corners(x: Tensor, y: Tensor, weights: Tensor, heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (within the level) and weights of the four pixels around each point; (..., L, P) -> (..., L, P, 4).

    Pixels outside get weight 0 and a row inside, so nothing is ever read out of range. Not-a-number and infinite
    points count as outside.
    """
    # Two pixels beyond the border every weight is 0 already, so the clamp changes no result, and it bounds the rows.
    x = torch.minimum(torch.nan_to_num(x * widths - 0.5, nan=-2.0).clamp(min=-2.0), widths + 1)
    y = torch.minimum(torch.nan_to_num(y * heights - 0.5, nan=-2.0).clamp(min=-2.0), heights + 1)
    left, top = x.detach().floor(), y.detach().floor()
    right_weight, bottom_weight = x - left, y - top
    zero = weights.new_zeros(())

    def axis(low: Tensor, high_weight: Tensor, size: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        last = size - 1
        low_inside = (low >= 0) & (low <= last)
        high_inside = (low >= -1) & (low < last)
        return (
            (torch.minimum(low.clamp(min=0), last), torch.where(low_inside, 1 - high_weight, zero)),
            (torch.minimum((low + 1).clamp(min=0), last), torch.where(high_inside, high_weight, zero)),
        )

    rows, blends = [], []
    columns = axis(left, right_weight, widths)
    for row, row_weight in axis(top, bottom_weight, heights):
        start, share = row * widths, row_weight * weights
        for column, column_weight in columns:
            rows.append(start + column)
            blends.append(share * column_weight)
    return torch.stack(rows, dim=-1), torch.stack(blends, dim=-1)


def deformable_attention_gather(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The op as one gather-and-sum over the `4 * L * P` pixels of every query and head, in chunks of queries.

    `embedding_bag` is that gather-and-sum in one kernel: no sample is ever written to memory. On a CPU this is many
    times faster than `grid_sample` (`benchmarks/msda.py`). Same arguments and result as
    `deformable_attention_grid_sample`.
    """
    batch, length, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    device = value.device
    table = value.to(compute).reshape(batch * length * heads, dim)
    heights = torch.tensor([[float(height)] for height, _ in spatial_shapes], device=device, dtype=compute)
    widths = torch.tensor([[float(width)] for _, width in spatial_shapes], device=device, dtype=compute)
    starts, start = [], 0
    for height, width in spatial_shapes:
        starts.append([[start]])
        start = start + height * width
    # Float rows are exact up to 2**24 positions per level; beyond the level they are integers.
    index_dtype = torch.int32 if batch * length * heads < 2**31 else torch.int64
    offset = torch.tensor(starts, device=device, dtype=index_dtype)
    head = torch.arange(heads, device=device, dtype=index_dtype).view(heads, 1, 1, 1)
    picture = torch.arange(batch, device=device, dtype=index_dtype).view(batch, 1, 1, 1, 1, 1) * length

    def run(locations: Tensor, weights: Tensor) -> Tensor:
        x, y = locations.to(compute).unbind(-1)
        rows, blends = _corners(x, y, weights.to(compute), heights, widths)
        rows = (rows.to(index_dtype) + offset + picture) * heads + head
        bags = rows.flatten(3).flatten(0, 2)
        sums = F.embedding_bag(bags, table, per_sample_weights=blends.flatten(3).flatten(0, 2), mode="sum")
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
    "register_implementation",
]
