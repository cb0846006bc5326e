"""Imports openrlhf.models where flash-attn and deepspeed are not installed.

Neither is called by what the tests run: OpenRLHF's loss and, without packing, its actor.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

STUBS = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "pylatexenc": ("latex2text",),
}


def import_openrlhf() -> ModuleType:
    stubbed = []
    for name, attributes in STUBS.items():
        if name in sys.modules or ("." not in name and importlib.util.find_spec(name)):
            continue
        stub = ModuleType(name)
        stub.__path__ = []  # a package
        stub.__spec__ = ModuleSpec(name, None, is_package=True)
        for attribute in attributes:
            setattr(stub, attribute, None)  # calling it is a TypeError
        sys.modules[name] = stub
        stubbed.append(name)
    try:
        return importlib.import_module("openrlhf.models")
    finally:
        # Others ask whether these are installed.
        for name in stubbed:
            del sys.modules[name]
