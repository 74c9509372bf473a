//! What holds of any bytes that come from outside: nothing panics, hangs or allocates without bound, and what is refused is refused in a sentence.
//!
//! Each function is a fuzz target of its name (`cargo fuzz run http`, on nightly); `crates/lorimer/tests/hostile.rs` calls the same ones with
//! thousands of damaged inputs on stable.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, Uri, header};
use lorimer::adapter::algebra::combine::{Request as Combination, combine};
use lorimer::adapter::algebra::recover::recover;
use lorimer::adapter::file::inspect;
use lorimer::adapter::{self, methods, targets};
use lorimer::model::LoadDtype;
use lorimer::model::base::open_weights;
use lorimer::model::decoder::config::DecoderConfig;
use lorimer::model::embed::EmbedOptions;
use lorimer::model::text::chat::{ChatTemplate, MAX_TEXT};
use lorimer::model::weights::gguf::Gguf;
use lorimer::prelude::{Base, OpenOptions, StoredAdapter};
use lorimer::serve::http::{App, Keys, router};
use lorimer::serve::{EngineSettings, Store, StoreSettings, Worker};
use lorimer::train::data::{detect, read_rows, sample};
use serde_json::Value;
use tower::ServiceExt;

/// Longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn goldens(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = root.ancestors().find(|r| r.join("tests/goldens").is_dir()).expect("the repository");
    root.join("tests/goldens").join(name)
}

/// A refusal is one line, and not empty.
fn sentence(refusal: &str) {
    assert!(!refusal.trim().is_empty() && refusal.trim().lines().count() == 1, "{refusal:?}");
}

/// Any bytes as `adapter_model.safetensors`, beside a plain configuration.
pub fn adapter(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).expect("a file");
    std::fs::write(folder.path().join("adapter_model.safetensors"), bytes).expect("a file");
    match StoredAdapter::read(folder.path()) {
        Ok(stored) => _ = inspect::inspect(&stored),
        Err(error) => sentence(&error.to_string()),
    }
}

/// What reads adapters tensor by tensor: combined with itself by a rule that takes any LoRA, refused or written.
fn combined(folder: &Path) {
    let output = tempfile::tempdir().expect("a folder");
    let output = output.path().join("out");
    let adapters = [(folder.to_path_buf(), None), (folder.to_path_buf(), Some(-0.5))];
    for method in ["cat", "tensors"] {
        let request = Combination {
            adapters: &adapters,
            method,
            settings: &serde_json::Map::new(),
            output: &output,
            overwrite: true,
        };
        match combine(&request, |_, _, _| {}) {
            Ok(_) => assert!(output.join("adapter_config.json").is_file()),
            Err(error) => {
                sentence(&error.to_string());
                assert!(method == "tensors" || !output.exists());
            }
        }
    }
}

/// Any bytes as a file of an adapter's folder that is combined; the first byte chooses which, the others are a golden's.
pub fn combination(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(goldens("combine/plain").join(file), folder.path().join(file)).expect("a file");
    }
    let name = ["adapter_config.json", "adapter_model.safetensors", "lorimer.json"][usize::from(kind % 3)];
    std::fs::write(folder.path().join(name), content).expect("a file");
    combined(folder.path());
    // `lorimer.json` is read with every adapter, and held against its content.
    match StoredAdapter::read(folder.path()) {
        Ok(stored) => _ = inspect::inspect(&stored),
        Err(error) => sentence(&error.to_string()),
    }
}

/// Any bytes as `pruning.json`, as they are and with the id of their content, and an adapter that was trained on the pruned model of the goldens.
pub fn pruning(bytes: &[u8]) {
    let trained = goldens("pruning/small");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pruning.json");
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("a file");
        match adapter::Pruning::read(&path) {
            Ok(record) => {
                let output = folder.path().join("recovered");
                match recover(&trained, &record, true, &output) {
                    Ok(found) => {
                        assert!(found.parameters <= 64 * found.trained_parameters, "{} numbers", found.parameters);
                        std::fs::remove_dir_all(&output).expect("a folder");
                    }
                    Err(error) => {
                        assert!(!output.exists(), "a refused recovery left a folder");
                        sentence(&error.to_string());
                    }
                }
            }
            Err(error) => sentence(&error.to_string()),
        }
    };
    with(bytes);
    if let Ok(mut record) = serde_json::from_slice::<adapter::Pruning>(bytes) {
        record.id = record.own_id();
        with(&serde_json::to_vec(&record).expect("JSON"));
    }
}

