//! Pre-trains a small Decoder over bytes from scratch, with full AdamW, GaLore, 8-bit GaLore and LoRA in turn, and compares their perplexity
//! on text that none has seen, and the bytes of optimiser state over the projected weights (GaLore, arXiv 2403.03507, table 2).
//!
//! `cargo run --release --example pretrain -- [STEPS] [METHOD:RATE …]`, in the project's folder; 300 steps take about ten minutes on two cores.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use lorimer::adapter::methods::OptimizerChoice;
use lorimer::adapter::training::{AdamWConfig, ParamGroup};
use lorimer::model::decoder::config::DecoderConfig;
use lorimer::model::weights::{LoadDtype, Weights};
use lorimer::prelude::*;
use lorimer::tensor::Gradients;
use lorimer::train::run::optimize;
use lorimer::train::run::optimize::clip;
use lorimer::train::run::schedule::{Schedule, Shape};
use lorimer::train::run::step::{StepOptions, accumulate_gradients};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const WIDTH: usize = 192;
const INNER: usize = 512;
const LAYERS: usize = 4;
const LENGTH: usize = 128;
const BATCH: usize = 16;

/// Random weights: normal-like with σ = 0.02, as Decoder starts.
fn model() -> Result<Decoder> {
    let json = json!({
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": 256, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    let config = DecoderConfig::from_json(&json, Path::new("config.json"))?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize]| -> Result<()> {
        // The sum of twelve uniform numbers, less six.
        let mut one = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let count = shape.iter().product();
        let data: Vec<f32> = match name.ends_with("norm.weight") {
            true => vec![1.0; count],
            false => (0..count).map(|_| 0.02 * one()).collect(),
        };
        tensors.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
        Ok(())
    };
    put("model.embed_tokens.weight".into(), &[256, WIDTH])?;
    put("lm_head.weight".into(), &[256, WIDTH])?;
    put("model.norm.weight".into(), &[WIDTH])?;
    for i in 0..LAYERS {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            put(at(&format!("self_attn.{name}")), &[WIDTH, WIDTH])?;
        }
        put(at("mlp.gate_proj"), &[INNER, WIDTH])?;
        put(at("mlp.up_proj"), &[INNER, WIDTH])?;
        put(at("mlp.down_proj"), &[WIDTH, INNER])?;
        put(at("input_layernorm"), &[WIDTH])?;
        put(at("post_attention_layernorm"), &[WIDTH])?;
    }
    Ok(Decoder::load(config, &Weights::from_memory(tensors).kept_as(LoadDtype::F32))?)
}

/// What the data files say, in pieces of equal length.
fn text(files: &[&str]) -> Result<Vec<Example>> {
    let mut bytes: Vec<u32> = Vec::new();
    for file in files {
        let path = format!("data/{file}.jsonl");
        for line in std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?.lines() {
            let row: serde_json::Value = serde_json::from_str(line)?;
            for message in row["messages"].as_array().into_iter().flatten() {
                bytes.extend(message["content"].as_str().unwrap_or_default().bytes().map(u32::from));
                bytes.push(10);
            }
        }
    }
    let rows = bytes.chunks_exact(LENGTH);
    Ok(rows
        .map(|row| Example { tokens: row.to_vec(), supervised: (0..LENGTH).map(|i| i > 0).collect(), answer: None })
        .collect())
}

struct Outcome {
    perplexity: f64,
    state: usize,
    seconds: f64,
    decomposing: f64,
    parameters: usize,
}

