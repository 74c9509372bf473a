//! `lorimer pull` against a server that answers as the Hugging Face hub does: resume, checksum, cache layout, token.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What `pull` asks for at a time.
const PIECE: usize = 16 << 20;

#[derive(Default)]
pub struct State {
    pub files: BTreeMap<&'static str, Vec<u8>>,
    /// Paths that were asked for.
    pub asked: Vec<String>,
    /// How long each answer takes.
    pub pause: std::time::Duration,
    /// What the listing says the weights hash to, where that is not the truth.
    pub claimed: Option<String>,
    /// Answer only half of the piece that begins here, once.
    break_at: Option<usize>,
    /// First bytes of the ranges of the weights that were asked for.
    pub ranges: Vec<usize>,
    /// Token without which nothing is given.
    token: Option<String>,
    /// Another host, which large files are sent from.
    elsewhere: Option<String>,
    /// Whether a request that this host was redirected to carried a token.
    token_went_elsewhere: bool,
}

pub struct Hub {
    pub state: Arc<Mutex<State>>,
    pub address: String,
    home: tempfile::TempDir,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let (mut range, mut token, mut host) = (None, None, String::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "host" => host = value.to_string(),
            "range" => range = Some(value.trim_start_matches("bytes=").to_string()),
            "authorization" => token = Some(value.trim_start_matches("Bearer ").to_string()),
            _ => {}
        }
    }
    let pause = state.lock().unwrap().pause;
    std::thread::sleep(pause);
    let mut state = state.lock().unwrap();
    let target = request.split(' ').nth(1).unwrap_or_default().to_string();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    state.asked.push(path.to_string());
    let mut send = |status: &str, headers: &str, body: &[u8], length: usize| {
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nX-Repo-Commit: {COMMIT}\r\n{headers}Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(if request.starts_with("HEAD") { &[] } else { body })
    };
    if state.elsewhere.as_ref() == Some(&host) {
        state.token_went_elsewhere |= token.is_some();
    } else if state.token.is_some() && state.token != token {
        return send("401 Unauthorized", "", b"{}", 2);
    }
    let mut link = String::new();
    let body = if path == format!("/api/models/owner/name/tree/{COMMIT}") {
        // Two files a page.
        let page: usize = query.strip_prefix("cursor=").map_or(0, |page| page.parse().unwrap());
        if 2 * page + 2 < state.files.len() {
            let next = format!("<http://{host}{path}?cursor={}>; rel=\"next\"", page + 1);
            link = format!("Link: {next}\r\n");
        }
        let entries = state.files.iter().skip(2 * page).take(2).map(|(path, bytes)| {
            let mut entry = json!({"type": "file", "oid": &sha256(bytes)[..40], "size": bytes.len(), "path": path});
            if path.ends_with(".safetensors") {
                let oid = state.claimed.clone().unwrap_or_else(|| sha256(bytes));
                entry["lfs"] = json!({"oid": oid, "size": bytes.len(), "pointerSize": 134});
            }
            entry
        });
        json!(entries.collect::<Vec<_>>()).to_string()
    } else if path.strip_prefix("/api/models/owner/name/revision/").is_some_and(|name| name != "nowhere") {
        json!({"id": "owner/name", "sha": COMMIT}).to_string()
    } else {
        let name = path.rsplit('/').next().unwrap_or_default();
        if let Some(elsewhere) = state.elsewhere.clone().filter(|to| *to != host && name.ends_with(".safetensors")) {
            let to = format!("X-Linked-Size: 1\r\nLocation: http://{elsewhere}/{name}?signed\r\n");
            return send("302 Found", &to, b"", 0);
        }
        let Some(bytes) = state.files.get(name).cloned() else {
            return send("404 Not Found", "X-Error-Code: EntryNotFound\r\n", b"", 0);
        };
        let Some((from, to)) = range.as_deref().and_then(|r| r.split_once('-')) else {
            return send("200 OK", "", &bytes, bytes.len());
        };
        let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
        if name.ends_with(".safetensors") {
            state.ranges.push(from);
        }
        let piece = &bytes[from..=to];
        let shown = if state.break_at == Some(from) { &piece[..piece.len() / 2] } else { piece };
        state.break_at = state.break_at.filter(|&at| at != from);
        let content = format!("Content-Range: bytes {from}-{to}/{}\r\n", bytes.len());
        return send("206 Partial Content", &content, shown, piece.len());
    };
    send("200 OK", &format!("{link}Content-Type: application/json\r\n"), body.as_bytes(), body.len())
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama")
}

/// The tiny model's weights with a tensor more, so that they take `padding` bytes more.
fn weights(padding: usize) -> Vec<u8> {
    let bytes = std::fs::read(goldens().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let filling: Vec<u8> = (0..padding).map(|i| (i * 31 % 251) as u8).collect();
    let view = TensorView::new(Dtype::U8, vec![padding], &filling).unwrap();
    let all = tensors.tensors().into_iter().chain([("padding".to_string(), view)]);
    safetensors::serialize(all, None).unwrap()
}

fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            std::thread::spawn(move || answer(stream, &state));
        }
    });
}

