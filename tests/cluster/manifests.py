#!/usr/bin/env python3
"""Holds what is under deploy/ against the schemas of Kubernetes, against each other and against a real server.

usage: manifests.py LORIMER [CRD.yaml …]

Needs the packages `pyyaml`, `jsonschema` and `kubernetes-validate`, and `kubectl` or `kustomize`; checks HAProxy's files where `haproxy` is installed.
Resources of KEDA and of Gateway API are held against the definitions (CRDs) that are given, files of those projects' releases; those of a kind that
has none are named in the last line. Ends with an error where something is not as it should be.
"""
import json, os, pathlib, re, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request

import jsonschema, kubernetes_validate, yaml

here = pathlib.Path(__file__).resolve()
root = here.parents[2]
deploy = root / "deploy"
lorimer, definitions = sys.argv[1], sys.argv[2:]
SECRETS = {"lorimer-keys": {"api-key", "admin-key"}, "lorimer-store": None}
CUSTOM = {"InferencePool", "Gateway", "HTTPRoute", "ScaledObject"}


def demand(holds, sentence):
    if not holds:
        raise AssertionError(sentence)


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def render(overlay):
    tool = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    demand(shutil.which(tool[0]), "neither kubectl nor kustomize is installed")
    result = subprocess.run([*tool, overlay], capture_output=True, text=True)
    demand(result.returncode == 0, f"{overlay} does not render: {result.stderr}")
    return [d for d in yaml.safe_load_all(result.stdout) if d]


