//! The whole server, as its clients use and misuse it, on a tiny model.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use common::{Fixture, error, json as run, lorimer};

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
        let base = ["serve", "--model", &f.model, "--adapters", root, "--port", "0", "--json", "-q"];
        let pool: &[&str] = if more.contains(&"--pool") { &[] } else { &["--pool", "4MB"] };
        let mut child = lorimer(&[&base, pool, more].concat()).stdout(Stdio::piped()).spawn().unwrap();
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
    run(&f.train(&one, &["--max-steps", "60"]));
    run(&f.train(&two, &["--max-steps", "20", "--method", "bone", "--rank", "4"]));
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
        run(&all)["text"].as_str().unwrap().to_string()
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
    let half = run(&["generate", "--model", &f.model, "--prompt", "up 3", "--max-tokens", "8", "--adapter", &sum]);
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
            let token = token.as_str().unwrap();
            // A byte that is no letter is one character of replacement.
            at += if token.starts_with("bytes:") { 1 } else { token.chars().count() };
        }
    };
    offsets(&plain, 0);
    offsets(&complete(json!({ "prompt": "up 3", "logprobs": 0, "echo": true })), 0);
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
        ("logit_bias", json!({ "1": -101 })),
        ("logit_bias", json!({ "one": 1 })),
        ("logit_bias", json!({ "1000000": 1 })),
        ("logit_bias", json!([[1, 1]])),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([1_000_000])),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([1_000_000])),
        ("min_tokens", json!(-1)),
        ("truncate_prompt_tokens", json!(0)),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({ "type": "function", "function": { "name": "f" } })),
        ("tools", json!("[]")),
        ("stream", json!("yes")),
        ("stream_options", json!({ "include_usage": true })),
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

/// A server of the bare base.
fn bare(f: &Fixture) -> Server {
    let root = f.path("none");
    std::fs::create_dir(&root).unwrap();
    Server::start(f, &root, &[])
}

/// `a` with the fields of `b` in their places.
fn with(a: &Value, b: Value) -> Value {
    let mut all = a.clone();
    all.as_object_mut().unwrap().extend(b.as_object().unwrap().clone());
    all
}

