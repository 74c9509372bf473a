#!/usr/bin/env python3
"""LoRAPrune's importance, schedule and masks over a short run, and LoRAM's slicing and recovery through transformers and PEFT.

usage: make_pruning.py [AUTHORS]    (needs torch, transformers, peft; see make.py for versions)

With the path of a checkout of aim-uofa/LoRAPrune, what is here is held against its functions too.
"""
import json, pathlib, sys, types

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

here = pathlib.Path(__file__).parent
out = here / "pruning"
out.mkdir(exist_ok=True)

# LoRAPrune: two layers, the last of which is protected; four heads without groups, as the authors' code has them.
LAYERS, HIDDEN, HEADS, INNER, RANK, STEPS, EVERY, RATIO, SCALING = 2, 8, 4, 10, 2, 20, 2, 0.5, 2.0
torch.manual_seed(11)
shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
          "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
tensors, modules = {}, {}
for layer in range(LAYERS):
    for name, (o, i) in shapes.items():
        path = f"model.layers.{layer}.{name}"
        modules[path] = [torch.randn(o, i), torch.randn(RANK, i) * 0.3, torch.randn(o, RANK) * 0.3]
        tensors |= {f"{path}.weight": modules[path][0], f"{path}.lora_A": modules[path][1].clone(), f"{path}.lora_B": modules[path][2].clone()}
gradients = [{path: (torch.randn_like(a) * 0.5, torch.randn_like(b) * 0.5) for path, (_, a, b) in modules.items()} for _ in range(STEPS)]


def sparsity(step):
    warm, cool = 0.1 * STEPS, 0.1 * STEPS
    if step <= warm:
        return 0.0
    if step > STEPS - cool:
        return RATIO
    return RATIO - RATIO * (1 - (step - warm) / (STEPS - warm - cool)) ** 3


def unit_sums(path, g, power):
    w, a, b = modules[path]
    importance = (g * (w + SCALING * (b @ a))).abs() ** power
    if path.endswith(("o_proj", "down_proj")):
        importance = importance.T
    if "self_attn" in path:
        importance = importance.reshape(HEADS, -1)
    sums = importance.sum(1)
    return sums / (torch.linalg.norm(sums) + 1e-8)


def run(score, power):
    """Average importance and masks after each step of layer 0, with the factors as they come to be."""
    for path, module in modules.items():
        module[1], module[2] = tensors[f"{path}.lora_A"].clone(), tensors[f"{path}.lora_B"].clone()
    average = {"self_attn": torch.zeros(HEADS), "mlp": torch.zeros(INNER)}
    masks = {part: torch.ones_like(u) for part, u in average.items()}
    record = []
    for step in range(STEPS):
        now = {part: torch.zeros_like(u) for part, u in average.items()}
        for name in shapes:
            path = f"model.layers.0.{name}"
            _, a, b = modules[path]
            ga, gb = gradients[step][path]
            g = 1.0 if score == "magnitude" else gb @ a + b @ ga - gb @ ga
            now[name.split(".")[0]] += unit_sums(path, g, power)
        ratio = sparsity(step)
        for part, u in average.items():
            average[part] = 0.9 * u + 0.1 * now[part]
            # The authors' condition, and one pruning more at the end of the ramp, so that the whole ratio is reached.
            if (step % EVERY == 0 and 0 < ratio < RATIO) or step == STEPS - 0.1 * STEPS:
                count = int(len(u) * (RATIO if step == STEPS - 0.1 * STEPS else ratio))
                masks[part] = torch.ones_like(u)
                masks[part][torch.argsort(average[part] * (record[-1]["mask"][part] if record else 1), stable=True)[:count]] = 0
        record.append({"average": {k: v.clone() for k, v in average.items()}, "mask": {k: v.clone() for k, v in masks.items()}})
        for path, (ga, gb) in gradients[step].items():
            modules[path][1] = modules[path][1] - 0.05 * ga
            modules[path][2] = modules[path][2] - 0.05 * gb
    return record


