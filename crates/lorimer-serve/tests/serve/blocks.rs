//! Attention seen, replaced and given other keys; a layer after it (Sparse-GIN): trained, decoded, saved, served.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::tiny::{attach, distance, examples, logits, model, move_all};
use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::algebra::switch::Entries;
use lorimer_adapter::file::convert::low_ranks;
use lorimer_adapter::file::export::to_lora;
use lorimer_adapter::file::inspect::inspect;
use lorimer_adapter::training::AdamWConfig;
use lorimer_model::weights::LoadDtype;
use lorimer_model::{AttentionCall, BlockScope, KvCache, Point};
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, Hosted};
use lorimer_tensor::{Gradients, Ops, Segment, Tape};
use lorimer_train::run::step::batch_loss;
use serde_json::json;

use crate::prelude::*;
use crate::requests::{answered, greedy, logits_of, request};
use crate::tiny;

const CAUSAL: &str = r#"{"gin_dim": 6, "gin_scale": "0.4:0.6"}"#;
const REFERENCE: &str = r#"{"gin_dim": 6, "gin_scale": "0.4:0.6", "direction": "reference"}"#;
const DROPPED: &str = r#"{"gin_dim": 6, "gin_scale": "0.4:0.6", "first_token": "drop", "input": "normed"}"#;

fn moved(model: &dyn BaseModel, settings: &str) -> Adapter {
    let adapter = attach(model, "sparse-gin", settings);
    move_all(&adapter);
    adapter
}

fn set(adapter: &Adapter, key: &str, value: f64) {
    for (_, var) in adapter.trainable().into_iter().filter(|(name, _)| name.ends_with(key)) {
        var.set(&(var.ones_like().unwrap() * value).unwrap()).unwrap();
    }
}

#[test]
fn with_scale_zero_it_is_the_base_bit_for_bit() {
    let model = model();
    for settings in [CAUSAL, REFERENCE, DROPPED] {
        let adapter = moved(&model, settings);
        assert!(distance(&logits(&model, &Attached::one(&adapter)), &logits(&model, &Frozen)) > 1e-3);
        assert!(adapter.has_effect(&model).unwrap());
        set(&adapter, ".scale", 0.0);
        assert_eq!(distance(&logits(&model, &Attached::one(&adapter)), &logits(&model, &Frozen)), 0.0);
        assert!(!adapter.has_effect(&model).unwrap());
    }
    // The start is not the base, unless its scale says so; then the scale alone has a gradient.
    let start = attach(&model, "sparse-gin", r#"{"gin_dim": 6}"#);
    assert!(distance(&logits(&model, &Attached::one(&start)), &logits(&model, &Frozen)) > 1e-3);
    let still = attach(&model, "sparse-gin", r#"{"gin_dim": 6, "gin_scale": [0, 0]}"#);
    let rows = examples();
    let (loss, ..) = batch_loss(&model, &Attached::one(&still), &rows.iter().collect::<Vec<_>>()).unwrap();
    let found = loss.backward().unwrap();
    for (name, var) in still.trainable() {
        let size = found.get(var).map_or(0.0, |g| distance(g, &g.zeros_like().unwrap()));
        assert_eq!(size > 0.0, name.ends_with(".scale"), "{name}: {size}");
    }
}

/// A change of a token changes what comes after it and nothing before. Of `reference` with frozen attention nothing but the token itself is read.
#[test]
fn no_token_sees_a_later_one() {
    let model = model();
    let tokens = [1, 7, 9, 3, 11, 12, 30, 4, 22, 8, 2, 17];
    for settings in [CAUSAL, REFERENCE, DROPPED] {
        let adapter = moved(&model, settings);
        let on = Attached::one(&adapter);
        let before = logits_of(&model, &on, &tokens);
        for t in [0, 4, 11] {
            let mut other = tokens;
            other[t] = 5;
            let after = logits_of(&model, &on, &other);
            if t > 0 {
                assert_eq!(distance(&before.narrow(0, 0, t).unwrap(), &after.narrow(0, 0, t).unwrap()), 0.0);
            }
            assert!(distance(&before.narrow(0, t, 1).unwrap(), &after.narrow(0, t, 1).unwrap()) > 1e-3);
        }
    }
}

/// Cached decoding, in parts of several sizes and after tokens were taken back, gives what the whole forward gives.
#[test]
fn decoding_with_a_cache_is_the_whole_forward() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + i * i) % 40).collect();
    for settings in [CAUSAL, REFERENCE, DROPPED] {
        let adapter = moved(&model, settings);
        let on = Attached::one(&adapter);
        let whole = logits_of(&model, &on, &tokens).to_dtype(DType::F64).unwrap();
        let mut cache = KvCache::default();
        let step = |cache: &mut KvCache, span: std::ops::Range<usize>| {
            let hidden = model.hidden_cached(&tokens[span.clone()], cache, &on).unwrap();
            let found = model.logits(&hidden, &on).unwrap().to_dtype(DType::F64).unwrap();
            let d = distance(&found, &whole.narrow(0, span.start, span.len()).unwrap());
            assert!(d < 1e-5, "{settings} {span:?}: {d:e}");
        };
        for span in [0..11, 11..12, 12..13, 13..30, 30..31] {
            step(&mut cache, span);
        }
        cache.truncate(12).unwrap();
        assert_eq!(cache.len(), 12);
        for span in [12..13, 13..20, 20..40] {
            step(&mut cache, span);
        }
        cache.truncate(0).unwrap();
        step(&mut cache, 0..3);
    }
    // A cache that was begun without the adapter lacks what it keeps.
    let adapter = moved(&model, CAUSAL);
    let mut cache = KvCache::default();
    model.hidden_cached(&tokens[..5], &mut cache, &Frozen).unwrap();
    let problem = model.hidden_cached(&tokens[5..6], &mut cache, &Attached::one(&adapter)).unwrap_err().to_string();
    assert!(problem.contains("empty cache"), "{problem}");
}

