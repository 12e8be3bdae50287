"""Read and write the entry `crome` of an exported model's config.json, which describes its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KEY = "crome"  # in config.json
WEIGHTS = "crome.safetensors"
WEIGHTS_PREFIX = "crome."
ARGUMENT = "adapter_name"  # key in a request's mm_processor_kwargs
MODALITIES = {"vision": ("image", "video"), "audio": ("audio",)}
BASE_NAME, BASE = "__base__", -1  # PEFT's name for the model without an adapter


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter's shape.

    Attributes:
        sites: branch -> paths of the modules whose output it adapts, by transformers' names.
    """

    bottleneck_dim: int
    gate_activation: str
    sites: dict[str, list[str]]

    def branches_at(self, path: str) -> list[str]:
        """Return the branches that act at a module."""
        return [branch for branch, paths in self.sites.items() if path in paths]

    def modalities(self) -> set[str]:
        """Return vLLM's names of the items that the adapter changes."""
        return {modality for branch in self.sites for modality in MODALITIES.get(branch, ())}


@dataclass(frozen=True)
class Served:
    """All adapters of an exported model, and where the host's weights are.

    Attributes:
        host: a Hub repository, or the absolute path of a directory, with the host's weights; None: the weights are
            beside the adapters'.
        revision: revision of the repository.
    """

    hidden_size: int
    adapters: dict[str, ServedAdapter]
    host: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, config: Any) -> Served:
        """Read a host's configuration, an object or the dictionary of config.json."""
        values = dict(config[KEY] if isinstance(config, Mapping) else getattr(config, KEY))
        adapters = {name: ServedAdapter(**adapter) for name, adapter in values.pop("adapters").items()}
        return cls(adapters=adapters, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `of` reads."""
        return asdict(self)

    def sites(self) -> list[str]:
        """The modules at which any adapter acts."""
        paths = [path for adapter in self.adapters.values() for of in adapter.sites.values() for path in of]
        return list(dict.fromkeys(paths))

    def number(self, name: Any) -> int:
        """Return the index of an adapter; -1 for "__base__", the unchanged host.

        Args:
            name: name in a request; None if it names none, which is allowed for a single adapter.
        Raises:
            KeyError: the adapter does not exist; names the existing ones.
        """
        names = [*self.adapters]
        if name is None and len(names) == 1:
            return 0
        if name == BASE_NAME:
            return BASE
        if name in names:
            return names.index(name)
        problem = "The request names no adapter" if name is None else f"There is no adapter {name!r}"
        raise KeyError(
            f"{problem}; expected one of {[*names, BASE_NAME]}. Write "
            f'"mm_processor_kwargs": {{"{ARGUMENT}": "{names[0]}"}}.'
        )
