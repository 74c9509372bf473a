"""Adapters from and to PEFT's models, without a file in between."""

from __future__ import annotations

from typing import Any


def _plain(value: Any) -> Any:
    """A configuration's value as JSON has it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # Enumerations of PEFT are texts.
    return value.value if hasattr(value, "value") else value


def parts(model: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and configuration of an adapter of a PEFT model, as PEFT would save them."""
    import peft

    if name not in model.peft_config:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(model.peft_config)}")
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
    return dict(tensors), _plain(model.peft_config[name].to_dict())


def attach(adapter: Any, model: Any, name: str) -> Any:
    """The PEFT model of a transformers or PEFT model with the adapter on it."""
    import peft
    import torch

    config = {key: value for key, value in adapter.config.items() if value is not None}
    config = peft.PeftConfig.from_peft_type(**config)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    tensors = {key: torch.from_numpy(array.copy()) for key, array in adapter.tensors().items()}
    result = peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"PEFT has no place for {len(result.unexpected_keys)} tensors, such as {result.unexpected_keys[0]}")
    return model
