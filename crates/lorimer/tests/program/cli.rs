//! The whole program, as a user types it, on a tiny model.

use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use rand::{Rng, SeedableRng};

use crate::common::{Fixture, error, goldens, json, lorimer, ok, run};

#[test]
fn train_eval_generate_inspect_check_merge_convert() {
    let f = Fixture::new();
    let out = f.path("run");
    let trained =
        json(&f.train(&out, &["--max-steps", "60", "--eval-data", &f.data, "--eval-steps", "20", "--keep-best"]));
    assert_eq!(trained["steps"], 60);
    let losses = trained["losses"].as_array().unwrap();
    assert!(losses[59].as_f64().unwrap() < 0.3 * losses[0].as_f64().unwrap(), "{losses:?}");
    for key in [
        "adapter",
        "examples",
        "tokens",
        "supervised_tokens",
        "seconds",
        "examples_per_second",
        "tokens_per_second",
        "peak_bytes",
        "trainable_parameters",
        "loss",
    ] {
        assert!(!trained[key].is_null(), "{key}");
    }
    for file in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "lorimer.json",
        "README.md",
        "log.jsonl",
        "loss.svg",
        "loss.png",
    ] {
        assert!(Path::new(&out).join(file).is_file(), "{file}");
    }
    let eval = |more: &[&str]| json(&[&["eval", "--model", &f.model, "--data", &f.data], more].concat());
    let (before, after) = (eval(&[]), eval(&["--adapter", &out]));
    assert!(after["loss"].as_f64().unwrap() < 0.5 * before["loss"].as_f64().unwrap());
    assert!(after["choice_accuracy"].as_f64().unwrap() > 0.9, "{after}");
    assert_eq!(after["choices"], serde_json::json!(["no", "yes"]));

    let answer = json(&["generate", "--model", &f.model, "--adapter", &out, "--prompt", "up 3", "--max-tokens", "8"]);
    assert_eq!(answer["text"], "yes");
    assert_eq!(answer["finish_reason"], "stop");
    let drawn = |seed: &str| {
        json(&[
            "generate",
            "--model",
            &f.model,
            "--prompt",
            "x",
            "--max-tokens",
            "12",
            "--temperature",
            "1.5",
            "--top-p",
            "0.9",
            "--seed",
            seed,
        ])["text"]
            .clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));

    let report = json(&["inspect", &out]);
    assert_eq!(
        (&report["method"], &report["rank"], &report["content_matches"]),
        (&"lora".into(), &8.into(), &true.into())
    );
    assert!(report["modules"][0]["effective_rank"].as_f64().unwrap() > 0.9);
    let check = json(&["check", &out, "--model", &f.model]);
    assert_eq!(check["ok"], true, "{check}");
    assert!(check["golden_difference"].as_f64().unwrap() < 1e-4);
    // On another base it does not replay, and says so with exit 1.
    let other = goldens("tiny-llama3").display().to_string();
    assert_eq!(run(&["check", &out, "--model", &other]).status.code(), Some(1));

    let merged = f.path("merged");
    let m = json(&["merge", "--model", &f.model, "--adapter", &out, "--output", &merged]);
    assert_eq!((m["dtype"].as_str(), m["error"].as_f64()), (Some("f32"), Some(0.0)));
    let again = json(&["eval", "--model", &merged, "--data", &f.data]);
    assert!((again["loss"].as_f64().unwrap() - after["loss"].as_f64().unwrap()).abs() < 1e-4);

    for (to, name) in [("gguf", "a.gguf"), ("kohya", "a.safetensors")] {
        let (there, back) = (f.path(name), f.path(&format!("back-{to}")));
        ok(&["convert", &out, "--to", to, "--output", &there, "--model", &f.model]);
        ok(&["convert", &there, "--to", "peft", "--output", &back, "--model", &f.model]);
        let same = eval(&["--adapter", &back]);
        assert!((same["loss"].as_f64().unwrap() - after["loss"].as_f64().unwrap()).abs() < 1e-4, "{to}");
    }
    let half = eval(&["--adapter", &format!("{out}=0.5"), "--adapter", &format!("{out}=0.5")]);
    assert!((half["loss"].as_f64().unwrap() - after["loss"].as_f64().unwrap()).abs() < 1e-4);
}

