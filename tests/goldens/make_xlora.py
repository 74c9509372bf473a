#!/usr/bin/env python3
"""X-LoRA on tiny-llama as PEFT 0.21.2 computes it: xlora/experts, xlora/<case>, xlora/authors, xlora/lost and xlora/sites.json.

usage: make_xlora.py      (needs torch 2.15, transformers 5.23, peft 0.21.2)

Each case is a folder that PEFT loads while it is the current one (the experts' paths in it are relative), with golden.safetensors:
  tokens       (2, 11)
  hidden       (2, 11, hidden)        the hidden states that the head sees
  scalings     (2, 11, sites, n)      λ as get_latest_scalings gives it, before top-k
  gates        (2, 11, sites, n)      what multiplies a site's input, after top-k; without global_scaling_weight
  logits       (22, vocabulary)
  grad.K       of the mean next-token loss, by the head's tensors K (layers.N.weight, layers.N.bias)
  losses       (4): before each of three AdamW steps (1e-2, decay 0.01) on the head alone, and after them
  trained.K    the head after them
Everything in evaluation mode. An implementation of its own, below, is held against PEFT in all of it, and shows that decoding with a cache for each
of the two passes gives what computing everything again gives.
"""
import json, os, pathlib, shutil, sys

import torch
import transformers
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
here = pathlib.Path(__file__).resolve().parent
root = here / "xlora"

# Each lacks sites that another has; none has o_proj, and only the second has k_proj.
EXPERTS = [
    dict(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
    dict(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"k_proj": 5}, target_modules=["down_proj", "gate_proj", "k_proj", "v_proj"]),
    dict(r=3, lora_alpha=3, layers_to_transform=[1], target_modules=["down_proj", "gate_proj", "q_proj"]),
]
CASES = {
    "layerwise": dict(layerwise_scalings=True),
    "shared": dict(),
    "depth2_shared": dict(xlora_depth=2, xlora_size=16),
    "depth3": dict(layerwise_scalings=True, xlora_depth=3, xlora_size=16),
    "depth3_no_dropout": dict(layerwise_scalings=True, xlora_depth=3, xlora_size=16, xlora_dropout_p=0.0),
    "top_k": dict(layerwise_scalings=True, top_k_lora=2),
    "top_k_softmax": dict(layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True),
    "top_k_both_softmaxes": dict(layerwise_scalings=True, top_k_lora=2, enable_softmax_topk=True),
    "top_k_raw": dict(layerwise_scalings=True, top_k_lora=1, enable_softmax=False),
    "raw": dict(layerwise_scalings=True, enable_softmax=False),
    "temperature": dict(layerwise_scalings=True, softmax_temperature=0.4),
    "global_weight": dict(layerwise_scalings=True, global_scaling_weight=1.7),
    "pass_value": dict(layerwise_scalings=True, scaling_pass_value=0.3, global_scaling_weight=1.7),
    # The weight of its head is 0, so that λ is the bias's, whatever the token.
    "constant": dict(layerwise_scalings=True, global_scaling_weight=1.7),
}
ids = torch.randint(3, 259, (2, 11), generator=torch.Generator().manual_seed(11))


def base():
    model = LlamaForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 259), ids[:, 1:].reshape(-1))


def tidy(folder):
    """What does not belong to the files: the card, the base's path, sets in no order."""
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny-llama"
    for key in "target_modules", "layers_to_transform":
        if isinstance(config.get(key), list):
            config[key].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save(model, folder):
    """PEFT's own save_pretrained with the experts out of its sight: 0.20 and 0.21 take the numbers in the head's names for the experts' names, and
    leave those tensors out (see xlora/lost)."""
    configs = model.peft_config
    experts = {name: configs.pop(name) for name in list(configs) if name != "default"}
    model.save_pretrained(folder)
    configs.update(experts)
    tidy(folder)


