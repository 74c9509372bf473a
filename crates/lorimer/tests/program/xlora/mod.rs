//! X-LoRA: PEFT's own numbers (see tests/goldens/make_xlora.py), what a mixture has to be, and its files.

mod files;
mod gates;
mod laws;
mod program;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use lorimer::adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer::adapter::{Part, Routes};
use lorimer::model::weights::SafetensorsFile;
use lorimer::model::{Inference, earlier_passes};
use lorimer::prelude::*;
use lorimer::serve::engine::pool::Geometry;
use lorimer::serve::engine::scheduler::{Policy, Tenant};
use lorimer::serve::{Engine, EngineSettings, Event, Hosted, Request};
use lorimer::tensor::{Gradients, Ops};
use lorimer::train::run::frozen::{FrozenCache, FrozenLower};
use lorimer::train::run::step::{StepOptions, accumulate_gradients, batch_loss};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::{common, tiny};

const CASES: [&str; 14] = [
    "layerwise",
    "shared",
    "depth2_shared",
    "depth3",
    "depth3_no_dropout",
    "top_k",
    "top_k_softmax",
    "top_k_both_softmaxes",
    "top_k_raw",
    "raw",
    "temperature",
    "global_weight",
    "pass_value",
    "constant",
];

fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

fn case(name: &str) -> PathBuf {
    goldens("xlora").join(name)
}

