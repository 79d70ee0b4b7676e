import copy
import pickle
import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from uninext_hf.configuration_uninext import UninextConfig
from uninext_hf.image_processing_uninext import UninextImageProcessor
from uninext_hf.processing_uninext import UninextInputs, UninextProcessor, as_prompts, clean_expression, clean_name
from uninext_hf.prompt_uninext import Prompt
from uninext_hf.task_uninext import PromptKind

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
TEMPLATE = {"image": PICTURE, "box": (10, 10, 40, 30)}


@pytest.fixture(scope="module")
def processor():
    return UninextProcessor.for_model()


@pytest.fixture(scope="module")
def short():
    """Room for 20 tokens."""
    processor = UninextProcessor.for_model()
    return UninextProcessor(processor.image_processor, processor.tokenizer, max_prompt_length=20)


def make_outputs(rows: int = 1, queries: int = 4, length: int = 3, size: tuple[int, int] = (40, 60), **fields) -> dict:
    """Predictions of which nothing is found: low scores, boxes in different corners, empty masks."""
    generator = torch.Generator().manual_seed(0)
    height, width = -(-size[0] // 8), -(-size[1] // 8)
    outputs = {
        "logits": torch.full((rows, queries, length), -9.0),
        "pred_ious": torch.zeros(rows, queries),
        "pred_boxes": torch.rand(rows, queries, 4, generator=generator) * 0.1 + 0.2,
        "mask_kernels": torch.zeros(rows, queries, 169),
        "mask_features": torch.rand(rows, 8, height, width, generator=generator),
        "reference_points": torch.rand(rows, queries, 2, generator=generator),
        "input_sizes": torch.tensor([size] * rows),
    }
    return outputs | fields


def decoded(processor: UninextProcessor, inputs: UninextInputs, row: int = 0) -> list[str]:
    """The tokens that the label map gives each name."""
    ids = inputs["input_ids"][row]
    return [processor.tokenizer.decode(ids[tokens]) for tokens in inputs["label_map"][row]]


class TestCleaning:
    @pytest.mark.parametrize(
        ("name", "cleaned"),
        [
            ("coffee_cup", "coffee cup"),
            ("hair_drier (electric)", "hair drier "),  # the blank stays, as officially
            ("mouse (computer) or (animal) x", "mouse x"),  # from the first to the last bracket
            ("a  b", "a b"),
            ("a   b", "a  b"),  # one pass
            ("(only brackets)", "(only brackets)"),
            ("___", "___"),
            ("Person", "Person"),
        ],
    )
    def test_names(self, name, cleaned):
        assert clean_name(name) == cleaned

    @pytest.mark.parametrize(
        ("text", "cleaned"),
        [
            ("The man's (red) hat, #2: left!", "the mans red hat 2 left"),
            ("red-and/or-blue", "red and or blue"),
            ("a -- b", "a    b"),
            ("salt & pepper 50% é", "salt & pepper 50% é"),
            ("?!", "?!"),
            ("-", "-"),
        ],
    )
    def test_expressions(self, text, cleaned):
        assert clean_expression(text) == cleaned


class TestNames:
    @pytest.mark.parametrize(
        ("names", "tokens"),
        [
            (["motor", "motorbike", "motor"], ["motor", "motorbike", "motor"]),
            (["st. bernard", "a, b", "x-ray"], ["st. bernard", "a, b", "x - ray"]),
            (["(odd)", "wine glass (red)"], ["( odd )", "wine glass"]),
            (["[SEP]", "[CLS]"], ["[ sep ]", "[ cls ]"]),
            (["犬", "山 犬", "山犬"], ["犬", "山 犬", "山 犬"]),
            (["собака", "Émile", "ΓΆΤΑ"], ["собака", "emile", "γατα"]),
            (["a.", ". b", "c. d. e"], ["a.", ". b", "c. d. e"]),
        ],
    )
    def test_every_name_has_its_own_tokens(self, processor, names, tokens):
        inputs = processor(prompts=names)
        assert decoded(processor, inputs) == tokens
        assert (inputs["label_map"][0].sum(0) <= 1).all()
        assert inputs.rows[0].labels == tuple(range(len(names)))
        assert inputs.rows[0].phrases == tuple(names)

    def test_random_names(self, short):
        """200 random lists: every name keeps its tokens, in order, and every row keeps its limit."""
        generator = random.Random(0)
        alphabet = ["cat", "dog", "s", "'", ".", ",", "-", "_", " ", "(", ")", "zebra crossing", "é", "鳥", "[PAD]"]
        for _ in range(200):
            names = []
            while len(names) < generator.randint(1, 20):
                name = "".join(generator.choices(alphabet, k=generator.randint(1, 4)))
                if name.strip():
                    names.append(name)
            inputs = short(prompts=names)
            assert sum((row.labels for row in inputs.rows), ()) == tuple(range(len(names)))
            for row, ids, mask in zip(inputs.rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
                assert mask.sum() == len(row.input_ids) <= 20
                assert not row.label_map[:, mask == 0].any()
                assert not row.label_map[:, [0, len(row.input_ids) - 1]].any()
                for label, tokens in zip(row.labels, row.label_map, strict=True):
                    text = clean_name(names[label])
                    alone = short.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                    assert ids[tokens].tolist() == alone

    def test_chunks_are_greedy_and_in_order(self, short):
        names = ["cat"] * 8 + ["wine glass"] * 4  # 18 tokens hold nine names of one token, or six of two
        assert [row.labels for row in short(prompts=names).rows] == [(*range(9),), (9, 10, 11)]
        inputs = short(prompts=["cat"] * 9)
        assert len(inputs.rows) == 1
        assert "image_index" not in inputs

    def test_chunks_share_their_picture(self, short):
        names = ["cat"] * 12
        inputs = short([PICTURE, PICTURE], names)
        assert inputs["image_index"].tolist() == [0, 0, 1, 1]
        assert inputs["pixel_values"].shape[0] == 2
        assert [(row.prompt, row.picture) for row in inputs.rows] == [(0, 0), (0, 0), (0, 1), (0, 1)]

    def test_thousands_of_names(self, processor):
        names = [f"thing number {index}" for index in range(1300)]
        inputs = processor(prompts=names)
        assert sum((row.labels for row in inputs.rows), ()) == tuple(range(1300))
        assert inputs["attention_mask"].sum(1).max() <= 256
        assert processor.encode_text("categories", names) is processor.encode_text("categories", tuple(names))

    def test_texts_are_cached_and_bounded(self, processor):
        for index in range(200):
            processor.encode_text("expression", (f"cat {index}",))
        assert len(processor._texts) <= 64


class TestCall:
    def test_keys_and_types(self, processor):
        inputs = processor(PICTURE, ["cat"], do_resize=False)
        assert {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()} == {
            "pixel_values": ((1, 3, 40, 60), torch.float32),
            "pixel_mask": ((1, 40, 60), torch.int64),
            "input_ids": ((1, 3), torch.int64),
            "attention_mask": ((1, 3), torch.int64),
            "pool_prompt": ((1,), torch.bool),
        }
        assert set(inputs) <= set(processor.model_input_names)

    def test_mixed_kinds_are_aligned_by_row(self, processor):
        inputs = processor([PICTURE] * 3, [["cat", "dog"], "the left one", TEMPLATE], size=64)
        assert inputs["attention_mask"].sum(1).tolist() == [5, 5, 1]
        assert inputs["template_mask"].flatten(1).any(1).tolist() == [False, False, True]
        assert not inputs["template_values"][:2].any()
        assert inputs["pool_prompt"].tolist() == [False, True, True]
        assert [row.kind for row in inputs.rows] == list(PromptKind)
        assert [tokens.shape for tokens in inputs["label_map"]] == [(2, 5), (1, 5), (1, 5)]
        assert inputs["label_map"][2].nonzero().tolist() == [[0, 0]]
        assert "image_index" not in inputs

    def test_templates_alone_have_no_text(self, processor):
        inputs = processor(PICTURE, {"image": PICTURE, "mask": PICTURE[..., 0] > 99}, size=64, template_size=64)
        assert "input_ids" not in inputs
        assert inputs["template_values"].shape == (1, 4, 64, 64)
        assert inputs["template_mask"].dtype == torch.bool

    @pytest.mark.parametrize(
        ("pictures", "prompts", "index", "expected"),
        [
            (1, ["a", "b"], None, [(0, 0)]),  # a flat list is one prompt
            (2, ["a", "b"], None, [(0, 0), (0, 1)]),
            (2, "a", None, [(0, 0), (0, 1)]),
            (2, [["a"], "b"], None, [(0, 0), (1, 1)]),
            (1, [["a"], "b", ["c"]], None, [(0, 0), (1, 0), (2, 0)]),
            (2, [["a"], "b", ["c"]], [1, 0, 1], [(0, 1), (1, 0), (2, 1)]),
            (2, [["a"], "b"], torch.tensor([1, 1]), [(0, 1), (1, 1)]),
            (0, [["a"], "b"], None, [(0, 0), (1, 1)]),
        ],
    )
    def test_pairing(self, processor, pictures, prompts, index, expected):
        inputs = processor([PICTURE] * pictures or None, prompts, image_index=index, do_resize=False)
        assert [(row.prompt, row.picture) for row in inputs.rows] == expected
        shown = [picture for _, picture in expected]
        assert inputs.get("image_index", torch.arange(len(expected))).tolist() == shown
        assert ("image_index" in inputs) == (shown != list(range(pictures or len(expected))))

    def test_parts_alone(self, processor):
        assert set(processor(PICTURE)) == {"pixel_values", "pixel_mask"}
        assert set(processor(prompts="a cat")) == {"input_ids", "attention_mask", "pool_prompt"}
        assert torch.equal(processor(text="a cat")["input_ids"], processor(prompts="a cat")["input_ids"])

    def test_pad_to(self, processor):
        inputs = processor(prompts=["cat"], pad_to=10)
        assert inputs["input_ids"].tolist() == [[101, 4937, 102] + [0] * 7]
        assert inputs["label_map"][0].shape == (1, 10)

    def test_path_as_reference_picture(self, processor, tmp_path):
        from PIL import Image

        Image.fromarray(PICTURE).save(tmp_path / "reference.png")
        prompt = {**TEMPLATE, "image": tmp_path / "reference.png"}
        assert torch.equal(
            processor(prompts=prompt)["template_values"], processor(prompts=TEMPLATE)["template_values"]
        )

    def test_annotations(self, processor):
        masks = np.zeros((1, 40, 60), bool)
        masks[0, 10:20, 15:45] = True
        annotation = {"boxes": [(15, 10, 45, 20)], "class_labels": [1], "masks": masks, "mask_source": "mask"}
        inputs = processor([PICTURE], ["cat", "dog"], [annotation], size={"height": 80, "width": 120}, size_divisor=32)
        label = inputs["labels"][0]
        assert label["boxes"].tolist() == [pytest.approx([0.5, 0.375, 0.5, 0.25])]
        assert label["class_labels"].tolist() == [1]
        assert torch.equal(label["positive_map"], inputs["label_map"][0][1:])
        assert label["masks"].shape == (1, 96, 128)
        assert label["masks"][0, 20:40, 30:90].all()
        assert label["masks"].sum() == 20 * 60
        assert label["mask_source"] == "mask"
        single = processor(PICTURE, "the dog", {"boxes": [(15, 10, 45, 20)]})["labels"][0]
        assert "positive_map" not in single
        assert single["class_labels"].tolist() == [0]


class TestInputs:
    def test_mapping_holds_only_what_the_model_takes(self, processor):
        inputs = processor(PICTURE, ["cat"], do_resize=False)
        assert all(isinstance(value, torch.Tensor) for value in {**inputs}.values())
        assert "label_map" not in inputs.keys()  # noqa: SIM118 - the keys are the point
        assert inputs["label_map"][0] is inputs.label_map[0] is inputs.rows[0].label_map
        assert inputs["rows"] is inputs.rows
        with pytest.raises(KeyError):
            inputs["nothing"]

    def test_to(self, processor):
        inputs = processor(PICTURE, ["cat"], {"boxes": [(1, 2, 3, 4)], "class_labels": [0]}, do_resize=False)
        assert inputs.to(torch.bfloat16) is inputs
        assert inputs["pixel_values"].dtype == inputs["labels"][0]["boxes"].dtype == torch.bfloat16
        assert inputs["input_ids"].dtype == inputs["labels"][0]["class_labels"].dtype == torch.int64
        meta = inputs.to("meta")
        assert meta["pixel_values"].device.type == meta["labels"][0]["boxes"].device.type == "meta"
        assert meta["label_map"][0].device.type == "cpu"

    @pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_copies(self, processor, remake):
        inputs = processor(PICTURE, ["cat"], do_resize=False)
        again = remake(inputs)
        assert torch.equal(again["pixel_values"], inputs["pixel_values"])
        assert torch.equal(again["label_map"][0], inputs["label_map"][0])


class TestSaving:
    @pytest.fixture(autouse=True)
    def _registered(self):
        AutoConfig.register("uninext", UninextConfig, exist_ok=True)
        classes = {"torchvision": UninextImageProcessor}
        AutoImageProcessor.register(UninextConfig, image_processor_classes=classes, exist_ok=True)
        AutoProcessor.register(UninextConfig, UninextProcessor, exist_ok=True)

    @pytest.mark.parametrize("load", [UninextProcessor.from_pretrained, AutoProcessor.from_pretrained])
    def test_round_trip(self, tmp_path, load):
        made = UninextProcessor.for_model(UninextConfig.from_preset("convnext-large"))
        made = UninextProcessor(made.image_processor, made.tokenizer, max_prompt_length=100)
        made(prompts=["cat"])  # fills the cache, which must not be saved
        made.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        assert type(loaded) is UninextProcessor
        assert loaded.max_prompt_length == 100
        assert loaded.image_processor.size_divisor == 32
        assert loaded.to_dict() == made.to_dict()
        first, second = (maker(PICTURE, ["Wine_Glass", "猫"]) for maker in (made, loaded))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize(("preset", "divisor"), [("r50", None), ("convnext-large", 32), ("vit-huge", 32)])
    def test_divisor_follows_the_backbone(self, preset, divisor):
        processor = UninextProcessor.for_model(UninextConfig.from_preset(preset))
        assert processor.image_processor.size_divisor == divisor

    @pytest.mark.parametrize("length", [0, 2, -1, "256", 3.5])
    def test_bad_length(self, processor, length):
        with pytest.raises(ValueError, match='"max_prompt_length" must be an integer'):
            UninextProcessor(processor.image_processor, processor.tokenizer, max_prompt_length=length)


class TestResults:
    def test_score_is_mean_over_tokens_in_geometric_mean_with_quality(self, processor):
        logits = torch.full((1, 2, 6), -9.0)
        logits[0, 0, 3:5] = torch.tensor([1.0, 3.0])  # "wine glass" in [CLS] cat . wine glass [SEP]
        outputs = make_outputs(queries=2, length=6, logits=logits, pred_ious=torch.tensor([[1.0, -9.0]]))
        names = ["cat", "wine glass"]
        best = processor.post_process_instances(outputs, names, top_k=1)[0]
        quality, score = torch.sigmoid(torch.tensor([1.0, 2.0])).tolist()
        assert best.scores.tolist() == pytest.approx([(quality * score) ** 0.5])
        assert best.labels.tolist() == [1]
        assert best.text_labels == ["wine glass"]
        plain = processor.post_process_instances(outputs, names, use_iou_score=False, threshold=0.5)[0]
        assert plain.scores.tolist() == pytest.approx([score])

    def test_single_targets_give_one_row_unless_asked(self, processor):
        outputs = make_outputs(logits=torch.randn(1, 4, 9))
        outputs["logits"][0, :, 0] = torch.tensor([0.0, 2.0, 1.0, -1.0])
        assert len(processor.post_process_instances(outputs, "the red one")[0]) == 1
        options = {"top_k": 3, "nms_iou": None}
        several = processor.post_process_instances(outputs, "the red one", **options)[0]
        assert several.scores.tolist() == sorted(several.scores.tolist(), reverse=True)
        assert len(several) == 3
        assert (
            len(processor.post_process_instances(outputs, "the red one", top_k=3, nms_iou=None, threshold=0.6)[0]) == 2
        )

    def test_suppression_is_per_name(self, processor):
        logits = torch.full((1, 3, 5), -9.0)
        logits[0, 0, 1], logits[0, 1, 1], logits[0, 2, 3] = 3.0, 2.0, 1.0
        outputs = make_outputs(
            queries=3, length=5, logits=logits, pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4]] * 3])
        )
        options = {"use_iou_score": False, "threshold": 0.5}
        assert processor.post_process_instances(outputs, ["cat", "dog"], **options)[0].labels.tolist() == [0, 1]
        kept = processor.post_process_instances(outputs, ["cat", "dog"], nms_iou=None, **options)[0]
        assert kept.labels.tolist() == [0, 0, 1]

    def test_one_query_may_have_several_names(self, processor):
        logits = torch.full((1, 1, 5), 3.0)
        found = processor.post_process_instances(make_outputs(queries=1, length=5, logits=logits), ["cat", "dog"])[0]
        assert sorted(found.labels.tolist()) == [0, 1]
        assert torch.equal(found.masks[0], found.masks[1])

    def test_chunks_are_merged_before_suppression_and_top_k(self, short):
        """Names that need two rows: as if all names had been in one."""
        names = ["cat"] * 9 + ["dog"] * 3
        inputs = short(prompts=names)
        assert len(inputs.rows) == 2
        outputs = make_outputs(rows=2, queries=3, length=20)
        outputs["logits"][0, 1, 5] = 4.0  # the third name of the first row
        outputs["logits"][1, 2, 3] = 5.0  # the second name of the second row
        outputs["query_embeddings"] = torch.arange(6.0).reshape(2, 3, 1)
        found = short.post_process_instances(outputs, names, threshold=0.5, top_k=2, target_sizes=[(80, 120)])
        assert len(found) == 1
        assert found[0].labels.tolist() == [10, 2]
        assert found[0].embeddings.flatten().tolist() == [5, 1]
        assert found[0].phrases == names
        sizes = [(80, 120), (40, 60)]
        doubled = {name: torch.cat([value, value]) for name, value in outputs.items()}
        pair = short.post_process_instances(doubled, names, threshold=0.5, target_sizes=sizes)
        assert [result.image_size for result in pair] == sizes
        assert pair[0].scores.tolist() == pair[1].scores.tolist() == found[0].scores.tolist()

    def test_target_sizes_by_picture_or_by_result(self, processor):
        inputs = processor([PICTURE] * 2, [["a"], "b", ["c"]], image_index=[1, 0, 1], do_resize=False)
        outputs = make_outputs(rows=3, length=3)
        by_picture = processor.post_process_instances(outputs, inputs=inputs, target_sizes=[(10, 20), (30, 40)])
        assert [found.image_size for found in by_picture] == [(30, 40), (10, 20), (30, 40)]
        by_result = processor.post_process_instances(outputs, inputs=inputs, target_sizes=[(1, 2), (3, 4), (5, 6)])
        assert [found.image_size for found in by_result] == [(1, 2), (3, 4), (5, 6)]
        assert [found.phrases for found in by_result] == [["a"], ["b"], ["c"]]

    def test_boxes_are_clipped_and_empty_ones_left_out(self, processor):
        boxes = torch.tensor([[[0.0, 0.5, 0.5, 2.0], [1.5, 0.5, 0.2, 0.2]]])
        outputs = make_outputs(queries=2, logits=torch.full((1, 2, 3), 3.0), pred_boxes=boxes)
        clipped = processor.post_process_instances(outputs, ["cat"], target_sizes=[(80, 60)])[0]
        assert clipped.boxes.tolist() == [[0, 0, 15, 80]]
        assert clipped.masks.shape == (1, 80, 60)
        raw = processor.post_process_instances(outputs, ["cat"], clip=False)[0]
        assert raw.boxes[0].tolist() == pytest.approx([-15, -20, 15, 60])
        assert len(raw) == 2

    def test_nothing_found(self, processor):
        found = processor.post_process_instances(make_outputs(), ["cat"], threshold=0.9)[0]
        assert len(found) == 0
        assert found.masks.shape == (0, 40, 60)

    def test_half_precision_outputs(self, processor):
        outputs = make_outputs(logits=torch.ones(1, 4, 3))
        half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in outputs.items()}
        found = processor.post_process_instances(half, ["cat"])[0]
        assert found.scores.dtype == found.boxes.dtype == torch.float32

    def test_transformers_names(self, processor):
        inputs = processor(PICTURE, ["cat", "dog"], do_resize=False)
        outputs = make_outputs(length=5)
        outputs["logits"][0, 2, 3] = 5.0
        instances = processor.post_process_instances(outputs, inputs=inputs, threshold=0.5)[0]
        results = [
            processor.post_process_object_detection(outputs, 0.5, [(40, 60)], ["cat", "dog"]),
            processor.post_process_instance_segmentation(outputs, 0.5, [(40, 60)], inputs=inputs),
            processor.post_process_grounded_object_detection(outputs, inputs["input_ids"], 0.5, [(40, 60)]),
            processor.post_process_grounded_object_detection(outputs, threshold=0.5, text_labels=["cat", "dog"]),
        ]
        for index, result in enumerate(results):
            assert result[0]["text_labels"] == ["dog"]
            assert torch.equal(result[0]["boxes"], instances.boxes)
            assert torch.equal(result[0]["scores"], instances.scores)
            assert ("masks" in result[0]) == (index == 1)


