#!/usr/bin/env python3
"""Time and peak memory of combining random adapters of a 7B model's shape. usage: bench/combine_7b.py LORIMER FOLDER [METHOD …]
32 layers of q, k, v, o (4096 x 4096) and gate, up, down (4096 x 11008); ten adapters of rank 16 in f32, 160 MB each. Needs 4 GB on disk and no Python package.
Elapsed seconds are of a machine that may have other work; processor seconds are this process's alone."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from array import array
from pathlib import Path

lorimer, folder, methods = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
LAYERS, HIDDEN, MLP, RANK, COUNT = int(os.environ.get("LAYERS", 32)), 4096, 11008, 16, 10
SHAPES = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
SHAPES |= {"mlp.gate_proj": (HIDDEN, MLP), "mlp.up_proj": (HIDDEN, MLP), "mlp.down_proj": (MLP, HIDDEN)}


def write(path, seed):
    """One adapter: numbers drawn once and taken from another place for each tensor."""
    draw = random.Random(seed)
    pool = array("f", (draw.gauss(0, 0.02) for _ in range(400_000)))
    header, at, tensors = {}, 0, []
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            for key, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                size = 4 * shape[0] * shape[1]
                header[f"base_model.model.model.layers.{layer}.{name}.{key}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
                tensors.append(size // 4)
                at += size
    path.mkdir(parents=True)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for count in tensors:
            start = draw.randrange(len(pool) - count)
            file.write(pool[start : start + count].tobytes())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": [n.split(".")[1] for n in SHAPES],
              "base_model_name_or_path": "7b"}
    (path / "adapter_config.json").write_text(json.dumps(config))


parents = [folder / f"parent-{i}" for i in range(COUNT)]
for i, path in enumerate(parents):
    if not (path / "adapter_config.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        write(path, i)
for method in methods or ["linear", "cat", "svd", "task_arithmetic", "ties", "dare_ties", "magnitude_prune", "knots", "lego"]:
    density = [] if method in ("linear", "cat", "svd", "task_arithmetic", "lego", "dense", "tensors") else ["--density", "0.5"]
    begun = time.time()
    command = [lorimer, "merge", *parents, "--method", method, *density, "--weights", ",".join(["0.1"] * COUNT), "--overwrite", "--output", folder / "out", "--json", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    told = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(json.dumps({"method": method, "layers": LAYERS, "seconds": round(time.time() - begun, 1), "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
                      "peak_bytes": usage.ru_maxrss * 1024, "rank": told["rank"], "error": told["error"]}), flush=True)