#[test]
fn a_configuration_file_works_and_flags_win() {
    let f = Fixture::new();
    let (config, out) = (f.path("run.yaml"), f.path("run"));
    std::fs::write(
        &config,
        format!(
            "model: {}\ndata: {}\nmax_steps: 9\nlora_r: 4\ntarget_modules: [q_proj, v_proj]\nmethod: dora\n",
            f.model, f.data
        ),
    )
    .unwrap();
    let trained = json(&["train", "--config", &config, "--max-steps", "3", "--output", &out]);
    assert_eq!(trained["steps"], 3);
    let report = json(&["inspect", &out]);
    assert_eq!(
        (&report["method"], &report["rank"], report["modules"].as_array().unwrap().len()),
        (&"dora".into(), &4.into(), 4)
    );
}

/// Files whose bytes do not depend on where the run was interrupted.
const EXACT: [&str; 4] = ["adapter_model.safetensors", "adapter_config.json", "lorimer.json", "log.jsonl"];

#[test]
fn killed_runs_resume_to_the_same_bytes() {
    resumes_exactly(
        "--max-steps 240 --save-steps 7 --dropout 0.2 --eval-data DATA --eval-steps 40 --keep-best --resume",
    );
}

#[test]
fn killed_runs_with_every_saving_on_resume_to_the_same_bytes() {
    // The head is large enough for moments of 8 bits.
    let savings = "--dtype nf4 --optimizer adamw-8bit --checkpointing on --layers 1 --rank 32 --frozen-cache disk --modules-to-save lm_head";
    resumes_exactly(&format!("--max-steps 240 --save-steps 7 --resume {savings}"));
}

/// Optimisers with state of their own, and callbacks that follow from seed and step.
#[test]
fn killed_runs_of_other_dynamics_resume_to_the_same_bytes() {
    for method in [
        "--method galore --rank 3 --set per_layer=true --set bits=8 --set update_proj_gap=5",
        "--method lora-pro --set variant=full --loraplus-lr-ratio 4",
        "--method dylora --rank 6",
        "--method sora --set stages=3 --set xi=0.02 --set xi_min=0.001",
        "--method sparse-gin --dropout 0.2",
        "--method loraprune --dropout 0.2 --set prune_every=5 --set protect=0",
    ] {
        resumes_exactly(&format!("--max-steps 60 --save-steps 7 --resume {method}"));
    }
}

