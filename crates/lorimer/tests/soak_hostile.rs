//! Chats on adapters that are in memory, while everything around them goes wrong: an object store that takes two seconds for each answer and
//! swallows every tenth call, prompts of 8 MB, clients that vanish in the middle of a body or an answer, and one that names a new user with
//! each request; in the end the server is told to stop in the middle of it all.
//!
//! As a test it is short. At length, with the bounds that a long run can be held to:
//!
//! `LORIMER_SOAK_MODEL=smollm2-135m LORIMER_SOAK_SECONDS=600 cargo test --release -p lorimer --test soak_hostile -- --nocapture`

#[path = "program/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use lorimer::model::pull::{PullOptions, pull};
use lorimer::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const WARM: usize = 4;
const COLD: usize = 24;
const BUCKET: &str = "bucket";

/// An object store that answers S3's calls as far as the server makes them; slowly or not at all once it is told so.
struct Objects {
    all: BTreeMap<String, Vec<u8>>,
    slow: AtomicBool,
    calls: AtomicU64,
    swallowed: AtomicU64,
}

impl Objects {
    fn start(all: BTreeMap<String, Vec<u8>>) -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let objects = Arc::new(Self {
            all,
            slow: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            swallowed: AtomicU64::new(0),
        });
        let own = objects.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let own = own.clone();
                std::thread::spawn(move || while own.answer(&stream).is_some() {});
            }
        });
        (objects, port)
    }

    /// One call on a connection; None when it is over.
    fn answer(&self, stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
        let (method, target) = line.split_once(' ')?;
        let target = target.split(' ').next()?.to_string();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok().filter(|&n| n > 0)?;
            if header.trim().is_empty() {
                break;
            }
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.slow.load(Ordering::Relaxed) {
            if call % 10 == 9 {
                self.swallowed.fetch_add(1, Ordering::Relaxed);
                let _ = reader.read(&mut [0]);
                return None;
            }
            std::thread::sleep(Duration::from_secs(2));
        }
        let path = target.split('?').next()?.trim_start_matches('/').to_string();
        let modified = "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n";
        let mut stream = stream;
        if path.trim_end_matches('/') == BUCKET {
            let entry = |(key, body): (&String, &Vec<u8>)| {
                format!(
                    "<Contents><Key>{key}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified><ETag>\"e\"</ETag><Size>{}</Size></Contents>",
                    body.len()
                )
            };
            let all: String = self.all.iter().map(entry).collect();
            let xml = format!(
                "<?xml version=\"1.0\"?><ListBucketResult><Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>{all}</ListBucketResult>"
            );
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {}\r\n\r\n{xml}",
                xml.len()
            )
            .ok()?;
            return Some(());
        }
        match self.all.get(path.strip_prefix(BUCKET)?.trim_start_matches('/')) {
            Some(body) => {
                let head =
                    format!("HTTP/1.1 200 OK\r\nETag: \"e\"\r\n{modified}Content-Length: {}\r\n\r\n", body.len());
                stream.write_all(head.as_bytes()).ok()?;
                if method == "GET" {
                    stream.write_all(body).ok()?;
                }
            }
            None => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").ok()?,
        }
        Some(())
    }
}

/// LoRA adapters of the base, as objects by key.
fn adapters(base: &Base) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let folder = tempfile::tempdir().unwrap();
    for i in 0..WARM + COLD {
        let settings = json!({ "r": 8 });
        let method = methods::build("lora", settings.as_object().unwrap()).unwrap();
        let adapter = Adapter::attach(base.model(), method, i as u64).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
        for (_, var) in adapter.trainable() {
            let moved: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-0.02..0.02)).collect();
            let moved = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
            var.set(&(var.as_tensor() + moved).unwrap()).unwrap();
        }
        let own = folder.path().join(i.to_string());
        adapter.to_stored("base").unwrap().write(&own, None).unwrap();
        for file in std::fs::read_dir(&own).unwrap().flatten() {
            let key = format!("adapters/{}/{}", name(i), file.file_name().to_string_lossy());
            all.insert(key, std::fs::read(file.path()).unwrap());
        }
    }
    all
}

