//! X-LoRA: PEFT's own numbers (see tests/goldens/make_xlora.py), what a mixture has to be, and its files.

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

const CASES: [&str; 13] = [
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
    let on = Inference(&attached);
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

/// λ, gates, logits, the head's gradients in each form that training has, and three steps of AdamW.
#[test]
fn mixtures_are_those_of_peft() {
    let model = tiny_llama();
    let sites: Vec<Value> = serde_json::from_slice(&std::fs::read(case("sites.json")).unwrap()).unwrap();
    for name in CASES {
        let golden = Golden::open(name);
        let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case(name)).unwrap()).unwrap();
        let order = adapter.mixture().unwrap().sites;
        assert!(order.iter().zip(&sites).all(|(own, golden)| golden["site"] == **own) && order.len() == sites.len());
        let rows = golden.tokens();
        let packed = batch(&rows);
        let shape = golden.get("scalings").dims().to_vec();
        let whole = |t: Tensor| t.reshape(shape.as_slice()).unwrap();
        let hidden = seen(&model, &adapter, &packed);
        golden.near(name, "hidden", &hidden.reshape(golden.get("hidden").dims()).unwrap(), 1e-5);
        golden.near(name, "scalings", &whole(scalings(&model, &adapter, &packed)), 1e-5);
        golden.near(name, "gates", &whole(gates(&model, &adapter, &packed)), 1e-5);
        golden.near(name, "logits", &logits(&model, &Attached::one(&adapter), &rows), 1e-5);

        let data = examples(&rows);
        let names: Vec<String> =
            adapter.trainable().iter().map(|(name, _)| name.replace("internal_xlora_classifier.", "grad.")).collect();
        for checkpointing in [false, true] {
            let options = StepOptions { checkpointing, ..Default::default() };
            let (_, gradients) = trained(&model, &adapter, &data, options);
            for (key, gradient) in names.iter().zip(&gradients) {
                golden.near(name, key, gradient, 1e-5);
            }
        }
        let refs: Vec<&Example> = data.iter().collect();
        let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter), &refs).unwrap();
        let found = (sum / count as f64).unwrap().backward().unwrap();
        for (key, (_, var)) in names.iter().zip(adapter.trainable()) {
            golden.near(name, key, found.get(var.as_tensor()).unwrap(), 1e-5);
        }

        let config = AdamWConfig { weight_decay: 0.01, ..Default::default() };
        let (mut optimizer, mut losses) = (AdamW::new(config, false), Vec::new());
        for _ in 0..3 {
            let (loss, gradients) = trained(&model, &adapter, &data, StepOptions::default());
            let gradients: Vec<Option<Tensor>> = gradients.into_iter().map(Some).collect();
            optimizer.step(&adapter.trainable(), &gradients, 1e-2).unwrap();
            losses.push(loss);
        }
        losses.push(trained(&model, &adapter, &data, StepOptions::default()).0);
        let losses = Tensor::new(losses, &Device::Cpu).unwrap();
        golden.near(name, "losses", &losses, 1e-5);
        for (key, (_, var)) in names.iter().zip(adapter.trainable()) {
            golden.near(name, &key.replace("grad.", "trained."), var.as_tensor(), 2e-4);
        }
    }
}

/// What PEFT 0.20 and 0.21 lose is missed, and what does not belong there is found.
#[test]
fn a_head_that_is_not_whole_is_refused() {
    let model = tiny_llama();
    let problem = |stored: &StoredAdapter| Adapter::load(&model, stored).err().unwrap().to_string();
    let lost = problem(&StoredAdapter::read(&case("lost")).unwrap());
    assert!(lost.contains("no `layers.0.bias`") && lost.contains("PEFT 0.20 and 0.21"), "{lost}");
    let mut stored = StoredAdapter::read(&case("depth3")).unwrap();
    stored.config.insert("xlora_depth".into(), 2.into());
    stored.config.insert("xlora_dropout_p".into(), json!(0.2));
    let more = problem(&stored);
    assert!(more.contains("`layers.6.bias`") && more.contains("depth 2"), "{more}");
    // Without dropout the layers have other numbers.
    let mut stored = StoredAdapter::read(&case("depth3")).unwrap();
    stored.config.insert("xlora_dropout_p".into(), 0.into());
    assert!(problem(&stored).contains("`layers.2.bias`"));
    let mut stored = StoredAdapter::read(&case("layerwise")).unwrap();
    stored.config.insert("layerwise_scalings".into(), false.into());
    let shape = problem(&stored);
    assert!(shape.contains("[36, 32]") && shape.contains("[3, 32]"), "{shape}");
}

