"""The entry of PEFT's enumeration of methods that a third party's method needs."""

from __future__ import annotations

from peft.utils import PeftType


def peft_type(name: str) -> PeftType:
    """The member ``NAME`` of ``PeftType``, made where there is none.

    PEFT registers no method whose type is not a member, and its enumeration is closed (peft issue 2654). What is made
    here is what a line in PEFT's own source would make: a string that is equal to ``name.upper()``, found by name, by
    value, and when one goes through all of them.
    """
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        type.__setattr__(PeftType, value, member)
    return PeftType[value]
