#!/usr/bin/env python3
"""A LoRA-XS adapter of tiny-llama in the form in which the authors' code (MohammadrezaBanaei/LoRA-XS) saves it, and what it gives.

needs torch 2.15, transformers 5.23, peft 0.21.2
"""
import json, pathlib

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
folder = here / "lora_xs"
folder.mkdir(exist_ok=True)
torch.manual_seed(3)
model = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32)
config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
config.base_model_name_or_path = "tiny-llama"
model = peft.get_peft_model(model, config)
file = {}
for name, module in model.named_modules():
    if not isinstance(module, peft.tuners.lora.Linear):
        continue
    # The SVD is of the transposed weight; A is its first factor with the singular values, B its second, each transposed.
    u, s, v = torch.linalg.svd(module.get_base_layer().weight.detach().T, full_matrices=False)
    a, b, r = (u[:, :4] * s[:4]).T.contiguous(), v[:4].T.contiguous(), torch.randn(4, 4) * 0.3
    # PEFT's LoRA with R in B computes the same.
    module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = a, b @ r
    # PEFT of the authors' time takes ".default" out of `q_proj.default_lora_latent_mapping`, later ones leave it; one module each.
    latent = "_lora_latent_mapping" if name.endswith("q_proj") else ".default_lora_latent_mapping"
    file |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}{latent}.weight": r}
tokens = torch.randint(3, 259, (1, 23))
with torch.no_grad():
    logits = model(tokens).logits[0]
save_file(file, folder / "adapter_model.safetensors")
save_file({"tokens": tokens[0].to(torch.float32), "logits": logits.contiguous()}, folder / "golden.safetensors")
stored = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
(folder / "adapter_config.json").write_text(json.dumps({**stored, "inference_mode": True, "base_model_name_or_path": "tiny-llama"}, indent=2) + "\n")
