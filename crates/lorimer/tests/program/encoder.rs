//! Encoders against transformers, sentence-transformers and PEFT (tests/goldens/make_families.py): hidden states, vectors, adapters, gradients,
//! and `lorimer embed` as its users see it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;

use candle_core::{DType, Tensor};
use lorimer::model::embed::{EmbedOptions, Pooling, embed, embed_tokens, encode, vectors};
use lorimer::model::families::bert::{Bert, BertConfig};
use lorimer::model::weights::SafetensorsFile;
use lorimer::model::{Config, Weights};
use lorimer::prelude::*;
use lorimer::tensor::{Gradients, Tape};
use serde_json::{Value, json};

use crate::common::{self, error, goldens, json as run, ok};

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(goldens(name)).unwrap()).unwrap()
}

fn base() -> Base {
    Base::open(&goldens("tiny-bert"), &OpenOptions::default()).unwrap()
}

fn options(base: &Base) -> EmbedOptions {
    EmbedOptions::of_folder(&base.path, base.model().shape().max_positions).unwrap().unwrap()
}

struct Golden(SafetensorsFile);

impl Golden {
    fn open(name: &str) -> Self {
        Self(SafetensorsFile::open(&goldens(name)).unwrap())
    }
    fn get(&self, name: &str) -> Tensor {
        self.0.load(name).unwrap().unwrap_or_else(|| panic!("golden `{name}`"))
    }
    /// Padded rows without their padding.
    fn tokens(&self, ids: &str, mask: &str) -> Vec<Vec<u32>> {
        let rows = |name: &str| self.get(name).to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        let cut =
            |(ids, mask): (Vec<u32>, Vec<u32>)| ids.into_iter().zip(mask).filter(|(_, m)| *m == 1).map(|(t, _)| t);
        rows(ids).into_iter().zip(rows(mask)).map(|pair| cut(pair).collect()).collect()
    }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    d.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

fn matrix(rows: Vec<Vec<f32>>) -> Tensor {
    let width = rows[0].len();
    Tensor::from_vec(rows.concat(), (rows.len(), width), &candle_core::Device::Cpu).unwrap()
}

fn plain(pooling: Pooling, normalize: bool) -> EmbedOptions {
    EmbedOptions::new(pooling, normalize, 40)
}

#[test]
fn hidden_states_and_pooler_equal_transformers() {
    let (base, golden) = (base(), Golden::open("tiny-bert/golden.safetensors"));
    let rows = golden.tokens("input_ids", "attention_mask");
    let batch = Batch::pack(rows.iter().map(Vec::as_slice));
    let model = base.model();
    let mut states = vec![model.embed(&batch.tokens, &batch.positions, &Frozen).unwrap()];
    let layout = model.layout(&batch.positions, &batch.segments, None);
    for i in 0..2 {
        states.push(model.block(i, &states[i], &layout, &Frozen, None).unwrap());
    }
    for (i, state) in states.iter().enumerate() {
        let expected = golden.get(&format!("hidden.{i}"));
        for (row, segment) in batch.segments.iter().enumerate() {
            let own = state.narrow(0, segment.q_start, segment.q_len).unwrap();
            let d = distance(&own, &expected.get(row).unwrap().narrow(0, 0, segment.q_len).unwrap());
            assert!(d < 1e-5, "hidden.{i}, text {row}: {d:e}");
        }
    }
    let first: Vec<u32> = batch.segments.iter().map(|s| s.q_start as u32).collect();
    let first = states[2].index_select(&Tensor::new(first, &candle_core::Device::Cpu).unwrap(), 0).unwrap();
    let (config, weights) = lorimer::model::base::open_weights(&goldens("tiny-bert"), LoadDtype::F32).unwrap();
    let Config::Encoder(config) = config else { panic!("tiny-bert is an encoder") };
    let pooled = Bert::load(config, &weights).unwrap().pool(&first, &Frozen).unwrap();
    assert!(distance(&pooled, &golden.get("pooler")) < 1e-5);
}

#[test]
fn vectors_equal_sentence_transformers() {
    let (base, golden, json) = (base(), Golden::open("tiny-bert/golden.safetensors"), read("tiny-bert/golden.json"));
    let texts: Vec<&str> = json["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let own = options(&base);
    assert_eq!(own, EmbedOptions::new(Pooling::Mean, true, 24));
    let tokens = encode(&base.text, &texts, &own).unwrap();
    assert_eq!(json!(tokens), json["tokens"], "cut to 24 although tokenizer.json says 12, and not padded");
    let d = distance(&matrix(embed(&base, &Frozen, &texts, &own).unwrap()), &golden.get("embeddings"));
    assert!(d < 1e-5, "{d:e}");
    let cls = embed(&base, &Frozen, &texts, &EmbedOptions { pooling: Pooling::Cls, ..own }).unwrap();
    assert!(distance(&matrix(cls), &golden.get("cls")) < 1e-5);
}

#[test]
fn activations_are_told_apart() {
    let golden = Golden::open("tiny-bert/golden.safetensors");
    let rows = golden.tokens("input_ids", "attention_mask");
    let path = goldens("tiny-bert");
    for (name, key) in
        [("gelu_new", "gelu_new"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh"), ("relu", "relu"), ("silu", "silu")]
    {
        let mut config = read("tiny-bert/config.json");
        config["hidden_act"] = name.into();
        let config = BertConfig::from_json(&config, &path).unwrap();
        let model = Bert::load(config, &Weights::from_folder(&path, LoadDtype::F32).unwrap()).unwrap();
        let found = embed_tokens(&model, &Frozen, &rows, &plain(Pooling::Mean, true)).unwrap();
        let d = distance(&matrix(found), &golden.get(&format!("embeddings.{key}")));
        assert!(d < 1e-5, "{name}: {d:e}");
    }
}

/// What only some files have: names with `bert.`, norms with `gamma` and `beta`, no pooler.
#[test]
fn other_names_in_the_file_are_the_same_model() {
    let (_, weights) = lorimer::model::base::open_weights(&goldens("tiny-bert"), LoadDtype::F32).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let renamed = |name: &str| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        format!("bert.{name}")
    };
    let file = &weights.shards().unwrap()[0];
    let kept = file.names().into_iter().filter(|name| !name.starts_with("pooler."));
    let tensors: std::collections::HashMap<String, Tensor> =
        kept.map(|name| (renamed(&name), file.load(&name).unwrap().unwrap())).collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(goldens("tiny-bert").join(name), folder.path().join(name)).unwrap();
    }
    let other = Base::open(folder.path(), &OpenOptions::default()).unwrap();
    let texts = ["The man was there."];
    let of = |base: &Base| embed(base, &Frozen, &texts, &plain(Pooling::Mean, true)).unwrap();
    assert_eq!(of(&other), of(&base()));
    let sites: Vec<String> = other.model().projections().iter().map(|(site, _)| site.path.clone()).collect();
    assert_eq!(sites.len(), 12);
    assert_eq!(sites[0], "bert.encoder.layer.0.attention.self.query");
    assert_eq!(other.config.sites().iter().map(|s| s.path.clone()).collect::<Vec<_>>(), sites);
}

#[test]
fn configurations_that_are_not_read_are_refused_by_name() {
    let path = Path::new("config.json");
    for (key, value) in [
        ("hidden_act", json!("mish")),
        ("position_embedding_type", json!("relative_key")),
        ("is_decoder", json!(true)),
        ("add_cross_attention", json!(true)),
        ("pruned_heads", json!({ "0": [1] })),
        ("num_attention_heads", json!(5)),
        ("num_hidden_layers", json!(5000)),
        ("hidden_size", json!("wide")),
    ] {
        let mut config = read("tiny-bert/config.json");
        config[key] = value;
        let error = Config::from_json(&config, path).unwrap_err().to_string();
        assert!(error.contains(key) || error.contains("heads"), "{key}: {error}");
    }
}

/// PEFT's numbers with adapters: vectors, gradients of a loss on them on the tape and in candle's graph, and vectors of the merged model.
#[test]
fn adapters_equal_peft() {
    for name in ["bert", "bert_bias", "bert_default"] {
        let golden = Golden::open(&format!("family-adapters/{name}/golden.safetensors"));
        let base = base();
        let stored = StoredAdapter::read(&goldens("family-adapters").join(name)).unwrap();
        let adapter = Adapter::load_whole(base.model(), &stored).unwrap();
        let sides = [0, 1].map(|s| golden.tokens(&format!("input_ids.{s}"), &format!("attention_mask.{s}")));
        let all: Vec<Vec<u32>> = sides.concat();
        let all: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let own = plain(Pooling::Mean, true);
        let attached = Attached::one(&adapter);
        let found = vectors(base.model(), &attached, &all, &own).unwrap();
        let d = distance(&found, &golden.get("embeddings"));
        assert!(d < 1e-5, "{name}: {d:e}");
        let loss = |e: &Tensor| {
            let n = sides[0].len();
            let scores = (e.narrow(0, 0, n)?.matmul(&e.narrow(0, n, n)?.t()?)? * 20.0)?;
            let logs = candle_core::Tensor::log_sum_exp(&scores, 1)?;
            let right = (&scores * Tensor::eye(n, DType::F32, scores.device())?)?.sum(1)?;
            (logs - right)?.mean_all()
        };
        let graph = loss(&found).unwrap().backward().unwrap();
        let trainable = adapter.trainable();
        let tape = Tape::new(trainable.iter().map(|(_, var)| var.as_tensor()));
        let recorded = attached.recorded(&tape);
        let e = vectors(base.model(), &recorded, &all, &own).unwrap();
        let value = lorimer::model::Adaptation::ops(&recorded).subgraph(&[&e], &[], |t| loss(&t[0])).unwrap();
        let mut gradients = Gradients::default();
        tape.backward(&value, Tensor::new(1f32, value.device()).unwrap(), &mut gradients).unwrap();
        let mut seen = 0;
        for (path, var) in &trainable {
            let (a, b) = (graph.get(var.as_tensor()), gradients.get(var.as_tensor()));
            assert_eq!(a.is_some(), b.is_some(), "{name}: {path}");
            let expected = golden.0.load(&format!("grad.{path}")).unwrap();
            let (Some(a), Some(b)) = (a, b) else {
                assert!(expected.is_none() && path.contains("pooler"), "{name}: {path} has no gradient");
                continue;
            };
            assert!(distance(a, b) < 1e-5, "{name}: {path}");
            if let Some(expected) = expected {
                seen += 1;
                assert!(distance(b, &expected) < 1e-4, "{name}: {path} {:e}", distance(b, &expected));
            }
        }
        assert!(seen > 3, "{name}: {seen} gradients of {}", trainable.len());
    }
}

#[test]
fn a_merged_model_gives_the_adapters_vectors() {
    for name in ["bert", "bert_bias", "bert_default"] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("merged").display().to_string();
        let adapter = goldens("family-adapters").join(name).display().to_string();
        let model = goldens("tiny-bert").display().to_string();
        let merged = run(&["merge", "--model", &model, "--adapter", &adapter, "--output", &output]);
        assert!(merged["merged_tensors"].as_u64().unwrap() > 3, "{merged}");
        let merged = Base::open(Path::new(&output), &OpenOptions::default()).unwrap();
        let base = base();
        let attached = Adapter::load_whole(base.model(), &StoredAdapter::read(Path::new(&adapter)).unwrap()).unwrap();
        let texts = ["The man was there.", "of the time"];
        let own = plain(Pooling::Mean, true);
        let a = matrix(embed(&merged, &Frozen, &texts, &own).unwrap());
        let b = matrix(embed(&base, &Attached::one(&attached), &texts, &own).unwrap());
        assert!(distance(&a, &b) < 1e-5, "{name}: {:e}", distance(&a, &b));
        assert!(distance(&a, &matrix(embed(&base, &Frozen, &texts, &own).unwrap())) > 1e-4, "{name} does nothing");
        let report = run(&["inspect", &adapter]);
        assert!(report["modules"].to_string().contains("encoder.layer.0.attention.self.query"), "{report}");
    }
}

/// sentence-transformers' own vectors of the real MiniLM: fetched as `lorimer pull minilm` does (91 MB, once), or the folder that LORIMER_MINILM names.
#[test]
fn minilm_is_within_1e_5_of_sentence_transformers() {
    let folder = match std::env::var_os("LORIMER_MINILM") {
        Some(folder) => folder.into(),
        None => lorimer::model::pull::pull("minilm", Default::default()).unwrap().path,
    };
    let base = Base::open(&folder, &OpenOptions::default()).unwrap();
    let json = read("minilm.json");
    let texts: Vec<&str> = json["sentences"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let own = EmbedOptions::of_folder(&base.path, 512).unwrap().unwrap();
    assert_eq!(own, EmbedOptions::new(Pooling::Mean, true, 256));
    let found = matrix(embed(&base, &Frozen, &texts, &own).unwrap());
    let golden = Golden::open("minilm.safetensors");
    let d = distance(&found, &golden.get(&golden.0.names()[0]));
    eprintln!("largest distance over {} texts: {d:e}", texts.len());
    assert!(d < 1e-5, "{d:e}");
}

/// Both layouts of sentence-transformers, and what is refused of them.
#[test]
fn pooling_is_read_from_the_folder_or_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
    };
    let options = || EmbedOptions::of_folder(folder.path(), 40).map_err(|e| e.to_string());
    assert_eq!(options(), Ok(None));
    let module = |path: &str, kind: &str| json!({ "path": path, "type": kind });
    let transformer = module("", "sentence_transformers.base.modules.transformer.Transformer");
    let pooling = module("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling");
    let normalize = module("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize");
    write("modules.json", json!([transformer, pooling, normalize]));
    write("1_Pooling/config.json", json!({ "embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": true }));
    write("tokenizer_config.json", json!({ "model_max_length": 30 }));
    assert_eq!(options(), Ok(Some(EmbedOptions::new(Pooling::Cls, true, 30))));
    write(
        "config_sentence_transformers.json",
        json!({ "prompts": { "query": "q: " }, "default_prompt_name": "query" }),
    );
    assert_eq!(options().unwrap().unwrap().prompt, "q: ");
    write("modules.json", json!([transformer, pooling]));
    assert!(!options().unwrap().unwrap().normalize);
    write("1_Pooling/config.json", json!({ "pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": false }));
    assert_eq!(options().unwrap().unwrap().pooling, Pooling::Max);
    for (mode, word) in
        [(json!("weightedmean"), "weightedmean"), (json!(["cls", "mean"]), "joins 2"), (json!([]), "no pooling")]
    {
        write("1_Pooling/config.json", json!({ "pooling_mode": mode }));
        assert!(options().unwrap_err().contains(word), "{:?}", options());
    }
    write("modules.json", json!([transformer, pooling, module("2_Dense", "sentence_transformers.models.Dense")]));
    write("1_Pooling/config.json", json!({ "pooling_mode": "mean" }));
    assert!(options().unwrap_err().contains("Dense"));
    write("modules.json", json!([transformer, module("../x", "a.Pooling")]));
    assert!(options().unwrap_err().contains("not in the folder"));
}