/// The authors' own folders.
#[test]
fn the_authors_folders_are_read() {
    let model = tiny_llama();
    let tokens = Golden::open("depth3").tokens();
    for (folder, golden) in [("authors", "depth3"), ("authors_linear", "authors_linear")] {
        let golden = Golden::open(golden);
        let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case(folder)).unwrap()).unwrap();
        let found = scalings(&model, &adapter, &batch(&tokens)).reshape(golden.get("scalings").dims()).unwrap();
        golden.near(folder, "scalings", &found, 1e-5);
        golden.near(folder, "logits", &logits(&model, &Attached::one(&adapter), &tokens), 1e-5);
    }
    let out = tempfile::tempdir().unwrap();
    for file in ["xlora_config.json", "xlora_classifier.safetensors"] {
        std::fs::copy(case("authors").join(file), out.path().join(file)).unwrap();
    }
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(case("authors").join("xlora_config.json")).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(out.path().join("xlora_config.json"), config.to_string()).unwrap();
        StoredAdapter::read(out.path()).err().unwrap().to_string()
    };
    assert!(with(&|_| ()).contains("expert 0 should be at `chemistry`"));
    assert!(with(&|c| c["adapters"] = Value::Null).contains("in the order of the head's columns"));
    assert!(with(&|c| c["adapters"] = json!(["../experts/0"])).contains("in the order of the head's columns"));
    assert!(with(&|c| c["xlora_depth"] = 4.into()).contains("its head has no `inner.6.weight`"));
    assert!(with(&|c| c["xlora_depth"] = 2.into()).contains("its head holds `inner.3.bias`"));
    std::fs::rename(out.path().join("xlora_classifier.safetensors"), out.path().join("xlora_classifier.pt")).unwrap();
    assert!(with(&|_| ()).contains("pickle"));
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

/// What a mixture is where its weights are known.
#[test]
fn known_weights_give_known_models() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let (rows, settings) = (rows(), json!({ "layerwise_scalings": true }));
    // One expert and the softmax: that adapter.
    for n in 0..3 {
        let one = mixture(&model, &parts[n..n + 1], &json!({ "init": "peft" }));
        let alone = expert(&model, &parts[n]);
        let d = distance(&logits(&model, &Attached::one(&one), &rows), &logits(&model, &Attached::one(&alone), &rows));
        assert!(d < 1e-10, "expert {n} alone: {d:e}");
    }
    let all: Vec<Adapter> = parts.iter().map(|part| expert(&model, part)).collect();
    // A last layer of zeros: 1/n each, whatever the depth.
    for settings in [settings.clone(), json!({ "xlora_depth": 3, "xlora_size": 5 })] {
        let uniform = mixture(&model, &parts, &settings);
        let fixed = Attached::weighted(all.iter().map(|a| (a, 1.0 / 3.0)).collect()).unwrap();
        let d = distance(&logits(&model, &Attached::one(&uniform), &rows), &logits(&model, &fixed, &rows));
        assert!(d < 1e-10, "the uniform mixture: {d:e}");
        assert!(distance(&logits(&model, &fixed, &rows), &logits(&model, &Frozen, &rows)) > 0.1);
    }
    // A bias of 50 on one expert: that adapter.
    for (j, alone) in all.iter().enumerate() {
        let mixed = mixture(&model, &parts, &settings);
        let trainable = mixed.trainable();
        let (_, bias) = trainable.iter().find(|(name, _)| name.ends_with("bias")).unwrap();
        let numbers: Vec<f64> = (0..bias.elem_count()).map(|i| if i % 3 == j { 50.0 } else { 0.0 }).collect();
        bias.set(&Tensor::new(numbers, &Device::Cpu).unwrap()).unwrap();
        let d = distance(&logits(&model, &Attached::one(&mixed), &rows), &logits(&model, &Attached::one(alone), &rows));
        assert!(d < 1e-9, "a bias on expert {j}: {d:e}");
    }
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

#[test]
fn weights_sum_to_one_and_at_most_k_count() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let packed = batch(&rows());
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let sums = |t: &Tensor| t.sum(2).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let counts = |t: &Tensor| sums(&t.ne(0.0).unwrap().to_dtype(DType::F64).unwrap());
        let (scalings, gates) = (scalings(&model, &adapter, &packed), gates(&model, &adapter, &packed));
        if settings.get("enable_softmax") != Some(&json!(false)) {
            assert!(sums(&scalings).iter().all(|s| (s - 1.0).abs() < 1e-12), "{settings}");
            assert!(sums(&gates).iter().all(|&s| s <= 1.0 + 1e-12), "{settings}");
        }
        let k = settings.get("top_k_lora").and_then(Value::as_f64).unwrap_or(3.0);
        assert!(counts(&gates).iter().all(|&count| count == k), "{settings}");
        if settings.get("enable_softmax_topk").is_some() {
            assert!(sums(&gates).iter().all(|s| (s - 1.0).abs() < 1e-12), "{settings}");
        }
    }
}

