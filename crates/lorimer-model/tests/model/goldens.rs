//! transformers' and bitsandbytes' own numbers, templates and tokens (see tests/goldens/make.py) on tiny models.

use std::path::Path;

use candle_core::DType;
use lorimer_model::decoder::config::DecoderConfig;
use lorimer_model::text::chat::ChatTemplate;
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::packed::NormalFloatModule;
use lorimer_model::{Frozen, LoadDtype, TextModel};
use serde_json::Value;

use crate::support::*;

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
    let file = lorimer_model::weights::gguf::Gguf::open(&folder("sentencepiece.gguf")).unwrap();
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

/// QLoRA's storage, against bitsandbytes (see tests/goldens/make_nf4.py).
#[test]
fn nf4_gives_what_bitsandbytes_gives() {
    let file = SafetensorsFile::open(&folder("nf4.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    let packed = lorimer_tensor::FrozenWeight::Dense(get("weight")).to_nf4().unwrap();
    let d = distance(&packed.dense(DType::F32).unwrap(), &get("dequantised"));
    assert!(d < 1e-6, "{d:e}");
}

/// LQ-LoRA's quantiser, against its authors' formulas (see tests/goldens/make_lq_lora.py). To be seen to fail: S rounded up, or `round` half
/// away from zero.
#[test]
fn normal_float_gives_what_the_authors_formulas_give() {
    use lorimer_tensor::storage::normal_float::levels;
    let file = SafetensorsFile::open(&folder("lq_lora.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    for bits in [2, 3, 4, 8] {
        let expected = get(&format!("levels.{bits}")).to_vec1::<f32>().unwrap();
        let worst = levels(bits).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(levels(bits).len() == expected.len() && worst < 1e-6, "{bits} bits: {worst:e}");
    }
    for (number, case) in json(&folder("lq_lora.json"))["cases"].as_array().unwrap().iter().enumerate() {
        let n = |i: usize| case[i].as_u64().unwrap() as usize;
        let module = NormalFloatModule {
            shape: (64, 256),
            num_bits: n(0),
            num_bits_0: n(1),
            num_bits_1: case[2].as_str().unwrap().into(),
            block_size_0: n(3),
            block_size_1: n(4),
        };
        let packed =
            lorimer_tensor::FrozenWeight::Dense(get("weight")).to_normal_float(&module.config().unwrap()).unwrap();
        let d = distance(&packed.dense(DType::F32).unwrap(), &get(&format!("case.{number}.dequantised")));
        assert!(d < 2e-6, "{case}: {d:e}");
    }
}

/// Checkpoints that bitsandbytes, GPTQ and AWQ packed, as a frozen base (see tests/goldens/make_packed.py). To be seen to fail: AWQ's order, GPTQ's
/// first zero point, `g_idx` left out.
#[test]
fn packed_checkpoints_give_the_logits_of_their_expanded_weights() {
    const WEIGHT: &str = "model.layers.1.mlp.down_proj.weight";
    for (name, storage) in [
        ("bnb-nf4", "nf4"),
        ("bnb-nf4-double", "nf4"),
        ("bnb-fp4", "fp4"),
        ("gptq", "affine4"),
        ("gptq-act-order-v2", "affine4"),
        ("gptq-sym", "affine4"),
        ("awq", "affine4"),
        ("lorimer-nf", "nf8"),
    ] {
        let place = format!("packed/{name}");
        let (_, weights) = lorimer_model::base::open_weights(&folder(&place), LoadDtype::F32).unwrap();
        let golden = Golden::open(&place);
        let shape = if name.starts_with("bnb") { (64, 128) } else { (32, 48) };
        let weight = weights.weight(WEIGHT, shape).unwrap();
        assert_eq!(weight.storage_name(), storage, "{name}");
        let d = distance(&weight.dense(DType::F32).unwrap(), &golden.get("weight"));
        assert!(d < 1e-6, "{name}: {d:e}");
        assert_eq!(weights.weight_bytes(WEIGHT, shape, LoadDtype::F32).unwrap(), weight.bytes(), "{name}");
        assert!(weights.names().iter().all(|name| name.ends_with(".weight")), "{:?}", weights.names());
        let found = logits(&tiny(&place), &Frozen, &golden.tokens());
        let d = distance(&found, &golden.get("logits"));
        assert!(d < 2e-4, "{name}: {d:e}");
    }
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
        lorimer_model::weights::gguf::Gguf::open(&path).unwrap()
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
