//! Gemma and Phi-3 against transformers' and PEFT's numbers (see tests/goldens/make_families.py), and against themselves: trained, served, merged.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use lorimer_adapter::algebra::merge::{merge_to_folder, merge_to_gguf};
use lorimer_adapter::file::convert;
use lorimer_adapter::file::dialects::KOHYA;
use lorimer_adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer_model::base::open_weights;
use lorimer_model::decoder::config::{DecoderConfig, LayerKind};
use lorimer_model::weights::{SafetensorsFile, Weights};
use lorimer_model::{Config, Point};
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::generation::generate::extend;
use lorimer_serve::{Engine, EngineSettings, Hosted};
use lorimer_tensor::Gradients;
use lorimer_train::run::step::{StepOptions, accumulate_gradients, batch_loss};
use serde_json::{Value, json};

use crate::prelude::*;
use crate::requests::{answered, request};

const TINY: [&str; 4] = ["tiny-gemma2", "tiny-gemma3", "tiny-phi3", "tiny-phi3-longrope"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

struct Golden(SafetensorsFile);

impl Golden {
    fn open(name: &str) -> Self {
        Self(SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap())
    }
    fn get(&self, name: &str) -> Tensor {
        self.0.load(name).unwrap().unwrap_or_else(|| panic!("golden `{name}`"))
    }
    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let t = self.get(name).to_dtype(DType::U32).unwrap();
        if t.dims().len() == 1 { vec![t.to_vec1().unwrap()] } else { t.to_vec2().unwrap() }
    }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    d.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

#[track_caller]
fn near(what: &str, a: &Tensor, b: &Tensor, most: f64) {
    let d = distance(a, b);
    println!("{what}: {d:.1e}");
    assert!(d < most, "{what}: {d:e}");
}

fn open(path: &Path) -> Decoder {
    let (config, weights) = open_weights(path, LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

fn tiny(name: &str) -> Decoder {
    open(&folder(name))
}

fn logits(model: &dyn BaseModel, on: &dyn Adaptation, rows: &[Vec<u32>]) -> Tensor {
    let hidden = model.hidden(&Batch::pack(rows.iter().map(Vec::as_slice)), on).unwrap();
    model.logits(&hidden, on).unwrap()
}

fn last(t: &Tensor, n: usize) -> Tensor {
    t.narrow(0, t.dim(0).unwrap() - n, n).unwrap()
}

/// Writes down hidden states.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Point, Tensor)>>);

impl Adaptation for Recorder {
    fn hidden(&self, point: Point, h: Tensor) -> candle_core::Result<Tensor> {
        self.0.lock().unwrap().push((point, h.clone()));
        Ok(h)
    }
}

#[test]
fn every_layer_computes_what_transformers_computes() {
    for name in TINY {
        let (model, golden, recorder) = (tiny(name), Golden::open(name), Recorder::default());
        near(&format!("{name} logits"), &logits(&model, &recorder, &golden.ids("tokens")), &golden.get("logits"), 2e-5);
        let mut seen = 0;
        for (point, h) in recorder.0.into_inner().unwrap() {
            let expected = match point {
                Point::Embedded => "hidden.0".to_string(),
                Point::Layer(i) => format!("hidden.{}", i + 1),
                Point::Final => "normed".to_string(),
                Point::Attended(_) => continue,
            };
            near(&format!("{name} {expected}"), &h, &golden.get(&expected), 2e-5);
            seen += 1;
        }
        assert_eq!(seen, model.shape().layers.len() + 2);
    }
}

/// Older configurations, other patterns, caps, scales and factors on the same weights.
#[test]
fn variants_of_the_configurations_compute_the_same() {
    for name in TINY {
        let golden = Golden::open(name);
        for variant in read(&folder(name).join("variants.json")).as_array().unwrap() {
            let what = format!("{name} {}", variant["name"].as_str().unwrap());
            let config = Config::from_json(&variant["config"], Path::new("config.json"));
            if variant["name"] == "attn-cap" {
                // transformers leaves it out silently.
                assert!(config.unwrap_err().to_string().contains("attn_logit_softcapping"), "{what}");
                continue;
            }
            let weights = Weights::from_folder(&folder(name), LoadDtype::F32).unwrap();
            let model = config.unwrap().load(&weights).unwrap();
            let expected = golden.get(variant["golden"].as_str().unwrap());
            let found = logits(model.as_ref(), &Frozen, &golden.ids("tokens"));
            near(&what, &last(&found, 3), &last(&expected, 3), 2e-5);
        }
    }
}

/// Configurations with much left out are read with transformers' values, or refused for a named key.
#[test]
fn configurations_are_read_as_transformers_reads_them() {
    // Which transformers reads, and here are refused: what it leaves out silently, attention in both directions, an odd number of elements.
    let ours = [(2, "rope_type"), (7, "rope_parameters"), (12, "use_bidirectional_attention"), (27, "cannot turn")];
    let mut counts = (0, 0);
    for (i, case) in read(&folder("families.json")).as_array().unwrap().iter().enumerate() {
        let found = Config::from_json(&case["config"], Path::new("config.json"));
        if let Some((_, why)) = ours.iter().find(|(at, _)| *at == i) {
            let problem = found.unwrap_err().to_string();
            assert!(problem.contains(why), "{i}: {problem}");
            continue;
        }
        if case.get("refused").is_some() && case["config"]["rope_scaling"]["type"] != "su" {
            println!("{i}: {}", found.unwrap_err());
            counts.0 += 1;
            continue;
        }
        let Ok(Config::Decoder(found)) = found else { panic!("{i}: {:?}", found.err()) };
        // The older name of LongRoPE, which transformers 5 reads only with a length inside, is what its newer name is two cases on.
        let read = if case.get("read").is_some() { case["read"].clone() } else { longrope() };
        compare(i, &found, &read);
        counts.1 += 1;
    }
    assert_eq!(counts, (6, 20));
}

/// What transformers reads of the plain LongRoPE case with the default base.
fn longrope() -> Value {
    let all = read(&folder("families.json"));
    let case = all.as_array().unwrap().iter().find(|c| c["config"]["rope_scaling"]["type"] == "yarn");
    case.unwrap()["read"].clone()
}

fn compare(i: usize, found: &DecoderConfig, read: &Value) {
    let number = |key: &str| read[key].as_f64();
    let shape = found.layers[0];
    assert_eq!(shape.head_dim as f64, number("head_dim").unwrap(), "{i}");
    assert_eq!((shape.heads as f64, shape.kv_heads as f64), (number("heads").unwrap(), number("kv_heads").unwrap()));
    assert_eq!(found.tied, read["tie_word_embeddings"].as_bool().unwrap(), "{i}");
    assert_eq!(found.rms_norm_eps, number("rms_norm_eps").unwrap(), "{i}");
    assert_eq!(found.max_positions as f64, number("max_positions").unwrap(), "{i}");
    assert_eq!((found.attention_cap, found.logit_cap), (number("score_cap"), number("final_cap")), "{i}");
    let scale = found.attention_scale.unwrap_or((shape.head_dim as f64).powf(-0.5));
    assert!((scale - number("scaling").unwrap()).abs() < 1e-12, "{i}");
    let window = number("sliding_window").map(|w| w as usize);
    let types = read["layer_types"].as_array();
    for (layer, LayerKind { rope, window: own }) in found.kinds.iter().enumerate() {
        let kind = types.map_or("all", |types| types[layer].as_str().unwrap());
        assert_eq!(*own, window.filter(|_| kind != "full_attention"), "{i}, layer {layer}");
        let expected = read["rope"].get(kind).unwrap_or(&read["rope"]["all"]);
        let turns = found.ropes[*rope].all_frequencies();
        assert!((turns.scale - expected["factor"].as_f64().unwrap()).abs() < 1e-6, "{i}");
        close(&turns.turns, &expected["frequencies"]);
        assert_eq!(turns.long.is_some(), expected.get("long").is_some(), "{i}");
        if let Some((_, long)) = turns.long {
            close(&long, &expected["long"]);
        }
    }
}

fn close(found: &[f64], expected: &Value) {
    let expected = expected.as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b.as_f64().unwrap()).abs() <= 2e-6 * a.abs(), "{a} against {b}");
    }
}

