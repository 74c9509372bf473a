#!/usr/bin/env python3
"""Three servers of one object store behind HAProxy: nothing is lost while one drains and goes, and while another is killed.

usage: check.py LORIMER [HAPROXY [CONFIG]]

Needs the packages `moto[server]` and `boto3`, and HAProxy 2.6 or newer. CONFIG stands in for deploy/haproxy/haproxy.cfg. Trains 24 adapters of the tiny
base of the tests, puts them into a store, and sends streamed and whole requests over all of them. Ends with an error where something is not as it should be.
"""
import collections, csv, http.client, io, json, logging, os, pathlib, random, shutil, signal, socket, subprocess, sys, tempfile, threading, time, urllib.request

import boto3
from moto.server import ThreadedMotoServer

here = pathlib.Path(__file__).resolve()
lorimer = sys.argv[1]
haproxy = sys.argv[2] if len(sys.argv) > 2 else "haproxy"
config = sys.argv[3] if len(sys.argv) > 3 else here.parents[2] / "deploy/haproxy/haproxy.cfg"
base = here.parents[1] / "goldens" / "tiny-llama"
folder = pathlib.Path(tempfile.mkdtemp())
NAMES = [f"team-{i % 4}/adapter-{i:02}" for i in range(24)]
CLIENTS = 12
DRAIN = 4
processes, started = {}, time.monotonic()
logging.getLogger("werkzeug").setLevel(logging.ERROR)


def say(stage, text):
    print(f"{time.monotonic() - started:6.1f} s  {stage}: {text}", flush=True)


def demand(holds, sentence):
    if not holds:
        raise AssertionError(sentence)


def wait_for(what, test, seconds=30):
    """The seconds until `test` holds."""
    began = time.monotonic()
    while not test():
        demand(time.monotonic() < began + seconds, f"{what} did not come within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - began


def call(url, method="GET"):
    return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10).read().decode()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(name, command, **environment):
    log = open(folder / f"{name}.log", "a")
    processes[name] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env={**os.environ, **environment})


# ---- What a client does.

Answer = collections.namedtuple("Answer", "name server fault text at")


