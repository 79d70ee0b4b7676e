"""UninextProcessor: pictures and prompts -> network input; network output -> Instances.

Sources: paper section 3.1 (prompts); official `data/coco_dataset_mapper_uni.py` 36-73, 400-401, 446-450, 716-750
(captions, cleaning, token positions) and `uninext_img.py` 367-485 (results).
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .box_ops_uninext import box_xyxy_to_cxcywh, scale_boxes
from .configuration_uninext import UninextConfig
from .image_processing_uninext import (
    Predictions,
    UninextImageProcessor,
    boxes_to_pixels,
    check_target_sizes,
    finite_field,
    load_pictures,
    select_instances,
)
from .instances_uninext import Instances
from .mask_head_uninext import dynamic_mask_logits, masks_at_size
from .prompt_uninext import Picture, Prompt
from .task_uninext import OutputKind, PromptKind

PromptValue = Prompt | str | Sequence[str] | Mapping[str, object]
"""What can stand for a prompt, see `Prompt.from_value`."""

_SEPARATOR = ". "
_CACHED_TEXTS = 64
_DELETED = str.maketrans(dict.fromkeys(".,'!?\"()*#:;", "") | dict.fromkeys("-/", " "))
_PACKAGED_VOCABULARY = Path(__file__).parent / "assets" / "vocab.txt"


def clean_name(name: str) -> str:
    """A category name as it is written into the caption.

    Everything from the first opening to the last closing round bracket goes, underscores become blanks, and doubled
    blanks are halved once, so a blank may remain at the end. A name of which nothing is left stays as it was.

    Source: official `data/coco_dataset_mapper_uni.py` 446-450.
    """
    cleaned = re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")
    return cleaned if cleaned.strip() else name


def clean_expression(text: str) -> str:
    """An expression as the network reads it: lower case, without most punctuation, `-` and `/` as blanks.

    One of which nothing is left stays as it was. Source: official `data/coco_dataset_mapper_uni.py` 400-401.
    """
    cleaned = text.lower().translate(_DELETED)
    return cleaned if cleaned.strip() else text


class TextChunk(NamedTuple):
    """One prompt row's text.

    Args:
        input_ids: L tokens, special ones included.
        labels: K indices of the chunk's names in the caller's list.
        label_map: (K, L) bool, which tokens belong to which name. For a single target (1, L) with only the first
            token, since its pooled score stands in that column.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    label_map: Tensor


@dataclass(frozen=True, eq=False)
class PromptRow:
    """What one row of the network's output means. Rows of the same prompt and picture are chunks of one vocabulary.

    Args:
        prompt: index into the caller's prompts.
        picture: index into the caller's pictures.
        kind: of the prompt.
        phrases: all texts of the prompt, as the caller wrote them.
        input_ids: its tokens without padding.
        labels: K indices into `phrases`, the names that this row looks for.
        label_map: (K, L) bool on the CPU, which tokens of the padded row belong to which of these names.
    """

    prompt: int
    picture: int
    kind: PromptKind
    phrases: tuple[str, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    label_map: Tensor


class UninextInputs(BatchFeature):
    """What the processor returns. As a mapping it holds what the network takes, so `model(**inputs)` works.

    What post-processing needs is kept beside the mapping, on the CPU: `rows`, one `PromptRow` for each row, and
    `label_map`, the list of their (K, L) bool tensors. Both are attributes and can also be read as
    `inputs["label_map"]`, but they are not among the keys. `to` moves the tensors and leaves these where they are.

    Args:
        data: name -> tensor.
        rows: the meaning of each prompt row.
    """

    def __init__(self, data: dict | None = None, rows: Sequence[PromptRow] = ()):
        super().__init__(data)
        self.rows = tuple(rows)

    @property
    def label_map(self) -> list[Tensor]:
        """For each row, which tokens belong to which name, (K, L) bool."""
        return [row.label_map for row in self.rows]

    def __getitem__(self, item: str):
        if item in ("rows", "label_map"):
            return getattr(self, item)
        return super().__getitem__(item)

    def to(self, *args, **kwargs) -> "UninextInputs":
        """Move the tensors, `labels` included; casts only floating-point ones. Returns itself."""
        labels = self.data.pop("labels", None)
        super().to(*args, **kwargs)
        if labels is not None:
            self.data["labels"] = [dict(BatchFeature(label).to(*args, **kwargs)) for label in labels]
        return self

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "rows": self.rows}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.rows = state["rows"]


