"""lm-evaluation-harness itself against a server of ours and against transformers: the same accuracy, the same log-likelihoods.

usage: PYTHON tests/clients/lm_eval/check.py LORIMER MODEL [LIMIT]
MODEL is a folder that both load (safetensors and tokenizer); PYTHON has lm-eval[api], torch and transformers. Run from the repository's root.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request

import lm_eval
from lm_eval.tasks import TaskManager

# Largest difference of a log-likelihood of an answer: f32 on both sides, sums over a few tokens.
BOUND = 1e-3


@contextlib.contextmanager
def server(lorimer, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([lorimer, "serve", "--model", model, "--port", str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health")
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def run(model, arguments, limit):
    tasks = TaskManager(include_path="tests/clients/lm_eval")
    found = lm_eval.simple_evaluate(model, model_args=arguments, tasks=["lorimer_tweets"], limit=limit, task_manager=tasks, log_samples=True, bootstrap_iters=0)
    rows = sorted(found["samples"]["lorimer_tweets"], key=lambda row: row["doc_id"])
    return found["results"]["lorimer_tweets"]["acc,none"], [float(answer[0]) for row in rows for answer in row["filtered_resps"]]


def main():
    lorimer, model, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100
    theirs, expected = run("hf", {"pretrained": model, "dtype": "float32", "device": "cpu", "batch_size": 8}, limit)
    with server(lorimer, model) as url:
        name = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"]
        arguments = {"model": name, "base_url": f"{url}/v1/completions", "tokenizer": model, "num_concurrent": 4, "batch_size": 1}
        ours, answers = run("local-completions", arguments, limit)
    worst = max(abs(a - b) for a, b in zip(answers, expected, strict=True))
    print(f"accuracy {ours:.4f}, transformers {theirs:.4f}; log-likelihoods of {len(answers)} answers differ by at most {worst:.2e}")
    assert ours == theirs and worst < BOUND


main()
