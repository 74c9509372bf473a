//! The whole server, as its clients use and misuse it, on a tiny model.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use common::{Fixture, error, json as verb, lorimer};

/// A running server.
struct Server {
    child: Child,
    address: String,
    _out: BufReader<ChildStdout>,
}

/// An answer: status, head, body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_string()
    }
}

impl Server {
    fn start(f: &Fixture, root: &str, more: &[&str]) -> Self {
        let base = ["serve", "--model", &f.model, "--adapters", root, "--port", "0", "--pool", "4MB", "--json", "-q"];
        let mut child = lorimer(&[&base, more].concat()).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let url: Value = serde_json::from_str(&line).expect("the server says where it is");
        let address = url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string();
        Self { child, address, _out: out }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends bytes as they are and reads to the end of the connection.
    fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that has read enough may close before all is written.
        let _ = stream.write_all(bytes);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let text = String::from_utf8_lossy(&all).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Answer { status, head: head.to_lowercase(), body: dechunked(head, body) }
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let address = &self.address;
        self.raw(
            format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}").as_bytes(),
        )
    }

    fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", "")
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.request(method, path, "Content-Type: application/json\r\n", &body.to_string())
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body)
    }

    fn chat(&self, more: Value) -> Answer {
        let mut body =
            json!({ "temperature": 0, "max_tokens": 8, "messages": [{ "role": "user", "content": "up 3" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/chat/completions", &body)
    }

    fn answer(&self, more: Value) -> String {
        let answer = self.chat(more);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    }

    fn signal(&self, name: &str) {
        let status =
            std::process::Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A body that came in chunks.
fn dechunked(head: &str, body: &str) -> String {
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return body.to_string();
    }
    let (mut rest, mut out) = (body, String::new());
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).unwrap_or(0);
        if length == 0 || after.len() < length {
            break;
        }
        out.push_str(&after[..length]);
        rest = after[length..].trim_start_matches("\r\n");
    }
    out
}

/// The events of a stream.
fn events(body: &str) -> Vec<Value> {
    let data = body.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).filter(|e| *e != "[DONE]");
    data.map(|e| serde_json::from_str(e).unwrap()).collect()
}

/// Two adapters in `root`: one that has learnt to say yes and no, and one of another method that says whatever it says.
fn adapters(f: &Fixture) -> String {
    let root = f.path("adapters");
    let (one, two) = (format!("{root}/yes-no"), format!("{root}/tenant/bone"));
    verb(&f.train(&one, &["--max-steps", "60"]));
    verb(&f.train(&two, &["--max-steps", "20", "--method", "bone", "--rank", "4"]));
    root
}

#[test]
fn answers_are_those_of_the_command_line_however_the_adapter_is_named() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let models = server.get("/v1/models").json();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    let base = ids[0];
    assert_eq!(ids[1..], ["tenant/bone", "yes-no"]);
    assert_eq!(server.get("/v1/models/tenant/bone").json()["parent"], base);
    assert_eq!(server.get("/v1/models/none").status, 404);
    let expected = |adapter: &str| {
        let folder = format!("{root}/{adapter}");
        let mut all = vec!["generate", "--model", &f.model, "--prompt", "up 3", "--max-tokens", "8"];
        if !adapter.is_empty() {
            all.extend(["--adapter", &folder]);
        }
        verb(&all)["text"].as_str().unwrap().to_string()
    };
    let yes = expected("yes-no");
    assert_eq!(yes, "yes");
    for more in [
        json!({ "model": "yes-no" }),
        json!({ "model": format!("{base}:yes-no") }),
        json!({ "model": format!("{base}::yes-no") }),
        json!({ "model": base, "adapter_id": "yes-no" }),
        json!({ "adapter": "yes-no" }),
        json!({ "model": "base", "lora": [{ "id": "yes-no" }] }),
        json!({ "lora": [{ "id": "yes-no", "scale": 1.0 }] }),
    ] {
        assert_eq!(server.answer(more.clone()), yes, "{more}");
    }
    assert_eq!(server.answer(json!({ "model": base })), expected(""));
    assert_eq!(server.answer(json!({})), expected(""));
    assert_eq!(server.answer(json!({ "model": "tenant/bone" })), expected("tenant/bone"));
    let sum = format!("{root}/yes-no=0.5");
    let half = verb(&["generate", "--model", &f.model, "--prompt", "up 3", "--max-tokens", "8", "--adapter", &sum]);
    assert_eq!(server.answer(json!({ "lora": [{ "id": "yes-no", "scale": 0.5 }] })), half["text"].as_str().unwrap());
    let two = json!({ "lora": [{ "id": "yes-no", "scale": 0.7 }, { "id": "tenant/bone", "scale": 0.3 }] });
    assert_eq!(server.chat(two).status, 200);
}