/// The head's gradients against differences, the recorded forms against candle's graph, and the number of parameters.
#[test]
fn gradients_of_the_head_are_right_in_every_form() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let data = tiny::examples();
    let refs: Vec<&Example> = data.iter().collect();
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let (sites, config) = (adapter.mixture().unwrap().sites.len(), adapter.method.config());
        let depth = config["xlora_depth"].as_u64().unwrap() as usize;
        let m = 3 * if config["layerwise_scalings"] == json!(true) { sites } else { 1 };
        let (h, z) = (16, 7);
        let formula = if depth == 1 { (h + 1) * m } else { (h + 1) * z + (depth - 2) * (z + 1) * z + (z + 1) * m };
        assert_eq!(adapter.parameter_count(), formula, "{settings}");
        assert_eq!(adapter.method.router_parameters(h, sites), Some(formula));
        let loss = || {
            let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter), &refs).unwrap();
            (sum / count as f64).unwrap()
        };
        // With dropout, which goes by the element, in training.
        let step = Step::training(3);
        let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter).at(step), &refs).unwrap();
        let graph = (sum / count as f64).unwrap().backward().unwrap();
        for checkpointing in [false, true] {
            let options = StepOptions { checkpointing, ..Default::default() };
            let mut sums = Gradients::default();
            let (parameters, on, scale) = (adapter.trainable(), Attached::one(&adapter).at(step), 1.0 / count as f64);
            accumulate_gradients(&model, &on, &parameters, &refs, scale, options, None, &mut sums).unwrap();
            for (name, var) in &parameters {
                let found = sums.get(var.as_tensor()).unwrap_or_else(|| panic!("no gradient of {name}"));
                let d = distance(found, graph.get(var.as_tensor()).unwrap());
                assert!(d < 1e-12, "{settings}: {name} in training differs by {d:e}");
            }
        }
        let graph = loss().backward().unwrap();
        for (share_prefixes, checkpointing) in [(true, false), (false, true)] {
            let options = StepOptions { share_prefixes, checkpointing, ..Default::default() };
            let (_, found) = trained(&model, &adapter, &data, options);
            for ((name, var), found) in adapter.trainable().iter().zip(&found) {
                let d = distance(found, graph.get(var.as_tensor()).unwrap());
                assert!(d < 1e-12, "{settings}: {name} differs by {d:e}");
            }
        }
        let number = |t: Tensor| t.to_scalar::<f64>().unwrap();
        for (name, var) in adapter.trainable() {
            let own: &Var = var;
            let (dims, before) = (own.dims().to_vec(), own.as_tensor().copy().unwrap());
            let flat = before.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let gradient = graph.get(own.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for i in [0, flat.len() / 2, flat.len() - 1] {
                let at = |by: f64| {
                    let mut moved = flat.clone();
                    moved[i] += by;
                    own.set(&Tensor::from_vec(moved, dims.as_slice(), &Device::Cpu).unwrap()).unwrap();
                    number(loss())
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (difference - gradient[i]).abs() < 1e-8,
                    "{settings}: {name} {i}: {difference} {}",
                    gradient[i]
                );
            }
            own.set(&before).unwrap();
        }
    }
}

/// A cache for each pass gives what computing everything again gives.
#[test]
fn two_caches_are_exact() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let tokens = [1u32, 7, 9, 3, 11, 12, 30, 8, 2];
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let attached = Attached::one(&adapter);
        let whole = logits(&model, &attached, &[tokens.to_vec()]);
        for cuts in [vec![4, 5, 6, 7, 8, 9], vec![1, 3, 9]] {
            let (mut cache, mut from) = (KvCache::default(), 0);
            let mut found = Vec::new();
            for to in cuts {
                let hidden = model.hidden_cached(&tokens[from..to], &mut cache, &attached).unwrap();
                found.push(model.logits(&hidden, &attached).unwrap());
                from = to;
            }
            assert_eq!(cache.len(), tokens.len());
            let d = distance(&Tensor::cat(&found, 0).unwrap(), &whole);
            assert!(d < 1e-12, "{settings}: {d:e}");
        }
        // Alone and packed with others, whatever begins alike.
        let rows = [tokens.to_vec(), vec![1, 7, 9, 4], vec![5]];
        let shared = Batch::share(rows.iter().map(Vec::as_slice));
        let hidden = model.hidden(&shared, &attached).unwrap();
        let index = Tensor::new(shared.rows[0].as_slice(), &Device::Cpu).unwrap();
        let own = model.logits(&hidden.index_select(&index, 0).unwrap(), &attached).unwrap();
        assert!(distance(&own, &whole) < 1e-12, "{settings}");
    }
}