/// Any bytes as the head or the configuration of an X-LoRA folder as its authors' code writes it; the first byte chooses which, and of which folder
/// the other file is.
pub fn xlora(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let whole = goldens("xlora").join(XLORA[usize::from(kind / 2) % XLORA.len()]);
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = match kind % 2 {
        0 => ("xlora_classifier.safetensors", "xlora_config.json"),
        _ => ("xlora_config.json", "xlora_classifier.safetensors"),
    };
    std::fs::write(folder.path().join(own), content).expect("a file");
    std::fs::copy(whole.join(other), folder.path().join(other)).expect("a file");
    for expert in ["chemistry", "biology", "arithmetic"] {
        std::fs::create_dir(folder.path().join(expert)).expect("a folder");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(whole.join(expert).join(file), folder.path().join(expert).join(file)).expect("a file");
        }
    }
    static BASE: OnceLock<Base> = OnceLock::new();
    let base = BASE.get_or_init(|| Base::open(&goldens("tiny-llama"), &OpenOptions::default()).expect("a base"));
    let read = StoredAdapter::read(folder.path());
    if let Err(error) = read.and_then(|stored| adapter::Adapter::load_whole(base.model(), &stored)) {
        sentence(&error.to_string());
    }
}

/// X-LoRA folders of the goldens.
pub const XLORA: [&str; 3] = ["authors", "authors_linear", "authors_default"];

/// Any bytes as a model's and an adapter's configuration.
pub fn config(bytes: &[u8]) {
    let Ok(json) = serde_json::from_slice::<Value>(bytes) else { return };
    match DecoderConfig::from_json(&json, "config.json".as_ref()) {
        Ok(config) => _ = config.frequencies(),
        Err(error) => sentence(&error.to_string()),
    }
    if let Value::Object(map) = &json {
        match methods::from_adapter_config(map) {
            Ok(method) => {
                let site = lorimer::model::Site::new("model.layers.3.self_attn.q_proj", (8, 8));
                _ = targets::Matcher::new(method.targeting(), [&site]);
            }
            Err(error) => sentence(&error.to_string()),
        }
    }
}

/// Any bytes as a data file; the first byte chooses its kind.
pub fn data(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(["a.jsonl", "a.json", "a.csv", "a.parquet"][usize::from(kind % 4)]);
    std::fs::write(&path, content).expect("a file");
    let Ok(rows) = read_rows(&path, Some(1000)) else { return };
    if let Ok(format) = detect(&path, &rows) {
        for row in rows.iter().filter_map(|r| r.value.as_ref().ok()) {
            let _ = sample(row, format);
        }
    }
}

/// Any bytes as a GGUF file: a base with its tokenizer, or an adapter of the tiny base.
pub fn gguf(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, bytes).expect("a file");
    match Base::open(&path, &OpenOptions::default()) {
        Ok(base) => _ = base.text.encode("some words, 12 of them", true),
        Err(error) => sentence(&error.to_string()),
    }
    if let Ok(file) = Gguf::open(&path) {
        // A file that is no base may still have a tokenizer.
        let _ = lorimer::model::TextModel::from_gguf(&file);
    }
    static CONFIG: OnceLock<DecoderConfig> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let path = goldens("tiny-llama/config.json");
        let json = serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON");
        DecoderConfig::from_json(&json, &path).expect("a configuration")
    });
    if let Err(error) = adapter::file::convert::read_gguf(&path, config) {
        sentence(&error.to_string());
    }
}

/// Packed checkpoints of the goldens.
pub const PACKED: [&str; 5] = ["lorimer-nf", "bnb-nf4-double", "bnb-fp4", "gptq-act-order-v2", "awq"];

/// Any bytes as a packed checkpoint's weights or configuration; the first byte chooses which, and of which checkpoint the other file is.
pub fn packed(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let whole = goldens("packed").join(PACKED[usize::from(kind / 2) % PACKED.len()]);
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = match kind % 2 {
        0 => ("model.safetensors", "config.json"),
        _ => ("config.json", "model.safetensors"),
    };
    std::fs::write(folder.path().join(own), content).expect("a file");
    std::fs::copy(whole.join(other), folder.path().join(other)).expect("a file");
    let opened = open_weights(folder.path(), LoadDtype::F32);
    match opened.and_then(|(config, weights)| {
        Ok((config.clone().load(&weights)?.bytes(), config.planned_bytes(&weights, LoadDtype::F32)?))
    }) {
        Ok((bytes, planned)) => assert!(planned <= bytes, "{planned} bytes planned for {bytes}"),
        Err(error) => sentence(&error.to_string()),
    }
}

