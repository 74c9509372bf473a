//! PEFT's own numbers (see tests/goldens/make.py), on tiny models and on the real one.

use std::path::Path;

use candle_core::Tensor;
use lorimer_adapter::file::dialects::KOHYA;
use lorimer_adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer_model::pull::{PullOptions, pull};
use lorimer_train::run::step::batch_loss;
use serde_json::Value;

use crate::goldens::*;
use crate::prelude::*;

/// Adapters that PEFT wrote with nothing but numbers to compare: all folders but the two that have tests of their own.
fn cases() -> Vec<String> {
    let folders = std::fs::read_dir(folder("adapters")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = folders.filter(|name| !matches!(name.as_str(), "smollm2" | "eva")).collect();
    names.sort();
    assert!(names.len() >= 16);
    names
}

/// The base of a case.
fn base_of(case: &str) -> String {
    let config = json(&folder(&format!("adapters/{case}")).join("adapter_config.json"));
    config["base_model_name_or_path"].as_str().unwrap().to_string()
}

fn adapter(model: &dyn BaseModel, case: &str) -> (Adapter, Golden) {
    let name = format!("adapters/{case}");
    let stored = StoredAdapter::read(&folder(&name)).unwrap();
    (Adapter::load_whole(model, &stored).unwrap(), Golden::open(&name))
}

fn rows(golden: &Golden) -> Vec<Example> {
    let row = |tokens: Vec<u32>| Example { supervised: vec![true; tokens.len()], tokens, answer: None };
    golden.tokens().into_iter().map(row).collect()
}

#[test]
fn forward_and_gradients_equal_peft() {
    for case in cases() {
        let model = tiny(&base_of(&case));
        let (adapter, golden) = adapter(&model, &case);
        let attached = Attached::one(&adapter);
        let d = distance(&logits(&model, &attached, &golden.tokens()), &golden.get("logits"));
        assert!(d < 2e-4, "{case}: logits differ by {d:e}");
        let rows = rows(&golden);
        let (sum, n, _) = batch_loss(&model, &attached, &rows.iter().collect::<Vec<_>>()).unwrap();
        let grads = (sum / n as f64).unwrap().backward().unwrap();
        let mut compared = 0;
        for (name, var) in adapter.trainable() {
            let expected = golden.get(&format!("grad.{}", name.trim_end_matches(".weight")));
            let d = distance(grads.get(var.as_tensor()).unwrap(), &expected);
            assert!(d < 1e-4, "{case}: the gradient of {name} differs by {d:e}");
            compared += 1;
        }
        assert_eq!(compared, golden.0.names().iter().filter(|n| n.starts_with("grad.")).count(), "{case}");
    }
}

#[test]
fn ten_steps_and_the_merge_equal_peft() {
    for case in cases() {
        let model = tiny(&base_of(&case));
        let (adapter, golden) = adapter(&model, &case);
        let attached = Attached::one(&adapter);
        let rows = rows(&golden);
        let rows: Vec<&Example> = rows.iter().collect();
        let parameters = adapter.trainable();
        let mut optimizer = AdamW::new(AdamWConfig { weight_decay: 0.01, ..Default::default() }, false);
        for (step, expected) in golden.get("losses").to_vec1::<f32>().unwrap().into_iter().enumerate() {
            let (sum, n, _) = batch_loss(&model, &attached, &rows).unwrap();
            let loss = (sum / n as f64).unwrap();
            let grads = loss.backward().unwrap();
            let gradients: Vec<_> = parameters.iter().map(|(_, v)| grads.get(v.as_tensor()).cloned()).collect();
            optimizer.step(&parameters, &gradients, 1e-2).unwrap();
            let d = f64::from(loss.to_scalar::<f32>().unwrap() - expected).abs();
            assert!(d < 1e-4, "{case}: the loss of step {step} differs by {d:e}");
        }
        let d = distance(&logits(&model, &attached, &golden.tokens()), &golden.get("trained_logits"));
        assert!(d < 5e-3, "{case}: trained logits differ by {d:e}");
        // Merged through files: the folder that `merge` writes, loaded again.
        let out = tempfile::tempdir().unwrap();
        let stored = adapter.to_stored(&base_of(&case)).unwrap();
        let merged = out.path().join("merged");
        lorimer_adapter::algebra::merge::merge_to_folder(
            &folder(&base_of(&case)),
            &[(stored, 1.0)],
            &merged,
            LoadDtype::F32,
            |_| {},
        )
        .unwrap();
        let (config, weights) = lorimer_model::base::open_weights(&merged, LoadDtype::F32).unwrap();
        let again = config.load(&weights).unwrap();
        let d = distance(&logits(again.as_ref(), &Frozen, &golden.tokens()), &golden.get("merged_logits"));
        assert!(d < 5e-3, "{case}: merged logits differ by {d:e}");
        let own =
            distance(&logits(again.as_ref(), &Frozen, &golden.tokens()), &logits(&model, &attached, &golden.tokens()));
        assert!(own < 2e-4, "{case}: merged and unmerged differ by {own:e}");
    }
}

/// A base on disk with adapters merged into it, loaded again.
fn merged(base: &str, adapters: &[(StoredAdapter, f64)]) -> lorimer_adapter::Result<Decoder> {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("merged");
    lorimer_adapter::algebra::merge::merge_to_folder(&self::folder(base), adapters, &folder, LoadDtype::F32, |_| {})?;
    let (config, weights) = lorimer_model::base::open_weights(&folder, LoadDtype::F32).unwrap();
    Ok(Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap())
}

/// An adapter whose every parameter is moved.
fn moved(model: &dyn BaseModel, method: &str, settings: Value, seed: u64) -> Adapter {
    let method = methods::build(method, settings.as_object().unwrap()).unwrap();
    let adapter = Adapter::attach(model, method, seed).unwrap();
    for (_, var) in adapter.trainable() {
        let noise = Tensor::randn(0f32, 0.1, var.dims(), &candle_core::Device::Cpu).unwrap();
        var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
    }
    adapter
}

/// What one adapter brings whole takes the place of the base's, and every change is added to it, of the same adapter or another: in
/// the forward, merged, and as a plain LoRA.
#[test]
fn changes_are_added_to_whole_weights() {
    let rows = vec![vec![5, 77, 200, 31, 8], vec![100, 9]];
    for base in ["tiny-llama", "tiny-qwen2"] {
        let model = tiny(base);
        let whole = moved(&model, "lora", serde_json::json!({ "r": 2, "modules_to_save": ["lm_head"] }), 1);
        for (method, settings) in [
            ("lora", serde_json::json!({ "r": 2, "target_modules": ["lm_head", "k_proj"] })),
            ("dora", serde_json::json!({ "r": 2, "target_modules": ["lm_head"] })),
            ("randlora", serde_json::json!({ "r": 8, "target_modules": ["lm_head"] })),
            ("shira", serde_json::json!({ "r": 2, "target_modules": ["lm_head", "q_proj"] })),
        ] {
            let change = moved(&model, method, settings, 2);
            let both = Attached::weighted(vec![(&whole, 1.0), (&change, 0.5)]).unwrap();
            let expected = logits(&model, &both, &rows);
            for reverse in [false, true] {
                let mut stored = [(whole.to_stored(base).unwrap(), 1.0), (change.to_stored(base).unwrap(), 0.5)];
                if reverse {
                    stored.reverse();
                }
                let d = distance(&logits(&merged(base, &stored).unwrap(), &Frozen, &rows), &expected);
                assert!(d < 2e-4, "{base}, {method} beside a whole head: {d:e}");
            }
        }
    }
    // In one adapter: PEFT's files of an adapted head.
    for case in ["head", "head_moved_dora"] {
        let model = tiny("tiny-llama");
        let (adapter, golden) = adapter(&model, case);
        let (lora, _) = lorimer_adapter::file::export::to_lora(&model, &adapter, Some(64), "tiny-llama").unwrap();
        let again = Adapter::load_whole(&model, &lora).unwrap();
        let d = distance(&logits(&model, &Attached::one(&again), &golden.tokens()), &golden.get("logits"));
        assert!(d < 2e-4, "{case} as a LoRA: {d:e}");
        // `inspect` counts the head's own weight with the head.
        let stored = StoredAdapter::read(&folder(&format!("adapters/{case}"))).unwrap();
        let report = lorimer_adapter::file::inspect::inspect(&stored).unwrap();
        assert!(report.modules.iter().all(|m| !m.name.contains("base_layer")), "{case}");
    }
}

/// Low-rank changes of the embedding, and files that are not whole, are refused by the merge as by the load.
#[test]
fn a_merge_refuses_what_a_load_refuses() {
    let model = tiny("tiny-llama");
    let stored = StoredAdapter::read(&folder("adapters/lora")).unwrap();
    let refused = |change: &dyn Fn(&mut StoredAdapter)| {
        let mut stored = stored.clone();
        change(&mut stored);
        let load = Adapter::load_whole(&model, &stored).err().expect("loaded").to_string();
        let merge = merged("tiny-llama", &[(stored, 1.0)]).err().expect("merged").to_string();
        assert_eq!(load, merge);
        load
    };
    let embedding = refused(&|s| {
        let t = s.tensors.values().next().unwrap().clone();
        s.tensors.insert("base_model.model.model.embed_tokens.lora_embedding_A".into(), t);
    });
    assert!(embedding.contains("lora_embedding_A") && embedding.contains("merge"), "{embedding}");
    let missing = refused(&|s| s.tensors.retain(|name, _| !name.contains("layers.1.mlp.up_proj")));
    assert!(missing.contains("model.layers.1.mlp.up_proj"), "{missing}");
    let unnamed = refused(&|s| drop(s.config.insert("target_modules".into(), serde_json::json!(["q_proj"]))));
    assert!(unnamed.contains("belong to no module"), "{unnamed}");
}

/// Every file of the base's text follows a merge.
#[test]
fn the_tokenizer_follows_a_merge_whole() {
    let out = tempfile::tempdir().unwrap();
    let (base, merged) = (out.path().join("base"), out.path().join("merged"));
    std::fs::create_dir_all(base.join("additional_chat_templates")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder("tiny-llama").join(name), base.join(name)).unwrap();
    }
    let files = [
        "tokenizer.model",
        "tokenizer.model.v3",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "tekken.json",
        "qwen.tiktoken",
    ];
    for name in files {
        std::fs::write(base.join(name), format!("{{\"{name}\": 1}}")).unwrap();
    }
    let others = ["pytorch_model.bin", "README.md", "tokenizer.safetensors"];
    for name in others {
        std::fs::write(base.join(name), "x").unwrap();
    }
    let adapter = StoredAdapter::read(&folder("adapters/lora")).unwrap();
    lorimer_adapter::algebra::merge::merge_to_folder(&base, &[(adapter, 1.0)], &merged, LoadDtype::F32, |_| {})
        .unwrap();
    for name in files.into_iter().chain(["tokenizer.json", "tokenizer_config.json"]) {
        assert_eq!(std::fs::read(merged.join(name)).ok(), std::fs::read(base.join(name)).ok(), "{name}");
    }
    assert!(others.iter().all(|name| !merged.join(name).exists()));
}

