"""Branches: names, their sites, and the token ids that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from operator import or_

import torch

Branches = dict[str, list[str]]  # branch -> full paths of its sites; with a token range: "embed_tokens[4:8196]"
TokenRanges = list[tuple[int, int]]  # half-open ranges of token ids

TOKEN_RANGE = re.compile(r"\[(\d+):(\d+)\]$")


def site_path(site: str) -> str:
    """Return the module's path, without a range of token ids."""
    return TOKEN_RANGE.sub("", site)


def token_range(site: str) -> TokenRanges:
    """Return the half-open range of token ids at the end of a site's name; empty: all tokens."""
    return [(int(start), int(stop)) for start, stop in TOKEN_RANGE.findall(site)]


def with_ranges(path: str, ranges: TokenRanges) -> list[str]:
    """Invert `site_path` and `token_range`."""
    return [f"{path}[{start}:{stop}]" for start, stop in ranges] or [path]


def united(several: Iterable[dict[str, TokenRanges]]) -> dict[str, TokenRanges]:
    """Unite the branches of several adapters at one site, each with all of its ranges."""
    union: dict[str, TokenRanges] = {}
    for branches in several:
        for branch, ranges in branches.items():
            union[branch] = [*dict.fromkeys([*union.get(branch, []), *ranges])]
    return union


def in_ranges(input_ids: torch.Tensor, ranges: TokenRanges) -> torch.Tensor:
    """Mark the token ids that lie in one of the half-open ranges; bool, of the shape of `input_ids`."""
    masks = (
        input_ids == start if stop == start + 1 else (input_ids >= start) & (input_ids < stop)
        for start, stop in ranges
    )
    return reduce(or_, masks)
