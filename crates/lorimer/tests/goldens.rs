//! PEFT's, transformers' and torch's own numbers (see tests/goldens/make.py), on tiny models and on the real one.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use lorimer::adapter::file::dialects::KOHYA;
use lorimer::adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer::model::decoder::config::DecoderConfig;
use lorimer::model::text::chat::ChatTemplate;
use lorimer::model::weights::SafetensorsFile;
use lorimer::prelude::*;
use lorimer::train::calibrate::{Data, calibrate};
use lorimer::train::run::step::batch_loss;
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

fn json(path: &Path) -> Value {
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
    /// Token rows (sequences, length).
    fn tokens(&self) -> Vec<Vec<u32>> {
        let t = self.get("tokens").to_dtype(DType::U32).unwrap();
        if t.dims().len() == 1 { vec![t.to_vec1().unwrap()] } else { t.to_vec2().unwrap() }
    }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    d.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

fn tiny(name: &str) -> Decoder {
    let (config, weights) = lorimer::model::base::open_weights(&folder(name), LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

fn logits(model: &dyn BaseModel, adaptation: &dyn Adaptation, rows: &[Vec<u32>]) -> Tensor {
    let hidden = model.hidden(&Batch::pack(rows.iter().map(Vec::as_slice)), adaptation).unwrap();
    model.logits(&hidden, adaptation).unwrap()
}

#[test]
fn every_family_computes_what_transformers_computes() {
    for name in ["tiny-llama", "tiny-llama3", "tiny-qwen2", "tiny-qwen3"] {
        let golden = Golden::open(name);
        let d = distance(&logits(&tiny(name), &Frozen, &golden.tokens()), &golden.get("logits"));
        assert!(d < 2e-4, "{name}: {d:e}");
    }
}

#[test]
fn rotary_frequencies_equal_transformers() {
    for case in json(&folder("rope.json")).as_array().unwrap() {
        let config = DecoderConfig::from_json(&case["config"], Path::new("rope.json")).unwrap();
        let (frequencies, factor) = config.ropes[0].frequencies();
        assert!((factor - case["factor"].as_f64().unwrap()).abs() < 1e-6);
        let expected = case["frequencies"].as_array().unwrap();
        assert_eq!(frequencies.len(), expected.len());
        for (a, b) in frequencies.iter().zip(expected) {
            let b = b.as_f64().unwrap();
            assert!((a - b).abs() <= 2e-6 * b.abs(), "{}: {a} against {b}", case["config"]["rope_parameters"]);
        }
    }
}

#[test]
fn older_configurations_read_the_same() {
    let path = folder("tiny-llama3").join("config.json");
    let new = json(&path);
    let mut old = new.clone();
    let mut scaling = old.as_object_mut().unwrap().remove("rope_parameters").unwrap();
    old["rope_theta"] = scaling.as_object_mut().unwrap().remove("rope_theta").unwrap();
    old["rope_scaling"] = scaling;
    assert_eq!(DecoderConfig::from_json(&old, &path).unwrap(), DecoderConfig::from_json(&new, &path).unwrap());
}

#[test]
fn chat_templates_render_as_transformers_does() {
    let golden = json(&folder("chat.json"));
    let (bos, eos) = (golden["bos"].as_str().unwrap(), golden["eos"].as_str().unwrap());
    for case in golden["table"].as_array().unwrap() {
        let template = ChatTemplate::new(case["template"].as_str().unwrap(), bos, eos).unwrap();
        let messages = case["messages"].as_array().unwrap();
        let text = template.render(messages, None, case["prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap(), "{case}");
    }
}

/// jinja2's and Python's expressions and blocks as transformers compiles them (tests/goldens/make_dialect.py). What it refuses
/// may be rendered here.
#[test]
fn templates_speak_transformers_dialect() {
    let golden = json(&folder("dialect.json"));
    let mut variables = golden["context"].as_object().unwrap().clone();
    let mut take = |name: &str| variables.shift_remove(name).unwrap();
    let (messages, tools, prompt) = (take("messages"), take("tools"), take("add_generation_prompt"));
    let (bos, eos) = (take("bos_token"), take("eos_token"));
    let mut different: Vec<&str> =
        golden["different"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for case in golden["table"].as_array().unwrap() {
        let (source, Some(expected)) = (case[0].as_str().unwrap(), case[1].as_str()) else { continue };
        count += 1;
        let text = ChatTemplate::new(source, bos.as_str().unwrap(), eos.as_str().unwrap()).and_then(|template| {
            template.render_with(messages.as_array().unwrap(), Some(&tools), &variables, prompt.as_bool().unwrap())
        });
        let known = different.iter().position(|s| *s == source);
        match text {
            Ok(text) if text == expected && known.is_none() => {}
            Ok(text) if text == expected => wrong.push(format!("{source:?} is no difference any more")),
            _ if known.is_some() => {
                known.map(|at| different.swap_remove(at));
            }
            Ok(text) => wrong.push(format!("{source:?} gives {text:?} instead of {expected:?}")),
            Err(e) => wrong.push(format!("{source:?} is refused ({e}) instead of {expected:?}")),
        }
    }
    assert!(different.is_empty(), "{different:?}");
    assert!(count > 600 && wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
}

/// SentencePiece's own tokens (tests/goldens/make_sentencepiece.py).
#[test]
fn sentencepiece_in_gguf_gives_sentencepieces_tokens() {
    let file = lorimer::model::weights::gguf::Gguf::open(&folder("sentencepiece.gguf")).unwrap();
    let text = TextModel::from_gguf(&file).unwrap();
    for case in json(&folder("sentencepiece.json")).as_array().unwrap() {
        let given = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        assert_eq!(text.encode(given, false).unwrap().ids, expected, "{given:?}");
        assert_eq!(text.decode(&expected, true).unwrap(), case["decoded"].as_str().unwrap(), "{given:?}");
        let with_bos = text.encode(given, true).unwrap().ids;
        assert_eq!(with_bos, [&[1], expected.as_slice()].concat());
    }
}

/// Adapters that PEFT wrote with nothing but numbers to compare: all folders but the two that have tests of their own.
fn cases() -> Vec<String> {
    let folders = std::fs::read_dir(folder("adapters")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = folders.filter(|name| !matches!(name.as_str(), "smollm2" | "eva")).collect();
    names.sort();
    assert!(names.len() >= 16);
    names
}

/// QLoRA's storage, against bitsandbytes (see tests/goldens/make_nf4.py).
#[test]
fn nf4_gives_what_bitsandbytes_gives() {
    let file = SafetensorsFile::open(&folder("nf4.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    let packed = lorimer::tensor::FrozenWeight::Dense(get("weight")).to_nf4().unwrap();
    let d = distance(&packed.dense(DType::F32).unwrap(), &get("dequantised"));
    assert!(d < 1e-6, "{d:e}");
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
        lorimer::adapter::algebra::merge::merge_to_folder(
            &folder(&base_of(&case)),
            &[(stored, 1.0)],
            &merged,
            LoadDtype::F32,
            |_| {},
        )
        .unwrap();
        let (config, weights) = lorimer::model::base::open_weights(&merged, LoadDtype::F32).unwrap();
        let again = config.load(&weights).unwrap();
        let d = distance(&logits(again.as_ref(), &Frozen, &golden.tokens()), &golden.get("merged_logits"));
        assert!(d < 5e-3, "{case}: merged logits differ by {d:e}");
        let own =
            distance(&logits(again.as_ref(), &Frozen, &golden.tokens()), &logits(&model, &attached, &golden.tokens()));
        assert!(own < 2e-4, "{case}: merged and unmerged differ by {own:e}");
    }
}

/// A base on disk with adapters merged into it, loaded again.
fn merged(base: &str, adapters: &[(StoredAdapter, f64)]) -> lorimer::adapter::Result<Decoder> {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("merged");
    lorimer::adapter::algebra::merge::merge_to_folder(&self::folder(base), adapters, &folder, LoadDtype::F32, |_| {})?;
    let (config, weights) = lorimer::model::base::open_weights(&folder, LoadDtype::F32).unwrap();
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
        let (lora, _) = lorimer::adapter::file::export::to_lora(&model, &adapter, Some(64), "tiny-llama").unwrap();
        let again = Adapter::load_whole(&model, &lora).unwrap();
        let d = distance(&logits(&model, &Attached::one(&again), &golden.tokens()), &golden.get("logits"));
        assert!(d < 2e-4, "{case} as a LoRA: {d:e}");
        // `inspect` counts the head's own weight with the head.
        let stored = StoredAdapter::read(&folder(&format!("adapters/{case}"))).unwrap();
        let report = lorimer::adapter::file::inspect::inspect(&stored).unwrap();
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

/// Patterns mean what Python's `re` makes of them (tests/goldens/make_python_re.py).
#[test]
fn patterns_match_as_pythons_do() {
    use lorimer::adapter::targets::{Matcher, Targeting, pattern_value};
    let golden = json(&folder("python_re.json"));
    let texts = |v: &Value| -> Vec<String> { serde_json::from_value(v.clone()).unwrap() };
    let paths = texts(&golden["paths"]);
    let sites: Vec<_> = paths.iter().map(|path| lorimer::model::Site::new(path, (4, 4))).collect();
    for case in golden["fullmatch"].as_array().unwrap() {
        let targeting: Targeting =
            serde_json::from_value(serde_json::json!({ "target_modules": case["pattern"] })).unwrap();
        let matcher = Matcher::new(&targeting, &sites).unwrap_or_else(|e| panic!("{e}"));
        let found: Vec<_> = sites.iter().filter(|s| matcher.targets(s)).map(|s| s.path.clone()).collect();
        assert_eq!(found, texts(&case["matches"]), "{}", case["pattern"]);
        let targeting = Targeting {
            target_modules: serde_json::from_value(".*".into()).unwrap(),
            exclude_modules: Some(targeting.target_modules),
            ..Default::default()
        };
        let matcher = Matcher::new(&targeting, &sites).unwrap();
        let left: Vec<_> = sites.iter().filter(|s| !matcher.targets(s)).map(|s| s.path.clone()).collect();
        assert_eq!(left, found, "{} left out", case["pattern"]);
    }
    for case in golden["pattern_key"].as_array().unwrap() {
        let patterns = [(case["pattern"].as_str().unwrap().to_string(), 1)].into_iter().collect();
        let found: Vec<_> = paths.iter().filter(|p| pattern_value(&patterns, p).unwrap().is_some()).cloned().collect();
        assert_eq!(found, texts(&case["matches"]), "{}", case["pattern"]);
    }
}

/// Every key of PEFT's configurations (tests/goldens/make_peft_keys.py) is honoured, without effect, or refused by name; so is a key that
/// PEFT does not have. The snapshot says which; a new key of PEFT's shows there.
#[test]
fn every_key_of_pefts_configurations_is_known() {
    let golden = json(&folder("peft_keys.json"));
    let mut table = String::new();
    for (kind, defaults) in golden["configs"].as_object().unwrap() {
        let mut config = defaults.as_object().unwrap().clone();
        config.insert("target_modules".into(), serde_json::json!(["q_proj"]));
        let read = |key: &str, value: Value| {
            let mut config = config.clone();
            config.insert(key.into(), value);
            methods::from_adapter_config(&config).map(|m| m.name()).map_err(|e| e.to_string())
        };
        read("r", config["r"].clone()).unwrap_or_else(|e| panic!("{kind} with PEFT's defaults: {e}"));
        // A key that is left out is PEFT's default.
        let short = serde_json::json!({ "peft_type": kind, "target_modules": ["q_proj"] });
        let own = methods::from_adapter_config(short.as_object().unwrap()).unwrap().config();
        for (key, default) in defaults
            .as_object()
            .unwrap()
            .iter()
            .filter(|(key, _)| !["inference_mode", "task_type", "target_modules"].contains(&key.as_str()))
        {
            let number = |v: &Value| v.as_f64().map_or(v.clone(), Value::from);
            let same = own.get(key).is_none_or(|own| number(own) == number(default));
            // Whether bases are written is for the next file to say.
            assert!(same || key == "save_projection", "{kind} {key}: {:?} in place of {default}", own.get(key));
        }
        for key in config.keys().filter(|key| *key != "peft_type") {
            let values = [true.into(), "x".into(), 3.into(), serde_json::json!([3]), serde_json::json!({ "x": 3 })];
            let found: Vec<_> = values.into_iter().map(|value| read(key, value)).collect();
            let by_name = |e: &String| e.contains(&format!("adapter_config.json sets `{key}`"));
            let how = match &found[..] {
                all if all.iter().all(Result::is_ok) => "without effect",
                all if all.iter().any(|r| r.as_ref().is_err_and(by_name)) => "refused",
                _ => "honoured",
            };
            table += &format!("{kind} {key}: {how}\n");
        }
        let unknown = read("a_new_key", true.into()).unwrap_err();
        assert!(unknown.contains("sets `a_new_key`"), "{unknown}");
        assert!(read("a_new_key", Value::Null).is_ok());
        for (family, targets) in golden["targets"][kind].as_object().unwrap() {
            assert!(lorimer::model::families::FAMILIES.iter().any(|f| f.model_types.contains(&family.as_str())));
            let method = {
                let mut config = config.clone();
                config.insert("target_modules".into(), Value::Null);
                methods::from_adapter_config(&config).unwrap()
            };
            assert_eq!(serde_json::to_value(&method.targeting().target_modules).unwrap(), *targets, "{kind} {family}");
        }
    }
    insta::assert_snapshot!("peft-keys", table);
    let lora = |key: &str, value: Value, more: Value| {
        let mut config = golden["configs"]["LORA"].as_object().unwrap().clone();
        config.insert("target_modules".into(), serde_json::json!(["q_proj"]));
        config.insert(key.into(), value);
        config.extend(more.as_object().unwrap().clone());
        methods::from_adapter_config(&config).map(|_| ()).map_err(|e| e.to_string())
    };
    // Tying weights is of no effect where nothing that may be tied is adapted, and refused elsewhere.
    assert_eq!(lora("ensure_weight_tying", true.into(), serde_json::json!({})), Ok(()));
    for more in
        [serde_json::json!({ "modules_to_save": ["embed_tokens"] }), serde_json::json!({ "target_modules": "x" })]
    {
        assert!(lora("ensure_weight_tying", true.into(), more).unwrap_err().contains("`ensure_weight_tying`"));
    }
    // Settings of starts that are over are of no effect; the starts that change the base are refused.
    let corda = serde_json::json!({ "corda_config": { "corda_method": "ipm" } });
    assert_eq!(lora("init_lora_weights", true.into(), corda.clone()), Ok(()));
    assert!(lora("init_lora_weights", "corda".into(), corda).unwrap_err().contains("corda"));
    // PEFT takes no layers beside a regular expression.
    let layers = lora("target_modules", ".*q_proj".into(), serde_json::json!({ "layers_to_transform": [1] }));
    assert!(layers.unwrap_err().contains("layers_to_transform"));
}

/// Ten steps of LoRA+ as PEFT groups parameters: B and vectors at the higher rate.
#[test]
fn ten_steps_of_lora_plus_equal_peft() {
    use lorimer::train::run::schedule::Shape;
    use lorimer::train::run::trainer::{Run, TrainSettings};
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

/// What ends a turn survives every way in: a GGUF file's ids and texts, lists of ids, a tokenizer given apart.
#[test]
fn what_ends_a_turn_survives_every_way_in() {
    use candle_core::quantized::gguf_file::{Value as Gguf, write};
    let out = tempfile::tempdir().unwrap();
    let file = |entries: &[(&str, Gguf)]| {
        let tokens = ["<|endoftext|>", "b", "<|eot_id|>", "c", "d"].map(|t| Gguf::String(t.into())).to_vec();
        let mut all = vec![
            ("general.architecture", Gguf::String("llama".into())),
            ("tokenizer.ggml.model", Gguf::String("gpt2".into())),
            ("tokenizer.ggml.tokens", Gguf::Array(tokens)),
            ("tokenizer.ggml.merges", Gguf::Array(vec![])),
            ("tokenizer.ggml.token_type", Gguf::Array([1, 1, 3, 1, 1].map(Gguf::I32).to_vec())),
        ];
        all.extend(entries.iter().map(|(k, v)| (*k, v.clone())));
        let path = out.path().join("model.gguf");
        let metadata: Vec<_> = all.iter().map(|(k, v)| (*k, v)).collect();
        write(&mut std::fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
        lorimer::model::weights::gguf::Gguf::open(&path).unwrap()
    };
    let (eos, none) = (("tokenizer.ggml.eos_token_id", Gguf::U32(0)), Gguf::U32(u32::MAX));
    let eot = ("tokenizer.ggml.eot_token_id", Gguf::U32(3));
    let ends = |entries: &[(&str, Gguf)]| TextModel::from_gguf(&file(entries)).unwrap().eos_ids;
    // The text of an end of turn counts as well, as it does for llama.cpp.
    assert_eq!(ends(std::slice::from_ref(&eos)), [0, 2]);
    assert_eq!(ends(&[eos.clone(), eot.clone(), ("tokenizer.ggml.eom_token_id", none)]), [0, 2, 3]);
    assert_eq!(ends(&[eos.clone(), eot.clone(), ("tokenizer.ggml.eom_token_id", Gguf::I32(4))]), [0, 2, 3, 4]);

    // A Hugging Face folder's lists, and then with a tokenizer that is given apart.
    let folder = out.path().join("hf");
    std::fs::create_dir(&folder).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(self::folder("tiny-llama").join(name), folder.join(name)).unwrap();
    }
    std::fs::write(folder.join("generation_config.json"), r#"{"eos_token_id": [0, 7]}"#).unwrap();
    let text = TextModel::from_folder(&folder).unwrap();
    assert_eq!(text.eos_ids, [0, 2, 7]);
    let apart = out.path().join("apart");
    std::fs::create_dir(&apart).unwrap();
    std::fs::copy(folder.join("tokenizer.json"), apart.join("tokenizer.json")).unwrap();
    let text = text.with_tokenizer_file(&apart.join("tokenizer.json")).unwrap();
    assert_eq!(text.eos_ids, [0, 2, 7]);
    std::fs::write(apart.join("generation_config.json"), r#"{"eos_token_id": 9}"#).unwrap();
    std::fs::write(apart.join("tokenizer_config.json"), r#"{"eos_token": {"content": "<|im_start|>"}}"#).unwrap();
    assert_eq!(text.with_tokenizer_file(&apart.join("tokenizer.json")).unwrap().eos_ids, [0, 1, 2, 7, 9]);
    let gguf = file(&[eos, eot]);
    let text = TextModel::from_gguf_with_tokenizer(&gguf, &apart.join("tokenizer.json")).unwrap();
    assert_eq!(text.eos_ids, [0, 1, 2, 3, 9]);
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
    lorimer::adapter::algebra::merge::merge_to_folder(&base, &[(adapter, 1.0)], &merged, LoadDtype::F32, |_| {})
        .unwrap();
    for name in files.into_iter().chain(["tokenizer.json", "tokenizer_config.json"]) {
        assert_eq!(std::fs::read(merged.join(name)).ok(), std::fs::read(base.join(name)).ok(), "{name}");
    }
    assert!(others.iter().all(|name| !merged.join(name).exists()));
}

/// YaRN reaches its original length times its factor, under whatever longest length the configuration says.
#[test]
fn yarn_reaches_its_original_length_times_its_factor() {
    let with = |longest: u64, rope: Value| {
        let mut config = json(&folder("tiny-llama/config.json"));
        config["max_position_embeddings"] = longest.into();
        config["rope_parameters"] = rope;
        DecoderConfig::from_json(&config, Path::new("config.json")).unwrap().max_positions
    };
    let yarn = |factor: f64, original: Value| serde_json::json!({ "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original });
    // Qwen 2.5's and Qwen 3's recipes, one that says the long length itself, and one that leaves the original out.
    assert_eq!(with(32768, yarn(4.0, 32768.into())), 131072);
    assert_eq!(with(40960, yarn(4.0, 32768.into())), 131072);
    assert_eq!(with(131072, yarn(4.0, 32768.into())), 131072);
    assert_eq!(with(1024, yarn(2.0, Value::Null)), 2048);
    assert_eq!(with(1024, yarn(1e300, 64.into())), u32::MAX as usize);
    let llama3 = serde_json::json!({ "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192 });
    assert_eq!(with(131072, llama3), 131072);
}

/// Files that PEFT up to 0.17 wrote say BONE and `bone_block`.
#[test]
fn bone_files_are_read() {
    let model = tiny("tiny-llama");
    let golden = Golden::open("adapters/miss_bat");
    let mut stored = StoredAdapter::read(&folder("adapters/miss_bat")).unwrap();
    stored.config.insert("peft_type".into(), "BONE".into());
    stored.tensors = stored.tensors.into_iter().map(|(k, t)| (k.replace("miss_block", "bone_block"), t)).collect();
    let adapter = Adapter::load_whole(&model, &stored).unwrap();
    let d = distance(&logits(&model, &Attached::one(&adapter), &golden.tokens()), &golden.get("logits"));
    assert!(d < 2e-4, "{d:e}");
    let again = adapter.to_stored("tiny-llama").unwrap();
    assert!(again.tensors.keys().all(|k| k.ends_with("bone_block")));
    assert_eq!(again.config["peft_type"], "BONE");
}

/// torch's generator, its bf16 rounding and its standard deviation.
#[test]
fn torchs_random_bases_come_out_bit_for_bit() {
    use lorimer::adapter::methods::mt19937::{TorchGenerator, over_deviation_bf16};
    let file = SafetensorsFile::open(&folder("torch_random.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    for seed in [0u64, 7, 12345] {
        let mut torch = TorchGenerator::new(seed);
        let a = over_deviation_bf16(&torch.kaiming_bf16(6 * 77, 77));
        assert_eq!(get(&format!("a{seed}")).flatten_all().unwrap().to_vec1::<half::bf16>().unwrap(), a);
        // Thirteen slices of (130, 6), put beside each other.
        let slices: Vec<Vec<half::bf16>> = (0..13).map(|_| torch.kaiming_bf16(130 * 6, 6)).collect();
        let b: Vec<half::bf16> =
            (0..130).flat_map(|row| slices.iter().flat_map(move |s| s[row * 6..row * 6 + 6].to_vec())).collect();
        let expected = get(&format!("b{seed}")).flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
        assert_eq!(expected, over_deviation_bf16(&b));
        let rand = TorchGenerator::new(seed).rand(5 * 31);
        assert_eq!(get(&format!("rand{seed}")).flatten_all().unwrap().to_vec1::<f32>().unwrap(), rand);
    }
}

/// The bases that PEFT saved are those that follow from its seed.
#[test]
fn randloras_bases_follow_from_the_seed() {
    let model = tiny("tiny-llama");
    for case in ["randlora_saved", "randlora_sparse"] {
        let stored = StoredAdapter::read(&folder(&format!("adapters/{case}"))).unwrap();
        let mut without = stored.clone();
        without.tensors.retain(|k, _| !k.ends_with("randlora_A") && !k.ends_with("randlora_B"));
        let adapter = Adapter::load_whole(&model, &without).unwrap();
        let written = adapter.to_stored("tiny-llama").unwrap();
        for key in ["base_model.randlora_A", "base_model.randlora_B"] {
            let ours = written.tensors[key].to_dtype(DType::F32).unwrap();
            assert_eq!(distance(&ours, &stored.tensors[key]), 0.0, "{case} {key}");
        }
    }
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

#[test]
fn converted_adapters_come_back_the_same() {
    let model = tiny("tiny-llama");
    let config = model.config.clone();
    for case in ["lora", "rslora", "rank_pattern"] {
        let stored = StoredAdapter::read(&folder(&format!("adapters/{case}"))).unwrap();
        let golden = Golden::open(&format!("adapters/{case}"));
        let out = tempfile::tempdir().unwrap();
        let (gguf, kohya) = (out.path().join("a.gguf"), out.path().join("a.safetensors"));
        lorimer::adapter::file::convert::write_gguf(&stored, &config, &gguf).unwrap();
        lorimer::adapter::file::convert::write_safetensors(&stored, &KOHYA, &kohya).unwrap();
        for modules in [
            lorimer::adapter::file::convert::read_gguf(&gguf, &config).unwrap(),
            lorimer::adapter::file::convert::read_safetensors(&kohya).unwrap(),
        ] {
            let again = lorimer::adapter::file::convert::to_peft(modules, "tiny-llama").unwrap();
            let adapter = Adapter::load_whole(&model, &again).unwrap();
            let d = distance(&logits(&model, &Attached::one(&adapter), &golden.tokens()), &golden.get("logits"));
            assert!(d < 2e-4, "{case}: {d:e}");
        }
    }
    let dora = StoredAdapter::read(&folder("adapters/dora")).unwrap();
    assert!(
        lorimer::adapter::file::convert::write_safetensors(&dora, &KOHYA, Path::new("x"))
            .unwrap_err()
            .to_string()
            .contains("merge")
    );
}

/// Rows that pyarrow wrote are the rows of the JSONL file.
#[test]
fn parquet_and_jsonl_hold_the_same_rows() {
    use lorimer::train::data::read_rows;
    let parquet = read_rows(&folder("rows.parquet"), None).unwrap();
    let jsonl = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/sentiment-movies.valid.jsonl");
    let jsonl = read_rows(&jsonl, Some(20)).unwrap();
    assert_eq!((parquet.len(), jsonl.len()), (20, 20));
    for (a, b) in parquet.iter().zip(&jsonl) {
        assert_eq!(a.value.as_ref().unwrap(), b.value.as_ref().unwrap());
    }
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
    let report = lorimer::adapter::algebra::merge::merge_to_gguf(&pulled.path, &adapters, &merged, |_| {}).unwrap();
    assert!(report.error > 0.0 && report.error < 0.1, "{}", report.error);
    assert_eq!(open(&merged, LoadDtype::Stored).model.bytes(), kept.model.bytes());
    let requantised = logits_of(&open(&merged, LoadDtype::F32));
    let strong = last(&Attached::weighted(vec![(&adapter, 8.0)]).unwrap());
    let (to_adapted, to_plain) = (distance(&requantised, &strong), distance(&requantised, &golden.get("plain")));
    assert!(to_adapted < 0.5 * to_plain, "{to_adapted} from the adapted logits, {to_plain} from the plain ones");
}

/// Twenty steps of galore-torch, with its space renewed on the way, on each side that it projects on.
#[test]
fn twenty_steps_equal_galore_torch() {
    use lorimer::adapter::methods::galore::GaloreOptimizer;
    use lorimer::adapter::methods::galore::{Galore, GaloreProjection};
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

/// One projection under the methods that PEFT does not have, as their authors' code computes it (see tests/goldens/make_projections.py): start,
/// output, merged weight and the gradient of every trained parameter.
#[test]
fn projections_equal_the_authors_code() {
    use lorimer::adapter::method::{CalibrationStats, ParameterSource};
    use lorimer::model::{Projection, Site};
    use lorimer::tensor::FrozenWeight;
    let file = SafetensorsFile::open(&folder("projections.safetensors")).unwrap();
    let cases = json(&folder("projections.json"));
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let find = |what: &str| file.load(&format!("{name}.{what}")).unwrap();
        let get = |what: &str| find(what).unwrap_or_else(|| panic!("{name}: golden `{what}`"));
        let w = get("w");
        let site = Site::new("model.layers.0.mlp.down_proj", w.dims2().unwrap());
        let base = Projection { weight: FrozenWeight::Dense(w), bias: find("b") };
        let settings = case["settings"].as_object().unwrap();
        let mut method = methods::build(case["method"].as_str().unwrap(), settings).unwrap();
        let stats = CalibrationStats::new();
        method.resolve(&[&site], &stats).unwrap();
        let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats)).unwrap();
        let near = |what: &str, a: &Tensor, b: &Tensor| {
            let (d, size) = (distance(a, b), distance(b, &b.zeros_like().unwrap()));
            assert!(d < 1e-9 * (1.0 + size), "{name}: {what} differs by {d:e}");
        };
        let begun = delta.trainable().into_iter().map(|(key, var)| (key, var.as_tensor()));
        let mut starts = 0;
        for (key, t) in begun.chain(delta.frozen()) {
            if let Some(expected) = find(&format!("start.{key}")) {
                near(&format!("the start of {key}"), t, &expected);
                starts += 1;
            }
        }
        // A frozen part may stand beside a parameter of the same name that begins as it is.
        let given = file.names().iter().filter(|n| n.starts_with(&format!("{name}.start."))).count();
        assert!(starts >= given, "{name}: {starts} of {given} starts were compared");
        let trained: Vec<&str> = delta.trainable().iter().map(|(key, _)| *key).collect();
        let golden = file.names().iter().filter(|n| n.starts_with(&format!("{name}.grad."))).count();
        assert_eq!(trained.len(), golden, "{name} trains {trained:?}");
        assert_eq!(
            method.parameters(&site).unwrap(),
            delta.trainable().iter().map(|(_, v)| v.elem_count()).sum::<usize>()
        );
        for (key, var) in delta.trainable() {
            var.set(&get(&format!("moved.{key}"))).unwrap();
        }
        let x = get("x");
        let plain = x.matmul(&base.dense(DType::F64).unwrap().t().unwrap()).unwrap();
        let mut y = (&plain + delta.forward(&base, &x, &plain, &Step::default()).unwrap()).unwrap();
        for bias in [base.bias.clone(), delta.bias_change(&base).unwrap()].into_iter().flatten() {
            y = y.broadcast_add(&bias).unwrap();
        }
        near("the output", &y, &get("y"));
        near("the merged weight", &delta.merged(&base).unwrap().unwrap(), &get("merged"));
        let found = (y.sqr().unwrap().sum_all().unwrap() / 2.0).unwrap().backward().unwrap();
        for (key, var) in delta.trainable() {
            near(&format!("the gradient of {key}"), found.get(var.as_tensor()).unwrap(), &get(&format!("grad.{key}")));
        }
    }
}

/// What the authors of LoRA-XS save is a file of type LORA with one more tensor a module (see tests/goldens/make_lora_xs.py).
#[test]
fn lora_xs_folders_of_the_authors_are_read() {
    let model = tiny("tiny-llama");
    let stored = StoredAdapter::read(&folder("lora_xs")).unwrap();
    assert_eq!(stored.config["peft_type"], "LORA_XS");
    let adapter = Adapter::load_whole(&model, &stored).unwrap();
    let golden = Golden::open("lora_xs");
    let d = distance(&logits(&model, &Attached::one(&adapter), &golden.tokens()), &golden.get("logits"));
    assert!(d < 2e-4, "{d:e}");
    // Their factors are those that a new adapter finds, up to the signs of singular vectors.
    let settings = serde_json::json!({ "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"] });
    let own = Adapter::attach(&model, methods::build("lora-xs", settings.as_object().unwrap()).unwrap(), 0).unwrap();
    for (path, delta) in own.deltas() {
        let (ours, theirs) = (delta.frozen(), adapter.delta(path).unwrap().frozen());
        for k in 0..4 {
            let outer = |t: &[(&str, &Tensor)]| {
                let (a, b) = (t[0].1.narrow(0, k, 1).unwrap(), t[1].1.narrow(1, k, 1).unwrap());
                b.matmul(&a).unwrap()
            };
            let d = distance(&outer(&ours), &outer(&theirs));
            assert!(d < 1e-4, "{path}, singular pair {k}: {d:e}");
        }
        // The singular values stand in A.
        let rows = ours[0].1.sqr().unwrap().sum(1).unwrap().sqrt().unwrap().to_vec1::<f32>().unwrap();
        assert!(rows.windows(2).all(|w| w[0] >= w[1]) && rows[0] > 1.01 * rows[3], "{path}: {rows:?}");
    }
    // Written again it is ours, and reads the same.
    let again = Adapter::load_whole(&model, &adapter.to_stored("tiny-llama").unwrap()).unwrap();
    let rows = golden.tokens();
    assert!(
        distance(&logits(&model, &Attached::one(&again), &rows), &logits(&model, &Attached::one(&adapter), &rows))
            < 1e-6
    );
}

/// DiffoRA's gates after a search, from its equations in torch (see tests/goldens/make_diffora.py).
#[test]
fn difforas_search_equals_torchs() {
    use lorimer::adapter::methods::diffora::{DifforaConfig, Gate, Sharing};
    use lorimer::train::calibrate::search::SearchRows;
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
