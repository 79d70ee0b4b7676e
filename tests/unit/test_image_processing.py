import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from uninext_hf.image_processing_uninext import (
    UninextImageProcessor,
    best_pairs,
    boxes_to_pixels,
    check_target_sizes,
    crop_template,
    label_logits,
    label_scores,
    load_picture,
    load_pictures,
    resized_size,
)

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return UninextImageProcessor()


class TestLoadPicture:
    """Every kind of picture becomes (3, H, W) uint8; expected values are Pillow's own or written by hand."""

    def test_kinds_agree(self, tmp_path):
        array = noise(5, 7)
        expected = torch.from_numpy(array).permute(2, 0, 1)
        Image.fromarray(array).save(tmp_path / "picture.png")
        pictures = [
            array,
            expected,
            Image.fromarray(array),
            tmp_path / "picture.png",
            str(tmp_path / "picture.png"),
            np.ascontiguousarray(array.transpose(2, 0, 1)),  # channels first, as transformers' own tests pass them
            array[:, ::-1][:, ::-1],  # negative strides
        ]
        for picture in pictures:
            assert torch.equal(load_picture(picture), expected)

    def test_is_never_a_view(self):
        tensor = torch.zeros(3, 4, 4, dtype=torch.uint8)
        load_picture(tensor).fill_(9)
        assert not tensor.any()

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
    def test_opaque_modes_as_pillow_converts_them(self, mode):
        picture = Image.fromarray(noise(6, 4)).convert(mode)
        expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(load_picture(picture), expected)

    @pytest.mark.parametrize("kind", ["RGBA", "LA", "numpy", "palette"])
    def test_transparency_is_laid_over_white(self, kind):
        rgba = np.zeros((2, 2, 4), dtype=np.uint8)
        rgba[0, 0] = (10, 10, 10, 255)
        rgba[0, 1] = (0, 0, 0, 128)
        picture = {
            "RGBA": lambda: Image.fromarray(rgba),
            "LA": lambda: Image.fromarray(rgba).convert("LA"),
            "numpy": lambda: rgba,
            "palette": lambda: Image.new("P", (2, 2), 0),
        }[kind]()
        if kind == "palette":
            picture.putpalette([0, 0, 0, 10, 10, 10])
            picture.info["transparency"] = 0
            picture.putpixel((0, 0), 1)
        values = load_picture(picture)
        assert values[:, 0, 0].tolist() == [10] * 3
        assert values[:, 1].unique().tolist() == [255]
        if kind != "palette":
            assert values[:, 0, 1].tolist() == [127] * 3

    @pytest.mark.parametrize("as_file", [True, False])
    def test_sixteen_bits_are_scaled(self, tmp_path, as_file):
        grey = np.array([[0, 257, 65535, 32768]], dtype=np.uint16)
        picture = grey
        if as_file:
            Image.fromarray(grey).save(tmp_path / "grey.png")
            picture = tmp_path / "grey.png"
        assert load_picture(picture)[2].tolist() == [[0, 1, 255, 128]]

    def test_exif_orientation_is_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(noise(4, 8))
        picture.save(tmp_path / "phone.png", exif=exif)
        assert load_picture(tmp_path / "phone.png").shape == (3, 8, 4)
        expected = torch.from_numpy(np.rot90(np.array(picture), -1).copy()).permute(2, 0, 1)
        assert torch.equal(load_picture(tmp_path / "phone.png"), expected)

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (3, 2), color) for color in ((255, 0, 0), (0, 255, 0))]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        assert load_picture(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]

    def test_grey_arrays(self):
        for picture in (
            np.full((2, 3), 7, np.uint8),
            np.full((2, 3, 1), 7, np.uint8),
            torch.full((1, 2, 3), 7).byte(),
        ):
            assert torch.equal(load_picture(picture), torch.full((3, 2, 3), 7, dtype=torch.uint8))

    def test_batches_and_lists(self):
        batch = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
        assert [picture.shape for picture in load_pictures(batch)] == [(3, 4, 5)] * 2
        assert len(load_pictures([noise(2, 2), noise(3, 3)])) == 2

    @pytest.mark.parametrize(
        ("picture", "fragment"),
        [
            (3, "must be a PIL image"),
            (None, "must be a PIL image"),
            (b"\x89PNG", "must be a PIL image"),
            ("no/such/file.jpg", "existing file"),
            ("", "existing file"),
            ("http://127.0.0.1:9/none.png", "could not be loaded"),
            ("data:image/png;base64,AAAA", "could not be loaded"),
            (np.zeros((4, 4, 3), np.float32), r"uint8.*\(4, 4, 3\), float32"),
            (np.zeros((4, 4, 3), bool), "uint8"),
            (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
            (np.zeros((0, 4, 3), np.uint8), "channels"),
            (np.zeros(4, np.uint8), "channels"),
            (np.zeros((2, 4, 4, 3), np.uint8), "channels"),
            (torch.zeros(3, 4, 4), "uint8"),
            (torch.zeros(5, 6, 7, dtype=torch.uint8), "channels"),
            (Image.new("F", (3, 3)), "floating-point"),
        ],
    )
    def test_refused(self, picture, fragment):
        with pytest.raises(ValueError, match=fragment) as error:
            load_picture(picture)
        assert str(error.value).startswith('"image"')

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
    def test_damaged_files(self, tmp_path, kind):
        buffer = io.BytesIO()
        Image.fromarray(noise(64, 64)).save(buffer, kind)
        path = tmp_path / "cut.bin"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        with pytest.raises(ValueError, match='"image" is not a complete picture'):
            load_picture(path)
        with pytest.raises(ValueError, match='"image" is not a complete picture'):
            load_picture(Image.open(path))
        path.write_bytes(b"not a picture")
        with pytest.raises(ValueError, match='"image" is not a complete picture'):
            load_picture(path)

    def test_message_says_which_picture(self):
        with pytest.raises(ValueError, match=r'"images\[1\]" must'):
            load_pictures([noise(2, 2), 3])
        with pytest.raises(ValueError, match="at least one picture"):
            load_pictures([])


class TestSize:
    """The resize rule of detectron2's `ResizeShortestEdge`; the numbers were worked out by hand from its text."""

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((480, 640), (800, 1067)),
            ((640, 480), (1067, 800)),
            ((427, 640), (800, 1199)),
            ((300, 1000), (400, 1333)),
            ((1000, 300), (1333, 400)),
            ((800, 1333), (800, 1333)),
            ((1, 1), (800, 800)),
            ((20000, 20), (1333, 1)),
            ((20, 20000), (1, 1333)),
        ],
    )
    def test_rule(self, size, expected):
        assert resized_size(*size, 800, 1333) == expected

    def test_limits_hold_for_all(self):
        generator = random.Random(0)
        for _ in range(500):
            height, width = (int(10 ** generator.uniform(0, 4.3)) for _ in range(2))
            new = resized_size(height, width, 800, 1333)
            assert min(new) >= 1
            assert max(new) <= 1333
            assert min(new) == 800 or max(new) == 1333
            if min(new) > 10:
                assert new[0] / new[1] == pytest.approx(height / width, rel=0.06)

    def test_keyword(self, processor):
        picture = noise(60, 90)
        for keywords, size in (
            ({"do_resize": False}, (60, 90)),
            ({"size": 100}, (100, 150)),
            ({"size": {"height": 32, "width": 48}}, (32, 48)),
        ):
            assert processor(picture, return_tensors="pt", **keywords)["pixel_values"].shape[2:] == size
        assert processor(noise(4, 4000), size=100, return_tensors="pt")["pixel_values"].shape[2:] == (1, 1333)


