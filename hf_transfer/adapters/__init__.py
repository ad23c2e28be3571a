"""Bottleneck adapters as a PEFT method: importing this package registers it, and PEFT then treats it as its own."""

from __future__ import annotations

from peft.utils import register_peft_method

from hf_transfer.adapters.config import METHOD, BottleneckConfig
from hf_transfer.adapters.layer import BottleneckLayer
from hf_transfer.adapters.model import BottleneckModel
from hf_transfer.adapters.types import peft_type

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

peft_type(METHOD)
register_peft_method(name=METHOD, config_cls=BottleneckConfig, model_cls=BottleneckModel)