def closed(schema):
    """The schema with keys that it does not name refused, as kubectl refuses them."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: {k: closed(s) for k, s in value.items()} if key == "properties" else closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def custom_schemas():
    found = {}
    for path in definitions:
        for crd in documents(pathlib.Path(path)):
            for version in crd["spec"]["versions"] if crd["kind"] == "CustomResourceDefinition" else []:
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def hold_to_schema(document, schemas, where):
    kind = document["kind"]
    if kind not in CUSTOM:
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            raise AssertionError(f"{where}: {kind} {document['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}")
        return None
    schema = schemas.get((document["apiVersion"], kind))
    if schema is None:
        demand(not any(k == kind for _, k in schemas), f"{where}: {kind} has no version {document['apiVersion']}")
        return kind
    errors = [f"{'.'.join(map(str, e.path))}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(document)]
    demand(not errors, f"{where}: {kind} {document['metadata']['name']}: {'; '.join(errors)}")
    return None


# ---- What refers to what.

def matches(selector, labels):
    expressions = selector.get("matchExpressions", [])
    demand(all(e["operator"] == "In" for e in expressions), f"an operator that is not looked at: {expressions}")
    return selector.get("matchLabels", {}).items() <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in expressions)


def cross(docs, where):
    of = lambda kind: {d["metadata"]["name"]: d for d in docs if d["kind"] == kind}
    for d in docs:
        demand(d["kind"] == "Namespace" or d["metadata"].get("namespace") == "lorimer", f"{where}: {d['metadata']['name']} is in no namespace")
    pods = {name: d["spec"]["template"] for name, d in of("Deployment").items()}
    selected = lambda selector: [p for p in pods.values() if matches(selector, p["metadata"]["labels"])]
    for name, d in of("Deployment").items():
        demand(matches(d["spec"]["selector"], pods[name]["metadata"]["labels"]), f"{where}: {name} does not select its own pods")
    for name, template in pods.items():
        spec = template["spec"]
        demand(spec["securityContext"]["runAsNonRoot"] is True, f"{where}: {name} may run as root")
        demand(spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, f"{where}: {name} has no seccomp profile")
        demand("serviceAccountName" not in spec or spec["serviceAccountName"] in of("ServiceAccount"), f"{where}: {name}: no such ServiceAccount")
        volumes = {v["name"] for v in spec["volumes"]}
        for v in spec["volumes"]:
            demand("configMap" not in v or v["configMap"]["name"] in of("ConfigMap"), f"{where}: {name}: no ConfigMap for {v}")
            claim = v.get("persistentVolumeClaim", {}).get("claimName")
            demand(claim is None or claim in of("PersistentVolumeClaim"), f"{where}: {name}: no claim {claim}")
        for c in spec["containers"]:
            context = c["securityContext"]
            demand(context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]},
                   f"{where}: {name} is not restricted: {context}")
            demand({m["name"] for m in c["volumeMounts"]} == volumes, f"{where}: {name}: mounts are not its volumes {volumes}")
            named = {p["name"]: p["containerPort"] for p in c["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                for how, place in c.get(probe, {}).items():
                    if isinstance(place, dict):
                        demand(place["port"] in named or place["port"] in named.values(), f"{where}: {name}: {probe} asks port {place['port']}, which is none")
            environment = {e["name"]: e for e in c.get("env", [])}
            for used in re.findall(r"\$\((\w+)\)", json.dumps([c.get("args"), c.get("env")])):
                demand(used in environment, f"{where}: {name} uses $({used}), which its environment does not have")
            for source in [e.get("valueFrom", {}) for e in environment.values()] + c.get("envFrom", []):
                ref = source.get("configMapKeyRef") or source.get("secretKeyRef") or source.get("secretRef")
                if ref and "configMapKeyRef" in source:
                    demand(ref["key"] in of("ConfigMap")[ref["name"]]["data"], f"{where}: {name}: {ref} is not there")
                elif ref:
                    keys = SECRETS.get(ref["name"], set())
                    demand(ref["name"] in SECRETS and (keys is None or ref["key"] in keys), f"{where}: {name}: docs/cluster.md makes no {ref}")
            scrape = template["metadata"].get("annotations", {}).get("prometheus.io/port")
            demand(scrape is None or int(scrape) in named.values(), f"{where}: {name}: figures are asked of port {scrape}, which is none")
    for name, d in of("Service").items():
        chosen = selected({"matchLabels": d["spec"]["selector"]})
        demand(len(chosen) == 1, f"{where}: the Service {name} selects {len(chosen)} Deployments")
        named = {p["name"] for c in chosen[0]["spec"]["containers"] for p in c["ports"]}
        demand(all(p["targetPort"] in named for p in d["spec"]["ports"]), f"{where}: the Service {name} goes to ports that are not in {named}")
    for kind, selector in [("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"), ("InferencePool", "selector")]:
        for name, d in of(kind).items():
            demand(selected(d["spec"][selector]), f"{where}: {kind} {name} selects nothing")
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for name, d in of(kind).items():
            target = d["spec"]["scaleTargetRef"]["name"]
            demand(target in pods, f"{where}: {kind} {name} scales {target}, which is not there")
            demand("replicas" not in of("Deployment")[target]["spec"], f"{where}: {target} has a number of replicas beside its autoscaler")
    for d in of("InferencePool").values():
        picker = d["spec"]["endpointPickerRef"]
        demand(picker["port"]["number"] in [p["port"] for p in of("Service")[picker["name"]]["spec"]["ports"]], f"{where}: the picker has no port {picker}")
    for d in of("HTTPRoute").values():
        for backend in [b for rule in d["spec"]["rules"] for b in rule["backendRefs"]]:
            demand(backend["name"] in of(backend["kind"]), f"{where}: the route goes to {backend}, which is not there")
        demand(all(p["name"] in of("Gateway") for p in d["spec"]["parentRefs"]), f"{where}: the route belongs to no Gateway")
    for d in of("RoleBinding").values():
        demand(all(s["name"] in of("ServiceAccount") for s in d["subjects"]) and d["roleRef"]["name"] in of("Role"), f"{where}: a binding of nothing")
    return pods


def server(pods):
    """The arguments of the server's container, and its port; what they promise each other."""
    spec = pods["lorimer"]["spec"]
    container = spec["containers"][0]
    arguments = dict(a.removeprefix("--").split("=", 1) for a in container["args"])
    port = int(arguments["port"])
    demand(port == container["ports"][0]["containerPort"], f"the server listens at {port}, its container at {container['ports']}")
    needed = int(arguments["drain"]) + int(arguments["grace"]) + 5
    demand(spec["terminationGracePeriodSeconds"] >= needed, f"terminationGracePeriodSeconds is below {needed}: drain, grace and 5 s")
    probe = container["readinessProbe"]
    notice = probe["periodSeconds"] * probe["failureThreshold"]
    demand(int(arguments["drain"]) > 2 * notice, f"--drain {arguments['drain']} is short beside the {notice} s that readiness takes to be seen")
    return container, arguments, port


