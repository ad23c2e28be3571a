"""What a run depends on beside its recipe: versions, platform and devices; ``hf-transfer env`` prints it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "scikit-learn",
    "numpy",
)
"""Whose versions decide what a run computes."""


def version(distribution: str) -> str | None:
    """The installed version of a distribution, read from its metadata without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's, our own and every installed one of :data:`PACKAGES`; cheap, and what a run folder keeps."""
    from hf_transfer import __version__

    found = {name: installed for name in PACKAGES if (installed := version(name))}
    return {"python": platform.python_version(), "hf-transfer-learning": __version__, **found}


def environment() -> dict[str, str]:
    """What a bug report needs to say, line by line: versions, platform, devices with their bf16 support, bitsandbytes.

    Imports torch, and bitsandbytes where it is installed.
    """
    lines = versions()
    lines["platform"] = f"{platform.platform()}, {os.cpu_count()} cores"
    lines.update(_devices())
    lines["bitsandbytes"] = _bitsandbytes()
    lines["name clash"] = name_clash() or "none"
    return lines


def name_clash() -> str | None:
    """What to do where an unrelated package of the same import name shares our folder; None where it does not.

    That package is a download accelerator which Hub clients before 1.0 used. Both install into the folder
    ``hf_transfer``: the later one wins, and removing either breaks the other. It shows by its metadata, or by the
    extension module that an incomplete removal leaves behind.
    """
    folder = Path(__file__).parent
    other = version("hf_transfer")
    found = f"the distribution 'hf_transfer' {other}" if other else next(map(str, folder.glob("*.abi3.so")), None)
    if found is None:
        return None
    return (
        f"{found} is an unrelated download accelerator that overwrites this package's files. Remove it "
        "(pip uninstall hf_transfer; nothing current needs it), then install this one again "
        "(pip install --force-reinstall --no-deps hf-transfer-learning)."
    )


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        backend = torch.get_device_module(accelerator)
        bf16 = "of unknown support"
        if hasattr(backend, "is_bf16_supported"):
            bf16 = "in hardware" if backend.is_bf16_supported(including_emulation=False) else "emulated"
        for index in range(torch.accelerator.device_count()):
            named = backend.get_device_name(index) if hasattr(backend, "get_device_name") else accelerator.type
            yield f"{accelerator.type}:{index}", f"{named}, bf16 {bf16}"
    features = torch.cpu.get_capabilities()
    bf16 = "in hardware" if any(present for name, present in features.items() if "bf16" in name) else "emulated"
    yield "cpu", f"{features.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads, bf16 {bf16}"


def _bitsandbytes() -> str:
    installed = version("bitsandbytes")
    if installed is None:
        return "not installed (pip install 'hf-transfer-learning[quantization]')"
    try:
        from bitsandbytes import cextension
    except Exception as error:  # its import runs device probes that fail in many ways: the reader needs to know how
        return f"{installed}, but it does not import: {error}"
    works = not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    return f"{installed}, native library {'loaded' if works else 'NOT loaded'}"
