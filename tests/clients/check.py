#!/usr/bin/env python3
"""The server as its real clients use it: the `openai` package, the page in headless Chromium, adapters in an S3-compatible store, and OpenTelemetry.

usage: check.py LORIMER CHROMIUM [FOLDER_OF_SCREENSHOTS]

Needs the packages `openai`, `playwright`, `moto[server]`, `cryptography`, `boto3` and `opentelemetry-proto`. Trains two small adapters of the tiny base of the tests, serves them and asks. Ends with an error where
something is not as it should be.
"""
import datetime, http.server, ipaddress, json, os, pathlib, shutil, socket, ssl, subprocess, sys, tempfile, threading, time, urllib.error, urllib.request

from typing import Annotated, Literal

import boto3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer
from openai import BadRequestError, DefaultHttpx2Client, NotFoundError, OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status
from pydantic import BaseModel, Field

from page import check as check_page

lorimer, chromium = sys.argv[1:3]
screenshots = sys.argv[3] if len(sys.argv) > 3 else None
base = pathlib.Path(__file__).resolve().parents[1] / "goldens" / "tiny-llama"
folder = pathlib.Path(tempfile.mkdtemp())
rows = [("up", "yes"), ("down", "no")]
data = folder / "data.jsonl"
message = lambda role, content: {"role": role, "content": content}
data.write_text("".join(
    json.dumps({"messages": [message("user", f"{rows[i % 2][0]} {i // 2}"), message("assistant", rows[i % 2][1])]}) + "\n"
    for i in range(24)))