def ask(port, name, text, stream, **headers):
    """One attempt: the text and who answered, or what went wrong: `refused` before anything of the answer came, `broken` after."""
    at, server, out, fault = time.monotonic(), None, "", "refused"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = {"messages": [{"role": "user", "content": text}], "model": name, "max_tokens": 300, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        server = response.getheader("X-Served-By")
        if response.status != 200:
            return Answer(name, server, f"refused with {response.status}", response.read().decode(errors="replace")[:200], at)
        fault = "broken"
        if not stream:
            return Answer(name, server, None, json.loads(response.read())["choices"][0]["message"]["content"], at)
        for line in response:
            if line.strip() == b"data: [DONE]":
                return Answer(name, server, None, out, at)
            if line.startswith(b"data: "):
                out += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    except (OSError, http.client.HTTPException) as error:
        out = repr(error)
    finally:
        connection.close()
    return Answer(name, server, fault, out, at)


PROMPTS = ["up 3", "down 5"]


class Load:
    """Clients that ask without a pause, and ask again at once, twice at most, where an attempt failed."""

    def __init__(self, port, expected):
        self.port, self.expected, self.ended = port, expected, threading.Event()
        self.open, self.answers, self.failed, self.errors = threading.Event(), [], [], []
        self.open.set()
        self.threads = [threading.Thread(target=self.client, args=[seed], daemon=True) for seed in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def client(self, seed):
        draw = random.Random(seed)
        while not self.ended.is_set() and not self.errors:
            name, text, stream = draw.choice(NAMES), draw.choice(PROMPTS), draw.random() < 0.6
            for _ in range(3):
                self.open.wait()
                answer = ask(self.port, name, text, stream)
                if not answer.fault:
                    break
                self.failed.append(answer)
            if answer.fault:
                self.errors.append(f"a request was lost: {answer}")
            elif answer.text != self.expected[name, text]:
                self.errors.append(f"{answer} is not the adapter's answer {self.expected[name, text]!r}")
            else:
                self.answers.append(answer)

    def end(self):
        self.ended.set()
        self.open.set()
        for thread in self.threads:
            thread.join(60)

    def check(self, failed=0):
        """No answer was wrong or lost, and no more attempts failed than `failed`."""
        demand(not self.errors, "; ".join(self.errors[:3]))
        demand(len(self.failed) <= failed, f"{len(self.failed)} attempts failed, {failed} at most could not be helped: {self.failed[:3]}")


# ---- What runs.

def serve(slot, port, store, cache):
    command = [lorimer, "serve", "--model", base, "--port", port, "--adapters", "s3://models/adapters", "--adapter-cache", cache]
    start(slot, [*command, "--pool", "32MB", "--threads", 1, "--drain", DRAIN, "--grace", 20, "--quiet"], **store)


def homes(port, rounds=3):
    """Which server answers for each adapter, asked one at a time."""
    found = collections.defaultdict(set)
    for name in random.Random(1).sample(NAMES * rounds, len(NAMES) * rounds):
        found[name].add(ask(port, name, PROMPTS[0], False).server)
        time.sleep(0.05)  # HAProxy counts a request as running for a moment after its last byte.
    spread = {name: servers for name, servers in found.items() if len(servers) != 1 or None in servers}
    demand(not spread, f"adapters did not stay on one server: {spread}")
    return {name: servers.pop() for name, servers in found.items()}


def count(homes):
    return " ".join(f"{slot} {n}" for slot, n in sorted(collections.Counter(homes.values()).items()))


def run():
    # Adapters that say a word of their own again and again, and what one server answers.
    for i, name in enumerate(NAMES):
        word = "".join(random.Random(i).sample("abcdefghijklmnopqrstuvwxyz", 6))
        rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"{word} " * 34}]} for p in PROMPTS]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [lorimer, "train", "--model", base, "--data", folder / "data.jsonl", "--output", folder / "adapters" / name, "--quiet"]
        subprocess.run([*command, "--lr", "1e-2", "--max-steps", "40", "--rank", str(4 + i % 3 * 4)], check=True, stdout=subprocess.DEVNULL)
    alone, front, stats, *ports = free_ports(6)
    start("alone", [lorimer, "serve", "--model", base, "--adapters", folder / "adapters", "--port", alone, "--pool", "32MB", "--quiet"])
    ready = lambda port: lambda: b"HTTP" in probe(port)
    wait_for("the single server", ready(alone))
    expected = {}
    for name in NAMES:
        for text in PROMPTS:
            answer = ask(alone, name, text, False)
            demand(not answer.fault, f"the single server failed: {answer}")
            expected[name, text] = answer.text
    stop("alone", signal.SIGTERM)
    different = len({expected[name, PROMPTS[0]] for name in NAMES})
    demand(different == len(NAMES), f"{len(NAMES)} adapters give {different} answers: no answer tells whose it is")
    say("adapters", f"{len(NAMES)} trained, each with an answer of its own")

    # A store with them, three servers, HAProxy.
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    store = {**keys, "AWS_ENDPOINT": f"http://127.0.0.1:{moto.get_host_and_port()[1]}", "AWS_ALLOW_HTTP": "true"}
    s3 = boto3.client("s3", endpoint_url=store["AWS_ENDPOINT"], region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret")
    s3.create_bucket(Bucket="models")
    for name in NAMES:
        for file in ("adapter_model.safetensors", "adapter_config.json", "lorimer.json"):
            s3.upload_file(str(folder / "adapters" / name / file), "models", f"adapters/{name}/{file}")
    slots = dict(zip("abc", ports))
    for slot, port in slots.items():
        serve(slot, port, store, folder / f"cache-{slot}")
    addresses = {f"LORIMER_{slot.upper()}": f"127.0.0.1:{port}" for slot, port in slots.items()}
    environment = {**addresses, "LORIMER_BIND": f"127.0.0.1:{front}", "LORIMER_STATS": f"127.0.0.1:{stats}"}
    start("haproxy", [haproxy, "-db", "-f", config, "-f", here.parents[2] / "deploy/haproxy/servers.cfg"], **environment)
    row = lambda slot: next(r for r in csv.DictReader(io.StringIO(call(f"http://127.0.0.1:{stats}/stats;csv"))) if r["svname"] == slot)
    up = lambda slot: lambda: row(slot)["status"] in ("UP", "no check")
    down = lambda slot: lambda: row(slot)["status"].startswith("DOWN")
    wait_for("HAProxy", ready(stats))
    for slot in slots:
        wait_for(f"server {slot}", lambda: ready(slots[slot])() and up(slot)())

    # Each adapter on one server, and each server with adapters: as HAProxy tells, and as the servers themselves do.
    first = homes(front)
    demand(set(first.values()) == set(slots), f"some server has no adapter: {first}")
    for slot in slots:
        held = {a["name"] for a in json.loads(call(f"http://127.0.0.1:{slots[slot]}/v1/adapters"))["adapters"] if a["content_id"]}
        demand(held == {name for name in NAMES if first[name] == slot}, f"{slot} has read {sorted(held)}, and HAProxy told {first}")
    for name in NAMES[:8]:
        time.sleep(0.05)
        long = ask(front, name, "up " * 50_000, False, **{"X-Adapter": name})
        demand(long.server == first[name], f"with the header X-Adapter {name} went to {long.server}, not to {first[name]}: {long.fault}")
    demand(probe(front, "POST /drain").split()[1:2] == [b"404"], "clients can drain a server through HAProxy")
    say("affinity", f"asked one at a time, each adapter is on one server ({count(first)}), and no server has read another's")

    load = Load(front, expected)
    time.sleep(6)
    load.check()
    done = list(load.answers)
    at_home = sum(first[a.name] == a.server for a in done) / len(done)
    demand(len(done) > 50 and at_home > 0.5, f"only {at_home:.0%} of {len(done)} requests went to their adapter's server")
    say("load", f"{len(done)} answers of {CLIENTS} clients, all right, {at_home:.0%} by the adapter's server (bounded load spills the rest)")

    # One is drained and then told to stop, another is told to stop only; each is replaced in its place by one with nothing in its cache.
    for slot, told in [("a", "POST /drain"), ("c", "SIGTERM alone")]:
        before, called = len(load.answers), time.monotonic()
        if told == "POST /drain":
            reply = json.loads(call(f"http://127.0.0.1:{slots[slot]}/drain", "POST"))
            demand(reply["draining"] is True, f"POST /drain answered {reply}")
            seen = wait_for(f"HAProxy's word that {slot} is down", down(slot))
            processes[slot].send_signal(signal.SIGTERM)
        else:
            processes[slot].send_signal(signal.SIGTERM)
            seen = wait_for(f"HAProxy's word that {slot} is down", down(slot))
        parted = time.monotonic()
        stop(slot, None)
        gone = time.monotonic() - called
        late = [a for a in load.answers if a.server == slot and a.at > parted + 0.5]
        demand(not late, f"a drained server was sent requests: {late[:3]}")
        shutil.rmtree(folder / f"cache-{slot}")
        serve(slot, slots[slot], store, folder / f"cache-{slot}")
        back = wait_for(f"the replacement of {slot}", up(slot))
        time.sleep(1)
        load.check()
        say("drain", f"{slot} by {told}: HAProxy saw it after {seen:.1f} s, it ended after {gone:.1f} s, its replacement took requests {back:.1f} s later; "
            f"{len(load.answers) - before} answers meanwhile, all right, no attempt failed")

    # One is killed. What ran there breaks; clients ask again.
    before = len(load.answers)
    wait_for("requests on b", lambda: int(row("b")["scur"]) > 1)
    load.open.clear()
    processes["b"].send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    running = int(row("b")["scur"])
    stop("b", signal.SIGKILL)
    load.open.set()
    seen = wait_for("HAProxy's word that b is down", down("b"))
    time.sleep(1)
    load.end()
    load.check(running)
    broken = collections.Counter(a.fault for a in load.failed)
    say("kill", f"b killed with {running} requests, HAProxy saw it after {seen:.1f} s: {len(load.answers) - before} answers meanwhile, all right; "
        f"{len(load.failed)} attempts failed ({', '.join(f'{n} {f}' for f, n in broken.items())}) and went well when asked again")

    # Only what it had moved, and comes back with its replacement.
    without = homes(front, 2)
    moved = {name for name in NAMES if without[name] != first[name]}
    demand(moved == {name for name in NAMES if first[name] == "b"}, f"other adapters than those of b moved: {first} became {without}")
    serve("b", slots["b"], store, folder / "cache-b")
    wait_for("the replacement of b", up("b"))
    after = homes(front, 2)
    demand(after == first, f"adapters are not where they were: {first} became {after}")
    say("moves", f"without b its {len(moved)} adapters moved ({count(without)}) and no other; with its replacement all are where they were")
    for slot in slots:
        processes[slot].send_signal(signal.SIGTERM)
    for slot in slots:
        stop(slot, None)
    moto.stop()


def probe(port, line="GET /v1/models"):
    """The beginning of what a server answers, whatever that is."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(64)
    except OSError:
        return b""


def stop(name, how):
    """Waits for the end of a process, which is told of it by the signal, if one is given."""
    if how:
        processes[name].send_signal(how)
    code = processes.pop(name).wait(60)
    demand(how == signal.SIGKILL or code == 0, f"{name} ended with {code}")


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        run()
    except AssertionError as error:
        logs = "".join(f"\n--- {log.name}\n{log.read_text()[-600:]}" for log in sorted(folder.glob("*.log")))
        sys.exit(f"{logs}\n\ncheck.py: {error}")
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    print("the servers, the store and HAProxy do what they should")


main()
