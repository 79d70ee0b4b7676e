"""UninextProcessor: pictures and prompts -> network input; network output -> Instances.

Sources: paper section 3.1 (prompts); official `data/dataset_mapper_uni.py` 36-73, 400-401, 446-450, 716-750 (captions,
cleaning, token positions) and `uninext_img.py` 367-485 (results).
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

    Source: official `data/dataset_mapper_uni.py` 446-450.
    """
    cleaned = re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")
    return cleaned if cleaned.strip() else name


def clean_expression(text: str) -> str:
    """An expression as the network reads it: lower case, without most punctuation, `-` and `/` as blanks.

    One of which nothing is left stays as it was. Source: official `data/dataset_mapper_uni.py` 400-401.
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
        labels: K indices into `phrases`, the names that this row looks for.
        label_map: (K, L) bool on the CPU, which tokens belong to which of these names.
    """

    prompt: int
    picture: int
    kind: PromptKind
    phrases: tuple[str, ...]
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
            hold zeros); "pool_prompt" (P,) bool, True for an expression or reference;
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
            rows = self._rows(prompts, pairs)
            data |= self._text_tensors(prompts, rows, pad_to)
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
                        f'"names" must have at least one token each, got none for {names[label]!r} at position {label}.'
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

    def _rows(self, prompts: Sequence[Prompt], pairs: Sequence[tuple[int, int]]) -> list[PromptRow]:
        return [
            PromptRow(index, picture, prompts[index].kind, prompts[index].phrases, chunk.labels, chunk.label_map)
            for index, picture in pairs
            for chunk in self.encode_text(prompts[index].kind, prompts[index].phrases)
        ]

    def _text_tensors(self, prompts: list[Prompt], rows: list[PromptRow], pad_to: int | None) -> dict[str, Tensor]:
        """Token tensors, and label maps brought to their length (in place, in `rows`)."""
        if all(prompt.kind == PromptKind.TEMPLATE for prompt in prompts):
            return {}
        chunks = [
            next(chunk for chunk in self.encode_text(row.kind, row.phrases) if chunk.labels == row.labels)
            for row in rows
        ]
        longest = max(len(chunk.input_ids) for chunk in chunks)
        length = longest if pad_to is None else pad_to
        if length < longest:
            raise ValueError(f'"pad_to" must be at least the {longest} tokens of the longest prompt, got {pad_to}.')
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for index, chunk in enumerate(chunks):
            input_ids[index, : len(chunk.input_ids)] = torch.tensor(chunk.input_ids)
            attention_mask[index, : len(chunk.input_ids)] = 1
            missing = length - chunk.label_map.shape[1]
            object.__setattr__(rows[index], "label_map", F.pad(chunk.label_map, (0, missing)))
        return {"input_ids": input_ids, "attention_mask": attention_mask}