/// The last block is computed whole for a layer that reads other rows: losses and gradients of the trainer's step are held by the laws; here that the rows
/// which count are not fewer than it reads.
#[test]
fn a_layer_that_reads_other_rows_refuses_some_of_them() {
    let model = model();
    let on_some = |adapter: &Adapter| {
        let tokens = [1, 7, 9, 3];
        let batch = Batch::pack([tokens.as_slice()]);
        let on = Attached::one(adapter);
        let layout = model.layout(&batch.positions, &batch.segments, Some(&[1, 3]));
        let h = model.embed(&batch.tokens, &batch.positions, &on).unwrap();
        let h = lorimer_model::run_blocks(&model, h, 0..2, &layout, &on, None, |_, _| {})?;
        let whole = model.hidden(&batch, &on)?.index_select(&Tensor::new(&[1u32, 3], &Device::Cpu)?, 0)?;
        Ok::<f64, candle_core::Error>(distance(&model.end(&h, &on)?, &whole))
    };
    assert!(on_some(&moved(&model, CAUSAL)).unwrap_err().to_string().contains("all rows"));
    assert!(on_some(&moved(&model, REFERENCE)).unwrap() < 1e-12);
    assert!(Attached::one(&moved(&model, CAUSAL)).reads_other_rows());
    assert!(!Attached::one(&moved(&model, REFERENCE)).reads_other_rows());
}

