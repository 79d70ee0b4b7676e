import importlib.util
import pathlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import uninext_hf.prompt_uninext
from uninext_hf.prompt_uninext import Prompt
from uninext_hf.task_uninext import PromptKind

HEIGHT, WIDTH = 30, 40
PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[5:10, 6:9] = 255


class TestLegal:
    def test_categories(self):
        prompt = Prompt.categories(["person", "wine glass", "猫"])
        assert prompt.kind == "categories"
        assert prompt.phrases == ("person", "wine glass", "猫")
        assert prompt.image is prompt.box is prompt.mask is None

    def test_expression(self):
        prompt = Prompt.expression("the man left of the red car")
        assert (prompt.kind, prompt.phrases) == ("expression", ("the man left of the red car",))

    @pytest.mark.parametrize(
        "image",
        [
            PICTURE,
            torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8),
            Image.new("RGBA", (WIDTH, HEIGHT)),
            PICTURE[..., 0],  # grey
            "https://example.org/cat.jpg",
        ],
        ids=["numpy", "torch", "PIL", "grey", "URL"],
    )
    def test_template_pictures(self, image):
        prompt = Prompt.template(image, box=(1, 2, 11, 12))
        assert prompt.image is image
        assert prompt.phrases == ("target",)
        assert Prompt.template(image, mask=MASK, name="dog").phrases == ("dog",)

    def test_path_object_becomes_text(self):
        assert Prompt.template(pathlib.Path("a") / "b.png", box=(0, 0, 1, 1)).image == str(pathlib.Path("a") / "b.png")

    @pytest.mark.parametrize(
        "box",
        [[1, 2, 11, 12], np.array([1, 2, 11, 12], np.float32), torch.tensor([1, 2, 11, 12]), (1.0, 2, 11, 12)],
        ids=["list", "numpy", "torch", "tuple"],
    )
    def test_box_is_stored_as_floats(self, box):
        stored = Prompt.template(PICTURE, box=box).box
        assert stored == (1.0, 2.0, 11.0, 12.0)
        assert [type(value) for value in stored] == [float] * 4

    def test_box_partly_outside(self):
        assert Prompt.template(PICTURE, box=(-5, -5, 1, 1)).box == (-5, -5, 1, 1)

    @pytest.mark.parametrize(
        "mask",
        [
            MASK,
            MASK > 0,
            (MASK > 0)[None],
            MASK.astype(np.int64),
            MASK.astype(np.float32) / 255,
            torch.from_numpy(MASK),
            torch.from_numpy(MASK > 0).bfloat16(),
            Image.fromarray(MASK),
            Image.fromarray(MASK > 0),
        ],
        ids=["uint8", "bool", "1HW", "int64", "float", "torch", "bfloat16", "PIL L", "PIL 1"],
    )
    def test_mask_is_stored_as_bool_tensor(self, mask):
        stored = Prompt.template(PICTURE, mask=mask).mask
        assert stored.dtype == torch.bool
        assert np.array_equal(stored.numpy(), MASK > 0)

    def test_mask_is_a_copy(self):
        mask = MASK > 0
        prompt = Prompt.template(PICTURE, mask=mask)
        mask[:] = True
        assert prompt.mask.sum() == 15

    def test_picture_turned_by_exif_is_measured_as_displayed(self):
        image = Image.new("RGB", (HEIGHT, WIDTH))
        image.getexif()[0x0112] = 6
        assert Prompt.template(image, mask=MASK).mask.shape == (HEIGHT, WIDTH)
        with pytest.raises(ValueError, match="mask"):
            Prompt.template(Image.new("RGB", (HEIGHT, WIDTH)), mask=MASK)

    def test_kind_may_be_text(self):
        assert Prompt("expression", ("a dog",)).kind is PromptKind.EXPRESSION

    def test_frozen(self):
        with pytest.raises(AttributeError):
            Prompt.expression("a dog").phrases = ("a cat",)