#[test]
fn streams_choices_log_probabilities_stops_and_usage() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let whole = server.chat(json!({ "model": "base", "logprobs": true, "top_logprobs": 3 })).json();
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    let told = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(told.len(), 8);
    for token in told {
        // Greedy: the token is the likeliest one.
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
    }
    let streamed = server.chat(json!({ "model": "base", "stream": true, "stream_options": { "include_usage": true } }));
    assert!(streamed.head.contains("text/event-stream"), "{}", streamed.head);
    assert!(streamed.body.trim_end().ends_with("data: [DONE]"));
    let events = events(&streamed.body);
    let pieces: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, text);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    assert!(events.iter().any(|e| e["choices"][0]["finish_reason"] == "length"));
    // Drawn with a seed: several choices differ, and come again with the seed.
    let drawn = |seed: i64| {
        let body = server.chat(json!({ "model": "base", "temperature": 1.5, "n": 3, "seed": seed })).json();
        let texts =
            body["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap().to_string());
        texts.collect::<Vec<_>>()
    };
    let first = drawn(3);
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] || first[1] != first[2], "{first:?}");
    assert_eq!(drawn(3), first);
    assert_ne!(drawn(4), first);
    // Completions: texts, token ids, several prompts, echo, a stop text.
    let complete = |more: Value| {
        let mut body = json!({ "model": "base", "temperature": 0, "max_tokens": 6 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    };
    let plain = complete(json!({ "prompt": "up 3", "logprobs": 2 }));
    let own = plain["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(plain["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 6);
    // Where each token begins in the text, after the prompt if that is echoed.
    let offsets = |answer: &Value, before: usize| {
        let told = &answer["choices"][0]["logprobs"];
        let mut at = before;
        for (token, offset) in told["tokens"].as_array().unwrap().iter().zip(told["text_offset"].as_array().unwrap()) {
            assert_eq!(*offset, json!(at), "{told}");
            at += token.as_str().unwrap().chars().count();
        }
    };
    offsets(&plain, 0);
    offsets(&complete(json!({ "prompt": "up 3", "logprobs": 0, "echo": true })), 4);
    let both = complete(json!({ "prompt": ["up 3", "down 3"], "echo": true }));
    assert_eq!(both["choices"][0]["text"], format!("up 3{own}"));
    assert_eq!(both["choices"].as_array().unwrap().len(), 2);
    let ids = complete(json!({ "prompt": [[1, 5, 7], [2, 3]] }));
    assert_eq!((&ids["usage"]["prompt_tokens"], &ids["usage"]["completion_tokens"]), (&json!(5), &json!(12)));
    let at: Vec<(usize, char)> = own.char_indices().collect();
    if let [.., (start, c), _] = at[..] {
        let stopped = complete(json!({ "prompt": "up 3", "stop": [c.to_string()] }));
        let stopped = stopped["choices"][0]["text"].as_str().unwrap();
        assert!(start >= stopped.len() && own.starts_with(stopped) && !stopped.contains(c), "{stopped:?} of {own:?}");
    }
    let metrics = server.get("/metrics");
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
        "vllm:time_to_first_token_seconds_bucket",
        "lorimer_pool_pages",
    ] {
        assert!(metrics.body.contains(name), "{name}");
    }
    assert!(server.get("/").body.contains("<title>Lorimer</title>"));
}