fn embeddings(out: &str) -> Vec<Vec<f32>> {
    let row = |line: &str| serde_json::from_str::<Value>(line).unwrap()["embedding"].clone();
    out.lines().map(|line| serde_json::from_value(row(line)).unwrap()).collect()
}

#[test]
fn texts_are_embedded_from_the_command_line() {
    let (folder, model) = (tempfile::tempdir().unwrap(), goldens("tiny-bert").display().to_string());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let texts = ["The man was there.", "of the time"];
    let said = embeddings(&ok(&["embed", "--model", &model, "-q", texts[0], texts[1]]));
    let base = base();
    assert_eq!(said, embed(&base, &Frozen, &texts, &options(&base)).unwrap());
    std::fs::write(path("a.txt"), texts.join("\n")).unwrap();
    assert_eq!(embeddings(&ok(&["embed", "--model", &model, "-q", "--input", &path("a.txt")])), said);
    let rows = texts.map(|t| json!({ "text": t }).to_string()).join("\n");
    std::fs::write(path("a.jsonl"), rows).unwrap();
    let out = path("o.safetensors");
    let report = run(&["embed", "--model", &model, "--input", &path("a.jsonl"), "--output", &out]);
    assert_eq!((report["texts"].as_u64(), report["width"].as_u64()), (Some(2), Some(32)));
    let file = SafetensorsFile::open(Path::new(&out)).unwrap();
    assert_eq!(file.load("embeddings").unwrap().unwrap().to_vec2::<f32>().unwrap(), said);
    let adapter = goldens("family-adapters/bert").display().to_string();
    let other = embeddings(&ok(&["embed", "--model", &model, "-q", "--adapter", &adapter, texts[0]]));
    assert!(other[0] != said[0]);
    std::fs::write(path("bad.jsonl"), "{\"text\": \"a\"}\n{\"txt\": 1}").unwrap();
    assert!(error(&["embed", "--model", &model, "--input", &path("bad.jsonl")]).contains("line 2"));
    assert!(error(&["embed", "--model", &model, "a", "--output", "x.csv"]).contains(".safetensors or .jsonl"));
    assert!(error(&["embed", "--model", &model]).contains("there is no text"));
}

