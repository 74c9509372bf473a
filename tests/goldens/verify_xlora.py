#!/usr/bin/env python3
"""The other direction of make_xlora.py: PEFT loads X-LoRA folders that Lorimer wrote; log-probabilities, logits and λ are compared.

usage: verify_xlora.py BINARY                            train experts and heads on tiny-llama, and compare
       verify_xlora.py --folder FOLDER MODEL LOGITS      compare one folder with what Lorimer says of it
       verify_xlora.py --self                            the same comparison on the goldens that PEFT wrote (nothing of Lorimer's)

needs torch 2.15, transformers 5.23, peft 0.21.2

What it assumes of Lorimer:
  - `train --method xlora --adapter FOLDER … --set layerwise_scalings=true …` with PEFT's names of settings (SETTINGS, in one place);
  - the folder: adapter_config.json (peft_type XLORA, `adapters` {"0": …, "1": …}, paths from the folder itself or absolute) and
    adapter_model.safetensors with base_model.internal_xlora_classifier.layers.N.weight|bias, nothing else;
  - lorimer.json with `golden` as every method has it ([{tokens, first, log_probabilities}]) and, if it is there, `xlora.sites`: the order of λ's sites;
  - LOGITS, a JSON file: {"rows": [{"tokens": […], "logits": [[…] a token], "scalings": [[[n] a site] a token]}]}; `logits` or `scalings` may be left out.
"""
import json, os, pathlib, subprocess, sys, tempfile

import torch
import transformers
from peft import PeftModel, XLoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
here = pathlib.Path(__file__).resolve().parent
tiny = here / "tiny-llama"
HEAD = "base_model.internal_xlora_classifier."
TOLERANCE = 1e-3
EXPERTS = {
    "first": ["--rank", "2", "--alpha", "4", "--target-modules", "q_proj,v_proj,down_proj"],
    "second": ["--rank", "4", "--rslora", "--target-modules", "k_proj,v_proj,gate_proj"],
    "third": ["--rank", "3", "--layers", "1"],
}
SETTINGS = {
    "shared": {},
    "layerwise": dict(layerwise_scalings=True),
    "depth2": dict(layerwise_scalings=True, xlora_depth=2, xlora_size=16),
    "depth3-no-dropout": dict(xlora_depth=3, xlora_size=16, xlora_dropout_p=0),
    "top-k": dict(layerwise_scalings=True, top_k_lora=2),
    # Without the first softmax a head of zeros would weigh every expert 0, which is refused.
    "top-k-softmax": dict(layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True, init="peft"),
    "temperature": dict(layerwise_scalings=True, softmax_temperature=0.5),
    "weight": dict(layerwise_scalings=True, global_scaling_weight=0.5),
    "pass-value": dict(layerwise_scalings=True, scaling_pass_value=0.5),
}


def load(folder, base):
    """The folder in PEFT, its head whole and its experts found wherever this runs."""
    folder = pathlib.Path(folder).resolve()
    config = XLoraConfig.from_pretrained(folder)
    n = len(config.adapters)
    # Other names fail in PEFT's forward, and another order gives another expert each λ.
    assert list(config.adapters) == [str(i) for i in range(n)], f"adapters are named {list(config.adapters)}"
    config.adapters = {name: str(folder / path) for name, path in config.adapters.items()}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.config.use_cache = False
    model = PeftModel.from_pretrained(plain, folder, config=config).eval()
    # PEFT does not say which tensors of the head it did not find.
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {HEAD + key: t for key, t in model.base_model.internal_xlora_classifier.state_dict().items()}
    assert set(tensors) == set(head), f"the file has {sorted(tensors)}, PEFT wants {sorted(head)}"
    assert all(torch.equal(t, tensors[key].to(t.dtype)) for key, t in head.items())
    return model


def sites(model):
    return [key.removeprefix("base_model.lora_model.model.") for key, module in model.named_modules() if hasattr(module, "lora_A")]


