#!/usr/bin/env python3
"""Keys and values in 8 bits against f32: the loss of texts, and how fast they are read and gone on from. usage: bench/kv_cache.py LORIMER [ROUNDS]

Texts are the chapters of docs in parts of 1,500 tokens, which the base has not seen. Times are the best of some rounds, the two kinds in turns: reading one part, then 64
greedy tokens after it, of one request and of eight parts at once, whose prompts the prefix cache has."""

import json
import math
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

lorimer, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
root = Path(__file__).resolve().parents[1]
CHAPTERS = ("serving", "combine", "prune", "quantize", "embeddings", "cluster", "limits")
PART, OUTPUT, TOGETHER, MOST = 1500, 64, 8, 12


def call(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


class Server:
    def __init__(self, dtype, folder):
        command = [lorimer, "serve", "--adapters", folder, "--port", "0", "--json", "-q", "--pool", "2GiB", "--kv-cache-dtype", dtype]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = json.loads(self.process.stdout.readline())["url"]

    def parts(self):
        texts = [path.read_text() for name in CHAPTERS if (path := root / f"docs/{name}.md").exists()]
        tokens = [token for text in texts for token in call(f"{self.url}/tokenize", {"prompt": text})["tokens"]]
        return [tokens[at : at + PART] for at in range(0, len(tokens) - PART + 1, PART)][:MOST]

    def complete(self, prompt, n, **more):
        return call(f"{self.url}/v1/completions", {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, **more})

    def losses(self, part):
        return self.complete(part, 0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"][1:]

    def times(self, parts, salt):
        begun = time.time()
        self.complete([salt, *parts[0]], 1)
        read = time.time() - begun
        begun = time.time()
        self.complete([salt, *parts[0]], OUTPUT)
        one = OUTPUT / (time.time() - begun)
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(lambda part: self.complete([salt, *part], 1), parts[:TOGETHER]))
            begun = time.time()
            list(pool.map(lambda part: self.complete([salt, *part], OUTPUT), parts[:TOGETHER]))
        return read, one, TOGETHER * OUTPUT / (time.time() - begun)

    def blocks(self):
        time.sleep(0.5)
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return int(text.split('num_gpu_blocks="')[1].split('"')[0])


with tempfile.TemporaryDirectory() as folder:
    servers = {dtype: Server(dtype, folder) for dtype in ("f32", "int8")}
    parts = servers["f32"].parts()
    found = {dtype: [loss for part in parts for loss in server.losses(part)] for dtype, server in servers.items()}
    for dtype, server in servers.items():
        loss = -sum(found[dtype]) / len(found[dtype])
        print(f"{dtype:<5} loss {loss:.5f}, perplexity {math.exp(loss):.4f} over {len(found[dtype])} tokens; 2 GiB hold {16 * server.blocks()} tokens")
    apart = [abs(a - b) for a, b in zip(found["f32"], found["int8"])]
    print(f"log p apart: {sum(apart) / len(apart):.2e} on average, {max(apart):.2e} at most")
    times = {dtype: [] for dtype in servers}
    for salt in range(100, 100 + rounds):
        for dtype, server in servers.items():
            times[dtype].append(server.times(parts, salt))
    for dtype, all in times.items():
        read, one, together = zip(*all)
        print(f"{dtype:<5} {PART} tokens read in {min(read):.2f} s; after them {max(one):.1f} tokens/s alone, {max(together):.1f} of {TOGETHER} together")
    for server in servers.values():
        server.process.terminate()
        server.process.wait()
