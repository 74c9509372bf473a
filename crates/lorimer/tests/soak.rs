//! A server that is asked, misused and changed at random, all at once: every request gets its own adapter's answer or a code, nothing leaks, and
//! names survive the process.
//!
//! As a test it is short. At length:
//!
//! - `LORIMER_SOAK_REQUESTS=100000 cargo test --release -p lorimer --test soak -- --nocapture`
//! - `LORIMER_SOAK_MODEL=smollm2-135m LORIMER_SOAK_SECONDS=1800 cargo test --release -p lorimer --test soak -- --nocapture`

#[path = "program/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use lorimer::model::pull::{PullOptions, pull};
use lorimer::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const CONTENTS: usize = 12;
const NAMES: usize = 8;
const PROMPTS: usize = 6;
/// Token rows of a step.
const BATCH_TOKENS: &str = "64";
const CLIENTS: u64 = 16;
const TOKENS: usize = 6;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} should be a number")))
}

struct Server {
    child: Child,
    url: String,
    errors: Option<std::thread::JoinHandle<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(model: &str, root: &Path) -> Self {
        let root = root.display().to_string();
        // Room for some of the adapters only, so that they come and go in the pool and in host memory too.
        let (pool, host) = if model.contains("tiny") { ("300KB", "200KB") } else { ("200MB", "25MB") };
        let mut child = common::lorimer(&["serve", "--model", model, "--adapters", &root, "--port", "0", "--json"])
            .args(["-q", "--pool", pool, "--host-memory", host, "--batch-tokens", BATCH_TOKENS])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let said: Value = serde_json::from_str(&line).expect("the server says where it is");
        Self { child, url: said["url"].as_str().unwrap().to_string(), errors: Some(errors) }
    }

    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// Ends it without a word; what it wrote to its error output.
    fn kill(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.errors.take().unwrap().join().unwrap()
    }
}

/// Adapters of several methods that change the answers.
fn write_contents(base: &Base, root: &Path) {
    for i in 0..CONTENTS {
        let name = ["lora", "dora", "bone", "vera"][i % 4];
        let settings = json!({ "r": if name == "vera" { 16 } else { 4 } });
        let method = methods::build(name, settings.as_object().unwrap()).unwrap();
        let adapter = Adapter::attach(base.model(), method, i as u64).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(100 + i as u64);
        for (_, var) in adapter.trainable() {
            let moved: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-0.05..0.05)).collect();
            let moved = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
            var.set(&(var.as_tensor() + moved).unwrap()).unwrap();
        }
        adapter.to_stored("base").unwrap().write(&root.join(format!("c{i}")), None).unwrap();
    }
}

