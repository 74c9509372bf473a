//! Calls beside answers: tokens of texts, what load balancers ask, adapters that come as files.

use super::*;

/// Tokens are those that completions and chats compute, and texts come back.
#[test]
fn texts_become_tokens_and_tokens_texts() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let tokens = |ask: Value| {
        let told = server.post("/tokenize", &ask);
        assert_eq!(told.status, 200, "{}", told.body);
        told.json()
    };
    let told = tokens(json!({ "prompt": "up 3 é", "return_token_strs": true }));
    let ids = told["tokens"].as_array().unwrap().clone();
    assert_eq!((&told["count"], told["token_strs"].as_array().unwrap().len()), (&json!(ids.len()), ids.len()));
    assert!(told["max_model_len"].as_u64().unwrap() > 100, "{told}");
    // By the log-probabilities of a completion's own prompt.
    let ask = json!({ "model": "base", "prompt": "up 3 é", "echo": true, "logprobs": 0, "max_tokens": 0, "return_tokens_as_token_ids": true });
    let echoed = server.post("/v1/completions", &ask).json()["choices"][0]["logprobs"]["tokens"].clone();
    let named: Vec<String> = ids.iter().map(|id| format!("token_id:{id}")).collect();
    assert_eq!(echoed, json!(named));
    let back = server.post("/detokenize", &json!({ "tokens": ids })).json();
    assert!(back["prompt"].as_str().unwrap().ends_with("up 3 é") && back["prompt"] == back["content"], "{back}");
    // llama.cpp's names: nothing is put around the text unless it is asked for.
    let plain = tokens(json!({ "content": "up 3 é" }));
    assert_eq!(plain["tokens"], tokens(json!({ "prompt": "up 3 é", "add_special_tokens": false }))["tokens"]);
    assert_eq!(tokens(json!({ "content": "up 3 é", "add_special": true }))["tokens"], json!(ids));
    let pieces = tokens(json!({ "content": "up 3 é", "with_pieces": true }))["tokens"].clone();
    let pieces = pieces.as_array().unwrap();
    assert_eq!(pieces.iter().map(|p| p["id"].clone()).collect::<Vec<_>>(), *plain["tokens"].as_array().unwrap());
    // A conversation has as many tokens as its answer says.
    let messages = json!([{ "role": "user", "content": "up 3" }]);
    for more in [json!({}), json!({ "add_generation_prompt": false }), json!({ "model": "yes-no" })] {
        let count = tokens(with(&json!({ "messages": messages }), more.clone()))["count"].clone();
        let chat = server.chat(with(&json!({ "model": "base" }), more));
        assert_eq!(chat.json()["usage"]["prompt_tokens"], count, "{}", chat.body);
    }
    for (path, ask, says) in [
        ("/tokenize", json!({}), "one of `prompt`, `content` and `messages`"),
        ("/tokenize", json!({ "prompt": "a", "messages": messages }), "one of `prompt`"),
        ("/tokenize", json!({ "prompt": "a", "model": "nobody" }), "nobody"),
        ("/tokenize", json!({ "prompt": "a", "chat_template": "{{ x }}" }), "`chat_template`"),
        ("/tokenize", json!({ "prompt": "x".repeat(3_000_000) }), "cannot fit"),
        ("/detokenize", json!({}), "`tokens` is missing"),
        ("/detokenize", json!({ "tokens": [1, 99999] }), "99999"),
        ("/detokenize", json!({ "tokens": ["a"] }), "tokens"),
    ] {
        let refused = server.post(path, &ask);
        assert!((400..500).contains(&refused.status) && refused.body.contains(says), "{path}: {}", refused.body);
    }
}

/// A tokenizer that puts a token before a text does so where it is asked, whichever server's fields ask.
#[test]
fn special_tokens_are_put_around_texts_that_ask_for_them() {
    let mut f = Fixture::new();
    f.model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-gemma3").display().to_string();
    let server = bare(&f);
    for (ask, tokens) in [
        (json!({ "prompt": "up" }), json!([2, 89, 84])),
        (json!({ "prompt": "up", "add_special_tokens": false }), json!([89, 84])),
        (json!({ "content": "up" }), json!([89, 84])),
        (json!({ "content": "up", "add_special": true }), json!([2, 89, 84])),
    ] {
        assert_eq!(server.post("/tokenize", &ask).json()["tokens"], tokens, "{ask}");
    }
}

/// What is drained is not ready and answers; told to stop it is not ready for a while first.
#[test]
fn a_drained_server_answers_and_is_not_ready() {
    let f = Fixture::new();
    let root = adapters(&f);
    let mut server = Server::start(&f, &root, &["--drain", "2"]);
    let status = |path: &str| server.get(path).status;
    assert_eq!([status("/livez"), status("/readyz"), status("/health")], [200; 3]);
    // A page of another site may send this without being asked.
    assert_eq!(server.request("POST", "/drain", "Origin: http://elsewhere.example\r\n", "").code(), "wrong_host");
    assert_eq!(status("/readyz"), 200);
    let own = format!("Origin: http://{}\r\n", server.address);
    let told = server.request("POST", "/drain", &own, "");
    assert_eq!((told.status, &told.json()["draining"]), (200, &json!(true)), "{}", told.body);
    assert_eq!([status("/livez"), status("/readyz"), status("/health")], [200, 503, 200]);
    assert_eq!(server.get("/readyz").code(), "draining");
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert_eq!(server.request("DELETE", "/drain", "", "").json()["draining"], false);
    assert_eq!(status("/readyz"), 200);
    server.signal("TERM");
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.get("/readyz").status == 200 {
        assert!(Instant::now() < deadline, "it is ready for ever");
    }
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect(&server.address).is_err());
}