/// A few blocks only: the others are the base's, the frozen ones below may be cached, and the file has these blocks.
#[test]
fn blocks_are_chosen() {
    let model = model();
    let settings = r#"{"gin_dim": 6, "layers_to_transform": [1]}"#;
    let adapter = moved(&model, settings);
    let on = Attached::one(&adapter);
    assert_eq!(adapter.blocks().map(|(block, _)| block.layer).collect::<Vec<_>>(), [1]);
    assert_eq!(lorimer_train::run::frozen::frozen_layers(&model, &on), 1);
    assert_eq!(lorimer_train::run::frozen::frozen_layers(&model, &Attached::one(&moved(&model, CAUSAL))), 0);
    let stored = adapter.to_stored("tiny").unwrap();
    assert!(stored.tensors.keys().all(|name| name.starts_with("base_model.model.model.layers.1.sparse_gin.")));
    assert_eq!(stored.tensors.len(), 12);
    let again = Adapter::load_whole(&model, &stored).unwrap();
    assert_eq!(distance(&logits(&model, &Attached::one(&again)), &logits(&model, &on)), 0.0);
    let report = inspect(&moved(&model, CAUSAL).to_stored("tiny").unwrap()).unwrap();
    let names: Vec<&str> = report.modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["model.layers.0.sparse_gin", "model.layers.1.sparse_gin"]);
    assert_eq!(report.parameters, 2 * (2 * 16 * 6 + 2 * 36 + 3 * 6 + 2 * 16 + 3));
    assert!(report.modules[0].remarks["lambda"] > 0.1);
    let none = methods::build("sparse-gin", json!({ "layers_to_transform": [9] }).as_object().unwrap()).unwrap();
    let problem = Adapter::attach(&model, none, 0).err().expect("refused").to_string();
    assert!(problem.contains("2 layers"), "{problem}");
}

/// What cannot be done with it is refused in one sentence that names it, and a file that is not whole is not used.
#[test]
fn what_cannot_be_done_is_refused() {
    let model = model();
    let adapter = moved(&model, CAUSAL);
    let stored = adapter.to_stored("tiny").unwrap();
    let says = |problem: String, what: &str| {
        assert!(problem.contains("sparse-gin") && problem.contains(what) && !problem.contains('\n'), "{problem}");
    };
    says(to_lora(&model, &adapter, None, "tiny").expect_err("refused").to_string(), "written as a LoRA");
    says(low_ranks(&stored).expect_err("refused").to_string(), "converted");
    says(Entries::of(&model, &adapter).expect_err("refused").to_string(), "switched");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-phi3");
    let out = tempfile::tempdir().unwrap();
    let merged = merge_to_folder(&base, &[(stored.clone(), 1.0)], &out.path().join("m"), LoadDtype::F32, |_| {});
    says(merged.expect_err("refused").to_string(), "merged");
    let lora = attach(&model, "lora", r#"{"r": 2}"#);
    says(Attached::weighted(vec![(&adapter, 1.0), (&lora, 1.0)]).err().expect("refused").to_string(), "alone");
    says(Attached::weighted(vec![(&adapter, 0.5)]).err().expect("refused").to_string(), "weight 1");
    for kind in ["galore", "lora-pro"] {
        let kind = kind.parse().unwrap();
        says(
            lorimer_train::run::optimize::build(&kind, AdamWConfig::default(), &model, &adapter)
                .err()
                .expect("refused")
                .to_string(),
            "",
        );
    }
    let fails = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut other = stored.clone();
        change(&mut other.tensors);
        Adapter::load_whole(&model, &other).err().expect("refused").to_string()
    };
    let name = |rest: &str| format!("base_model.model.model.layers.0.sparse_gin.{rest}");
    let missing = fails(&|t| drop(t.remove(&name("eps"))));
    assert!(missing.contains("sparse_gin.eps` is missing"), "{missing}");
    let block = fails(&|t| t.retain(|key, _| !key.contains("layers.0")));
    assert!(block.contains("no tensors") && block.contains("layers.0.sparse_gin"), "{block}");
    let extra = fails(&|t| drop(t.insert(name("fc3.weight"), Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap())));
    assert!(extra.contains("fc3"), "{extra}");
    let beyond = fails(&|t| {
        let other = t[&name("eps")].clone();
        t.insert("base_model.model.model.layers.7.sparse_gin.eps".into(), other);
    });
    assert!(beyond.contains("layers.7"), "{beyond}");
    let shape =
        fails(&|t| drop(t.insert(name("in.weight"), Tensor::zeros((6, 15), DType::F64, &Device::Cpu).unwrap())));
    assert!(shape.contains("[6, 15]"), "{shape}");
    let mut other = stored.clone();
    other.config.insert("gnn_mode".into(), "per_head".into());
    let problem = Adapter::load_whole(&model, &other).err().expect("refused").to_string();
    assert!(problem.contains("gnn_mode"), "{problem}");
}

