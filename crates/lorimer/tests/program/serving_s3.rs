//! Servers over an object store that is slow, down, refuses or swallows, and several of them over one.

#[path = "common/s3.rs"]
mod s3;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use lorimer::prelude::*;
use rand::{Rng, SeedableRng};
use s3::{Mood, S3};
use serde_json::{Value, json};

use crate::common;

/// Files of an adapter of the tiny base.
fn adapter(seed: u64) -> Vec<(&'static str, Vec<u8>)> {
    let base = Base::prepare(&common::goldens("tiny-llama"), &OpenOptions::default()).unwrap().load().unwrap();
    let method = methods::build("lora", json!({ "r": 4 }).as_object().unwrap()).unwrap();
    let adapter = Adapter::attach(base.model(), method, seed).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    for (_, var) in adapter.trainable() {
        let moved: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-0.05..0.05)).collect();
        let moved = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
        var.set(&(var.as_tensor() + moved).unwrap()).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    adapter.to_stored("tiny").unwrap().write(folder.path(), None).unwrap();
    let read = |name| std::fs::read(folder.path().join(name)).unwrap();
    ["adapter_model.safetensors", "adapter_config.json"].map(|name| (name, read(name))).into()
}

fn upload(s3: &S3, name: &str, files: &[(&'static str, Vec<u8>)]) {
    files.iter().for_each(|(file, bytes)| s3.put(&format!("adapters/{name}/{file}"), bytes.clone()));
}

struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(s3: &S3, cache: &str, more: &[(&str, &str)]) -> Self {
        let model = common::goldens("tiny-llama").display().to_string();
        let mut command = common::lorimer(&[
            "serve",
            "--model",
            &model,
            "--adapters",
            "s3://models/adapters",
            "--adapter-cache",
            cache,
            "--port",
            "0",
            "--pool",
            "4MB",
            "--json",
            "-q",
        ]);
        command.env_clear().envs(std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "HOME"));
        command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret").env("AWS_REGION", "us-east-1");
        command.env("AWS_ENDPOINT", &s3.endpoint).env("AWS_ALLOW_HTTP", "true").env("HF_HUB_OFFLINE", "1");
        let mut child = command.envs(more.iter().copied()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url: Value = serde_json::from_str(&line).expect("the server says where it is");
        let address = url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string();
        Self { child, address }
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        let body = body.to_string();
        let (address, length) = (&self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        let (head, body) = all.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|e| panic!("{path}: {e}: {body}")))
    }

    fn give(&self, name: &str, path: &str, mode: &str) -> (u16, Value) {
        self.call("PUT", &format!("/v1/adapters/{name}"), &json!({ "path": path, "mode": mode }))
    }

    /// The answer of an adapter, and the seconds that it took.
    fn answer(&self, model: &str) -> (u16, Value, f64) {
        let begun = Instant::now();
        let ask = json!({ "model": model, "prompt": [1, 5, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": true });
        let (status, answer) = self.call("POST", "/v1/completions", &ask);
        (status, answer, begun.elapsed().as_secs_f64())
    }

    fn names(&self) -> Vec<String> {
        let (_, listed) = self.call("GET", "/v1/adapters", &json!({}));
        listed["adapters"].as_array().unwrap().iter().map(|a| a["name"].as_str().unwrap().to_string()).collect()
    }

    fn health(&self) -> (u16, Value) {
        self.call("GET", "/health", &json!({}))
    }
}

fn until(what: &str, seconds: u64, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The store goes down, and later swallows: what is in memory is served without waiting, what was never fetched is refused with the reason, and
/// all is well when it comes back. To be seen to fail: `Store::held` and `Mirror::current` that both give nothing.
#[test]
fn an_outage_costs_only_what_was_not_fetched() {
    outage(Mood::Down);
}

#[test]
fn a_store_that_swallows_calls_costs_only_what_was_not_fetched() {
    outage(Mood::Swallows);
}

fn outage(mood: Mood) {
    let (s3, cache) = (S3::start(), tempfile::tempdir().unwrap());
    let cache = cache.path().display().to_string();
    let files = [adapter(1), adapter(2), adapter(3)];
    for (name, files) in ["a", "b", "c"].iter().zip(&files) {
        upload(&s3, name, files);
    }
    let server = Server::start(&s3, &cache, &[]);
    assert_eq!(server.names(), ["a", "b", "c"]);
    let (status, a, _) = server.answer("a");
    assert_eq!(status, 200, "{a}");
    let text = a["choices"][0]["text"].clone();
    assert_eq!(server.answer("b").0, 200);
    s3.set(mood);
    s3.answered();
    // Long enough to be looked at again several times, and for the store to be given up.
    for _ in 0..6 {
        let (status, a, seconds) = server.answer("a");
        assert_eq!((status, &a["choices"][0]["text"]), (200, &text), "{a}");
        assert!(seconds < 1.5, "{mood:?}: an adapter in memory waited {seconds} s");
        std::thread::sleep(Duration::from_millis(700));
    }
    let (status, c, _) = server.answer("c");
    let message = c["error"]["message"].as_str().unwrap_or_default();
    assert_eq!((status, c["error"]["code"].as_str()), (503, Some("store_failed")), "{c}");
    assert!(message.contains("the object store does not answer"), "{message}");
    let (status, given) = server.give("x", "a", "create");
    assert_eq!((status, given["error"]["code"].as_str()), (503, Some("store_failed")), "{given}");
    until("the outage is told", 30, || {
        let (status, health) = server.health();
        status == 200 && health["problems"][0].as_str().is_some_and(|p| p.contains("object store"))
    });
    assert!(s3.answered().is_empty(), "the store was down");
    s3.set(Mood::Answers);
    until("the store is asked again", 40, || server.health().1["problems"].as_array().unwrap().is_empty());
    assert_eq!(server.answer("c").0, 200);
    assert_eq!(server.give("x", "a", "create").1["persisted"], json!(true));
}

/// A server that starts while the store is down serves what it has and says so; the rest comes by itself. To be seen to fail: an error of the
/// first listing ends the start.
#[test]
fn a_server_starts_without_its_store() {
    let (s3, cache) = (S3::start(), tempfile::tempdir().unwrap());
    let cache = cache.path().display().to_string();
    upload(&s3, "team/a", &adapter(1));
    upload(&s3, "b", &adapter(2));
    upload(&s3, "c", &adapter(3));
    let server = Server::start(&s3, &cache, &[]);
    assert_eq!(server.answer("team/a").0, 200);
    assert_eq!(server.give("prod", "team/a", "create").0, 200);
    drop(server);
    let moods = [(Mood::Down, "b", vec!["prod", "team/a"]), (Mood::Swallows, "c", vec!["b", "prod", "team/a"])];
    for (mood, other, here) in moods {
        s3.set(mood);
        let server = Server::start(&s3, &cache, &[]);
        assert_eq!(server.names(), here);
        let (status, health) = server.health();
        let problem = health["problems"][0].as_str().unwrap_or_default();
        assert!(status == 200 && problem.contains("object store"), "{health}");
        let state = server.call("GET", "/v1/state", &json!({})).1;
        assert_eq!(state["problems"], health["problems"]);
        assert_eq!((server.answer("prod").0, server.answer("team/a").0, server.answer(other).0), (200, 200, 503));
        s3.set(Mood::Answers);
        until("the rest comes", 60, || server.names() == ["b", "c", "prod", "team/a"]);
        assert_eq!(server.answer(other).0, 200);
    }
    // A store that answers, and not as it should, is a wrong setting, and told at once.
    s3.put("adapters/.lorimer-adapters.json", b"{".to_vec());
    let model = common::goldens("tiny-llama").display().to_string();
    let out = common::lorimer(&["serve", "--model", &model, "--adapters", "s3://models/adapters", "--port", "0"])
        .args(["--adapter-cache", &cache])
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("AWS_ENDPOINT", &s3.endpoint)
        .env("AWS_ALLOW_HTTP", "true")
        .output()
        .unwrap();
    let said = common::text(&out.stderr);
    assert!(!out.status.success() && said.contains(".lorimer-adapters.json"), "{said}");
}

/// Two servers over one store: names that both give at a time are all kept, each learns the other's, and a name is created once. To be seen to
/// fail: `PutMode::Overwrite` in `Mirror::change`.
#[test]
fn two_servers_over_one_store_keep_each_others_names() {
    let s3 = S3::start();
    let caches = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    upload(&s3, "a", &adapter(1));
    upload(&s3, "b", &adapter(2));
    let servers = caches.each_ref().map(|cache| Server::start(&s3, &cache.path().display().to_string(), &[]));
    s3.set(Mood::Slow(Duration::from_millis(30)));
    std::thread::scope(|scope| {
        for (i, server) in servers.iter().enumerate() {
            scope.spawn(move || {
                for n in 0..8 {
                    let (status, given) = server.give(&format!("s{i}-{n}"), "a", "create");
                    assert_eq!((status, &given["persisted"]), (200, &json!(true)), "{given}");
                }
            });
        }
    });
    let kept: Value = serde_json::from_slice(&s3.get("adapters/.lorimer-adapters.json").unwrap()).unwrap();
    assert_eq!(kept["names"].as_object().unwrap().len(), 16, "{kept}");
    for server in &servers {
        until("names of the other are learnt", 20, || server.names().len() == 18);
    }
    // One creates; the other, which has not heard of it yet, is told so.
    assert_eq!(servers[0].give("one", "a", "create").0, 200);
    assert_eq!(servers[1].give("one", "b", "create").1["error"]["code"], "adapter_exists");
    // One replaces and takes away; the other follows.
    assert_eq!(servers[1].answer("one").1["choices"], servers[0].answer("one").1["choices"]);
    assert_eq!(servers[0].give("one", "b", "upsert").0, 200);
    let text = |server: &Server| server.answer("one").1["choices"][0]["text"].clone();
    assert_ne!(text(&servers[0]), servers[0].answer("a").1["choices"][0]["text"]);
    until("the other follows", 20, || text(&servers[1]) == text(&servers[0]));
    assert_eq!(servers[0].call("DELETE", "/v1/adapters/one", &json!({})).0, 200);
    until("the other forgets", 20, || servers[1].answer("one").0 == 404);
}

/// Who may read and not write serves, keeps names in memory, and says that it forgets them. While a name is being written, all else goes on.
#[test]
fn a_store_that_may_not_be_written_and_one_that_writes_slowly() {
    let (s3, cache) = (S3::start(), tempfile::tempdir().unwrap());
    let cache = cache.path().display().to_string();
    upload(&s3, "a", &adapter(1));
    let server = Server::start(&s3, &cache, &[]);
    s3.set(Mood::ReadOnly);
    let (status, given) = server.give("prod", "a", "create");
    assert_eq!((status, &given["persisted"]), (200, &json!(false)), "{given}");
    assert!(given["message"].as_str().unwrap().contains("until this server ends"), "{given}");
    assert!(server.health().1["problems"][0].as_str().unwrap().contains("not kept"));
    assert_eq!(server.answer("prod").0, 200);
    s3.set(Mood::Slow(Duration::from_secs(1)));
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| server.give("prod2", "a", "create"));
        for _ in 0..10 {
            let begun = Instant::now();
            assert_eq!(server.answer("prod").0, 200);
            assert_eq!(server.names().first().map(String::as_str), Some("a"));
            let seconds = begun.elapsed().as_secs_f64();
            assert!(seconds < 0.7, "a name that is being written held up others for {seconds} s");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(writing.join().unwrap().1["persisted"], json!(true));
    });
    // What could not be kept before was kept with it.
    let kept: Value = serde_json::from_slice(&s3.get("adapters/.lorimer-adapters.json").unwrap()).unwrap();
    assert_eq!(kept["names"].as_object().unwrap().keys().collect::<Vec<_>>(), ["prod", "prod2"]);
}

/// Variables of other programs are not the store's. To be seen to fail: names without `AWS_` taken too.
#[test]
fn only_variables_of_the_store_count() {
    let (s3, cache) = (S3::start(), tempfile::tempdir().unwrap());
    let cache = cache.path().display().to_string();
    upload(&s3, "a", &adapter(1));
    let others = [("TOKEN", "other"), ("REGION", "elsewhere"), ("ENDPOINT", "http://127.0.0.1:1"), ("BUCKET", "other")];
    let server = Server::start(&s3, &cache, &others);
    assert_eq!(server.answer("a").0, 200);
    drop(server);
    let asked = s3.answered();
    assert!(asked.iter().all(|head| !head.contains("other") && !head.contains("elsewhere")), "{asked:?}");
    let token = |heads: &[String]| heads.iter().all(|head| head.to_lowercase().contains("x-amz-security-token: mine"));
    assert!(!token(&asked) && !asked.is_empty());
    drop(Server::start(&s3, &cache, &[("AWS_SESSION_TOKEN", "mine")]));
    let asked = s3.answered();
    assert!(token(&asked) && !asked.is_empty(), "{asked:?}");
}

/// A mixture in an object store: its experts are fetched with it, as the adapters of the store that they are, looked at again, and kept for an outage. What
/// it names elsewhere, or what is not there, is refused by its number. To be seen to fail: a mirror that fetches the mixture alone, or never looks at
/// experts again.
#[test]
fn a_mixture_is_fetched_with_its_experts() {
    let (s3, cache) = (S3::start(), tempfile::tempdir().unwrap());
    let cache = cache.path().display().to_string();
    let files = |name: &str| -> Vec<(&'static str, Vec<u8>)> {
        let folder = common::goldens("xlora").join(name);
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        ["adapter_model.safetensors", "adapter_config.json"].map(|file| (file, read(file))).into()
    };
    let named = |adapters: Value| {
        let mut files = files("layerwise");
        let mut config: Value = serde_json::from_slice(&files[1].1).unwrap();
        config["adapters"] = adapters;
        files[1].1 = config.to_string().into_bytes();
        files
    };
    for expert in ["0", "1", "2"] {
        upload(&s3, &format!("experts/{expert}"), &files(&format!("experts/{expert}")));
    }
    upload(&s3, "mixed", &files("layerwise"));
    upload(
        &s3,
        "team/urls",
        &named(json!({ "0": "s3://models/adapters/experts/0", "1": "experts/1", "2": "../../experts/2" })),
    );
    let server = Server::start(&s3, &cache, &[]);
    assert_eq!(server.names(), ["experts/0", "experts/1", "experts/2", "mixed", "team/urls"]);
    // What the code that trains says of the files of this machine.
    let base = Base::prepare(&common::goldens("tiny-llama"), &OpenOptions::default()).unwrap().load().unwrap();
    let stored = StoredAdapter::read(&common::goldens("xlora/layerwise")).unwrap();
    let adapter = Adapter::load_whole(base.model(), &stored).unwrap();
    let (mut tokens, on) = (vec![1u32, 5, 7], Attached::one(&adapter));
    for _ in 0..8 {
        let hidden = base.model().hidden(&Batch::pack([tokens.as_slice()]), &on).unwrap();
        let last = base.model().logits(&hidden.narrow(0, tokens.len() - 1, 1).unwrap(), &on).unwrap();
        tokens.push(last.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0]);
    }
    let expected = json!(base.text.decode(&tokens[3..], true).unwrap());
    for name in ["mixed", "team/urls"] {
        let (status, answer, _) = server.answer(name);
        assert_eq!((status, &answer["choices"][0]["text"]), (200, &expected), "{name}: {answer}");
    }
    let (status, given) = server.give("prod", "mixed", "create");
    assert_eq!(status, 200, "{given}");
    // Not there, out of the prefix, another store's, another machine's, and a mixture within a mixture.
    for (i, (part, says)) in [
        ("../experts/9", "its expert 1 should be at `../experts/9`, where the object store has no adapter"),
        ("../../secret", "its expert 1 should be at"),
        ("s3://other/adapters/experts/0", "its expert 1 should be at"),
        ("/models/experts/0", "its expert 1 should be at"),
        ("../mixed", "XLORA"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("bad{i}");
        upload(&s3, &name, &named(json!({ "0": "../experts/0", "1": part, "2": "../experts/2" })));
        let (status, answer, _) = server.answer(&name);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!((status, answer["error"]["code"].as_str()), (422, Some("adapter_invalid")), "{part}: {answer}");
        assert!(message.contains(says) && message.lines().count() == 1, "{part}: {message}");
    }
    assert_eq!(server.answer("mixed").0, 200, "a mixture within another is still served by itself");
    // Another expert under its name: PEFT's file does not say which it was, so it is served with that.
    let content = || {
        let (_, listed) = server.call("GET", "/v1/adapters", &json!({}));
        let all = listed["adapters"].as_array().unwrap();
        all.iter().find(|a| a["name"] == "mixed").unwrap()["content_id"].clone()
    };
    let before = content();
    let mut other = files("experts/1");
    let end = other[0].1.len();
    other[0].1[end - 4..].copy_from_slice(&0.5f32.to_le_bytes());
    upload(&s3, "experts/1", &other);
    until("the expert that was replaced is served on", 30, || server.answer("mixed").0 == 200 && content() != before);
    drop(server);
    // What was fetched serves a new server while the store is down.
    s3.set(Mood::Down);
    let server = Server::start(&s3, &cache, &[]);
    let (status, answer, _) = server.answer("mixed");
    assert_eq!(status, 200, "{answer}");
}
