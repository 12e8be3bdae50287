"""Whose each embedding is, in a batch in which each row has an adapter of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...backbone.outputs import embeddings_in, map_embeddings
from .slots import Slots, Stacks
from .tiles import tiles_of_images, tiles_of_rows

REMEDY = "Run one batch per adapter: model.set_adapter(name)."
# A host's methods that call its sites -> what they read.
METHODS = {"get_image_features": "image", "get_video_features": "video"}
BASE = "__base__"  # PEFT's word for a row without an adapter


def check_count(names: Sequence[str], rows: int) -> None:
    """See that there is an adapter for each row.

    Raises:
        ValueError: there are more or fewer.
    """
    if rows != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )


class Rows:
    """Which adapter each token has, at each site, in each forward pass of one call."""

    def __init__(
        self,
        model: nn.Module,
        weights: Any,
        names: Sequence[str],
        ids: torch.Tensor | None,
        keywords: dict[str, Any],
        counted: bool,
    ) -> None:
        self.counted = counted  # the call's rows; else each forward pass's are, which `generate` would repeat
        self.model, self.weights, self.names = model, weights, list(names)
        self.known = [name for name in dict.fromkeys(names) if name != BASE]
        numbers = {name: number for number, name in enumerate(self.known)}
        self.of_row = torch.tensor([numbers.get(name, -1) for name in names])
        self.kinds = _kinds(model)  # of placeholders
        self.ids = ids
        self.keywords = keywords
        # (site, kind) -> placeholders of each row that this pass has not filled yet
        self.left: dict[tuple[int, int], torch.Tensor] = {}
        self.slots: dict[tuple[int, torch.Size, torch.device], list[Slots | None]] = {}  # of tables
        self.stacks = Stacks()

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Before each forward pass: `generate` makes many, with repeated rows."""
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if isinstance(ids, torch.Tensor):
            self.ids = ids
        model_input = ids if isinstance(ids, torch.Tensor) else keywords.get("inputs_embeds")
        if isinstance(model_input, torch.Tensor) and not self.counted and hasattr(module, "config"):
            check_count(self.names, len(model_input))
        self.keywords, self.left = keywords, {}

    def name_rows(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What PEFT's own wrappers read."""
        first_input = next(iter([*arguments, *keywords.values()]), None)
        many = len(first_input) if isinstance(first_input, torch.Tensor) else len(self.names)
        if many % len(self.names):
            raise ValueError(
                f"{type(module).__name__} trains with each adapter and is given {many} inputs for {len(self.names)} "
                "rows; adapter_names takes one image per row there. " + REMEDY
            )
        repeated = [name for name in self.names for _ in range(many // len(self.names))]
        return arguments, {**keywords, "adapter_names": repeated}

    def adapt(self, site: Any, output: Any, site_input: Any) -> Any:
        """Add to each embedding in a site's output what its row's adapter adds.

        Args:
            site_input: what the site was called with: token ids, where it is a table.
        """
        groups = self._groups(site)
        if not groups:
            return output
        tensors = embeddings_in(output, site.out_features)
        tokens = [tensor[..., 0] for tensor in tensors]
        is_table = isinstance(site_input, torch.Tensor) and not site_input.is_floating_point() and len(tokens) == 1
        if is_table and site_input.shape == tokens[0].shape:
            ids = site_input.reshape(-1).to(tokens[0].device)
            slots = self._slots_of_ids(site, site_input, groups, tokens[0].device)
        else:
            ids = None
            owners = self._of_images(site, tokens)
            slots = [Slots.of(owners, group, tokens[0].device) for group in groups]
        flat = [tensor.reshape(-1, site.out_features) for tensor in tensors]
        adapted = self._add(site, flat[0] if len(flat) == 1 else torch.cat(flat), ids, slots)
        parts = iter(adapted.split([len(part) for part in flat]))
        return map_embeddings(output, site.out_features, lambda x: next(parts).reshape(x.shape))

    def _groups(self, site: Any) -> list[dict[int, str]]:
        """Adapters of the batch that one product can serve at a site: number -> name.

        Those of a group have the same branches there, the same activation and the same dtype.
        """
        groups: dict[Any, dict[int, str]] = {}
        for number, name in enumerate(self.known):
            if site._attached([name]):
                branches = tuple((branch, tuple(ranges)) for branch, ranges in site.branches_of[name].items())
                kind = (branches, self.weights.settings[name][0], self.weights.crome_up[name].weight.dtype)
                groups.setdefault(kind, {})[number] = name
        return list(groups.values())

    def _add(self, site: Any, x: torch.Tensor, ids: torch.Tensor | None, several: list[Slots | None]) -> torch.Tensor:
        """x with each group's adapters added in their slots; (embeddings, d)."""
        result = x
        for slots in filter(None, several):
            there = None if ids is None else ids[slots.source]
            adapted = site._adapt(x[slots.source], [slots.names[0]], there, partial(self.stacks.maps, slots.names))
            result = result.index_copy(0, slots.mine, adapted.flatten(0, 1)[slots.place])
        return result

    def _slots_of_ids(
        self, site: Any, ids: torch.Tensor, groups: list[dict[int, str]], device: torch.device
    ) -> list[Slots | None]:
        """Slots of a table's output, sorted once for all tokens of a call."""
        key = (id(site), ids.shape, device)
        if key not in self.slots or ids.dim() < 2:
            owners = self._of_ids(ids)
            self.slots[key] = [Slots.of(owners, group, device) for group in groups]
        return self.slots[key]

    def _repeated(self, rows: int) -> torch.Tensor:
        if rows % len(self.names):
            raise ValueError(f"{rows} rows came where adapter_names has {len(self.names)}: {self.names}. {REMEDY}")
        return self.of_row.repeat_interleave(rows // len(self.names))

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Owners of a table's output: (rows, length) ids -> (rows * length,)."""
        if ids.dim() < 2 and all(int(token) in self.kinds for token in ids.reshape(-1)):
            return torch.full((ids.numel(),), -1)  # a placeholder's own embedding, which no adapter changes
        rows = len(ids) if ids.dim() else 1
        return self._repeated(rows).repeat_interleave(ids.numel() // rows)

    def _of_images(self, site: Any, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Owners of image embeddings, which stand in the order of the rows that show them.

        A model says how many there are in a row by the placeholders in its ids.
        """
        total = sum(tensor.numel() for tensor in tokens)
        images = len(tokens[0]) if len(tokens) == 1 and tokens[0].dim() > 1 else len(tokens)
        of_kind = self._kinds_read(site)
        lefts = {kind: self.left.get((id(site), kind), of_row) for kind, of_row in of_kind.items()}
        for kind in sorted(lefts, key=lambda kind: int(lefts[kind].sum()) != total):  # first what fits at once
            of_row, left = of_kind[kind], lefts[kind]
            shares = self._shares(kind, of_row, left, total, images)
            if shares is None:
                continue
            self.left[id(site), kind] = left - shares[1]
            return self._repeated(len(of_row)).repeat_interleave(shares[0])
        if not self.kinds and total == len(self.names):
            return self.of_row
        # As many as there are rows, and some in each: one in each. Placeholders in some rows alone say otherwise.
        each = self.ids is None or any(bool(of_row.all()) for of_row in of_kind.values())
        if images % len(self.names) == 0 and (not self.kinds or (images == len(self.names) and each)):
            return self._repeated(images).repeat_interleave(total // images)
        raise ValueError(
            f"{total} image embeddings in {images} parts came, and the rows' placeholders do not say whose they are. "
            + REMEDY
        )

    def _kinds_read(self, site: Any) -> dict[int, torch.Tensor]:
        """Placeholder -> how many of them each row has, (rows,), of the kinds that a site may have read just now.

        Raises:
            ValueError: images and videos are both to come, in rows of several adapters, and the model does not say
                which these are.
        """
        words = ("audio",) if "audio" in site.branches else ("image", "video")
        of_kind = {kind: self._count(kind) for kind, word in self.kinds.items() if word in words}
        shown = {self.kinds[kind] for kind, rows in of_kind.items() if rows.any()}
        if len(shown) > 1 and (read := _running(METHODS)) in shown:
            return {kind: rows for kind, rows in of_kind.items() if self.kinds[kind] == read}
        if len(shown) > 1 and len(set(self.names)) > 1:
            raise ValueError(f"{sorted(shown)} came, and which came first is not known. " + REMEDY)
        return of_kind

    def _count(self, kind: int) -> torch.Tensor:
        """(rows,): placeholders of a kind."""
        return torch.zeros(len(self.names), dtype=torch.long) if self.ids is None else (self.ids == kind).sum(-1).cpu()

    def _shares(
        self, kind: int, of_row: torch.Tensor, left: torch.Tensor, total: int, images: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """How many of `total` embeddings each row has, and how many of its placeholders they stand for.

        Args:
            of_row, left: (rows,), placeholders of this kind, and those that no earlier call of the site has filled.
        """
        unfilled = int(left.sum())
        if not of_row.any() or (not unfilled and of_row.count_nonzero() > 1):
            return None
        if unfilled == total:
            return left, left
        if of_row.count_nonzero() == 1:  # one row has them all, however they are counted
            return (of_row > 0) * total, left.clamp(max=total)
        if (tiles := tiles_of_images(self.model, self.keywords)) is not None:
            rows = tiles_of_rows(self.ids == kind, tiles) if self.ids is not None and sum(tiles) == images else None
            return None if rows is None else (rows * (total // images), left)
        if images > 1 and unfilled % images == 0 and not (left % (unfilled // images)).any():
            return left * total // unfilled, left  # each image has as many
        row = int(left.nonzero()[0])
        if images == 1 and total <= left[row]:  # one call for each image; `end` sees that all of them came
            share = torch.zeros_like(left)
            share[row] = total
            return share, share
        return None

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After each forward pass.

        Raises:
            ValueError: the sites gave fewer embeddings than there are placeholders, so that some went astray.
        """
        for (_, kind), left in self.left.items():
            if left.any() and self._count(kind).count_nonzero() > 1:
                raise ValueError(
                    f"{int(left.sum())} placeholders of token {kind} were not filled one by one, so it is not known "
                    "whose image embeddings came. " + REMEDY
                )


def _running(methods: dict[str, str]) -> str | None:
    """What the innermost of these methods reads that is on the call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in methods:
            return methods[frame.f_code.co_name]
        frame = frame.f_back
    return None


def _kinds(model: nn.Module) -> dict[int, str]:
    """Token id -> what stands in its place."""
    config = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in ("vision_config", "audio_config"))]
    kinds = {
        getattr(config, f"{word}_token_{suffix}", None): word
        for word in ("audio", "video", "image")
        for suffix in ("id", "index")
        for config in configs
    }
    return {token: word for token, word in kinds.items() if isinstance(token, int)}