/// Greedy tokens by a cache, with the logits each was drawn from.
fn generated(model: &dyn BaseModel, on: &dyn Adaptation, prompt: &[u32], n: usize) -> (Vec<u32>, Tensor) {
    let (mut seen, mut cache, mut all) = (prompt.to_vec(), KvCache::default(), Vec::new());
    for _ in 0..n {
        let row = model.logits(&last(&extend(model, &seen, &mut cache, on).unwrap(), 1), on).unwrap();
        seen.push(row.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0]);
        all.push(row);
    }
    (seen[prompt.len()..].to_vec(), Tensor::cat(&all, 0).unwrap())
}

/// With a cache, beyond the window and over LongRoPE's border.
#[test]
fn cached_generation_is_transformers() {
    for name in TINY {
        let (model, golden) = (tiny(name), Golden::open(name));
        let (tokens, found) = generated(&model, &Frozen, &golden.ids("tokens")[0][..13], 12);
        assert_eq!(tokens, golden.ids("generated")[0], "{name}");
        near(&format!("{name} generated"), &found, &golden.get("generated_logits"), 2e-5);
    }
}

/// Each sequence has the frequencies of its own length, whatever is beside it; a cache does not go over the border.
#[test]
fn longrope_chooses_by_the_length_of_each_sequence() {
    let name = "tiny-phi3-longrope";
    let (model, golden) = (tiny(name), Golden::open(name));
    let tokens = golden.ids("tokens")[0].clone();
    let (short, long) = (tokens[..16].to_vec(), tokens[..17].to_vec());
    let both = [short.clone(), long.clone(), tokens.clone()];
    let batch = model.shape().batch(both.iter().map(Vec::as_slice));
    assert_eq!(batch.tokens.len(), 16 + 17 + 26, "what turns differently is not shared");
    let found = model.logits(&model.hidden(&batch, &Frozen).unwrap(), &Frozen).unwrap();
    let rows = |from: usize, n: usize| found.narrow(0, from, n).unwrap();
    near("16 tokens", &rows(13, 3), &golden.get("logits.16"), 2e-5);
    near("17 tokens", &rows(30, 3), &golden.get("logits.17"), 2e-5);
    near("26 tokens", &rows(33, 26), &golden.get("logits"), 2e-5);
    let mut cache = KvCache::default();
    model.hidden_cached(&short, &mut cache, &Frozen).unwrap();
    let problem = model.hidden_cached(&tokens[16..17], &mut cache, &Frozen).expect_err("refused").to_string();
    assert!(problem.contains("LongRoPE") && problem.contains("16"), "{problem}");
    model.hidden_cached(&long, &mut KvCache::default(), &Frozen).unwrap();
}

