import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.testing import assert_close

from uninext_hf.box_ops_uninext import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_iou_aligned,
    box_xywh_to_xyxy,
    box_xyxy_to_cxcywh,
    class_aware_nms,
    clip_boxes,
    generalized_box_iou,
    generalized_box_iou_aligned,
    mask_to_rle,
    masks_to_boxes,
    masks_to_rles,
    rle_to_mask,
    scale_boxes,
)


def random_boxes(count: int, seed: int, size: float = 100.0) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat((corners.amin(dim=1), corners.amax(dim=1)), dim=1)


class TestConversions:
    def test_values(self):
        corners = torch.tensor([[10.0, 20.0, 40.0, 30.0]])
        assert box_xyxy_to_cxcywh(corners).tolist() == [[25, 25, 30, 10]]
        assert box_cxcywh_to_xyxy(torch.tensor([[25.0, 25.0, 30.0, 10.0]])).tolist() == corners.tolist()
        assert box_xywh_to_xyxy(torch.tensor([[10.0, 20.0, 30.0, 10.0]])).tolist() == corners.tolist()

    def test_round_trip_keeps_leading_dimensions(self):
        boxes = random_boxes(24, seed=0).view(2, 3, 4, 4)
        assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes)

    @pytest.mark.parametrize("function", [box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, box_xywh_to_xyxy])
    def test_input_is_not_changed_and_gradient_flows(self, function):
        boxes = random_boxes(3, seed=1).requires_grad_()
        before = boxes.detach().clone()
        function(boxes).sum().backward()
        assert torch.equal(boxes, before)
        assert boxes.grad.abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_type_is_kept(self, dtype):
        assert box_cxcywh_to_xyxy(torch.ones(2, 4, dtype=dtype)).dtype == dtype


class TestScaleAndClip:
    def test_scale_is_height_first(self):
        boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
        assert scale_boxes(boxes, (100, 50), (200, 25)).tolist() == [[5, 40, 15, 80]]

    def test_relative_boxes(self):
        assert scale_boxes(torch.tensor([0.5, 0.5, 1.0, 1.0]), (1, 1), (480, 640)).tolist() == [320, 240, 640, 480]

    def test_scale_integers(self):
        assert scale_boxes(torch.tensor([[1, 1, 3, 3]]), (2, 2), (1, 1)).tolist() == [[0.5, 0.5, 1.5, 1.5]]

    def test_clip(self):
        boxes = torch.tensor([[-5.0, -5.0, 700.0, 500.0], [1.0, 2.0, 3.0, 4.0], [700.0, 10.0, 800.0, 20.0]])
        before = boxes.clone()
        assert clip_boxes(boxes, (480, 640)).tolist() == [[0, 0, 640, 480], [1, 2, 3, 4], [640, 10, 640, 20]]
        assert torch.equal(boxes, before)


class TestIou:
    def test_pairs_agree_with_torchvision(self):
        boxes1, boxes2 = random_boxes(17, seed=2), random_boxes(23, seed=3)
        assert_close(box_iou(boxes1, boxes2), torchvision.ops.box_iou(boxes1, boxes2), rtol=0, atol=1e-7)
        assert_close(
            generalized_box_iou(boxes1, boxes2),
            torchvision.ops.generalized_box_iou(boxes1, boxes2),
            rtol=0,
            atol=1e-6,
        )

    def test_aligned_is_the_diagonal(self):
        boxes1, boxes2 = random_boxes(9, seed=4), random_boxes(9, seed=5)
        assert_close(box_iou_aligned(boxes1, boxes2), box_iou(boxes1, boxes2).diagonal())
        assert_close(generalized_box_iou_aligned(boxes1, boxes2), generalized_box_iou(boxes1, boxes2).diagonal())

    def test_known_values(self):
        boxes1 = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
        boxes2 = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 3.0, 1.0]])
        assert_close(box_iou_aligned(boxes1, boxes2), torch.tensor([1 / 7, 0.0]))
        assert_close(generalized_box_iou_aligned(boxes1, boxes2), torch.tensor([1 / 7 - 2 / 9, -1 / 3]))

    def test_boxes_without_area_give_zero_and_finite_gradients(self):
        point = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
        other = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
        iou, giou = box_iou(point, other), generalized_box_iou(point, other)
        assert iou.tolist() == giou.tolist() == [[0.0]]
        (iou.sum() + giou.sum()).backward()
        assert point.grad.isfinite().all()

    def test_nan_is_not_hidden(self):
        boxes = torch.tensor([[float("nan"), 0.0, 1.0, 1.0]])
        assert box_iou(boxes, boxes).isnan().all()

    def test_half_precision_pixels_do_not_overflow(self):
        boxes = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.float16)
        assert box_area(boxes).tolist() == [1e6]
        assert box_iou(boxes, boxes).tolist() == [[1.0]]
        assert generalized_box_iou(boxes, boxes).tolist() == [[1.0]]

    @pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
    def test_empty(self, rows, columns):
        assert box_iou(torch.zeros(rows, 4), torch.zeros(columns, 4)).shape == (rows, columns)
        assert generalized_box_iou(torch.zeros(rows, 4), torch.zeros(columns, 4)).shape == (rows, columns)