/// In the engine, prompts in parts beside the base's and another adapter's rows, from the prefix cache and after a full pool took pages back, every
/// sequence gives the tokens that it gives alone. What a layer keeps takes pages of its own: as many as its width asks for.
#[test]
fn it_is_served_in_the_batch() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let tokens: Vec<u32> = (0..36).map(|i| (i * 7 + i * i) % 40).collect();
    // A page has 2 · 16 · 8 numbers: rows of 6 take one for 16 tokens, rows of 37 three.
    let wide = r#"{"gin_dim": 37, "gin_scale": "0.4:0.6", "layers_to_transform": [1]}"#;
    for (settings, pages) in [(CAUSAL, 2), (REFERENCE, 0), (DROPPED, 2), (wide, 3)] {
        let adapter = moved(&model, settings);
        let other = attach(&model, "lora", r#"{"r": 3}"#);
        move_all(&other);
        let host = |adapter: &Adapter, id: &str| Arc::new(Hosted::new(&model, adapter, id.into(), None).unwrap());
        let (one, two) = (host(&adapter, "sha256:one"), host(&other, "sha256:two"));
        let policy = Policy { batch_tokens: 9, ..Default::default() };
        let geometry = Engine::new(&model, EngineSettings::default()).unwrap().geometry();
        assert_eq!(one.pages_per_block(geometry), pages, "{settings}");
        for pool in [60, 22] {
            let settings = EngineSettings {
                pool_bytes: pool * geometry.page_bytes(),
                policy: policy.clone(),
                ..Default::default()
            };
            let mut engine = Engine::new(&model, settings).unwrap();
            let lengths = [33, 20, 17, 21, 3, 33];
            let asked = |i: usize| {
                let with = [Some(&one), None, Some(&one), Some(&two), Some(&one), None][i % 6];
                let adapters = with.map(|hosted| (hosted.clone(), 1.0)).into_iter().collect();
                request(tokens[..lengths[i % 6]].to_vec(), adapters, 9)
            };
            let answers = answered(&mut engine, &(0..12).map(asked).collect::<Vec<_>>(), 6);
            let count = answers.iter().flatten().count();
            assert!(count == 12 || (pool < 60 && count > 6), "{count}");
            for (i, found) in answers.into_iter().enumerate().filter_map(|(i, found)| Some((i % 6, found?))) {
                let (one, two) = (Attached::one(&adapter), Attached::one(&other));
                let on: [&dyn Adaptation; 6] = [&one, &Frozen, &one, &two, &one, &Frozen];
                let expected = greedy(&model, on[i], &tokens[..lengths[i]], 9);
                assert_eq!(found, expected, "request {i} of {pool} pages");
            }
        }
    }
}

/// Keys and values of its own before every sequence's (as prefix tuning has them), and where `average` is set attention that looks at no key: the
/// average of the values so far.
struct Prefix {
    keys: Vec<Var>,
    values: Vec<Var>,
    average: bool,
}

struct OnTape<'a>(&'a Prefix, Option<&'a Tape>);