fn run(
    method: &str,
    settings: serde_json::Value,
    rate: f64,
    steps: usize,
    train: &[Example],
    held: &[Example],
) -> Result<Outcome> {
    let model = model()?;
    let mut settings = settings;
    settings["modules_to_save"] =
        json!(["model.embed_tokens", "lm_head", "model.norm", "input_layernorm", "post_attention_layernorm"]);
    let settings = settings.as_object().context("settings")?;
    let adapter = Adapter::attach(&model, methods::build(method, settings)?, 0)?;
    let kind = adapter.method.training().optimizer.map(OptimizerChoice).unwrap_or_default();
    let mut optimizer = optimize::build(&kind, AdamWConfig::default(), &model, &adapter)?;
    let whole = |name: &str| adapter.parameters().contains_key(name);
    let how = |name: &str| {
        Ok(ParamGroup {
            projected: !whole(name),
            // What is trained whole goes at one rate whatever the projections do.
            rate: if whole(name) { 2e-3 / rate } else { 1.0 },
            ..Default::default()
        })
    };
    let parameters = adapter.trainable();
    let attached = Attached::one(&adapter);
    let schedule = Schedule { peak: rate, warmup: steps / 10, total: steps, shape: Shape::Cosine };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let clock = Instant::now();
    for step in 0..steps {
        let rows: Vec<&Example> = (0..BATCH).map(|_| &train[rng.random_range(0..train.len())]).collect();
        let supervised: usize = rows.iter().map(|e| e.targets().count()).sum();
        let mut sums = Gradients::default();
        let scale = 1.0 / supervised as f64;
        let options = StepOptions::default();
        let found = accumulate_gradients(&model, &attached, &parameters, &rows, scale, options, None, &mut sums)?;
        let mut gradients: Vec<_> = parameters.iter().map(|(_, v)| sums.remove(v.as_tensor())).collect();
        clip(&mut gradients, 1.0)?;
        optimizer.step_with(&parameters, &gradients, &how, schedule.rate(step))?;
        if step % 50 == 49 {
            eprintln!("{method:8} step {:4}: loss {:.4}", step + 1, found.sum * scale);
        }
    }
    let seconds = clock.elapsed().as_secs_f64();
    let (mut sum, mut count) = (0.0, 0);
    for rows in held.chunks(BATCH) {
        let rows: Vec<&Example> = rows.iter().collect();
        let (loss, n, _) = lorimer::train::run::step::batch_loss(&model, &attached, &rows)?;
        sum += loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        count += n;
    }
    let state = optimizer.state()?;
    let projections: Vec<&str> = adapter.deltas().map(|(path, _)| path).collect();
    let own = state
        .iter()
        .filter(|(name, _)| !name.ends_with(".step") && projections.iter().any(|p| name.starts_with(&format!("{p}."))));
    Ok(Outcome {
        perplexity: (sum / count as f64).exp(),
        state: own.map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes()).sum(),
        seconds,
        decomposing: optimizer.decomposing_seconds(),
        parameters: adapter.parameter_count(),
    })
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let steps: usize = arguments.first().map_or(Ok(300), |s| s.parse()).context("STEPS should be a number")?;
    let wanted = arguments.get(1..).unwrap_or_default();
    let rate_of = |name: &str, default: f64| -> Result<Option<f64>> {
        if wanted.is_empty() {
            return Ok(Some(default));
        }
        let found = wanted.iter().find_map(|w| w.split_once(':').filter(|(n, _)| *n == name));
        found.map(|(_, rate)| rate.parse().context("METHOD:RATE")).transpose()
    };
    let mut train =
        text(&["sentiment-movies.train", "sentiment-products.train", "sentiment-news.train", "wordnet-define.train"])?;
    let held = train.split_off(train.len() - 200.min(train.len() / 5));
    let runs = [
        ("full", "full", json!({}), 1e-3),
        ("galore", "galore", json!({ "rank": WIDTH / 4, "update_proj_gap": 50 }), 8e-3),
        ("galore-8bit", "galore", json!({ "rank": WIDTH / 4, "update_proj_gap": 50, "bits": 8 }), 8e-3),
        ("lora", "lora", json!({ "r": WIDTH / 4 }), 4e-3),
    ];
    println!(
        "{:<12}{:>8}{:>12}{:>12}{:>14}{:>10}{:>14}",
        "", "rate", "perplexity", "state", "parameters", "seconds", "of them SVD"
    );
    for (name, method, settings, default) in runs {
        let Some(rate) = rate_of(name, default)? else { continue };
        let o = run(method, settings, rate, steps, &train, &held)?;
        println!(
            "{name:<12}{rate:>8}{:>12.3}{:>9.2} MB{:>14}{:>10.0}{:>14.1}",
            o.perplexity,
            o.state as f64 / 1e6,
            o.parameters,
            o.seconds,
            o.decomposing
        );
    }
    Ok(())
}