/// A decoder has vectors too, where it is said how; and what an encoder cannot do is refused by name.
#[test]
fn what_a_model_cannot_do_is_refused_by_name() {
    let (bert, llama) = (goldens("tiny-bert").display().to_string(), goldens("tiny-llama").display().to_string());
    assert!(error(&["embed", "--model", &llama, "a"]).contains("--pooling"));
    let last = embeddings(&ok(&["embed", "--model", &llama, "-q", "--pooling", "last", "--normalize", "up 3"]));
    assert!((last[0].iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("d.jsonl").display().to_string();
    std::fs::write(&data, "{\"text\": \"a b\"}").unwrap();
    let output = folder.path().join("out").display().to_string();
    for (name, more) in [
        ("train", vec!["--data", &data, "--output", &output]),
        ("generate", vec!["--prompt", "a"]),
        ("eval", vec!["--data", &data]),
        ("plan", vec![]),
    ] {
        let message = error(&[&[name, "--model", &bert], more.as_slice()].concat());
        assert!(message.contains(&format!("`lorimer {name}` needs a model that predicts tokens")), "{message}");
    }
}

/// A server of tiny-bert with PEFT's adapters.
struct Server {
    child: std::process::Child,
    address: String,
}

impl Server {
    fn start(model: &str, more: &[&str]) -> Self {
        let model = goldens(model).display().to_string();
        let base = ["serve", "--model", &model, "--served-model-name", "tiny", "--port", "0", "--json", "-q"];
        let mut child = common::lorimer(&[&base, more].concat()).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url: Value = serde_json::from_str(&line).expect("the server says where it is");
        Self { child, address: url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string() }
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let (body, address) = (body.to_string(), &self.address);
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        let (head, body) = all.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {all}")))
    }

    fn vectors(&self, body: Value) -> Vec<Vec<f32>> {
        let (status, answer) = self.ask("POST", "/v1/embeddings", &body);
        assert_eq!(status, 200, "{answer}");
        let data = answer["data"].as_array().unwrap();
        data.iter().map(|row| serde_json::from_value(row["embedding"].clone()).unwrap()).collect()
    }

    fn refusal(&self, path: &str, body: Value) -> (u16, String) {
        let (status, answer) = self.ask("POST", path, &body);
        let error = &answer["error"];
        (status, error["param"].as_str().or(error["code"].as_str()).unwrap_or_default().to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    let d = distance(&matrix(a.to_vec()), &matrix(b.to_vec()));
    assert!(d < 1e-5, "{d:e}");
}

#[test]
fn a_server_of_an_encoder_answers_embeddings() {
    let adapters = goldens("family-adapters").display().to_string();
    let (server, base) = (Server::start("tiny-bert", &["--adapters", &adapters]), base());
    let (texts, own) = (["The man was there.", "of the time"], options(&base));
    let expected = embed(&base, &Frozen, &texts, &own).unwrap();
    let (status, answer) =
        server.ask("POST", "/v1/embeddings", &json!({ "model": "tiny", "input": texts, "user": "u" }));
    let tokens = encode(&base.text, &texts, &own).unwrap();
    let count = tokens.iter().map(Vec::len).sum::<usize>();
    assert_eq!((status, &answer["object"], &answer["model"]), (200, &json!("list"), &json!("tiny")));
    assert_eq!(answer["usage"], json!({ "prompt_tokens": count, "total_tokens": count }));
    assert_eq!(answer["data"][1]["index"], 1);
    close(&server.vectors(json!({ "input": texts })), &expected);
    close(&server.vectors(json!({ "input": texts[0] })), &expected[..1]);
    close(&server.vectors(json!({ "input": tokens })), &expected);
    close(&server.vectors(json!({ "input": tokens[1], "encoding_format": "float" })), &expected[1..]);
    let (_, answer) = server.ask("POST", "/v1/embeddings", &json!({ "input": texts[0], "encoding_format": "base64" }));
    assert_eq!(answer["data"][0]["embedding"].as_str().unwrap().len(), (32 * 4usize).div_ceil(3) * 4);
    let short = server.vectors(json!({ "input": texts[0], "dimensions": 8 }));
    let length = expected[0][..8].iter().map(|v| v * v).sum::<f32>().sqrt();
    close(&short, &[expected[0][..8].iter().map(|v| v / length).collect()]);
    for name in ["bert", "bert_bias"] {
        let stored = StoredAdapter::read(&goldens("family-adapters").join(name)).unwrap();
        let adapter = Adapter::load_whole(base.model(), &stored).unwrap();
        let with = embed(&base, &Attached::one(&adapter), &texts, &own).unwrap();
        close(&server.vectors(json!({ "model": name, "input": texts })), &with);
        assert!(distance(&matrix(with), &matrix(expected.clone())) > 1e-4);
    }
    let long = "their walking ".repeat(40);
    close(
        &server.vectors(json!({ "input": long, "truncate_prompt_tokens": -1 })),
        &embed(&base, &Frozen, &[&long], &own).unwrap(),
    );
    for (body, what) in [
        (json!({}), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [[]] }), "input"),
        (json!({ "input": [[1, 99999]] }), "input"),
        (json!({ "input": long }), "input"),
        (json!({ "input": "a", "dimensions": 33 }), "dimensions"),
        (json!({ "input": "a", "encoding_format": "int8" }), "encoding_format"),
        (json!({ "input": "a", "temperature": 1 }), "temperature"),
    ] {
        assert_eq!(server.refusal("/v1/embeddings", body.clone()), (400, what.to_string()), "{body}");
    }
    assert_eq!(server.refusal("/v1/embeddings", json!({ "input": "a", "model": "nobody" })).0, 404);
    let chat = json!({ "messages": [{ "role": "user", "content": "a" }] });
    assert_eq!(server.refusal("/v1/chat/completions", chat), (400, "not_a_decoder".into()));
    assert_eq!(server.refusal("/v1/completions", json!({ "prompt": "a" })), (400, "not_a_decoder".into()));
    assert_eq!(server.ask("GET", "/health", &json!({})).0, 200);
    assert_eq!(server.ask("GET", "/v1/models", &json!({})).1["data"][0]["id"], "tiny");
}

#[test]
fn a_server_of_a_decoder_refuses_embeddings_by_name() {
    let server = Server::start("tiny-llama", &["--pool", "4MB"]);
    assert_eq!(server.refusal("/v1/embeddings", json!({ "input": "a" })), (400, "not_an_encoder".into()));
}
