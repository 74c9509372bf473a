//! Adapters combined into one: PEFT's numbers (tests/goldens/make_combine.py), what is written beside them, and what is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::algebra::combine::{COMBINATIONS, Combined, Request, clamp, combine};
use lorimer_adapter::delta::LowRank;
use lorimer_adapter::file::convert::{low_ranks, to_peft};
use lorimer_adapter::methods::mt19937::TorchGenerator;
use lorimer_adapter::{BaseIdentity, Manifest};
use serde_json::{Map, Value, json as value};

use crate::goldens::*;
use crate::prelude::*;

type Weighted<'a> = &'a [(PathBuf, Option<f64>)];

fn run(adapters: Weighted<'_>, method: &str, settings: Value, output: &Path) -> lorimer_adapter::Result<Combined> {
    let settings = settings.as_object().unwrap();
    combine(&Request { adapters, method, settings, output, overwrite: false }, |_, _, _| {})
}

/// ΔW of each module.
fn deltas(folder: &Path) -> BTreeMap<String, Tensor> {
    let stored = StoredAdapter::read(folder).unwrap();
    let low = low_ranks(&stored).unwrap();
    low.into_iter().map(|(m, low)| (m, low.weight().unwrap())).collect()
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_dtype(DType::F64).unwrap(), b.to_dtype(DType::F64).unwrap());
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm(&(a - &b).unwrap()) / norm(&b).max(1e-12)
}

#[test]
fn combinations_equal_pefts() {
    let index = json(&folder("combine/golden.json"));
    let golden = Golden::open("combine");
    let out = tempfile::tempdir().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let mut covered = std::collections::BTreeSet::new();
    for case in index["cases"].as_array().unwrap() {
        let name = text(&case["case"]);
        let weights = case["weights"].as_array().unwrap().iter().map(Value::as_f64);
        let parents = case["parents"].as_array().unwrap().iter().map(|p| folder("combine").join(text(p)));
        let adapters: Vec<_> = parents.zip(weights).collect();
        let mut settings = case["settings"].clone();
        if case["random"] == true {
            settings["seed"] = index["seed"].clone();
        }
        let target = out.path().join(&name);
        run(&adapters, &text(&case["method"]), settings, &target).unwrap();
        let ours = deltas(&target);
        let expected = golden.0.names().into_iter().filter(|n| n.split_once('.').is_some_and(|(case, _)| case == name));
        let mut compared = 0;
        for key in expected {
            let d = apart(&ours[key.split_once('.').unwrap().1], &golden.get(&key));
            assert!(d < 1e-5, "{key} differs by {d:e}");
            compared += 1;
        }
        assert_eq!(compared, ours.len(), "{name}");
        covered.insert(text(&case["method"]));
    }
    // All of PEFT's types, and KnOTS.
    assert_eq!(covered.len(), 12, "{covered:?}");
}

#[test]
fn clamping_and_random_masks_equal_torchs() {
    let golden = Golden::open("combine");
    let (b, a) = clamp(&golden.get("clamp.before.B"), &golden.get("clamp.before.A"), 0.9).unwrap();
    assert!(distance(&b, &golden.get("clamp.after.B")) < 1e-6);
    assert!(distance(&a, &golden.get("clamp.after.A")) < 1e-6);
    let drawn = TorchGenerator::new(77).rand(35).into_iter().map(|v| if v < 0.4f32 { 1f32 } else { 0.0 });
    let expected = golden.get("bernoulli").flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(drawn.collect::<Vec<_>>(), expected);
}

/// A small adapter of two modules, (12 → 10) and (10 → 12), written into a folder.
fn write(folder: &Path, seed: u64, change: impl Fn(&mut StoredAdapter)) -> PathBuf {
    let mut rng = Random(seed);
    let modules = [("model.layers.0.self_attn.q_proj", 12, 10), ("model.layers.0.self_attn.o_proj", 10, 12)];
    let low = |(name, inputs, outputs): (&str, usize, usize)| {
        let (a, b) = (rng.matrix(4, inputs), rng.matrix(outputs, 4));
        (name.to_string(), LowRank { a, b, scaling: 0.5 })
    };
    let mut stored = to_peft(modules.into_iter().map(low).collect(), "org/base").unwrap();
    stored.config.insert("target_modules".into(), value!(["q_proj", "o_proj"]));
    change(&mut stored);
    stored.write(folder, None).unwrap();
    folder.to_path_buf()
}