fn name(i: usize) -> String {
    if i < WARM { format!("warm{i}") } else { format!("cold{}", i - WARM) }
}

struct Server {
    child: Child,
    url: String,
    address: String,
    errors: Arc<Mutex<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(model: &str, port: u16, cache: &std::path::Path) -> Self {
        let mut child =
            common::lorimer(&["serve", "--model", model, "--adapters", "s3://bucket/adapters", "--json", "-q"])
                .args(["--port", "0", "--pool", "200MB", "--host-memory", "200MB", "--grace", "20", "--adapter-cache"])
                .arg(cache)
                .envs([("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_REGION", "z")])
                .envs([("AWS_ENDPOINT", format!("http://127.0.0.1:{port}")), ("AWS_ALLOW_HTTP", "true".into())])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (errors, stderr) = (Arc::new(Mutex::new(String::new())), child.stderr.take().unwrap());
        let own = errors.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut text = own.lock().unwrap();
                if text.len() < 1 << 20 {
                    *text += &line;
                    text.push('\n');
                }
            }
        });
        let said: Value = serde_json::from_str(&line).expect("the server says where it is");
        let url = said["url"].as_str().unwrap().to_string();
        Self { child, address: url.strip_prefix("http://").unwrap().to_string(), url, errors }
    }

    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
    }
}

/// What all clients share.
struct Soak {
    url: String,
    address: String,
    vocabulary: u32,
    over: AtomicBool,
    counts: Mutex<BTreeMap<String, u64>>,
}

