"""FLoRA over real Flower: its simulation, and a SuperLink with separate client processes over TLS, against `lorimer federate simulate`.

    VENV/bin/python tests/python/flower.py LORIMER

VENV has the wheel of this package, `flwr[simulation]` 1.42 and NumPy. Held: the same bytes from all three; a client that is killed, one that is too slow and
three that send NaN, absurd shapes or a huge tensor are named and left out, and the round completes.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "goldens" / "tiny-llama"
PROGRAM = pathlib.Path(sys.argv[1]).resolve()
BIN = pathlib.Path(sys.executable).parent
SETTINGS = {"max_steps": 3, "batch_size": 4, "lr": 0.01, "dropout": 0.0, "target_modules": "q_proj,v_proj", "seed": 7, "max_length": 512}
RANKS = [4, 2, 1]
ENVIRONMENT = dict(
    os.environ, PATH=f"{BIN}:{os.environ['PATH']}", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1", RAY_USAGE_STATS_ENABLED="0",
)

APP = """[project]
name = "flora-test"
version = "1.0.0"
description = "FLoRA"
license = "MIT"
dependencies = []
[tool.flwr.app]
publisher = "lorimer"
[tool.flwr.app.components]
serverapp = "lorimer.flower_server:app"
clientapp = "{client}"
[tool.flwr.app.config]
ranks = "4,2,1"
rounds = {rounds}
clients = 3
least = 1
timeout = {timeout}
most-bytes = 1000000
output = "{output}"
settings = '{settings}'
"""

# What a client that means harm, or has none of its luck, sends.
HOSTILE = '''
import json, os, time
import numpy
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from lorimer.flower import train_round
import lorimer

app = ClientApp()

@app.train()
def train(message, context):
    node = context.node_config
    honest = train_round(message, context, str(node["model"]), str(node["data"]))
    bad = str(node.get("bad", ""))
    if not bad:
        return honest
    if bad == "slow":
        time.sleep(600)
    if bad == "raises":
        raise RuntimeError("no rows here")
    record = honest.content["adapter"]
    factors = record["adapter.safetensors"].numpy().tobytes()
    config = json.loads(record["adapter_config.json"].numpy().tobytes())
    tensors = {k: v.copy() for k, v in lorimer.Adapter.from_safetensors(factors, config).tensors().items()}
    name = sorted(tensors)[0]
    if bad == "nan":
        tensors[name][0, 0] = numpy.nan
    if bad == "shape":
        tensors[name] = numpy.zeros((tensors[name].shape[0], 7), "f4")
    if bad == "huge":
        tensors[name] = numpy.zeros((1000, 1000), "f4")
    from lorimer._tensors import encode
    data = encode(tensors)
    record = ArrayRecord({"adapter.safetensors": Array(numpy.frombuffer(data, "u1")), "adapter_config.json": record["adapter_config.json"]})
    return Message(RecordDict({"adapter": record, "told": honest.content["told"]}), reply_to=message)
'''


def rows(work):
    paths = []
    for client in range(3):
        path = work / f"{client}.jsonl"
        lines = [{"messages": [{"role": "user", "content": f"{i} of {client}"}, {"role": "assistant", "content": str(i * (client + 1))}]} for i in range(8 + 4 * client)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(path)
    return paths


def one_process(work, data):
    """The program's own simulation, whose clients are called as Flower's."""
    link = []
    for k, path in enumerate(data):
        link.append(f"--data={path}")
    out = work / "program"
    subprocess.run(
        [PROGRAM, "federate", "simulate", f"--model={TINY}", *link, "--ranks=4,2,1", "--rounds=2", "--max-steps=3", "--batch-size=4", "--lr=0.01", "--dropout=0",
         "--seed=7", f"--output={out}", "--quiet"], check=True, stdout=subprocess.DEVNULL,
    )
    return out


def same(a, b):
    left, right = ((path / "global" / "adapter_model.safetensors").read_bytes() for path in (a, b))
    assert left == right, f"{a} and {b} differ"


def simulated(work, data):
    """Flower's simulation engine (Ray)."""
    from flwr.app import Context
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation
    from lorimer.flower import Flora, client_app

    out = work / "ray"
    app = ServerApp()

    @app.main()
    def main(grid, context: Context):
        strategy = Flora(ranks=RANKS, output=out, clients=3, **SETTINGS)
        strategy.start(grid, strategy.initial(), num_rounds=2, timeout=300)

    paths = [str(path) for path in data]
    client = client_app(str(TINY), data=lambda context: paths[int(context.node_config["partition-id"])])
    run_simulation(app, client, num_supernodes=3, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2}})
    return out


