#!/usr/bin/env python3
"""Keys and values in 8 bits against f32: the loss of texts, and how fast they are read and gone on from. usage: bench/kv_cache.py LORIMER [ROUNDS]

Texts are the chapters of docs in parts of 1,500 tokens, which the base has not seen. Times are the server's seconds of processor, of some rounds, the two kinds in turns:
reading one part, 64 greedy tokens after it, and 32 after each of four parts at once, whose prompts the prefix cache has."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

lorimer, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2
root = Path(__file__).resolve().parents[1]
CHAPTERS = ("serving", "combine", "prune", "quantize", "embeddings", "cluster", "limits")
PART, OUTPUT, TOGETHER, MOST = 1500, 64, 4, 12


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

    def processor(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def times(self, parts, salt):
        at = [self.processor()]
        for n in (1, OUTPUT):
            self.complete([salt, *parts[0]], n)
            at.append(self.processor())
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(lambda part: self.complete([salt, *part], 1), parts[:TOGETHER]))
            at.append(self.processor())
            list(pool.map(lambda part: self.complete([salt, *part], OUTPUT // 2), parts[:TOGETHER]))
        at.append(self.processor())
        return at[1] - at[0], at[2] - at[1], at[4] - at[3]

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
        for read, one, together in all:
            print(f"{dtype:<5} {PART} tokens read in {read:.2f} s of processor, {OUTPUT} after them {one:.2f} s, {TOGETHER} times {OUTPUT // 2} together {together:.2f} s")
    for server in servers.values():
        server.process.terminate()
        server.process.wait()