impl Adaptation for OnTape<'_> {
    fn ops(&self) -> Ops<'_> {
        self.1.map_or(Ops::plain(), Ops::recorded)
    }

    fn attend(&self, _: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> candle_core::Result<Tensor> {
        let (i, ops) = (block.layer(), self.ops());
        if self.0.average {
            // One head's values of a query's keys, averaged; in the places of all heads that share them.
            let mut rows = Vec::new();
            let (heads, kv) = (call.q.dim(1)? / call.form.head_dim, call.v.dim(1)? / call.form.head_dim);
            for s in call.segments {
                let all = call.v.narrow(0, s.keys[0].0, s.keys[0].1)?;
                for row in 0..s.q_len {
                    let mean = all.narrow(0, 0, all.dim(0)? - s.q_len + row + 1)?.mean(0)?;
                    let mean = mean.reshape((kv, 1, call.form.head_dim))?;
                    rows.push(mean.repeat((1, heads / kv, 1))?.reshape((1, heads * call.form.head_dim))?);
                }
            }
            return Tensor::cat(&rows, 0);
        }
        let (k, v) = (self.0.keys[i].as_tensor(), self.0.values[i].as_tensor());
        let own = k.dim(0)?;
        let shifted = |s: &Segment| Segment {
            keys: std::iter::once((0, own)).chain(s.keys.iter().map(|&(at, n)| (at + own, n))).collect(),
            ..s.clone()
        };
        let segments: Vec<Segment> = call.segments.iter().map(shifted).collect();
        let k = ops.subgraph(&[&call.k], &[k], |t| Tensor::cat(&[k, &t[0]], 0))?;
        let v = ops.subgraph(&[&call.v], &[v], |t| Tensor::cat(&[v, &t[0]], 0))?;
        AttentionCall { q: call.q, k, v, segments: &segments, form: call.form }.run(ops)
    }
}

/// Attention given other keys and values, and replaced whole, in training (gradients equal central differences, recorded and not) and in decoding.
#[test]
fn attention_is_given_other_keys_and_is_replaced() {
    let model = model();
    let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(4);
    let mut some =
        || -> Vec<Var> { (0..2).map(|_| Var::from_tensor(&tiny::random(&[3, 8], 1.0, &mut rng)).unwrap()).collect() };
    let mut prefix = Prefix { keys: some(), values: some(), average: false };
    let tokens = [1, 7, 9, 3, 11, 12, 30];
    let decoded = |prefix: &Prefix| {
        let on = OnTape(prefix, None);
        let whole = logits_of(&model, &on, &tokens);
        let mut cache = KvCache::default();
        let parts = [&tokens[..3], &tokens[3..4], &tokens[4..]];
        let parts: Vec<Tensor> = parts.iter().map(|part| model.hidden_cached(part, &mut cache, &on).unwrap()).collect();
        let found = model.logits(&Tensor::cat(&parts, 0).unwrap(), &on).unwrap();
        assert!(distance(&found, &whole) < 1e-12);
        assert!(distance(&whole, &logits_of(&model, &Frozen, &tokens)) > 1e-3);
        whole
    };
    let before = decoded(&prefix);
    let seed = tiny::random(&[7, 40], 1.0, &mut <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(9));
    let value = || {
        let y = logits_of(&model, &OnTape(&prefix, None), &tokens);
        (y * &seed).unwrap().sum_all().unwrap()
    };
    let found = value().backward().unwrap();
    let vars: Vec<&Var> = prefix.keys.iter().chain(&prefix.values).collect();
    let tape = Tape::new(vars.iter().map(|v| v.as_tensor()));
    let y = logits_of(&model, &OnTape(&prefix, Some(&tape)), &tokens);
    assert!(distance(&y, &before) < 1e-12);
    let mut recorded = Gradients::default();
    tape.backward(&y, seed.clone(), &mut recorded).unwrap();
    for (i, var) in vars.iter().enumerate() {
        let g = found.get(var).unwrap();
        assert!(distance(recorded.get(var).unwrap(), g) < 1e-10);
        let direction =
            tiny::random(&[3, 8], 1.0, &mut <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(i as u64));
        let here = var.as_tensor().copy().unwrap();
        let at = |h: f64| {
            var.set(&(&here + (&direction * h).unwrap()).unwrap()).unwrap();
            value().to_scalar::<f64>().unwrap()
        };
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        var.set(&here).unwrap();
        let along = (g * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((numeric - along).abs() < 1e-6 * (1.0 + along.abs()), "{numeric} against {along}");
    }
    prefix.average = true;
    assert!(distance(&decoded(&prefix), &before) > 1e-3);
}