def run(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits, model.base_model.get_latest_scalings()[0]


def difference(a, b):
    b = torch.as_tensor(b)
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item()


def compare_rows(name, model, rows):
    worst = {"logits": 0.0, "scalings": 0.0}
    for row in rows:
        for what, own in zip(worst, run(model, row["tokens"])):
            if what in row:
                worst[what] = max(worst[what], difference(own, row[what]))
    print(f"{name:24} logits differ by {worst['logits']:.2e}, λ by {worst['scalings']:.2e}")
    return max(worst.values())


def compare_manifest(name, folder, base):
    model = load(folder, base)
    manifest = json.loads((pathlib.Path(folder) / "lorimer.json").read_text())
    order = manifest.get("xlora", {}).get("sites")
    assert order is None or order == sites(model), f"λ's sites: {order}, PEFT has {sites(model)}"
    worst = 0.0
    for golden in manifest["golden"]:
        tokens, first = golden["tokens"], golden["first"]
        logp = run(model, tokens)[0].log_softmax(-1)
        own = logp[first - 1:-1].gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]
        worst = max(worst, difference(own, golden["log_probabilities"]))
    with torch.no_grad(), model.disable_adapter():
        off = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    print(f"{name:24} log p differs by {worst:.2e} (the head and experts move it by {difference(off, logp):.2e})")
    return worst


def rows_of(golden):
    golden = load_file(golden)
    tokens = golden["tokens"].long()
    logits = golden["logits"].unflatten(0, tokens.shape)
    return [dict(tokens=t.tolist(), logits=l, scalings=s) for t, l, s in zip(tokens, logits, golden["scalings"])]


if sys.argv[1:] == ["--self"]:
    worst = 0.0
    for golden in sorted((here / "xlora").glob("*/golden.safetensors")):
        if (golden.parent / "adapter_config.json").exists():
            worst = max(worst, compare_rows(golden.parent.name, load(golden.parent, tiny), rows_of(golden)))
    order = [entry["site"] for entry in json.loads((here / "xlora" / "sites.json").read_text())]
    assert order == sites(load(here / "xlora" / "layerwise", tiny))
    try:
        load(here / "xlora" / "lost", tiny)
    except AssertionError as told:
        print(f"{'lost':24} is told: {str(told)[:60]}…")
    else:
        sys.exit("a head with tensors missing was taken")
    sys.exit(worst > 1e-5)

if sys.argv[1:2] == ["--folder"]:
    folder, base, logits = sys.argv[2:5]
    model = load(folder, base)
    for number, site in enumerate(sites(model)):
        print(f"{number:3} {site}")
    sys.exit(compare_rows(folder, model, json.loads(pathlib.Path(logits).read_text())["rows"]) > TOLERANCE)

work = pathlib.Path(tempfile.mkdtemp())
rows = {"first": ("up", "yes"), "second": ("down", "no"), "third": ("left", "perhaps")}


def write(name, chosen):
    chat = [{"messages": [{"role": "user", "content": f"{q} {i}"}, {"role": "assistant", "content": a}]} for i in range(8) for q, a in chosen]
    (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    return work / f"{name}.jsonl"


def train(name, data, *flags):
    subprocess.run([sys.argv[1], "train", "-q", "--model", tiny, "--data", data, "--output", work / name, "--max-steps", "12", "--lr", "1e-2", *flags],
                   check=True, stdout=subprocess.DEVNULL)
    return work / name


experts = [flag for name, flags in EXPERTS.items() for flag in ("--adapter", train(name, write(name, [rows[name]]), *flags))]
mixed, worst = write("mixed", rows.values()), 0.0
for name, settings in SETTINGS.items():
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    folder = train(f"xlora-{name}", mixed, "--method", "xlora", *experts, *sets)
    worst = max(worst, compare_manifest(name, folder, tiny))
# Fixed gates in the place of the head's: the sum of the experts' changes, each times its gate and global_scaling_weight.
gates, plain = [0.2, 0.5, 0.3], AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
for gate, name in zip(gates, EXPERTS):
    expert = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), work / name)
    for key, module in expert.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            plain.get_submodule(key).weight.data += 0.5 * gate * module.get_delta_weight("default")
subprocess.run([sys.argv[1], "convert", work / "xlora-weight", "--to", "lora", "--gates", ",".join(map(str, gates)), "--model", tiny, "--output", work / "fixed", "-q"],
               check=True, stdout=subprocess.DEVNULL)
fixed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), work / "fixed").eval()
tokens = torch.tensor([list(range(3, 40))])
with torch.no_grad():
    apart = difference(fixed(tokens).logits[0], plain.eval()(tokens).logits[0])
print(f"{'fixed gates':24} logits differ by {apart:.2e}")
worst = max(worst, apart)
# One expert and the softmax: that adapter itself.
folder = train("xlora-one", mixed, "--method", "xlora", *experts[:2])
worst = max(worst, compare_manifest("one expert", folder, tiny))
one, alone = load(folder, tiny), PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), work / "first").eval()
tokens = list(range(3, 40))
with torch.no_grad():
    worst = max(worst, difference(run(one, tokens)[0], alone(torch.tensor([tokens])).logits[0]))
sys.exit(worst > TOLERANCE)