impl Soak {
    fn count(&self, what: impl Into<String>) {
        *self.counts.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    fn prompt(&self, n: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        (0..n).map(|_| rng.random_range(3..self.vocabulary)).collect()
    }
}

/// Connections of their own from an address of this machine.
fn client(from: [u8; 4]) -> reqwest::Client {
    let client = lorimer::model::http::client().no_proxy().local_address(IpAddr::from(from));
    client.timeout(Duration::from_secs(180)).build().unwrap()
}

/// Chats on adapters that are in memory, one after the other: seconds to each first token.
async fn chats(soak: Arc<Soak>, seed: u64, until: Option<Instant>) -> Vec<f64> {
    let (client, mut rng, mut seconds) = (client([127, 0, 0, 1]), ChaCha8Rng::seed_from_u64(seed), Vec::new());
    while until.map_or(soak.goes_on(), |end| Instant::now() < end) {
        let body = json!({
            "model": name(rng.random_range(0..WARM)), "prompt": soak.prompt(24, &mut rng), "max_tokens": 8, "temperature": 0,
            "ignore_eos": true, "stream": true, "user": "steady",
        });
        let begun = Instant::now();
        let sent = client.post(format!("{}/v1/completions", soak.url)).json(&body).send().await;
        let mut response = match sent {
            Ok(response) => response,
            // The server may have stopped.
            Err(_) if !soak.goes_on() => break,
            Err(error) => panic!("a chat: {error}"),
        };
        if response.status() == 503 && !soak.goes_on() {
            break;
        }
        assert_eq!(response.status(), 200, "{:?}", response.text().await);
        let (mut first, mut all) = (None, String::new());
        while let Some(chunk) = response.chunk().await.expect("a chunk of a chat") {
            first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
            all.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        assert!(all.ends_with("data: [DONE]\n\n") && !all.contains("\"error\""), "{all}");
        seconds.extend(first);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    seconds
}

/// Asks for adapters that are not in memory, and for some that there are not.
async fn cold(soak: Arc<Soak>, seed: u64) {
    let (client, mut rng) = (client([127, 0, 0, 2]), ChaCha8Rng::seed_from_u64(seed));
    while soak.goes_on() {
        let own = if rng.random_bool(0.2) { "nobody".into() } else { name(WARM + rng.random_range(0..COLD)) };
        let body = json!({ "model": own, "prompt": [5, 6, 7], "max_tokens": 1, "user": "cold" });
        if let Ok(response) = client.post(format!("{}/v1/completions", soak.url)).json(&body).send().await {
            let status = response.status().as_u16();
            let answer: Value = response.json().await.unwrap_or_default();
            assert!([200, 404, 503].contains(&status), "{status} {answer}");
            soak.count(format!("cold {status}"));
        }
    }
}

/// Prompts of 8 MB, as text and as messages, and bodies that are many small values.
async fn large(soak: Arc<Soak>, seed: u64) {
    let (client, mut rng) = (client([127, 0, 0, 3]), ChaCha8Rng::seed_from_u64(seed));
    let text = "many words ".repeat((8 << 20) / 11 - 100);
    let bodies = [
        ("completions", json!({ "model": "warm0", "prompt": text }).to_string()),
        (
            "chat/completions",
            json!({ "model": "warm0", "messages": [{ "role": "user", "content": text }] }).to_string(),
        ),
        ("completions", format!("{{\"prompt\": [{}1]}}", "1,".repeat((4 << 20) - 100))),
        ("chat/completions", format!("{{\"messages\": [{}1]}}", "[],".repeat(2 << 20))),
    ];
    while soak.goes_on() {
        let (path, body) = bodies[rng.random_range(0..bodies.len())].clone();
        let sent = client.post(format!("{}/v1/{path}", soak.url)).header("content-type", "application/json").body(body);
        if let Ok(response) = sent.send().await {
            let status = response.status().as_u16();
            assert!([400, 503].contains(&status), "{status} {:?}", response.text().await);
            soak.count(format!("large {status}"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Goes away in the middle of a large body or of an answer.
async fn vanish(soak: Arc<Soak>, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    while soak.goes_on() {
        let (length, part) = match rng.random_bool(0.5) {
            true => (8 << 20, vec![b' '; rng.random_range(1..7usize << 20)]),
            false => {
                let prompt = soak.prompt(40, &mut rng);
                let body = json!({ "model": "warm1", "prompt": prompt, "max_tokens": 100, "stream": true }).to_string();
                (body.len(), body.into_bytes())
            }
        };
        let (address, pause) = (soak.address.clone(), Duration::from_millis(rng.random_range(0..200)));
        let gone = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
            let mut stream = connect_from([127, 0, 0, 5], &address)?;
            stream.set_write_timeout(Some(Duration::from_secs(2)))?;
            let kind = "Content-Type: application/json";
            write!(
                stream,
                "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\n{kind}\r\nContent-Length: {length}\r\n\r\n"
            )?;
            let written = stream.write_all(&part);
            std::thread::sleep(pause);
            written
        });
        soak.count(if gone.await.unwrap().is_ok() { "vanished" } else { "vanished, refused before" });
    }
}

/// A connection from another address of this machine.
fn connect_from(from: [u8; 4], to: &str) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketAddrV4, SocketType, bind, connect, socket};
    let to: std::net::SocketAddrV4 = to.parse().map_err(std::io::Error::other)?;
    let stream = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&stream, &SocketAddrV4::new(from.into(), 0))?;
    connect(&stream, &to)?;
    Ok(stream.into())
}

/// A new user with each request.
async fn users(soak: Arc<Soak>, seed: u64) {
    let (client, mut rng) = (client([127, 0, 0, 4]), ChaCha8Rng::seed_from_u64(seed));
    while soak.goes_on() {
        let body = json!({
            "model": "warm2", "prompt": soak.prompt(16, &mut rng), "max_tokens": 4, "user": format!("{}", rng.random::<u64>()),
        });
        if let Ok(response) = client.post(format!("{}/v1/completions", soak.url)).json(&body).send().await {
            soak.count(format!("user {}", response.status().as_u16()));
        }
    }
}

/// Where the clients run that stand for other machines: what they do takes little of the processors that the server has here.
fn elsewhere() -> tokio::runtime::Runtime {
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    #[cfg(target_os = "linux")]
    threads.on_thread_start(|| _ = rustix::process::nice(10));
    threads.worker_threads(1).enable_all().build().unwrap()
}

fn p99(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[(seconds.len() * 99).div_ceil(100) - 1]
}

#[test]
fn warm_chats_do_not_feel_what_goes_wrong_around_them() {
    let model =
        std::env::var("LORIMER_SOAK_MODEL").unwrap_or_else(|_| common::goldens("tiny-llama").display().to_string());
    let long = std::env::var("LORIMER_SOAK_SECONDS").ok().map(|v| v.parse::<u64>().expect("LORIMER_SOAK_SECONDS"));
    let seconds = long.unwrap_or(12);
    let base = pull(&model, PullOptions { refresh: false, progress: false }).unwrap();
    let base = Base::prepare(&base.path, &OpenOptions::default()).unwrap().load().unwrap();
    let vocabulary = base.model().shape().vocabulary as u32;
    let (objects, port) = Objects::start(adapters(&base));
    drop(base);
    let cache = tempfile::tempdir().unwrap();
    let mut server = Server::start(&model, port, cache.path());
    let soak = Arc::new(Soak {
        url: server.url.clone(),
        address: server.address.clone(),
        vocabulary,
        over: AtomicBool::new(false),
        counts: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let others = elsewhere();
    let (quiet, loud, memory, ended) = runtime.block_on(async {
        let quietly = async |seconds: u64| {
            let end = Some(Instant::now() + Duration::from_secs(seconds));
            let both = [tokio::spawn(chats(soak.clone(), 1, end)), tokio::spawn(chats(soak.clone(), 2, end))];
            let mut all = Vec::new();
            for one in both {
                all.extend(one.await.unwrap());
            }
            all
        };
        quietly(2).await;
        let quiet = quietly((seconds / 4).max(3)).await;
        objects.slow.store(true, Ordering::Relaxed);
        let mut tasks = tokio::task::JoinSet::new();
        for seed in 0..4 {
            tasks.spawn_on(cold(soak.clone(), 10 + seed), others.handle());
            tasks.spawn_on(vanish(soak.clone(), 20 + seed), others.handle());
        }
        tasks.spawn_on(large(soak.clone(), 30), others.handle());
        tasks.spawn_on(users(soak.clone(), 40), others.handle());
        let chatting = [tokio::spawn(chats(soak.clone(), 5, None)), tokio::spawn(chats(soak.clone(), 6, None))];
        tokio::time::sleep(Duration::from_secs(seconds / 3)).await;
        let before = server.resident();
        tokio::time::sleep(Duration::from_secs(seconds - seconds / 3)).await;
        let after = server.resident();
        // Told to stop while all of this goes on.
        soak.over.store(true, Ordering::Relaxed);
        let told = std::process::Command::new("kill").arg("-TERM").arg(server.child.id().to_string()).status();
        assert!(told.unwrap().success());
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = server.child.try_wait().unwrap() {
                break Some(status);
            }
            if begun.elapsed() > Duration::from_secs(30) {
                let _ = server.child.kill();
                break None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let ended = (status, begun.elapsed());
        let mut loud = Vec::new();
        for one in chatting {
            loud.extend(one.await.unwrap());
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        (quiet, loud, (before, after), ended)
    });
    let (n, m) = (quiet.len(), loud.len());
    let (quiet, loud) = (p99(quiet), p99(loud));
    let mb = |bytes: u64| bytes as f64 / 1e6;
    eprintln!(
        "first tokens of warm chats: p99 {quiet:.3} s alone ({n} chats), {loud:.3} s among the others ({m}), {:.2} times; memory {:.0} MB, then {:.0} MB; ended after {:.1} s; {:?}; the store was asked {} times and swallowed {}",
        loud / quiet,
        mb(memory.0),
        mb(memory.1),
        ended.1.as_secs_f64(),
        soak.counts.lock().unwrap(),
        objects.calls.load(Ordering::Relaxed),
        objects.swallowed.load(Ordering::Relaxed),
    );
    assert!(
        ended.0.is_some_and(|status| status.success()),
        "the server does not stop, or with an error: {:?}",
        ended.0
    );
    let errors = server.errors.lock().unwrap().clone();
    assert!(!errors.contains("panicked"), "{errors}");
    // A test's few chats, beside other tests, have a p99 that is chance.
    let bound = if long.is_some() { 3.0 * quiet } else { (3.0 * quiet).max(1.0) };
    assert!(loud <= bound, "p99 of first tokens: {loud} s, {quiet} s alone");
    let (before, after) = (memory.0 as f64, memory.1 as f64);
    assert!(
        after < before * if long.is_some() { 1.1 } else { 1.5 } + 32e6,
        "memory grew from {before} to {after} bytes"
    );
}