#[test]
fn converted_adapters_come_back_the_same() {
    let model = tiny("tiny-llama");
    let config = model.config.clone();
    for case in ["lora", "rslora", "rank_pattern"] {
        let stored = StoredAdapter::read(&folder(&format!("adapters/{case}"))).unwrap();
        let golden = Golden::open(&format!("adapters/{case}"));
        let out = tempfile::tempdir().unwrap();
        let (gguf, kohya) = (out.path().join("a.gguf"), out.path().join("a.safetensors"));
        lorimer_adapter::file::convert::write_gguf(&stored, &config, &gguf).unwrap();
        lorimer_adapter::file::convert::write_safetensors(&stored, &KOHYA, &kohya).unwrap();
        for modules in [
            lorimer_adapter::file::convert::read_gguf(&gguf, &config).unwrap(),
            lorimer_adapter::file::convert::read_safetensors(&kohya).unwrap(),
        ] {
            let again = lorimer_adapter::file::convert::to_peft(modules, "tiny-llama").unwrap();
            let adapter = Adapter::load_whole(&model, &again).unwrap();
            let d = distance(&logits(&model, &Attached::one(&adapter), &golden.tokens()), &golden.get("logits"));
            assert!(d < 2e-4, "{case}: {d:e}");
        }
    }
    let dora = StoredAdapter::read(&folder("adapters/dora")).unwrap();
    assert!(
        lorimer_adapter::file::convert::write_safetensors(&dora, &KOHYA, Path::new("x"))
            .unwrap_err()
            .to_string()
            .contains("merge")
    );
}