ILLEGAL = {
    "no names": (lambda: Prompt.categories([]), '"names" must hold at least one'),
    "names as text": (lambda: Prompt.categories("cat, dog"), '"names" must be a list of strings'),
    "names None": (lambda: Prompt.categories(None), '"names" must be a list of strings'),
    "name not a string": (lambda: Prompt.categories(["cat", 3]), '"names" must hold non-blank strings, got int 3 at'),
    "name empty": (lambda: Prompt.categories(["cat", ""]), '"names" must hold non-blank strings'),
    "name blank": (lambda: Prompt.categories([" \t"]), '"names" must hold non-blank strings'),
    "text empty": (lambda: Prompt.expression(""), '"text" must be a non-blank string'),
    "text blank": (lambda: Prompt.expression(" \n"), '"text" must be a non-blank string'),
    "text not a string": (lambda: Prompt.expression(["a dog"]), '"text" must be a non-blank string'),
    "two expressions": (lambda: Prompt("expression", ("a dog", "a cat")), '"phrases" must be a tuple of one string'),
    "no expression": (lambda: Prompt("expression", ()), '"phrases" must be a tuple of one string'),
    "kind": (lambda: Prompt("point", ("a",)), '"kind" must be one of categories, expression, template'),
    "template name blank": (lambda: Prompt.template(PICTURE, box=(0, 0, 1, 1), name=""), '"name" must be'),
    "image with names": (lambda: Prompt("categories", ("a",), image=PICTURE), '"image" must be None'),
    "box with text": (lambda: Prompt("expression", ("a",), box=(0, 0, 1, 1)), '"box" must be None'),
    "mask with text": (lambda: Prompt("expression", ("a",), mask=MASK), '"mask" must be None'),
    "no image": (lambda: Prompt.template(None, box=(0, 0, 1, 1)), '"image" must be the reference picture'),
    "image blank": (lambda: Prompt.template(" ", box=(0, 0, 1, 1)), '"image" must be a picture'),
    "image float": (lambda: Prompt.template(PICTURE / 255.0, box=(0, 0, 1, 1)), '"image" must be uint8'),
    "image channels first": (
        lambda: Prompt.template(PICTURE.transpose(2, 0, 1), box=(0, 0, 1, 1)),
        r'"image" .*\(H, W',
    ),
    "tensor channels last": (
        lambda: Prompt.template(torch.from_numpy(PICTURE), box=(0, 0, 1, 1)),
        r'"image" .*\(3, H',
    ),
    "neither": (lambda: Prompt.template(PICTURE), 'Exactly one of "box" and "mask" .* neither'),
    "both": (lambda: Prompt.template(PICTURE, box=(0, 0, 1, 1), mask=MASK), 'Exactly one of "box" and "mask" .* both'),
    "box of three": (lambda: Prompt.template(PICTURE, box=(0, 0, 1)), '"box" must be four numbers'),
    "box of five": (lambda: Prompt.template(PICTURE, box=(0, 0, 1, 1, 1)), '"box" must be four numbers'),
    "box nested": (lambda: Prompt.template(PICTURE, box=[[0, 0, 1, 1]]), '"box" must be four numbers'),
    "box text": (lambda: Prompt.template(PICTURE, box="0123"), '"box" must be four numbers'),
    "box number": (lambda: Prompt.template(PICTURE, box=3), '"box" must be four numbers'),
    "box NaN": (lambda: Prompt.template(PICTURE, box=(0, 0, float("nan"), 1)), '"box" must hold finite numbers'),
    "box infinite": (lambda: Prompt.template(PICTURE, box=(0, 0, 1, float("inf"))), '"box" must hold finite numbers'),
    "box no width": (lambda: Prompt.template(PICTURE, box=(12, 4, 12, 9)), '"box" must have x1 > x0 and y1 > y0'),
    "box no height": (lambda: Prompt.template(PICTURE, box=(1, 4, 12, 4)), '"box" must have x1 > x0 and y1 > y0'),
    "box reversed": (lambda: Prompt.template(PICTURE, box=(9, 4, 2, 8)), '"box" must have x1 > x0 and y1 > y0'),
    "box right of image": (lambda: Prompt.template(PICTURE, box=(40, 0, 50, 9)), '"box" must overlap .* 40 x 30'),
    "box left of image": (lambda: Prompt.template(PICTURE, box=(-9, 0, 0, 9)), '"box" must overlap'),
    "box below image": (lambda: Prompt.template(PICTURE, box=(0, 30, 9, 40)), '"box" must overlap'),
    "box above image": (lambda: Prompt.template(PICTURE, box=(0, -9, 9, 0)), '"box" must overlap'),
    "mask flat": (lambda: Prompt.template(PICTURE, mask=MASK.ravel()), r'"mask" must be \(H, W\)'),
    "two masks": (lambda: Prompt.template(PICTURE, mask=np.stack((MASK, MASK))), r'"mask" must be \(H, W\)'),
    "mask in colour": (lambda: Prompt.template(PICTURE, mask=Image.new("RGB", (40, 30))), r'"mask" must be \(H, W\)'),
    "mask other size": (lambda: Prompt.template(PICTURE, mask=MASK.T), r'"mask" must have the size .* \(30, 40\)'),
    "mask empty": (lambda: Prompt.template(PICTURE, mask=MASK * 0), '"mask" must mark at least one pixel'),
    "mask soft": (lambda: Prompt.template(PICTURE, mask=MASK / 300), '"mask" must hold whole numbers'),
    "mask negative": (lambda: Prompt.template(PICTURE, mask=MASK.astype(int) - 1), '"mask" must hold whole numbers'),
    "mask NaN": (lambda: Prompt.template(PICTURE, mask=MASK * np.nan), '"mask" must hold whole numbers'),
    "mask of strings": (lambda: Prompt.template(PICTURE, mask=MASK.astype(str)), '"mask" must be bool or numeric'),
    "mask as list": (lambda: Prompt.template(PICTURE, mask=MASK.tolist()), '"mask" must be a numpy array'),
}


