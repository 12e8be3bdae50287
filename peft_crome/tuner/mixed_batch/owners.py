"""Find which row's adapter each embedding belongs to, in a batch whose rows have different adapters."""

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
# Methods of a host that call its sites -> what they read.
METHODS = {"get_image_features": "image", "get_video_features": "video"}
BASE = "__base__"  # PEFT's name for a row without an adapter


def check_count(names: Sequence[str], rows: int) -> None:
    """Check that there is one adapter for each row.

    Raises:
        ValueError: there are more or fewer names than rows.
    """
    if rows != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )


class Rows:
    """Which adapter each token has at each site in each forward pass of one call."""

    def __init__(
        self,
        model: nn.Module,
        weights: Any,
        names: Sequence[str],
        ids: torch.Tensor | None,
        keywords: dict[str, Any],
        counted: bool,
    ) -> None:
        self.counted = counted  # whether the caller has compared rows and names; otherwise each pass must
        self.model, self.weights, self.names = model, weights, list(names)
        self.known = [name for name in dict.fromkeys(names) if name != BASE]
        numbers = {name: number for number, name in enumerate(self.known)}
        self.of_row = torch.tensor([numbers.get(name, -1) for name in names])
        self.kinds = _kinds(model)  # token id of a placeholder -> what it stands for
        self.ids = ids
        self.keywords = keywords
        # (site, kind) -> placeholders of each row that this pass has not filled yet
        self.left: dict[tuple[int, int], torch.Tensor] = {}
        self.slots: dict[tuple[int, torch.Size, torch.device], list[Slots | None]] = {}  # slots of tables' outputs
        self.stacks = Stacks()

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note the rows before each forward pass: `generate` runs many, with repeated rows."""
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
        """Pass the adapters' names to PEFT's wrappers in the form that they read."""
        first_input = next(iter([*arguments, *keywords.values()]), None)
        many = len(first_input) if isinstance(first_input, torch.Tensor) else len(self.names)
        if many % len(self.names):
            raise ValueError(
                f"{type(module).__name__} has a copy for each adapter and got {many} inputs for {len(self.names)} "
                "rows; with adapter_names it takes one image per row. " + REMEDY
            )
        repeated = [name for name in self.names for _ in range(many // len(self.names))]
        return arguments, {**keywords, "adapter_names": repeated}

    def adapt(self, site: Any, output: Any, site_input: Any) -> Any:
        """Add what its row's adapter computes to each embedding in a site's output.

        Args:
            site_input: the first argument of the site: token ids if the site is a table.
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
        """Group the batch's adapters that one product can serve at a site: number -> name.

        The adapters of a group have the same branches at the site, the same activation and the same dtype.
        """
        groups: dict[Any, dict[int, str]] = {}
        for number, name in enumerate(self.known):
            if site._attached([name]):
                branches = tuple((branch, tuple(ranges)) for branch, ranges in site.branches_of[name].items())
                kind = (branches, self.weights.settings[name][0], self.weights.crome_up[name].weight.dtype)
                groups.setdefault(kind, {})[number] = name
        return list(groups.values())

    def _add(self, site: Any, x: torch.Tensor, ids: torch.Tensor | None, several: list[Slots | None]) -> torch.Tensor:
        """Add each group's adapters to x in their slots; (embeddings, d)."""
        result = x
        for slots in filter(None, several):
            there = None if ids is None else ids[slots.source]
            adapted = site._adapt(x[slots.source], [slots.names[0]], there, partial(self.stacks.maps, slots.names))
            result = result.index_copy(0, slots.mine, adapted.flatten(0, 1)[slots.place])
        return result

    def _slots_of_ids(
        self, site: Any, ids: torch.Tensor, groups: list[dict[int, str]], device: torch.device
    ) -> list[Slots | None]:
        """Sort a table's output into slots, once for all tokens of a call."""
        key = (id(site), ids.shape, device)
        if key not in self.slots or ids.dim() < 2:
            owners = self._of_ids(ids)
            self.slots[key] = [Slots.of(owners, group, device) for group in groups]
        return self.slots[key]

    def _repeated(self, rows: int) -> torch.Tensor:
        if rows % len(self.names):
            raise ValueError(f"The model got {rows} rows for {len(self.names)} adapter_names: {self.names}. {REMEDY}")
        return self.of_row.repeat_interleave(rows // len(self.names))

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Find the owners of a table's output: (rows, length) ids -> (rows * length,)."""
        if ids.dim() < 2 and all(int(token) in self.kinds for token in ids.reshape(-1)):
            return torch.full((ids.numel(),), -1)  # no adapter changes the embedding of a placeholder
        rows = len(ids) if ids.dim() else 1
        return self._repeated(rows).repeat_interleave(ids.numel() // rows)

    def _of_images(self, site: Any, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Find the owners of image embeddings, which come in the order of the rows that show them.

        The placeholders in a row's ids give the number of its image embeddings.
        """
        total = sum(tensor.numel() for tensor in tokens)
        images = len(tokens[0]) if len(tokens) == 1 and tokens[0].dim() > 1 else len(tokens)
        of_kind = self._kinds_read(site)
        lefts = {kind: self.left.get((id(site), kind), of_row) for kind, of_row in of_kind.items()}
        for kind in sorted(lefts, key=lambda kind: int(lefts[kind].sum()) != total):  # an exact fit first
            of_row, left = of_kind[kind], lefts[kind]
            shares = self._shares(kind, of_row, left, total, images)
            if shares is None:
                continue
            self.left[id(site), kind] = left - shares[1]
            return self._repeated(len(of_row)).repeat_interleave(shares[0])
        if not self.kinds and total == len(self.names):
            return self.of_row
        # As many parts as rows mean one part per row, unless only some rows have placeholders.
        each = self.ids is None or any(bool(of_row.all()) for of_row in of_kind.values())
        if images % len(self.names) == 0 and (not self.kinds or (images == len(self.names) and each)):
            return self._repeated(images).repeat_interleave(total // images)
        raise ValueError(
            f"{total} image embeddings came in {images} parts that do not match the placeholders of the rows. "
            + REMEDY
        )

    def _kinds_read(self, site: Any) -> dict[int, torch.Tensor]:
        """Count the placeholders of each kind that a site may have read just now: kind -> (rows,).

        Raises:
            ValueError: images and videos are still to come, in rows of several adapters, and the model does not say
                which of them these are.
        """
        words = ("audio",) if "audio" in site.branches else ("image", "video")
        of_kind = {kind: self._count(kind) for kind, word in self.kinds.items() if word in words}
        shown = {self.kinds[kind] for kind, rows in of_kind.items() if rows.any()}
        if len(shown) > 1 and (read := _running(METHODS)) in shown:
            return {kind: rows for kind, rows in of_kind.items() if self.kinds[kind] == read}
        if len(shown) > 1 and len(set(self.names)) > 1:
            raise ValueError(f"The batch has {sorted(shown)} in unknown order. " + REMEDY)
        return of_kind

    def _count(self, kind: int) -> torch.Tensor:
        """Count the placeholders of a kind in each row; (rows,)."""
        return torch.zeros(len(self.names), dtype=torch.long) if self.ids is None else (self.ids == kind).sum(-1).cpu()

    def _shares(
        self, kind: int, of_row: torch.Tensor, left: torch.Tensor, total: int, images: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Share `total` embeddings among the rows. Return each row's number, and how many placeholders they fill.

        Args:
            of_row, left: (rows,), all placeholders of this kind, and those that no earlier call of the site filled.
        """
        unfilled = int(left.sum())
        if not of_row.any() or (not unfilled and of_row.count_nonzero() > 1):
            return None
        if unfilled == total:
            return left, left
        if of_row.count_nonzero() == 1:  # one row has all of them, whatever the count
            return (of_row > 0) * total, left.clamp(max=total)
        if (tiles := tiles_of_images(self.model, self.keywords)) is not None:
            rows = tiles_of_rows(self.ids == kind, tiles) if self.ids is not None and sum(tiles) == images else None
            return None if rows is None else (rows * (total // images), left)
        if images > 1 and unfilled % images == 0 and not (left % (unfilled // images)).any():
            return left * total // unfilled, left  # each image has equally many
        row = int(left.nonzero()[0])
        if images == 1 and total <= left[row]:  # one call per image; `end` checks that all came
            share = torch.zeros_like(left)
            share[row] = total
            return share, share
        return None

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Check after each forward pass that every placeholder was filled.

        Raises:
            ValueError: the sites returned fewer embeddings than there are placeholders, so their rows are unknown.
        """
        for (_, kind), left in self.left.items():
            if left.any() and self._count(kind).count_nonzero() > 1:
                raise ValueError(
                    f"{int(left.sum())} placeholders of token {kind} were not filled one by one, so the rows of the "
                    "image embeddings are unknown. " + REMEDY
                )


def _running(methods: dict[str, str]) -> str | None:
    """Return what the innermost running method of `methods` reads; None if none is on the call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in methods:
            return methods[frame.f_code.co_name]
        frame = frame.f_back
    return None


def _kinds(model: nn.Module) -> dict[int, str]:
    """Map each placeholder's token id to what takes its place."""
    config = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in ("vision_config", "audio_config"))]
    kinds = {
        getattr(config, f"{word}_token_{suffix}", None): word
        for word in ("audio", "video", "image")
        for suffix in ("id", "index")
        for config in configs
    }
    return {token: word for token, word in kinds.items() if isinstance(token, int)}