/// Numbers between −1 and 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|_| self.next()).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }
}

fn manifest(fingerprint: &str, template: Option<&str>) -> Manifest {
    Manifest {
        format: 1,
        content_id: "sha256:0".into(),
        method: "lora".into(),
        lorimer: "0".into(),
        base: Some(BaseIdentity {
            name: "b".into(),
            fingerprint: fingerprint.into(),
            model_type: "llama".into(),
            pruned: None,
        }),
        chat_template: template.map(str::to_string),
        training: Value::Null,
        golden: Vec::new(),
        frozen: Default::default(),
        xlora: None,
    }
}

#[test]
fn what_went_in_and_how_far_it_is_stand_beside_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let a = write(&at("a"), 1, |s| s.manifest = Some(manifest("sha256:1", Some("{{ x }}"))));
    let b = write(&at("b"), 2, |s| s.tensors.retain(|name, _| !name.contains("o_proj")));
    let told = run(&[(a.clone(), None), (b.clone(), Some(-0.5))], "svd", value!({ "rank": 3 }), &at("out"));
    // b's configuration names o_proj, of which its file has nothing.
    let told = told.unwrap_err().to_string();
    assert!(told.contains("not whole") && told.contains("`o_proj`"), "{told}");
    let b = write(&at("b"), 2, |s| {
        s.tensors.retain(|name, _| !name.contains("o_proj"));
        s.config.insert("target_modules".into(), value!(["q_proj"]));
    });
    let adapters = [(a.clone(), None), (b.clone(), Some(-0.5))];
    let told = run(&adapters, "svd", value!({ "rank": 3 }), &at("out")).unwrap();
    let of = |path: &Path| StoredAdapter::read(path).unwrap();
    for (parent, (path, missing)) in told.parents.iter().zip([(&a, 0), (&b, 1)]) {
        assert_eq!(parent.content_id, of(path).content_id().unwrap());
        assert_eq!(parent.missing, missing);
    }
    let out = of(&at("out"));
    let written = out.manifest.clone().unwrap();
    assert_eq!(written.content_id, out.content_id().unwrap());
    assert_eq!(told.content_id, written.content_id);
    assert_eq!(written.base.as_ref().unwrap().fingerprint, "sha256:1");
    assert_eq!(written.chat_template.as_deref(), Some("{{ x }}"));
    assert_eq!(written.training["parents"][1]["content_id"], told.parents[1].content_id.as_str());
    assert_eq!(written.training["settings"], value!({ "rank": 3, "svd_clamp": null }));
    assert_eq!((&out.config["r"], &out.config["lora_alpha"]), (&value!(3), &value!(3)));
    // The error is that of the whole matrices.
    let (from_a, from_b, merged) = (deltas(&a), deltas(&b), deltas(&at("out")));
    let (mut wrong, mut whole) = (0.0, 0.0);
    for (module, ours) in &merged {
        let mut sum = from_a[module].clone();
        if let Some(b) = from_b.get(module) {
            sum = (sum - (b * 0.5).unwrap()).unwrap();
        }
        let squares = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() as f64;
        let own = squares(&(ours - &sum).unwrap());
        let error = written.training["modules"][module]["error"].as_f64().unwrap();
        assert!((error - (own / squares(&sum)).sqrt()).abs() < 1e-5, "{module}");
        wrong += own;
        whole += squares(&sum);
    }
    assert!((told.error.unwrap() - (wrong / whole).sqrt()).abs() < 1e-5);
    assert!(told.error.unwrap() > 0.05);
}

