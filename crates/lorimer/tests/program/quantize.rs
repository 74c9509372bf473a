//! `lorimer quantize` and packed checkpoints, as a user sees them.

use std::path::Path;

use lorimer::model::LoadDtype;
use lorimer::model::base::open_weights;
use lorimer::prelude::*;

use crate::common::{Fixture, error, goldens, json, ok, run, text};

fn tensors(folder: &str) -> std::collections::BTreeMap<String, candle_core::Tensor> {
    StoredAdapter::read(Path::new(folder)).unwrap().tensors
}

/// Bits within the budget, bytes as said, the same from packed and from expanded weights, and an adapter that is the repair and trains on.
#[test]
fn a_budget_gives_a_base_with_its_repair() {
    let f = Fixture::new();
    let (out, whole) = (f.path("lq"), f.path("dense"));
    let lq = ["quantize", "--model", &f.model, "--bits", "2.75", "--rank", "4", "--output", &out];
    let report = json(&[&lq[..], &["--export-dense", &whole]].concat());
    assert!(report["bits"].as_f64().unwrap() <= 2.75, "{report}");
    assert!(report["bound"].as_f64().unwrap() <= report["error"].as_f64().unwrap() * (1.0 + 1e-9));
    assert!(!Path::new(&format!("{out}.partial")).exists());
    let modules = report["modules"].as_array().unwrap();
    assert_eq!(modules.len(), 14);
    let (_, weights) = open_weights(Path::new(&out), LoadDtype::F32).unwrap();
    let (_, base) = open_weights(Path::new(&f.model), LoadDtype::F32).unwrap();
    let adapter = tensors(&format!("{out}/adapter"));
    for m in modules {
        let module = m["module"].as_str().unwrap();
        let name = format!("{module}.weight");
        let shape = (m["shape"][0].as_u64().unwrap() as usize, m["shape"][1].as_u64().unwrap() as usize);
        let weight = weights.weight(&name, shape).unwrap();
        let parts =
            [&name, &format!("{name}.absmax"), &format!("{name}.nested_absmax"), &format!("{name}.nested_offset")];
        let on_disk: usize = parts.iter().map(|part| weights.raw(part).unwrap().unwrap().2.len()).sum();
        assert_eq!((on_disk, weight.bytes()), (m["bytes"].as_u64().unwrap() as usize, on_disk));
        let q = weight.dense(candle_core::DType::F32).unwrap();
        let w = base.weight(&name, shape).unwrap().dense(candle_core::DType::F32).unwrap();
        let factor = |key: &str| &adapter[&format!("base_model.model.{module}.{key}.weight")];
        let change = (factor("lora_B").matmul(factor("lora_A")).unwrap() * (16.0 / 4.0)).unwrap();
        let norm = |t: &candle_core::Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let error = norm(&(&w - &q).unwrap().sub(&change).unwrap()) / norm(&w);
        assert!((f64::from(error) - m["error"].as_f64().unwrap()).abs() < 1e-5, "{module}: {error} for {m}");
        assert!(m["error"].as_f64().unwrap() < m["plain"].as_f64().unwrap());
    }
    let own = format!("{out}/adapter");
    let loss = |model: &str, more: &[&str]| {
        json(&[&["eval", "--model", model, "--data", &f.data], more].concat())["loss"].as_f64().unwrap()
    };
    let (packed, expanded) = (loss(&out, &["--adapter", &own]), loss(&whole, &["--adapter", &own]));
    assert!((packed - expanded).abs() < 1e-5, "{packed} {expanded}");
    assert!(json(&["check", &own, "--model", &out])["ok"] == true);
    // It trains from there, with the adapter's own settings, and goes on after an interruption as after none.
    let (tuned, again) = (f.path("tuned"), f.path("again"));
    let train = |output: &str, more: &[&str]| {
        let all = ["train", "--model", &out, "--data", &f.data, "--adapter", &own, "--lr", "5e-3", "--max-steps", "12"];
        ok(&[&all[..], &["--output", output], more].concat());
    };
    train(&tuned, &[]);
    assert!(loss(&out, &["--adapter", &tuned]) < packed - 0.1);
    assert_eq!(StoredAdapter::read(Path::new(&tuned)).unwrap().config["r"], 4);
    train(&again, &["--save-steps", "4"]);
    let bytes = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(bytes(&tuned) == bytes(&again));
    let answer = json(&["generate", "--model", &out, "--adapter", &tuned, "--prompt", "up 3", "--max-tokens", "4"]);
    assert!(answer["text"].is_string());
    assert!(json(&["plan", "--model", &out, "--data", &f.data])["fits"] == true);
    // Merging expands what is packed.
    let merged = f.path("merged");
    ok(&["merge", "--model", &out, "--adapter", &tuned, "--output", &merged]);
    assert!((loss(&merged, &[]) - loss(&out, &["--adapter", &tuned])).abs() < 1e-4);
    assert!(!std::fs::read_to_string(format!("{merged}/config.json")).unwrap().contains("quantization_config"));
}