/// The real 135M model: its tokens, its logits, and those of an adapter that PEFT wrote for it.
#[test]
fn the_real_model_equals_transformers_and_peft() {
    let pulled = pull("smollm2-135m", PullOptions::default()).unwrap();
    let base = Base::open(&pulled.path, &OpenOptions::default()).unwrap();
    let at = folder("adapters/smollm2");
    for case in json(&at.join("texts.json")).as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = base.text.encode(text, false).unwrap().ids;
        let expected: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        assert_eq!(ids, expected, "{text:?}");
        assert_eq!(base.text.decode(&ids, true).unwrap(), text);
    }
    if pulled.path.extension().is_none_or(|e| e != "gguf") {
        // The hub's bf16 weights are not the quantised ones that the numbers were made with.
        return;
    }
    let golden = Golden::open("adapters/smollm2");
    let last = |adaptation: &dyn Adaptation| {
        let all = logits(base.model(), adaptation, &golden.tokens());
        all.get(all.dim(0).unwrap() - 1).unwrap()
    };
    let plain = distance(&last(&Frozen), &golden.get("plain"));
    assert!(plain < 1e-3, "base: {plain:e}");
    let adapter = Adapter::load_whole(base.model(), &StoredAdapter::read(&at).unwrap()).unwrap();
    let adapted = distance(&last(&Attached::one(&adapter)), &golden.get("adapted"));
    assert!(adapted < 1e-3, "adapter: {adapted:e}");

    // Blocks kept as the file has them are expanded exactly.
    let open = |path: &Path, dtype| Base::open(path, &OpenOptions { dtype, ..Default::default() }).unwrap();
    let kept = open(&pulled.path, LoadDtype::Stored);
    assert!(kept.model.bytes() < base.model().bytes() / 3);
    let logits_of = |base: &Base| {
        let all = logits(base.model(), &Frozen, &golden.tokens());
        all.get(all.dim(0).unwrap() - 1).unwrap()
    };
    let stored = distance(&logits_of(&kept), &golden.get("plain"));
    assert!(stored < 1e-3, "kept quantised: {stored:e}");

    // Merged into a GGUF of the same types: nearer to the adapted model than the plain one is, and the error is told.
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged.gguf");
    let adapters = [(StoredAdapter::read(&at).unwrap(), 8.0)];
    let report = lorimer_adapter::algebra::merge::merge_to_gguf(&pulled.path, &adapters, &merged, |_| {}).unwrap();
    assert!(report.error > 0.0 && report.error < 0.1, "{}", report.error);
    assert_eq!(open(&merged, LoadDtype::Stored).model.bytes(), kept.model.bytes());
    let requantised = logits_of(&open(&merged, LoadDtype::F32));
    let strong = last(&Attached::weighted(vec![(&adapter, 8.0)]).unwrap());
    let (to_adapted, to_plain) = (distance(&requantised, &strong), distance(&requantised, &golden.get("plain")));
    assert!(to_adapted < 0.5 * to_plain, "{to_adapted} from the adapted logits, {to_plain} from the plain ones");
}
