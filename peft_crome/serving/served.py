"""What an exported model's config.json says of its adapters, under the key `crome`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KEY = "crome"  # in config.json
WEIGHTS = "crome.safetensors"
WEIGHTS_PREFIX = "crome."
ARGUMENT = "adapter_name"  # of a request's mm_processor_kwargs
MODALITIES = {"vision": ("image", "video"), "audio": ("audio",)}
BASE_NAME, BASE = "__base__", -1  # PEFT's name for the model without an adapter


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter's shape.

    Attributes:
        sites: branch -> paths of the modules whose output it adapts, as transformers calls them.
    """

    bottleneck_dim: int
    gate_activation: str
    sites: dict[str, list[str]]

    def branches_at(self, path: str) -> list[str]:
        """The branches that act at a module."""
        return [branch for branch, paths in self.sites.items() if path in paths]

    def modalities(self) -> set[str]:
        """What vLLM calls the items that the adapter changes."""
        return {modality for branch in self.sites for modality in MODALITIES.get(branch, ())}


@dataclass(frozen=True)
class Served:
    """All adapters of an exported model, and where the host's weights are.

    Attributes:
        host, revision: a Hub repository with the host's weights; None: they lie beside the adapters'.
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
        """What `of` reads."""
        return asdict(self)

    def sites(self) -> list[str]:
        """The modules at which any adapter acts."""
        paths = [path for adapter in self.adapters.values() for of in adapter.sites.values() for path in of]
        return list(dict.fromkeys(paths))

    def number(self, name: Any) -> int:
        """The place of an adapter in the list; -1 for "__base__", the host as it is.

        Args:
            name: what a request says; None where it says nothing, which is enough for a single adapter.
        Raises:
            KeyError: there is no such adapter; says which there are.
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