impl Hub {
    fn new(weights: Vec<u8>) -> Self {
        let mut files = BTreeMap::new();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            files.insert(name, std::fs::read(goldens().join(name)).unwrap());
        }
        files.insert("model.safetensors", weights);
        Self::with(files)
    }

    /// With these files in `owner/name`, at every revision but `nowhere`.
    pub fn with(files: BTreeMap<&'static str, Vec<u8>>) -> Self {
        let state = Arc::new(Mutex::new(State { files, ..Default::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        serve(listener, state.clone());
        Self { state, address, home: tempfile::tempdir().unwrap() }
    }

    /// Sends large files from another host from now on.
    fn redirect(&self) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        self.state.lock().unwrap().elsewhere = Some(listener.local_addr().unwrap().to_string());
        serve(listener, self.state.clone());
    }

    fn pull(&self, more: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorimer"));
        for name in [
            "HF_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "LORIMER_LOG",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        command.args(["pull", "owner/name", "--json", "-q"]).envs(more.iter().copied());
        command.env("HF_ENDPOINT", &self.address).env("HF_HOME", self.home.path()).output().unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("hub/models--owner--name")
    }
}

fn error(out: &Output) -> String {
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn ok(out: &Output) -> serde_json::Value {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let weights = weights(2 * PIECE);
    let hub = Hub::new(weights.clone());
    hub.state.lock().unwrap().break_at = Some(PIECE);
    assert!(error(&hub.pull(&[])).contains("owner/name"));
    let partial = hub.folder().join(format!("blobs/{}.incomplete", sha256(&weights)));
    assert_eq!(partial.metadata().unwrap().len(), PIECE as u64);
    assert!(!hub.folder().join("snapshots").exists());
    hub.state.lock().unwrap().ranges.clear();
    let pulled = ok(&hub.pull(&[]));
    assert_eq!(hub.state.lock().unwrap().ranges, [PIECE, 2 * PIECE]);
    // The layout that Python's huggingface_hub reads.
    let snapshot = hub.folder().join("snapshots").join(COMMIT);
    assert_eq!(pulled["path"].as_str().unwrap(), snapshot.display().to_string());
    assert_eq!(std::fs::read_to_string(hub.folder().join("refs/main")).unwrap(), COMMIT);
    assert!(std::fs::read(snapshot.join("model.safetensors")).unwrap() == weights);
    assert!(snapshot.join("model.safetensors").is_symlink() && snapshot.join("config.json").is_file());
    // What is there is not fetched again, and is found offline.
    hub.state.lock().unwrap().ranges.clear();
    assert_eq!(ok(&hub.pull(&[]))["path"], pulled["path"]);
    let offline = ok(&hub.pull(&[("HF_HUB_OFFLINE", "1")]));
    assert_eq!((&offline["source"], &offline["path"]), (&json!("cache"), &pulled["path"]));
    assert!(hub.state.lock().unwrap().ranges.is_empty());
}

#[test]
fn a_wrong_checksum_is_refused_and_the_file_removed() {
    let hub = Hub::new(weights(1));
    hub.state.lock().unwrap().claimed = Some("ab".repeat(32));
    let text = error(&hub.pull(&[]));
    assert!(text.contains("SHA-256 is"), "{text}");
    assert!(!hub.folder().join(format!("blobs/{}.incomplete", "ab".repeat(32))).exists());
    hub.state.lock().unwrap().claimed = None;
    ok(&hub.pull(&[]));
}

#[test]
fn a_token_opens_what_is_closed() {
    let hub = Hub::new(weights(1));
    hub.state.lock().unwrap().token = Some("secret".into());
    let text = error(&hub.pull(&[]));
    assert!(text.contains("HF_TOKEN") && !text.contains("secret"), "{text}");
    ok(&hub.pull(&[("HF_TOKEN", "secret")]));
}

#[test]
fn a_token_is_not_sent_to_the_host_that_has_the_large_files() {
    let weights = weights(PIECE);
    let hub = Hub::new(weights.clone());
    hub.redirect();
    hub.state.lock().unwrap().token = Some("secret".into());
    let pulled = ok(&hub.pull(&[("HF_TOKEN", "secret")]));
    assert!(std::fs::read(Path::new(pulled["path"].as_str().unwrap()).join("model.safetensors")).unwrap() == weights);
    let state = hub.state.lock().unwrap();
    assert_eq!((state.ranges.as_slice(), state.token_went_elsewhere), ([0, PIECE].as_slice(), false));
}

#[test]
fn two_processes_fetch_a_model_once() {
    let hub = Hub::new(weights(PIECE));
    std::thread::scope(|scope| {
        let both = [scope.spawn(|| hub.pull(&[])), scope.spawn(|| hub.pull(&[]))];
        for pull in both {
            ok(&pull.join().unwrap());
        }
    });
    assert_eq!(hub.state.lock().unwrap().ranges, [0, PIECE]);
}

#[test]
fn offline_without_a_copy_says_what_to_do() {
    let hub = Hub::new(weights(1));
    assert!(error(&hub.pull(&[("HF_HUB_OFFLINE", "1")])).contains("HF_HUB_OFFLINE"));
}

/// What a first build waits for: a crate that makes it much longer is seen here. ARCHITECTURE.md says where the minutes go.
#[test]
fn the_first_build_stays_light() {
    let lock = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock")).unwrap();
    let crates: Vec<&str> = lock.lines().filter_map(|l| l.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    for heavy in ["aws-lc-sys", "openssl-sys", "hf-hub", "hf-xet", "image"] {
        assert!(!crates.contains(&heavy), "{heavy} is back: see `cargo tree -i {heavy}`");
    }
    // The Python package's seven are built with the workspace, not with the program.
    assert!(crates.len() <= 467, "{} crates", crates.len());
}
