#!/usr/bin/env python3
"""A FlyLoRA adapter of tiny-llama as the authors' code saves it, and what it gives: flylora/.

usage: make_flylora.py FOLDER      (needs torch 2.15, transformers 5.23; FOLDER: gfyddha/FlyLoRA at 91d9e36, whose changed PEFT is run)

Their layer asks its arguments for a configuration that their own dispatcher takes away; it is given back here. Each forward moves d after it has
chosen, in evaluation too, so the file is saved before the only one.
"""
import json, pathlib, sys

sys.path.insert(0, str(pathlib.Path(sys.argv[1]) / "peft" / "src"))
import peft
import torch
import transformers
from peft.tuners.lora import layer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert peft.__version__ == "0.15.2.dev0", peft.__version__
transformers.utils.logging.disable_progress_bar()
here = pathlib.Path(__file__).parent
folder = here / "flylora"
torch.manual_seed(5)
config = peft.LoraConfig(r=8, lora_alpha=16, top_k=2, bias_u=0.01, init_lora_weights="sparse", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
init = layer.Linear.__init__
layer.Linear.__init__ = lambda self, *args, **more: init(self, *args, lora_config=config, **more)
model = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32)
model = peft.get_peft_model(model, config).eval()
for module in model.modules():
    if isinstance(module, layer.Linear):
        module.lora_B["default"].weight.data.normal_(std=0.5)
        # Of the size of A x, so that the choice is often another without it.
        module.lora_topk_bias["default"].data.normal_(std=0.1)
model.save_pretrained(folder)
(folder / "README.md").unlink(missing_ok=True)
stored = json.loads((folder / "adapter_config.json").read_text())
stored["target_modules"].sort()
(folder / "adapter_config.json").write_text(json.dumps({**stored, "base_model_name_or_path": "tiny-llama"}, indent=2) + "\n")
tokens = torch.randint(3, 259, (1, 23))
with torch.no_grad():
    logits = model(tokens).logits[0]
    without = [module for module in model.modules() if isinstance(module, layer.Linear)]
    # What is not to be confused with it: every rank acting, and no d.
    for module in without:
        module.top_k["default"] = 8
    dense = model(tokens).logits[0]
    for module in without:
        module.top_k["default"] = 2
        module.lora_topk_bias["default"].data.zero_()
    unbiased = model(tokens).logits[0]
print("every rank acting differs by", (logits - dense).abs().max().item(), "and no bias by", (logits - unbiased).abs().max().item())
save_file({"tokens": tokens[0].to(torch.float32), "logits": logits.contiguous()}, folder / "golden.safetensors")
for name in "adapter_model.safetensors", "golden.safetensors":
    (folder / name).chmod(0o644)
print(sorted(load_file(folder / "adapter_model.safetensors"))[:3])