/// A form with files.
fn form(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, bytes) in files {
        let head = format!("--edge\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
        body.extend([head.as_bytes(), bytes, b"\r\n"].concat());
    }
    body.extend(b"--edge--\r\n");
    body
}

fn upload(server: &Server, path: &str, headers: &str, body: &[u8]) -> Answer {
    let (address, length) = (&server.address, body.len());
    let head = format!(
        "POST /v1/adapters/{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\nContent-Type: multipart/form-data; boundary=edge\r\n{headers}\r\n"
    );
    server.raw(&[head.as_bytes(), body].concat())
}

/// Files become an adapter when all of them are there and good, and otherwise nothing has changed.
#[test]
fn adapters_come_as_files() {
    let f = Fixture::new();
    let root = adapters(&f);
    let read = |name: &str, file: &str| std::fs::read(format!("{root}/{name}/{file}")).unwrap();
    let (config, weights) = (read("yes-no", "adapter_config.json"), read("yes-no", "adapter_model.safetensors"));
    let other = form(&[
        ("adapter_config.json", &read("tenant/bone", "adapter_config.json")),
        ("adapter_model.safetensors", &read("tenant/bone", "adapter_model.safetensors")),
    ]);
    let good = form(&[("adapter_config.json", &config), ("adapter_model.safetensors", &weights)]);
    {
        let server = Server::start(&f, &root, &[]);
        assert_eq!(upload(&server, "new/upload", "", &good).code(), "upload_disabled");
        assert_eq!(server.get("/v1/state").json()["uploads"], false);
    }
    let server = Server::start(&f, &root, &["--allow-uploads", "--admin-key", "sesame"]);
    let key = "Authorization: Bearer sesame\r\n";
    let listed = || std::fs::read_dir(&root).unwrap().count();
    let before = listed();
    let half = &good[..good.len() - 200];
    let (bare, folder) = (form(&[("adapter_config.json", &config)]), form(&[("../adapter_config.json", &config)]));
    let damaged =
        form(&[("adapter_config.json", &config), ("adapter_model.safetensors", &weights[..weights.len() / 2])]);
    let twice = form(&[("adapter_config.json", &config), ("adapter_config.json", &config)]);
    for (path, headers, body, code) in [
        ("new/upload", "", &good[..], "unauthorized"),
        ("new/upload", &format!("{key}Origin: http://elsewhere.example\r\n"), &good, "wrong_host"),
        ("new", key, &good, "method_not_allowed"),
        ("../new/upload", key, &good, "invalid_name"),
        (".new/upload", key, &good, "invalid_name"),
        ("tenant/upload", key, &good, "adapter_exists"),
        ("tenant/upload?mode=upsert", key, &good, "path_refused"),
        ("yes-no/upload", key, &good, "adapter_exists"),
        ("new/upload?mode=swap", key, &good, "invalid_request"),
        ("new/upload", key, half, "body_unreadable"),
        ("new/upload", key, &bare, "adapter_invalid"),
        ("new/upload", key, &damaged, "adapter_invalid"),
        ("new/upload", key, &folder, "invalid_request"),
        ("new/upload", key, &twice, "invalid_request"),
        ("new/upload", key, b"--edge--\r\n", "adapter_invalid"),
        ("new/upload", key, b"nonsense", "body_unreadable"),
    ] {
        let refused = upload(&server, path, headers, body);
        assert_eq!(refused.code(), code, "{path}: {}", refused.body);
        let tells = refused.body.contains(&root) || refused.body.contains(".tmp");
        assert!(!tells, "{path} tells a path: {}", refused.body);
    }
    assert_eq!(listed(), before, "something is left over");
    let told = upload(&server, "team/new/upload", key, &good);
    assert_eq!((told.status, &told.json()["method"]), (200, &json!("lora")), "{}", told.body);
    assert_eq!(server.answer(json!({ "model": "team/new" })), "yes");
    assert_eq!(upload(&server, "team/new/upload", key, &good).code(), "adapter_exists");
    let told = upload(&server, "team/new/upload?mode=upsert", key, &other);
    assert_eq!((told.status, &told.json()["method"]), (200, &json!("bone")), "{}", told.body);
    assert_eq!(server.answer(json!({ "model": "team/new" })), server.answer(json!({ "model": "tenant/bone" })));
    let left = std::fs::read_dir(format!("{root}/team")).unwrap().count();
    assert_eq!(left, 1, "something is left over");
    // Another server finds it as a folder like any other.
    let again = Server::start(&f, &root, &[]);
    assert_eq!(again.answer(json!({ "model": "team/new" })), again.answer(json!({ "model": "tenant/bone" })));
    let root = root.clone();
    assert!(error(&["serve", "--model", &f.model, "--allow-uploads"]).contains("--adapters"));
    let tls = ["serve", "--model", &f.model, "--adapters", &root, "--tls-cert", "none.pem", "--tls-key", "none.pem"];
    assert!(error(&tls).contains("none.pem"));
}