/// Folders that are no adapters of the base, each in a way of its own; how many there are.
fn write_damaged(root: &Path) -> usize {
    let weights = std::fs::read(root.join("c0/adapter_model.safetensors")).unwrap();
    let config = std::fs::read(root.join("c0/adapter_config.json")).unwrap();
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let with = |at: usize, bytes: &[u8]| {
        let mut all = weights.clone();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        all
    };
    let nan: Vec<u8> = f32::NAN.to_le_bytes().into();
    let text = |config: &[u8]| String::from_utf8(config.to_vec()).unwrap();
    let zero = [&weights[..8 + header], &vec![0; weights.len() - 8 - header]].concat();
    let all: Vec<(Vec<u8>, Vec<u8>)> = vec![
        (weights[..weights.len() / 2].to_vec(), config.clone()),
        (weights[..5].to_vec(), config.clone()),
        (vec![], config.clone()),
        (with(0, &u64::MAX.to_le_bytes()), config.clone()),
        (with(0, &(1u64 << 40).to_le_bytes()), config.clone()),
        (with(8, b"}"), config.clone()),
        (with(8 + header, &nan), config.clone()),
        (zero, config.clone()),
        (weights.clone(), b"{".to_vec()),
        (weights.clone(), b"[]".to_vec()),
        (weights.clone(), text(&config).replace("\"r\":4", "\"r\":5").replace("\"r\": 4", "\"r\": 5").into_bytes()),
        (weights.clone(), text(&config).replace("LORA", "PICKLE").into_bytes()),
        (weights.clone(), text(&config).replace("q_proj", "x_proj").into_bytes()),
        (
            std::fs::read(root.join("c1/adapter_model.safetensors")).unwrap(),
            b"{\"peft_type\": \"BONE\", \"r\": 4}".to_vec(),
        ),
    ];
    for (i, (weights, config)) in all.iter().enumerate() {
        let folder = root.join(format!("bad{i}"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
        std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    }
    all.len()
}

/// What a name has stood for, in order, and which of it is certain.
#[derive(Default)]
struct Named {
    log: Vec<Option<usize>>,
    settled: usize,
}

struct Soak {
    client: reqwest::Client,
    url: String,
    prompts: Vec<Vec<u32>>,
    /// By content (the base last) and prompt.
    expected: Vec<Vec<String>>,
    damaged: usize,
    names: Vec<(tokio::sync::Mutex<()>, Mutex<Named>)>,
    done: AtomicU64,
    counts: Mutex<BTreeMap<String, u64>>,
}

impl Soak {
    fn count(&self, what: &str) {
        *self.counts.lock().unwrap().entry(what.to_string()).or_default() += 1;
    }

    fn body(&self, model: &str, prompt: usize, stream: bool) -> Value {
        json!({
            "model": model, "prompt": self.prompts[prompt], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true,
            "stream": stream, "user": format!("tenant-{}", prompt % 3),
        })
    }

    /// Status and body of a call; a body that is no JSON is a defect.
    async fn call(&self, method: reqwest::Method, path: &str, body: &Value) -> (u16, Value) {
        let sent = self.client.request(method, format!("{}{path}", self.url)).json(body).send().await;
        let answer = sent.expect("an answer");
        let status = answer.status().as_u16();
        let text = answer.text().await.expect("a whole body");
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path} {status}: {e}: {text}")))
    }

    async fn answer(&self, model: &str, prompt: usize) -> String {
        let (status, answer) =
            self.call(reqwest::Method::POST, "/v1/completions", &self.body(model, prompt, false)).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_string()
    }

    /// Every refusal has a code that stands for its status.
    fn refused(&self, what: &str, (status, answer): (u16, Value), allowed: &[&str]) {
        let code = answer["error"]["code"].as_str().unwrap_or_else(|| panic!("{what}: {status}: {answer}"));
        assert!((400..=503).contains(&status) && status != 500, "{what}: {status}: {answer}");
        assert!(allowed.contains(&code), "{what}: {status}: {answer}");
        self.count(code);
    }

    /// Asks for a name, as a stream or whole; what comes must be an answer of something that the name stood for meanwhile.
    async fn ask(&self, rng: &mut ChaCha8Rng) {
        let (i, prompt, stream) = (rng.random_range(0..=NAMES), rng.random_range(0..PROMPTS), rng.random_bool(0.5));
        let name = if i < NAMES { format!("n{i}") } else { "lorimer-no-such-adapter".into() };
        let from = self.names.get(i).map(|(_, named)| named.lock().unwrap().settled);
        let sent =
            self.client.post(format!("{}/v1/completions", self.url)).json(&self.body(&name, prompt, stream)).send();
        let mut response = sent.await.expect("an answer");
        let status = response.status().as_u16();
        let text = match stream && status == 200 {
            false => {
                let text = response.text().await.expect("a whole body");
                let answer: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
                if status != 200 {
                    let gone = self
                        .names
                        .get(i)
                        .is_none_or(|(_, named)| named.lock().unwrap().log[from.unwrap_or(0)..].contains(&None));
                    self.refused(&name, (status, answer), if gone { &["adapter_not_found"] } else { &["queue_full"] });
                    return;
                }
                answer["choices"][0]["text"].as_str().unwrap().to_string()
            }
            true => {
                let (mut all, leave) = (String::new(), rng.random_bool(0.15));
                while let Some(chunk) = response.chunk().await.expect("a chunk") {
                    all.push_str(std::str::from_utf8(&chunk).unwrap());
                    if leave {
                        // The client goes in the middle of its answer.
                        self.count("left");
                        return;
                    }
                }
                assert!(all.ends_with("data: [DONE]\n\n"), "{all}");
                let events = all.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).filter(|e| *e != "[DONE]");
                let texts = events.map(|e| serde_json::from_str::<Value>(e).unwrap());
                texts.filter_map(|e| e["choices"][0]["text"].as_str().map(str::to_string)).collect()
            }
        };
        let meanwhile = self.names[i].1.lock().unwrap().log[from.unwrap_or(0)..].to_vec();
        let fits = meanwhile.iter().flatten().any(|&content| self.expected[content][prompt] == text);
        assert!(fits, "`{name}` answers prompt {prompt} with {text:?}, and was {meanwhile:?} meanwhile");
        self.count(if stream { "streamed" } else { "answered" });
    }

    async fn misuse(&self, rng: &mut ChaCha8Rng) {
        let post = |body: Vec<u8>| {
            let to = ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"][body.len() % 3];
            self.client.post(format!("{}{to}", self.url)).header("content-type", "application/json").body(body).send()
        };
        let wrong = [
            json!({ "prompt": [1, 2], "max_tokens": -3 }),
            json!({ "prompt": [1, 2], "max_tokens": 1u64 << 60 }),
            json!({ "prompt": [u32::MAX] }),
            json!({ "prompt": [], "messages": [] }),
            json!({ "prompt": [1], "temperature": -1 }),
            json!({ "prompt": [1], "top_p": 7 }),
            json!({ "prompt": [1], "n": 100_000, "messages": [{ "role": "user", "content": "x" }], "lora_name": "../x", "lora_path": "/etc" }),
            json!({ "prompt": [1], "lora": [{ "id": "n0", "scale": "much" }] }),
            json!({ "model": "../../etc/passwd", "prompt": [1], "messages": [] }),
            json!({ "messages": [{ "role": 3 }] }),
            json!({ "lora_name": "n0", "lora_path": "../.." }),
        ];
        let body = match rng.random_range(0..4) {
            0 => (0..rng.random_range(0..200)).map(|_| rng.random()).collect(),
            1 => "[".repeat(rng.random_range(1..5000)).into_bytes(),
            2 => self.body("n0", 0, true).to_string().into_bytes()[..rng.random_range(0..40)].to_vec(),
            _ => wrong[rng.random_range(0..wrong.len())].to_string().into_bytes(),
        };
        let shown = String::from_utf8_lossy(&body).into_owned();
        let answer = post(body).await.expect("an answer");
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!((400..500).contains(&status), "{shown:.100}: {status} {text}");
        assert!(answer["error"]["code"].is_string(), "{text}");
        self.count("misuse refused");
    }

    /// Gives a name to a content, or takes it away, or tries to give it to what is none.
    async fn change(&self, rng: &mut ChaCha8Rng) {
        let i = rng.random_range(0..NAMES);
        let (name, (alone, named)) = (format!("n{i}"), &self.names[i]);
        let _one = alone.lock().await;
        let path = format!("/v1/adapters/{name}");
        let act = rng.random_range(0..100);
        if act < 15 {
            // Damaged ones change nothing.
            let bad = json!({ "path": format!("bad{}", rng.random_range(0..self.damaged)), "mode": "upsert" });
            let answer = self.call(reqwest::Method::PUT, &path, &bad).await;
            self.refused(&bad.to_string(), answer, &["adapter_invalid", "limit_exceeded"]);
            return;
        }
        let before = {
            let named = named.lock().unwrap();
            named.log[named.settled]
        };
        let (to, method, body) = match act {
            0..30 => (None, reqwest::Method::DELETE, json!({})),
            _ => {
                let to = rng.random_range(0..CONTENTS);
                let mode = if before.is_none() && act < 60 { "create" } else { "upsert" };
                (Some(to), reqwest::Method::PUT, json!({ "path": format!("c{to}"), "mode": mode }))
            }
        };
        named.lock().unwrap().log.push(to);
        let answer = self.call(method, &path, &body).await;
        if answer.0 == 200 {
            self.count(if to.is_some() { "given" } else { "taken" });
        } else {
            assert!(to.is_none() && before.is_none(), "{name}: {answer:?}");
            self.refused(&name, answer, &["adapter_not_found"]);
        }
        let mut named = named.lock().unwrap();
        named.settled = named.log.len() - 1;
    }

    async fn client(self: Arc<Self>, seed: u64, most: u64, until: Option<Instant>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        while self.done.fetch_add(1, Ordering::Relaxed) < most && until.is_none_or(|end| Instant::now() < end) {
            match rng.random_range(0..100) {
                0..8 => self.misuse(&mut rng).await,
                8..20 => self.change(&mut rng).await,
                _ => self.ask(&mut rng).await,
            }
        }
    }
}