class Reference:
    """X-LoRA from its equations and the files alone."""

    def __init__(self, folder, experts=None):
        config = self.config = json.loads((folder / "adapter_config.json").read_text())
        names = config["adapters"]
        paths = experts or [folder / names[str(i)] for i in range(len(names))]
        self.model = base()
        self.factors = []
        for path in paths:
            lora, tensors = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
            sites = {}
            for key, a in tensors.items():
                if key.endswith(".lora_A.weight"):
                    site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    last = site.rpartition(".")[2]
                    r, alpha = lora["rank_pattern"].get(last, lora["r"]), lora["alpha_pattern"].get(last, lora["lora_alpha"])
                    scale = alpha / (r ** 0.5 if lora["use_rslora"] else r)
                    sites[site] = a, tensors[key.replace("lora_A", "lora_B")], scale
            self.factors.append(sites)
        # In the order in which the model registers its modules, not the alphabet's: q, k, v, gate, up, down.
        self.sites = [name for name, _ in self.model.named_modules() if any(name in sites for sites in self.factors)]
        self.head = {key.removeprefix("base_model.internal_xlora_classifier."): t for key, t in load_file(folder / "adapter_model.safetensors").items()}
        self.gates = None
        for l, site in enumerate(self.sites):
            linear = self.model.get_submodule(site)
            linear.forward = lambda x, linear=linear, l=l, site=site: self.site(x, linear, l, site)

    def site(self, x, linear, l, site):
        y = torch.nn.functional.linear(x, linear.weight, linear.bias)
        if self.gates is None:
            return y
        for i, sites in enumerate(self.factors):
            if site in sites:
                a, b, scale = sites[site]
                y = y + self.config["global_scaling_weight"] * scale * ((self.gates[:, :, l, i, None] * x) @ a.T) @ b.T
        return y

    def kept(self, scalings):
        """λ after top-k, and the softmax over what it left."""
        if (k := self.config["top_k_lora"]) is not None:
            scalings = torch.where(torch.zeros_like(scalings).scatter(-1, scalings.topk(k, -1).indices, 1) > 0, scalings, 0)
        if self.config["enable_softmax_topk"]:
            there = scalings != 0
            scalings = torch.where(there, scalings, -torch.inf).softmax(-1).where(there.any(-1, keepdim=True), 0)
        return scalings

    def scalings(self, hidden):
        numbers = sorted({int(key.split(".")[1]) for key in self.head})
        for n in numbers:
            hidden = torch.nn.functional.linear(hidden, self.head[f"layers.{n}.weight"], self.head[f"layers.{n}.bias"])
            if n != numbers[-1]:
                hidden = hidden.relu()
        logits = hidden.unflatten(-1, (-1, len(self.factors)))
        if not self.config["layerwise_scalings"]:
            logits = logits.expand(-1, -1, len(self.sites), -1)
        return (logits / self.config["softmax_temperature"]).softmax(-1) if self.config["enable_softmax"] else logits

    def forward(self, tokens, caches=(None, None)):
        cached = [dict(past_key_values=cache, use_cache=cache is not None) for cache in caches]
        constant = torch.full((*tokens.shape, len(self.sites), len(self.factors)), self.config["scaling_pass_value"])
        self.gates = self.kept(constant)
        with torch.no_grad():
            hidden = self.model.model(tokens, **cached[0]).last_hidden_state
        scalings = self.scalings(hidden)
        self.gates = self.kept(scalings)
        return hidden, scalings, self.gates, self.model(tokens, **cached[1]).logits


def close(what, a, b, tolerance=1e-5):
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"{what} differs by {difference:.2e}"


shutil.rmtree(root, ignore_errors=True)
for i, settings in enumerate(EXPERTS):
    torch.manual_seed(20 + i)
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.2)
    model.save_pretrained(root / "experts" / str(i))
    tidy(root / "experts" / str(i))