/// llama.cpp's files of the same weights: 1 added to Gemma's norms, other names, fused projections.
#[test]
fn gguf_files_give_the_same_logits() {
    for (file, name, expected) in [
        ("families-gemma3.gguf", "tiny-gemma3", "logits.scale"),
        ("families-phi3.gguf", "tiny-phi3", "logits"),
        ("families-phi3-longrope.gguf", "tiny-phi3-longrope", "logits"),
    ] {
        let golden = Golden::open(name);
        let found = logits(&open(&folder(file)), &Frozen, &golden.ids("tokens"));
        let expected = golden.get(expected);
        near(file, &last(&found, expected.dim(0).unwrap()), &expected, 2e-5);
    }
}

const CASES: [&str; 7] = ["gemma2", "gemma3", "gemma3_default", "gemma3_norms", "phi3", "phi3_dora", "phi3_longrope"];

/// The adapter of a case on its base.
fn adapted(case: &str) -> (String, Decoder, StoredAdapter, Golden) {
    let name = format!("family-adapters/{case}");
    let stored = StoredAdapter::read(&folder(&name)).unwrap();
    let base = stored.config["base_model_name_or_path"].as_str().unwrap().to_string();
    let model = tiny(&base);
    (base, model, stored, Golden::open(&name))
}

