//! `--attention-grad` through the command line.

use std::path::Path;

use lorimer::adapter::methods;
use lorimer::model::Base;
use lorimer::model::base::OpenOptions;
use lorimer::train::{Example, Session, TrainSettings};
use serde_json::Value;

use crate::common::{self, Fixture, error, goldens, json, ok};

const LOW_RANK: &str = "lowrank:degree=6,tolerance=0.5,tile=4,check_steps=2";

fn log(out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(out).join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn bytes(out: &str) -> Vec<u8> {
    std::fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap()
}

/// Rows of one letter, whose attention scores are small in the tiny model.
fn fixture() -> Fixture {
    let mut f = Fixture::new();
    let row = |i: usize| {
        serde_json::json!({ "text": if i.is_multiple_of(2) { "a" } else { "0" }.repeat(8 + i) }).to_string() + "\n"
    };
    f.data = f.path("letters.jsonl");
    std::fs::write(&f.data, (0..16).map(row).collect::<String>()).unwrap();
    f
}

/// A run tells what it did in its log and in lorimer.json; `exact` is the default to the bit and leaves no trace.
#[test]
fn a_run_is_recorded_beside_the_exact_one() {
    let f = fixture();
    let (out, plain, exact) = (f.path("run"), f.path("plain"), f.path("exact"));
    let said = common::run(&f.train(&out, &["--max-steps", "5", "--attention-grad", LOW_RANK]));
    let told = common::text(&said.stderr);
    assert!(said.status.success(), "{told}");
    assert_eq!(told.matches("low-rank attention gradients in").count(), 3, "{told}");
    let records = log(&out);
    let checked: Vec<bool> = records.iter().map(|r| r.get("low_rank_error").is_some()).collect();
    assert_eq!(checked, [true, false, true, false, true]);
    for record in &records {
        assert!(record["low_rank_heads"].as_f64().unwrap() > 0.0 && record["low_rank_score"].as_f64().unwrap() > 0.0);
        assert!(record.get("low_rank_bound").is_none_or(|bound| bound.as_f64().unwrap() <= 1.0), "{record}");
    }
    let read = |out: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(Path::new(out).join("lorimer.json")).unwrap()).unwrap()
    };
    assert_eq!(read(&out)["training"]["settings"]["attention_gradient"]["lowrank"]["degree"], 6);
    for (folder, more) in [(&plain, &[][..]), (&exact, &["--attention-grad", "exact"][..])] {
        ok(&f.train(folder, &[&["--max-steps", "5"], more].concat()));
    }
    assert_eq!((bytes(&plain), read(&plain)), (bytes(&exact), read(&exact)));
    assert!(read(&plain)["training"]["settings"].get("attention_gradient").is_none());
    assert!(log(&plain).iter().all(|r| r.get("low_rank_heads").is_none()));
    assert_ne!(bytes(&plain), bytes(&out));
}

/// A run that is stopped between two checks goes on to the bytes and the log of one that is not; with another degree it does not go on.
#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes_and_log() {
    let base = Base::open(&goldens("tiny-llama"), &OpenOptions::default()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let row = |n: u32| Example { tokens: (3..n).collect(), supervised: vec![true; n as usize - 3], answer: None };
    let data = [row(30), row(17), row(24), row(9)];
    let run = |folder: &str, how: &str, stop_at: Option<usize>, resume: bool| {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let session = Session {
            base: &base,
            base_name: "tiny",
            train: &data,
            eval: &[],
            settings: TrainSettings {
                max_steps: Some(6),
                batch_size: 2,
                learning_rate: 1e-2,
                attention_gradient: how.parse().unwrap(),
                ..Default::default()
            },
            start: None,
            output: out.path().join(folder),
            save_steps: None,
            save_limit: 1,
            resume,
            overwrite: false,
            data_names: vec![],
            stop: &stop,
        };
        let method = methods::build("lora", &Default::default()).unwrap();
        let found = session.run(method, |event| {
            if let lorimer::train::Event::Step { record, .. } = event {
                stop.store(Some(record.step) == stop_at, std::sync::atomic::Ordering::Relaxed);
            }
        });
        found.map(|(outcome, _)| outcome.interrupted).map_err(|e| e.to_string())
    };
    assert_eq!(run("whole", LOW_RANK, None, false), Ok(false));
    assert_eq!(run("parts", LOW_RANK, Some(2), false), Ok(true));
    let other = run("parts", "lowrank:degree=5", None, true).unwrap_err();
    assert!(other.contains("begun with other settings"), "{other}");
    assert_eq!(run("parts", LOW_RANK, None, true), Ok(false));
    let at = |folder: &str| out.path().join(folder).display().to_string();
    assert_eq!(bytes(&at("whole")), bytes(&at("parts")));
    assert_eq!(log(&at("whole")), log(&at("parts")));
}

#[test]
fn what_has_no_low_rank_gradient_is_refused_and_nothing_is_written() {
    let f = fixture();
    let out = f.path("refused");
    let model = |name: &str| goldens(name).display().to_string();
    let (gemma2, gemma3) = (model("tiny-gemma2"), model("tiny-gemma3"));
    let train = |model: &str, how: &str| {
        let flags = ["train", "--model", model, "--data", &f.data, "--output", &out, "--max-steps", "2"];
        error(&[&flags[..], &["--attention-grad", how]].concat())
    };
    for (said, says) in [
        (train(&gemma2, LOW_RANK), "sliding window"),
        (train(&gemma3, LOW_RANK), "sliding window"),
        (train(&f.model, "lowrank:degree=30"), "smaller degree"),
        (train(&f.model, "lowrank:tile=512"), "more than a tile of 512"),
        (train(&f.model, "lowrank:degree=0,tolerance=1e-9,tile=4"), "raise degree or tolerance"),
    ] {
        assert!(said.contains(says) && said.contains("--attention-grad"), "{said}");
    }
    assert!(!Path::new(&out).join("log.jsonl").exists() && !Path::new(&out).join("adapter_config.json").exists());
    // What cannot be read is the flag's own error.
    for how in ["chained", "lowrank:rank=3", "lowrank:tolerance=2", "exact:degree=2"] {
        let found = common::run(&f.train(&out, &["--attention-grad", how]));
        assert_eq!(found.status.code(), Some(2), "{how}: {}", common::text(&found.stderr));
    }
    // The plan knows of the sums, and refuses the same models.
    let plan = |how: &str| {
        let found = json(&["plan", "--model", &f.model, "--data", &f.data, "--attention-grad", how]);
        found["breakdown"]["backward"].as_u64().unwrap()
    };
    assert!(plan("lowrank:degree=6") > plan("exact") + 3003 * 81 * 4);
    assert!(error(&["plan", "--model", &gemma2, "--attention-grad", "lowrank"]).contains("sliding window"));
}