# ---- Against the server.

def get(port, path, host="localhost"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def against_server(container, arguments, specs):
    """Starts the server as its container does, with this machine's folders in place of volumes, and asks what probes and scalers ask."""
    flags = set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", subprocess.check_output([lorimer, "serve", "--help"], text=True), re.M))
    demand(arguments.keys() <= flags, f"`lorimer serve` has no {sorted(arguments.keys() - flags)}")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        here_is = {"model": here.parents[1] / "goldens/tiny-llama", "adapters": folder, "adapter-cache": f"{folder}/cache", "port": port, "pool": "16MB",
                   "served-name": "base", "drain": "2"}
        keys = {"LORIMER_API_KEY": "a", "LORIMER_ADMIN_KEY": "b"}
        demand(keys.keys() <= {e["name"] for e in container["env"]}, "the container's environment has not both keys")
        command = [lorimer, "serve", *(f"--{k}={here_is.get(k, v)}" for k, v in arguments.items()), "--quiet"]
        log = pathlib.Path(folder, "server.log")
        process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=subprocess.DEVNULL, stderr=log.open("w"))
        try:
            for _ in range(100):
                if get(port, "/metrics")[0] or process.poll() is not None:
                    break
                time.sleep(0.1)
            demand(process.poll() is None, f"the server does not start with the arguments of the manifest: {log.read_text()}")
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                path = container[name]["httpGet"]["path"]
                demand(get(port, path, "10.1.2.3:8000")[0] == 200, f"{name} asks {path}, and a server that is ready answers {get(port, path)[0]}")
            status, figures = get(port, "/metrics", "10.1.2.3:8000")
            demand(status == 200, f"/metrics answers {status}")
            for spec in specs:
                demand(re.search(rf"^{spec}[ {{]", figures, re.M), f"/metrics has no {spec}")
            labels = re.search(r"^vllm:lora_requests_info{(.*)} [\d.e+]+$", figures, re.M)[1]
            wanted = {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
            demand(wanted == set(re.findall(r'(\w+)="', labels)), f"vllm:lora_requests_info has the labels {labels}")
            demand(get(port, "/v1/models")[0] == 401, "requests are answered without the key of the manifest")
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            live, ready = (get(port, container[p]["httpGet"]["path"])[0] for p in ("livenessProbe", "readinessProbe"))
            demand((live, ready) == (200, 503), f"while it drains, the server answers {live} for live and {ready} for ready")
            demand(process.wait(20) == 0, f"the server ended with {process.returncode} after SIGTERM")
        finally:
            process.kill()
            process.wait()


def figures_asked():
    """Names of the server's figures in autoscalers and in the picker's configuration."""
    components = deploy / "kustomize/components"
    rules = documents(components / "hpa/adapter-rules.yaml")[0]["rules"]
    served = {rule["name"]["as"] for rule in rules}
    for d in documents(components / "hpa/hpa.yaml"):
        asked = {m["pods"]["metric"]["name"] for m in d["spec"]["metrics"]}
        demand(asked <= served, f"the autoscaler asks {asked - served}, which adapter-rules.yaml does not give")
    picker = documents(components / "gateway/picker-config.yaml")[0]
    plugins = {p.get("name", p["type"]): p for p in picker["plugins"]}
    for profile in picker["schedulingProfiles"]:
        demand(all(p["pluginRef"] in plugins for p in profile["plugins"]), f"the picker's profile names plugins that are not there: {profile}")
    engine = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"][0]
    triggers = [t["metadata"]["query"] for d in documents(components / "keda/scaledobject.yaml") for t in d["spec"]["triggers"]]
    return set(re.findall(r"\bvllm:\w+", json.dumps([[r["seriesQuery"] for r in rules], engine, triggers])))


def proxy(overlays, port):
    files = ["haproxy.cfg", "servers.cfg", "servers-kubernetes.cfg"]
    pods = overlays["haproxy"]
    container = pods["lorimer-proxy"]["spec"]["containers"][0]
    environment = {e["name"]: e.get("value", "") for e in container["env"]}
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    bound = environment["LORIMER_BIND"].split(":")[-1], environment["LORIMER_STATS"].split(":")[-1]
    demand(bound == (str(ports["http"]), str(ports["metrics"])), f"HAProxy is bound to {bound}, and its container has {ports}")
    demand(environment["LORIMER_PODS"].startswith("lorimer-pods."), "HAProxy does not ask the headless Service")
    texts = {f: (deploy / "haproxy" / f).read_text() for f in files}
    demand(f'"${{LORIMER_PODS}}:{port}"' in texts[files[2]], f"servers-kubernetes.cfg does not go to port {port}")
    known = set(environment) | {"LORIMER_A", "LORIMER_B", "LORIMER_C", "LORIMER_LOG", "LORIMER_USER"}
    used = set(re.findall(r"\${(\w+)}", "".join(texts.values())))
    demand(used <= known, f"HAProxy's files use {used - known}")
    if not shutil.which("haproxy"):
        return "HAProxy's files (no haproxy here)"
    for servers in files[1:]:
        values = {**environment, "LORIMER_PODS": "lorimer-pods.lorimer.svc.cluster.local"}
        command = ["haproxy", "-c", "-f", deploy / "haproxy" / files[0], "-f", deploy / "haproxy" / servers]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **values})
        demand(result.returncode == 0, f"HAProxy refuses {servers}: {result.stderr.strip()}")
    return None