/// Where only upper layers have experts, what the lower ones give may be kept.
#[test]
fn frozen_lower_layers_are_the_same_in_both_passes() {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let upper = tiny::attach(&model, "lora", r#"{"r": 2, "layers_to_transform": [1]}"#);
    tiny::move_all(&upper);
    let part = upper.to_stored("tiny").unwrap().into_part().unwrap();
    let settings =
        json!({ "init": "peft", "layerwise_scalings": true, "scaling_pass_value": 0.5, "enable_softmax": false });
    let adapter = mixture(&model, &[part.clone(), part], &settings);
    let (data, folder) = (tiny::examples(), tempfile::tempdir().unwrap());
    let attached = Attached::one(&adapter);
    let cache = FrozenCache::Memory;
    let lower = FrozenLower::build(&model, &attached, &data, 2, cache, folder.path(), |_| ()).unwrap().unwrap();
    assert_eq!(lower.layers(), 1);
    let (refs, parameters): (Vec<&Example>, _) = (data.iter().collect(), adapter.trainable());
    let of = |lower: Option<&FrozenLower>| {
        let (mut sums, places) = (Gradients::default(), [0, 1, 2]);
        let lower = lower.map(|lower| (lower, places.as_slice()));
        let options = StepOptions::default();
        accumulate_gradients(&model, &attached, &parameters, &refs, 1.0, options, lower, &mut sums).unwrap();
        sums.remove(parameters[0].1.as_tensor()).unwrap()
    };
    assert!(distance(&of(None), &of(Some(&lower))) < 1e-6);
}

/// A file gives the mixture again; another expert, another order or another base does not pass.
#[test]
fn files_hold_the_mixture_and_know_their_experts() {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let (out, rows) = (tempfile::tempdir().unwrap(), rows());
    // Twelve, since PEFT sorts their names as texts.
    let parts: Vec<Part> = experts(&model, 12)
        .into_iter()
        .enumerate()
        .map(|(i, part)| {
            let folder = out.path().join(format!("expert{i}"));
            let stored = expert(&model, &part).to_stored("tiny").unwrap();
            stored.write(&folder, None).unwrap();
            StoredAdapter::read(&folder).unwrap().into_part().unwrap()
        })
        .collect();
    let settings = json!({ "init": "peft", "layerwise_scalings": true, "xlora_depth": 2, "xlora_size": 4 });
    let adapter = mixture(&model, &parts, &settings);
    let expected = logits(&model, &Attached::one(&adapter), &rows);
    let folder = out.path().join("mixed");
    let mut stored = adapter.to_stored("tiny").unwrap();
    let id = stored.content_id().unwrap();
    let manifest = json!({
        "format": 1, "content_id": id, "method": "xlora", "lorimer": "0", "base": null, "chat_template": null,
        "xlora": adapter.mixture(),
    });
    stored.manifest = serde_json::from_value(manifest).unwrap();
    stored.write(&folder, None).unwrap();
    let names: BTreeMap<_, _> = SafetensorsFile::open(&folder.join("adapter_model.safetensors"))
        .map(|f| f.names().into_iter().map(|n| (n.clone(), n)).collect())
        .unwrap();
    assert!(
        names.keys().all(|name| name.starts_with("base_model.internal_xlora_classifier.layers.")) && names.len() == 4
    );
    let again = StoredAdapter::read(&folder).unwrap();
    assert_eq!(again.config["adapters"]["10"], "../expert10");
    assert!(again.config.get("init").is_none());
    assert_eq!(again.content_id().unwrap(), id);
    let loaded = Adapter::load_whole(&model, &again).unwrap();
    assert_eq!(distance(&logits(&model, &Attached::one(&loaded), &rows), &expected), 0.0);

    // As PEFT writes the map.
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let mut sorted: Value = serde_json::from_str(&config).unwrap();
    let map: BTreeMap<String, Value> = serde_json::from_value(sorted["adapters"].clone()).unwrap();
    sorted["adapters"] = Value::Object(map.into_iter().collect());
    std::fs::write(folder.join("adapter_config.json"), sorted.to_string()).unwrap();
    let loaded = Adapter::load_whole(&model, &StoredAdapter::read(&folder).unwrap()).unwrap();
    assert_eq!(distance(&logits(&model, &Attached::one(&loaded), &rows), &expected), 0.0);
    // A server reads experts below its root only.
    let root = out.path().canonicalize().unwrap();
    assert!(StoredAdapter::read_changing(&folder, 1 << 20, &root).is_ok());
    let outside = StoredAdapter::read_changing(&folder, 1 << 20, &root.join("mixed")).err().unwrap().to_string();
    assert!(outside.contains("expert 0 lies outside of the folder of adapters"), "{outside}");
    // Moved elsewhere it is the same content; with two experts exchanged it is another, which the manifest refuses.
    let moved = out.path().join("elsewhere");
    std::fs::create_dir(&moved).unwrap();
    for i in 0..12 {
        std::fs::rename(out.path().join(format!("expert{i}")), moved.join(format!("expert{i}"))).unwrap();
    }
    let missing = StoredAdapter::read(&folder).err().unwrap().to_string();
    assert!(missing.contains("expert 0 should be at `../expert0`"), "{missing}");
    std::fs::rename(&folder, moved.join("mixed")).unwrap();
    let folder = moved.join("mixed");
    assert_eq!(StoredAdapter::read(&folder).unwrap().content_id().unwrap(), id);
    std::fs::rename(moved.join("expert3"), moved.join("kept")).unwrap();
    std::fs::rename(moved.join("expert4"), moved.join("expert3")).unwrap();
    std::fs::rename(moved.join("kept"), moved.join("expert4")).unwrap();
    let other = Adapter::load(&model, &StoredAdapter::read(&folder).unwrap()).err().unwrap().to_string();
    assert!(
        other.contains("expert 3") && other.contains("is not the adapter that the head was trained with"),
        "{other}"
    );
}

/// What cannot be is refused by name.
#[test]
fn what_cannot_be_mixed_is_refused() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let built = |settings: Value, parts: &[Part]| -> String {
        let method = methods::build("xlora", settings.as_object().unwrap());
        let attached = method.and_then(|mut method| {
            method.take_parts(parts)?;
            Adapter::attach(&model, method, 3)
        });
        attached.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(built(json!({}), &parts), "");
    for (settings, expected) in [
        (json!({ "use_trainable_adapters": true }), "use_trainable_adapters"),
        (json!({ "xlora_depth": 0 }), "xlora_depth = 0"),
        (json!({ "xlora_size": 0 }), "xlora_size = 0"),
        (json!({ "softmax_temperature": 0 }), "softmax_temperature = 0"),
        (json!({ "top_k_lora": 0 }), "top_k_lora = 0"),
        (json!({ "top_k_lora": 4 }), "top_k_lora = 4"),
        (json!({ "top_k_lora": 2, "scaling_pass_value": 0.5 }), "scaling_pass_value"),
        (json!({ "hidden_size": 4096 }), "hidden_size = 4096"),
        (json!({ "xlora_dropout_p": 1.0 }), "xlora_dropout_p = 1"),
        (json!({ "enable_softmax": false }), "set init=peft"),
        (json!({ "adapters": { "0": "a" } }), "--adapter"),
        (json!({ "layerwise": true }), "no setting `layerwise`"),
    ] {
        let problem = built(settings.clone(), &parts);
        assert!(problem.contains(expected), "{settings}: {problem:?}");
    }
    assert!(built(json!({}), &[]).contains("at least one with --adapter"));
    let with = |change: &dyn Fn(&mut Part)| {
        let mut parts = parts.clone();
        change(&mut parts[1]);
        built(json!({}), &parts)
    };
    let set = |key: &'static str, value: Value| with(&|part| drop(part.config.insert(key.into(), value.clone())));
    assert!(set("use_dora", true.into()).contains("DoRA"));
    assert!(set("peft_type", "RANDLORA".into()).contains("RANDLORA"));
    assert!(set("bias", "all".into()).contains("biases"));
    assert!(set("modules_to_save", json!(["lm_head"])).contains("whole modules"));
    assert!(set("init_lora_weights", "pissa".into()).contains("init_lora_weights"));
    assert!(set("lora_bias", true.into()).contains("lora_bias"));
    assert!(set("r", 5.into()).contains("at rank 5"));
    assert!(set("target_modules", json!(["q_proj", "k_proj", "down_proj"])).contains("k_proj"));
    assert!(set("target_modules", json!(["q_proj"])).contains("does not name"));
    let tensor = |name: &'static str, shape: (usize, usize)| {
        with(&|part| {
            let t = Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
            part.tensors.insert(format!("base_model.model.{name}"), t);
        })
    };
    assert!(tensor("model.layers.0.self_attn.q_proj.lora_A.bias", (3, 16)).contains("no part of a plain LoRA"));
    assert!(tensor("model.layers.7.self_attn.q_proj.lora_A.weight", (3, 16)).contains("only one of A and B"));
    // The head of the base.
    let head = tiny::attach(&model, "lora", r#"{"r": 2, "target_modules": ["lm_head"]}"#);
    let head = head.to_stored("tiny").unwrap().into_part().unwrap();
    assert!(built(json!({}), &[head]).contains("`lm_head`, the head"));
    // Not beside others, nor at another weight; and nobody else is made of parts.
    let (adapter, other) = (mixture(&model, &parts, &json!({})), expert(&model, &parts[0]));
    assert!(Attached::weighted(vec![(&adapter, 1.0), (&other, 1.0)]).is_err());
    assert!(Attached::weighted(vec![(&adapter, 0.5)]).is_err());
    let mut lora = methods::build("lora", &Default::default()).unwrap();
    assert!(lora.take_parts(&parts).unwrap_err().to_string().contains("leave --adapter out"));
    // A forward that knows one pass only does not run without its weights.
    let (site, base) = model.projections()[0];
    let x = Tensor::zeros((2, 16), DType::F64, &Device::Cpu).unwrap();
    assert!(Attached::one(&adapter).project(site, base, &x).is_err());
}

/// log p of a sequence's tokens after the first, by the code that trains.
fn log_probabilities(model: &dyn BaseModel, on: &dyn Adaptation, tokens: &[u32]) -> Vec<f64> {
    let all = logits(model, on, &[tokens.to_vec()]).to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let one = |(row, &token): (&Vec<f64>, &u32)| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row[token as usize] - largest - row.iter().map(|l| (l - largest).exp()).sum::<f64>().ln()
    };
    all.iter().zip(&tokens[1..]).map(one).collect()
}