#[test]
fn adapters_that_do_not_belong_together_are_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let a = write(&at("a"), 1, |s| s.manifest = Some(manifest("sha256:1", Some("{{ x }}"))));
    let q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let refused = |method: &str, settings: Value, b: PathBuf, parts: &[&str]| {
        let told = run(&[(a.clone(), None), (b.clone(), None)], method, settings, &at("out"));
        let told = told.map(|_| ()).expect_err(parts[0]).to_string();
        assert!(parts.iter().all(|part| told.contains(part)), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "a" || name == "b"), "{left:?}");
        if b.exists() {
            std::fs::remove_dir_all(&b).unwrap();
        }
    };
    let cat = |b: PathBuf, parts: &[&str]| refused("cat", value!({}), b, parts);
    cat(at("none"), &["there is none here"]);
    cat(write(&at("b"), 2, |s| s.manifest = Some(manifest("sha256:2", None))), &["different bases", "sha256:2"]);
    let other_template = |s: &mut StoredAdapter| s.manifest = Some(manifest("sha256:1", Some("{{ y }}")));
    cat(write(&at("b"), 2, other_template), &["chat templates"]);
    let renamed = |s: &mut StoredAdapter| drop(s.config.insert("base_model_name_or_path".into(), value!("org/other")));
    cat(write(&at("b"), 2, renamed), &["`org/base` and `org/other`", "adapter_config.json"]);
    let b = write(&at("b"), 2, |_| {});
    std::fs::write(a.join("tokenizer.json"), "{\"a\": 1}").unwrap();
    std::fs::write(b.join("tokenizer.json"), "{\"a\": 2}").unwrap();
    cat(b, &["tokenizer.json"]);
    let narrow = |s: &mut StoredAdapter| drop(s.tensors.insert(q.into(), Random(1).matrix(4, 11)));
    cat(write(&at("b"), 2, narrow), &["different bases", "11 inputs", "12 inputs"]);
    let ranks = |s: &mut StoredAdapter| drop(s.tensors.insert(q.into(), Random(1).matrix(3, 12)));
    cat(write(&at("b"), 2, ranks), &["rank 4 of the configuration"]);
    let no_b = |s: &mut StoredAdapter| drop(s.tensors.remove(&q.replace("lora_A", "lora_B")));
    cat(write(&at("b"), 2, no_b), &["q_proj"]);
    let unknown =
        |s: &mut StoredAdapter| drop(s.tensors.insert("base_model.model.x.lora_C".into(), Random(1).matrix(1, 1)));
    cat(write(&at("b"), 2, unknown), &["lora_C"]);
    let whole = |s: &mut StoredAdapter| {
        drop(s.tensors.insert("base_model.model.model.norm.weight".into(), Random(1).matrix(1, 4)))
    };
    cat(write(&at("b"), 2, whole), &["model.norm"]);
    let nan = |s: &mut StoredAdapter| {
        drop(s.tensors.insert(q.into(), (Random(1).matrix(4, 12) * f64::NAN).unwrap()));
    };
    cat(write(&at("b"), 2, nan), &["not finite"]);
    cat(write(&at("b"), 2, |s| drop(s.config.insert("use_dora".into(), value!(true)))), &["lora_A", "--to lora"]);
    let pissa = |s: &mut StoredAdapter| drop(s.config.insert("init_lora_weights".into(), value!("pissa")));
    cat(write(&at("b"), 2, pissa), &["--to lora"]);
    cat(write(&at("b"), 2, |s| drop(s.config.insert("peft_type".into(), value!("NONE")))), &["NONE"]);
    let b = write(&at("b"), 2, |_| {});
    let file = b.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    cat(b, &["not a valid safetensors file"]);

    let plain = || write(&at("b"), 2, |_| {});
    for density in [0.0, -0.5, 1.5] {
        refused("ties", value!({ "density": density }), plain(), &["above 0 and at most 1"]);
    }
    refused("ties", value!({}), plain(), &["needs a density"]);
    refused("cat", value!({ "density": 0.5 }), plain(), &["`cat` has no setting `density`"]);
    refused("svd", value!({ "rank": 0 }), plain(), &["rank 0"]);
    refused("svd", value!({ "svd_driver": "gesvd" }), plain(), &["svd_driver"]);
    refused("ties", value!({ "density": 0.5, "majority_sign_method": "loudest" }), plain(), &["loudest"]);
    refused("tie", value!({}), plain(), &["no combination `tie`", "dare_ties_svd"]);
    refused("lego", value!({ "rank": 9 }), plain(), &["8 units", "rank 9"]);
    let smaller = |s: &mut StoredAdapter| {
        for (key, axis) in [("lora_A", 0), ("lora_B", 1)] {
            let name = q.replace("lora_A", key);
            let cut = s.tensors[&name].narrow(axis, 0, 2).unwrap().contiguous().unwrap();
            s.tensors.insert(name, cut);
        }
        s.config.insert("rank_pattern".into(), value!({ "q_proj": 2 }));
    };
    refused("linear", value!({}), write(&at("b"), 2, smaller), &["rank 4 in one adapter and 2 in another", "`cat`"]);
    for (method, weight) in [("lego", -1.0), ("cat", f64::INFINITY), ("lego", 0.0)] {
        let b = plain();
        let told = run(&[(a.clone(), Some(weight)), (b, None)], method, value!({}), &at("out")).unwrap_err();
        assert!(told.to_string().contains("weight"), "{told}");
    }
    assert!(
        run(&[(a.clone(), Some(0.0))], "cat", value!({}), &at("out")).unwrap_err().to_string().contains("all weights")
    );
    assert!(run(&[], "cat", value!({}), &at("out")).unwrap_err().to_string().contains("0 adapters"));
    assert!(!at("out").exists());
}