adapters = {str(i): f"../experts/{i}" for i in range(len(EXPERTS))}
for number, (name, settings) in enumerate(CASES.items()):
    folder = root / name
    folder.mkdir()
    os.chdir(folder)
    model = get_peft_model(base(), XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **settings)).eval()
    head = model.base_model.internal_xlora_classifier.layers
    torch.manual_seed(40 + number)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(0, 0.3)
        if name == "constant":
            head[0].weight.zero_()
            head[0].bias.mul_(4)
    save(model, folder)
    # PEFT reads it as it was.
    logits = model(ids).logits
    with torch.no_grad():
        close("what is loaded", PeftModel.from_pretrained(base(), ".").eval()(ids).logits, logits, 0)
    seen = {}
    compute = head.forward
    head.forward = lambda hidden: compute(seen.setdefault("hidden", hidden))
    taken = []

    def watched(layer):
        gate = layer.get_maybe_topk_scalings

        def forward(scalings):
            taken.append((layer.layer_number, gate(scalings)))
            return taken[-1][1]
        return forward

    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer = module.forward.__self__
            layer.get_maybe_topk_scalings = watched(layer)
    logits = model(ids).logits
    loss = loss_of(logits)
    loss.backward()
    sites = [key.removeprefix("base_model.lora_model.model.") for key, module in model.named_modules() if hasattr(module, "lora_A")]
    assert [l for l, _ in taken] == 2 * list(range(len(sites))), "a site's number is not its place in the model"
    scalings = model.base_model.get_latest_scalings().detach()
    gates = torch.stack([gate for _, gate in taken[len(sites):]], 2).detach()
    golden = {"tokens": ids.to(torch.float32), "hidden": seen["hidden"], "scalings": scalings, "gates": gates, "logits": logits.detach().reshape(-1, 259)}
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == {id(p) for p in head.parameters()}, "more than the head is trained"
    golden |= {"grad." + key.removeprefix("base_model.internal_xlora_classifier."): p.grad.clone() for key, p in trainable.items()}

    reference = Reference(folder)
    assert reference.sites == sites
    for t in reference.head.values():
        t.requires_grad = True
    h, s, g, out = reference.forward(ids)
    loss_of(out).backward()
    for what, a, b in ("hidden", h, golden["hidden"]), ("λ", s, scalings), ("gates", g, gates), ("logits", out, logits):
        close(f"{name}: {what}", a, b, 2e-5)
    for key, t in reference.head.items():
        close(f"{name}: gradient of {key}", t.grad, golden["grad." + key])
    caches = DynamicCache(config=reference.model.config), DynamicCache(config=reference.model.config)
    with torch.no_grad():
        parts = [reference.forward(part, caches)[3] for part in (ids[:, :4], *ids[:, 4:].split(1, 1))]
    close(f"{name}: with two caches", torch.cat(parts, 1), logits, 2e-5)

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(3):
        loss = loss_of(model(ids).logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(loss_of(model(ids).logits).item())
    golden |= {"losses": torch.tensor(losses)} | {f"trained.layers.{key}": p.detach() for key, p in head.named_parameters()}
    save_file({key: t.detach().contiguous() for key, t in golden.items()}, folder / "golden.safetensors")
    print(f"{name:22} λ {scalings.min():.3f} … {scalings.max():.3f}   losses {' '.join(f'{l:.4f}' for l in losses)}")
    print("   ", ", ".join(f"{key} {list(t.shape)}" for key, t in sorted(load_file('adapter_model.safetensors').items())))

# What 0.21.2 itself saves: of the head of three layers the first is not there, since "0" is an expert.
folder = root / "lost"
os.chdir(root / "depth3")
model = PeftModel.from_pretrained(base(), ".")
model.save_pretrained(folder)
for i in range(len(EXPERTS)):
    # Copies of the base with what is left of the experts, under names that nothing loads.
    shutil.rmtree(folder / str(i))
tidy(folder)
print("lost: only", ", ".join(sorted(load_file(folder / "adapter_model.safetensors"))))

# The form of the authors' code (EricLBuehler/xlora): their head has its last layer apart, and their experts' names mean something. `authors` is depth3,
# `authors_linear` a head of two layers without ReLU and biases, `authors_default` one of three whose configuration does not say whether there are ReLU,
# dropout and biases: by the package's defaults only biases.
ORDER = ["chemistry", "biology", "arithmetic"]


def authors(name, tensors, settings):
    folder = root / name
    folder.mkdir()
    save_file(tensors, folder / "xlora_classifier.safetensors")
    config = dict(hidden_size=32, base_model_id="tiny-llama", adapters=ORDER, enable_softmax=True, enable_softmax_topk=False, layerwise_scalings=True,
                  xlora_depth=1, xlora_size=2048, enable_relu_and_dropout=True, use_bias=True, xlora_dropout_p=0.2, use_trainable_adapters=False,
                  softmax_temperature=1.0, top_k_lora=None, scaling_pass_value=0.0, global_scaling_weight=1.0)
    config = {key: value for key, value in (config | settings).items() if value is not ...}
    (folder / "xlora_config.json").write_text(json.dumps(config))
    for i, expert in enumerate(ORDER):
        shutil.copytree(root / "experts" / str(i), folder / expert)


head = {key.removeprefix("base_model.internal_xlora_classifier."): t for key, t in load_file(root / "depth3" / "adapter_model.safetensors").items()}
moved = {key.replace("layers.6", "last").replace("layers", "inner"): t for key, t in head.items()}
authors("authors", moved, dict(xlora_depth=3, xlora_size=16))
torch.manual_seed(60)
linear = {"inner.0.weight": torch.randn(16, 32) * 0.3, "last.weight": torch.randn(len(sites) * 3, 16) * 0.3}
authors("authors_linear", linear, dict(xlora_depth=2, xlora_size=16, enable_relu_and_dropout=False, use_bias=False))
torch.manual_seed(61)
default = {f"{key}.{end}": torch.randn(*shape) * 0.3 for key, wide, high in [("inner.0", 32, 16), ("inner.1", 16, 16), ("last", 16, len(sites) * 3)]
           for end, shape in [("weight", (high, wide)), ("bias", (high,))]}
authors("authors_default", default, dict(xlora_depth=3, xlora_size=16, enable_relu_and_dropout=..., use_bias=...))
# The same as one layer: L₂·L₁, and L₃·(L₂·(L₁ x + b₁) + b₂) + b₃.
first, second, last = [(default[f"{key}.weight"], default[f"{key}.bias"]) for key in ("inner.0", "inner.1", "last")]
heads = {
    "authors_linear": (linear["last.weight"] @ linear["inner.0.weight"], torch.zeros(len(sites) * 3)),
    "authors_default": (last[0] @ second[0] @ first[0], last[0] @ (second[0] @ first[1] + second[1]) + last[1]),
}
for name, (weight, bias) in heads.items():
    reference = Reference(root / "layerwise")
    reference.head = {"layers.0.weight": weight, "layers.0.bias": bias}
    with torch.no_grad():
        _, s, _, out = reference.forward(ids)
    save_file({"tokens": ids.to(torch.float32), "scalings": s.contiguous(), "logits": out.reshape(-1, 259).contiguous()}, root / name / "golden.safetensors")

owners = [[i for i, factors in enumerate(reference.factors) if site in factors] for site in sites]
(root / "sites.json").write_text(json.dumps([{"site": site, "experts": own} for site, own in zip(sites, owners)], indent=1) + "\n")
for number, (site, own) in enumerate(zip(sites, owners)):
    print(f"{number:3} {site:32} experts {', '.join(map(str, own))}")