/// No field is passed over: it is honoured, asks for nothing by its value, or is refused by name, and null is absent.
#[test]
fn every_field_is_honoured_asks_for_nothing_or_is_refused_by_name() {
    let f = Fixture::new();
    let server = bare(&f);
    let chat = json!({ "messages": [{ "role": "user", "content": "up 3" }], "max_tokens": 1, "temperature": 0 });
    let completion = json!({ "prompt": "up 3", "max_tokens": 1, "temperature": 0 });
    let calls = [("/v1/chat/completions", &chat, "ChatRequest"), ("/v1/completions", &completion, "CompletionRequest")];
    let document = server.get("/openapi.json").json();
    for (path, ask, schema) in calls {
        let mut names = Vec::new();
        for part in document["components"]["schemas"][schema]["allOf"].as_array().unwrap() {
            let name = part["$ref"].as_str().unwrap().rsplit('/').next().unwrap();
            names.extend(document["components"]["schemas"][name]["properties"].as_object().unwrap().keys());
        }
        assert!(names.len() > 25 && names.iter().any(|n| *n == "logit_bias"), "{names:?}");
        let foreign = ["response_format", "store", "guided_json", "tool_choice_mode", "n_probs"].map(String::from);
        for name in names.into_iter().chain(&foreign) {
            let answer = server.post(path, &with(ask, json!({ name: null })));
            let needed = ["messages", "prompt"].contains(&name.as_str());
            assert_eq!(answer.status, if needed { 400 } else { 200 }, "{path} {name}: {}", answer.body);
        }
        for (field, value, param) in [
            ("no_such_field", json!(1), "no_such_field"),
            ("response_format", json!({ "type": "json_object" }), "response_format"),
            ("guided_json", json!({}), "guided_json"),
            ("store", json!(true), "store"),
            ("suffix", json!(" six"), "suffix"),
            ("mirostat", json!(2), "mirostat"),
            ("use_beam_search", json!(true), "use_beam_search"),
            ("stream_options", json!({ "include_usage": true }), "stream_options"),
            ("lora", json!([{ "id": "x", "weight": 1 }]), "lora[0].weight"),
            ("lora", json!([{ "scale": 1 }]), "lora[0].id"),
            ("stop", json!(["x", 1]), "stop[1]"),
            ("stop", json!(""), "stop"),
            ("stop", json!({}), "stop"),
            ("max_tokens", json!(2.5), "max_tokens"),
            ("max_tokens", json!(true), "max_tokens"),
            ("top_p", json!(2), "top_p"),
            ("repetition_penalty", json!(-0.5), "repetition_penalty"),
            ("min_tokens", json!(9), "min_tokens"),
            ("n", json!(17), "n"),
        ] {
            let answer = server.post(path, &with(ask, json!({ field: value })));
            let error = answer.json()["error"].clone();
            assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{path} {field}: {}", answer.body);
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error["message"].as_str().unwrap().contains(param), "{error}");
        }
        for inert in [
            json!({ "response_format": { "type": "text" }, "store": false, "metadata": {}, "service_tier": "auto" }),
            json!({ "length_penalty": 1.0, "use_beam_search": false, "suffix": "", "best_of": 1, "echo": false }),
            json!({ "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1, "id_slot": -1, "dry_multiplier": 0.0 }),
            json!({ "max_tokens": 1.0, "seed": -3, "n": 1, "stop": [], "logit_bias": {}, "min_tokens": 0, "top_k": -1 }),
            json!({ "stream": false, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k" }),
        ] {
            let answer = server.post(path, &with(ask, inert.clone()));
            assert_eq!(answer.status, 200, "{path} {inert}: {}", answer.body);
        }
        // A field that stands twice has no one meaning.
        let twice = ask.to_string().replacen('{', "{\"max_tokens\": 3, ", 1);
        let answer = server.request("POST", path, "Content-Type: application/json\r\n", &twice);
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("max_tokens")));
    }
    for (path, ask, field, value) in [
        (calls[0].0, &chat, "top_logprobs", json!(2)),
        (calls[0].0, &chat, "echo", json!(true)),
        (calls[0].0, &chat, "best_of", json!(2)),
        (calls[0].0, &chat, "logprobs", json!(3)),
        (calls[1].0, &completion, "logprobs", json!(true)),
        (calls[1].0, &completion, "messages", json!([])),
        (calls[1].0, &completion, "tools", json!([])),
        (calls[1].0, &completion, "best_of", json!(17)),
        (calls[1].0, &completion, "prompt", json!([])),
        (calls[1].0, &completion, "prompt", json!(["x", [1]])),
        (calls[1].0, &completion, "prompt", json!([1, -1])),
    ] {
        let answer = server.post(path, &with(ask, json!({ field: value })));
        let param = answer.json()["error"]["param"].clone();
        let named = param.as_str().is_some_and(|p| p.starts_with(field));
        assert!(answer.status == 400 && named, "{field} {value}: {}", answer.body);
    }
    let load = json!({ "lora_name": "x", "lora_path": "x", "load_in_place": true });
    assert_eq!(server.post("/v1/load_lora_adapter", &load).code(), "invalid_request");
    let load = json!({ "lora_name": "x", "lora_path": "x", "load_inplace": null });
    assert_eq!(server.post("/v1/load_lora_adapter", &load).code(), "adapter_not_found");
}

/// A conversation reaches the template in one form, with the variables and documents that are asked for; what a text model cannot take is
/// refused by name.
#[test]
fn conversations_are_written_by_the_template_as_they_are_meant() {
    let f = Fixture::new();
    let model = f.path("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(&f.model).unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&file, Path::new(&model).join(file.file_name().unwrap())).unwrap();
    }
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents[0].text }}{% endif %}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% if add_generation_prompt %}A:{% endif %}";
    std::fs::write(Path::new(&model).join("chat_template.jinja"), template).unwrap();
    let f = Fixture { model, ..f };
    let server = bare(&f);
    let ask = |messages: Value, more: Value| {
        let body = json!({ "messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": true });
        server.post("/v1/chat/completions", &with(&body, more))
    };
    let user = json!({ "role": "user", "content": "Hi" });
    let calls = |arguments: Value, content: Option<Value>| {
        let mut message = json!({ "role": "assistant", "tool_calls": [{ "id": "c", "type": "function", "function": { "name": "tide", "arguments": arguments } }] });
        if let Some(content) = content {
            message["content"] = content;
        }
        json!([user, message, { "role": "tool", "tool_call_id": "c", "content": "4 m" }])
    };
    let called = "user:Hi;assistant:tide{\"port\": \"Brest\"};tool:4 m;A:";
    let (value, text) = (json!({ "port": "Brest" }), json!("{\"port\": \"Brest\"}"));
    let tools = json!([{ "type": "function", "function": { "name": "tide", "parameters": {} } }]);
    let last = |text: &str| json!([user, { "role": "assistant", "content": text }]);
    for (messages, more, expected) in [
        (json!([user]), json!({}), "user:Hi;A:"),
        (
            json!([{ "role": "user", "content": [{ "type": "text", "text": "H" }, { "type": "text", "text": "i" }] }]),
            json!({}),
            "user:Hi;A:",
        ),
        (calls(value.clone(), Some(json!(""))), json!({}), called),
        (calls(text.clone(), Some(json!(""))), json!({}), called),
        (calls(text.clone(), Some(Value::Null)), json!({}), called),
        (calls(text, None), json!({}), called),
        (json!([user]), json!({ "tools": tools }), "user:Hi;T1A:"),
        (json!([user]), json!({ "tools": tools, "tool_choice": "auto" }), "user:Hi;T1A:"),
        (json!([user]), json!({ "tools": tools, "tool_choice": "none" }), "user:Hi;A:"),
        (json!([user]), json!({ "tools": [] }), "user:Hi;A:"),
        (json!([user]), json!({ "chat_template_kwargs": { "enable_thinking": false } }), "user:Hi;<no>A:"),
        (json!([user]), json!({ "chat_template_kwargs": { "enable_thinking": true } }), "user:Hi;A:"),
        (json!([user]), json!({ "documents": [{ "text": "doc" }] }), "user:Hi;DdocA:"),
        (json!([user]), json!({ "add_generation_prompt": false }), "user:Hi;"),
        (last("So I"), json!({ "continue_final_message": true }), "user:Hi;assistant:So I"),
        (
            last(" So I "),
            json!({ "continue_final_message": true, "add_generation_prompt": false }),
            "user:Hi;assistant: So I ",
        ),
    ] {
        let answer = ask(messages.clone(), more.clone());
        assert_eq!(answer.status, 200, "{messages} {more}: {}", answer.body);
        let body = json!({ "prompt": expected, "max_tokens": 5, "temperature": 0, "ignore_eos": true });
        let plain = server.post("/v1/completions", &body).json();
        assert_eq!(answer.json()["usage"], plain["usage"], "{messages} {more}: {expected}");
        assert_eq!(answer.json()["choices"][0]["message"]["content"], plain["choices"][0]["text"], "{expected}");
    }
    let image = json!({ "type": "image_url", "image_url": { "url": "data:image/png;base64,iVBORw0KGgo=" } });
    let audio = json!({ "type": "input_audio", "input_audio": { "data": "", "format": "wav" } });
    for (messages, more, param, says) in [
        (
            json!([{ "role": "user", "content": [{ "type": "text", "text": "What?" }, image] }]),
            json!({}),
            "messages",
            "image_url",
        ),
        (json!([{ "role": "user", "content": [image] }]), json!({}), "messages", "image_url"),
        (json!([user, { "role": "user", "content": [audio] }]), json!({}), "messages", "message 2"),
        (json!([{ "role": "user" }]), json!({}), "messages", "content"),
        (calls(json!("{oops"), None), json!({}), "messages", "arguments"),
        (json!([user]), json!({ "tools": [1] }), "tools", "tool 1"),
        (json!([user]), json!({ "chat_template_kwargs": { "messages": [] } }), "chat_template_kwargs", "`messages`"),
        (json!([user]), json!({ "chat_template_kwargs": [] }), "chat_template_kwargs", "an object"),
        (json!([user]), json!({ "chat_template": "x" }), "chat_template", "adapter"),
        (last(" "), json!({ "continue_final_message": true }), "continue_final_message", "no text"),
        (
            last("x"),
            json!({ "continue_final_message": true, "add_generation_prompt": true }),
            "continue_final_message",
            "both",
        ),
    ] {
        let answer = ask(messages.clone(), more.clone());
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{messages} {more}: {}", answer.body);
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
}