/// Parents that know another value are refused wherever one that knows none stands, and the result has the name of the first that knows it.
#[test]
fn a_parent_that_says_nothing_hides_no_unequal_bases() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let name =
        |s: &mut StoredAdapter, name: &str| drop(s.config.insert("base_model_name_or_path".into(), value!(name)));
    let silent = write(&at("silent"), 1, |s| name(s, " "));
    let parent = |folder: &str, (fingerprint, template, base, tokenizer): (&str, &str, &str, &str)| {
        let path = write(&at(folder), 2, |s| {
            name(s, base);
            s.manifest =
                (!fingerprint.is_empty()).then(|| manifest(fingerprint, (!template.is_empty()).then_some(template)));
        });
        if !tokenizer.is_empty() {
            std::fs::write(path.join("tokenizer.json"), tokenizer).unwrap();
        }
        path
    };
    for (one, two, says) in [
        (("sha256:1", "", "", ""), ("sha256:2", "", "", ""), "their weights are b (sha256:1) and b (sha256:2)"),
        (("", "", "org/one", ""), ("", "", "org/two", ""), "base_model_name_or_path is `org/one` and `org/two`"),
        (
            ("sha256:1", "", "org/one", ""),
            ("", "", "org/two", ""),
            "base_model_name_or_path is `org/one` and `org/two`",
        ),
        // The name in lorimer.json is one too.
        (("sha256:1", "", "", ""), ("", "", "org/two", ""), "base_model_name_or_path is `b` and `org/two`"),
        (("sha256:1", "x", "", ""), ("sha256:1", "y", "", ""), "different chat templates"),
        (("", "", "", "{}"), ("", "", "", "{ }"), "tokenizer.json"),
    ] {
        let (one, two) = (parent("one", one), parent("two", two));
        for order in [[&silent, &one, &two], [&one, &silent, &two], [&silent, &two, &one]] {
            for (method, settings) in [("cat", value!({})), ("tensors", value!({}))] {
                let adapters: Vec<_> = order.iter().map(|path| (path.to_path_buf(), None)).collect();
                let problem = run(&adapters, method, settings, &at("out")).map(|_| ()).expect_err(says).to_string();
                let turned = order[1] == &two;
                assert!(turned || problem.contains(says), "{problem}");
                assert!(problem.contains("`") && problem.contains("different bases"), "{problem}");
                assert!(!at("out").exists());
            }
        }
        for folder in ["one", "two"] {
            std::fs::remove_dir_all(at(folder)).unwrap();
        }
    }
    // Two paths of one base, by its fingerprint, and one that says nothing.
    let one = parent("one", ("sha256:1", "x", "here/one", ""));
    let two = parent("two", ("sha256:1", "", "org/two", "{}"));
    let adapters = [(silent, None), (one, None), (two, None)];
    for method in ["cat", "tensors"] {
        run(&adapters, method, value!({}), &at(method)).unwrap();
        let out = StoredAdapter::read(&at(method)).unwrap();
        assert_eq!(out.config["base_model_name_or_path"], "here/one", "{method}");
        let manifest = out.manifest.unwrap();
        assert_eq!(
            (manifest.base.unwrap().fingerprint.as_str(), manifest.chat_template.as_deref()),
            ("sha256:1", Some("x"))
        );
    }
}

