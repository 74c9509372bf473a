//! A model whose layers keep different numbers of heads and channels: loaded, trained, decoded, served, saved and merged.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::tiny::{attach, distance, examples, move_all};
use candle_core::{DType, Tensor};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer_model::KvCache;
use lorimer_model::base::open_weights;
use lorimer_model::weights::LoadDtype;
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, Hosted};
use lorimer_tensor::Gradients;
use lorimer_train::run::step::{StepOptions, accumulate_gradients, batch_loss};
use serde_json::{Value, json};

use crate::prelude::*;
use crate::requests::{answered, greedy, logits_of, request};
use crate::tiny;

/// A base of three layers that keep different numbers of heads and channels.
fn shaped_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let shapes = [(4, 2, 20), (2, 1, 12), (6, 3, 28)];
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 20, "vocab_size": 40,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true, "torch_dtype": "float32",
        "layer_shapes": [
            {},
            { "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12 },
            { "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 28 },
        ],
    });
    std::fs::write(folder.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(6);
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let mut put = |name: String, shape: &[usize], scale: f64, more: f64| {
        let t = (tiny::random(shape, scale, &mut rng) + more).unwrap();
        tensors.insert(name, t.to_dtype(DType::F32).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[40, 16], 1.0, 0.0);
    put("model.norm.weight".into(), &[16], 0.2, 1.0);
    for (i, (heads, kv, inner)) in shapes.into_iter().enumerate() {
        let (q, kv) = (4 * heads, 4 * kv);
        let all = [
            ("self_attn.q_proj", q, 16),
            ("self_attn.k_proj", kv, 16),
            ("self_attn.v_proj", kv, 16),
            ("self_attn.o_proj", 16, q),
        ];
        let unit = [("mlp.gate_proj", inner, 16), ("mlp.up_proj", inner, 16), ("mlp.down_proj", 16, inner)];
        for (name, outputs, inputs) in all.into_iter().chain(unit) {
            put(format!("model.layers.{i}.{name}.weight"), &[outputs, inputs], 0.5, 0.0);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{i}.{name}.weight"), &[16], 0.2, 1.0);
        }
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

/// It in memory.
pub fn shaped() -> Decoder {
    opened(shaped_folder().path(), LoadDtype::F32)
}

fn opened(path: &Path, dtype: LoadDtype) -> Decoder {
    let (config, weights) = open_weights(path, dtype).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

/// The trainer's steps on a model; the first and the last loss. The first step's gradients are held against candle's graph and central differences.
fn trained(model: &dyn BaseModel, adapter: &Adapter, rate: f64) -> (f64, f64) {
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let parameters = adapter.trainable();
    let attached = Attached::one(adapter);
    let (plain, ..) = batch_loss(model, &attached, &rows).unwrap();
    let expected = plain.backward().unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default(), false);
    let mut losses = Vec::new();
    for step in 0..60 {
        let mut found = Gradients::default();
        let options = StepOptions { checkpointing: step % 2 == 1, ..Default::default() };
        let loss = accumulate_gradients(model, &attached, &parameters, &rows, 1.0, options, None, &mut found).unwrap();
        losses.push(loss.sum);
        if step == 0 {
            for (name, var) in &parameters {
                let (a, b) = (found.get(var), expected.get(var));
                let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                let (a, b) = (wide(a.unwrap()), wide(b.unwrap()));
                let size = distance(&b, &b.zeros_like().unwrap());
                assert!(distance(&a, &b) < 2e-5 * (1.0 + size), "{name}");
            }
        }
        let gradients: Vec<_> = parameters.iter().map(|(_, v)| found.remove(v)).collect();
        optimizer.step(&parameters, &gradients, rate).unwrap();
    }
    (losses[0], losses[59])
}

/// A model whose layers differ loads, trains, decodes with a cache, is served beside its base, and is saved as an adapter and merged.
#[test]
fn layers_may_keep_different_numbers_of_heads_and_channels() {
    let folder = shaped_folder();
    let model = opened(folder.path(), LoadDtype::F32);
    let of =
        |i: usize| (model.shape().layers[i].heads, model.shape().layers[i].kv_heads, model.shape().layers[i].inner);
    assert_eq!([of(0), of(1), of(2)], [(4, 2, 20), (2, 1, 12), (6, 3, 28)]);
    let tokens = [1, 7, 9, 3, 11, 12, 30, 4, 22, 8, 2, 17];
    let decode = |on: &dyn Adaptation| {
        let whole = logits_of(&model, on, &tokens).to_dtype(DType::F64).unwrap();
        let mut cache = KvCache::default();
        let parts = [&tokens[..5], &tokens[5..6], &tokens[6..7], &tokens[7..]];
        let parts: Vec<Tensor> = parts.iter().map(|part| model.hidden_cached(part, &mut cache, on).unwrap()).collect();
        let found = model.logits(&Tensor::cat(&parts, 0).unwrap(), on).unwrap();
        assert!(distance(&found.to_dtype(DType::F64).unwrap(), &whole) < 1e-5);
        whole
    };
    for (name, settings, rate) in [
        ("lora", r#"{"r": 4}"#, 1e-2),
        ("sparse-gin", r#"{"gin_dim": 6, "gin_scale": "0.4:0.6"}"#, 1e-2),
        ("dora", r#"{"r": 4}"#, 1e-2),
    ] {
        let adapter = attach(&model, name, settings);
        move_all(&adapter);
        let (first, last) = trained(&model, &adapter, rate);
        assert!(last < 0.7 * first, "{name}: {first} to {last}");
        let trained = decode(&Attached::one(&adapter));
        let stored = adapter.to_stored("base").unwrap();
        let out = tempfile::tempdir().unwrap();
        stored.write(&out.path().join("adapter"), None).unwrap();
        let read = StoredAdapter::read(&out.path().join("adapter")).unwrap();
        let again = Adapter::load_whole(&model, &read).unwrap();
        assert_eq!(distance(&decode(&Attached::one(&again)), &trained), 0.0, "{name}");
        served(&model, &adapter, &tokens);
        if name == "sparse-gin" {
            continue;
        }
        merge_to_folder(folder.path(), &[(read, 1.0)], &out.path().join("merged"), LoadDtype::F32, |_| {}).unwrap();
        let config: Value =
            serde_json::from_slice(&std::fs::read(out.path().join("merged/config.json")).unwrap()).unwrap();
        assert_eq!(config["layer_shapes"].as_array().unwrap().len(), 3);
        let merged = opened(&out.path().join("merged"), LoadDtype::F32);
        assert_eq!(merged.shape(), model.shape());
        let d = distance(&logits_of(&merged, &Frozen, &tokens).to_dtype(DType::F64).unwrap(), &trained);
        assert!(d < 1e-4, "{name}: {d:e}");
    }
}

/// Greedy tokens of the engine, with the adapter and without in one batch, are those of the code that trains.
fn served(model: &Decoder, adapter: &Adapter, tokens: &[u32]) {
    let hosted = Arc::new(Hosted::new(model, adapter, "sha256:it".into(), None).unwrap());
    let policy = Policy { batch_tokens: 8, ..Default::default() };
    let mut engine = Engine::new(model, EngineSettings { pool_bytes: 1 << 20, policy, ..Default::default() }).unwrap();
    let asked = |i: usize| {
        let adapters = i.is_multiple_of(2).then(|| (hosted.clone(), 1.0)).into_iter().collect();
        request(tokens[..[12, 7, 3][i % 3]].to_vec(), adapters, 20)
    };
    let answers = answered(&mut engine, &(0..6).map(asked).collect::<Vec<_>>(), 3);
    for (i, found) in answers.into_iter().enumerate() {
        let found = found.unwrap();
        let attached = Attached::one(adapter);
        let on: &dyn Adaptation = if i % 2 == 0 { &attached } else { &Frozen };
        assert_eq!(found, greedy(model, on, &tokens[..[12, 7, 3][i % 3]], 20), "request {i}");
    }
}