def certificates(folder):
    folder.mkdir()

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for name in ("ca", "server"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
    openssl("req", "-x509", "-new", "-key", "ca.key", "-sha256", "-days", "2", "-subj", "/CN=test CA", "-addext", "basicConstraints=critical,CA:TRUE",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", "ca.crt")
    openssl("req", "-new", "-key", "server.key", "-subj", "/CN=localhost", "-out", "server.csr")
    (folder / "extensions").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=serverAuth\n"
        "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
    )
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-sha256", "-out", "server.pem", "-extfile", "extensions")
    return folder


def deployed(work, name, data, certs, bad=None, kill=None, rounds=2, timeout=300):
    """A SuperLink and a SuperNode for each client, over TLS."""
    folder = work / name
    app = folder / "flora-test"
    app.mkdir(parents=True)
    (app / "client.py").write_text(HOSTILE)
    (app / "pyproject.toml").write_text(APP.format(
        client="client:app" if bad or kill is not None else "lorimer.flower_client:app", rounds=rounds, timeout=timeout, output=folder / "out", settings=json.dumps(SETTINGS),
    ))
    environment = dict(ENVIRONMENT, FLWR_HOME=str(folder / "home"))
    (folder / "home").mkdir()
    port = 8500 + os.getpid() % 400
    (folder / "home" / "config.toml").write_text(f'[superlink]\ndefault = "tls"\n[superlink.tls]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{certs / "ca.crt"}"\n')
    out = folder / "out"
    processes = []

    def start(*command, log):
        processes.append(subprocess.Popen(command, env=environment, stdout=open(folder / log, "w"), stderr=subprocess.STDOUT, start_new_session=True))
        return processes[-1]

    try:
        start("flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(certs / "ca.crt"), "--ssl-certfile", str(certs / "server.pem"),
              "--ssl-keyfile", str(certs / "server.key"), "--disable-runtime-dependency-installation", log="superlink.log")
        for _ in range(240):
            if subprocess.run(["curl", "-sf", "--cacert", certs / "ca.crt", f"https://127.0.0.1:{port}/health"], stdout=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.5)
        nodes = []
        for k, path in enumerate(data):
            config = f'partition-id={k} model="{TINY}" data="{path}"' + (f' bad="{bad}"' if bad and k == 2 else "")
            nodes.append(start("flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(certs / "ca.crt"), "--host", "127.0.0.1", "--port",
                               str(port + 1000 + k), "--node-config", config, log=f"node{k}.log"))
        done = subprocess.run(
            ["flwr", "run", str(app), "tls", "--format", "json"], env=environment, capture_output=True, text=True, timeout=120,
        )
        assert '"success": true' in done.stdout, done.stdout + done.stderr
        if kill is not None:
            for _ in range(240):
                if "train" in (folder / f"node{kill}.log").read_text():
                    break
                time.sleep(0.25)
            os.killpg(nodes[kill].pid, signal.SIGKILL)
            nodes[kill].wait()
        limit = time.monotonic() + 420
        ledger = out / "ledger.jsonl"
        while time.monotonic() < limit:
            if ledger.exists() and len(ledger.read_text().splitlines()) >= rounds:
                break
            time.sleep(0.5)
        else:
            raise AssertionError((folder / "superlink.log").read_text()[-4000:])
        return out, [json.loads(line) for line in ledger.read_text().splitlines()]
    finally:
        for process in reversed(processes):
            try:
                os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main():
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key.startswith(("FLWR", "RAY", "PATH"))})
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        data = rows(work)
        program = one_process(work, data)
        certs = certificates(work / "certs")
        out, ledger = deployed(work, "tls", data, certs)
        same(program, out)
        own = [json.loads(line) for line in (program / "ledger.jsonl").read_text().splitlines()]
        for a, b in zip(own, ledger):
            assert a["down_bytes"] == b["down_bytes"] and [c["up_bytes"] for c in a["clients"]] == [c["up_bytes"] for c in b["clients"]], (a, b)
        print("SuperLink with three SuperNodes over TLS: the same bytes as the program's simulation")
        for bad, word in (("nan", "not finite"), ("shape", "shape"), ("huge", "at most"), ("raises", "no rows here"), ("slow", "in time")):
            out, ledger = deployed(work, bad, data, certs, bad=bad, rounds=1, timeout=45 if bad == "slow" else 300)
            (entry,) = ledger
            assert len(entry["clients"]) == 2 and len(entry["refused"]) == 1 and word in entry["refused"][0]["why"], entry
            assert abs(sum(client["weight"] for client in entry["clients"]) - 1) < 1e-12
            print(f"{bad}: {entry['refused'][0]['why']}")
        out, ledger = deployed(work, "killed", data, certs, kill=2, rounds=1)
        (entry,) = ledger
        assert len(entry["clients"]) == 2 and len(entry["refused"]) == 1, entry
        print(f"killed: {entry['refused'][0]['why']}")
        same(program, simulated(work, data))
        print("Flower's simulation: the same bytes")


if __name__ == "__main__":
    main()
