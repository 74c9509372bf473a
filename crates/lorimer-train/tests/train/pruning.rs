//! LoRAPrune against the authors' functions, and models with units taken out against masked ones, transformers and PEFT (see
//! tests/goldens/make_pruning.py).

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, TensorId};
use lorimer_adapter::algebra::recover::recover;
use lorimer_adapter::algebra::slice::{identity_of, kept_by_masks, pruned_shapes, slice_to_folder};
use lorimer_adapter::methods::loraprune::score::surrogate;
use lorimer_adapter::methods::loraprune::{LoraPruneConfig, sparsity};
use lorimer_adapter::pruning::units::{KeptLayer, groups};
use lorimer_adapter::pruning::{PRUNING_FILE, Pruning, check_parts};
use lorimer_adapter::training::RunShape;
use lorimer_model::base::open_weights;
use lorimer_model::weights::{SafetensorsFile, Weights};
use lorimer_model::{Decoder, DecoderConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::prelude::*;
use crate::support::{distance, folder, logits, tiny};
use crate::tiny::random;

fn golden(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder("pruning").join(name), &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A model of two layers with the golden's weights.
fn scored_model(all: &HashMap<String, Tensor>) -> Decoder {
    let json = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 10, "vocab_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": true,
    });
    let config = DecoderConfig::from_json(&json, Path::new("config.json")).unwrap();
    let one = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let mut tensors: HashMap<String, Tensor> =
        all.iter().filter(|(k, _)| k.ends_with(".weight")).map(|(k, t)| (k.clone(), t.clone())).collect();
    tensors.insert("model.embed_tokens.weight".into(), one(&[12, 8]));
    tensors.insert("model.norm.weight".into(), one(&[8]));
    for i in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(format!("model.layers.{i}.{norm}.weight"), one(&[8]));
        }
    }
    Decoder::load(config, &Weights::from_memory(tensors)).unwrap()
}

/// Average importance and masks of a run with the golden's gradients are the authors'; what is gone stays gone; the last pruning reaches the ratio; the
/// last layer loses nothing.
#[test]
fn importance_schedule_and_masks_are_the_authors() {
    let all = golden("loraprune.safetensors");
    let model = scored_model(&all);
    let shares = flat(&all["sparsity"]);
    let settings = LoraPruneConfig::default();
    for (step, share) in shares.iter().enumerate() {
        assert!((sparsity(step, shares.len(), &settings) - share).abs() < 1e-12, "step {step}");
    }
    for (name, more) in
        [("lora", json!({})), ("squared", json!({"power": 2})), ("magnitude", json!({"score": "magnitude"}))]
    {
        let mut settings = json!({"r": 2, "lora_alpha": 4, "prune_every": 2});
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let method = methods::build("loraprune", settings.as_object().unwrap()).unwrap();
        let adapter = Adapter::attach(&model, method, 0).unwrap();
        let named = adapter.named();
        let var = |path: &str| named.iter().find(|p| p.name == path).unwrap().var;
        let sites = adapter.sites(&model);
        let factor = |key: &str| sites.iter().map(move |(site, ..)| format!("{}.{key}", site.path)).collect::<Vec<_>>();
        factor("lora_A").iter().chain(&factor("lora_B")).for_each(|name| var(name).set(&all[name]).unwrap());
        let run = RunShape { seed: 0, steps: shares.len(), peak: 1.0 };
        let callback = adapter.method.training().callback.unwrap().build(run, &named);
        let mut before: HashMap<&str, Vec<f64>> = HashMap::new();
        for step in 0..shares.len() {
            let at = |name: &str| all[name].get(step).unwrap();
            let gradients: Vec<(TensorId, &str, Tensor)> = sites
                .iter()
                .flat_map(|(site, ..)| {
                    let of = |key: &str| var(&format!("{}.{key}", site.path)).id();
                    let path = site.path.as_str();
                    [(of("lora_A"), path, at(&format!("{path}.gA"))), (of("lora_B"), path, at(&format!("{path}.gB")))]
                })
                .collect();
            let of = |var: &candle_core::Var| gradients.iter().find(|(id, ..)| *id == var.id()).map(|(.., g)| g);
            callback.before(step, &sites, &of).unwrap();
            for (part, module, width) in [("self_attn", "k_proj", 2), ("mlp", "gate_proj", 1)] {
                let held = |key: &str| {
                    let all = flat(var(&format!("model.layers.0.{part}.{module}.{key}")));
                    all.into_iter().step_by(width).collect::<Vec<_>>()
                };
                if step <= 18 {
                    let expected = flat(&at(&format!("{name}.{part}.average")));
                    let apart =
                        held("lora_score").iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                    assert!(apart < 1e-5, "{name} {part} {step}: {apart:e}");
                }
                let mask = held("lora_mask");
                assert_eq!(mask, flat(&at(&format!("{name}.{part}.mask"))), "{name} {part} {step}");
                let earlier = before.insert(part, mask.clone()).unwrap_or_else(|| vec![1.0; mask.len()]);
                assert!(mask.iter().zip(earlier).all(|(now, then)| *now <= then));
            }
            for (id, _, g) in &gradients {
                let p = named.iter().find(|p| p.var.id() == *id).unwrap().var;
                p.set(&(p.as_tensor() - (g * 0.05).unwrap()).unwrap()).unwrap();
            }
        }
        let gone = |mask: &[f64]| mask.iter().filter(|m| **m == 0.0).count();
        assert_eq!((gone(&before["self_attn"]), gone(&before["mlp"])), (2, 5));
        for masks in named.iter().filter(|p| p.name.contains("layers.1.") && p.name.ends_with("lora_mask")) {
            assert!(flat(masks.var).iter().all(|m| *m == 1.0));
        }
    }
}