/// Any bytes as a chat template and, after a zero, messages as JSON: an adapter's folder may bring the one, a request the other.
pub fn template(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (source, messages) = text.split_once('\0').unwrap_or((&text, ""));
    let plain =
        || serde_json::json!([{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": null }]);
    let messages = serde_json::from_str(messages).unwrap_or_else(|_| plain());
    let Value::Array(messages) = messages else { return };
    let begun = Instant::now();
    match ChatTemplate::new(source, "<s>", "</s>") {
        Ok(template) => match template.render(&messages, None, true) {
            Ok(text) => assert!(text.len() <= MAX_TEXT, "{} bytes of text", text.len()),
            Err(error) => sentence(&error.to_string()),
        },
        Err(error) => sentence(&error.to_string()),
    }
    assert!(begun.elapsed() < PATIENCE, "a template took {:?}", begun.elapsed());
}

/// A whole server of a tiny base with one adapter, without a network.
struct Server {
    app: Arc<App>,
    runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(base: &str, adapter: &str) -> Self {
        let base = Base::open(&goldens(base), &OpenOptions::default()).expect("a base");
        let positions = base.model().shape().max_positions;
        let embed = EmbedOptions::of_folder(&base.path, positions).expect("options of an encoder, if it is one");
        let folder = tempfile::tempdir().expect("a folder");
        let own = folder.path().join("a");
        std::fs::create_dir(&own).expect("a folder");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(goldens(adapter).join(file), own.join(file)).expect("a file");
        }
        let store = Store::open(StoreSettings::new(folder.path())).expect("a store");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let base = Arc::new(base);
        let worker = Worker::start(base.clone(), EngineSettings { pool_bytes: 4 << 20, ..Default::default() });
        let worker = worker.expect("an engine");
        let store = Some(Arc::new(store));
        let app = App::embedding((base, embed), "tiny".into(), store, worker, Keys::default(), true);
        Self { app, runtime, _folder: folder }
    }
}

/// Calls that take bodies.
pub const CALLS: [(&str, &str); 7] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("PUT", "/v1/adapters/b"),
    ("DELETE", "/v1/adapters/b"),
    ("POST", EMBEDDINGS),
];

/// The call that a server of an encoder answers.
const EMBEDDINGS: &str = "/v1/embeddings";

/// Any bytes as the body of a call; the first byte chooses which. Status and answer.
pub fn http(bytes: &[u8]) -> Option<(u16, String)> {
    static DECODER: OnceLock<Server> = OnceLock::new();
    static ENCODER: OnceLock<Server> = OnceLock::new();
    let (call, body) = bytes.split_first()?;
    let (method, path) = CALLS[usize::from(*call) % CALLS.len()];
    let server = match path {
        EMBEDDINGS => ENCODER.get_or_init(|| Server::start("tiny-bert", "family-adapters/bert")),
        _ => DECODER.get_or_init(|| Server::start("tiny-llama", "adapters/lora")),
    };
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).expect("a method"))
        .uri(Uri::from_static(path))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_vec()))
        .expect("a request");
    let answered = server.runtime.block_on(async {
        let answer = async {
            let Ok(answer) = router(server.app.clone()).oneshot(request).await;
            let status = answer.status().as_u16();
            let body = to_bytes(answer.into_body(), usize::MAX).await.expect("a whole body");
            (status, String::from_utf8(body.to_vec()).expect("UTF-8"))
        };
        tokio::time::timeout(PATIENCE, answer).await
    });
    let shown = || String::from_utf8_lossy(body).chars().take(500).collect::<String>();
    let (status, text) = answered.unwrap_or_else(|_| panic!("no answer to {path} {}", shown()));
    if status != 200 {
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        let error = &json["error"];
        assert!((400..500).contains(&status), "{path} {}: {status} {text}", shown());
        assert!(error["code"].is_string(), "{text}");
        sentence(error["message"].as_str().unwrap_or_default());
    }
    // An engine that had to be made anew has panicked.
    assert_eq!(server.app.worker.figures().restarts, 0, "{path} {}", shown());
    Some((status, text))
}