def main():
    for path in deploy.rglob("*.yaml"):
        demand(documents(path), f"{path} is empty")
        kustomization = path.parent / "kustomization.yaml"
        listed = kustomization.read_text() if kustomization.exists() else ""
        demand(path.name in ("kustomization.yaml", "adapter-rules.yaml") or path.name in listed, f"{path} is in no kustomization")
    schemas, unchecked, overlays, count = custom_schemas(), set(), {}, 0
    for overlay in sorted((deploy / "kustomize/overlays").iterdir()):
        docs = render(overlay)
        unchecked |= {hold_to_schema(d, schemas, overlay.name) for d in docs} - {None}
        overlays[overlay.name] = cross(docs, overlay.name)
        count += len(docs)
    container, arguments, port = server(overlays["haproxy"])
    pools = [d for d in documents(deploy / "kustomize/components/gateway/pool.yaml") if d["kind"] == "InferencePool"]
    demand(all(d["spec"]["targetPorts"] == [{"number": port}] for d in pools), f"an InferencePool does not go to port {port}")
    image = (deploy / "Containerfile").read_text()
    user = overlays["haproxy"]["lorimer"]["spec"]["securityContext"]["runAsUser"]
    demand(f"EXPOSE {port}\n" in image and f"USER {user}:" in image, f"the Containerfile has not port {port} and user {user}")
    missing = proxy(overlays, port)
    specs = figures_asked()
    against_server(container, arguments, sorted(specs))
    left = [f"{', '.join(sorted(unchecked))} (no definitions given)"] * bool(unchecked) + [missing] * bool(missing)
    print(f"{len(overlays)} overlays of {count} resources, {len(arguments)} flags, {len(specs)} figures and the probes are as they should be"
          + f"; not checked: {'; '.join(left)}" * bool(left))


try:
    main()
except AssertionError as error:
    sys.exit(f"manifests.py: {error}")
