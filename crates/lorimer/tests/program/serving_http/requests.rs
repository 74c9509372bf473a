//! Requests: every field, misuse, keys, and the document that describes them.

use super::*;

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
    values_that_cannot_be(&server, &ask);
    names_and_prompts_that_cannot_be(&server);
    bodies_and_heads_that_are_none(&server, &ask);
    clients_that_go_away(&server);
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert_eq!(server.get("/v1/state").json()["figures"]["restarts"], 0);
}

fn values_that_cannot_be(server: &Server, ask: &Value) {
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
}

fn names_and_prompts_that_cannot_be(server: &Server) {
    for (name, status) in [("none", 404), ("../yes-no", 400), ("", 200), ("a\u{0}b", 400)] {
        assert_eq!(server.chat(json!({ "model": name })).status, status, "{name:?}");
    }
    assert_eq!(server.post("/v1/completions", &json!({ "model": "base", "prompt": "" })).status, 400);
    assert_eq!(server.post("/v1/completions", &json!({ "model": "base", "prompt": [1_000_000] })).status, 400);
    let long =
        server.post("/v1/completions", &json!({ "model": "base", "prompt": "up ".repeat(5000), "max_tokens": 1 }));
    assert_eq!(long.status, 400, "{}", long.body);
}

fn bodies_and_heads_that_are_none(server: &Server, ask: &Value) {
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
}

/// Clients that go away in the middle of an answer take their requests with them: they are counted, and most of what they asked for is not computed. To
/// be seen to fail: `follow` that goes on when nobody listens.
fn clients_that_go_away(server: &Server) {
    let figures = || server.get("/v1/state").json()["figures"].clone();
    let before = figures();
    const LONG: u64 = 500;
    for _ in 0..5 {
        let mut stream = server.connect();
        let body = json!({ "model": "base", "prompt": "up", "max_tokens": LONG, "ignore_eos": true, "stream": true })
            .to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            server.address,
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
        let foreign = ["suffix", "store", "tool_choice_mode", "n_probs"].map(String::from);
        for name in names.into_iter().chain(&foreign) {
            let answer = server.post(path, &with(ask, json!({ name: null })));
            let needed = ["messages", "prompt"].contains(&name.as_str());
            assert_eq!(answer.status, if needed { 400 } else { 200 }, "{path} {name}: {}", answer.body);
        }
        for (field, value, param) in [
            ("no_such_field", json!(1), "no_such_field"),
            ("response_format", json!({ "type": "json" }), "response_format.type"),
            ("response_format", json!({ "type": "json_schema" }), "response_format.json_schema"),
            ("response_format", json!({ "type": "json_object", "strictly": true }), "response_format.strictly"),
            ("response_format", json!({ "type": "json_object", "schema": { "type": "colour" } }), "response_format"),
            ("structured_outputs", json!({ "structural_tag": "{}" }), "structured_outputs.structural_tag"),
            ("structured_outputs", json!({ "regex": "a", "json_object": true }), "structured_outputs"),
            ("structured_outputs", json!({ "choice": [] }), "structured_outputs.choice"),
            ("guided_json", json!("{"), "guided_json"),
            ("guided_json", json!([]), "guided_json"),
            ("guided_regex", json!("a("), "guided_regex"),
            ("guided_grammar", json!("start: nowhere"), "guided_grammar"),
            ("guided_grammar", json!("root ::= nowhere"), "guided_grammar"),
            ("grammar", json!("root ::= <think>"), "grammar"),
            ("grammar", json!("start: \"a\""), "grammar"),
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
