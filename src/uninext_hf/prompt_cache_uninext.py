"""PromptCache: features of prompts by content, so that the same words or references are encoded once.

An entry is what the network's text or template branch makes of one row of tokens or of one reference crop. Its key is
that content and the weights that read it, so neither a new processor setting nor a training step can bring back
something stale.
"""

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PROMPT_PARTS = ("text_encoder", "template_encoder", "input_projections")
_FORMAT = "uninext prompt cache 1"


class PromptEncoder(Protocol):
    """What the cache needs of a model; `UninextModel` and `UninextForUniversalPerception` have it."""

    training: bool
    prompt_features_class: type

    def get_prompt_features(self, **inputs: Tensor) -> tuple:
        """Prompt tensors -> a named tuple of hidden, valid, attend and pool."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As in torch."""


class PromptEntry(NamedTuple):
    """Features of one row of tokens, or of one reference.

    Args:
        hidden: (L, text width) prompt tokens without padding.
        valid: (L,) bool, tokens that are pooled.
        weights: fingerprint of the weights that made it.
    """

    hidden: Tensor
    valid: Tensor
    weights: str

    @property
    def num_bytes(self) -> int:
        """Memory of both tensors."""
        return self.hidden.nbytes + self.valid.nbytes


class PromptCache:
    """Bounded store of prompt features; the least recently used entry goes first.

    A row of text is one entry, each reference of a template is one of its own. Entries are plain values: they carry no
    gradient, so the model must be in evaluation mode. The weights are looked at again when torch has counted a change
    of one of them, or its memory is another; what writes through `parameter.data` is not counted, call `clear` then.

    Args:
        max_bytes: memory of all entries at most. A reference of the R50 model takes 3 MB, a row of 16 tokens 50 kB.
        max_entries: number of entries at most; `None` for no such limit.

    Attributes:
        hits: how many rows and references were found, since the start or the last `clear`.
        misses: how many were encoded.

    Raises:
        ValueError: a limit is not a positive integer.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, max_entries: int | None = None):
        for name, value in (("max_bytes", max_bytes), ("max_entries", max_entries)):
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if (name == "max_bytes" or value is not None) and (not is_integer or value < 1):
                raise ValueError(f'"{name}" must be a positive integer, got {value!r}.')
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, PromptEntry] = OrderedDict()
        self._bytes = 0
        self._known_weights: WeakKeyDictionary[object, tuple[tuple, str]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"PromptCache({len(self)} entries, {self._bytes} bytes, {self.hits} hits, {self.misses} misses)"

    @property
    def num_bytes(self) -> int:
        """Memory of all entries."""
        return self._bytes

    def clear(self) -> None:
        """Forget all entries, counts and what is known about weights."""
        self._entries.clear()
        self._known_weights.clear()
        self._bytes = self.hits = self.misses = 0

    def features(self, model: PromptEncoder, inputs: Mapping[str, Tensor]) -> tuple:
        """What `model.get_prompt_features` gives for the same tensors, encoding only what is new.

        New rows are encoded at their own length, so the values do not depend on what else is in the batch or in the
        cache. Slots that nothing looks at hold zeros.

        Args:
            model: in evaluation mode.
            inputs: "input_ids" and "attention_mask" (P, L), "template_values" (P, 4, S, S) or (P, T, 4, S, S) and
                "template_mask" accordingly, "pool_prompt" (P,); what a processor returned will do, other keys are
                ignored.

        Returns:
            The model's prompt features (`prompt_features_class`), to be passed on as `prompt_features=`.

        Raises:
            ValueError: the model is in training mode, or there is neither text nor template.
        """
        if model.training:
            raise ValueError('"model" must be in evaluation mode, got one in training mode; call model.eval() first.')
        rows, length = _rows_of(inputs)
        with torch.inference_mode(False), torch.no_grad():
            found = self._lookup(model, [piece for row in rows for piece in row])
            hidden = next(iter(found.values())).hidden
            longest = max(sum(len(found[piece].valid) for piece in row) for row in rows)
            joined = hidden.new_zeros(len(rows), max(length, longest), hidden.shape[1])
            valid = torch.zeros(joined.shape[:2], dtype=torch.bool, device=joined.device)
            attend = torch.zeros_like(valid)
            for index, row in enumerate(rows):
                start = 0
                for piece in row:
                    entry = found[piece]
                    end = start + len(entry.valid)
                    joined[index, start:end], valid[index, start:end] = entry.hidden, entry.valid
                    attend[index, start:end] = entry.valid if piece.is_text else True
                    start = end
            pool = inputs.get("pool_prompt")
            if pool is None:
                pool = torch.tensor([not row[0].is_text for row in rows])
        return model.prompt_features_class(joined, valid, attend, pool.to(joined.device).bool())

    def save(self, path: str | os.PathLike, model: PromptEncoder) -> int:
        """Write the entries of one model's weights to a safetensors file; it appears whole or not at all.

        Args:
            path: of the file; an existing one is replaced.
            model: whose entries are written.

        Returns:
            How many entries were written.

        Raises:
            ImportError: safetensors is not installed.
        """
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError('saving prompt features needs safetensors: pip install "safetensors"') from error
        weights, path = self.weights_of(model), Path(path)
        entries = {key: entry for key, entry in self._entries.items() if entry.weights == weights}
        tensors = {}
        for key, entry in entries.items():
            tensors[f"{key}.hidden"], tensors[f"{key}.valid"] = entry.hidden.cpu(), entry.valid.cpu()
        # safetensors keeps no order; the last one is the one used last.
        metadata = {"format": _FORMAT, "weights": weights, "entries": json.dumps(list(entries))}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return len(entries)

    def load(self, path: str | os.PathLike, model: PromptEncoder) -> int:
        """Add the entries of a file that `save` has written.

        Args:
            path: of the file.
            model: with the weights that made the entries.

        Returns:
            How many entries were read; when they do not fit into the bounds, the most recently used ones stay.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, not such a file, or made with other weights.
            ImportError: safetensors is not installed.
        """
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError('loading prompt features needs safetensors: pip install "safetensors"') from error
        name = os.fspath(path)
        if not os.path.isfile(name):
            raise FileNotFoundError(f'"path" must be a file of prompt features, got {name!r}, which is none.')
        weights = self.weights_of(model)
        try:
            with safe_open(name, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f'"path" must be a file that PromptCache.save has written, got {name!r}.')
                if metadata["weights"] != weights:
                    raise ValueError(
                        f'"path" must hold prompt features of this model\'s weights ({weights[:12]}), got those of '
                        f"others ({metadata['weights'][:12]}) in {name!r}."
                    )
                keys = json.loads(metadata["entries"])
                entries = {
                    key: PromptEntry(file.get_tensor(f"{key}.hidden"), file.get_tensor(f"{key}.valid"), weights)
                    for key in keys
                }
        except SafetensorError as error:
            raise ValueError(f'"path" must be a complete safetensors file, got {name!r} ({error}).') from error
        for key, entry in entries.items():
            self._keep(key, entry)
        return len(entries)

    def weights_of(self, model: PromptEncoder) -> str:
        """Fingerprint of the weights that encode prompts, equal in every process; computed anew when they change.

        Args:
            model: any model of this package.

        Returns:
            A hexadecimal number that depends on names, shapes, types and values of the text branch, the template
            branch and the projections they share with the picture branch.
        """
        tensors = _prompt_weights(model)
        state = tuple((name, tensor.data_ptr(), _version(tensor), str(tensor.dtype)) for name, tensor in tensors)
        known = self._known_weights.get(model)
        if known is None or known[0] != state:
            known = (state, _fingerprint(tensors))
            self._known_weights[model] = known
        return known[1]

    def _lookup(self, model: PromptEncoder, pieces: Iterable["_Piece"]) -> dict["_Piece", PromptEntry]:
        """The entries of all pieces; those that are not there are encoded, equal shapes together."""
        weights, device = self.weights_of(model), _prompt_weights(model)[0][1].device
        # Equal words give other values in another precision.
        settings = f"{weights} {torch.get_autocast_dtype(device.type)} " if _has_autocast(device) else f"{weights} - "
        found, missing = {}, {}
        for piece in pieces:
            key = settings + piece.content
            if piece in found or piece in missing:
                self.hits += 1
            elif key in self._entries:
                self.hits += 1
                self._entries.move_to_end(key)
                entry = self._entries[key]
                found[piece] = entry._replace(hidden=entry.hidden.to(device), valid=entry.valid.to(device))
            else:
                self.misses += 1
                missing[piece] = key
        groups: dict[tuple, list[_Piece]] = {}
        for piece in missing:
            groups.setdefault((piece.is_text, piece.first.shape), []).append(piece)
        for (is_text, _), group in groups.items():
            names = ("input_ids", "attention_mask") if is_text else ("template_values", "template_mask")
            tensors = [
                torch.stack(tensors).to(device) for tensors in zip(*(piece[2:] for piece in group), strict=True)
            ]
            encoded = model.get_prompt_features(**dict(zip(names, tensors, strict=True)))
            for piece, hidden, valid in zip(group, encoded.hidden, encoded.valid, strict=True):
                found[piece] = PromptEntry(hidden.clone(), valid.clone(), weights)
                self._keep(missing[piece], found[piece])
        return found

    def _keep(self, key: str, entry: PromptEntry) -> None:
        """Add an entry and let the oldest ones go until the bounds hold; one that is too large is not kept."""
        if key in self._entries:
            self._bytes -= self._entries.pop(key).num_bytes
        if entry.num_bytes > self.max_bytes:
            return
        self._entries[key] = entry
        self._bytes += entry.num_bytes
        most = len(self._entries) if self.max_entries is None else self.max_entries
        while self._bytes > self.max_bytes or len(self._entries) > most:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.num_bytes


class _Piece(NamedTuple):
    """One row of text or one reference: what its features depend on."""

    content: str
    is_text: bool
    first: Tensor
    second: Tensor

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Piece) and self.content == other.content


def _rows_of(inputs: Mapping[str, Tensor]) -> tuple[list[list[_Piece]], int]:
    """The pieces of every row in the order of their tokens, and the length of the text tensors (0 without text)."""
    ids, values = inputs.get("input_ids"), inputs.get("template_values")
    if ids is None and values is None:
        raise ValueError('"inputs" must hold "input_ids" or "template_values", got neither.')
    masks = inputs.get("template_mask")
    if values is not None:
        masks = torch.ones_like(values[..., 0, :, :]) if masks is None else masks
        if values.ndim == 4:
            values, masks = values[:, None], masks[:, None]
        masks = masks.bool()
    text_masks = inputs.get("attention_mask")
    text_masks = torch.ones_like(ids) if text_masks is None and ids is not None else text_masks
    rows = []
    for index in range(len(ids) if values is None else len(values)):
        given = [] if values is None else masks[index].flatten(1).any(1).tolist()
        if ids is not None and not any(given):
            kept = text_masks[index].bool()
            length = int(kept.nonzero().max()) + 1 if kept.any() else 1
            rows.append([_piece(True, ids[index, :length], text_masks[index, :length])])
        else:
            slots = [slot for slot, is_given in enumerate(given) if is_given or slot == 0]
            rows.append([_piece(False, values[index, slot], masks[index, slot]) for slot in slots])
    return rows, 0 if ids is None else ids.shape[1]


def _piece(is_text: bool, first: Tensor, second: Tensor) -> _Piece:
    content = hashlib.sha256()
    for tensor in (first, second):
        _feed(content, is_text, tensor)
    return _Piece(content.hexdigest(), is_text, first, second)


def _prompt_weights(model: PromptEncoder) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that prompts pass through, by their names in the trunk."""
    found = []
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            parts = name.split(".")
            place = next((index for index, part in enumerate(parts) if part in _PROMPT_PARTS), None)
            if place is not None:
                found.append((".".join(parts[place:]), tensor))
    if not found:
        raise ValueError(f'"model" must have a "text_encoder", got {type(model).__name__} without one.')
    return found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _has_autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes, types and all values; 0.3 s for the 440 MB of BERT."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        _feed(content, name, tensor)
    return content.hexdigest()


def _feed(content: "hashlib._Hash", name: object, tensor: Tensor) -> None:
    """Name, shape, type and bytes of a tensor into a hash."""
    content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


__all__ = ["PromptCache", "PromptEncoder", "PromptEntry"]