/// Outside of a pass there are no routes, and a projection that would go without them is an error.
#[test]
fn no_projection_goes_without_routes() {
    let model = tiny::model();
    let adapter = mixture(&model, &experts(&model, 2), &kinds()[0]);
    let (site, base, _) = adapter.sites(&model)[0];
    let x = tiny::random(&[3, site.inputs], 1.0, &mut rand_chacha::ChaCha8Rng::seed_from_u64(1));
    let error = Attached::one(&adapter).project(site, base, &x).unwrap_err().to_string();
    assert!(error.contains("takes two passes"), "{error}");
}

/// Mixtures, one of their experts and the bare base in one batch, prompts in parts and beginning alike, through a pool that holds not all of
/// them: everyone's tokens have the log-probabilities that they have alone, and no page is lost.
#[test]
fn served_in_the_batch_is_alone() {
    // With 96 rows a step, rows of one adapter are computed in several parts.
    for batch_tokens in [24, 96] {
        served_in_steps_of(batch_tokens);
    }
}

fn served_in_steps_of(batch_tokens: usize) {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let parts = experts(&model, 3);
    let mut adapters: Vec<Adapter> = kinds()
        .iter()
        .map(|settings| {
            let adapter = mixture(&model, &parts, settings);
            tiny::move_all(&adapter);
            adapter
        })
        .collect();
    adapters.push(expert(&model, &parts[0]));
    let hosted: Vec<Arc<Hosted>> = adapters
        .iter()
        .enumerate()
        .map(|(i, a)| Arc::new(Hosted::new(&model, a, format!("sha256:{i}"), None).unwrap()))
        .collect();
    assert!(hosted[0].router.is_some() && hosted[8].router.is_none());
    assert!(hosted.iter().all(|h| h.conversion.exact == h.conversion.modules));
    let geometry = Geometry::of(model.shape());
    let largest = hosted.iter().map(|h| h.pages(geometry)).max().unwrap();
    let policy = Policy { batch_tokens, max_running: 9, ..Default::default() };
    let pool_bytes = (3 * largest + geometry.pages_of_tokens(400)) * geometry.page_bytes();
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes, policy, prefix_cache: true }).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(6..40)).collect();
    let mut asked = BTreeMap::new();
    let mut told: BTreeMap<u64, Vec<(u32, Option<f32>)>> = BTreeMap::new();
    let (mut now, mut submitted) = (0.0, 0);
    while submitted < 120 || !engine.is_idle() {
        for _ in 0..if submitted < 120 { rng.random_range(0..4) } else { 0 } {
            submitted += 1;
            let which = rng.random_range(0..=adapters.len());
            let mut prompt = shared[..rng.random_range(0..shared.len())].to_vec();
            prompt.extend((0..rng.random_range(1..30)).map(|_| rng.random_range(6..40u32)));
            let request = Request {
                prompt: prompt.clone(),
                adapters: hosted.get(which).map(|h| (h.clone(), 1.0)).into_iter().collect(),
                max_tokens: Some(rng.random_range(1..12)),
                sampling: Sampling { temperature: 1.0, ..Default::default() },
                seed: submitted,
                stop: vec![],
                log_probabilities: Some(0),
                of_prompt: rng.random_range(0..3) == 0,
                tenant: Tenant { client: "one".into(), user: format!("t{}", which % 3).into() },
                names: vec![],
            };
            let of_prompt = request.of_prompt;
            asked.insert(engine.submit(request, now).unwrap().unwrap(), (which, prompt, of_prompt));
        }
        now += 0.01;
        for event in engine.step(now) {
            match event {
                Event::Prompt(id, tokens, _) => {
                    told.entry(id).or_default().extend(tokens.iter().map(|t| (t.token, t.log_probability)));
                }
                Event::Token(id, token, _) => told.entry(id).or_default().push((token.token, token.log_probability)),
                other => panic!("{other:?}"),
            }
        }
    }
    let state = engine.state();
    assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
    assert!(state.adapter_evictions > 0 && state.cached_tokens > 0, "{state:?}");
    for (id, (which, prompt, of_prompt)) in &asked {
        let told = &told[id];
        let before: &[u32] = if *of_prompt { &[] } else { prompt };
        let tokens: Vec<u32> = before.iter().copied().chain(told.iter().map(|t| t.0)).collect();
        assert!(tokens.starts_with(prompt));
        let expected = match adapters.get(*which) {
            Some(adapter) => log_probabilities(&model, &Attached::one(adapter), &tokens),
            None => log_probabilities(&model, &Frozen, &tokens),
        };
        let found: Vec<f32> = told.iter().filter_map(|t| t.1).collect();
        for (found, expected) in found.iter().rev().zip(expected.iter().rev()) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "request {id} of {which}: {found} {expected}");
        }
    }
    // Alone and at weight 1 only.
    let mut request = Request {
        prompt: vec![7, 8],
        adapters: vec![(hosted[0].clone(), 0.5)],
        max_tokens: Some(1),
        sampling: Sampling::default(),
        seed: 0,
        stop: vec![],
        log_probabilities: None,
        of_prompt: false,
        tenant: Tenant::default(),
        names: vec![],
    };
    assert!(engine.submit(request.clone(), now).is_err());
    request.adapters = vec![(hosted[0].clone(), 1.0), (hosted[8].clone(), 1.0)];
    assert!(engine.submit(request, now).is_err());
}