class TestBatch:
    def test_normalised_values(self, processor):
        picture = noise(17, 23)
        inputs = processor(picture, do_resize=False, return_tensors="pt")
        expected = (torch.from_numpy(picture).permute(2, 0, 1).float() - MEAN) / STD
        assert (inputs["pixel_values"][0] - expected).abs().max() < 1e-5
        assert inputs["pixel_values"].dtype == torch.float32
        assert inputs["pixel_mask"].dtype == torch.int64
        assert inputs["pixel_mask"].all()

    @pytest.mark.parametrize(("divisor", "size"), [(None, (40, 50)), (32, (64, 64)), (7, (42, 56))])
    def test_padding_is_zero_and_at_the_lower_right(self, processor, divisor, size):
        pictures = [noise(40, 30), noise(20, 50)]
        inputs = processor(pictures, do_resize=False, size_divisor=divisor, return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 3, *size)
        for picture, pixels, mask in zip(pictures, inputs["pixel_values"], inputs["pixel_mask"], strict=True):
            height, width = picture.shape[:2]
            assert mask[:height, :width].all()
            assert mask.sum() == height * width
            assert not pixels[:, mask == 0].any()
            assert torch.equal(pixels[:, :height, :width], processor(picture, do_resize=False)["pixel_values"][0])

    @pytest.mark.parametrize("shape", [(1, 1), (20000, 20), (20, 20000), (2, 3)])
    def test_extreme_shapes(self, processor, shape):
        inputs = processor(np.zeros((*shape, 3), np.uint8), return_tensors="pt")
        assert max(inputs["pixel_values"].shape[2:]) <= 1333
        assert inputs["pixel_values"].isfinite().all()

    def test_switches(self, processor):
        picture = noise(4, 5)
        raw = processor(picture, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert torch.equal(raw.byte(), torch.from_numpy(picture).permute(2, 0, 1))
        unpadded = processor([picture, noise(3, 3)], do_resize=False, do_pad=False)
        assert [value.shape[1:] for value in unpadded["pixel_values"]] == [(4, 5), (3, 3)]
        assert [mask.shape for mask in unpadded["pixel_mask"]] == [(4, 5), (3, 3)]
        with pytest.raises(ValueError, match="do_center_crop"):
            processor(picture, do_center_crop=True, crop_size=2)

    def test_saves_what_differs(self, tmp_path):
        UninextImageProcessor(size_divisor=32, template_size=128).save_pretrained(tmp_path)
        loaded = UninextImageProcessor.from_pretrained(tmp_path)
        assert (loaded.size_divisor, loaded.template_size, loaded.template_area_factor) == (32, 128, 2.0)
        assert loaded.to_dict() == UninextImageProcessor(size_divisor=32, template_size=128).to_dict()


def coordinates(height: int, width: int) -> torch.Tensor:
    """A picture whose first two channels hold the position of each pixel's centre, so a crop says where it looks."""
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([xs, ys, torch.zeros_like(xs)])


class TestTemplate:
    def test_rectangle_lies_on_the_box(self):
        """200 whole-pixel boxes: exactly the crop pixels that look at the box (to 0.5 px) are marked."""
        generator = random.Random(1)
        for _ in range(200):
            height, width = generator.randint(40, 300), generator.randint(40, 300)
            w, h = generator.randint(4, width // 2), generator.randint(4, height // 2)
            x, y = generator.randint(0, width - w), generator.randint(0, height - h)
            values, keep = crop_template(coordinates(height, width), None, (x, y, w, h))
            across, down = values[0], values[1]
            step = max(math.ceil(2 * math.sqrt(w * h)) / 256, 1)
            inside = (across > x) & (across < x + w) & (down > y) & (down < y + h) & keep
            distance = torch.stack([(across - x), (x + w - across), (down - y), (y + h - down)]).abs().amin(0)
            wrong = (inside != (values[3] > 0.5)) & keep
            assert not wrong.any() or distance[wrong].max() <= 0.5 * step

    def test_fractional_boxes_are_rounded_to_the_nearest_pixel(self):
        """200 boxes: corner and sides of the rectangle are each within half a pixel."""
        generator = random.Random(2)
        for _ in range(200):
            w, h = generator.uniform(10, 60), generator.uniform(10, 60)
            x, y = generator.uniform(130, 200), generator.uniform(130, 200)
            values, keep = crop_template(coordinates(400, 400), None, (x, y, w, h))
            assert keep.all()
            if max(w, h) > 3.5 * min(w, h):
                continue  # the crop is narrower than the box
            scale = math.ceil(2 * math.sqrt(w * h)) / 256
            sides = values[3].amax(0).sum() * scale, values[3].amax(1).sum() * scale
            assert abs(float(sides[0]) - w) <= 0.55
            assert abs(float(sides[1]) - h) <= 0.55
            centre = (values[3] * values[0]).sum() / values[3].sum(), (values[3] * values[1]).sum() / values[3].sum()
            assert abs(float(centre[0] - sides[0] / 2) - x) <= 0.55
            assert abs(float(centre[1] - sides[1] / 2) - y) <= 0.55

    def test_whole_path_with_resizing(self, processor):
        """100 pictures of a white rectangle on black: box and mask prompts cover what is white in the crop."""
        generator = random.Random(3)
        for _ in range(100):
            height, width = generator.randint(60, 400), generator.randint(60, 400)
            w, h = generator.randint(width // 6, width // 3), generator.randint(height // 6, height // 3)
            x, y = generator.randint(0, width - w), generator.randint(0, height - h)
            picture = np.zeros((height, width, 3), np.uint8)
            picture[y : y + h, x : x + w] = 255
            size = {"shortest_edge": generator.randint(100, 300), "longest_edge": 500}
            scale = resized_size(height, width, *size.values())[0] / height
            step = math.ceil(2 * math.sqrt(w * h) * scale) / 256
            for prompt in ({"box": (x, y, x + w, y + h)}, {"mask": picture[..., 0]}):
                template = processor.prepare_template(picture, **prompt, size=size, size_divisor=32)
                values, keep = template["template_values"], template["template_mask"]
                white = (values[0] * 58.395 + 123.675) / 255
                for dim in (0, 1):
                    # In pixels of the resized picture: half a pixel at either side, and the width of a crop pixel.
                    seen = (white * keep).amax(dim).sum() - (values[3] * keep).amax(dim).sum()
                    assert abs(float(seen)) * step <= 1.0 + step

    def test_equals_resizing_the_padded_crop(self):
        """The plain three steps of the specification: cut out, pad, resize."""
        generator = random.Random(4)
        for _ in range(50):
            height, width = generator.randint(20, 90), generator.randint(20, 90)
            pixels, target = torch.randn(3, height, width), torch.rand(height, width)
            mask = torch.ones(height, width, dtype=torch.int64)
            mask[:, width - 5 :] = 0
            w, h = generator.uniform(3, width), generator.uniform(3, height)
            x, y = generator.uniform(-w / 2, width - w / 2), generator.uniform(-h / 2, height - h / 2)
            size = generator.choice([16, 64, 100])
            values, keep = crop_template(pixels, mask, (x, y, w, h), target, size)
            side = math.ceil(2 * math.sqrt(w * h))
            left, top = round(x + w / 2 - side / 2), round(y + h / 2 - side / 2)
            planes = torch.cat([pixels, target[None], 1.0 - mask[None]])
            crop = torch.zeros(5, side, side)
            crop[4] = 1
            x0, x1, y0, y1 = max(left, 0), min(left + side, width - 1), max(top, 0), min(top + side, height - 1)
            crop[:, y0 - top : y1 - top, x0 - left : x1 - left] = planes[:, y0:y1, x0:x1]
            expected = torch.nn.functional.interpolate(crop[None], size=(size, size), mode="bilinear")[0]
            assert (values - expected[:4]).abs().max() < 1e-4
            assert ((expected[4] == 0) == keep).float().mean() > 0.99

    def test_one_pixel_targets(self, processor):
        mask = np.zeros((3000, 4000), np.uint8)
        mask[1234, 1717] = 1
        picture = np.zeros((3000, 4000, 3), np.uint8)
        for prompt in ({"mask": mask}, {"box": (1717, 1234, 1718, 1235)}):
            template = processor.prepare_template(picture, **prompt)
            assert template["template_values"][3].max() > 0.5

    def test_box_far_over_the_border(self, processor):
        template = processor.prepare_template(noise(480, 640), box=(-600, -400, 1200, 900), do_resize=False)
        assert template["template_values"].shape == (4, 256, 256)
        assert 0 < template["template_mask"].float().mean() < 0.2

    def test_template_size(self, processor):
        template = processor.prepare_template(noise(40, 40), box=(5, 5, 20, 20), template_size=64)
        assert template["template_values"].shape == (4, 64, 64)
        assert template["template_mask"].shape == (64, 64)

    @pytest.mark.parametrize(
        ("image", "box", "mask", "fragment"),
        [
            (noise(20, 30), None, None, 'Exactly one of "box" and "mask"'),
            (noise(20, 30), (1, 1, 5, 5), np.ones((20, 30)), 'Exactly one of "box" and "mask"'),
            (noise(20, 30), (5, 5, 5, 9), None, '"box" must have x1 > x0'),
            (noise(20, 30), (31, 1, 40, 9), None, '"box" must overlap'),
            (noise(20, 30), (1, 1, float("nan"), 9), None, '"box" must hold finite'),
            (noise(20, 30), "here", None, '"box" must be four numbers'),
            (noise(20, 30), (-1e7, -1e7, 1e7, 1e7), None, '"box" must lie near'),
            (noise(20, 30), (-20000, -20000, 20000, 20000), None, '"box" must leave some'),
            (np.zeros((20000, 20, 3), np.uint8), (1, 1, 5, 900), None, '"box" must leave some'),
            (noise(20, 30), None, np.ones((30, 20)), '"mask" must have the size'),
            (noise(20, 30), None, np.zeros((20, 30)), '"mask" must mark'),
            ("nothing.png", (1, 1, 5, 5), None, '"image" must be a path'),
        ],
    )
    def test_refused(self, processor, image, box, mask, fragment):
        with pytest.raises(ValueError, match=fragment):
            processor.prepare_template(image, box, mask)


class TestSteps:
    """Each step of post-processing on numbers that can be checked by hand."""

    def test_label_logits_are_means_over_tokens(self):
        logits = torch.tensor([[1.0, 2.0, 4.0, 50000.0]])
        label_map = torch.tensor([[True, False, False], [False, True, True]])
        assert label_logits(logits, label_map).tolist() == [[1.0, 3.0]]

    def test_label_scores(self):
        logits = torch.tensor([[0.0, 100.0]])
        assert label_scores(logits, None).tolist() == [[0.5, 1.0]]
        assert label_scores(logits, torch.tensor([0.0]))[0].tolist() == pytest.approx([0.5, math.sqrt(0.5)])

    def test_best_pairs(self):
        scores = torch.tensor([[0.9, 0.2], [0.5, -1.0]])
        queries, columns, values = best_pairs(scores, None, 0.0)
        assert (queries.tolist(), columns.tolist()) == ([0, 1, 0], [0, 0, 1])
        assert best_pairs(scores, 10, 0.5)[2].tolist() == pytest.approx([0.9, 0.5])  # equal to the threshold stays
        assert best_pairs(scores, 1, 0.0)[0].tolist() == [0]
        assert values.tolist() == pytest.approx([0.9, 0.5, 0.2])

    def test_boxes_to_pixels(self):
        boxes = torch.tensor([[0.0, 0.5, 1.5, 1.0], [1.1, 0.0, 1.2, 1.0]])
        kept, has_area = boxes_to_pixels(boxes, (10, 20), (20, 20))
        assert kept.tolist() == [[0, 10, 20, 20], [20, 0, 20, 20]]
        assert has_area.tolist() == [True, False]
        raw, has_area = boxes_to_pixels(boxes, (10, 20), None, clip=False)
        assert raw[0].tolist() == [0, 5, 30, 10]
        assert has_area.all()

    @pytest.mark.parametrize(
        ("sizes", "fragment"),
        [
            ([3], "pairs"),
            ([(1, 2), (3, 4)], "3 pairs"),
            ([(0, 4)], "positive"),
            ([("a", 2)], "pairs"),
            ([], "3 pairs"),
        ],
    )
    def test_target_sizes_refused(self, sizes, fragment):
        with pytest.raises(ValueError, match=f'"target_sizes" must.*{fragment}'):
            check_target_sizes(sizes, 3)

    def test_target_sizes(self):
        assert check_target_sizes(torch.tensor([[3, 4]]), 2) == [(3, 4)] * 2
        assert check_target_sizes(None, 2) is None

    def test_stock_pipeline_form(self, processor):
        """One name between two special tokens, as transformers' zero-shot pipeline feeds it."""
        outputs = {
            "logits": torch.tensor([[[-9.0, 3.0, -9.0], [-9.0, -3.0, -9.0]]]),
            "pred_ious": torch.full((1, 2), 9.0),
            "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.1, 0.1]]]),
            "input_sizes": torch.tensor([[10, 20]]),
        }
        found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(20, 40)])[0]
        assert found["boxes"].tolist() == [[0, 0, 40, 20]]
        assert found["labels"].tolist() == [0]