#[test]
fn adapters_come_and_go_while_the_server_runs() {
    let f = Fixture::new();
    let root = adapters(&f);
    let mut server = Server::start(&f, &root, &[]);
    let yes = server.answer(json!({ "model": "yes-no" }));
    let other = server.answer(json!({ "model": "tenant/bone" }));
    // vLLM's calls.
    let load = |server: &Server, name: &str, path: &str, more: Value| {
        let mut body = json!({ "lora_name": name, "lora_path": path });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/load_lora_adapter", &body)
    };
    let first = load(&server, "alias", "yes-no", json!({}));
    assert_eq!(first.status, 200, "{}", first.body);
    let content = first.json()["content_id"].as_str().unwrap().to_string();
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    // What was recorded when it was trained is what is served; what was not recorded so is told.
    assert!(first.json()["golden_difference"].as_f64().unwrap() < 1e-3, "{}", first.body);
    let manifest = Path::new(&root).join("yes-no/lorimer.json");
    let kept = std::fs::read_to_string(&manifest).unwrap();
    let golden = |change: &dyn Fn(&mut Value)| {
        let mut manifest_now: Value = serde_json::from_str(&kept).unwrap();
        change(&mut manifest_now["golden"][0]);
        std::fs::write(&manifest, manifest_now.to_string()).unwrap();
        let answer = load(&server, "told", "yes-no", json!({ "load_inplace": true }));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["golden_difference"].as_f64()
    };
    assert!(golden(&|g| g["log_probabilities"][0] = json!(-9.0)).unwrap() > 1.0);
    assert_eq!(golden(&|g| g["tokens"] = json!([1u32 << 31])), None);
    assert_eq!(golden(&|g| g["first"] = json!(0)), None);
    std::fs::write(&manifest, &kept).unwrap();
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "told" })).status, 200);
    assert_eq!(load(&server, "alias", "tenant/bone", json!({})).code(), "adapter_exists");
    assert_eq!(load(&server, "alias", "tenant/bone", json!({ "load_inplace": true })).status, 200);
    assert_eq!(server.answer(json!({ "model": "alias" })), other);
    // Our own: compare and swap.
    let swap = |content: &str| {
        server.send("PUT", "/v1/adapters/alias", &json!({ "path": "yes-no", "mode": "swap", "content_id": content }))
    };
    assert_eq!((swap(&content).status, swap(&content).code()), (409, "content_changed".to_string()));
    let listed = server.get("/v1/adapters").json();
    let now =
        listed["adapters"].as_array().unwrap().iter().find(|a| a["name"] == "alias").unwrap()["content_id"].clone();
    assert_eq!(swap(now.as_str().unwrap()).status, 200);
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "tenant/bone" })).status, 200);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
    assert_eq!(server.request("DELETE", "/v1/adapters/none", "", "").status, 404);
    // What cannot be given a name, and disturbs nothing.
    let folder = Path::new(&root).join("broken");
    std::fs::create_dir(&folder).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(&root).join("yes-no").join(file), folder.join(file)).unwrap();
    }
    let weights = folder.join("adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    for (name, path, status, code) in [
        ("new", "broken", 422, "adapter_invalid"),
        ("new", "../adapters/yes-no", 403, "path_refused"),
        ("new", "/etc", 403, "path_refused"),
        ("new", "nothing", 404, "adapter_not_found"),
        ("../new", "yes-no", 400, "invalid_name"),
        (".new", "yes-no", 400, "invalid_name"),
        ("base", "yes-no", 400, "invalid_request"),
    ] {
        let refused = load(&server, name, path, json!({}));
        assert_eq!((refused.status, refused.code().as_str()), (status, code), "{name} {path}: {}", refused.body);
        assert!(!refused.body.contains(&root), "{}", refused.body);
    }
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    // Killed and started again, the server has the same names.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    server = Server::start(&f, &root, &[]);
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
}

/// The OpenAPI document is the one that is checked in, and tells of calls that there are.
#[test]
fn the_document_is_that_of_the_server() {
    let f = Fixture::new();
    let root = f.path("adapters");
    std::fs::create_dir(&root).unwrap();
    let server = Server::start(&f, &root, &["--served-model-name", "small"]);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "small");
    let own = server.get("/openapi.json").json();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(own, kept, "write it anew: lorimer serve --openapi > docs/openapi.json");
    for (path, calls) in own["paths"].as_object().unwrap() {
        for method in calls.as_object().unwrap().keys() {
            let answer = server.send(&method.to_uppercase(), &path.replace("{name}", "x"), &json!({}));
            let there = answer.status == 200 || !["not_found", "method_not_allowed"].contains(&answer.code().as_str());
            assert!(there, "{method} {path}: {}", answer.body);
        }
    }
}