fn resumes_exactly(flags: &str) {
    let f = Fixture::new();
    let flags = flags.replace("DATA", &f.data);
    let more: Vec<&str> = flags.split(' ').collect();
    let whole = f.path("whole");
    ok(&f.train(&whole, &more));
    let killed = f.path("killed");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    for _ in 0..5 {
        let mut child = lorimer(&f.train(&killed, &more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let wait = Duration::from_millis(rng.random_range(40..400));
        // Killed at a random moment, or already done.
        let (_keep, never) = mpsc::channel::<()>();
        let _ = never.recv_timeout(wait);
        let _ = child.kill();
        child.wait().unwrap();
        for entry in std::fs::read_dir(&killed).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("checkpoint-") {
                assert!(entry.path().join("manifest.json").is_file(), "a half checkpoint is visible");
            }
            if name.ends_with(".safetensors") && !name.starts_with('.') {
                lorimer::model::weights::SafetensorsFile::open(&entry.path()).unwrap();
            }
        }
    }
    ok(&f.train(&killed, &more));
    for file in EXACT {
        let read = |folder: &str| std::fs::read(Path::new(folder).join(file)).unwrap();
        assert!(read(&whole) == read(&killed), "{file} differs");
    }
}

#[test]
fn a_run_is_not_overwritten_or_resumed_with_other_settings() {
    let f = Fixture::new();
    let out = f.path("run");
    ok(&f.train(&out, &["--max-steps", "2"]));
    assert!(error(&f.train(&out, &["--max-steps", "2"])).contains("already holds a run"));
    ok(&f.train(&out, &["--max-steps", "2", "--overwrite"]));
}

/// A measurement and one of a peer, which here is the same program on fewer savings.
#[test]
fn bench_train_measures_itself_and_a_peer() {
    let f = Fixture::new();
    let ours = ["bench", "train", "--model", &f.model, "--steps", "3", "--rounds", "1", "--work"];
    let script = f.path("peer.sh");
    let binary = env!("CARGO_BIN_EXE_lorimer");
    let line = "bench train -q --once --no-share-prefixes --checkpointing on --model";
    let text = format!("exec {binary} {line} {} --work \"$1\" --steps \"$2\" --batch-size \"$3\"\n", f.model);
    std::fs::write(&script, text).unwrap();
    let found = json(&[&ours[..], &[&f.data, "--peer", &format!("sh {script}")]].concat());
    let (row, peer) = (&found["rows"][0], &found["peers"][0]);
    assert!(row["computed_tokens"].as_u64() < row["tokens"].as_u64(), "{row}");
    assert!(row["gflops"].as_f64().unwrap() > 0.0 && row["losses"].as_array().unwrap().len() == 3);
    assert!(peer["speed_ratio"].as_f64().unwrap() > 0.0);
    assert!(peer["largest_loss_difference"].as_f64().unwrap() < 1e-4, "{peer}");
    assert!(error(&[&ours[..], &[&f.data, "--peer", "false"]].concat()).contains("`false` failed"));
}

#[test]
fn help_is_as_documented() {
    insta::assert_snapshot!("help", ok(&["--help"]));
    insta::assert_snapshot!("help-train", ok(&["train", "--help"]));
    insta::assert_snapshot!("help-plan", ok(&["plan", "--help"]));
    insta::assert_snapshot!("help-compare", ok(&["compare", "--help"]));
    // Of the list of methods its head and first line, since it grows; its fields are an interface.
    let list = ok(&["methods"]);
    insta::assert_snapshot!("methods", list.lines().take(2).collect::<Vec<_>>().join("\n"));
    insta::assert_snapshot!("methods-json", serde_json::to_string_pretty(&json(&["methods"])[0]).unwrap());
}

#[test]
fn errors_are_one_clear_sentence() {
    let f = Fixture::new();
    let write = |name: &str, content: &str| {
        let path = f.path(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let bad_row = write("bad.jsonl", "{\"messages\": [{\"role\": \"user\"}]}\n");
    let keys = write("keys.jsonl", "{\"question\": \"a\"}\n");
    let with_data = |data: &str| error(&["train", "--model", &f.model, "--data", data, "--output", &f.path("x")]);
    let with = |more: &[&str]| error(&f.train(&f.path("x"), more));
    // The system's reason stands once.
    let missing = error(&["compare", &f.path("nothing.yaml")]);
    assert_eq!(missing.matches("os error").count(), 1, "{missing}");
    let messages = [
        error(&["pull", "no such model"]),
        error(&["pull", "owner/name"]),
        error(&["inspect", &f.path("nothing")]),
        with_data(&f.path("nothing.jsonl")),
        with_data(&bad_row),
        with_data(&keys),
        with(&["--rank", "0"]),
        with(&["--method", "lorra"]).split("hydra").next().unwrap().to_string(),
        with(&["--set", "lora_alfa=3"]),
        with(&["--target-modules", "qproj"]),
        with(&["--target-modules", ".*("]),
        with(&["--method", "dora", "--init", "pissa"]),
        error(&["generate", "--model", &f.model, "--prompt", "x", "--top-p", "7"]),
        error(&["check", &goldens("adapters/smollm2").display().to_string(), "--model", &f.model]),
    ];
    let folder = f.folder.path().display().to_string();
    let shown = messages
        .join("\n")
        .replace(&folder, "FOLDER")
        .replace(&lorimer::model::pull::hub_cache().display().to_string(), "CACHE");
    insta::assert_snapshot!("errors", shown);
}