@pytest.mark.parametrize(("make", "message"), ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_prompts_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_message_of_a_flat_box():
    expected = '"box" must have x1 > x0 and y1 > y0 in pixels of the reference image, got (12, 40, 12, 90).'
    with pytest.raises(ValueError) as error:  # noqa: PT011, the whole text is compared below
        Prompt.template("picture.png", box=(12, 40, 12, 90))
    assert str(error.value) == expected


class TestPathIsCheckedWhenLoaded:
    def test_box(self):
        prompt = Prompt.template("picture.png", box=(100, 100, 120, 120))
        prompt.check_image_size(200, 200)
        with pytest.raises(ValueError, match='"box" must overlap'):
            prompt.check_image_size(HEIGHT, WIDTH)

    def test_mask(self):
        prompt = Prompt.template("picture.png", mask=MASK)
        prompt.check_image_size(HEIGHT, WIDTH)
        with pytest.raises(ValueError, match='"mask" must have the size'):
            prompt.check_image_size(WIDTH, HEIGHT)

    def test_other_kinds_have_nothing_to_check(self):
        Prompt.expression("a dog").check_image_size(1, 1)


class TestFromValue:
    def test_plain_values(self):
        assert Prompt.from_value(["cat", "dog"]) == Prompt.categories(["cat", "dog"])
        assert Prompt.from_value(("cat",)) == Prompt.categories(["cat"])
        assert Prompt.from_value("cat, dog") == Prompt.expression("cat, dog")
        assert Prompt.from_value({"image": PICTURE, "box": (0, 0, 1, 1)}) == Prompt.template(PICTURE, box=(0, 0, 1, 1))
        by_mask = Prompt.from_value({"image": PICTURE, "mask": MASK, "name": "dog"})
        assert by_mask == Prompt.template(PICTURE, mask=MASK, name="dog")

    def test_prompt_passes_through(self):
        prompt = Prompt.expression("a dog")
        assert Prompt.from_value(prompt) is prompt

    def test_prompt_of_another_copy_of_the_class(self):
        """As with remote code: the same file loaded under another name."""
        spec = importlib.util.spec_from_file_location(
            "uninext_hf.prompt_uninext_copy", uninext_hf.prompt_uninext.__file__
        )
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        foreign = copy.Prompt.categories(["cat"])
        assert not isinstance(foreign, Prompt)
        assert Prompt.from_value(foreign) is foreign
        assert Prompt(foreign.kind, foreign.phrases) == Prompt.categories(["cat"])

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, '"prompt" must be a Prompt, .* got NoneType'),
            (3, '"prompt" must be a Prompt, a string .*comma-separated.* a list of names .*, got int 3'),
            ([1, 2], '"prompt" must be'),
            ((0, 0, 1, 1), '"prompt" must be'),
            (["cat", None], '"prompt" must be'),
            ([], '"names"'),
            ("", '"text"'),
            ({}, '"prompt" given as a dict must have "image"'),
            ({"box": (0, 0, 1, 1)}, '"prompt" given as a dict must have "image"'),
            ({"image": PICTURE, "boxes": [(0, 0, 1, 1)]}, "got the keys image, boxes"),
            ({"image": PICTURE}, 'Exactly one of "box" and "mask"'),
        ],
    )
    def test_errors(self, value, message):
        with pytest.raises(ValueError, match=message):
            Prompt.from_value(value)