fn examples(rows: Vec<Vec<u32>>) -> Vec<Example> {
    rows.into_iter().map(|tokens| Example { supervised: vec![true; tokens.len()], tokens, answer: None }).collect()
}

/// PEFT's adapters: read, their gradients in candle's graph and on the tape, written again, ten steps, merged.
#[test]
fn adapters_are_pefts_both_ways() {
    for case in CASES {
        let (base, model, stored, golden) = adapted(case);
        let adapter = Adapter::load_whole(&model, &stored).unwrap();
        assert_eq!(adapter.to_stored(&base).unwrap().tensor_bytes().unwrap(), stored.tensor_bytes().unwrap(), "{case}");
        let attached = Attached::one(&adapter);
        let tokens = golden.ids("tokens");
        near(&format!("{case} logits"), &logits(&model, &attached, &tokens), &golden.get("logits"), 2e-5);
        let rows = examples(tokens.clone());
        let rows: Vec<&Example> = rows.iter().collect();
        let parameters = adapter.trainable();
        let (sum, n, _) = batch_loss(&model, &attached, &rows).unwrap();
        let plain = (sum / n as f64).unwrap().backward().unwrap();
        for (share_prefixes, checkpointing) in [(false, false), (true, true)] {
            let options = StepOptions { share_prefixes, checkpointing, ..Default::default() };
            let mut taped = Gradients::default();
            let scale = 1.0 / n as f64;
            accumulate_gradients(&model, &attached, &parameters, &rows, scale, options, None, &mut taped).unwrap();
            for (name, var) in &parameters {
                let expected = golden.get(&format!("grad.{}", name.trim_end_matches(".weight")));
                let graph = plain.get(var.as_tensor()).unwrap();
                assert!(distance(graph, &expected) < 2e-5, "{case} {name}: {:e}", distance(graph, &expected));
                let d = distance(taped.get(var.as_tensor()).unwrap(), &expected);
                assert!(d < 2e-5, "{case} {name} with {options:?}: {d:e}");
            }
        }
        assert_eq!(parameters.len(), golden.0.names().iter().filter(|n| n.starts_with("grad.")).count(), "{case}");
        let mut optimizer = AdamW::new(AdamWConfig { weight_decay: 0.01, ..Default::default() }, false);
        for (step, expected) in golden.get("losses").to_vec1::<f32>().unwrap().into_iter().enumerate() {
            let mut found = Gradients::default();
            let options = StepOptions::default();
            let loss =
                accumulate_gradients(&model, &attached, &parameters, &rows, 1.0 / n as f64, options, None, &mut found);
            let gradients: Vec<_> = parameters.iter().map(|(_, v)| found.get(v.as_tensor()).cloned()).collect();
            optimizer.step(&parameters, &gradients, 1e-2).unwrap();
            let d = (loss.unwrap().sum / n as f64 - f64::from(expected)).abs();
            assert!(d < 1e-4, "{case}: the loss of step {step} differs by {d:e}");
        }
        let trained = logits(&model, &attached, &tokens);
        near(&format!("{case} trained"), &trained, &golden.get("trained_logits"), 5e-3);
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        let stored = adapter.to_stored(&base).unwrap();
        merge_to_folder(&folder(&base), &[(stored, 1.0)], &merged, LoadDtype::F32, |_| {}).unwrap();
        let merged = logits(&open(&merged), &Frozen, &tokens);
        near(&format!("{case} merged"), &merged, &golden.get("merged_logits"), 5e-3);
        near(&format!("{case} merged and not"), &merged, &trained, 2e-5);
    }
}

