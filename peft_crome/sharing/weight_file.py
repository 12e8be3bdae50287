"""Read the header of an adapter's weight file, and check it before a model is touched."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .weight_checks import EMBEDDINGS, TRAINABLE_TOKENS, Shapes, check_shapes, host_path, token_lists

KEY_PREFIX = "base_model.model.crome."
DTYPES = ("F32", "F16", "BF16")  # dtypes of adapters, by safetensors' names
COUNTS = ("I64", "I32", "U8", "BOOL")  # dtypes of buffers, such as the number of batches in a batch norm
HEADER_LIMIT = 16 << 20  # bytes; the header of a thousand tensors has 200 kB


@dataclass
class AdapterFile:
    """The header of a weight file.

    Attributes:
        crome: name without the prefix ("crome_up.weight") -> shape.
        host: whole key of every other tensor -> shape: trained copies of the host's modules.
        counts: keys of `host` with integers.
        modules_to_save, bottleneck_dim: values of the configuration beside the file; the loaded configuration may be
            changed before it is used.
    """

    path: Path
    crome: Shapes = field(default_factory=dict)
    host: Shapes = field(default_factory=dict)
    counts: set[str] = field(default_factory=set)
    modules_to_save: tuple[str, ...] = ()
    bottleneck_dim: int | None = None

    def branches(self) -> list[str] | None:
        """The branches in the keys, in a fixed order."""
        matches = (re.fullmatch(r"crome_gate_(\w+)\.weight", key) for key in sorted(self.crome))
        return [match[1] for match in matches if match] or None

    def hidden_features(self) -> int | None:
        """m from W_u; None: W_u is missing, which `check_fits` reports."""
        shape = self.crome.get("crome_up.weight", ())
        return shape[1] if len(shape) == 2 else None

    def check_fits(self, model: nn.Module, expected: Shapes, source: str) -> None:
        """Compare the file with the model that it is loaded onto, and check its values.

        This is skipped if bottleneck_dim was changed after reading: the configuration is then for a new adapter.

        Args:
            expected: names and shapes of this model's CROME tensors.
            source: name of the model for messages.
        Raises:
            ValueError: see `check_shapes`, `check_host_shapes` and `check_values`.
        """
        if self.bottleneck_dim not in (None, expected["crome_up.weight"][1]):
            return
        check_shapes(self.crome, expected, source)
        self.check_host_shapes(model)
        self.check_values()

    def check_host(
        self, modules_to_save: Iterable[str] | None, indices: Any = None, bottleneck_dim: int | None = None
    ) -> None:
        """Refuse weights for modules of the host that the configuration does not name. PEFT would overwrite those.

        An embedding table, which PEFT saves when a vocabulary has grown, causes a warning.

        Args:
            modules_to_save, indices, bottleneck_dim: values of the configuration beside the file; `indices` is
                `trainable_token_indices`.
        Raises:
            ValueError: there are such weights, or the trained tokens of file and configuration differ; lists them.
        """
        self.modules_to_save, self.bottleneck_dim = tuple(modules_to_save or ()), bottleneck_dim
        lists = token_lists(indices)
        rows = {shape[0] if shape else 0 for key, shape in self.host.items() if TRAINABLE_TOKENS in key}
        if rows != {len(ids) for ids in lists}:
            raise ValueError(
                f"{self.path} holds rows of {sorted(rows)} trained tokens, trainable_token_indices in the "
                f"adapter_config.json beside it {sorted(len(ids) for ids in lists)}. Download or save both again."
            )
        others = sorted(key for key in self.host if TRAINABLE_TOKENS not in key and not self._trains(host_path(key)))
        tables = [key for key in others if host_path(key).endswith(EMBEDDINGS)]
        strange = [key for key in others if key not in tables]
        if strange:
            raise ValueError(
                f"{self.path} holds weights that are neither CROME's nor of a module in modules_to_save="
                f"{modules_to_save}, and would overwrite the model's own: {strange[:3]} ({len(strange)} in all). "
                "Ask its author for a file that holds the adapter alone."
            )
        if tables:
            warnings.warn(
                f"{self.path} holds the model's own {tables}, and loading it replaces them. Save the adapter with "
                "save_embedding_layers=False if its vocabulary is the model's.",
                stacklevel=4,
            )

    def check_host_shapes(self, model: nn.Module) -> None:
        """Compare the trained copies of the host's modules with the modules, after `check_host`.

        Raises:
            ValueError: tensors are missing, or have another shape or kind; lists them.
        """
        if not self.host and not self.modules_to_save:
            return
        state = model.state_dict(keep_vars=True)
        state = {name: tensor for name, tensor in state.items() if ".modules_to_save." not in f".{name}"}
        # A weight that ZeRO-3 has partitioned is empty.
        host_shapes = {host_path(name): tuple(getattr(x, "ds_shape", x.shape)) for name, x in state.items()}
        integers = {host_path(name) for name, tensor in state.items() if not tensor.is_floating_point()}
        missing = set(filter(self._trains, host_shapes)) - set(map(host_path, self.host))
        if missing:
            raise ValueError(
                f"{self.path} lacks {sorted(missing)[:5]}, which modules_to_save={list(self.modules_to_save)} names. "
                "Download or save the adapter again."
            )
        wrong = [
            f"{key} has shape {shape}, the model's is {host_shapes[path]}"
            for key, shape in self.host.items()
            if (path := host_path(key)) in host_shapes and host_shapes[path] != shape
        ]
        wrong += [
            f"{key} holds {'integers' if key in self.counts else 'no integers'}, unlike the model's"
            for key in self.host
            if (path := host_path(key)) in host_shapes and (key in self.counts) != (path in integers)
        ]
        if wrong:
            raise ValueError(
                f"{self.path} does not fit {type(model).__name__}: {'; '.join(wrong[:5])}. Load it onto the backbone "
                "it was trained on."
            )

    def _trains(self, path: str) -> bool:
        """Whether a path in the host leads into a module of modules_to_save."""
        return any(f".{host_path(name)}." in f".{path}." for name in self.modules_to_save)

    def check_values(self) -> None:
        """Read the weights, one tensor at a time, and refuse non-finite values.

        Raises:
            ValueError: values are not finite; lists their keys.
        """
        keys = [*(KEY_PREFIX + key for key in self.crome), *self.host]
        wrong = [key for key, tensor in _read_tensors(self.path, keys) if not torch.isfinite(tensor).all()]
        if wrong:
            raise ValueError(
                f"{self.path} holds values that are NaN or infinite, in {sorted(wrong)[:5]}: every output would be. "
                "The training that wrote it diverged, or the file is damaged; take an earlier checkpoint."
            )


def read_adapter_file(model_id: str, subfolder: str | None = None, **hub_kwargs: Any) -> AdapterFile | None:
    """Read the header of the weights in an adapter directory or Hub repository.

    Without a safetensors file, a pickle (adapter_model.bin) is read with a warning. PyTorch's weights-only loader
    runs no code from it.

    Returns:
        The header; None if there is a configuration without weights.
    Raises:
        ValueError: the file is truncated, a pickle of anything but tensors, not a regular file, has no CROME weights,
            has another method's as well, or has weights in a dtype that adapters do not use.
    """
    path = _find(model_id, subfolder, hub_kwargs)
    if path is None:
        return None
    try:
        header = read_header(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of tensors alone, or is damaged, and was not loaded: a pickle may hold code. Ask "
            f"its author for {SAFETENSORS_WEIGHTS_NAME}."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Download or save the adapter again."
        ) from error
    accepted = ("crome_", TRAINABLE_TOKENS)
    others = tuple(f".{prefix}" for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix not in accepted)
    foreign = sorted(key for key in header if any(prefix in key for prefix in others))
    adapter_file = AdapterFile(path)
    for key, (shape, dtype) in header.items():
        if key.startswith(KEY_PREFIX):
            adapter_file.crome[key.removeprefix(KEY_PREFIX)] = shape
        else:
            adapter_file.host[key] = shape
            adapter_file.counts |= {key} if dtype in COUNTS else set()
    if not adapter_file.crome:
        raise ValueError(
            f"{path} holds no CROME weights: expected keys that start with {KEY_PREFIX!r}, found "
            f"{sorted(header)[:3]}. Load it with the PEFT method that wrote it."
        )
    if foreign:
        raise ValueError(
            f"{path} holds unexpected keys of another PEFT method beside CROME's: {foreign[:3]}. Save each adapter in "
            "a directory of its own."
        )
    dtypes = {key: dtype for key, (_, dtype) in header.items() if key not in adapter_file.counts}
    odd = sorted(f"{key} is {dtype}" for key, dtype in dtypes.items() if dtype not in DTYPES)
    if odd:
        raise ValueError(
            f"{path} holds weights in another dtype than {DTYPES}: {odd[:3]}. Save it again after "
            "model.to(torch.float32), or torch.bfloat16."
        )
    return adapter_file


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Map each key to its shape and safetensors' name of its dtype.

    safetensors refuses offsets that overlap, leave gaps or exceed the file, and sizes that overflow.
    """
    if path.name == WEIGHTS_NAME:
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
        tensors = _load_pickle(path)
        warnings.warn(
            f"{path} is a pickle. It was read without running code from it. Save the adapter again to have "
            f"{SAFETENSORS_WEIGHTS_NAME}.",
            stacklevel=5,
        )
        return {key: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for key, t in tensors.items()}
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if length > HEADER_LIMIT:
        raise SafetensorError(f"its header would be {length} bytes, more than {HEADER_LIMIT}")
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Load tensors by name, in the memory layout of safetensors.

    Raises:
        UnpicklingError: the file contains anything else, for which PyTorch's loader has no specific error.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # KeyError for text, RuntimeError for a truncated file, and others
        raise pickle.UnpicklingError(str(error)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        for key, value in tensors.items()
    ):
        raise pickle.UnpicklingError("no dictionary of tensors with values, by their names")
    return tensors


def _read_tensors(path: Path, keys: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
    if path.name == WEIGHTS_NAME:
        yield from _load_pickle(path).items()
        return
    with safe_open(path, framework="pt") as file:
        for key in keys:
            yield key, file.get_tensor(key)


def _find(model_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path | None:
    folder = Path(model_id) / (subfolder or "")
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        path = folder / name
        if path.is_file():  # follows links: a Hub snapshot is links to blobs
            return path
        if path.exists():
            raise ValueError(f"{path} is not a regular file. Download or save the adapter again.")
        if not folder.is_dir():
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub_kwargs))
    return None
