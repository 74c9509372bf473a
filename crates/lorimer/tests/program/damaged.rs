//! Damaged inputs: adapters, bases, GGUF files and rows of data are read as they are or refused in one sentence.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::common::{Fixture, goldens, lorimer, ok, text};

/// Whether a command refuses what it reads: in one sentence, soon, and without taking memory.
fn refused(arguments: &[&str], what: &str) -> bool {
    let mut command = lorimer(arguments);
    command.env("LORIMER_LOG", "off,lorimer=debug").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let id = child.id();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    let Ok(out) = receive.recv_timeout(Duration::from_secs(60)) else {
        let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
        panic!("{what}: hangs");
    };
    let out = out.unwrap();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    let peak = stderr.lines().find_map(|l| l.split("peak memory ").nth(1)?.split(' ').next()?.parse::<u64>().ok());
    assert!(peak.is_none_or(|p| p < 200 << 20), "{what}: {peak:?} bytes");
    match out.status.code() {
        Some(0) => false,
        Some(1) => {
            let sentence =
                stderr.lines().filter(|l| l.starts_with("error: ")).count() == 1 || stdout.contains("NOT ok");
            assert!(sentence, "{what}: {stderr}{stdout}");
            true
        }
        code => panic!("{what}: exit {code:?}: {stderr}"),
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten().filter(|e| e.path().is_file()) {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What became of damaged inputs.
struct Damaged {
    f: Fixture,
    /// A whole adapter.
    good: String,
    rng: ChaCha8Rng,
    refused: usize,
    /// Those that were read as they are.
    benign: Vec<String>,
}

impl Damaged {
    fn note(&mut self, what: String, arguments: &[&str]) {
        match refused(arguments, &what) {
            true => self.refused += 1,
            false => self.benign.push(what),
        }
    }

    /// `check` of the adapter with one file in another's place; it compares every byte of configuration and tensors with lorimer.json.
    fn check(&mut self, what: String, file: &str, bytes: &[u8]) {
        let work = self.f.folder.path().join("work");
        copy_folder(Path::new(&self.good), &work);
        std::fs::write(work.join(file), bytes).unwrap();
        let model = self.f.model.clone();
        self.note(what, &["check", &work.display().to_string(), "--model", &model]);
    }

    /// `eval` of the tiny base with one file in another's place.
    fn eval_base(&mut self, what: String, file: &str, bytes: &[u8]) {
        let model = self.f.folder.path().join("model");
        copy_folder(&goldens("tiny-llama"), &model);
        std::fs::write(model.join(file), bytes).unwrap();
        let data = self.f.data.clone();
        self.note(what, &["eval", "--model", &model.display().to_string(), "--data", &data]);
    }

    /// `eval` on a file of data.
    fn eval_data(&mut self, what: String, extension: &str, bytes: &[u8]) {
        let path = self.f.path(&format!("damaged.{extension}"));
        std::fs::write(&path, bytes).unwrap();
        let model = self.f.model.clone();
        self.note(what, &["eval", "--model", &model, "--data", &path]);
    }

    fn adapters_cut_and_with_bits_turned(&mut self) {
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let bytes = std::fs::read(Path::new(&self.good).join(file)).unwrap();
            for i in 0..70 {
                let mut damaged = bytes.clone();
                let what = if i < 30 {
                    damaged.truncate(self.rng.random_range(0..bytes.len()));
                    format!("{file} cut to {}", damaged.len())
                } else {
                    let (at, bit) = (self.rng.random_range(0..bytes.len().min(6000)), self.rng.random_range(0..8));
                    damaged[at] ^= 1 << bit;
                    format!("{file} with bit {bit} of byte {at} turned")
                };
                self.check(what, file, &damaged);
            }
        }
    }

    /// Absurd header lengths, shapes and names.
    fn adapters_with_absurd_headers(&mut self) {
        let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
        let tensors = [
            (u64::MAX).to_le_bytes().to_vec(),
            (1u64 << 40).to_le_bytes().to_vec(),
            header("{"),
            header("[]"),
            header(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#),
            header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#),
            header(r#"{"../../x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#),
            header(&format!(
                "{{\"{}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}}}",
                "n".repeat(100_000)
            )),
            header(&"[".repeat(50_000)),
        ];
        for (i, bytes) in tensors.iter().enumerate() {
            let work = self.f.folder.path().join("work");
            copy_folder(Path::new(&self.good), &work);
            std::fs::write(work.join("adapter_model.safetensors"), bytes).unwrap();
            self.note(format!("header {i}"), &["inspect", &work.display().to_string()]);
        }
    }

    fn adapters_with_absurd_settings(&mut self) {
        for (key, value) in [
            ("r", "-1"),
            ("r", "0"),
            ("r", "1e99"),
            ("r", "99999999999"),
            ("lora_alpha", "\"x\""),
            ("target_modules", "\"(((\""),
            ("target_modules", "\"(a{1000}){1000}\""),
            ("rank_pattern", "{\"q_proj\": 70000}"),
            ("peft_type", "\"../x\""),
            ("layer_replication", "[[0,9]]"),
        ] {
            let config = changed(Path::new(&self.good).join("adapter_config.json"), key, value);
            self.check(format!("{key} {value}"), "adapter_config.json", config.as_bytes());
        }
    }

    fn bases_cut(&mut self) {
        for file in ["model.safetensors", "config.json", "tokenizer.json"] {
            let bytes = std::fs::read(goldens("tiny-llama").join(file)).unwrap();
            for _ in 0..12 {
                let n = self.rng.random_range(0..bytes.len() - 4);
                self.eval_base(format!("base {file} cut to {n}"), file, &bytes[..n]);
            }
        }
    }

    fn bases_with_absurd_configurations(&mut self) {
        for (key, value) in [
            ("hidden_size", "1000000000"),
            ("num_hidden_layers", "1000000000"),
            ("num_hidden_layers", "3"),
            ("vocab_size", "4000000000"),
            ("head_dim", "7"),
            ("num_attention_heads", "3"),
            ("num_key_value_heads", "0"),
            ("model_type", "\"x\""),
            ("rms_norm_eps", "null"),
            ("hidden_act", "\"gelu\""),
            ("rope_parameters", "3"),
        ] {
            let config = changed(goldens("tiny-llama").join("config.json"), key, value);
            self.eval_base(format!("config {key} {value}"), "config.json", config.as_bytes());
        }
        let index = br#"{"weight_map": {"a": "../../secret.safetensors"}}"#;
        self.eval_base("index that leaves its folder".into(), "model.safetensors.index.json", index);
    }

    fn gguf_adapters(&mut self) {
        let (gguf, model) = (self.f.path("good.gguf"), self.f.model.clone());
        ok(&["convert", &self.good, "--to", "gguf", "--output", &gguf, "--model", &model]);
        let bytes = std::fs::read(&gguf).unwrap();
        for i in 0..36 {
            let mut damaged = bytes.clone();
            let what = if i < 18 {
                damaged.truncate(self.rng.random_range(0..bytes.len() - 64));
                format!("GGUF cut to {}", damaged.len())
            } else {
                // A huge length somewhere in the header.
                let at = self.rng.random_range(0..1500);
                damaged[at..at + 8].copy_from_slice(&(u64::MAX >> self.rng.random_range(0..30)).to_le_bytes());
                format!("GGUF with a huge number at {at}")
            };
            let (path, out) = (self.f.path("damaged.gguf"), self.f.path("never"));
            std::fs::write(&path, damaged).unwrap();
            self.note(what, &["convert", &path, "--to", "peft", "--output", &out, "--model", &model]);
            let _ = std::fs::remove_dir_all(&out);
        }
    }

    fn data(&mut self) {
        let rows = [
            "{",
            "[]",
            "3",
            "\u{feff}{}",
            "{\"messages\": {}}",
            "{\"messages\": [3]}",
            "{\"messages\": [{\"role\": 1}]}",
            "{\"messages\": []}",
            "{\"messages\": [{\"role\": \"user\", \"content\": 3}]}",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"only a question\"}]}",
            "{\"text\": null}",
            "{\"instruction\": \"x\"}",
            "{\"conversations\": [{\"from\": \"x\", \"value\": \"y\"}]}",
            "{\"prompt\": \"x\"}",
            "{\"nothing\": 1}",
            "",
        ];
        let deep = "[".repeat(100_000);
        for (i, row) in rows.iter().copied().chain([deep.as_str()]).enumerate() {
            for extension in ["jsonl", "json"] {
                self.eval_data(format!("data {i}.{extension}"), extension, row.as_bytes());
            }
        }
        for (extension, content) in [
            ("csv", &b"text\n\"open"[..]),
            ("csv", b"\xff\xfe"),
            ("parquet", b"PAR1junkPAR1"),
            ("parquet", b"PAR1\xff\xff\xff\x7fPAR1"),
            ("parquet", b""),
            ("exe", b"MZ"),
        ] {
            self.eval_data(format!("data {extension}"), extension, content);
        }
    }
}

/// A JSON file's text with one value in another's place.
fn changed(path: PathBuf, key: &str, value: &str) -> String {
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    config[key] = serde_json::from_str(value).unwrap();
    config.to_string()
}

#[test]
fn two_hundred_damaged_inputs_are_refused() {
    let f = Fixture::new();
    let good = f.path("good");
    ok(&f.train(&good, &["--max-steps", "4"]));
    let mut damaged = Damaged { f, good, rng: ChaCha8Rng::seed_from_u64(3), refused: 0, benign: Vec::new() };
    damaged.adapters_cut_and_with_bits_turned();
    damaged.adapters_with_absurd_headers();
    damaged.adapters_with_absurd_settings();
    damaged.bases_cut();
    damaged.bases_with_absurd_configurations();
    damaged.gguf_adapters();
    damaged.data();
    let Damaged { refused, benign, .. } = damaged;
    println!("{refused} of {} refused; read as they are: {benign:?}", refused + benign.len());
    assert!(refused >= 200, "{refused} were refused; read as they are: {benign:?}");
}