#[test]
fn only_another_adapter_is_overwritten_and_none_that_goes_in() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (a, b) = (write(&at("a"), 1, |_| {}), write(&at("b"), 2, |_| {}));
    let adapters = [(a.clone(), None), (b.clone(), None)];
    let again = |output: &Path, overwrite| {
        let settings = Map::new();
        combine(&Request { adapters: &adapters, method: "cat", settings: &settings, output, overwrite }, |_, _, _| {})
    };
    let first = again(&at("out"), false).unwrap();
    assert!(again(&at("out"), false).unwrap_err().to_string().contains("--overwrite"));
    assert_eq!(again(&at("out"), true).unwrap(), first);
    assert!(again(&a, true).unwrap_err().to_string().contains("one of the adapters"));
    std::fs::create_dir(at("notes")).unwrap();
    std::fs::write(at("notes/x"), "kept").unwrap();
    assert!(again(&at("notes"), true).unwrap_err().to_string().contains("holds no adapter"));
    assert!(at("notes/x").exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
}

/// Thousands of ranks: clustering so many units is refused with the numbers, and what needs no square of them takes none for its error either.
#[test]
fn many_ranks_take_no_square_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Random(5);
    let parent = |i: usize| {
        let (a, b) = (rng.matrix(3000, 2), rng.matrix(3, 3000));
        let (path, low) = (dir.path().join(format!("p{i}")), LowRank { a, b, scaling: 1.0 });
        to_peft([("model.layers.0.self_attn.q_proj".to_string(), low)].into(), "b")
            .unwrap()
            .write(&path, None)
            .unwrap();
        (path, None)
    };
    let adapters: Vec<_> = (0..3).map(parent).collect();
    let out = dir.path().join("out");
    let told = run(&adapters, "lego", value!({ "rank": 4 }), &out).unwrap_err().to_string();
    assert!(told.contains("has 9000 units in 3 adapters together") && told.contains("up to 8192"), "{told}");
    assert!(!out.exists());
    // (9,000 + 9,000)² numbers of each Gram matrix would be 2.6 GB.
    let told = run(&adapters, "cat", value!({}), &out).unwrap();
    assert!(told.rank == 9000 && told.error.unwrap() < 1e-5, "{told:?}");
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    let peak: u64 = peak.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(peak < 2 << 20, "{peak} kB");
}

/// As many modules as a large model has: the header's room is more than most of it.
#[test]
fn an_adapter_of_many_modules_is_combined() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Random(4);
    let low = |i: usize| {
        let (a, b) = (rng.matrix(1, 3), rng.matrix(2, 1));
        (format!("model.layers.{i}.self_attn.a_projection_with_a_long_name"), LowRank { a, b, scaling: 1.0 })
    };
    let parent = dir.path().join("a");
    to_peft((0..700).map(low).collect(), "b").unwrap().write(&parent, None).unwrap();
    let out = dir.path().join("out");
    run(&[(parent.clone(), Some(2.0)), (parent.clone(), None)], "task_arithmetic", value!({}), &out).unwrap();
    let (ours, own) = (deltas(&out), deltas(&parent));
    assert!(ours.len() == 700 && own.iter().all(|(m, d)| apart(&ours[m], &(d * 3.0).unwrap()) < 1e-6));
}

/// Every combination is a whole adapter on a model, and is served and evaluated as any LoRA.
#[test]
fn every_combination_is_an_adapter_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny("tiny-llama");
    let adapters: Vec<_> = ["plain", "rooted"].map(|name| (folder("combine").join(name), None)).into();
    let rows = [vec![5, 9, 30, 7]];
    for c in COMBINATIONS {
        let out = dir.path().join(c.name);
        let settings = match c.takes {
            takes if takes.contains(&"density") => value!({ "density": 0.5 }),
            takes if takes.contains(&"energy") => value!({ "energy": 0.9 }),
            _ => value!({}),
        };
        if c.name == "tensors" {
            // One of them is rsLoRA.
            let told = run(&adapters, c.name, settings, &out).unwrap_err().to_string();
            assert!(told.contains("differ in"), "{told}");
            let twice = [adapters[0].clone(), adapters[0].clone()];
            run(&twice, c.name, value!({}), &out).unwrap();
        } else {
            run(&adapters, c.name, settings, &out).unwrap();
        }
        let stored = StoredAdapter::read(&out).unwrap();
        let adapter = Adapter::load_whole(&model, &stored).unwrap();
        let changed = logits(&model, &Attached::one(&adapter), &rows);
        assert!(distance(&changed, &logits(&model, &Frozen, &rows)) > 1e-3, "{}", c.name);
    }
}

