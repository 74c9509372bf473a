//! Steps, starts, searches and rows against PEFT, torch and pyarrow.

use std::path::Path;

use candle_core::DType;
use lorimer_adapter::training::{AdamWConfig, Optimizer};
use lorimer_model::weights::SafetensorsFile;
use lorimer_train::calibrate::{Data, calibrate};
use serde_json::Value;

use crate::prelude::*;
use crate::support::*;

fn rows(golden: &Golden) -> Vec<Example> {
    let row = |tokens: Vec<u32>| Example { supervised: vec![true; tokens.len()], tokens, answer: None };
    golden.tokens().into_iter().map(row).collect()
}

/// Ten steps of LoRA+ as PEFT groups parameters: B and vectors at the higher rate.
#[test]
fn ten_steps_of_lora_plus_equal_peft() {
    use lorimer_train::run::schedule::Shape;
    use lorimer_train::run::trainer::{Run, TrainSettings};
    let model = tiny("tiny-llama3");
    let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&folder("loraplus")).unwrap()).unwrap();
    let golden = Golden::open("loraplus");
    let (train, text) = (rows(&golden), TextModel::from_folder(&folder("tiny-llama")).unwrap());
    let settings = TrainSettings {
        learning_rate: 2e-3,
        loraplus_lr_ratio: Some(8.0),
        max_steps: Some(10),
        batch_size: 3,
        schedule: Shape::Constant,
        max_grad_norm: 0.0,
        shuffle: false,
        adamw: AdamWConfig { weight_decay: 0.0, ..Default::default() },
        ..Default::default()
    };
    let (out, stop) = (tempfile::tempdir().unwrap(), Default::default());
    let run = Run {
        model: &model,
        text: &text,
        base_name: "tiny-llama3",
        adapter: &adapter,
        beneath: &[],
        train: &train,
        eval: &[],
        choices: &[],
        settings: &settings,
        identity: Value::Null,
        folder: out.path(),
        save_steps: None,
        save_limit: 1,
        resume: false,
        stop: &stop,
    };
    let outcome = run.train(|_| {}).unwrap();
    for (step, (found, expected)) in
        outcome.losses.iter().zip(golden.get("losses").to_vec1::<f32>().unwrap()).enumerate()
    {
        let d = (found - f64::from(expected)).abs();
        assert!(d < 1e-4, "the loss of step {step} differs by {d:e}");
    }
    assert_eq!(outcome.losses.len(), 10);
    let d = distance(&logits(&model, &Attached::one(&adapter), &golden.tokens()), &golden.get("trained_logits"));
    assert!(d < 5e-3, "trained logits differ by {d:e}");
}

/// EVA finds the ranks and directions that PEFT finds in the same batches.
#[test]
fn evas_start_equals_pefts() {
    let model = tiny("tiny-llama");
    let stored = StoredAdapter::read(&folder("adapters/eva")).unwrap();
    let golden = Golden::open("adapters/eva");
    let supervised = |tokens: &[u32]| (0..tokens.len()).map(|i| i >= 9).collect();
    let rows: Vec<Example> =
        golden.tokens().into_iter().map(|t| Example { supervised: supervised(&t), tokens: t, answer: None }).collect();
    let settings = serde_json::json!({ "r": 3, "lora_alpha": 6, "tau": 0.9, "batch_size": 6 });
    let method = methods::build("eva", settings.as_object().unwrap()).unwrap();
    let data = Data { rows: rows.iter().collect(), base: String::new(), cache: None };
    let stats = calibrate(&model, method.as_ref(), &data, |_, _| {}).unwrap();
    let adapter = Adapter::attach_calibrated(&model, method, &stats, 0).unwrap();
    let ours = adapter.to_stored("tiny-llama").unwrap();
    assert_eq!(ours.tensors.keys().collect::<Vec<_>>(), stored.tensors.keys().collect::<Vec<_>>());
    for (key, expected) in stored.tensors.iter().filter(|(k, _)| k.contains("lora_A")) {
        let found = &ours.tensors[key];
        assert_eq!(found.dims(), expected.dims(), "{key}");
        // Each of PEFT's directions lies in the span of ours.
        let inside =
            expected.matmul(&found.t().unwrap()).unwrap().sqr().unwrap().sum(1).unwrap().to_vec1::<f32>().unwrap();
        assert!(inside.iter().all(|c| *c > 0.98), "{key}: {inside:?}");
    }
    let number = |stored: &StoredAdapter, name: &str| -> std::collections::BTreeMap<String, f64> {
        let map = stored.config[name].as_object().unwrap();
        map.iter().map(|(k, v)| (k.clone(), v.as_f64().unwrap())).collect()
    };
    for name in ["rank_pattern", "alpha_pattern"] {
        assert_eq!(number(&ours, name), number(&stored, name));
    }
}

