"""vLLM's model classes with CROME's branches at the same sites as in transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...tuner import CromeConfig, CromeLayer, CromeWeights
from ..served import BASE, WEIGHTS_PREFIX, Served
from . import PREFIX
from .processing import FIELD, choosing


def __getattr__(name: str) -> type[nn.Module]:
    """Create the class of an architecture `Crome...`."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_branches(ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls())


def with_branches(host: type[nn.Module]) -> type[nn.Module]:
    """Subclass a vLLM model class so that it adds a request's adapter to its projector's output.

    Raises:
        ValueError: the class takes no images.
    """
    if not supports_multimodal(host) or host.supports_multimodal_raw_input_only:
        raise ValueError(
            f"vLLM's {host.__name__} has no embed_multimodal, so an adapter of images has no place in it."
        )
    adapted = type(PREFIX + host.__name__, (Branches, host), {"__module__": __name__})
    made_by = host._processor_factory
    register = MULTIMODAL_REGISTRY.register_processor(
        choosing(made_by.processor), info=made_by.info, dummy_inputs=made_by.dummy_inputs
    )
    return register(adapted)


class Branches:
    """Mix-in in front of the host's class."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        served = Served.of(vllm_config.model_config.hf_config)
        self.adapter_names = [*served.adapters]
        self.crome = CromeWeights()
        for name, adapter in served.adapters.items():
            config = CromeConfig(bottleneck_dim=adapter.bottleneck_dim, gate_activation=adapter.gate_activation)
            self.crome.add(name, config, adapter.sites, served.hidden_size, rms=1.0)
        self.acting_on = {name: adapter.modalities() for name, adapter in served.adapters.items()}
        self.chosen: list[str] = []  # the adapter of the items that are being embedded
        self.acted: set[str] = set()
        for path in served.sites():
            self._add_site(path, {name: adapter.branches_at(path) for name, adapter in served.adapters.items()})
        if served.host is not None:
            self.secondary_weights = [DefaultModelLoader.Source(served.host, served.revision)]

    def _add_site(self, path: str, branches: dict[str, list[str]]) -> None:
        layer = CromeLayer(nn.Identity(), self.crome, self.crome.out_features)
        layer.branches_of = {name: {branch: [] for branch in of} for name, of in branches.items() if of}
        module = self._module(path)
        forward = module.forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            names = [name for name in self.chosen if name in layer.branches_of]
            self.acted.update(names)
            output = forward(*args, **kwargs)
            return layer.adapt(output, names) if names else output

        module.forward = adapted  # no hook: compilable modules of vLLM override __call__

    def _module(self, path: str) -> nn.Module:
        """Find vLLM's module for a transformers path, by vLLM's mapping of weight names."""
        mapper = getattr(self, "hf_to_vllm_mapper", None)
        names = [path, path.removeprefix("model.")]
        names += [mapped[:-1] for name in names if mapper is not None and (mapped := mapper._map_name(name + "."))]
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        for name in reversed(names):
            if name in modules:
                return modules[name]
        raise ValueError(
            f"vLLM's {type(self).__mro__[2].__name__} has no module {path!r}, where this adapter acts; looked for "
            f"{sorted(set(names))}. Serve it with transformers: model.generate(...)."
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Compute the host's embeddings, with the branch of the adapter that the items were processed for."""
        ((modality, number),) = {
            (key.removeprefix(FIELD), int(kwargs.pop(key))) for key in [*kwargs] if key.startswith(FIELD)
        }
        self.chosen = [] if number == BASE else [self.adapter_names[number]]
        self.acted.clear()
        try:
            embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        finally:
            chosen, self.chosen = self.chosen, []
        silent = [name for name in chosen if modality in self.acting_on[name] and name not in self.acted]
        if silent:
            raise RuntimeError(
                f"{type(self).__name__} embedded an item of the kind {modality!r} without the adapter {silent[0]!r}: "
                "vLLM compiled the module that it acts on, or did not run it. Leave compile_mm_encoder and "
                "cudagraph_mm_encoder out."
            )
        return embeddings

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the adapters' matrices, and pass the other weights to the host's class."""
        parameters = dict(self.crome.named_parameters())
        loaded: set[str] = set()

        def of_host() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if not name.startswith(WEIGHTS_PREFIX):
                    yield name, weight
                    continue
                parameters[name.removeprefix(WEIGHTS_PREFIX)].data.copy_(weight)
                loaded.add(name)

        by_host = super().load_weights(of_host())  # type: ignore[misc]
        return loaded | set(by_host or ())
