import dataclasses
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from pycocotools import mask as coco_mask
from transformers.dynamic_module_utils import get_imports

from uninext_hf import instances_uninext
from uninext_hf.instances_uninext import Instances

HEIGHT, WIDTH = 60, 80
RED, GREEN = (0xF0, 0x3C, 0x2D), (0x2D, 0xFF, 0x87)


def make_instances(count: int = 4, optional: bool = True, seed: int = 0, **changes) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH - 20, HEIGHT - 20])
    fields = {
        "image_size": (HEIGHT, WIDTH),
        "phrases": ["cat", "dog"],
        "scores": torch.rand(count, generator=generator),
        "labels": torch.arange(count) % 2,
        "boxes": torch.cat((corners, corners + 20), dim=1),
    }
    if optional:
        fields |= {
            "masks": torch.rand(count, HEIGHT, WIDTH, generator=generator) > 0.5,
            "track_ids": torch.arange(count) + 10,
            "prompt_ids": torch.zeros(count, dtype=torch.int64),
            "embeddings": torch.rand(count, 5, generator=generator),
        }
    return Instances(**(fields | changes))


def assert_same(actual: Instances, expected: Instances) -> None:
    for field in dataclasses.fields(Instances):
        left, right = getattr(actual, field.name), getattr(expected, field.name)
        assert torch.equal(left, right) if isinstance(right, torch.Tensor) else left == right, field.name


class TestInvariants:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"scores": torch.zeros(4, 1)}, r'"scores" must be a tensor \(N,\), got shape \(4, 1\)'),
            ({"scores": [0.5] * 4}, '"scores" must be a tensor'),
            ({"scores": torch.zeros(4, dtype=torch.int64)}, '"scores" must hold floating point'),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, r'"labels" must be a tensor \(4,\)'),
            ({"labels": torch.zeros(4)}, '"labels" must hold integers, got torch.float32'),
            ({"labels": torch.zeros(4, dtype=torch.bool)}, '"labels" must hold integers'),
            ({"labels": None}, '"labels" must be a tensor'),
            ({"labels": torch.tensor([0, 1, 2, 0])}, r'"labels" must be in \[0, 2\)'),
            ({"labels": torch.tensor([0, -1, 1, 0])}, r'"labels" must be in \[0, 2\)'),
            ({"boxes": torch.zeros(4, 5)}, r'"boxes" must be a tensor \(4, 4\)'),
            ({"boxes": torch.zeros(4)}, r'"boxes" must be a tensor \(4, 4\)'),
            ({"masks": torch.zeros(4, WIDTH, HEIGHT, dtype=torch.bool)}, r'"masks" must be a tensor \(4, 60, 80\)'),
            ({"masks": torch.zeros(4, HEIGHT, WIDTH)}, '"masks" must hold bool, got torch.float32'),
            ({"track_ids": torch.zeros(5, dtype=torch.int64)}, r'"track_ids" must be a tensor \(4,\)'),
            ({"prompt_ids": torch.zeros(4)}, '"prompt_ids" must hold integers'),
            ({"embeddings": torch.zeros(4)}, r'"embeddings" must be a tensor \(4, D\)'),
            ({"boxes": torch.zeros(4, 4, device="meta")}, '"boxes" must be on cpu like "scores", got meta'),
            ({"image_size": (HEIGHT, WIDTH, 3)}, '"image_size" must be two positive integers'),
            ({"image_size": (60.0, 80.0)}, '"image_size" must be two positive integers'),
            ({"image_size": (0, 80)}, '"image_size" must be two positive integers'),
            ({"phrases": "cat"}, '"phrases" must be a list of strings'),
            ({"phrases": ["cat", 1]}, '"phrases" must be a list of strings'),
        ],
    )
    def test_wrong_fields_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            make_instances(**changes)

    def test_types_are_normalised(self):
        instances = make_instances(
            image_size=torch.Size([HEIGHT, WIDTH]),
            phrases=("cat", "dog"),
            scores=torch.zeros(4, dtype=torch.bfloat16),
            labels=torch.zeros(4, dtype=torch.int32),
            boxes=torch.zeros(4, 4, dtype=torch.float64),
        )
        assert type(instances.image_size) is tuple
        assert instances.phrases == ["cat", "dog"]
        assert instances.scores.dtype == instances.boxes.dtype == torch.float32
        assert instances.labels.dtype == torch.int64

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            make_instances().scores = torch.zeros(4)

    def test_phrases_are_copied(self):
        phrases = ["cat", "dog"]
        instances = make_instances(phrases=phrases)
        phrases.append("bird")
        assert instances.phrases == ["cat", "dog"]