/// FlyLoRA and SMoRA: `tensors` is the mean of each tensor and of their own kind, `dense` the mean of α/r · B A; sums are refused by name.
#[test]
fn adapters_that_choose_by_token_are_averaged_in_two_ways() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny("tiny-llama");
    for (method, settings, gate) in [
        ("flylora", value!({ "r": 4, "lora_alpha": 6.0, "top_k": 2, "target_modules": ["q_proj"] }), "lora_topk_bias"),
        ("smora", value!({ "r": 4, "lora_alpha": 6.0, "activate_r": 2, "target_modules": ["q_proj"] }), "lora_biases"),
    ] {
        let mut folders = Vec::new();
        for seed in [1u64, 2] {
            let adapter =
                Adapter::attach(&model, methods::build(method, settings.as_object().unwrap()).unwrap(), seed).unwrap();
            let mut stored = adapter.to_stored("tiny").unwrap();
            let mut rng = Random(seed);
            for (name, tensor) in &mut stored.tensors {
                if name.contains("lora_B") || name.contains(gate) {
                    let moved = rng.matrix(1, tensor.elem_count()).reshape(tensor.dims()).unwrap();
                    *tensor = moved;
                }
            }
            let path = dir.path().join(format!("{method}{seed}"));
            stored.write(&path, None).unwrap();
            folders.push((path, None));
        }
        let out = |name: &str| dir.path().join(format!("{method}-{name}"));
        run(&folders, "tensors", value!({}), &out("tensors")).unwrap();
        let (a, b) = (StoredAdapter::read(&folders[0].0).unwrap(), StoredAdapter::read(&folders[1].0).unwrap());
        let mean = StoredAdapter::read(&out("tensors")).unwrap();
        for (name, tensor) in &mean.tensors {
            let expected = ((&a.tensors[name] + &b.tensors[name]).unwrap() * 0.5).unwrap();
            assert!(distance(tensor, &expected) < 1e-6, "{name}");
        }
        assert_eq!(mean.manifest.as_ref().unwrap().method, method);
        Adapter::load_whole(&model, &mean).unwrap();
        run(&folders, "dense", value!({}), &out("dense")).unwrap();
        for (module, ours) in deltas(&out("dense")) {
            let product = |s: &StoredAdapter| {
                let t = |key: &str| &s.tensors[&format!("base_model.model.{module}.{key}.weight")];
                (t("lora_B").matmul(t("lora_A")).unwrap() * (6.0 / 4.0)).unwrap()
            };
            let expected = ((product(&a) + product(&b)).unwrap() * 0.5).unwrap();
            assert!(apart(&ours, &expected) < 1e-6, "{module}");
        }
        let told = run(&folders, "cat", value!({}), &out("cat")).unwrap_err().to_string();
        assert!(told.contains("by the token") && told.contains("--method tensors"), "{told}");
        let told =
            run(&[folders[0].clone(), (folder("combine").join("plain"), None)], "tensors", value!({}), &out("x"));
        assert!(told.unwrap_err().to_string().contains("different bases"));
    }
    let bone =
        Adapter::attach(&model, methods::build("bone", value!({ "r": 8 }).as_object().unwrap()).unwrap(), 1).unwrap();
    bone.to_stored("tiny").unwrap().write(&dir.path().join("bone"), None).unwrap();
    let told =
        run(&[(dir.path().join("bone"), None)], "tensors", value!({}), &dir.path().join("x")).unwrap_err().to_string();
    assert!(told.contains("`bone`") && told.contains("lora, flylora, smora"), "{told}");
    let told =
        run(&[(dir.path().join("bone"), None)], "cat", value!({}), &dir.path().join("x")).unwrap_err().to_string();
    assert!(told.contains("--to lora"), "{told}");
}