/// G is minus the change of B A by one step of rate 1; where B is zero it is s (∂L/∂W) AᵀA.
#[test]
fn the_surrogate_is_one_step_of_the_product() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut of = |shape: &[usize]| random(shape, 1.0, &mut rng);
    let (a, b, ga, gb, w) = (of(&[3, 7]), of(&[5, 3]), of(&[3, 7]), of(&[5, 3]), of(&[5, 7]));
    let stepped = (&b - &gb).unwrap().matmul(&(&a - &ga).unwrap()).unwrap();
    let expected = (b.matmul(&a).unwrap() - stepped).unwrap();
    assert!(distance(&surrogate((&a, &b), (&ga, &gb)).unwrap(), &expected) < 1e-12);
    let (zero, none, s) = (b.zeros_like().unwrap(), a.zeros_like().unwrap(), 2.0);
    let gb = (w.matmul(&a.t().unwrap()).unwrap() * s).unwrap();
    let expected = (w.matmul(&a.t().unwrap().matmul(&a).unwrap()).unwrap() * s).unwrap();
    assert!(distance(&surrogate((&a, &zero), (&none, &gb)).unwrap(), &expected) < 1e-12);
}

/// ρ never falls, begins and ends where it is told to.
#[test]
fn the_pruned_share_never_falls() {
    let settings =
        LoraPruneConfig { prune_start: 0.1, prune_ratio: 0.7, warmup: 0.2, cooldown: 0.3, ..Default::default() };
    for total in [1, 7, 50, 333] {
        let all: Vec<f64> = (0..total).map(|step| sparsity(step, total, &settings)).collect();
        assert!(all.windows(2).all(|w| w[0] <= w[1]) && all[0] == 0.1, "{total}");
        assert!(total < 7 || (all[total - 1] - 0.7).abs() < 1e-12);
    }
}