root = folder / "adapters"
for name, more in [("yes-no", ["--max-steps", "60"]), ("tenant/bone", ["--max-steps", "20", "--method", "bone", "--rank", "4"])]:
    command = [lorimer, "train", "--model", base, "--data", data, "--output", root / name, "--lr", "1e-2", "--quiet", *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def serve(adapters, *more, **environment):
    command = [lorimer, "serve", "--model", base, "--adapters", adapters, "--port", "0", "--pool", "4MB", "--json", "--quiet", *more]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return server, json.loads(server.stdout.readline())["url"]


def end(server):
    server.terminate()
    assert server.wait(timeout=60) == 0, server.returncode


def with_openai(url):
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    names = [m.id for m in client.models.list()]
    assert names[1:] == ["tenant/bone", "yes-no"], names
    assert client.models.retrieve("tenant/bone").id == "tenant/bone"
    ask = dict(messages=[message("user", "up 3")], max_tokens=8, temperature=0)
    chat = client.chat.completions.create(model="yes-no", logprobs=True, top_logprobs=2, **ask)
    assert chat.choices[0].message.content == "yes" and chat.choices[0].finish_reason == "stop", chat
    assert chat.usage.completion_tokens == len(chat.choices[0].logprobs.content), chat
    stream = client.chat.completions.create(model="yes-no", stream=True, stream_options={"include_usage": True}, **ask)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "yes", chunks
    assert chunks[-1].usage == chat.usage, chunks[-1]
    # Whatever this model would say, what comes is what the class has.
    class Person(BaseModel):
        name: Literal["Ada", "Grace"]
        age: Annotated[int, Field(ge=0, le=99)]

    parsed = client.chat.completions.parse(model="yes-no", messages=ask["messages"], max_tokens=200, temperature=1, seed=1, response_format=Person)
    assert parsed.choices[0].message.parsed.name in ("Ada", "Grace") and parsed.choices[0].finish_reason == "stop", parsed
    mixed = client.chat.completions.create(model=names[0], extra_body={"lora": [{"id": "yes-no", "scale": 1.0}]}, **ask)
    assert mixed.choices[0].message.content == "yes", mixed
    text = client.completions.create(model="yes-no", prompt=["up 3", "down 3"], max_tokens=4, temperature=0, n=2, logprobs=2, echo=True)
    assert len(text.choices) == 4 and all(c.logprobs.text_offset[:5] == [0, 1, 2, 3, 4] for c in text.choices), text
    try:
        client.chat.completions.create(model="none", **ask)
        sys.exit("an adapter that is not there was answered for")
    except NotFoundError as error:
        assert error.code == "adapter_not_found", error


def with_encoder():
    folder = base.parent / "tiny-bert"
    command = [lorimer, "serve", "--model", folder, "--adapters", base.parent / "family-adapters", "--port", "0", "--json", "--quiet"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    client = OpenAI(base_url=json.loads(server.stdout.readline())["url"] + "/v1", api_key="none", max_retries=0)
    texts = ["The man was there.", "of the time"]
    # The client asks for base64 unless it is told otherwise, and reads either.
    ask = lambda **more: client.embeddings.create(**{"model": "base", "input": texts, **more})
    packed, plain = ask(), ask(encoding_format="float")
    near = lambda a, b: max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-6
    assert [d.index for d in packed.data] == [0, 1] and all(near(a.embedding, b.embedding) for a, b in zip(packed.data, plain.data)), packed
    assert len(ask(dimensions=8).data[0].embedding) == 8 and packed.usage.total_tokens > 4, packed.usage
    assert not near(ask(model="bert").data[0].embedding, plain.data[0].embedding)
    try:
        client.chat.completions.create(model="base", messages=[message("user", "a")])
        sys.exit("an encoder answered a chat")
    except BadRequestError as error:
        assert error.code == "not_a_decoder", error
    end(server)


def certificate(name, serial, authority=True):
    """A certificate for 127.0.0.1 that signs itself, and its key, as PEM files; rustls wants that of a server to be no authority's."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = (x509.CertificateBuilder().subject_name(own).issuer_name(own).public_key(key.public_key()).serial_number(serial)
             .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
             .add_extension(names, False).add_extension(x509.BasicConstraints(authority, None), True).sign(key, hashes.SHA256()))
    plain = serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    (folder / f"{name}.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))


def with_tls():
    certificate("own", 1)
    certificate("other", 2)
    refused = subprocess.run([lorimer, "serve", "--model", base, "--tls-cert", folder / "own.pem", "--tls-key", folder / "other.key"], capture_output=True, text=True)
    assert refused.returncode == 1 and "cannot be used" in refused.stderr, refused
    server, url = serve(root, "--tls-cert", folder / "own.pem", "--tls-key", folder / "own.key")
    assert url.startswith("https://"), url
    port = int(url.rsplit(":", 1)[1])
    trusted = ssl.create_default_context(cafile=folder / "own.pem")
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, http_client=DefaultHttpx2Client(verify=trusted))
    stream = client.chat.completions.create(model="yes-no", messages=[message("user", "up 3")], max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "yes"
    # Whoever speaks no TLS, or an old one, gets nothing and holds nobody up.
    with socket.create_connection(("127.0.0.1", port)) as plain:
        plain.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" not in plain.recv(1000)
    serial = lambda: x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode()).serial_number
    assert serial() == 1
    # A certificate that was renewed; for a moment its key is not there yet.
    time.sleep(10.5)
    shutil.copy(folder / "other.pem", folder / "own.pem")
    assert serial() == 1
    shutil.copy(folder / "other.key", folder / "own.key")
    time.sleep(10.5)
    assert serial() == 2
    end(server)


def with_traces():
    """What is exported is what the official schema has, field by field, over TLS too."""
    posted = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf", self.headers
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportTraceServiceRequest.FromString(body)
            # Nothing that the schema does not know.
            request.DiscardUnknownFields()
            assert request.ByteSize() == len(body), request
            posted.append(request)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    certificate("collector", 3, authority=False)
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(folder / "collector.pem", folder / "collector.key")
    collector.socket = own.wrap_socket(collector.socket, server_side=True)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"https://127.0.0.1:{collector.server_port}"
    server, url = serve(root, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, SSL_CERT_FILE=str(folder / "collector.pem"), OTEL_RESOURCE_ATTRIBUTES="service.namespace=tests,service.name=no", OTEL_SERVICE_NAME="check")
    trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, default_headers={"traceparent": f"00-{trace}-{span}-01", "tracestate": "a=1"})
    raw = client.chat.completions.with_raw_response.create(model="yes-no", messages=[message("user", "up 3")], max_tokens=8, temperature=0.5, stop=["never"])
    stream = client.completions.create(model="tenant/bone", prompt="up", max_tokens=5, stream=True, extra_body={"ignore_eos": True})
    assert list(stream)
    end(server)
    collector.shutdown()
    spans = [s for request in posted for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
    assert [s.name for s in spans] == ["chat yes-no", "text_completion tenant/bone"], spans
    resource = {a.key: a.value.string_value for a in posted[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "check" and resource["service.namespace"] == "tests", resource
    assert posted[0].resource_spans[0].scope_spans[0].scope.name == "lorimer"
    for one in spans:
        assert one.trace_id.hex() == trace and one.parent_span_id.hex() == span and one.trace_state == "a=1", one
        assert one.kind == Span.SPAN_KIND_SERVER and one.status.code == Status.STATUS_CODE_UNSET and len(one.span_id) == 8, one
        assert one.flags == 1 | SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK, one
        assert 0 < one.end_time_unix_nano - one.start_time_unix_nano < 60e9 and abs(one.start_time_unix_nano / 1e9 - time.time()) < 600, one
    value = lambda any: [value(v) for v in any.array_value.values] if any.HasField("array_value") else getattr(any, any.WhichOneof("value"))
    chat, text = ({a.key: value(a.value) for a in s.attributes} for s in spans)
    usage = raw.parse().usage
    assert raw.headers["traceresponse"] == f"00-{trace}-{spans[0].span_id.hex()}-01", raw.headers
    assert (chat["gen_ai.usage.input_tokens"], chat["gen_ai.usage.output_tokens"]) == (usage.prompt_tokens, usage.completion_tokens), chat
    assert chat["gen_ai.request.temperature"] == 0.5 and chat["gen_ai.request.max_tokens"] == 8 and chat["lorimer.adapters"] == ["yes-no"], chat
    assert text["gen_ai.usage.output_tokens"] == 5 and text["gen_ai.response.finish_reasons"] == ["length"], text
    assert 0 <= text["gen_ai.latency.time_in_queue"] <= text["gen_ai.latency.time_to_first_token"] <= text["gen_ai.latency.e2e"], text


def with_s3():
    moto = ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    keys = dict(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1")
    endpoint = f"http://127.0.0.1:{port}"
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret")
    s3.create_bucket(Bucket="models")

    def upload(name, source):
        for file in (root / source).iterdir():
            if file.name in ("adapter_model.safetensors", "adapter_config.json", "lorimer.json"):
                s3.upload_file(str(file), "models", f"adapters/{name}/{file.name}")

    upload("team/yes-no", "yes-no")
    upload("bone", "tenant/bone")
    s3.put_object(Bucket="models", Key="adapters/broken/adapter_config.json", Body=b"{}")
    cache = folder / "cache"
    environment = dict(keys, AWS_ENDPOINT=endpoint, AWS_ALLOW_HTTP="true")
    start = lambda: serve("s3://models/adapters", "--adapter-cache", cache, **environment)
    server, url = start()

    def ask(url, model, text="up 3"):
        client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model=model, messages=[message("user", text)], max_tokens=8, temperature=0)
        return answer.choices[0].message.content

    names = [m.id for m in OpenAI(base_url=url + "/v1", api_key="none").models.list()][1:]
    assert names == ["bone", "broken", "team/yes-no"], names
    # Keys that are no paths end no server.
    s3.put_object(Bucket="models", Key="adapters/../up/adapter_config.json", Body=b"{}")
    assert ask(url, "team/yes-no") == "yes" and ask(url, "team/yes-no", "down 4") == "no"
    other = ask(url, "bone", "left 7")
    for missing in ["broken", "none", "../up"]:
        try:
            ask(url, missing)
            sys.exit(f"{missing} was answered for")
        except NotFoundError as error:
            assert error.code == "adapter_not_found", error
        except Exception as error:
            assert missing == "../up" and error.code == "invalid_name", error
    # A name of its own, kept over a restart; an adapter that came later; one that was replaced; one that went.
    def call(method, path, body=None):
        data = json.dumps(body).encode() if body else None
        return urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method))

    call("PUT", "/v1/adapters/prod", {"path": "team/yes-no"})
    try:
        call("PUT", "/v1/adapters/prod2", {"path": "../../etc"})
        sys.exit("a path out of the store was taken")
    except urllib.error.HTTPError as error:
        assert json.load(error)["error"]["code"] == "path_refused"
    upload("late", "yes-no")
    assert ask(url, "late") == "yes"
    upload("bone", "yes-no")
    s3.delete_object(Bucket="models", Key="adapters/late/adapter_config.json")
    # The first request after a while is answered as it is, and makes the server look.
    for _ in range(50):
        if ask(url, "bone") == "yes":
            break
        time.sleep(0.2)
    assert ask(url, "bone") == "yes"
    try:
        for _ in range(50):
            ask(url, "late")
            time.sleep(0.2)
        sys.exit("an adapter that went was answered for")
    except NotFoundError:
        pass
    end(server)
    server, url = start()
    assert ask(url, "prod") == "yes"
    # Without the store, what was fetched is served.
    moto.stop()
    time.sleep(2.5)
    assert ask(url, "prod") == "yes"
    end(server)
    assert not any(".." in str(p.relative_to(cache)) for p in cache.rglob("*")) and not (folder / "up").exists()


server, url = serve(root, "--allow-uploads")
with_openai(url)
check_page(url, chromium, root / "yes-no", screenshots)
end(server)
with_tls()
with_traces()
with_s3()
with_encoder()
shutil.rmtree(folder)
print("the openai client, the page, TLS, traces and the object store do what they should")