/// Into GGUF bases: a file of the same form, and a folder whose `config.json` says what the file said.
#[test]
fn gguf_bases_are_merged_into() {
    for (file, case) in [
        ("families-gemma3.gguf", "gemma3_norms"),
        ("families-phi3.gguf", "phi3"),
        ("families-phi3-longrope.gguf", "phi3_longrope"),
    ] {
        let (_, _, stored, golden) = adapted(case);
        let model = open(&folder(file));
        let adapter = Adapter::load_whole(&model, &stored).unwrap();
        let expected = logits(&model, &Attached::one(&adapter), &golden.ids("tokens"));
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("merged.gguf");
        merge_to_gguf(&folder(file), &[(stored, 1.0)], &path, |_| {}).unwrap();
        // Matrices are of 16 bits there.
        near(&format!("{file} merged"), &logits(&open(&path), &Frozen, &golden.ids("tokens")), &expected, 1e-2);
        let config = model.config.to_json("float32");
        let again = DecoderConfig::from_json(&config, Path::new("config.json")).unwrap();
        assert_eq!(again.shape(), model.config.shape());
        assert_eq!((&again.kinds, again.frequencies()), (&model.config.kinds, model.config.frequencies()));
        assert_eq!(
            (again.activation, again.tied, again.fused),
            (model.config.activation, model.config.tied, model.config.fused)
        );
        let scale = |c: &DecoderConfig| c.attention_scale.unwrap_or(1.0);
        assert!((scale(&again) - scale(&model.config)).abs() < 1e-12);
    }
}

/// As llama.cpp's adapters and kohya's files and back.
#[test]
fn adapters_of_both_families_are_converted() {
    for case in ["gemma2", "gemma3", "phi3", "phi3_longrope"] {
        let (base, model, stored, golden) = adapted(case);
        let out = tempfile::tempdir().unwrap();
        let (gguf, kohya) = (out.path().join("a.gguf"), out.path().join("a.safetensors"));
        convert::write_gguf(&stored, &model.config, &gguf).unwrap();
        convert::write_safetensors(&stored, &KOHYA, &kohya).unwrap();
        for modules in [convert::read_gguf(&gguf, &model.config).unwrap(), convert::read_safetensors(&kohya).unwrap()] {
            let adapter = Adapter::load_whole(&model, &convert::to_peft(modules, &base).unwrap()).unwrap();
            let found = logits(&model, &Attached::one(&adapter), &golden.ids("tokens"));
            near(&format!("{case} converted"), &found, &golden.get("logits"), 2e-5);
        }
        let names = lorimer_model::weights::gguf::Gguf::open(&gguf).unwrap();
        let fused = names.content.tensor_infos.contains_key("blk.0.attn_qkv.weight.lora_a");
        assert_eq!((names.architecture(), fused), (model.config.architecture(), case.starts_with("phi3")));
    }
}

/// A file that names no targets has PEFT's of the base's family: for Phi-3 PEFT has none.
#[test]
fn default_targets_are_pefts() {
    let without = |case: &str| {
        let (_, model, mut stored, _) = adapted(case);
        stored.config.shift_remove("target_modules");
        Adapter::load_whole(&model, &stored).map(|_| ()).map_err(|e| e.to_string())
    };
    without("gemma3_default").unwrap();
    let problem = without("phi3").unwrap_err();
    assert!(problem.contains("target_modules"), "{problem}");
}