def rectangle_kernel(half_width: float, half_height: float) -> torch.Tensor:
    """Weights with which the mask head draws a rectangle around its origin.

    Layer 1 takes the positive and negative parts of both relative coordinates, layer 2 how far they exceed the half
    sides less 16, layer 3 makes it 16 minus the larger excess at straight edges; so the mask ends at the half sides.
    """
    weights = [torch.zeros(8, 10), torch.zeros(8, 8), torch.zeros(1, 8)]
    biases = [torch.zeros(8), torch.zeros(8), torch.full((1,), 16.0)]
    weights[0][:4, :2] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    weights[1][0, :2] = weights[1][1, 2:4] = 1
    biases[1][:2] = -torch.tensor([half_width - 16, half_height - 16])
    weights[2][0, :2] = -1
    return torch.cat([weight.flatten() for weight in weights] + biases)


OFFICIAL_SHIFT = 2.0
"""The official doubling places the mask two input pixels to the lower right of where coordinates say; a trained
network makes up for it."""


class TestMasksLandWhereTheObjectIs:
    def test_after_resize_padding_and_back(self, processor):
        """250 sizes, paddings and rectangles: every edge within half a pixel of the network input.

        In the original picture that is half a pixel times the scale, plus one pixel for the nearest resize.
        """
        generator = random.Random(0)
        for index in range(250):
            size = generator.randint(150, 500), generator.randint(150, 500)
            padding = generator.choice([1, 32])
            padded = [-(-side // padding) * padding for side in size]
            target = size if index % 2 else (generator.randint(100, 900), generator.randint(100, 900))
            half_width, half_height = generator.uniform(30, size[1] / 3), generator.uniform(30, size[0] / 3)
            centre = generator.uniform(0, size[1]), generator.uniform(0, size[0])
            fields = {
                "mask_kernels": torch.zeros(1, 3, 169),
                "mask_features": torch.zeros(1, 8, -(-padded[0] // 8), -(-padded[1] // 8)),
                "reference_points": torch.tensor([[[0.0, 0.0], [centre[0] / size[1], centre[1] / size[0]], [1, 1]]]),
            }
            fields["mask_kernels"][0, 1] = rectangle_kernel(half_width, half_height)
            outputs = make_outputs(queries=3, size=size, **fields)
            outputs["logits"][0, 1] = 5.0
            mask = processor.post_process_instances(outputs, ["cat"], top_k=1, target_sizes=[target])[0].masks[0]
            assert mask.shape == target
            for axis, (middle, half) in enumerate(((centre[1], half_height), (centre[0], half_width))):
                seen = mask.any(1 - axis).nonzero().flatten()
                scale = target[axis] / size[axis]
                for end, edge in ((seen[0], middle - half), (seen[-1] + 1, middle + half)):
                    edge = min(max(edge + OFFICIAL_SHIFT, 0), size[axis])
                    # Along the border, one feature (8 pixels) wide, the official resizing repeats the outermost logit.
                    at_border = min(edge, size[axis] - edge) < 8
                    slack = (8 if at_border else 0.5) * scale + (0 if scale == 1 else 1)
                    assert abs(int(end) - edge * scale) <= slack + 1e-3

    def test_boxes(self, processor):
        """250 boxes: from the original picture to relative coordinates of the padded input and back."""
        generator = random.Random(1)
        for _ in range(250):
            target = generator.randint(10, 3000), generator.randint(10, 3000)
            size = generator.randint(10, 1333), generator.randint(10, 1333)
            x0, x1 = sorted(generator.uniform(0, target[1]) for _ in range(2))
            y0, y1 = sorted(generator.uniform(0, target[0]) for _ in range(2))
            relative = [
                (x0 + x1) / 2 / target[1],
                (y0 + y1) / 2 / target[0],
                (x1 - x0) / target[1],
                (y1 - y0) / target[0],
            ]
            outputs = make_outputs(queries=1, size=size, pred_boxes=torch.tensor([[relative]]))
            found = processor.post_process_instances(outputs, ["cat"], target_sizes=[target], output="box")[0]
            assert found.boxes[0].tolist() == pytest.approx([x0, y0, x1, y1], abs=0.01)


BAD_CALLS = [
    ({}, "At least one of"),
    ({"images": [], "prompts": "a"}, '"images" must hold at least one picture'),
    ({"images": 3, "prompts": "a"}, '"images" must be a PIL image'),
    ({"images": [PICTURE, "x.png"], "prompts": "a"}, r'"images\[1\]" must be a path'),
    ({"images": PICTURE.astype(float), "prompts": "a"}, '"images" must be uint8'),
    ({"images": PICTURE, "prompts": []}, '"names" must hold at least one name'),
    ({"images": PICTURE, "prompts": ""}, '"text" must be a non-blank string'),
    ({"images": PICTURE, "prompts": ["cat", " "]}, '"names" must hold non-blank strings'),
    ({"images": PICTURE, "prompts": ["cat", 3]}, '"prompts" holds an unusable value at position 1'),
    ({"images": PICTURE, "prompts": 3}, '"prompt" must be a Prompt'),
    ({"images": PICTURE, "prompts": {"box": (1, 2, 3, 4)}}, '"prompt" given as a dict'),
    ({"images": PICTURE, "prompts": {**TEMPLATE, "box": (9, 9, 1, 1)}}, '"box" must have x1 > x0'),
    ({"images": PICTURE, "prompts": {"image": PICTURE, "mask": PICTURE[:9, :9, 0]}}, '"mask" must have the size'),
    ({"images": PICTURE, "prompts": {**TEMPLATE, "image": "x.png"}}, '"image" must be a path'),
    ({"images": PICTURE, "prompts": ["cat", "\u200b"]}, r'"names" must have a token each.*position 1'),
    ({"images": PICTURE, "prompts": "\u200b"}, '"expression" must have at least one token'),
    ({"images": PICTURE, "prompts": ["\ud800"]}, '"names" must be valid Unicode'),
    ({"images": PICTURE, "prompts": "a " * 300}, '"expression" must have at most 256 tokens.*got 302'),
    ({"images": PICTURE, "prompts": ["cat", "a " * 300]}, r'"names" must fit.*got 302 .*position 1'),
    ({"images": PICTURE, "prompts": "a b", "pad_to": 3}, '"pad_to" must be at least the 4 tokens'),
    ({"images": PICTURE, "prompts": "a", "text": "a"}, 'Only one of "prompts" and "text"'),
    ({"images": PICTURE, "prompts": "a", "return_tensors": "np"}, '"return_tensors" must be "pt"'),
    ({"images": [PICTURE] * 2, "prompts": [["a"], "b", "c"]}, '"prompts" must be one, or as many as "images"'),
    ({"images": PICTURE, "prompts": [["a"], "b"], "image_index": [0, 1]}, '"image_index" must give one picture'),
    ({"images": PICTURE, "prompts": "a", "image_index": [0, 0]}, '"image_index" must give one picture'),
    ({"images": PICTURE, "prompts": "a", "image_index": [0.5]}, '"image_index" must give one picture'),
    ({"images": PICTURE, "prompts": "a", "do_center_crop": True, "crop_size": 9}, '"do_center_crop" must be left out'),
    ({"images": PICTURE, "annotations": [{}]}, '"annotations" must be given with "prompts"'),
    ({"images": PICTURE, "prompts": "a", "annotations": [{}, {}]}, '"annotations" must be given with "prompts", one'),
    ({"images": PICTURE, "prompts": "a", "annotations": {}}, '"annotations" must hold "boxes"'),
    (
        {"images": PICTURE, "prompts": ["a"], "annotations": {"boxes": [(1, 2, 3, 4)]}},
        '"annotations" must have one of',
    ),
    (
        {"images": PICTURE, "prompts": ["a"], "annotations": {"boxes": [(1, 2, 3, 4)], "class_labels": [1]}},
        '"annotations" must have one of 1 class labels',
    ),
    (
        {"images": PICTURE, "prompts": "a", "annotations": {"boxes": [(1, 2, 3, 4)], "masks": np.ones((1, 4, 4))}},
        r'"annotations" must have masks \(1, 40, 60\)',
    ),
    (
        {"images": PICTURE, "prompts": ["a b"] * 200, "annotations": {"boxes": [], "class_labels": []}},
        "draw fewer names",
    ),
]
NAN = make_outputs(pred_boxes=torch.full((1, 4, 4), float("nan")))
BAD_RESULTS = [
    ({}, 'Exactly one of "prompts" and "inputs" must be given, got neither'),
    ({"prompts": ["cat", "dog"]}, '"prompts" must be those.*1 rows of up to 5 tokens, outputs have 1 rows of 3'),
    ({"prompts": [["cat"], "dog"]}, '"prompts" must be those.*2 rows'),
    ({"prompts": ["cat"], "output": "polygon"}, '"output" must be one of box, mask'),
    ({"prompts": ["cat"], "threshold": 1.5}, r'"threshold" must be in \[0, 1\]'),
    ({"prompts": ["cat"], "threshold": float("nan")}, r'"threshold" must be in \[0, 1\]'),
    ({"prompts": ["cat"], "nms_iou": -1}, r'"nms_iou" must be in \[0, 1\]'),
    ({"prompts": ["cat"], "mask_threshold": 1}, r'"mask_threshold" must be in \(0, 1\)'),
    ({"prompts": ["cat"], "top_k": 0}, '"top_k" must be a positive integer'),
    ({"prompts": ["cat"], "target_sizes": [(1, 2)] * 3}, '"target_sizes" must hold 1 pairs'),
    ({"prompts": ["cat"], "target_sizes": [4]}, '"target_sizes" must be a list of pairs'),
    ({"prompts": ["cat"], "outputs": NAN}, 'NaN or infinite values in "pred_boxes"'),
    ({"prompts": ["cat"], "outputs": {**make_outputs(), "logits": None}}, '"outputs" must hold "logits"'),
    ({"prompts": ["cat"], "outputs": {**make_outputs(), "mask_kernels": None}}, '"outputs" must hold "mask_kernels"'),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_CALLS)
def test_bad_calls(processor, arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        processor(**arguments)


@pytest.mark.parametrize(("arguments", "fragment"), BAD_RESULTS)
def test_bad_results(processor, arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        processor.post_process_instances(**{"outputs": make_outputs(), **arguments})


def test_captions_that_cannot_be_read_back(processor):
    with pytest.raises(ValueError, match='"input_ids" must be a caption'):
        processor.post_process_grounded_object_detection(make_outputs(), torch.tensor([[101, 100, 4937, 4937, 102]]))
    with pytest.raises(ValueError, match='One of "prompts"'):
        processor.post_process_grounded_object_detection(make_outputs())


def test_as_prompts():
    assert [prompt.kind for prompt in as_prompts(["a", ["b"], TEMPLATE])] == ["expression", "categories", "template"]
    assert [prompt.kind for prompt in as_prompts(("a", "b"))] == ["categories"]
    assert as_prompts(Prompt.expression("a")) == [Prompt.expression("a")]