/// Rows that pyarrow wrote are the rows of the JSONL file.
#[test]
fn parquet_and_jsonl_hold_the_same_rows() {
    use lorimer_train::data::read_rows;
    let parquet = read_rows(&folder("rows.parquet"), None).unwrap();
    let jsonl = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/sentiment-movies.valid.jsonl");
    let jsonl = read_rows(&jsonl, Some(20)).unwrap();
    assert_eq!((parquet.len(), jsonl.len()), (20, 20));
    for (a, b) in parquet.iter().zip(&jsonl) {
        assert_eq!(a.value.as_ref().unwrap(), b.value.as_ref().unwrap());
    }
}

/// Twenty steps of galore-torch, with its space renewed on the way, on each side that it projects on.
#[test]
fn twenty_steps_equal_galore_torch() {
    use lorimer_adapter::methods::galore::{Galore, GaloreOptimizer, GaloreProjection};
    let file = SafetensorsFile::open(&folder("galore.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    let (x, target) = (get("x"), get("target"));
    for (kind, proj_type) in [
        ("std", GaloreProjection::Std),
        ("reverse_std", GaloreProjection::ReverseStd),
        ("left", GaloreProjection::Left),
        ("right", GaloreProjection::Right),
    ] {
        let weights = ["w0", "w1"].map(|name| candle_core::Var::from_tensor(&get(name)).unwrap());
        let parameters = [("w0".to_string(), &weights[0]), ("w1".to_string(), &weights[1])];
        let settings = Galore { rank: 4, update_proj_gap: 6, scale: 0.5, proj_type, ..Default::default() };
        let mut optimizer = GaloreOptimizer::new(settings, AdamWConfig { weight_decay: 0.01, ..Default::default() });
        for (step, expected) in get(&format!("{kind}.losses")).to_vec1::<f32>().unwrap().into_iter().enumerate() {
            let hidden = x.matmul(&weights[0].t().unwrap()).unwrap().tanh().unwrap();
            let y = hidden.matmul(&weights[1].t().unwrap()).unwrap();
            let loss = (y - &target).unwrap().sqr().unwrap().mean_all().unwrap();
            let grads = loss.backward().unwrap();
            let gradients: Vec<_> = weights.iter().map(|w| grads.get(w.as_tensor()).cloned()).collect();
            optimizer.step(&parameters, &gradients, 1e-2).unwrap();
            let d = f64::from(loss.to_scalar::<f32>().unwrap() - expected).abs();
            assert!(d < 1e-4, "{kind}: the loss of step {step} differs by {d:e}");
        }
        for (name, var) in &parameters {
            let d = distance(var.as_tensor(), &get(&format!("{kind}.{name}")));
            assert!(d < 1e-4, "{kind}: {name} differs by {d:e}");
        }
    }
}

/// DiffoRA's gates after a search, from its equations in torch (see tests/goldens/make_diffora.py).
#[test]
fn difforas_search_equals_torchs() {
    use lorimer_adapter::methods::diffora::{DifforaConfig, Gate, Sharing};
    use lorimer_train::calibrate::search::SearchRows;
    let model = tiny("tiny-llama");
    let file = SafetensorsFile::open(&folder("diffora.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    let tokens = get("tokens").to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let supervised = |tokens: &[u32]| (0..tokens.len()).map(|i| i > 0).collect();
    let rows: Vec<Example> =
        tokens.into_iter().map(|t| Example { supervised: supervised(&t), tokens: t, answer: None }).collect();
    let rows: Vec<&Example> = rows.iter().collect();
    let of = |search_steps, search_r, search_batch_size, search_lr, gamma_lr, gate, sharing| DifforaConfig {
        search_steps,
        search_r,
        search_batch_size,
        search_lr,
        gamma_lr,
        gate,
        sharing,
        ..Default::default()
    };
    for (name, settings) in [
        ("kind", of(6, 3, 4, 5e-3, 1e-2, Gate::Softmax, Sharing::Kind)),
        ("none", of(5, 2, 3, 1e-2, 2e-2, Gate::Sigmoid, Sharing::None)),
    ] {
        let method = methods::build("diffora", &serde_json::Map::new()).unwrap();
        let find = methods::parts::search("diffora").unwrap();
        let data = SearchRows { model: &model, rows: &rows };
        let found = find(&data, method.targeting(), &serde_json::json!(settings), &mut |_, _| {}).unwrap();
        let expected = get(name).to_vec2::<f32>().unwrap();
        let kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        for (path, found) in &found {
            let layer: usize = path.split('.').nth(2).unwrap().parse().unwrap();
            let kind = kinds.iter().position(|k| path.ends_with(k)).unwrap();
            let gamma = found["gamma"].to_vec1::<f32>().unwrap()[0];
            let d = (gamma - expected[layer][kind]).abs();
            assert!(d < 1e-4, "{name} {path}: {gamma} against {}", expected[layer][kind]);
        }
        assert_eq!(found.len(), 14);
    }
}