/// A server's answers are those of one request alone, for each base with an adapter and without.
#[test]
fn engines_answer_as_plain_generation_does() {
    for case in ["gemma2", "gemma3", "phi3", "phi3_longrope"] {
        let (_, model, stored, golden) = adapted(case);
        let adapter = Adapter::load_whole(&model, &stored).unwrap();
        let hosted = Arc::new(Hosted::new(&model, &adapter, "sha256:a".into(), None).unwrap());
        let policy = Policy { batch_tokens: 5, ..Default::default() };
        let mut engine =
            Engine::new(&model, EngineSettings { pool_bytes: 1 << 22, policy, ..Default::default() }).unwrap();
        let tokens = &golden.ids("tokens")[0];
        let asked = |length: usize, with: bool, n: usize| {
            let adapters = with.then(|| (hosted.clone(), 1.0)).into_iter().collect();
            request(tokens[..length].to_vec(), adapters, n)
        };
        let (lengths, n) = if case == "phi3_longrope" { ([10, 7, 3, 11], 5) } else { ([21, 7, 3, 18], 24) };
        if case == "phi3_longrope" {
            let problem = engine.submit(asked(10, false, 7), 0.0).expect_err("refused").to_string();
            assert!(problem.contains("LongRoPE"), "{problem}");
        }
        // The second time round prompts are in the prefix cache.
        let requests: Vec<_> = (0..8).map(|i| asked(lengths[i % 4], i % 2 == 0, n)).collect();
        for (i, found) in answered(&mut engine, &requests, 4).into_iter().enumerate() {
            let (i, found) = (i % 4, found.unwrap());
            let prompt = &tokens[..lengths[i]];
            let expected = match i.is_multiple_of(2) {
                true => generated(&model, &Attached::one(&adapter), prompt, n).0,
                false => generated(&model, &Frozen, prompt, n).0,
            };
            assert_eq!(found, expected, "{case}, prompt {i}");
        }
    }
}

/// Mistral's window: what is before it is not seen, and what is longer is computed.
#[test]
fn mistral_sees_a_window() {
    let with = |window: Value| {
        let mut config = read(&folder("tiny-llama/config.json"));
        (config["model_type"], config["sliding_window"]) = (json!("mistral"), window);
        let weights = Weights::from_folder(&folder("tiny-llama"), LoadDtype::F32).unwrap();
        Config::from_json(&config, Path::new("config.json")).unwrap().load(&weights).unwrap()
    };
    // A change of the first token is heard as far as the window reaches in each layer, and no farther.
    let layers = tiny("tiny-llama").shape().layers.len();
    let reach = layers * 3 + 1;
    let tokens = |first: u32| vec![std::iter::once(first).chain(10..10 + reach as u32).collect::<Vec<_>>()];
    let heard = |window: Value, row: usize| {
        let model = with(window);
        let [a, b] = [5, 6].map(|first| logits(model.as_ref(), &Frozen, &tokens(first)).narrow(0, row, 1).unwrap());
        distance(&a, &b)
    };
    assert!(heard(json!(4), reach - 1) > 1e-6);
    assert_eq!(heard(json!(4), reach), 0.0);
    assert!(heard(Value::Null, reach) > 1e-6);
}

#[test]
fn chats_and_ends_are_the_models() {
    for name in TINY {
        let text = TextModel::from_folder(&folder(name)).unwrap();
        let mut ends = text.eos_ids.clone();
        ends.sort_unstable();
        assert_eq!(json!(ends), if name.contains("gemma") { json!([1, 4]) } else { json!([3, 4, 6]) }, "{name}");
        for case in read(&folder(name).join("chat.json")).as_array().unwrap() {
            let messages = case["messages"].as_array().unwrap();
            let template = text.needed_template().unwrap();
            let shown = template.render(messages, None, case["prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(shown, case["text"].as_str().unwrap(), "{name}");
            assert_eq!(json!(text.encode(&shown, false).unwrap().ids), case["tokens"], "{name}");
        }
    }
}
