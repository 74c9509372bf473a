#!/usr/bin/env python3
"""Tokens a second of one stream with and without guessed tokens, and whether the answers are the same. usage: bench/guesses.py LORIMER [GUESSES]

Three prompts of 160 greedy tokens each, their reading included, the better of two: a text that begins anew, a program that begins anew, and the beginning of
a story. Nothing is kept from one to the next."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

lorimer, guesses = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "8"
root = Path(__file__).resolve().parents[1]
text = (root / "README.md").read_text()[600:1500]
code = "\n".join((root / "bench/combine_7b.py").read_text().splitlines()[20:60])
PROMPTS = {"text again": f"{text}\n\n{text[:300]}", "program again": f"{code}\n\n# the same again\n\n{code[:200]}", "story": "Once upon a time"}


def answers(dtype, guesses):
    with tempfile.TemporaryDirectory() as empty:
        command = [lorimer, "serve", "--adapters", empty, "--port", "0", "--json", "-q", "--dtype", dtype, "--no-prefix-cache", "--guesses", guesses]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        url = json.loads(server.stdout.readline())["url"]
        found = {}
        for name, prompt in PROMPTS.items():
            body = {"prompt": prompt, "max_tokens": 160, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            rates = []
            for _ in range(2):
                begun = time.time()
                answer = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
                rates.append(160 / (time.time() - begun))
            found[name] = (max(rates), answer)
        engine = json.load(urllib.request.urlopen(f"{url}/v1/state"))["figures"]["engine"]
        server.terminate()
        server.wait()
    return found, engine


for dtype in ("f32", "int8"):
    (plain, _), (guessed, engine) = answers(dtype, "0"), answers(dtype, guesses)
    for name in PROMPTS:
        (one, text), (other, again) = plain[name], guessed[name]
        print(f"{dtype:<6}{name:<15}{one:>8.1f} tokens/s, with guesses {other:>6.1f} ({other / one:.2f} times), {'the same' if text == again else 'ANOTHER'} answer")
    print(f"{dtype:<6}{engine['accepted_tokens']} of {engine['guessed_tokens']} guesses stood")