/// The same output from a run that was broken off, and none of it where something else was begun there.
#[test]
fn a_broken_run_goes_on() {
    let f = Fixture::new();
    let (a, b) = (f.path("a"), f.path("b"));
    let fisher = ["--fisher", f.data.as_str(), "--samples", "6"];
    let lq = |output: &str, more: &[&str]| -> std::process::Output {
        let all = ["quantize", "--model", &f.model, "--bits", "3", "--rank", "2", "--output", output];
        run(&[&all[..], &fisher, more].concat())
    };
    assert!(lq(&a, &[]).status.success());
    // What a kill leaves: the folder beside, with some of the results.
    assert!(lq(&b, &[]).status.success());
    std::fs::remove_dir_all(&b).unwrap();
    let partial = Path::new(&f.path("b.partial")).to_path_buf();
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("identity.json"), "\"other\"").unwrap();
    let told = lq(&b, &[]);
    assert!(!told.status.success() && text(&told.stderr).contains("remove it or choose another --output"));
    std::fs::remove_dir_all(&partial).unwrap();
    let mut child = crate::common::lorimer(&[
        "quantize", "--model", &f.model, "--bits", "3", "--rank", "2", "--output", &b, fisher[0], fisher[1], fisher[2],
        fisher[3],
    ])
    .stderr(std::process::Stdio::null())
    .stdout(std::process::Stdio::null())
    .spawn()
    .unwrap();
    while !partial.join("matrices/2.json").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let _ = child.kill();
    let _ = child.wait();
    if !Path::new(&b).exists() {
        assert!(lq(&b, &[]).status.success());
    }
    let bytes = |folder: &str, file: &str| std::fs::read(Path::new(folder).join(file)).unwrap();
    assert!(bytes(&a, "model.safetensors") == bytes(&b, "model.safetensors"));
    assert!(bytes(&a, "adapter/adapter_model.safetensors") == bytes(&b, "adapter/adapter_model.safetensors"));
}

/// One configuration for all: LoftQ, plain NormalFloat, and bitsandbytes' form, whose numbers are those of `--dtype nf4`.
#[test]
fn one_configuration_for_all() {
    let f = Fixture::new();
    let loss = |more: &[&str]| json(&[&["eval", "--data", &f.data], more].concat())["loss"].as_f64().unwrap();
    let (loftq, nf3, bnb) = (f.path("loftq"), f.path("nf3"), f.path("bnb"));
    let quantize =
        |output: &str, more: &[&str]| json(&[&["quantize", "--model", &f.model, "--output", output], more].concat());
    let told = quantize(&loftq, &["--method", "loftq", "--bits", "3", "--rank", "8"]);
    let plain = quantize(&nf3, &["--method", "nf", "--bits", "3"]);
    assert!(told["error"].as_f64().unwrap() < plain["error"].as_f64().unwrap() / 2.0);
    assert!(!Path::new(&nf3).join("adapter").exists() && told["bound"].is_null());
    assert_eq!(told["bytes"], plain["bytes"]);
    quantize(&bnb, &["--method", "nf", "--bits", "4", "--format", "bitsandbytes"]);
    let packed = loss(&["--model", &bnb]);
    assert!((packed - loss(&["--model", &f.model, "--dtype", "nf4"])).abs() < 1e-6);
    for model in [&bnb, &nf3] {
        let told = error(&["eval", "--model", model, "--data", &f.data, "--dtype", "nf4"]);
        assert!(told.contains("packed already") && told.contains("leave --dtype out"), "{told}");
        let out = f.path("twice");
        let told = error(&["quantize", "--model", model, "--output", &out]);
        assert!(told.contains("is packed already") && !Path::new(&out).exists(), "{told}");
    }
}

