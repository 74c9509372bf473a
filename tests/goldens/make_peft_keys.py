#!/usr/bin/env python3
"""Writes peft_keys.json: every key of the configurations that Lorimer reads with its default, and the targets that PEFT takes where a
configuration names none, as the installed peft (0.21.2) has them. Where a newer peft has a key more, the file changes and a test asks
what is to become of it.

usage: make_peft_keys.py
"""
import dataclasses, json, pathlib

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

KINDS = ["LORA", "MISS", "RANDLORA", "VERA", "SHIRA"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def default(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


configs, targets = {}, {}
for kind in KINDS:
    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    values = {f.name: default(f) for f in fields}
    # Written by no file, see PEFT's `to_dict`.
    values["runtime_config"] = None
    values["peft_type"] = kind
    configs[kind] = {key: values[key] for key in sorted(values) if key in {f.name for f in fields} | {"peft_type"}}
    mapping = PEFT_TYPE_TO_TUNER_MAPPING[kind].target_module_mapping
    targets[kind] = {family: mapping[family] for family in FAMILIES}
out = pathlib.Path(__file__).parent / "peft_keys.json"
out.write_text(json.dumps({"configs": configs, "targets": targets}, indent=1, default=str) + "\n")