/// What a completion of `up 3` says: its tokens by their numbers, its text, and why it ended.
fn numbers(server: &Server, more: Value) -> (Vec<u32>, String, String) {
    let ask = json!({
        "prompt": "up 3", "max_tokens": 4, "temperature": 0, "logprobs": 0, "return_tokens_as_token_ids": true, "ignore_eos": true,
    });
    let answer = server.post("/v1/completions", &with(&ask, more));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = answer.json()["choices"][0].clone();
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap().iter();
    let tokens = tokens.map(|t| t.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap());
    let text = |key: &str| choice[key].as_str().unwrap().to_string();
    (tokens.collect(), text("text"), text("finish_reason"))
}

#[test]
fn tokens_are_banned_allowed_held_back_and_end_answers() {
    let f = Fixture::new();
    let server = bare(&f);
    // As transformers goes on (tests/goldens/scoring.json).
    let (plain, text, finish) = numbers(&server, json!({}));
    assert_eq!((plain.as_slice(), finish.as_str()), (&[226, 35, 35, 35][..], "length"));
    assert_ne!(numbers(&server, json!({ "logit_bias": { "226": -100 } })).0[0], 226);
    assert_eq!(numbers(&server, json!({ "logit_bias": { "7": 100.0 } })).0, [7; 4]);
    let allowed =
        numbers(&server, json!({ "allowed_token_ids": [7, 9], "temperature": 1.5, "seed": 1, "max_tokens": 20 }));
    assert!(allowed.0.iter().all(|t| [7, 9].contains(t)) && allowed.0.contains(&7) && allowed.0.contains(&9));
    let (tokens, stopped, finish) = numbers(&server, json!({ "stop_token_ids": [35] }));
    assert_eq!((tokens.as_slice(), finish.as_str()), (&[226, 35][..], "stop"));
    let kept = numbers(&server, json!({ "stop_token_ids": [35], "include_stop_str_in_output": true })).1;
    assert!(
        kept.starts_with(&stopped) && kept.len() > stopped.len() && text.starts_with(&kept),
        "{kept:?} {stopped:?}"
    );
    let held = numbers(&server, json!({ "stop_token_ids": [226, 35], "min_tokens": 2 })).0;
    assert!(held.len() >= 2 && !held[..2].iter().any(|t| [226, 35].contains(t)), "{held:?}");
    // The end of the text, too, is held back, and texts that end the answer.
    let ended =
        numbers(&server, json!({ "ignore_eos": false, "logit_bias": { "2": 100 }, "min_tokens": 3, "max_tokens": 9 }));
    assert_eq!((ended.0.len(), ended.0[3], ended.2.as_str()), (4, 2, "stop"));
    let shown = |more: Value| numbers(&server, with(&json!({ "logit_bias": { "2": 100 }, "max_tokens": 2 }), more)).1;
    assert_eq!(shown(json!({})), "");
    assert_eq!(shown(json!({ "skip_special_tokens": false })), "<|im_end|>".repeat(2));
    assert_eq!(shown(json!({ "skip_special_tokens": false, "ignore_eos": false })), "");
    let stop = json!({ "allowed_token_ids": [35], "stop": "?", "max_tokens": 5 });
    let letter = numbers(&server, json!({ "allowed_token_ids": [35], "max_tokens": 1 })).1;
    let stop = with(&stop, json!({ "stop": letter }));
    assert_eq!(numbers(&server, stop.clone()).1, "");
    assert_eq!(numbers(&server, with(&stop, json!({ "min_tokens": 3 }))).1, letter.repeat(3));
    assert_eq!(numbers(&server, with(&stop, json!({ "include_stop_str_in_output": true }))).1, letter);
    // A prompt cut to its end is that end.
    let cut = numbers(&server, json!({ "truncate_prompt_tokens": 2 }));
    assert_eq!(cut, numbers(&server, json!({ "prompt": " 3" })));
    let whole = server.post(
        "/v1/completions",
        &json!({ "prompt": "up ".repeat(400), "max_tokens": 5, "truncate_prompt_tokens": -1 }),
    );
    assert_eq!(whole.json()["usage"]["prompt_tokens"], 507, "{}", whole.body);
    // The best of some answers is that of them whose tokens are likeliest on average.
    let drawn =
        json!({ "prompt": "up 3", "max_tokens": 4, "temperature": 1.5, "seed": 5, "logprobs": 0, "ignore_eos": true });
    let ask = |more: Value| server.post("/v1/completions", &with(&drawn, more)).json();
    let mean = |choice: &Value| {
        let own = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        own.iter().map(|p| p.as_f64().unwrap()).sum::<f64>()
    };
    let all = ask(json!({ "n": 4 }));
    let best = all["choices"].as_array().unwrap().iter().max_by(|a, b| mean(a).total_cmp(&mean(b))).unwrap();
    let chosen = ask(json!({ "best_of": 4 }));
    assert_eq!((chosen["choices"].as_array().unwrap().len(), &chosen["choices"][0]["text"]), (1, &best["text"]));
    assert_eq!(chosen["usage"]["completion_tokens"], 16);
    assert_eq!(server.post("/v1/completions", &with(&drawn, json!({ "best_of": 2, "stream": true }))).status, 400);
}