/// A sentence, and nothing written.
#[test]
fn what_cannot_be_quantised_is_refused() {
    let f = Fixture::new();
    let (out, taken) = (f.path("out"), f.path("taken"));
    std::fs::create_dir(&taken).unwrap();
    let before = std::fs::read_dir(f.folder.path()).unwrap().count();
    for (more, word) in [
        (&["--bits", "0"][..], "--bits"),
        (&["--bits", "NaN"], "--bits"),
        (&["--bits", "1.5"], "raise --bits"),
        (&["--bits", "2.5", "--method", "loftq"], "2, 3, 4 or 8"),
        (&["--method", "nf", "--bits", "3", "--rank", "4"], "leave --rank out"),
        (&["--rank", "0"], "--rank"),
        (&["--rank", "17"], "rank 17 is more than"),
        (&["--alpha", "inf"], "--alpha"),
        (&["--steps", "0"], "--steps"),
        (&["--format", "bitsandbytes"], "--method nf --bits 4"),
        (&["--method", "loftq", "--grid", "paper"], "--grid"),
        (&["--samples", "4"], "--samples"),
        (&["--max-length", "64"], "--max-length"),
        (&["--data-format", "text"], "--data-format"),
        (&["--fisher", "nowhere.jsonl"], "nowhere.jsonl"),
        (&["--output", taken.as_str()], "exists"),
        (&["--output", f.model.as_str()], "the base itself"),
        (&["--export-dense", taken.as_str()], "--export-dense"),
    ] {
        let all = [&["quantize", "--model", f.model.as_str(), "--output", &out, "--rank", "2"][..], more].concat();
        let told = error(&all);
        assert!(told.contains(word), "{more:?}: {told}");
        assert_eq!(std::fs::read_dir(f.folder.path()).unwrap().count(), before, "{more:?}");
    }
    let told =
        error(&["quantize", "--model", &goldens("tiny-bert").display().to_string(), "--output", &out, "--rank", "2"]);
    assert!(told.contains("encoder"), "{told}");
    // Flags beside an adapter that brings its own.
    let own = goldens("adapters/lora").display().to_string();
    for (more, word) in [
        (&["--rank", "3"][..], "leave --rank out"),
        (&["--method", "dora"], "pass --method lora"),
        (&["--adapter", own.as_str()], "begins from one adapter"),
    ] {
        let told = error(&f.train(&out, &[&["--adapter", own.as_str()], more].concat()));
        assert!(told.contains(word) && !Path::new(&out).exists(), "{told}");
    }
}

/// Checkpoints of other tools train and serve where they lie packed.
#[test]
fn packed_checkpoints_are_bases() {
    let f = Fixture::new();
    for name in ["bnb-nf4-double", "gptq-act-order-v2", "awq"] {
        let model = f.path(name);
        std::fs::create_dir(&model).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(goldens(&format!("packed/{name}")).join(file), Path::new(&model).join(file)).unwrap();
        }
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            std::fs::copy(goldens("tiny-llama").join(file), Path::new(&model).join(file)).unwrap();
        }
        let loss = |more: &[&str]| {
            json(&[&["eval", "--model", &model, "--data", &f.data], more].concat())["loss"].as_f64().unwrap()
        };
        let out = f.path(&format!("{name}.adapter"));
        let train =
            ["train", "--model", &model, "--data", &f.data, "--output", &out, "--lr", "1e-2", "--max-steps", "15"];
        ok(&train);
        assert!(loss(&["--adapter", &out]) < loss(&[]) - 0.05, "{name}");
        let merged = f.path(&format!("{name}.merged"));
        ok(&["merge", "--model", &model, "--adapter", &out, "--output", &merged]);
        let own = json(&["eval", "--model", &merged, "--data", &f.data])["loss"].as_f64().unwrap();
        assert!((own - loss(&["--adapter", &out])).abs() < 1e-4, "{name}");
    }
}

/// Other packings, and other kinds of these, are refused by name.
#[test]
fn packings_that_are_not_read_are_refused_by_name() {
    let f = Fixture::new();
    let refused = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let model = f.path("refused");
        std::fs::create_dir_all(&model).unwrap();
        let from = goldens(&format!("packed/{name}"));
        std::fs::copy(from.join("model.safetensors"), Path::new(&model).join("model.safetensors")).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        change(&mut config["quantization_config"]);
        std::fs::write(Path::new(&model).join("config.json"), config.to_string()).unwrap();
        error(&["plan", "--model", &model, "--data", &f.data])
    };
    for (name, key, value, word) in [
        ("gptq", "bits", 8.into(), "8 bits"),
        ("gptq", "bits", 3.into(), "3 bits"),
        ("gptq", "checkpoint_format", "marlin".into(), "marlin"),
        ("gptq", "is_marlin_format", true.into(), "Marlin"),
        ("gptq", "dynamic", serde_json::json!({ "x": {} }), "dynamic"),
        ("gptq", "group_size", 0.into(), "group_size"),
        ("gptq", "group_size", 32.into(), "shape"),
        ("awq", "version", "gemv".into(), "gemv"),
        ("awq", "zero_point", false.into(), "zero points"),
        ("awq", "bits", 3.into(), "3 bits"),
        ("awq", "quant_method", "fp8".into(), "`fp8`"),
        ("awq", "quant_method", "gptq".into(), "tensor `"),
        ("awq", "quant_method", "bitsandbytes".into(), "no tensor is packed so"),
        ("bnb-nf4", "load_in_8bit", true.into(), "8 bits"),
        ("bnb-nf4", "quant_method", "lorimer-nf".into(), "lorimer-nf"),
    ] {
        let told = refused(name, &|config| config[key] = value.clone());
        assert!(told.contains(word), "{name} {key}: {told}");
    }
}
