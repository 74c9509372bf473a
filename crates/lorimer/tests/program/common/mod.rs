//! What the whole-program tests share. Each of them uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

pub fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

pub fn lorimer(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorimer"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env("NO_COLOR", "1")
        .env_remove("LORIMER_LOG")
        .env("HF_HUB_OFFLINE", "1");
    command
}

pub fn run(arguments: &[&str]) -> Output {
    lorimer(arguments).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn ok(arguments: &[&str]) -> String {
    let out = run(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

pub fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&ok(&[arguments, &["--json", "-q"]].concat())).unwrap()
}

pub fn error(arguments: &[&str]) -> String {
    let out = run(arguments);
    assert_eq!(out.status.code(), Some(1), "{arguments:?}: {}", text(&out.stderr));
    let line = text(&out.stderr).lines().find(|l| l.starts_with("error: ")).unwrap_or_default().to_string();
    assert!(!line.is_empty(), "{arguments:?}: {}", text(&out.stderr));
    line
}

/// A folder with a task that a tiny model learns, and a model to learn it.
pub struct Fixture {
    pub folder: tempfile::TempDir,
    pub model: String,
    pub data: String,
}

impl Fixture {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rows: String = (0..24)
            .map(|i| {
                let (question, answer) = if i % 2 == 0 { ("up", "yes") } else { ("down", "no") };
                format!(
                    "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{question} {}\"}}, {{\"role\": \"assistant\", \"content\": \"{answer}\"}}]}}\n",
                    i / 2
                )
            })
            .collect();
        let data = folder.path().join("data.jsonl");
        std::fs::write(&data, rows).unwrap();
        Self { model: goldens("tiny-llama").display().to_string(), data: data.display().to_string(), folder }
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub fn train<'a>(&'a self, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["train", "--model", &self.model, "--data", &self.data, "--output", output, "--lr", "1e-2"];
        all.extend_from_slice(more);
        all
    }
}