class TestRows:
    @pytest.mark.parametrize(
        ("index", "rows"),
        [
            (0, [0]),
            (-1, [3]),
            (np.int64(2), [2]),
            (torch.tensor(1), [1]),
            (slice(1, 3), [1, 2]),
            (slice(None, None, 2), [0, 2]),
            (torch.tensor([True, False, False, True]), [0, 3]),
            (np.array([False, True, False, False]), [1]),
            ([True, True, False, False], [0, 1]),
            (torch.tensor([3, 0, 0]), [3, 0, 0]),
            (torch.tensor([3, 0], dtype=torch.uint8), [3, 0]),
            (np.array([2, 1], dtype=np.int32), [2, 1]),
            ([-1, 1], [3, 1]),
            ([], []),
            (torch.zeros(4, dtype=torch.bool), []),
        ],
        ids=str,
    )
    def test_index(self, index, rows):
        instances = make_instances()
        chosen = instances[index]
        assert len(chosen) == len(rows)
        for name in ("scores", "labels", "boxes", "masks", "track_ids", "prompt_ids", "embeddings"):
            assert torch.equal(getattr(chosen, name), getattr(instances, name)[torch.tensor(rows).long()]), name
        assert chosen.image_size == instances.image_size
        assert chosen.phrases == instances.phrases

    @pytest.mark.parametrize(
        "index", [4, -5, True, torch.zeros(5, dtype=torch.bool), torch.zeros(2, 2).long(), [0.5], [9]], ids=str
    )
    def test_index_errors(self, index):
        with pytest.raises(
            IndexError, match=r"row 4 does|row -5 does|single bool|bool mask|one dimension|out of bounds"
        ):
            make_instances()[index]

    def test_bool_mask_of_another_length(self):
        with pytest.raises(IndexError, match=r"the bool mask has 1 values for 4 rows"):
            make_instances()[[True]]

    def test_reads_like_english(self):
        instances = make_instances()
        dogs = instances[(instances.labels == 1) & (instances.scores > 0)]
        assert dogs.text_labels == ["dog", "dog"]

    def test_names(self):
        instances = make_instances(optional=False)
        assert instances["scores"] is instances.scores
        assert instances["text_labels"] == ["cat", "dog", "cat", "dog"]
        assert instances.keys() == ["scores", "labels", "boxes", "text_labels"]
        assert "boxes" in instances
        assert "masks" not in instances
        with pytest.raises(KeyError, match="'masks' is not one of scores, labels, boxes, text_labels"):
            instances["masks"]
        with pytest.raises(KeyError):
            instances["score"]

    def test_iteration_ends(self):
        assert [float(one.scores) for one in make_instances()] == make_instances().scores.tolist()

    def test_to_and_replace(self):
        instances = make_instances()
        moved = instances.to("meta")
        assert {moved[name].device.type for name in ("scores", "boxes", "masks", "embeddings")} == {"meta"}
        assert_same(instances.cpu(), instances)
        changed = instances.replace(track_ids=None)
        assert changed.track_ids is None
        assert changed.boxes is instances.boxes
        with pytest.raises(ValueError, match="boxes"):
            instances.replace(scores=torch.zeros(3), labels=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError):
            instances.replace(colour=torch.zeros(4))

    def test_empty(self):
        empty = Instances.empty((HEIGHT, WIDTH), ("cat",), with_masks=True)
        assert len(empty) == 0
        assert empty.boxes.shape == (0, 4)
        assert empty.masks.shape == (0, HEIGHT, WIDTH)
        assert empty.text_labels == list(empty) == []
        assert Instances.empty((HEIGHT, WIDTH), []).masks is None

    def test_repr(self):
        instances = make_instances(6, scores=torch.full((6,), 0.5))
        assert repr(instances) == (
            "Instances(6 in a picture of 80 x 60: cat 0.50, dog 0.50, cat 0.50, dog 0.50, cat 0.50, 1 more; "
            "with masks, track_ids, prompt_ids, embeddings)"
        )
        assert repr(Instances.empty((2, 3), [])) == "Instances(0 in a picture of 3 x 2)"