/// Two LoRAs and a head on top, on the command line: only the head is written, nothing else changes, and what the program says of it.
#[test]
fn a_mixture_on_the_command_line() {
    let fixture = common::Fixture::new();
    let (a, b, mixed) = (fixture.path("a"), fixture.path("b"), fixture.path("mixed"));
    common::ok(&fixture.train(&a, &["-q", "--max-steps", "6", "--rank", "2"]));
    common::ok(
        &fixture.train(
            &b,
            &["-q", "--max-steps", "6", "--rank", "3", "--seed", "1", "--target-modules", "q_proj,down_proj"],
        ),
    );
    let bytes = || {
        let files = [&a, &b].map(|folder| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap());
        (files, std::fs::read(goldens("tiny-llama").join("model.safetensors")).unwrap())
    };
    let before = bytes();
    let own = ["--method", "xlora", "--adapter", &a, "--adapter", &b, "--set", "layerwise_scalings=true"];
    let head = [&own[..], &["--set", "xlora_depth=2", "--set", "xlora_size=4", "--max-steps", "5"]].concat();
    let said = common::json(&fixture.train(&mixed, &head));
    // (32 + 1)·4 + (4 + 1)·2·14.
    assert_eq!(said["trainable_parameters"], 272);
    assert!(before == bytes(), "the experts or the base changed");
    let config: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&mixed).join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["adapters"], json!({ "0": "../a", "1": "../b" }));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&mixed).join("lorimer.json")).unwrap()).unwrap();
    assert_eq!(manifest["xlora"]["sites"].as_array().unwrap().len(), 14);
    // The same run gives the same bytes, wherever the experts are.
    let moved = fixture.path("moved");
    std::fs::create_dir(&moved).unwrap();
    for name in ["a", "b"] {
        std::fs::create_dir(Path::new(&moved).join(name)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(Path::new(&fixture.path(name)).join(file), Path::new(&moved).join(name).join(file)).unwrap();
        }
    }
    let (a2, b2, again) = (format!("{moved}/a"), format!("{moved}/b"), format!("{moved}/mixed"));
    let head = head
        .iter()
        .map(|&f| {
            if f == a {
                a2.as_str()
            } else if f == b {
                b2.as_str()
            } else {
                f
            }
        })
        .collect::<Vec<_>>();
    common::ok(&fixture.train(&again, &[&head[..], &["-q", "--checkpointing", "on"]].concat()));
    let weights = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(weights(&mixed) == weights(&again));
    let of = |folder: &str| common::json(&["inspect", folder]);
    assert_eq!(of(&mixed)["content_id"], of(&again)["content_id"]);
    assert_eq!(
        (&of(&mixed)["experts"][1]["content_matches"], of(&mixed)["experts"].as_array().unwrap().len()),
        (&json!(true), 2)
    );

    let check = common::json(&["check", &mixed, "--model", &fixture.model]);
    assert!(check["golden_difference"].as_f64().unwrap() < 1e-4 && check["ok"] == true, "{check}");
    let eval = |adapter: &str| {
        common::json(&["eval", "--model", &fixture.model, "--data", &fixture.data, "--adapter", adapter])["loss"]
            .as_f64()
            .unwrap()
    };
    assert!(eval(&mixed) <= eval(&a).max(eval(&b)));
    let generated = common::json(&[
        "generate",
        "--model",
        &fixture.model,
        "--adapter",
        &mixed,
        "--prompt",
        "up 3",
        "--max-tokens",
        "4",
    ]);
    assert!(generated["tokens"].as_u64().unwrap() > 0);
    let plan =
        |more: &[&str]| common::json(&[&["plan", "--model", &fixture.model, "--data", &fixture.data], more].concat());
    let (mixture, lora) = (plan(&own), plan(&["--rank", "5"]));
    assert!(mixture["flops"].as_f64().unwrap() > 1.4 * lora["flops"].as_f64().unwrap());
    assert_eq!(mixture["trainable_parameters"], 33 * 28);

    let error = |arguments: &[&str]| common::error(arguments);
    let out = fixture.path("out");
    let merge = error(&["merge", "--model", &fixture.model, "--adapter", &mixed, "--output", &out]);
    assert!(merge.contains("no fixed weight does, so it cannot be merged"), "{merge}");
    for to in ["lora", "gguf", "kohya"] {
        let convert = error(&["convert", &mixed, "--to", to, "--model", &fixture.model, "--output", &out]);
        assert!(convert.contains("no fixed weight does"), "{convert}");
    }
    assert!(
        error(&["eval", "--model", &fixture.model, "--data", &fixture.data, "--adapter", &format!("{mixed}=0.5")])
            .contains("alone and at weight 1")
    );
    let none = error(&fixture.train(&out, &["--method", "xlora"]));
    assert!(none.contains("at least one with --adapter"), "{none}");
    let wrong = error(&fixture.train(&out, &["--adapter", &a]));
    assert!(wrong.contains("`lora` is not made of other adapters"), "{wrong}");
    let galore = error(&fixture.train(&out, &[&own[..], &["--optimizer", "galore"]].concat()));
    assert!(galore.contains("belongs to no projection"), "{galore}");
    let nested = error(&fixture.train(&out, &["--method", "xlora", "--adapter", &mixed]));
    assert!(nested.contains("XLORA"), "{nested}");
}

