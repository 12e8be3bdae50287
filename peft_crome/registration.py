"""Make CROME one of PEFT's methods: extend its enum and its tables. The only place that changes PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "CROME"


def extend_peft_type() -> None:
    """Add the member `PeftType.CROME`; a second call, or a PEFT that has it, changes nothing.

    PEFT has no plug-in point, and an enum with members cannot be subclassed, so the member is entered where `enum`
    itself keeps members: by name, by value, in order and, where a Python keeps them, among the hashable values.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)  # type: ignore[attr-defined]
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)
    if hashable_values is not None:
        hashable_values.append(NAME)


def register() -> None:
    """Register the method with PEFT; idempotent."""
    extend_peft_type()
    if PeftType.CROME in PEFT_TYPE_TO_TUNER_MAPPING:  # type: ignore[attr-defined]
        return
    from .tuner import CromeConfig, CromeModel

    register_peft_method(name="crome", config_cls=CromeConfig, model_cls=CromeModel, is_mixed_compatible=False)
