"""Check the releases of transformers and PEFT, and bridge their differences.

Only this module compares versions. Each entry names the lower bound in pyproject.toml with which it can go.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# As in pyproject.toml. transformers 5.0 to 5.5 load an adapter's file without its weights, and only log a report.
SUPPORTED = {
    "transformers": ">=4.57.6,!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,!=5.4.*,!=5.5.*,<6",
    "peft": ">=0.20,<1",
}
# The newest release of tests/matrix.toml.
NEWEST_TESTED = {"transformers": "5.24", "peft": "0.21"}
COMPOSITE = ">=5.12,<6"  # goes with transformers 5.12


def check_installed() -> None:
    """Check the installed releases before they are imported.

    Raises:
        ImportError: one is too old or too new; names it, the range and what to write.
    """
    for name, supported in SUPPORTED.items():
        installed = Version(version(name))
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            raise ImportError(_wrong_release(name, supported, "peft_crome"), name=name)
        newest = Version(NEWEST_TESTED[name])
        if installed.release[:2] > newest.release[:2]:
            warnings.warn(
                f"{name} {installed} is newer than {newest}, the newest release that this peft_crome was tested with. "
                f'If something fails, write: pip install "{name}=={newest}.*"',
                stacklevel=3,
            )


def has_composite() -> bool:
    """Whether the composite works with the installed transformers; the adapter works with older ones as well."""
    return SpecifierSet(COMPOSITE).contains(version("transformers"), prereleases=True)


def check_composite() -> None:
    """Check the installed transformers before the composite is imported.

    Raises:
        ImportError: transformers is too old for the composite.
    """
    if not has_composite():
        raise ImportError(_wrong_release("transformers", COMPOSITE, "CromeVLMForConditionalGeneration"))


def _wrong_release(name: str, supported: str, what: str) -> str:
    return (
        f"{what} needs {name}{supported}, and {name} {version(name)} is installed. "
        f'Write: pip install "{name}{supported}"'
    )


def chat_arguments(processor_kwargs: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Build the further arguments of transformers' `apply_chat_template`.

    Before transformers 5.23, arguments that no chat template reads replaced `processor_kwargs` instead of joining
    them. There they are passed together. Goes with transformers 5.23.

    Args:
        processor_kwargs: arguments of the processor's call.
        others: further arguments of the caller.
    """
    replaced = bool(others) and Version(version("transformers")) < Version("5.23")
    return {**processor_kwargs, **others} if replaced else others


def keeps_logits_by_token() -> bool:
    """Whether `logits_to_keep` may be a mask of tokens, not only common positions. Goes with transformers 5.21."""
    return Version(version("transformers")) >= Version("5.21")


def names_of_ties(model: Any) -> set[str]:
    """Return the names of the weights that a model's configurations tie together.

    transformers before 5.0 does not list them. Goes with transformers 5.0.
    """
    if hasattr(model, "get_expanded_tied_weights_keys"):
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        return {*tied.keys(), *tied.values()}
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def check_before_loading(peft_type: str, check: Callable[[Any, str, dict[str, Any]], None]) -> None:
    """Let a method check tensors before PEFT loads them; PEFT 0.21 asks the tuner. Goes with PEFT 0.21; idempotent.

    Args:
        peft_type: type of the method.
        check: called with model, adapter name and tensors; raises ValueError or returns.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import AuxiliaryTrainingWrapper

    load = peft.set_peft_model_state_dict
    if hasattr(BaseTuner, "_remap_adapter_state_dict_for_load") or getattr(load, "checks_first", False):
        return

    @functools.wraps(load)
    def check_and_load(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if model.peft_config[adapter_name].peft_type == peft_type:
            tensors = dict(peft_model_state_dict)
            for path, module in model.named_modules():  # PEFT renames these tensors before it asks a tuner
                if isinstance(module, AuxiliaryTrainingWrapper):
                    for stored, name in module.adapter_state_dict_load_map(adapter_name).items():
                        if f"{path}.{stored}" in tensors:
                            tensors[f"{path}.{name}"] = tensors.pop(f"{path}.{stored}")
            check(model, adapter_name, tensors)
        return load(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    check_and_load.checks_first = True  # type: ignore[attr-defined]
    for module in list(sys.modules.values()):  # every module that has imported the function
        if getattr(module, "__dict__", {}).get("set_peft_model_state_dict") is load:
            module.set_peft_model_state_dict = check_and_load  # type: ignore[attr-defined]


def load_copies(model: Any, path: str, hub_arguments: dict[str, Any]) -> None:
    """Load the weights that `modules_to_save` trained into a model that has just loaded an adapter.

    Before 5.17 transformers' `load_adapter` silently leaves these tensors out. Goes with transformers 5.17.

    Args:
        path: directory or repository of the adapter.
        hub_arguments: arguments of `hf_hub_download`.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from peft.utils import AuxiliaryTrainingWrapper

    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        tensors = load_peft_weights(path, device="cpu", **hub_arguments)
        # An adapter inside the model has no such prefix.
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        set_peft_model_state_dict(model, tensors)