/// A token is its number and its bytes, not its decoded text, and always stands among the likeliest that are told with it.
#[test]
fn tokens_in_log_probabilities_are_bytes_and_stand_among_the_likeliest() {
    let f = Fixture::new();
    let server = bare(&f);
    // The tiny base writes halves of letters all the time.
    let drawn = json!({ "temperature": 2, "seed": 5, "max_tokens": 60, "ignore_eos": true });
    let chat = json!({ "messages": [{ "role": "user", "content": "up 3" }], "logprobs": true, "top_logprobs": 1 });
    let answer = server.post("/v1/chat/completions", &with(&chat, drawn.clone())).json();
    let told = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes_of = |token: &Value| -> Vec<u8> { serde_json::from_value(token["bytes"].clone()).unwrap() };
    let special = |token: &&Value| !token["token"].as_str().unwrap().starts_with("<|");
    let bytes: Vec<u8> = told.iter().filter(special).flat_map(bytes_of).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), answer["choices"][0]["message"]["content"].as_str().unwrap());
    let mut halves = 0;
    for token in told {
        let top = token["top_logprobs"].as_array().unwrap();
        assert!(top.iter().any(|t| t["token"] == token["token"] && t["logprob"] == token["logprob"]), "{token}");
        let (text, bytes) = (token["token"].as_str().unwrap(), bytes_of(token));
        match std::str::from_utf8(&bytes) {
            Ok(whole) => assert_eq!(text, whole),
            Err(_) => assert_eq!(text, bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>()),
        }
        halves += usize::from(std::str::from_utf8(&bytes).is_err());
    }
    assert!(halves > 5 && told.iter().any(|t| t["top_logprobs"].as_array().unwrap().len() == 2), "{halves}");
    for likely in [0, 1, 20] {
        let ask = with(&drawn, json!({ "prompt": "up 3", "logprobs": likely }));
        let answer = server.post("/v1/completions", &ask).json();
        let told = answer["choices"][0]["logprobs"].clone();
        let [tokens, own, top] = ["tokens", "token_logprobs", "top_logprobs"].map(|key| told[key].as_array().unwrap());
        assert_eq!((tokens.len(), top.len()), (60, 60));
        for ((token, own), top) in tokens.iter().zip(own).zip(top) {
            let top = top.as_object().unwrap();
            assert_eq!(&top[token.as_str().unwrap()], own, "{token}");
            assert!((likely.max(1)..=likely + 1).contains(&top.len()), "{} of {likely}", top.len());
        }
        assert!(tokens.iter().any(|t| t.as_str().unwrap().starts_with("bytes:\\x")));
    }
}