class TestConcat:
    def test_same_phrases(self):
        parts = [make_instances(2, seed=1), make_instances(3, seed=2)]
        joined = Instances.concat(parts)
        assert joined.phrases == ["cat", "dog"]
        assert_same(joined[:2], parts[0])
        assert_same(joined[2:], parts[1])

    def test_other_phrases_move_the_labels(self):
        parts = [
            make_instances(2),
            make_instances(1, phrases=["dog"], labels=torch.zeros(1, dtype=torch.int64)),
            Instances.empty((HEIGHT, WIDTH), ["a", "b", "c"]),
            make_instances(2, phrases=["cat", "bird"]),
        ]
        joined = Instances.concat(parts)
        assert joined.phrases == ["cat", "dog", "dog", "a", "b", "c", "cat", "bird"]
        assert joined.labels.tolist() == [0, 1, 2, 6, 7]
        assert joined.text_labels == ["cat", "dog", "dog", "cat", "bird"]

    def test_parts_without_rows_fit_everything(self):
        empty, full = Instances.empty((HEIGHT, WIDTH), ["cat", "dog"]), make_instances()
        assert_same(Instances.concat([empty, full]), full)
        no_masks = make_instances(optional=False)
        assert_same(Instances.concat([no_masks, Instances.empty((HEIGHT, WIDTH), ["cat", "dog"], True)]), no_masks)

    def test_missing_fields(self):
        parts = [make_instances(2), make_instances(1, optional=False)]
        with pytest.raises(ValueError, match='"parts" must all have "masks"'):
            Instances.concat(parts)
        joined = Instances.concat(parts, fill_missing=True)
        assert_same(joined[:2], parts[0])
        assert not joined.masks[2].any()
        assert joined.track_ids.tolist() == [10, 11, -1]
        assert joined.prompt_ids.tolist() == [0, 0, -1]
        assert joined.embeddings[2].tolist() == [0.0] * 5

    def test_errors(self):
        with pytest.raises(ValueError, match='"parts" must hold at least one'):
            Instances.concat([])
        with pytest.raises(ValueError, match='"parts" must all have the same image_size'):
            Instances.concat([Instances.empty((2, 3), []), Instances.empty((3, 2), [])])


