//! A tiny model in memory, with rows for it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::{Adapter, methods};
use lorimer_model::decoder::config::DecoderConfig;
use lorimer_model::weights::{LoadDtype, Weights};
use lorimer_model::{Adaptation, BaseModel, Batch, Decoder};
use lorimer_train::Example;
use lorimer_train::calibrate::{Data, calibrate};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

pub fn random(shape: &[usize], scale: f64, rng: &mut impl Rng) -> Tensor {
    let n = shape.iter().product();
    let data: Vec<f64> = (0..n).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// A tiny model with biases, in f64.
pub fn model() -> Decoder {
    model_as(DType::F64, LoadDtype::Stored)
}

/// The same, computing in another type, its weights kept in another way.
pub fn model_as(dtype: DType, load: LoadDtype) -> Decoder {
    model_sized(dtype, load, (16, 20))
}

/// The same in other widths, (hidden, intermediate): kernels take other ways from 128 columns on.
pub fn model_sized(dtype: DType, load: LoadDtype, sizes: (usize, usize)) -> Decoder {
    made(dtype, load, sizes, 1.0)
}

/// In f64, the weights of its attention so many times as large: at 2 a change of query or key counts as any other does.
pub fn model_with_attention(factor: f64) -> Decoder {
    made(DType::F64, LoadDtype::Stored, (16, 20), factor)
}

fn made(dtype: DType, load: LoadDtype, (hidden, intermediate): (usize, usize), attention: f64) -> Decoder {
    let json = json!({
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    let config = DecoderConfig::from_json(&json, Path::new("config.json")).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize], scale: f64| {
        let t = random(shape, scale, &mut rng);
        let t = if name.ends_with("norm.weight") { (t + 1.0).unwrap() } else { t };
        tensors.insert(name, t.to_dtype(dtype).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[40, hidden], 1.0);
    put("lm_head.weight".into(), &[40, hidden], 0.5);
    put("model.norm.weight".into(), &[hidden], 0.2);
    for i in 0..2 {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        for (name, out, inp, bias) in [
            ("self_attn.q_proj", hidden, hidden, true),
            ("self_attn.k_proj", hidden / 2, hidden, true),
            ("self_attn.v_proj", hidden / 2, hidden, true),
            ("self_attn.o_proj", hidden, hidden, false),
            ("mlp.gate_proj", intermediate, hidden, false),
            ("mlp.up_proj", intermediate, hidden, false),
            ("mlp.down_proj", hidden, intermediate, false),
        ] {
            let scale = if name.starts_with("self_attn") { 0.4 * attention } else { 0.4 };
            put(at(&format!("{name}.weight")), &[out, inp], scale);
            if bias {
                put(at(&format!("{name}.bias")), &[out], 0.3);
            }
        }
        put(at("input_layernorm.weight"), &[hidden], 0.2);
        put(at("post_attention_layernorm.weight"), &[hidden], 0.2);
    }
    Decoder::load(config, &Weights::from_memory(tensors).kept_as(load)).unwrap()
}

pub fn examples() -> Vec<Example> {
    let row = |tokens: &[u32]| Example {
        tokens: tokens.to_vec(),
        supervised: tokens.iter().map(|t| *t > 5).collect(),
        answer: None,
    };
    vec![row(&[1, 7, 9, 3, 11, 12]), row(&[2, 30, 8]), row(&[4, 5, 39, 21, 7])]
}

pub fn logits(model: &dyn BaseModel, adaptation: &dyn Adaptation) -> Tensor {
    let rows = examples();
    let batch = Batch::pack(rows.iter().map(|e| e.tokens.as_slice()));
    model.logits(&model.hidden(&batch, adaptation).unwrap(), adaptation).unwrap()
}

pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

pub fn attach(model: &dyn BaseModel, name: &str, settings: &str) -> Adapter {
    let Value::Object(settings) = serde_json::from_str(settings).unwrap() else { panic!("settings") };
    let method = methods::build(name, &settings).unwrap();
    let rows = examples();
    let data = Data { rows: rows.iter().collect(), base: String::new(), cache: None };
    let stats = calibrate(model, method.as_ref(), &data, |_, _| {}).unwrap();
    Adapter::attach_calibrated(model, method, &stats, 3).unwrap()
}

/// Moves every trainable parameter, so that the adapter does something. Masks lose their first half.
pub fn move_all(adapter: &Adapter) {
    for mask in adapter.named().into_iter().filter(|p| p.name.ends_with("lora_mask")) {
        let n = mask.var.dim(0).unwrap();
        let kept: Vec<f64> = (0..n).map(|i| if i < n / 2 { 0.0 } else { 1.0 }).collect();
        let kept = Tensor::from_vec(kept, n, &Device::Cpu).unwrap().to_dtype(mask.var.dtype()).unwrap();
        mask.var.set(&kept).unwrap();
    }
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(8);
    for (_, var) in adapter.trainable() {
        let moved = random(var.dims(), 0.2, &mut rng).to_dtype(var.dtype()).unwrap();
        let moved = (var.as_tensor() + moved).unwrap();
        var.set(&moved).unwrap();
    }
}