/// `base` and the short name mean the base unless an adapter has that name: then which is meant has to be said.
#[test]
fn a_name_does_not_stand_for_the_base_and_an_adapter() {
    let f = Fixture::new();
    let root = f.path("adapters");
    run(&f.train(&format!("{root}/base"), &["--max-steps", "60"]));
    let server = Server::start(&f, &root, &[]);
    let own = server.get("/v1/models").json()["data"][0]["id"].as_str().unwrap().to_string();
    let refused = server.chat(json!({ "model": "base" }));
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("model")), "{}", refused.body);
    let bare = server.answer(json!({ "model": own }));
    assert_eq!((server.answer(json!({})), bare == "yes"), (bare, false));
    assert_eq!(server.answer(json!({ "adapter_id": "base" })), "yes");
    assert_eq!(server.answer(json!({ "model": format!("{own}:base") })), "yes");
    let named = ["serve", "--model", &f.model, "--adapters", &root, "--served-model-name", "base", "--port", "0"];
    assert!(error(&named).contains("--served-model-name"));
}

/// What lm-evaluation-harness asks for (`local-completions`): the prompt's log-probabilities, the first null, held against transformers
/// (tests/goldens/make_scoring.py).
#[test]
fn prompts_are_scored_as_transformers_scores_them() {
    let f = Fixture::new();
    let root = f.path("none");
    std::fs::create_dir(&root).unwrap();
    // Prompts of several parts, too.
    let server = Server::start(&f, &root, &["--batch-tokens", "64"]);
    let golden = std::fs::read_to_string(common::goldens("scoring.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&golden).unwrap();
    assert_eq!(cases.len(), 6);
    for case in &cases {
        let expected: Vec<f64> = serde_json::from_value(case["log_probabilities"].clone()).unwrap();
        let (n, context) = (expected.len() + 1, case["context_tokens"].as_u64().unwrap() as usize);
        let text =
            format!("{}{}", case["context"].as_str().unwrap(), case["continuation"].as_str().unwrap_or_default());
        let mut prompts = vec![case["tokens"].clone()];
        if case["continuation"].is_string() {
            prompts.push(json!(text));
        }
        for prompt in prompts {
            // Twice: what is kept of prompts does not take their log-probabilities away.
            for (max_tokens, stream) in [(0, false), (1, false), (0, true), (1, true)] {
                let ask = json!({
                    "prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234, "stream": stream,
                });
                let answer = server.post("/v1/completions", &ask);
                assert_eq!(answer.status, 200, "{}", answer.body);
                let choice = match stream {
                    false => answer.json()["choices"][0].clone(),
                    true => events(&answer.body)[0]["choices"][0].clone(),
                };
                let told = &choice["logprobs"];
                let list = |key: &str| told[key].as_array().unwrap();
                assert_eq!(list("tokens").len(), n + max_tokens, "{told}");
                assert_eq!((&told["token_logprobs"][0], &told["top_logprobs"][0]), (&Value::Null, &Value::Null));
                let own: Vec<f64> = list("token_logprobs")[1..].iter().map(|p| p.as_f64().unwrap()).collect();
                for (a, b) in own.iter().zip(&expected) {
                    assert!((a - b).abs() < 2e-4, "{text}: {own:?} {expected:?}");
                }
                let sum: f64 = own[context - 1..n - 1].iter().sum();
                assert!((sum - case["sum"].as_f64().unwrap()).abs() < 1e-3, "{text}: {sum}");
                let likeliest = |top: &Value| {
                    top.as_object().unwrap().values().map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max)
                };
                let greedy = (context..n)
                    .all(|i| likeliest(&told["top_logprobs"][i]) == told["token_logprobs"][i].as_f64().unwrap());
                assert_eq!(json!(greedy), case["greedy"], "{text}");
                let begins = choice["text"].as_str().unwrap().starts_with(&text);
                assert_eq!((&told["text_offset"][0], begins), (&json!(0), true), "{text}");
                if case["continuation"].is_string() {
                    // Every token is a byte, and stands where its letter does.
                    let letters: Vec<usize> =
                        text.chars().enumerate().flat_map(|(i, c)| vec![i; c.len_utf8()]).collect();
                    assert_eq!(
                        told["text_offset"].as_array().unwrap()[..n],
                        letters.iter().map(|i| json!(i)).collect::<Vec<_>>()
                    );
                }
            }
        }
    }
    let none = server.post("/v1/completions", &json!({ "prompt": "up", "max_tokens": 0 })).json();
    assert_eq!((&none["choices"][0]["text"], &none["usage"]["completion_tokens"]), (&json!(""), &json!(0)));
    assert_eq!(none["choices"][0]["finish_reason"], "length");
    // With `n` each choice has its prompt's.
    let ask =
        json!({ "prompt": ["up 3", "x"], "n": 2, "echo": true, "logprobs": 0, "max_tokens": 2, "temperature": 1 });
    let all = server.post("/v1/completions", &ask).json();
    let counts = all["choices"].as_array().unwrap().iter().map(|c| c["logprobs"]["tokens"].as_array().unwrap().len());
    assert_eq!(counts.collect::<Vec<_>>(), [6, 6, 3, 3]);
}

/// Where no number of tokens is asked for, an answer gets what room there is: the context's, or the pool's if that is less; many such
/// requests at a time do not keep one another out, and each comes to its end.
#[test]
fn an_answer_that_is_not_bounded_goes_to_the_end_of_the_context() {
    let f = Fixture::new();
    let server = bare(&f);
    let ask = json!({ "prompt": "up 3", "temperature": 0, "ignore_eos": true });
    let whole = server.post("/v1/completions", &ask).json();
    assert_eq!(whole["usage"]["completion_tokens"], 508, "{whole}");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let last = server.post("/v1/completions", &json!({ "prompt": "x".repeat(511), "ignore_eos": true })).json();
    assert_eq!(last["usage"]["completion_tokens"], 1, "{last}");
    assert_eq!(server.post("/v1/completions", &json!({ "prompt": "x".repeat(512) })).status, 400);
    drop(server);
    let root = f.path("none");
    // A pool of 640 tokens: two at a time are expected to fit, and none of three can be kept to its end beside another.
    let server = Server::start(&f, &root, &["--pool", "168KB"]);
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let one = |_| scope.spawn(|| server.post("/v1/completions", &ask).json());
        (0..3).map(one).collect::<Vec<_>>().into_iter().map(|t| t.join().unwrap()).collect()
    });
    for answer in answers {
        assert_eq!(answer["choices"][0]["text"], whole["choices"][0]["text"], "{}", answer["usage"]);
    }
    // Figures are told some time after.
    std::thread::sleep(Duration::from_millis(500));
    let engine = server.get("/v1/state").json()["figures"]["engine"].clone();
    assert!((70..90).contains(&engine["pages"].as_u64().unwrap()), "{engine}");
}