fn tiny_llama() -> Decoder {
    let (config, weights) = lorimer::model::base::open_weights(&goldens("tiny-llama"), LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let of = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let d = (of(a) - of(b)).unwrap().abs().unwrap().flatten_all().unwrap();
    d.max(0).unwrap().to_scalar::<f64>().unwrap()
}

struct Golden(SafetensorsFile);

impl Golden {
    fn open(name: &str) -> Self {
        Self(SafetensorsFile::open(&case(name).join("golden.safetensors")).unwrap())
    }
    fn get(&self, name: &str) -> Tensor {
        self.0.load(name).unwrap().unwrap_or_else(|| panic!("golden `{name}`"))
    }
    fn tokens(&self) -> Vec<Vec<u32>> {
        self.get("tokens").to_dtype(DType::U32).unwrap().to_vec2().unwrap()
    }
    fn near(&self, case: &str, what: &str, found: &Tensor, bound: f64) {
        let d = distance(found, &self.get(what));
        assert!(d <= bound, "{case}: {what} differs by {d:e}");
    }
}

fn batch(rows: &[Vec<u32>]) -> Batch {
    Batch::pack(rows.iter().map(Vec::as_slice))
}

fn logits(model: &dyn BaseModel, on: &dyn Adaptation, rows: &[Vec<u32>]) -> Tensor {
    model.logits(&model.hidden(&batch(rows), on).unwrap(), on).unwrap().detach()
}

/// Hidden states that the head sees.
fn seen(model: &dyn BaseModel, adapter: &Adapter, batch: &Batch) -> Tensor {
    let attached = Attached::one(adapter);
    let on = Inference::of(&attached);
    let mut bottom = |on: &dyn Adaptation| Ok((0, model.embed(&batch.tokens, &batch.positions, on)?));
    earlier_passes(model, &on, (&batch.positions, &batch.segments), &mut bottom, None).unwrap().unwrap()
}

/// λ (rows, projections, n).
fn scalings(model: &dyn BaseModel, adapter: &Adapter, batch: &Batch) -> Tensor {
    adapter.router().unwrap().scalings(&seen(model, adapter, batch)).unwrap()
}

/// Gates (rows, projections, n).
fn gates(model: &dyn BaseModel, adapter: &Adapter, batch: &Batch) -> Tensor {
    let hidden = seen(model, adapter, batch);
    let routes: Routes = adapter.router().unwrap().routes(Ops::plain(), &hidden, None).unwrap();
    let rows = batch.tokens.len();
    let each: Vec<Tensor> = adapter
        .mixture()
        .unwrap()
        .sites
        .iter()
        .map(|site| routes.at(Ops::plain(), site, rows).unwrap().detach())
        .collect();
    Tensor::stack(&each, 1).unwrap()
}

/// Every next token is supervised.
fn examples(rows: &[Vec<u32>]) -> Vec<Example> {
    let of = |tokens: &Vec<u32>| Example { tokens: tokens.clone(), supervised: vec![true; tokens.len()], answer: None };
    rows.iter().map(of).collect()
}

fn trained(model: &dyn BaseModel, adapter: &Adapter, rows: &[Example], options: StepOptions) -> (f64, Vec<Tensor>) {
    let rows: Vec<&Example> = rows.iter().collect();
    let count: usize = rows.iter().map(|e| e.targets().count()).sum();
    let (parameters, attached) = (adapter.trainable(), Attached::one(adapter));
    let (mut sums, scale) = (Gradients::default(), 1.0 / count as f64);
    let loss = accumulate_gradients(model, &attached, &parameters, &rows, scale, options, None, &mut sums).unwrap();
    let gradients = parameters
        .iter()
        .map(|(name, var)| sums.remove(var.as_tensor()).unwrap_or_else(|| panic!("no gradient of {name}")));
    (loss.sum * scale, gradients.collect())
}

/// Experts on the tiny model in memory: some lack projections that others have.
fn experts(model: &dyn BaseModel, count: usize) -> Vec<Part> {
    let settings = [
        r#"{"r": 2, "lora_alpha": 4, "lora_dropout": 0.5}"#,
        r#"{"r": 3, "use_rslora": true, "target_modules": ["q_proj", "down_proj"]}"#,
        r#"{"r": 1, "layers_to_transform": [1], "rank_pattern": {"up_proj": 2}}"#,
    ];
    let one = |i: usize| {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(40 + i as u64);
        let adapter = tiny::attach(model, "lora", settings[i % settings.len()]);
        for (_, var) in adapter.trainable() {
            var.set(&tiny::random(var.dims(), 0.5, &mut rng).to_dtype(var.dtype()).unwrap()).unwrap();
        }
        adapter.to_stored("tiny").unwrap().into_part().unwrap()
    };
    (0..count).map(one).collect()
}

/// A new mixture of them.
fn mixture(model: &dyn BaseModel, parts: &[Part], settings: &Value) -> Adapter {
    let mut method = methods::build("xlora", settings.as_object().unwrap()).unwrap();
    method.take_parts(parts).unwrap();
    Adapter::attach(model, method, 3).unwrap()
}

fn expert(model: &dyn BaseModel, part: &Part) -> Adapter {
    let stored = StoredAdapter {
        path: "expert".into(),
        config: part.config.clone(),
        tensors: part.tensors.clone(),
        manifest: None,
        parts: Vec::new(),
    };
    Adapter::load_whole(model, &stored).unwrap()
}

const ROWS: [&[u32]; 3] = [&[1, 7, 9, 3, 11, 12], &[2, 30, 8], &[4, 5, 39, 21, 7]];

fn rows() -> Vec<Vec<u32>> {
    ROWS.iter().map(|row| row.to_vec()).collect()
}

/// Settings of all kinds, for what holds of each.
fn kinds() -> Vec<Value> {
    vec![
        json!({ "init": "peft" }),
        json!({ "init": "peft", "layerwise_scalings": true }),
        json!({ "init": "peft", "layerwise_scalings": true, "xlora_depth": 2, "xlora_size": 7, "xlora_dropout_p": 0.0 }),
        json!({ "init": "peft", "xlora_depth": 3, "xlora_size": 7 }),
        json!({ "init": "peft", "layerwise_scalings": true, "top_k_lora": 2 }),
        json!({ "init": "peft", "layerwise_scalings": true, "top_k_lora": 2, "enable_softmax_topk": true, "softmax_temperature": 0.3 }),
        json!({ "init": "peft", "layerwise_scalings": true, "enable_softmax": false, "global_scaling_weight": 0.7 }),
        json!({ "init": "peft", "layerwise_scalings": true, "scaling_pass_value": 0.4, "global_scaling_weight": 1.3 }),
    ]
}