/// Adapters that come from an object store, here a folder named by its URL: fetched when asked for, and again when replaced.
#[test]
fn adapters_come_from_an_object_store() {
    let f = Fixture::new();
    let root = adapters(&f);
    let cache = f.path("cache");
    let address = format!("file://{root}");
    let start = |address: &str| Server::start(&f, address, &["--adapter-cache", &cache]);
    let server = start(&address);
    let ids: Vec<Value> =
        server.get("/v1/models").json()["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids[1..], [json!("tenant/bone"), json!("yes-no")]);
    assert!(!Path::new(&cache).join("yes-no").exists(), "nothing is fetched unasked");
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert_eq!(server.send("PUT", "/v1/adapters/prod", &json!({ "path": "yes-no" })).status, 200);
    for path in ["../adapters/yes-no", "/etc", "yes-no/../yes-no"] {
        let answer = server.send("PUT", "/v1/adapters/x", &json!({ "path": path }));
        assert_eq!((answer.status, answer.code().as_str()), (403, "path_refused"), "{}", answer.body);
    }
    let bone = server.answer(json!({ "model": "tenant/bone" }));
    for file in ["adapter_model.safetensors", "adapter_config.json", "lorimer.json"] {
        std::fs::copy(format!("{root}/tenant/bone/{file}"), format!("{root}/yes-no/{file}")).unwrap();
    }
    // The first request after a while is answered as it is, and makes the server look.
    let end = Instant::now() + Duration::from_secs(20);
    while server.answer(json!({ "model": "yes-no" })) != bone {
        assert!(Instant::now() < end, "the adapter that was replaced is served on");
        std::thread::sleep(Duration::from_millis(100));
    }
    let versions = std::fs::read_dir(format!("{cache}/yes-no")).unwrap().count();
    assert_eq!(versions, 1, "what was replaced is gone");
    drop(server);
    // The name is kept, and what was fetched serves on without being fetched again.
    let server = start(&address);
    assert_eq!(server.answer(json!({ "model": "prod" })), bone);
    assert_eq!(server.answer(json!({ "adapter_id": "yes-no" })), bone);
    drop(server);
    let problem =
        error(&["serve", "--model", &f.model, "--adapters", "ftp://x/y", "--adapter-cache", &cache, "--port", "0"]);
    assert!(problem.contains("ftp://x/y"), "{problem}");
}

#[test]
fn keys_are_asked_for_and_needed_beyond_this_machine() {
    let f = Fixture::new();
    let root = adapters(&f);
    let open = ["serve", "--model", &f.model, "--host", "0.0.0.0", "--port", "0"];
    assert!(error(&open).contains("--api-key"), "a server without keys is not started");
    assert!(error(&[&open[..], &["--api-key", "a"]].concat()).contains("--admin-key"));
    let server = Server::start(&f, &root, &["--api-key", "right", "--admin-key", "higher"]);
    let with = |key: &str, method: &str, path: &str, body: &str| {
        let key = if key.is_empty() { String::new() } else { format!("Authorization: Bearer {key}\r\n") };
        server.request(method, path, &format!("{key}Content-Type: application/json\r\n"), body).status
    };
    let load = r#"{"lora_name": "alias", "lora_path": "yes-no"}"#;
    for key in ["", "wrong", "righ", "rightt"] {
        assert_eq!(with(key, "GET", "/v1/models", ""), 401, "{key}");
        assert_eq!(with(key, "POST", "/v1/completions", "{}"), 401, "{key}");
        assert_eq!(with(key, "POST", "/v1/load_lora_adapter", load), 401, "{key}");
        assert_eq!(with(key, "DELETE", "/v1/adapters/yes-no", ""), 401, "{key}");
    }
    assert_eq!(with("right", "GET", "/v1/models", ""), 200);
    assert_eq!(with("right", "POST", "/v1/load_lora_adapter", load), 401);
    assert_eq!(with("higher", "POST", "/v1/load_lora_adapter", load), 200);
    assert_eq!(with("", "GET", "/health", ""), 200);
    // Another site's name that was led to this machine.
    let stolen = server.raw(
        b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\nAuthorization: Bearer right\r\n\r\n",
    );
    assert_eq!((stolen.status, stolen.code().as_str()), (403, "wrong_host"));
}

#[test]
fn misuse_gets_a_code_and_harms_nobody() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let ask = json!({ "model": "base", "messages": [{ "role": "user", "content": "up 3" }] });
    for (field, value) in [
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(u64::MAX)),
        ("max_tokens", json!("many")),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("min_p", json!(1)),
        ("frequency_penalty", json!(9)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("stop", json!(vec!["x"; 100])),
        ("stop", json!([""])),
        ("messages", json!([])),
        ("messages", json!(["up"])),
        ("messages", json!([{ "role": "nobody" }])),
        ("lora", json!([{ "id": "yes-no", "scale": 1e39 }])),
        ("lora", json!(vec![json!({ "id": "yes-no" }); 40])),
        ("lora", json!([{ "id": "yes-no" }, { "id": "yes-no" }])),
        ("top_logprobs", json!(1000)),
        ("seed", json!(1.5)),
    ] {
        let mut body = ask.clone();
        body[field] = value.clone();
        body["logprobs"] = json!(true);
        let refused = server.post("/v1/chat/completions", &body);
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (400, "invalid_request"),
            "{field} {value}: {}",
            refused.body
        );
        assert_eq!(refused.json()["error"]["message"].as_str().unwrap().lines().count(), 1);
    }
    for (name, status) in [("none", 404), ("../yes-no", 400), ("", 200), ("a\u{0}b", 400)] {
        assert_eq!(server.chat(json!({ "model": name })).status, status, "{name:?}");
    }
    assert_eq!(server.post("/v1/completions", &json!({ "model": "base", "prompt": "" })).status, 400);
    assert_eq!(server.post("/v1/completions", &json!({ "model": "base", "prompt": [1_000_000] })).status, 400);
    let long =
        server.post("/v1/completions", &json!({ "model": "base", "prompt": "up ".repeat(5000), "max_tokens": 1 }));
    assert_eq!(long.status, 400, "{}", long.body);
    // Bodies and heads that are none.
    let json_type = "Content-Type: application/json\r\n";
    let deep = "[".repeat(100_000);
    for body in ["", "{", "null", "[1, 2", "\u{0}", deep.as_str(), r#"{"messages": {"#] {
        assert_eq!(
            server.request("POST", "/v1/chat/completions", json_type, body).code(),
            "invalid_request",
            "{:.20}",
            body
        );
    }
    assert_eq!(
        server.request("POST", "/v1/chat/completions", "Content-Type: text/plain\r\n", &ask.to_string()).code(),
        "not_json"
    );
    let host = &server.address;
    let large = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n{json_type}Content-Length: 99999999999\r\n\r\n{{"
    );
    assert_eq!(server.raw(large.as_bytes()).status, 413);
    let wide = format!("GET /health HTTP/1.1\r\nHost: {host}\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert_eq!(server.raw(wide.as_bytes()).status, 431);
    let many = format!("GET /health HTTP/1.1\r\nHost: {host}\r\n{}\r\n", "X: x\r\n".repeat(1000));
    assert_eq!(server.raw(many.as_bytes()).status, 431);
    assert_eq!(server.raw(b"\x16\x03\x01nonsense\r\n\r\n").status, 400);
    assert_eq!(server.get("/v1/chat/completions").code(), "method_not_allowed");
    assert_eq!(server.get("/nothing/../../etc/passwd").code(), "not_found");
    // Clients that go away in the middle of an answer take their requests with them: they are counted, and most of what they asked for is not
    // computed. To be seen to fail: `follow` that goes on when nobody listens.
    let figures = || server.get("/v1/state").json()["figures"].clone();
    let before = figures();
    const LONG: u64 = 500;
    for _ in 0..5 {
        let mut stream = server.connect();
        let body = json!({ "model": "base", "prompt": "up", "max_tokens": LONG, "ignore_eos": true, "stream": true })
            .to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n{json_type}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut first = [0; 64];
        let _ = stream.read(&mut first).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let engine = server.get("/v1/state").json()["figures"]["engine"].clone();
        let (pages, free) = (engine["pages"].as_u64().unwrap(), engine["free_pages"].as_u64().unwrap());
        let idle = engine["cached_pages"].as_u64().unwrap() + engine["adapter_pages"].as_u64().unwrap();
        if engine["running"] == 0 && engine["waiting"] == 0 && free + idle == pages {
            break;
        }
        assert!(Instant::now() < deadline, "{engine}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // Figures are a fifth of a second old at most.
    std::thread::sleep(Duration::from_millis(300));
    let since = |name: &str, group: &dyn Fn(&Value) -> Value| {
        group(&figures())[name].as_u64().unwrap() - group(&before)[name].as_u64().unwrap()
    };
    assert_eq!(since("cancelled", &Value::clone), 5);
    let computed = since("generated_tokens", &|f| f["engine"].clone());
    assert!(computed < 5 * LONG / 2, "{computed} of {} tokens were computed for nobody", 5 * LONG);
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert_eq!(server.get("/v1/state").json()["figures"]["restarts"], 0);
}

#[test]
fn a_server_that_is_told_to_stop_ends_what_it_began() {
    let f = Fixture::new();
    let root = adapters(&f);
    let mut server = Server::start(&f, &root, &[]);
    let mut stream = server.connect();
    let body =
        json!({ "model": "base", "prompt": "up", "max_tokens": 100, "ignore_eos": true, "stream": true }).to_string();
    let host = server.address.clone();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut first = [0; 32];
    let n = stream.read(&mut first).unwrap();
    server.signal("TERM");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    let whole = [&first[..n], &rest].concat();
    assert!(String::from_utf8_lossy(&whole).contains("data: [DONE]"), "the answer was cut");
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect(&host).is_err());
}

/// What is counted as what: an answer that a stop text ends is an answer, and the bound on adapters is that of the batch.
#[test]
fn figures_are_what_they_say() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &["--max-running", "7"]);
    let ask = json!({ "model": "base", "prompt": "up 3", "temperature": 0, "max_tokens": 300, "ignore_eos": true });
    let whole = server.post("/v1/completions", &ask).json()["choices"][0]["text"].as_str().unwrap().to_string();
    let stop: String = whole.chars().skip(3).take(2).collect();
    for stream in [false, true] {
        let mut ask = ask.clone();
        (ask["stop"], ask["stream"]) = (json!([stop]), json!(stream));
        let stopped = server.post("/v1/completions", &ask);
        assert!(stopped.status == 200 && stopped.body.contains("\"stop\""), "{}", stopped.body);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    let figures = loop {
        let figures = server.get("/v1/state").json()["figures"].clone();
        if figures["engine"]["pages"] != 0 && figures["engine"]["running"] == 0 && figures["answered"] == 3 {
            break figures;
        }
        assert!(Instant::now() < deadline, "{figures}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!((&figures["cancelled"], &figures["failed"]), (&json!(0), &json!(0)), "{figures}");
    let observed: u64 = figures["whole"]["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(observed, 3, "{figures}");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("max_lora=\"7\""), "{metrics}");
    // Blocks that are kept for prompts that begin alike are not in use.
    assert!(figures["engine"]["cached_pages"].as_u64().unwrap() > 0, "{figures}");
    let usage = metrics.lines().find(|l| l.starts_with("vllm:kv_cache_usage_perc{")).unwrap();
    assert!(usage.ends_with("} 0"), "{usage}");
}

/// A folder that may be read and not written is served; names that are given are told to be forgotten. To be seen to fail: an error of the
/// first write ends the call.
#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_written_is_served() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let f = Fixture::new();
    let root = adapters(&f);
    let mode = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(f.folder.path(), 0o755);
    mode(Path::new(&root), 0o555);
    let probe = Path::new(&root).join("probe");
    let program = Path::new(&f.path("lorimer")).to_path_buf();
    let mut command =
        lorimer(&["serve", "--model", &f.model, "--adapters", &root, "--port", "0", "--pool", "4MB", "--json"]);
    if std::fs::write(&probe, b"").is_ok() {
        // Who may do everything runs it as somebody who may not, from where that one can reach it.
        std::fs::remove_file(&probe).unwrap();
        let model = f.path("model");
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(&f.model).unwrap().flatten() {
            std::fs::copy(entry.path(), Path::new(&model).join(entry.file_name())).unwrap();
        }
        std::fs::copy(env!("CARGO_BIN_EXE_lorimer"), &program).unwrap();
        let arguments = ["serve", "--model", &model, "--adapters", &root, "--port", "0", "--pool", "4MB", "--json"];
        command = std::process::Command::new(&program);
        command.args(arguments).stdin(Stdio::null()).env("HF_HUB_OFFLINE", "1").uid(65534).gid(65534);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let url: Value = serde_json::from_str(&line).expect("the server says where it is");
    let address = url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string();
    let mut errors = child.stderr.take().unwrap();
    let mut server = Server { child, address, _out: out };
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    let given = server.send("PUT", "/v1/adapters/prod", &json!({ "path": "yes-no" }));
    assert_eq!((given.status, &given.json()["persisted"]), (200, &json!(false)), "{}", given.body);
    assert!(given.json()["message"].as_str().unwrap().contains("until this server ends"), "{}", given.body);
    assert_eq!(server.answer(json!({ "model": "prod" })), "yes");
    let removed = server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "tenant/bone" }));
    assert_eq!((removed.status, &removed.json()["persisted"]), (200, &json!(false)), "{}", removed.body);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
    assert!(server.get("/health").json()["problems"][0].as_str().unwrap().contains("not kept"));
    server.child.kill().unwrap();
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    assert!(said.contains("will be forgotten"), "told at start: {said}");
    mode(Path::new(&root), 0o755);
}