#[test]
fn a_server_survives_what_clients_do() {
    let model =
        std::env::var("LORIMER_SOAK_MODEL").unwrap_or_else(|_| common::goldens("tiny-llama").display().to_string());
    let seconds = number("LORIMER_SOAK_SECONDS");
    let most = number("LORIMER_SOAK_REQUESTS").unwrap_or(if seconds.is_some() { u64::MAX } else { 4000 });
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let base = pull(&model, PullOptions { refresh: false, progress: false }).unwrap();
    let base = Base::prepare(&base.path, &OpenOptions::default()).unwrap().load().unwrap();
    write_contents(&base, root);
    let damaged = write_damaged(root);
    let vocabulary = base.model().shape().vocabulary as u32;
    drop(base);
    let server = Server::start(&model, root);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // From a few tokens to many times what a step takes.
    let lengths = [1, 3, 16, 33, 150, 400];
    let prompts = lengths.iter().map(|&n| (0..n).map(|_| rng.random_range(3..vocabulary)).collect()).collect();
    let mut soak = Soak {
        client: lorimer::model::http::client().no_proxy().timeout(Duration::from_secs(120)).build().unwrap(),
        url: server.url.clone(),
        prompts,
        expected: vec![],
        damaged,
        names: (0..NAMES)
            .map(|_| (tokio::sync::Mutex::new(()), Mutex::new(Named { log: vec![None], settled: 0 })))
            .collect(),
        done: AtomicU64::new(0),
        counts: Mutex::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let soak = runtime.block_on(async {
        // Each content's answers, one at a time.
        for content in 0..CONTENTS {
            let mut answers = Vec::new();
            for prompt in 0..PROMPTS {
                answers.push(soak.answer(&format!("c{content}"), prompt).await);
            }
            soak.expected.push(answers);
        }
        let unlike: std::collections::BTreeSet<_> = soak.expected.iter().collect();
        assert!(unlike.len() * 4 >= CONTENTS * 3, "adapters answer too much alike to be told apart: {}", unlike.len());
        let soak = Arc::new(soak);
        let until = seconds.map(|s| Instant::now() + Duration::from_secs(s));
        let run = |from: u64, most: u64, until: Option<Instant>| {
            let soak = soak.clone();
            async move {
                soak.done.store(0, Ordering::Relaxed);
                let mut tasks = tokio::task::JoinSet::new();
                for seed in from..from + CLIENTS {
                    tasks.spawn(soak.clone().client(seed, most, until));
                }
                while let Some(task) = tasks.join_next().await {
                    task.unwrap();
                }
            }
        };
        // Memory is compared between the first half's end and the second's.
        let half = seconds.map(|s| Instant::now() + Duration::from_secs(s / 2));
        run(1000, most / 2, half).await;
        let resident = server.resident();
        run(2000, most / 2, until).await;
        let grown = server.resident() as f64 / resident as f64;
        let (_, state) = soak.call(reqwest::Method::GET, "/v1/state", &json!({})).await;
        eprintln!(
            "{:?}; memory {:.1} MB, afterwards {:.3} times that",
            soak.counts.lock().unwrap(),
            resident as f64 / 1e6,
            grown
        );
        let figures = &state["figures"];
        assert_eq!((figures["restarts"].as_u64(), figures["failed"].as_u64()), (Some(0), Some(0)), "{figures}");
        // In the seconds of a short run the allocator is still finding its size.
        let long = seconds.is_some_and(|s| s >= 600) || most >= 50_000;
        assert!(grown < if long { 1.05 } else { 1.25 }, "memory grew {grown} times");
        soak
    });
    // Names are what they were, in a process that was killed and one after it.
    let errors = server.kill();
    assert!(!errors.contains("panicked"), "{errors}");
    let again = Server::start(&model, root);
    let client = lorimer::model::http::client().no_proxy().build().unwrap();
    let soak = Arc::into_inner(soak).unwrap();
    let soak = Soak { url: again.url.clone(), client, ..soak };
    runtime.block_on(async {
        for (i, (_, named)) in soak.names.iter().enumerate() {
            let now = named.lock().unwrap().log.last().copied().flatten();
            match now {
                Some(content) => assert_eq!(soak.answer(&format!("n{i}"), 0).await, soak.expected[content][0]),
                None => {
                    let body = soak.body(&format!("n{i}"), 0, false);
                    let answer = soak.call(reqwest::Method::POST, "/v1/completions", &body).await;
                    soak.refused("a name that was taken", answer, &["adapter_not_found"]);
                }
            }
        }
        let (_, state) = soak.call(reqwest::Method::GET, "/v1/state", &json!({})).await;
        let engine = &state["figures"]["engine"];
        assert_eq!(engine["waiting"], 0, "{engine}");
    });
    again.kill();
}