class TestNms:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [1.0, 0.0, 11.0, 10.0]])

    def test_only_within_a_label(self):
        kept = class_aware_nms(self.boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1]), 0.7)
        assert kept.tolist() == [1, 2]

    def test_threshold_is_exclusive(self):
        scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
        boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
        assert class_aware_nms(boxes, scores, labels, 0.5).tolist() == [0, 1]
        assert class_aware_nms(boxes, scores, labels, 0.49).tolist() == [0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        scores = torch.tensor([0.5, 0.9, 0.7], dtype=dtype)
        assert class_aware_nms(self.boxes.to(dtype), scores, torch.zeros(3).long(), 0.7).tolist() == [1]

    def test_empty(self):
        kept = class_aware_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
        assert kept.shape == (0,)
        assert kept.dtype == torch.int64


class TestMasksToBoxes:
    def test_right_and_bottom_are_exclusive(self):
        masks = torch.zeros(4, 5, 7, dtype=torch.bool)
        masks[0, 2, 3] = True  # one pixel
        masks[1] = True  # full
        masks[3, 0, 6] = masks[3, 4, 0] = True  # two far corners; row 2 is empty
        boxes = masks_to_boxes(masks)
        assert boxes.tolist() == [[3, 2, 4, 3], [0, 0, 7, 5], [0, 0, 0, 0], [0, 0, 7, 5]]
        assert boxes.dtype == torch.float32

    def test_any_number_type(self):
        mask = torch.zeros(3, 3)
        mask[1, 1] = 0.25
        assert masks_to_boxes(mask).tolist() == [1, 1, 2, 2]
        assert masks_to_boxes((mask * 4).to(torch.uint8)).tolist() == [1, 1, 2, 2]

    @pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
    def test_empty(self, shape):
        assert masks_to_boxes(torch.zeros(shape, dtype=torch.bool)).tolist() == [[0.0] * 4] * shape[0]


def coco_rle(mask: np.ndarray) -> dict:
    """pycocotools' own encoding, with text counts."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


class TestRle:
    """Expected values come from pycocotools."""

    @settings(max_examples=300, deadline=None)
    @given(
        height=st.integers(1, 40),
        width=st.integers(1, 40),
        density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
        seed=st.integers(0, 2**31),
    )
    def test_random_masks(self, height, width, density, seed):
        mask = np.random.default_rng(seed).random((height, width)) < density
        rle = mask_to_rle(mask)
        assert rle == coco_rle(mask)
        assert np.array_equal(rle_to_mask(rle), mask)

    @pytest.mark.parametrize(
        "mask",
        [
            np.zeros((1, 1), bool),
            np.ones((1, 1), bool),
            np.zeros((480, 640), bool),
            np.ones((480, 640), bool),
            np.eye(300, dtype=bool),
            np.pad(np.ones((700, 900), bool), 40),  # run lengths of several characters
            np.zeros((0, 3), bool),
            np.zeros((3, 0), bool),
        ],
        ids=["background pixel", "one pixel", "empty", "full", "diagonal", "large", "no rows", "no columns"],
    )
    def test_special_masks(self, mask):
        rle = mask_to_rle(mask)
        assert rle == coco_rle(mask)
        decoded = rle_to_mask(rle)
        assert decoded.dtype == bool
        assert decoded.shape == mask.shape
        assert np.array_equal(decoded, mask)

    def test_tensors_and_numbers(self):
        mask = torch.tensor([[0, 3], [0, 255]], dtype=torch.uint8)
        assert mask_to_rle(mask) == mask_to_rle(mask.bool()) == mask_to_rle(mask.numpy())
        assert masks_to_rles(torch.stack((mask, mask * 0))) == [mask_to_rle(mask), mask_to_rle(mask * 0)]
        assert masks_to_rles(torch.zeros(0, 4, 4)) == []

    def test_decodes_bytes_and_uncompressed_counts(self):
        mask = np.random.default_rng(0).random((9, 4)) < 0.5
        flat = mask.T.ravel()
        runs = np.diff(np.flatnonzero(np.diff(flat, prepend=False)), prepend=0, append=flat.size).tolist()
        runs = [np.flatnonzero(np.diff(flat, prepend=False))[0].item(), *runs[1:]]
        assert np.array_equal(rle_to_mask({"size": [9, 4], "counts": runs}), mask)
        assert np.array_equal(rle_to_mask({"size": [9, 4], "counts": coco_rle(mask)["counts"].encode()}), mask)

    @pytest.mark.parametrize(
        "rle",
        [
            {"size": [2, 2], "counts": [1, 2]},  # too short
            {"size": [2, 2], "counts": [5, -1]},  # negative
            {"size": [2, 3], "counts": mask_to_rle(np.ones((2, 2)))["counts"]},  # other size
            {"size": [2, 2], "counts": ""},
            {"size": [2, 2], "counts": "5P"},  # ends in the middle of a number
            {"size": [2, 2], "counts": "4!"},  # not a character of the code
            {"size": [2, 2], "counts": "PPPPPPPPPPPPPP0"},  # number too long
        ],
    )
    def test_damaged(self, rle):
        with pytest.raises(ValueError, match='"rle"'):
            rle_to_mask(rle)

    def test_wrong_dimensions(self):
        with pytest.raises(ValueError, match=r'"mask" must be \(H, W\), got shape \(1, 2, 2\)'):
            mask_to_rle(np.zeros((1, 2, 2), bool))