class TestExports:
    def test_to_dict(self):
        instances = make_instances(optional=False)
        result = instances.to_dict()
        assert list(result) == ["scores", "labels", "boxes", "text_labels"]
        assert result["boxes"] is instances.boxes
        assert list(make_instances().to_dict()) == [
            *("scores", "labels", "boxes", "masks", "track_ids", "prompt_ids", "embeddings", "text_labels")
        ]

    def test_to_json(self):
        instances = make_instances(2)
        result = json.loads(json.dumps(instances.to_json()))
        assert result["image_size"] == [HEIGHT, WIDTH]
        assert result["phrases"] == ["cat", "dog"]
        second = result["instances"][1]
        assert list(second) == ["text", "label", "score", "box", "mask", "track_id", "prompt_id"]
        assert (second["text"], second["label"], second["track_id"], second["prompt_id"]) == ("dog", 1, 11, 0)
        assert second["score"] == round(float(instances.scores[1]), 6)
        assert second["box"] == [round(value, 3) for value in instances.boxes[1].tolist()]
        assert np.array_equal(coco_mask.decode(second["mask"]), instances.masks[1].numpy())

    def test_to_json_without_rows_and_optional_fields(self):
        assert Instances.empty((2, 3), ["a"]).to_json() == {"image_size": [2, 3], "phrases": ["a"], "instances": []}
        assert list(make_instances(1, optional=False).to_json()["instances"][0]) == ["text", "label", "score", "box"]

    def test_to_coco(self):
        boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]])
        instances = make_instances(2, boxes=boxes, scores=torch.tensor([0.5, 0.25]))
        results = instances.to_coco(7, category_ids=[17, 18])
        assert [result.pop("segmentation") for result in results] == [
            {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
            for mask in instances.masks.numpy().astype(np.uint8)
        ]
        assert results == [
            {"image_id": 7, "category_id": 17, "bbox": [1, 2, 3, 6], "score": 0.5},
            {"image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1], "score": 0.25},
        ]

    def test_to_coco_defaults(self):
        results = make_instances(2, optional=False).to_coco()
        assert [result["category_id"] for result in results] == [0, 1]
        assert "segmentation" not in results[0]
        assert Instances.empty((2, 3), []).to_coco() == []
        with pytest.raises(ValueError, match='"category_ids" must hold one id for each of 2 phrases, got 1'):
            make_instances().to_coco(0, [1])

    def test_to_supervision(self, monkeypatch):
        stub = types.ModuleType("supervision")
        stub.Detections = lambda **fields: fields
        monkeypatch.setitem(sys.modules, "supervision", stub)
        instances = make_instances(2)
        fields = instances.to_supervision()
        assert fields["xyxy"].dtype == np.float32
        assert np.array_equal(fields["xyxy"], instances.boxes.numpy())
        assert np.array_equal(fields["mask"], instances.masks.numpy())
        assert np.array_equal(fields["confidence"], instances.scores.numpy())
        assert fields["class_id"].tolist() == [0, 1]
        assert fields["tracker_id"].tolist() == [10, 11]
        assert fields["data"]["class_name"].tolist() == ["cat", "dog"]
        assert fields["data"]["prompt_id"].tolist() == [0, 0]
        plain = make_instances(2, optional=False).to_supervision()
        assert plain["mask"] is plain["tracker_id"] is None

    def test_to_supervision_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(ImportError, match=r'pip install "uninext-hf\[video\]"'):
            make_instances().to_supervision()


def grey(size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    return Image.new("RGB", size[::-1], (128, 128, 128))


def count_color(image: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == color).all(axis=-1).sum())


@pytest.fixture
def fresh_fonts():
    """For tests that change where fonts come from: their effect must not stay in the caches."""
    yield
    instances_uninext._open_font.cache_clear()
    instances_uninext._has_glyph.cache_clear()


class TestDraw:
    def test_box_pixels(self):
        instances = make_instances(1, optional=False, boxes=torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
        pixels = np.asarray(instances.draw(grey(), labels=False, scores=False))
        expected = np.zeros((HEIGHT, WIDTH), bool)
        expected[20:40, 10:30] = True
        expected[21:39, 11:29] = False  # right and bottom are exclusive, the line is one pixel wide
        assert np.array_equal((pixels == RED).all(axis=-1), expected)

    def test_mask_is_blended_and_outlined(self):
        mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
        mask[0, :20, 10:30] = True  # touches the upper side of the picture
        instances = make_instances(1, optional=False, masks=mask, boxes=torch.tensor([[60.0, 50.0, 61.0, 51.0]]))
        pixels = np.asarray(instances.draw(grey(), labels=False, scores=False, mask_opacity=0.25))
        blended = [round(0.75 * 128 + 0.25 * channel) for channel in RED]
        assert pixels[5, 20].tolist() == pixels[0, 20].tolist() == blended
        assert pixels[5, 10].tolist() == pixels[19, 20].tolist() == list(RED)
        assert pixels[5, 9].tolist() == pixels[20, 20].tolist() == [128] * 3

    @pytest.mark.parametrize("opacity", [0.0, 1.0])
    def test_mask_opacity_limits(self, opacity):
        masks = torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)
        instances = make_instances(1, optional=False, masks=masks)
        drawn = instances.draw(grey(), labels=False, scores=False, mask_opacity=opacity)
        assert np.asarray(drawn)[0, 0].tolist() == (list(RED) if opacity else [128] * 3)

    def test_small_ones_stay_visible(self):
        masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
        masks[0, 25:35, 35:45] = True
        masks[1] = True
        boxes = torch.tensor([[35.0, 25.0, 45.0, 35.0], [0.0, 0.0, WIDTH, HEIGHT]])
        for order in ([0, 1], [1, 0]):
            instances = make_instances(2, optional=False, masks=masks, boxes=boxes)[order]
            drawn = instances.draw(grey(), labels=False, scores=False, mask_opacity=1.0)
            assert np.asarray(drawn)[30, 40].tolist() == list(RED)

    def test_colours(self):
        instances = make_instances(4, labels=torch.tensor([0, 0, 1, 0]), track_ids=torch.tensor([5, 6, 5, 25]))
        palette = instances_uninext._PALETTE
        assert palette[:2] == [RED, GREEN]
        assert len(set(palette)) == len(palette) == 20
        by = {}
        for color_by in ("label", "instance", "track"):
            drawn = instances.replace(masks=None).draw(grey(), color_by=color_by, labels=False, scores=False)
            by[color_by] = {index for index, color in enumerate(palette) if count_color(drawn, color)}
        assert by == {"label": {0, 1}, "instance": {0, 1, 2, 3}, "track": {5, 6}}

    def test_every_row_is_drawn(self):
        generator = torch.Generator().manual_seed(0)
        corners = torch.rand(20, 2, generator=generator) * 350
        instances = Instances(
            (400, 400), ["x"], torch.zeros(20), torch.zeros(20).long(), torch.cat((corners, corners + 40), 1)
        )
        drawn = instances.draw(grey((400, 400)), color_by="instance", labels=False, scores=False)
        assert all(count_color(drawn, color) > 10 for color in instances_uninext._PALETTE)

    def test_tags_of_equal_boxes_do_not_cover_each_other(self):
        count = 10
        boxes = torch.tensor([[150.0, 140.0, 250.0, 260.0]]).expand(count, 4)
        instances = Instances((400, 400), ["person"], torch.rand(count), torch.zeros(count).long(), boxes)
        tagged = instances.draw(grey((400, 400)), color_by="instance")
        areas = [count_color(tagged, color) for color in instances_uninext._PALETTE[:count]]
        assert min(areas) > 0.5 * sorted(areas)[count // 2]

    @pytest.mark.parametrize(
        "box", [[0.0, 0.0, 5.0, 5.0], [195.0, 0.0, 200.0, 5.0], [0.0, 95.0, 5.0, 100.0], [195.0, 95.0, 200.0, 100.0]]
    )
    def test_tags_stay_whole_in_the_corners(self, box):
        def tag_area(at):
            instances = Instances((100, 200), ["person"], torch.ones(1), torch.zeros(1).long(), torch.tensor([at]))
            return count_color(instances.draw(grey((100, 200))), RED)

        assert tag_area(box) == pytest.approx(tag_area([100.0, 50.0, 105.0, 55.0]), abs=25)

    def test_tag_content_changes_with_the_options(self):
        instances = make_instances(
            1, image_size=(200, 300), masks=None, boxes=torch.tensor([[90.0, 90.0, 150.0, 150.0]])
        )
        picture = grey((200, 300))
        drawn = {
            "all": instances.draw(picture),
            "no score": instances.draw(picture, scores=False),
            "no label": instances.draw(picture, labels=False),
            "neither": instances.draw(picture, labels=False, scores=False),
            "no track": instances.replace(track_ids=None).draw(picture),
            "track -1": instances.replace(track_ids=torch.tensor([-1])).draw(picture),
            "banner": instances.draw(picture, banner="random weights: boxes are meaningless"),
        }
        assert drawn["no track"].tobytes() == drawn["track -1"].tobytes()
        assert len({image.tobytes() for image in drawn.values()}) == len(drawn) - 1
        sizes = [count_color(drawn[name], RED) for name in ("all", "no score", "no label", "neither")]
        assert sizes == sorted(sizes, reverse=True)

    def test_banner_is_dark_with_light_letters_and_only_at_the_top(self):
        plain, banner = Instances.empty((200, 300), []), "random weights: boxes are meaningless"
        pixels = np.asarray(plain.draw(grey((200, 300)), banner=banner)).astype(int)
        changed = np.flatnonzero((pixels != 128).any(axis=(1, 2)))
        assert changed[0] == 0
        assert 8 < len(changed) < 40
        assert pixels[0].mean() < 64
        assert (pixels[: len(changed)].min(axis=-1) > 200).sum() > 100
        twice = np.asarray(plain.draw(grey((200, 300)), banner=" ".join([banner] * 2)))
        assert (twice != 128).any(axis=(1, 2)).sum() > len(changed)

    def test_tags_stay_off_the_banner(self):
        instances = Instances(
            (200, 300), ["cat"], torch.ones(1), torch.zeros(1).long(), torch.tensor([[0.0, 60, 50, 150]])
        )
        whole_picture = instances.replace(boxes=torch.tensor([[0.0, 0.0, 300.0, 200.0]]))
        strip = np.asarray(Instances.empty((200, 300), []).draw(grey((200, 300)), banner="x"))
        rows = int((strip != 128).any(axis=(1, 2)).sum())
        for each in (instances, whole_picture):
            assert count_color(each.draw(grey((200, 300)), banner="x").crop((0, 0, 300, rows)), RED) == 0

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
    def test_picture_modes(self, mode):
        drawn = make_instances().draw(Image.new(mode, (WIDTH, HEIGHT)))
        assert (drawn.mode, drawn.size) == ("RGB", (WIDTH, HEIGHT))

    def test_picture_kinds_give_the_same(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        before = pixels.copy()
        path = tmp_path / "picture.png"
        Image.fromarray(pixels).save(path)
        instances = make_instances()
        expected = instances.draw(Image.fromarray(pixels)).tobytes()
        for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), str(path)):
            assert instances.draw(image).tobytes() == expected
        assert np.array_equal(pixels, before)
        assert instances.draw(pixels[..., 0]).tobytes() == instances.draw(Image.fromarray(pixels[..., 0])).tobytes()

    def test_picture_is_not_changed(self):
        picture = grey()
        make_instances().draw(picture, banner="x")
        assert picture.tobytes() == grey().tobytes()

    def test_exif_orientation(self):
        picture = Image.new("RGB", (HEIGHT, WIDTH))
        picture.getexif()[0x0112] = 6
        assert make_instances().draw(picture).size == (WIDTH, HEIGHT)

    @pytest.mark.parametrize("size", [(1, 1), (2, 1), (20, 2000), (2000, 20), (9, 9), (14, 300), (30, 30)])
    @pytest.mark.parametrize("count", [0, 3])
    def test_odd_sizes(self, size, count):
        height, width = size
        boxes = torch.tensor([[0.0, 0.0, width, height], [width - 1.0, height - 1.0, width, height], [0.0, 0, 0, 0]])
        instances = Instances(
            image_size=size,
            phrases=["a rather long description of a thing"],
            scores=torch.ones(3),
            labels=torch.zeros(3, dtype=torch.int64),
            boxes=boxes,
            masks=torch.ones(3, height, width, dtype=torch.bool),
        )[:count]
        drawn = instances.draw(grey(size), banner="random weights: boxes are meaningless")
        assert drawn.size == (width, height)
        if count:
            assert count_color(drawn, RED) > 0

    def test_boxes_that_no_model_should_give(self):
        nan, inf = float("nan"), float("inf")
        boxes = torch.tensor(
            [[nan] * 4, [-inf, -inf, inf, inf], [50.0, 40.0, 10.0, 5.0], [900.0, 900.0, 950.0, 950.0]]
        )
        drawn = make_instances(4, optional=False, boxes=boxes).draw(grey())
        assert count_color(drawn, RED) > 0

    def test_empty_mask(self):
        masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
        with_mask, without = make_instances(1, optional=False, masks=masks), make_instances(1, optional=False)
        assert with_mask.draw(grey()).tobytes() == without.draw(grey()).tobytes()

    def test_a_phrase_no_font_can_write_becomes_its_label_number(self, monkeypatch, fresh_fonts):
        monkeypatch.setattr(instances_uninext, "_SYSTEM_FONTS", ("no-such-font.ttf",))
        instances = make_instances(2, image_size=(200, 300), optional=False)
        by_number = instances.replace(phrases=["label 0", "label 1"]).draw(grey((200, 300)))
        assert instances.replace(phrases=["猫", "犬"]).draw(grey((200, 300))).tobytes() == by_number.tobytes()
        assert instances.draw(grey((200, 300))).tobytes() != by_number.tobytes()

    def test_right_to_left_text_without_raqm_becomes_its_label_number(self, monkeypatch):
        instances = make_instances(2, image_size=(200, 300), optional=False)
        by_number = instances.replace(phrases=["label 0", "label 1"]).draw(grey((200, 300)))
        monkeypatch.setattr(instances_uninext.features, "check", lambda name: False)
        assert instances.replace(phrases=["قطة", "כלב"]).draw(grey((200, 300))).tobytes() == by_number.tobytes()

    def test_system_font_for_other_alphabets(self):
        if instances_uninext._open_font("DejaVuSans.ttf", 12) is None:
            pytest.skip("DejaVu is not installed")
        font = instances_uninext._font_for("Женщина", 12)
        assert font.getname()[0] == "DejaVu Sans"

    def test_pillow_without_freetype(self, monkeypatch, fresh_fonts):
        instances_uninext._open_font.cache_clear()
        instances_uninext._has_glyph.cache_clear()
        monkeypatch.setattr(ImageFont, "load_default", lambda size: ImageFont.load_default_imagefont())
        monkeypatch.setattr(instances_uninext, "_SYSTEM_FONTS", ())
        instances = make_instances(2, image_size=(200, 300), optional=False, phrases=["cat", "猫"])
        drawn = instances.draw(grey((200, 300)), banner="random weights")
        assert drawn.tobytes() != instances.draw(grey((200, 300)), labels=False, scores=False).tobytes()

    @pytest.mark.parametrize(
        ("image", "options", "message"),
        [
            (grey((HEIGHT, WIDTH + 1)), {}, r'"image" must have the image_size .* \(60, 80\), got \(60, 81\)'),
            (grey((WIDTH, HEIGHT)), {}, '"image" must have the image_size'),
            (np.zeros((HEIGHT, WIDTH, 3), np.float32), {}, '"image" must be a numpy array .* uint8'),
            (np.zeros((3, HEIGHT, WIDTH), np.uint8), {}, '"image" must be a numpy array'),
            (torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), {}, '"image" must be'),
            (None, {}, '"image" must be a PIL image'),
            (grey(), {"color_by": "score"}, '"color_by" must be'),
            (grey(), {"color_by": "track"}, '"color_by" can be "track" only if'),
            (grey(), {"mask_opacity": 1.5}, '"mask_opacity" must be in'),
        ],
    )
    def test_errors(self, image, options, message):
        with pytest.raises(ValueError, match=message):
            make_instances(optional=False).draw(image, **options)


@pytest.mark.parametrize("name", ["task", "box_ops", "prompt", "instances"])
def test_loading_as_remote_code_asks_for_core_packages_only(name):
    """Transformers collects imports inside functions too; only those in a try block are left alone."""
    path = pathlib.Path(instances_uninext.__file__).with_name(f"{name}_uninext.py")
    third_party = {module for module in get_imports(path) if module not in sys.stdlib_module_names}
    assert third_party <= {"torch", "torchvision", "numpy", "PIL", "huggingface_hub", "transformers"}