fn read(folder: &Path) -> Decoder {
    let (config, weights) = open_weights(folder, LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

fn record(base: &Path, kept: Vec<KeptLayer>) -> Pruning {
    let (config, weights) = open_weights(base, LoadDtype::F32).unwrap();
    let config = config.decoder("a test").unwrap();
    let identity = identity_of(config, &weights, "the base").unwrap();
    Pruning::new(config, identity, ("rand", json!({"seed": 1})), kept).unwrap()
}

const ROWS: [&[u32]; 2] = [&[1, 7, 9, 3, 11, 12, 30, 4], &[2, 17, 33, 8]];

fn rows() -> Vec<Vec<u32>> {
    ROWS.iter().map(|r| r.to_vec()).collect()
}

/// The masked model's logits are the sliced one's: grouped queries, biases, fused projections, norms around the unit and of heads. Its parameters are those of the formula.
#[test]
fn a_masked_model_is_a_sliced_one() {
    for (name, dropout) in
        [("tiny-llama", 0.0), ("tiny-qwen2", 0.2), ("tiny-phi3", 0.0), ("tiny-gemma2", 0.0), ("tiny-gemma3", 0.0)]
    {
        let base = folder(name);
        let model = tiny(name);
        let settings = json!({"r": 3, "lora_dropout": dropout});
        let adapter =
            Adapter::attach(&model, methods::build("loraprune", settings.as_object().unwrap()).unwrap(), 0).unwrap();
        crate::tiny::move_all(&adapter);
        let shape = model.shape().clone();
        // The first layer loses a group and some channels, the last one channels only.
        let kept: Vec<KeptLayer> = (0..shape.layers.len())
            .map(|i| {
                let kv =
                    if i == 0 { vec![shape.layers[i].kv_heads - 1] } else { (0..shape.layers[i].kv_heads).collect() };
                KeptLayer::of_groups(
                    &shape.layers[i],
                    kv,
                    (0..shape.layers[i].inner).filter(|c| c % (3 + i) != 1).collect(),
                )
            })
            .collect();
        for p in adapter.named().iter().filter(|p| p.name.ends_with("lora_mask")) {
            let (path, _) = p.name.rsplit_once('.').unwrap();
            let role = path.rsplit('.').next().unwrap();
            let layer: usize = path.split('.').nth(2).unwrap().parse().unwrap();
            let (_, attention, unit) = groups(role, &shape.layers[layer]).unwrap();
            let own = if attention { &kept[layer].kv_heads } else { &kept[layer].channels };
            let mask: Vec<f32> = unit.iter().map(|u| if own.contains(u) { 1.0 } else { 0.0 }).collect();
            p.var.set(&Tensor::from_vec(mask, unit.len(), &Device::Cpu).unwrap()).unwrap();
        }
        let masked = logits(&model, &Attached::one(&adapter), &rows());
        let plain = logits(&model, &Frozen, &rows());
        assert!(distance(&masked, &plain) > 1e-2, "{name}");
        let out = tempfile::tempdir().unwrap();
        adapter.to_stored("base").unwrap().write(&out.path().join("adapter"), None).unwrap();
        let stored = StoredAdapter::read(&out.path().join("adapter")).unwrap();
        let (config, _) = open_weights(&base, LoadDtype::F32).unwrap();
        let config = config.decoder("a test").unwrap();
        assert_eq!(kept_by_masks(&stored, config).unwrap(), kept);
        let pruning = record(&base, kept);
        let small = out.path().join("small");
        let sliced = slice_to_folder(&base, &[(stored, 1.0)], &pruning, (&small, LoadDtype::F32), |_| {}).unwrap();
        let smaller = read(&small);
        let apart = distance(&logits(&smaller, &Frozen, &rows()), &masked);
        assert!(apart < 1e-5, "{name}: {apart:e}");
        assert!(sliced.parameters < sliced.whole_parameters && !sliced.uniform);
        let file = SafetensorsFile::open(&small.join("model.safetensors")).unwrap();
        let numbers: u64 = file.names().iter().map(|n| file.load(n).unwrap().unwrap().elem_count() as u64).sum();
        assert_eq!(numbers, sliced.parameters, "{name}");
        assert!(!small.join("whole").exists() && Pruning::read(&small.join(PRUNING_FILE)).unwrap() == pruning);
    }
}

/// Dropout draws for the change's input only, and what is masked is masked: the fast form equals candle's graph (held by the laws), and a dropped unit
/// gives nothing.
#[test]
fn a_dropped_unit_gives_nothing_under_dropout() {
    let model = tiny("tiny-qwen2");
    let settings = json!({"r": 3, "lora_dropout": 0.5});
    let adapter =
        Adapter::attach(&model, methods::build("loraprune", settings.as_object().unwrap()).unwrap(), 0).unwrap();
    crate::tiny::move_all(&adapter);
    let attached = Attached::one(&adapter).at(Step::training(9));
    for (site, base, _) in adapter.sites(&model).into_iter().filter(|(s, ..)| s.role == "k_proj" || s.role == "up_proj")
    {
        let x = Tensor::ones((2, site.inputs), DType::F32, &Device::Cpu).unwrap();
        let y = attached.project(site, base, &x).unwrap();
        assert!(flat(&y.narrow(1, 0, site.outputs / 2).unwrap()).iter().all(|v| *v == 0.0), "{}", site.path);
        assert!(flat(&y).iter().any(|v| *v != 0.0));
    }
}

fn kept_golden() -> Vec<KeptLayer> {
    serde_json::from_value(crate::support::json(&folder("pruning/kept.json"))).unwrap()
}

/// What recovering an adapter writes; nothing where it is refused.
fn recovered(stored: &StoredAdapter, pruning: &Pruning, unverified: bool) -> Result<StoredAdapter, String> {
    let out = tempfile::tempdir().unwrap();
    let (from, to) = (out.path().join("small"), out.path().join("whole"));
    stored.write(&from, None).unwrap();
    let told = recover(&from, pruning, unverified, &to).map_err(|e| {
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1, "something was written: {e}");
        e.to_string()
    })?;
    let whole = StoredAdapter::read(&to).unwrap();
    let numbers = |s: &StoredAdapter| s.tensors.values().map(Tensor::elem_count).sum::<usize>();
    assert_eq!((told.tensors, told.parameters), (whole.tensors.len(), numbers(&whole)));
    assert_eq!(told.trained_parameters, numbers(stored));
    assert_eq!(whole.manifest.as_ref().unwrap().content_id, whole.content_id().unwrap());
    assert!(recover(&from, pruning, unverified, &to).unwrap_err().to_string().contains("exists"));
    Ok(whole)
}

/// A copy of a base's weights with the dropped units zeroed.
fn masked_base(base: &Path, pruning: &Pruning) -> Decoder {
    let file = SafetensorsFile::open(&base.join("model.safetensors")).unwrap();
    let layers = pruning.layers();
    let mut tensors: HashMap<String, Tensor> =
        file.names().into_iter().map(|n| (n.clone(), file.load(&n).unwrap().unwrap())).collect();
    for site in pruning.sites().iter().filter(|s| !s.is_head) {
        let (layer, role) = (site.layer.unwrap(), site.role.as_str());
        if let Some((axis, mask)) = pruning.kept[layer].mask(role, &layers[layer]) {
            let mask = Tensor::from_vec(mask.clone(), mask.len(), &Device::Cpu).unwrap();
            let mask = mask.unsqueeze(1 - axis.dim()).unwrap();
            let own = tensors.get_mut(&site.weight_path()).unwrap();
            *own = own.broadcast_mul(&mask).unwrap();
        }
    }
    let (config, _) = open_weights(base, LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &Weights::from_memory(tensors)).unwrap()
}

/// transformers opens the sliced model, PEFT trains on it, and the recovered adapter is the one that PEFT loads on the whole base.
#[test]
fn slicing_and_recovery_are_those_of_transformers_and_peft() {
    let (base, expected) = (folder("tiny-llama"), golden("loram.safetensors"));
    let tokens = vec![expected["tokens"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap()];
    let pruning = record(&base, kept_golden());
    let out = tempfile::tempdir().unwrap();
    let small = out.path().join("small");
    let sliced = slice_to_folder(&base, &[], &pruning, (&small, LoadDtype::F32), |_| {}).unwrap();
    assert!(sliced.uniform);
    let config = crate::support::json(&small.join("config.json"));
    assert_eq!(
        (&config["num_attention_heads"], &config["head_dim"], config.get("layer_shapes")),
        (&json!(2), &json!(8), None)
    );
    let smaller = read(&small);
    let near = |a: &Tensor, b: &str, limit: f64| {
        let apart = distance(a, &expected[b]);
        assert!(apart < limit, "{b}: {apart:e}");
    };
    near(&logits(&smaller, &Frozen, &tokens), "sliced", 1e-5);
    let stored = StoredAdapter::read(&folder("pruning/small")).unwrap();
    let adapter = Adapter::load_whole(&smaller, &stored).unwrap();
    let on_small = logits(&smaller, &Attached::one(&adapter), &tokens);
    near(&on_small, "small", 1e-4);

    let recovered = recovered(&stored, &pruning, true).unwrap();
    let theirs = StoredAdapter::read(&folder("pruning/recovered")).unwrap();
    assert_eq!(recovered.tensors.keys().collect::<Vec<_>>(), theirs.tensors.keys().collect::<Vec<_>>());
    for (name, t) in &recovered.tensors {
        assert_eq!(flat(t), flat(&theirs.tensors[name]), "{name}");
    }
    let whole = tiny("tiny-llama");
    let on_whole = Adapter::load_whole(&whole, &recovered).unwrap();
    near(&logits(&whole, &Attached::one(&on_whole), &tokens), "recovered", 1e-4);

    // The base with the dropped units zeroed and the recovered adapter are the sliced one with its own.
    let masked = masked_base(&base, &pruning);
    assert!(distance(&logits(&masked, &Frozen, &tokens), &expected["sliced"]) < 1e-5);
    let on_masked = Adapter::load_whole(&masked, &recovered).unwrap();
    let apart = distance(&logits(&masked, &Attached::one(&on_masked), &tokens), &on_small);
    assert!(apart < 1e-5, "masked: {apart:e}");

    // Gathering after recovering is the identity.
    let layers = pruning.layers();
    for (name, t) in recovered.tensors.iter().filter(|(n, _)| n.contains(".layers.")) {
        let layer: usize = name.split('.').nth(4).unwrap().parse().unwrap();
        let role = name.split('.').find(|p| p.ends_with("_proj")).unwrap();
        let Some((axis, index)) = pruning.kept[layer].index(role, &layers[layer]) else { continue };
        if (axis.dim() == 0) != name.contains("lora_B") {
            continue;
        }
        let back = t.index_select(&Tensor::new(index, &Device::Cpu).unwrap(), axis.dim()).unwrap();
        assert_eq!(flat(&back), flat(&stored.tensors[name]), "{name}");
    }
}

/// Where nothing is pruned, recovering gives the same tensors, and the smaller model the same bytes.
#[test]
fn a_ratio_of_nothing_changes_nothing() {
    let base = folder("tiny-llama");
    let model = tiny("tiny-llama");
    let layers = &model.shape().layers;
    assert_eq!(&pruned_shapes(layers, 0.0, (0, 0)).unwrap(), layers);
    let pruning = record(&base, layers.iter().map(KeptLayer::whole).collect());
    let out = tempfile::tempdir().unwrap();
    slice_to_folder(&base, &[], &pruning, (&out.path().join("same"), LoadDtype::F32), |_| {}).unwrap();
    let tensors = |path: &Path| SafetensorsFile::open(&path.join("model.safetensors")).unwrap();
    let (before, after) = (tensors(&base), tensors(&out.path().join("same")));
    assert_eq!(before.names(), after.names());
    for name in before.names() {
        assert_eq!(flat(&before.load(&name).unwrap().unwrap()), flat(&after.load(&name).unwrap().unwrap()));
    }
    let adapter = Adapter::attach(&model, methods::build("lora", &Map::new()).unwrap(), 0).unwrap();
    crate::tiny::move_all(&adapter);
    let stored = adapter.to_stored("base").unwrap();
    let same = recovered(&stored, &pruning, true).unwrap();
    assert_eq!(same.tensor_bytes().unwrap(), stored.tensor_bytes().unwrap());
}

/// A record that was changed, of another seed, of another base, or hostile, is refused in a sentence; so are adapters that are not its own.
#[test]
fn records_and_adapters_that_do_not_belong_together_are_refused() {
    let base = folder("tiny-llama");
    let pruning = record(&base, kept_golden());
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join(PRUNING_FILE);
    let good = serde_json::to_value(&pruning).unwrap();
    let reads = |value: &Value| {
        std::fs::write(&path, serde_json::to_vec(value).unwrap()).unwrap();
        Pruning::read(&path).map_err(|e| e.to_string())
    };
    assert_eq!(reads(&good).unwrap(), pruning);
    type Change = (&'static str, fn(&mut Value), &'static str);
    let changes: [Change; 13] = [
        ("seed", |v| v["settings"]["seed"] = 2.into(), "is not what was written"),
        ("base", |v| v["base"]["fingerprint"] = "sha256:0".into(), "is not what was written"),
        ("unit", |v| v["kept"][0]["channels"][0] = 47.into(), "rise"),
        ("huge", |v| v["whole"][0]["channels"] = (1u64 << 40).into(), "cannot be"),
        ("zero", |v| v["whole"][0]["kv_heads"] = 0.into(), "cannot be"),
        ("layers", |v| drop(v["kept"].as_array_mut().unwrap().pop()), "where the base has 2"),
        // Each size alone is possible, their product is not.
        (
            "product",
            |v| (v["whole"][0]["heads"], v["whole"][0]["head_dim"]) = ((1 << 20).into(), (1 << 20).into()),
            "1048576 heads of 1048576",
        ),
        (
            "product in words",
            |v| (v["whole"][0]["heads"], v["whole"][0]["head_dim"]) = (u64::MAX.into(), 2.into()),
            "do not divide",
        ),
        (
            "overflow",
            |v| (v["whole"][0]["heads"], v["whole"][0]["head_dim"]) = ((1u64 << 62).into(), 4.into()),
            "times as wide",
        ),
        ("wide", |v| v["whole"][1]["channels"] = (64 * 32 + 1).into(), "2049 channels beside a hidden state of 32"),
        ("hidden", |v| v["hidden"] = (1u64 << 60).into(), "cannot be"),
        ("format", |v| v["format"] = 9.into(), "format 9"),
        ("key", |v| v["more"] = 1.into(), "unknown field"),
    ];
    for (what, change, says) in changes {
        let mut value = good.clone();
        change(&mut value);
        let error = reads(&value).unwrap_err();
        assert!(error.contains(says) && error.lines().count() == 1, "{what}: {error}");
    }
    let stored = StoredAdapter::read(&folder("pruning/small")).unwrap();
    let refused = |stored: &StoredAdapter, pruning: &Pruning, unverified: bool| {
        recovered(stored, pruning, unverified).unwrap_err()
    };
    assert!(refused(&stored, &pruning, false).contains("no lorimer.json"));
    // Other units of the same shapes: only ids tell.
    let mut others = kept_golden();
    others[0].kv_heads = vec![0];
    others[0].heads = vec![0, 1];
    let other = record(&base, others);
    assert_ne!(other.id, pruning.id);
    let mut ours = recovered(&stored, &pruning, true).unwrap();
    ours.tensors.clone_from(&stored.tensors);
    assert!(refused(&ours, &pruning, false).contains("no pruned model"));
    identity_set(&mut ours, &pruning);
    assert!(recovered(&ours, &pruning, false).is_ok());
    assert!(refused(&ours, &other, false).contains("another pruned model"));
    // The small adapter on the whole base.
    let error = Adapter::load_whole(&tiny("tiny-llama"), &ours).err().unwrap().to_string();
    assert!(error.contains("lorimer recover"), "{error}");
    // So as an expert of a mixture, of which its own record tells.
    let parts = [ours.clone().into_part().unwrap()];
    let whole = tiny("tiny-llama");
    let error = check_parts(&parts, &base, &whole.shape().layers).unwrap_err().to_string();
    assert!(error.contains("lorimer recover"), "{error}");
    // A site that is missing, another method, another shape.
    let mut missing = stored.clone();
    missing.tensors.retain(|name, _| !name.contains("layers.1.mlp.up_proj"));
    assert!(refused(&missing, &pruning, true).contains("not whole"));
    let model = tiny("tiny-llama");
    let small = json!({"r": 4});
    let bone = Adapter::attach(&model, methods::build("bone", small.as_object().unwrap()).unwrap(), 0).unwrap();
    assert!(refused(&bone.to_stored("base").unwrap(), &pruning, true).contains("`bone` adapter cannot be recovered"));
    let lora = Adapter::attach(&model, methods::build("lora", &Map::new()).unwrap(), 0).unwrap();
    assert!(refused(&lora.to_stored("base").unwrap(), &pruning, true).contains("has shape"));
    // A and B that do not go together, and both of a rank that the configuration has not.
    for ends in [&["lora_A.weight"][..], &["lora_A.weight", "lora_B.weight"]] {
        let mut other = stored.clone();
        for (name, t) in other.tensors.iter_mut().filter(|(n, _)| n.contains("layers.1.mlp.up_proj")) {
            if ends.iter().any(|end| name.ends_with(end)) {
                let axis = usize::from(name.ends_with("lora_B.weight"));
                *t = t.narrow(axis, 0, t.dim(axis).unwrap() - 1).unwrap().contiguous().unwrap();
            }
        }
        let told = refused(&other, &pruning, true);
        assert!(told.contains("rank") && told.contains("up_proj"), "{told}");
    }
    // A record of another base is not cut by.
    let error = slice_to_folder(&folder("tiny-qwen2"), &[], &pruning, (&out.path().join("x"), LoadDtype::F32), |_| {});
    assert!(error.unwrap_err().to_string().contains("is not of") && !out.path().join("x").exists());
}

fn identity_set(stored: &mut StoredAdapter, pruning: &Pruning) {
    stored.manifest.as_mut().unwrap().base.as_mut().unwrap().pruned = Some(pruning.identity());
}

/// The counts of LoRAM's table, from configurations alone.
#[test]
fn shapes_of_seventy_billion_are_counted() {
    let config = |vocab: usize| {
        let json = json!({
            "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": vocab, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": false,
        });
        DecoderConfig::from_json(&json, Path::new("config.json")).unwrap()
    };
    let pruned = |whole: &DecoderConfig, ratio: f64| {
        let layers = pruned_shapes(&whole.layers, ratio, (4, 2)).unwrap();
        DecoderConfig { layers, ..whole.clone() }.parameter_count()
    };
    let second = config(32000);
    assert_eq!(second.parameter_count(), 68_976_648_192);
    assert_eq!(pruned(&second, 0.85), 16_272_924_672);
    assert_eq!(pruned(&config(128_256), 0.85), 17_849_982_976);
    // Bytes of 16 bits a weight over those of 4.
    for (ratio, expected) in [(0.65, 9.82), (0.75, 12.84), (0.85, 16.95), (0.95, 28.56)] {
        let times = 4.0 * second.parameter_count() as f64 / pruned(&second, ratio) as f64;
        assert!((times - expected).abs() < 0.01, "{ratio}: {times}");
    }
    for bad in [1.0, -0.1, f64::NAN, 2.0] {
        assert!(pruned_shapes(&second.layers, bad, (4, 2)).unwrap_err().to_string().contains("below 1"));
    }
    assert!(pruned_shapes(&second.layers, 0.5, (40, 40)).is_err());
    assert!(pruned_shapes(&second.layers, 0.5, (usize::MAX, 1)).is_err());
    assert!(pruned_shapes(&second.layers, 0.99999, (4, 2)).unwrap_err().to_string().contains("leaves nothing"));
}