class UninextProcessor(ProcessorMixin):
    """Pictures and prompts to tensors, and the network's output back to Instances.

    Args:
        image_processor: a `UninextImageProcessor`.
        tokenizer: the tokenizer of the text encoder; must give character offsets (all "fast" ones do).
        max_prompt_length: most tokens of a prompt row, special ones included. The released models were trained with
            256. Longer vocabularies are split, longer expressions refused.

    Raises:
        ValueError: a tokenizer without offsets, or a length that leaves no room for a name.
    """

    def __init__(
        self,
        image_processor: UninextImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int = 256,
    ):
        super().__init__(image_processor, tokenizer)
        if not tokenizer.is_fast:
            raise ValueError(
                f'"tokenizer" must give character offsets (a fast tokenizer), got {type(tokenizer).__name__}.'
            )
        if not isinstance(max_prompt_length, int) or max_prompt_length < 3:
            raise ValueError(f'"max_prompt_length" must be an integer of at least 3, got {max_prompt_length!r}.')
        self.max_prompt_length = max_prompt_length
        self._texts: OrderedDict[tuple, tuple[TextChunk, ...]] = OrderedDict()

    @classmethod
    def for_model(cls, config: UninextConfig | None = None) -> "UninextProcessor":
        """The processor of a model with BERT's uncased vocabulary, without downloading anything.

        Args:
            config: of the model; decides about padding. `None` for the default model (ResNet-50).

        Returns:
            The processor; pictures are padded to multiples of 32 unless the backbone is a ResNet.
        """
        backbone = "resnet" if config is None else config.backbone_config.model_type
        # Official: inference pads to the divisibility the backbone declares, 0 for ResNet (models/ddetrs_dn.py:345).
        image_processor = UninextImageProcessor(size_divisor=None if backbone == "resnet" else 32)
        tokenizer = BertTokenizer(
            vocab=str(_PACKAGED_VOCABULARY),
            do_lower_case=True,
            model_max_length=512,
            model_input_names=["input_ids", "attention_mask"],
        )
        return cls(image_processor, tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """The keys that `__call__` can return."""
        return [
            *("pixel_values", "pixel_mask", "input_ids", "attention_mask"),
            *("template_values", "template_mask", "pool_prompt", "image_index"),
        ]

    def __call__(
        self,
        images: Picture | Sequence[Picture] | Tensor | None = None,
        prompts: PromptValue | Sequence[PromptValue] | None = None,
        annotations: Mapping | Sequence[Mapping] | None = None,
        image_index: Sequence[int] | Tensor | None = None,
        return_tensors: Literal["pt"] | None = "pt",
        pad_to: int | None = None,
        text: PromptValue | Sequence[PromptValue] | None = None,
        **kwargs,
    ) -> UninextInputs:
        """Prepare pictures and prompts for the network.

        A flat list of strings is *one* prompt, a list of category names. A list of anything else is several prompts.
        One prompt is used for every picture; as many prompts as pictures are taken in pairs; several prompts for one
        picture are all asked about it. For other combinations give `image_index`.

        A vocabulary of more than `max_prompt_length` tokens is split: in the caller's order, each chunk takes names
        as long as they fit. Every chunk is one more prompt row of the same picture; the results are merged again by
        `post_process_instances`. Labels always are indices into the caller's list.

        Args:
            images: one picture or several, see `load_picture`; `None` to encode prompts only.
            prompts: one prompt or several, see `Prompt.from_value`; `None` to prepare pictures only.
            annotations: for training, one mapping for each picture: "boxes" (n, 4) as (x0, y0, x1, y1) in its pixels,
                "class_labels" (n,) indices into the names (may be absent for a single target), optionally "masks"
                (n, h, w); further keys are handed on.
            image_index: for each prompt, the picture it is asked about.
            return_tensors: "pt"; there are no other frameworks.
            pad_to: length of the text tensors; `None` for the longest prompt of the batch.
            text: transformers' name for `prompts`.
            kwargs: of the image processor (`do_resize=False`, `size=...`); they apply to reference pictures too.

        Returns:
            P prompt rows (prompts in order, each with its chunks), B pictures:
            "pixel_values" (B, 3, H, W) float32, "pixel_mask" (B, H, W) int64;
            "input_ids", "attention_mask" (P, L) int64, if there is text (reference rows hold one valid token);
            "template_values" (P, 4, S, S) float32, "template_mask" (P, S, S) bool, if there are references (text rows
            hold zeros; with several references for a target (P, T, 4, S, S) and (P, T, S, S), zeros where a row has
            fewer); "pool_prompt" (P,) bool, True for an expression or reference;
            "image_index" (P,) int64, unless it would be 0, 1, ... B - 1; and "labels" with `annotations`, a list of P
            dictionaries with "boxes" (n, 4) as (cx, cy, w, h) relative to the un-padded input, "class_labels" (n,),
            "positive_map" (n, L) bool for names, "masks" (n, H, W) bool in the padded input.

        Raises:
            ValueError: pictures or prompts that cannot be used, or do not fit together; the message names them.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f'"return_tensors" must be "pt", got {return_tensors!r}.')
        if text is not None and prompts is not None:
            raise ValueError('Only one of "prompts" and "text" must be given: they are two names of one argument.')
        prompts = text if prompts is None else prompts
        if images is None and prompts is None:
            raise ValueError('At least one of "images" and "prompts" must be given, got neither.')
        data, rows, pictures = {}, [], []
        if images is not None:
            pictures = load_pictures(images, input_data_format=kwargs.pop("input_data_format", None))
            data |= self.image_processor(pictures, return_tensors="pt", **kwargs)
        if prompts is not None:
            prompts = as_prompts(prompts)
            pairs = _pair(len(prompts), len(pictures) if images is not None else None, image_index)
            rows = self._rows(prompts, pairs, pad_to)
            data |= self._text_tensors(rows)
            data |= self._template_tensors(prompts, rows, kwargs)
            data["pool_prompt"] = torch.tensor([row.kind.single_target for row in rows])
            index = [row.picture for row in rows]
            if index != list(range(len(pictures) or len(rows))):
                data["image_index"] = torch.tensor(index)
        if annotations is not None:
            data["labels"] = _training_labels(annotations, rows, pictures, data)
        return UninextInputs(data, rows)

    # Prompts

    def encode_text(self, kind: PromptKind | str, phrases: Sequence[str]) -> tuple[TextChunk, ...]:
        """The text of a prompt as one or more rows of tokens. The last few results are kept.

        Args:
            kind: of the prompt; a template gets a single token that carries nothing.
            phrases: the names, or the one expression.

        Returns:
            One chunk, or several for names that do not fit into one row.

        Raises:
            ValueError: an expression or a single name is too long, or a name without any token.
        """
        kind = PromptKind(kind)
        key = (kind, tuple(phrases) if kind != PromptKind.TEMPLATE else (), self.max_prompt_length, id(self.tokenizer))
        if key not in self._texts:
            if kind == PromptKind.CATEGORIES:
                chunks = self._category_chunks(phrases)
            elif kind == PromptKind.EXPRESSION:
                chunks = (self._expression_chunk(phrases[0]),)
            else:
                chunks = (TextChunk((self._blank_token,), (0,), torch.ones(1, 1, dtype=torch.bool)),)
            self._texts[key] = chunks
            if len(self._texts) > _CACHED_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    @property
    def _blank_token(self) -> int:
        """A token for rows without text; the network never looks at it."""
        candidates = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, 0)
        return next(token for token in candidates if token is not None)

    def _tokenize(self, text: str | list[str], argument: str, **kwargs) -> Mapping[str, list]:
        try:
            # A name such as "[SEP]" is text, not the special token.
            return self.tokenizer(text, truncation=False, split_special_tokens=True, verbose=False, **kwargs)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f'"{argument}" must be valid Unicode text ({error}).') from error

    def _caption_chunk(self, names: Sequence[str], labels: Sequence[int]) -> TextChunk:
        """All names in one caption, "a. b. c", and the tokens that overlap each name's characters."""
        ends = torch.tensor([len(name) + len(_SEPARATOR) for name in names]).cumsum(0) - len(_SEPARATOR)
        starts = ends - torch.tensor([len(name) for name in names])
        encoded = self._tokenize(
            _SEPARATOR.join(names), "names", return_offsets_mapping=True, return_special_tokens_mask=True
        )
        first, last = torch.tensor(encoded["offset_mapping"]).unbind(-1)
        is_text = (torch.tensor(encoded["special_tokens_mask"]) == 0) & (last > first)
        label_map = (first < ends[:, None]) & (last > starts[:, None]) & is_text
        return TextChunk(tuple(encoded["input_ids"]), tuple(labels), label_map)

    def _category_chunks(self, names: Sequence[str]) -> tuple[TextChunk, ...]:
        cleaned, limit = [clean_name(name) for name in names], self.max_prompt_length
        chunks = [self._caption_chunk(cleaned, range(len(names)))]
        if len(chunks[0].input_ids) > limit:
            chunks = [self._caption_chunk([cleaned[k] for k in chunk], chunk) for chunk in self._split(names, cleaned)]
        for chunk in chunks:
            for label, tokens in zip(chunk.labels, chunk.label_map, strict=True):
                if not tokens.any():
                    raise ValueError(
                        f'"names" must have a token each, got none for {names[label]!r} at position {label}.'
                    )
        return tuple(chunks)

    def _split(self, names: Sequence[str], cleaned: Sequence[str]) -> list[list[int]]:
        """Indices of the names of each chunk: greedy, in the caller's order."""
        special = len(self._tokenize("", "names")["input_ids"])
        separator = len(self._tokenize(_SEPARATOR, "names", add_special_tokens=False)["input_ids"])
        tokens = self._tokenize(list(cleaned), "names", add_special_tokens=False)["input_ids"]
        chunks, used = [[]], special
        for label, count in enumerate(map(len, tokens)):
            if special + count > self.max_prompt_length:
                raise ValueError(
                    f'"names" must fit into "max_prompt_length" = {self.max_prompt_length} tokens each, got '
                    f"{special + count} (with {special} special tokens) for {names[label][:60]!r} at position {label}."
                )
            needed = count + (separator if chunks[-1] else 0)
            if used + needed > self.max_prompt_length:
                chunks.append([])
                used, needed = special, count
            chunks[-1].append(label)
            used += needed
        return chunks

    def _expression_chunk(self, expression: str) -> TextChunk:
        encoded = self._tokenize(clean_expression(expression), "expression", return_special_tokens_mask=True)
        tokens, count = encoded["input_ids"], len(encoded["input_ids"])
        if all(encoded["special_tokens_mask"]):
            raise ValueError(f'"expression" must have at least one token, got none for {expression!r}.')
        if count > self.max_prompt_length:
            raise ValueError(
                f'"expression" must have at most {self.max_prompt_length} tokens ("max_prompt_length", special tokens '
                f"included), got {count}: {expression[:60]!r}..."
            )
        return TextChunk(tuple(tokens), (0,), torch.arange(count)[None] == 0)

    def _rows(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[int, int]], pad_to: int | None = None
    ) -> list[PromptRow]:
        """The prompt rows of (prompt, picture) pairs, in their order, with label maps of the padded length."""
        found = [
            (index, picture, chunk)
            for index, picture in pairs
            for chunk in self.encode_text(prompts[index].kind, prompts[index].phrases)
        ]
        longest = length = max(len(chunk.input_ids) for _, _, chunk in found)
        if pad_to is not None and any(prompt.kind != PromptKind.TEMPLATE for prompt in prompts):
            if pad_to < longest:
                raise ValueError(
                    f'"pad_to" must be at least the {longest} tokens of the longest prompt, got {pad_to}.'
                )
            length = pad_to
        rows = []
        for index, picture, (tokens, labels, label_map) in found:
            label_map = F.pad(label_map, (0, length - len(tokens)))
            rows.append(
                PromptRow(index, picture, prompts[index].kind, prompts[index].phrases, tokens, labels, label_map)
            )
        return rows

    def _text_tensors(self, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
        if all(row.kind == PromptKind.TEMPLATE for row in rows):
            return {}
        input_ids = torch.full((len(rows), rows[0].label_map.shape[1]), self.tokenizer.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
            attention_mask[index, : len(row.input_ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _template_tensors(
        self, prompts: Sequence[Prompt], rows: Sequence[PromptRow], image_kwargs: Mapping[str, object]
    ) -> dict[str, Tensor]:
        templates = {
            index: self._references(prompt, image_kwargs)
            for index, prompt in enumerate(prompts)
            if prompt.kind == PromptKind.TEMPLATE
        }
        if not templates:
            return {}
        blank = {name: torch.zeros_like(value) for name, value in next(iter(templates.values()))[0].items()}
        most = max(map(len, templates.values()))
        data = {}
        for name, empty in blank.items():
            slots = [[one[name] for one in templates.get(row.prompt, [])] for row in rows]
            stacked = torch.stack([torch.stack(found + [empty] * (most - len(found))) for found in slots])
            data[name] = stacked if most > 1 else stacked[:, 0]
        return data

    def _references(self, prompt: Prompt, image_kwargs: Mapping[str, object]) -> list[dict[str, Tensor]]:
        """The crop of each reference of a template."""
        crops = []
        for index, one in enumerate(prompt.references):
            try:
                crops.append(self.image_processor.prepare_template(one.image, one.box, one.mask, **image_kwargs))
            except ValueError as error:
                if not prompt.further:
                    raise
                raise ValueError(f'"references" holds an unusable value at position {index}: {error}') from error
        return crops

    # Results

    def post_process_instances(
        self,
        outputs: Mapping[str, Tensor],
        prompts: PromptValue | Sequence[PromptValue] | None = None,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        output: OutputKind | str = OutputKind.MASK,
        threshold: float = 0.0,
        top_k: int | None = None,
        nms_iou: float | None = 0.7,
        mask_threshold: float = 0.5,
        use_iou_score: bool = True,
        clip: bool = True,
        inputs: UninextInputs | None = None,
    ) -> list[Instances]:
        """What was found, by the official rules.

        The score of a query for a name is the mean of its logits over the name's tokens, made a probability, in
        geometric mean with the predicted box quality. Of queries with the same best name that overlap, only the best
        stays. Then the best (query, name) pairs are taken: an object may come several times with different names.
        Masks are decoded only for what is left.

        Args:
            outputs: a `UninextOutput` or a mapping with its fields, P rows.
            prompts: what `__call__` was given; enough unless it was also given `image_index`.
            target_sizes: (height, width) of the original pictures in pixels: one pair for each picture, for each
                result, or for all. `None`: results are in network input pixels.
            output: "mask", or "box" for no masks.
            threshold: rows with a lower score are left out, in [0, 1]; one that is equal stays.
            top_k: how many rows at most; `None` for 100 with names and 1 with an expression or reference.
            nms_iou: IoU above which the worse of two boxes goes, in [0, 1]; `None` for no suppression.
            mask_threshold: probability above which a pixel belongs to a mask, in (0, 1).
            use_iou_score: whether the predicted box quality enters the score.
            clip: cut boxes off at the border of the picture and leave out those without area, as the official image
                model does. Without it boxes may reach over the border, as in the official video model.
            inputs: what `__call__` returned, instead of `prompts`.

        Returns:
            One result for each pair of prompt and picture, in the order of `__call__`: prompts in the caller's order,
            or the pictures for a single prompt. Rows are sorted by score; `labels` are indices into the names;
            `embeddings` are there if the model has a re-identification head.

        Raises:
            ValueError: an argument is out of its range, `prompts` do not fit `outputs`, or `outputs` hold NaN.

        Source: official `uninext_img.py` 367-485, `models/ddetrs_dn.py` 1278-1324.
        """
        with_masks = _check_choices(output, threshold, top_k, nms_iou, mask_threshold) == OutputKind.MASK
        fields = Predictions.from_outputs(outputs)
        if (prompts is None) == (inputs is None):
            given = "neither" if prompts is None else "both"
            raise ValueError(f'Exactly one of "prompts" and "inputs" must be given, got {given}.')
        rows = self._rows_of(prompts, len(fields.logits)) if inputs is None else inputs.rows
        _check_rows(rows, fields.logits, "prompts" if inputs is None else "inputs")
        groups = [
            [index for index, _ in group]
            for _, group in groupby(enumerate(rows), lambda item: (item[1].prompt, item[1].picture))
        ]
        sizes = _sizes_of_results(target_sizes, [rows[group[0]].picture for group in groups])
        masks = MaskFields.from_outputs(outputs) if with_masks else None
        embeddings = finite_field(outputs, "query_embeddings") if outputs.get("query_embeddings") is not None else None
        results = []
        for group, size in zip(groups, sizes, strict=True):
            first = rows[group[0]]
            default = 1 if first.kind.single_target else 100
            found = select_instances(
                [fields.row(row) for row in group],
                [rows[row].label_map for row in group],
                [rows[row].labels for row in group],
                threshold=threshold,
                top_k=default if top_k is None else top_k,
                nms_iou=nms_iou,
                use_iou_score=use_iou_score,
            )
            input_size = fields.input_size(group[0])
            boxes, has_area = boxes_to_pixels(found.boxes, input_size, size, clip)
            queries = found.queries[has_area]
            results.append(
                Instances(
                    image_size=size or input_size,
                    phrases=list(first.phrases),
                    scores=found.scores[has_area],
                    labels=found.labels[has_area],
                    boxes=boxes[has_area],
                    masks=masks.decode(group, queries, input_size, size, mask_threshold) if masks else None,
                    embeddings=None if embeddings is None else embeddings[group].flatten(0, 1)[queries],
                )
            )
        return results

    def _rows_of(self, prompts: PromptValue | Sequence[PromptValue], count: int) -> list[PromptRow]:
        """The `count` rows that `__call__` made of prompts without `image_index`."""
        prompts = as_prompts(prompts)
        chunks = [len(self.encode_text(prompt.kind, prompt.phrases)) for prompt in prompts]
        pictures = range(count // chunks[0]) if len(prompts) == 1 else range(len(prompts))
        pairs = [(0 if len(prompts) == 1 else picture, picture) for picture in pictures]
        return self._rows(prompts, pairs) if pairs else []

    def post_process_object_detection(
        self,
        outputs: Mapping[str, Tensor],
        threshold: float = 0.5,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        prompts: PromptValue | Sequence[PromptValue] | None = None,
        inputs: UninextInputs | None = None,
        **kwargs,
    ) -> list[dict[str, Tensor | list[str]]]:
        """Boxes, in the form transformers uses; see `post_process_instances` for the arguments.

        Returns:
            For each result "scores" (N,), "labels" (N,), "boxes" (N, 4) as (x0, y0, x1, y1) in pixels, and
            "text_labels", N strings.
        """
        kwargs = {"output": OutputKind.BOX, **kwargs}
        return self._as_dicts(
            self.post_process_instances(outputs, prompts, target_sizes, threshold=threshold, inputs=inputs, **kwargs)
        )

    def post_process_instance_segmentation(
        self,
        outputs: Mapping[str, Tensor],
        threshold: float = 0.5,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        prompts: PromptValue | Sequence[PromptValue] | None = None,
        inputs: UninextInputs | None = None,
        **kwargs,
    ) -> list[dict[str, Tensor | list[str]]]:
        """As `post_process_object_detection`, with "masks" (N, height, width) bool."""
        kwargs = {"output": OutputKind.MASK, **kwargs}
        return self.post_process_object_detection(outputs, threshold, target_sizes, prompts, inputs, **kwargs)

    def post_process_grounded_object_detection(
        self,
        outputs: Mapping[str, Tensor],
        input_ids: Tensor | None = None,
        threshold: float = 0.25,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        text_labels: PromptValue | Sequence[PromptValue] | None = None,
        prompts: PromptValue | Sequence[PromptValue] | None = None,
        inputs: UninextInputs | None = None,
        **kwargs,
    ) -> list[dict[str, Tensor | list[str]]]:
        """As `post_process_object_detection`, under the name and arguments of transformers' grounding models.

        Args:
            outputs: see `post_process_instances`.
            input_ids: (P, L) captions of names, "a. b. c"; only read when nothing better is given. Names come back as
                the tokenizer spells them.
            threshold: see `post_process_instances`.
            target_sizes: see `post_process_instances`.
            text_labels: transformers' name for `prompts`.
            prompts: see `post_process_instances`.
            inputs: see `post_process_instances`.
            kwargs: further arguments of `post_process_instances`.

        Returns:
            See `post_process_object_detection`.
        """
        prompts = text_labels if prompts is None else prompts
        if prompts is None and inputs is None:
            if input_ids is None:
                raise ValueError('One of "prompts", "text_labels", "inputs" and "input_ids" must be given, got none.')
            prompts = self._names_of(input_ids)
        return self.post_process_object_detection(outputs, threshold, target_sizes, prompts, inputs, **kwargs)

    def _names_of(self, input_ids: Tensor) -> list[Prompt]:
        """The names in captions, found at the separators."""
        prompts = []
        for tokens in input_ids.tolist():
            names = self.tokenizer.decode(tokens, skip_special_tokens=True).split(_SEPARATOR.strip())
            prompt = Prompt.categories([name.strip() for name in names])
            chunks = self.encode_text(prompt.kind, prompt.phrases)
            if list(chunks[0].input_ids) != tokens[: len(chunks[0].input_ids)]:
                raise ValueError(
                    '"input_ids" must be a caption of names "a. b. c" whose names can be read back from the tokens; '
                    'give "prompts" instead.'
                )
            prompts.append(prompt)
        return prompts

    @staticmethod
    def _as_dicts(results: Sequence[Instances]) -> list[dict[str, Tensor | list[str]]]:
        names = ("scores", "labels", "boxes", "masks", "text_labels")
        return [{name: result[name] for name in names if name in result} for result in results]


class MaskFields(NamedTuple):
    """The fields of `UninextOutput` that masks are made of, checked and in float32; P rows, see there."""

    mask_kernels: Tensor
    mask_features: Tensor
    reference_points: Tensor

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, Tensor]) -> "MaskFields":
        """Read and check the fields; ValueError if one is missing or holds NaN."""
        return cls(*(finite_field(outputs, name) for name in cls._fields))

    def decode(
        self,
        rows: Sequence[int],
        queries: Tensor,
        input_size: tuple[int, int],
        target_size: tuple[int, int] | None,
        threshold: float,
    ) -> Tensor:
        """Masks of some queries; one that is asked for several times is decoded once.

        Args:
            rows: the rows of one result.
            queries: (N,) indices into the queries of all these rows, one row after the other.
            input_size: un-padded (height, width) of the network input, pixels.
            target_size: (height, width) of the masks in pixels; `None` for the network input.
            threshold: probability above which a pixel belongs to the mask.

        Returns:
            (N, height, width) bool.
        """
        height, width = input_size
        count = self.mask_kernels.shape[1]
        needed, position = queries.unique(return_inverse=True)
        masks = [self.mask_kernels.new_zeros((0, *(target_size or input_size)), dtype=torch.bool)]
        for place, row in enumerate(rows):
            local = needed[needed // count == place] - place * count
            if len(local) == 0:
                continue
            origins = self.reference_points[row, local] * self.reference_points.new_tensor((width, height))
            logits = dynamic_mask_logits(self.mask_kernels[row, local], self.mask_features[row], origins)
            masks.append(masks_at_size(logits, input_size, target_size, threshold))
        return torch.cat(masks)[position]


# Checks and arrangement


def as_prompts(value: PromptValue | Sequence[PromptValue]) -> list[Prompt]:
    """One prompt or several, as a list.

    Args:
        value: a flat list of strings is one prompt (names); a list of anything else is several.

    Returns:
        One prompt or more.

    Raises:
        ValueError: something that cannot stand for a prompt; the message says which one of several.
    """
    is_several = isinstance(value, list | tuple) and not all(isinstance(item, str) for item in value)
    if not is_several:
        return [Prompt.from_value(value)]
    prompts = []
    for index, item in enumerate(value):
        try:
            prompts.append(Prompt.from_value(item))
        except ValueError as error:
            raise ValueError(f'"prompts" holds an unusable value at position {index}: {error}') from error
    return prompts


def _pair(
    num_prompts: int, num_pictures: int | None, image_index: Sequence[int] | Tensor | None
) -> list[tuple[int, int]]:
    """(prompt, picture) pairs; the number of pictures is unknown when only prompts are encoded."""
    if image_index is not None:
        index = image_index.tolist() if hasattr(image_index, "tolist") else list(image_index)
        limit = float("inf") if num_pictures is None else num_pictures
        if len(index) != num_prompts or not all(isinstance(i, int) and 0 <= i < limit for i in index):
            raise ValueError(
                f'"image_index" must give one picture (0 to {"..." if num_pictures is None else num_pictures - 1}) '
                f"for each of {num_prompts} prompts, got {index}."
            )
        return list(enumerate(index))
    if num_pictures is None or num_prompts == num_pictures:
        return [(index, index) for index in range(num_prompts)]
    if num_prompts == 1:
        return [(0, picture) for picture in range(num_pictures)]
    if num_pictures == 1:
        return [(prompt, 0) for prompt in range(num_prompts)]
    raise ValueError(
        f'"prompts" must be one, or as many as "images", or all for one picture; got {num_prompts} prompts and '
        f'{num_pictures} pictures. Give "image_index" for other combinations.'
    )


def _check_choices(
    output: OutputKind | str, threshold: float, top_k: int | None, nms_iou: float | None, mask_threshold: float
) -> OutputKind:
    """Check the ranges of the arguments of post-processing; returns the kind of output."""
    if output not in tuple(OutputKind):
        raise ValueError(f'"output" must be one of {", ".join(OutputKind)}, got {output!r}.')
    for name, value in (("threshold", threshold), ("nms_iou", nms_iou)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f'"{name}" must be in [0, 1], got {value!r}.')
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f'"top_k" must be a positive integer or None, got {top_k!r}.')
    if not 0 < mask_threshold < 1:
        raise ValueError(f'"mask_threshold" must be in (0, 1), got {mask_threshold!r}.')
    return OutputKind(output)


def _check_rows(rows: Sequence[PromptRow], logits: Tensor, argument: str) -> None:
    longest = max((row.label_map.shape[1] for row in rows), default=0)
    if len(rows) != logits.shape[0] or longest > logits.shape[2]:
        raise ValueError(
            f'"{argument}" must be those that "outputs" were made from: they have {len(rows)} rows of up to {longest} '
            f"tokens, outputs have {logits.shape[0]} rows of {logits.shape[2]}."
        )


def _sizes_of_results(
    target_sizes: Sequence[tuple[int, int]] | Tensor | None, pictures: Sequence[int]
) -> list[tuple[int, int] | None]:
    """The target size of each result, given the picture that each result is of."""
    if target_sizes is None:
        return [None] * len(pictures)
    count = max(pictures) + 1
    if len(target_sizes) == count:
        sizes = check_target_sizes(target_sizes, count)
        return [sizes[picture] for picture in pictures]
    return check_target_sizes(target_sizes, len(pictures))


def _training_labels(
    annotations: Mapping | Sequence[Mapping],
    rows: Sequence[PromptRow],
    pictures: Sequence[Tensor],
    data: Mapping[str, Tensor],
) -> list[dict[str, Tensor]]:
    """Annotations in pixels of the original pictures as the network's training labels, one for each prompt row."""
    annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
    if not rows or len(annotations) != len(pictures):
        raise ValueError(
            f'"annotations" must be given with "prompts", one for each picture; got {len(annotations)} annotations, '
            f"{len(pictures)} pictures and {len(rows)} prompt rows."
        )
    if len({(row.prompt, row.picture) for row in rows}) != len(rows):
        raise ValueError('"prompts" must fit into one row each when "annotations" are given: draw fewer names.')
    labels = []
    for row in rows:
        annotation, size = annotations[row.picture], tuple(pictures[row.picture].shape[-2:])
        if "boxes" not in annotation:
            raise ValueError(f'"annotations" must hold "boxes" got {", ".join(annotation) or "no key"}.')
        boxes = torch.as_tensor(annotation["boxes"], dtype=torch.float32).reshape(-1, 4)
        classes = annotation.get("class_labels", torch.zeros(len(boxes)) if row.kind.single_target else ())
        classes = torch.as_tensor(classes).to(torch.int64)
        if len(classes) != len(boxes) or not ((classes >= 0) & (classes < len(row.phrases))).all():
            raise ValueError(
                f'"annotations" must have one of {len(row.phrases)} class labels for each of {len(boxes)} boxes, '
                f"got {classes.tolist()}."
            )
        label = {**annotation, "boxes": box_xyxy_to_cxcywh(scale_boxes(boxes, size, (1, 1))), "class_labels": classes}
        if not row.kind.single_target:
            label["positive_map"] = row.label_map[classes]
        if annotation.get("masks") is not None:
            real = data["pixel_mask"][row.picture]
            inner = (int(real[:, 0].sum()), int(real[0].sum()))
            masks = torch.as_tensor(annotation["masks"])
            if masks.shape != (len(boxes), *size):
                raise ValueError(f'"annotations" must have masks {(len(boxes), *size)}, got {tuple(masks.shape)}.')
            masks = F.interpolate(masks[:, None].float(), size=inner, mode="nearest-exact")[:, 0] > 0
            label["masks"] = F.pad(masks, (0, real.shape[1] - inner[1], 0, real.shape[0] - inner[0]))
        labels.append(label)
    return labels


__all__ = [
    "PromptRow",
    "PromptValue",
    "TextChunk",
    "UninextInputs",
    "UninextProcessor",
    "as_prompts",
    "clean_expression",
    "clean_name",
]