/// A run that is stopped and goes on gives the bytes of one that is not, dropout in the head included.
#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let base = Base::open(&goldens("tiny-llama"), &OpenOptions::default()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let data =
        examples(&[vec![3, 70, 9, 31, 11, 12, 99], vec![3, 70, 8, 200], vec![4, 5, 39, 21, 7], vec![80, 81, 82, 83]]);
    let parts: Vec<Part> = (0..3)
        .map(|i| StoredAdapter::read(&case("experts").join(i.to_string())).unwrap().into_part().unwrap())
        .collect();
    let run = |folder: &str, stop_at: Option<usize>, resume: bool| {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let session = Session {
            base: &base,
            base_name: "tiny",
            train: &data,
            eval: &[],
            settings: TrainSettings { max_steps: Some(6), batch_size: 2, learning_rate: 1e-2, ..Default::default() },
            start: None,
            output: out.path().join(folder),
            save_steps: None,
            save_limit: 1,
            resume,
            overwrite: false,
            data_names: vec![],
            stop: &stop,
        };
        let settings = json!({ "layerwise_scalings": true, "xlora_depth": 3, "xlora_size": 8 });
        let mut method = methods::build("xlora", settings.as_object().unwrap()).unwrap();
        method.take_parts(&parts).unwrap();
        let (outcome, _) = session
            .run(method, |event| {
                if let lorimer::train::Event::Step { record, .. } = event {
                    stop.store(Some(record.step) == stop_at, std::sync::atomic::Ordering::Relaxed);
                }
            })
            .unwrap();
        assert_eq!(outcome.interrupted, stop_at.is_some());
    };
    run("whole", None, false);
    run("parts", Some(3), false);
    run("parts", None, true);
    let bytes = |folder: &str| std::fs::read(out.path().join(folder).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("whole") == bytes("parts"));
}
