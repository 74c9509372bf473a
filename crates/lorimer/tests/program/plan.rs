//! Memory told before the run, against what the run takes.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

/// A Decoder of random weights, large enough for activations to outweigh the program, with the tokenizer of the tiny one.
fn model(folder: &Path) -> String {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny.join(file), folder.join(file)).unwrap();
    }
    let (h, f, v, layers) = (384, 1024, 4096, 8);
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": h, "intermediate_size": f,
        "vocab_size": v, "num_hidden_layers": layers, "num_attention_heads": 6, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize]| {
        let t = match shape.len() {
            1 => Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu),
            _ => Tensor::randn(0f32, 0.05, shape, &Device::Cpu),
        };
        tensors.insert(name, t.unwrap());
    };
    put("model.embed_tokens.weight".into(), &[v, h]);
    put("model.norm.weight".into(), &[h]);
    for i in 0..layers {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        for (name, out, inputs) in [
            ("self_attn.q_proj", h, h),
            ("self_attn.k_proj", h / 3, h),
            ("self_attn.v_proj", h / 3, h),
            ("self_attn.o_proj", h, h),
            ("mlp.gate_proj", f, h),
            ("mlp.up_proj", f, h),
            ("mlp.down_proj", h, f),
        ] {
            put(at(name), &[out, inputs]);
        }
        put(at("input_layernorm"), &[h]);
        put(at("post_attention_layernorm"), &[h]);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    folder.display().to_string()
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lorimer")).args(arguments).env("NO_COLOR", "1").output().unwrap()
}

fn json_of(arguments: &[&str]) -> Value {
    let out = run(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn the_plan_comes_within_a_tenth_and_its_proposals_fit() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    for flags in
        ["", "--dtype nf4 --checkpointing on --optimizer adamw-8bit --rank 64", "--target-modules q_proj,v_proj"]
    {
        let bench = ["bench", "train", "--once", "-q", "--steps", "3", "--work", "dense", "--model", &model];
        // Beside other work on the machine threads free each other's memory later, and the peak is some percent higher: of three
        // runs one has to be near.
        let near = (0..3).any(|_| {
            let found = json_of(&[&bench[..], &flags.split_whitespace().collect::<Vec<_>>()].concat());
            let (planned, measured) = (&found["planned_peak_bytes"], &found["peak_bytes"]);
            println!("{flags}: {planned} against {measured}");
            (0.9..1.1).contains(&(planned.as_f64().unwrap() / measured.as_f64().unwrap()))
        });
        assert!(near, "{flags}");
    }

    let plan = ["plan", "--json", "-q", "--model", &model, "--max-length", "256", "--batch-size", "16"];
    let free = json_of(&[&plan[..], &["--memory-limit", "100GB"]].concat());
    assert_eq!((&free["fits"], &free["checkpointing"]), (&json!(true), &json!(false)));
    assert!(free["seconds"].as_f64().unwrap() > 0.0);
    let parts: u64 = free["breakdown"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    let peak = free["peak_bytes"].as_u64().unwrap();
    assert!(parts <= peak && peak < parts * 11 / 10);

    // Passes over no data mean nothing.
    let told = run(&["plan", "--model", &model, "--epochs", "2"]);
    assert!(!told.status.success() && String::from_utf8_lossy(&told.stderr).contains("--data"), "{told:?}");

    // Less than that: layers are computed again. Less than that takes: what fits is proposed, and fits.
    let again = json_of(&[&plan[..], &["--checkpointing", "on"]].concat())["peak_bytes"].as_u64().unwrap();
    let between = ((peak + again) / 2).to_string();
    let between = json_of(&[&plan[..], &["--memory-limit", &between]].concat());
    assert_eq!((&between["fits"], &between["checkpointing"]), (&json!(true), &json!(true)));
    let limit = again * 8 / 10;
    let small = json_of(&[&plan[..], &["--memory-limit", &limit.to_string()]].concat());
    assert_eq!(small["fits"], false);
    let proposal = &small["proposals"][0];
    let pairs: Vec<&str> = proposal["flags"].as_str().unwrap().split(' ').collect();
    let mut flags: Vec<&str> =
        pairs.chunks(2).filter(|f| f[0] != "--gradient-accumulation").flatten().copied().collect();
    if !flags.contains(&"--batch-size") {
        flags.extend(["--batch-size", "16"]);
    }
    let again = json_of(&[&plan[..7], &flags, &["--memory-limit", &limit.to_string()]].concat());
    assert_eq!((&again["fits"], &again["peak_bytes"]), (&json!(true), &proposal["peak_bytes"]), "{flags:?}");
}

#[test]
fn a_run_that_would_not_fit_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let data = folder.path().join("rows.jsonl");
    let row = format!("{{\"text\": \"{}\"}}\n", "up down yes no ".repeat(60));
    std::fs::write(&data, row.repeat(16)).unwrap();
    let (data, output) = (data.display().to_string(), folder.path().join("out").display().to_string());
    let train =
        ["train", "--model", &model, "--data", &data, "--output", &output, "--no-share-prefixes", "--memory-limit"];
    let refused = |limit: &str| {
        let out = run(&[&train[..], &[limit]].concat());
        assert_eq!(out.status.code(), Some(1));
        String::from_utf8_lossy(&out.stderr).lines().find(|l| l.starts_with("error: ")).unwrap().to_string()
    };
    let advice = refused("170MB");
    assert!(advice.contains("--memory-limit allows: pass `--checkpointing on"), "{advice}");
    let hopeless = refused("20MB");
    assert!(hopeless.contains("even `") && hopeless.contains("smaller base"), "{hopeless}");
    assert!(!Path::new(&output).join("adapter_config.json").exists());
}
