#!/usr/bin/env python3
"""The requests of `lorimer bench serve` with llama.cpp's server: all at once, each with its own adapter (`lora` of the request).

usage: llama_serve.py LLAMA_SERVER BASE.gguf LORIMER [FLAG=VALUE …] REQUESTS

LLAMA_SERVER is the program `llama-server` (`pip download --no-deps --no-binary llama-cpp-python llama-cpp-python`, then
`cmake -B build vendor/llama.cpp && cmake --build build --target llama-server`). Adapters are converted with `LORIMER convert` and loaded before
the clock starts. A request of one token warms every adapter up. Prints one JSON object.
"""
import json, os, socket, subprocess, sys, tempfile, threading, time, urllib.request

server, base, lorimer, *flags, path = sys.argv[1:]
asked = json.load(open(path))
requests, adapters = asked["requests"], asked["adapters"]
folder = tempfile.mkdtemp()
files = []
for i, adapter in enumerate(adapters):
    files.append(os.path.join(folder, f"a{i}.gguf"))
    subprocess.run([lorimer, "convert", adapter, "--to", "gguf", "--output", files[-1], "--model", base, "--quiet"], check=True, stdout=sys.stderr)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
n = len(requests)
longest = max(len(r["prompt"]) + r["output"] for r in requests)
command = [server, "-m", base, "--host", "127.0.0.1", "--port", str(port), "-np", str(n), "-c", str(n * (longest + 64)),
           "--lora-init-without-apply", "--no-webui", "--lora", ",".join(files), "-t", "2", *[w for f in flags for w in f.split("=")]]
log = open(os.path.join(folder, "log"), "w")
process = subprocess.Popen(command, stdout=log, stderr=log)
url = f"http://127.0.0.1:{port}"


def post(request, output):
    body = {"prompt": request["prompt"], "n_predict": output, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "lora": [{"id": request["adapter"], "scale": 1.0}]}
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/completion", data, {"Content-Type": "application/json"}), timeout=600) as answer:
        return json.load(answer)["tokens_predicted"]


try:
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
            break
        except OSError:
            if process.poll() is not None:
                sys.exit(f"llama-server ended: {open(log.name).read()[-2000:]}")
            time.sleep(0.1)
    for r in requests:
        post(dict(r, prompt=[1, 2, 3]), 1)
    counts = [0] * n

    def one(i):
        counts[i] = post(requests[i], requests[i]["output"])

    start = time.perf_counter()
    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    seconds = time.perf_counter() - start
    status = open(f"/proc/{process.pid}/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
finally:
    process.kill()
tokens = sum(counts)
if tokens != sum(r["output"] for r in requests):
    sys.exit(f"llama-server answered {tokens} tokens of {sum(r['output'] for r in requests)}")
print(json.dumps({"name": "llama.cpp server", "seconds": seconds, "output_tokens_per_second": tokens / seconds,
                  "requests_per_second": n / seconds, "peak_bytes": peak}))