class TestEquality:
    def test_by_content(self):
        assert Prompt.categories(["a", "b"]) == Prompt.categories(("a", "b"))
        assert hash(Prompt.categories(["a", "b"])) == hash(Prompt.categories(("a", "b")))
        assert Prompt.categories(["a", "b"]) != Prompt.categories(["b", "a"])
        assert Prompt.categories(["a"]) != Prompt.expression("a")
        assert Prompt.expression("a") != "a"

    def test_pictures_by_identity_and_paths_by_text(self):
        box = (0, 0, 1, 1)
        assert Prompt.template(PICTURE, box=box) == Prompt.template(PICTURE, box=list(box))
        assert Prompt.template(PICTURE, box=box) != Prompt.template(PICTURE.copy(), box=box)
        assert Prompt.template(PICTURE, box=box) != Prompt.template(PICTURE, box=(0, 0, 1, 2))
        assert Prompt.template("".join(["a", ".png"]), box=box) == Prompt.template("a.png", box=box)

    def test_masks_by_content(self):
        other = MASK.copy()
        other[0, 0] = 1
        prompt = Prompt.template(PICTURE, mask=MASK)
        assert prompt == Prompt.template(PICTURE, mask=MASK > 0)
        assert hash(prompt) == hash(Prompt.template(PICTURE, mask=MASK > 0))
        assert prompt != Prompt.template(PICTURE, mask=other)
        assert prompt != Prompt.template(PICTURE, box=(0, 0, 1, 1))

    def test_pickle(self):
        prompt = Prompt.template("a.png", mask=MASK)
        assert pickle.loads(pickle.dumps(prompt)) == prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt.categories(["cat", "wine glass"]), "categories: cat, wine glass"),
        (Prompt.categories([f"n{i}" for i in range(80)]), "categories: n0, n1, n2, n3, n4 and 75 more"),
        (Prompt.expression("the dog"), "expression: the dog"),
        (Prompt.expression("x" * 200), "expression: " + "x" * 79 + "…"),
        (Prompt.template(PICTURE, box=(1, 2.5, 3, 4)), "template: target, box (1, 2.5, 3, 4)"),
        (Prompt.template(PICTURE, mask=MASK, name="dog"), "template: dog, mask of 15 pixels"),
    ],
)
def test_describe(prompt, expected):
    assert prompt.describe() == expected


def test_repr_does_not_print_the_picture():
    assert len(repr(Prompt.template(PICTURE, mask=MASK))) < 150


class TestReferences:
    FIRST = Prompt.template(np.zeros((9, 9, 3), np.uint8), box=(0, 0, 5, 5), name="the dog")
    SECOND = {"image": np.zeros((4, 4, 3), np.uint8), "mask": np.ones((4, 4), np.uint8)}

    def test_one_prompt_of_several(self):
        prompt = Prompt.templates([self.FIRST, self.SECOND])
        assert prompt.kind == "template"
        assert prompt.phrases == ("the dog",)
        assert [one.box for one in prompt.references] == [(0, 0, 5, 5), None]
        assert [len(one.references) for one in prompt.references] == [1, 1]
        assert prompt.references[0] == self.FIRST
        assert prompt.describe() == "template: the dog, box (0, 0, 5, 5) and 1 more references"
        assert Prompt.from_value({"references": [self.FIRST, self.SECOND], "name": "rex"}).phrases == ("rex",)
        assert Prompt.templates([prompt, self.FIRST]).references[1:] == (*prompt.further, self.FIRST)
        assert Prompt.templates([self.FIRST]) == self.FIRST
        assert Prompt.expression("a dog").references == ()

    def test_equality(self):
        one, other = Prompt.templates([self.FIRST, self.SECOND]), Prompt.templates([self.FIRST, self.FIRST])
        assert one == Prompt.templates([self.FIRST, self.SECOND])
        assert hash(one) == hash(Prompt.templates([self.FIRST, self.SECOND]))
        assert one != other
        assert one != self.FIRST

    @pytest.mark.parametrize(
        ("value", "fragment"),
        [
            ([], '"references" must be a list of one or more templates, got'),
            (FIRST, '"references" must be a list of one or more templates, got'),
            ([FIRST, "a dog"], '"references" must hold templates only, got a prompt of kind expression at position 1'),
            (
                [FIRST, {"image": 3, "box": (0, 0, 1, 1)}],
                '"references" holds an unusable value at position 1: "image"',
            ),
        ],
    )
    def test_errors(self, value, fragment):
        with pytest.raises(ValueError, match="references") as error:
            Prompt.templates(value)
        assert fragment in str(error.value)