def check_authors(folder, record):
    """The authors' functions over the same run."""
    stub = types.ModuleType("loraprune.lora")
    stub.Linear = type("Linear", (torch.nn.Module,), {})
    stub.Linear8bitLt = type("Linear8bitLt", (torch.nn.Module,), {})
    package = types.ModuleType("loraprune")
    package.__path__ = []
    sys.modules |= {"loraprune": package, "loraprune.lora": stub}
    source = (pathlib.Path(folder) / "loraprune/utils.py").read_text().replace("NUM_ATTENTION_HEADS = 32", f"NUM_ATTENTION_HEADS = {HEADS}")
    utils = types.ModuleType("loraprune.utils")
    utils.__package__ = "loraprune"
    exec(compile(source, "utils.py", "exec"), utils.__dict__)
    named = {}
    for path in modules:
        module = stub.Linear()
        (o, i) = shapes[path.split(".", 3)[3]]
        module.weight = torch.nn.Parameter(tensors[f"{path}.weight"].clone())
        module.lora_A, module.lora_B = torch.nn.Linear(i, RANK, bias=False), torch.nn.Linear(RANK, o, bias=False)
        module.lora_A.weight.data, module.lora_B.weight.data = tensors[f"{path}.lora_A"].clone(), tensors[f"{path}.lora_B"].clone()
        module.is_prune, module.scaling, module.out_features = True, SCALING, o
        if not path.endswith(("o_proj", "down_proj")):
            module.register_buffer("lora_mask", torch.ones(o))
        named[f"base_model.model.{path}"] = module
    layers = types.SimpleNamespace(model=types.SimpleNamespace(layers=[0] * LAYERS))
    model = types.SimpleNamespace(named_modules=lambda: named.items(), model=layers)
    model.model.model = layers.model
    utils.freeze(model)
    sensitivity = utils.init_sensitivity_dict(model)
    for step in range(STEPS):
        for path in modules:
            module = named[f"base_model.model.{path}"]
            module.lora_A.weight.grad, module.lora_B.weight.grad = gradients[step][path]
        sensitivity = utils.update_sensitivity_dict(model, sensitivity, "lora")
        ratio = utils.schedule_sparsity_ratio(step, STEPS, 0.1, 0.1, 0, RATIO)
        assert abs(ratio - sparsity(step)) < 1e-12
        if step % EVERY == 0 and 0 < ratio < RATIO:
            utils.local_prune(model, sensitivity, ratio, RATIO)
        if step >= STEPS - 0.1 * STEPS:
            break
        for part, key, per in (("self_attn", "k_proj", HIDDEN // HEADS), ("mlp", "up_proj", 1)):
            own = sensitivity[f"base_model.model.model.layers.0.{part}"]
            assert torch.allclose(own, record[step]["average"][part], rtol=1e-5), (step, part)
            mask = named[f"base_model.model.model.layers.0.{part}.{key}"].lora_mask.reshape(-1, per)[:, 0]
            assert torch.equal(mask, record[step]["mask"][part]), (step, part, mask, record[step]["mask"][part])
        for path, (ga, gb) in gradients[step].items():
            module = named[f"base_model.model.{path}"]
            module.lora_A.weight.data -= 0.05 * ga
            module.lora_B.weight.data -= 0.05 * gb
    assert all(torch.all(m.lora_mask == 1) for n, m in named.items() if ".layers.1." in n and hasattr(m, "lora_mask"))
    print("equal to the authors' functions")


cases = {"lora": ("lora", 1), "squared": ("lora", 2), "magnitude": ("magnitude", 1)}
for name, (score, power) in cases.items():
    record = run(score, power)
    for part in ("self_attn", "mlp"):
        tensors[f"{name}.{part}.average"] = torch.stack([r["average"][part] for r in record])
        tensors[f"{name}.{part}.mask"] = torch.stack([r["mask"][part] for r in record])
    if name == "lora" and len(sys.argv) > 1:
        check_authors(sys.argv[1], record)
for path in modules:
    tensors[f"{path}.gA"] = torch.stack([g[path][0] for g in gradients])
    tensors[f"{path}.gB"] = torch.stack([g[path][1] for g in gradients])
tensors["sparsity"] = torch.tensor([sparsity(step) for step in range(STEPS)], dtype=torch.float64)
save_file({k: v.contiguous() for k, v in tensors.items()}, out / "loraprune.safetensors")

# LoRAM: tiny-llama keeps one of two groups and twenty of forty-eight channels.
torch.manual_seed(5)
base = here / "tiny-llama"
whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
config = LlamaConfig.from_pretrained(base)
d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
kept = []
for layer in range(config.num_hidden_layers):
    kv = [1 - layer]
    kept.append({"heads": [h for k in kv for h in range(k * group, (k + 1) * group)], "kv_heads": kv,
                 "channels": sorted(torch.randperm(config.intermediate_size)[:20].tolist())})


def rows(units, width):
    return torch.tensor([u * width + i for u in units for i in range(width)])


def index(role, layer):
    """Kept rows (dimension 0) or columns (1) of a projection."""
    k = kept[layer]
    return {"q_proj": (0, rows(k["heads"], d)), "k_proj": (0, rows(k["kv_heads"], d)), "v_proj": (0, rows(k["kv_heads"], d)),
            "o_proj": (1, rows(k["heads"], d)), "gate_proj": (0, rows(k["channels"], 1)), "up_proj": (0, rows(k["channels"], 1)),
            "down_proj": (1, rows(k["channels"], 1))}[role]


def place(name):
    """Layer and role of a tensor of a layer's projection."""
    parts = name.split(".")
    role = next((p for p in parts if p.endswith("_proj")), None)
    return (int(parts[parts.index("layers") + 1]), role) if role else None


state = whole.state_dict()
sliced = {n: (t.index_select(*((index(place(n)[1], place(n)[0]))[:2])) if place(n) else t) for n, t in state.items()}
smaller = LlamaConfig.from_pretrained(base, num_attention_heads=group, num_key_value_heads=1, intermediate_size=20)
smaller = LlamaForCausalLM(smaller).eval()
smaller.load_state_dict(sliced)
tokens = torch.tensor([[1, 7, 9, 3, 11, 12, 30, 4, 22, 8, 2, 17]])
logits = {"tokens": tokens[0], "sliced": smaller(tokens).logits[0]}
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
adapter = get_peft_model(smaller, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
for name, p in adapter.named_parameters():
    if "lora_" in name:
        p.data = torch.randn_like(p) * 0.2
adapter.eval()
logits["small"] = adapter(tokens).logits[0]
adapter.save_pretrained(out / "small")
(out / "small/README.md").unlink(missing_ok=True)
settings = json.loads((out / "small/adapter_config.json").read_text()) | {"base_model_name_or_path": "pruned", "target_modules": targets}
(out / "small/adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
wide = {}
for name, t in load_file(out / "small/adapter_model.safetensors").items():
    if ".lora_" not in name:
        continue
    if place(name):
        dim, where = index(place(name)[1], place(name)[0])
        if ("lora_B" in name) == (dim == 0):
            full = torch.zeros(state[name.replace("base_model.model.", "").split(".lora_")[0] + ".weight"].shape[dim] if dim == 0 else t.shape[0],
                               t.shape[1] if dim == 0 else state[name.replace("base_model.model.", "").split(".lora_")[0] + ".weight"].shape[1])
            full.index_copy_(dim, where, t)
            t = full
    wide[name] = t
folder = out / "recovered"
folder.mkdir(exist_ok=True)
save_file({n: t.contiguous() for n, t in wide.items()}, folder / "adapter_model.safetensors")
(folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "tiny-llama"}, indent=2) + "\n")
logits["recovered"] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()(tokens).logits[0]
save_file({n: t.detach().clone().contiguous() for n, t in logits.items()}, out / "loram.safetensors")
(out / "kept.json").write_text(json.dumps(kept) + "\n")
