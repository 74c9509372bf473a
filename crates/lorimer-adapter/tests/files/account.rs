//! Every way from a file's tensors to modules gives the same modules, for every adapter file of the goldens.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::algebra::resize::{largest_rank, resize};
use lorimer_adapter::file::account::FileAccount;
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_adapter::file::convert::{low_ranks, read_safetensors, to_peft, write_mlx, write_safetensors};
use lorimer_adapter::file::dialects::{DIFFUSERS, KOHYA};
use lorimer_adapter::file::export::to_lora;
use lorimer_adapter::file::inspect::inspect;
use lorimer_adapter::file::load::account_of;
use lorimer_adapter::{Adapter, FileKeys, LowRank, StoredAdapter};
use lorimer_model::base::open_weights;
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::{BaseModel, LoadDtype};
use serde_json::{Value, json};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// Every adapter folder below a folder.
fn adapters(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![below.to_path_buf()];
    while let Some(folder) = folders.pop() {
        if folder.join("adapter_model.safetensors").is_file() {
            found.push(folder.clone());
        }
        let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        folders.extend(entries.filter(|path| path.is_dir()));
    }
    found.sort();
    found
}

/// The tiny base of an adapter, where it has one, and its folder.
fn base_of(stored: &StoredAdapter) -> Option<(Box<dyn BaseModel>, PathBuf)> {
    let name = stored.config["base_model_name_or_path"].as_str().unwrap();
    let folder = goldens().join(name).canonicalize().ok()?;
    let (config, weights) = open_weights(&folder, LoadDtype::F32).unwrap();
    Some((config.load(&weights).unwrap(), folder))
}

fn modules(stored: &StoredAdapter) -> BTreeSet<String> {
    account_of(stored).unwrap().1.modules.into_keys().collect()
}

#[test]
fn inspect_load_convert_merge_and_resize_find_the_same_modules() {
    let (mut files, mut plain) = (0, 0);
    for folder in adapters(&goldens()) {
        let stored = StoredAdapter::read(&folder).unwrap();
        let name = folder.display();
        if stored.config["peft_type"] == "XLORA" {
            // The head belongs to the whole adapter.
            let keys = FileKeys { adapter: &["base_model.internal_xlora_classifier."], ..FileKeys::default() };
            let account = FileAccount::new(&stored, &keys);
            assert_eq!(account.shared.len(), stored.tensors.len(), "{name}");
            continue;
        }
        files += 1;
        let (method, account) = account_of(&stored).unwrap();
        assert!(account.unknown.is_empty(), "{name}: {:?}", account.unknown);
        let ours = modules(&stored);
        let report = inspect(&stored).unwrap();
        // A router of a block is a module of its own to those who look.
        let routers = method.blocks().map(|own| account.layers(own.module())).unwrap_or_default();
        let all: BTreeSet<String> = ours.iter().cloned().chain(routers.into_keys()).collect();
        assert_eq!(report.modules.iter().map(|m| m.name.clone()).collect::<BTreeSet<_>>(), all, "{name}");
        // No value is left out.
        let whole = account.parameters.iter().filter(|p| !ours.iter().any(|m| p.path.starts_with(&format!("{m}."))));
        let counted = report.modules.iter().map(|m| m.parameters).chain(whole.map(|p| p.tensor.elem_count()));
        assert_eq!(counted.chain(report.beside.into_values()).sum::<usize>(), report.parameters, "{name}");
        if let Ok(low) = low_ranks(&stored) {
            plain += 1;
            assert_eq!(low.into_keys().collect::<BTreeSet<_>>(), ours, "{name}");
        }
        if let Ok(rank) = largest_rank(&stored) {
            assert_eq!(modules(&resize(&stored, rank).unwrap()), ours, "{name}");
        }
        let Some((base, folder)) = base_of(&stored) else { continue };
        let (adapter, accounting) = Adapter::load(base.as_ref(), &stored).unwrap();
        assert!(accounting.complete() && accounting.used.len() == stored.tensors.len(), "{name}: {accounting:?}");
        assert_eq!(adapter.deltas().map(|(path, _)| path.to_string()).collect::<BTreeSet<_>>(), ours, "{name}");
        assert_eq!(modules(&adapter.to_stored("tiny").unwrap()), ours, "{name} written again");
        // What depends on the token is no fixed change.
        if method.blocks().is_some() || stored.config["peft_type"] == "FLYLORA" {
            assert!(to_lora(base.as_ref(), &adapter, None, "tiny").is_err(), "{name}");
            continue;
        }
        assert_eq!(modules(&to_lora(base.as_ref(), &adapter, None, "tiny").unwrap().0), ours, "{name} as a LoRA");
        let changed = ours.iter().map(|module| format!("{module}.weight"));
        let changed: BTreeSet<String> = changed.chain(adapter.parameters().keys().cloned()).collect();
        let out = tempfile::tempdir().unwrap();
        let merged = merge_to_folder(&folder, &[(stored, 1.0)], out.path(), LoadDtype::Stored, |_| {}).unwrap();
        assert_eq!(merged.merged_tensors, changed.len(), "{name} merged");
    }
    assert!(files >= 40 && plain >= 20, "{files} files, {plain} plain");
}

#[test]
fn whole_parameters_are_no_modules() {
    for (name, modules, whole) in [
        ("adapters/bias_lora_only", 4, 4),
        ("adapters/bias_all", 4, 14),
        ("adapters/modules_to_save", 2, 2),
        ("adapters/head", 3, 1),
        ("adapters/smollm2", 30, 0),
        ("family-adapters/gemma3_norms", 12, 13),
        ("family-adapters/bert_bias", 6, 6),
        ("lora_xs", 4, 0),
        ("flylora", 4, 0),
        ("loraplus", 14, 14),
    ] {
        let report = inspect(&StoredAdapter::read(&goldens().join(name)).unwrap()).unwrap();
        assert_eq!((report.modules.len(), report.whole.len()), (modules, whole), "{name}");
    }
}

/// A tensor that the method does not know is refused by its name wherever a file is used, and shown by `inspect`.
#[test]
fn what_is_unknown_is_refused_by_name_everywhere() {
    let mut stored = StoredAdapter::read(&goldens().join("adapters/lora")).unwrap();
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight";
    stored.tensors.insert(name.into(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap());
    let (base, folder) = base_of(&stored).unwrap();
    let out = tempfile::tempdir().unwrap();
    let merged =
        merge_to_folder(&folder, &[(stored.clone(), 1.0)], out.path(), LoadDtype::Stored, |_| {}).err().unwrap();
    let errors = [
        Adapter::load_whole(base.as_ref(), &stored).err().unwrap(),
        merged,
        low_ranks(&stored).err().unwrap(),
        resize(&stored, 1).err().unwrap(),
    ];
    for error in errors.map(|e| e.to_string()) {
        assert!(error.contains(name) && error.contains("`lora` does not know"), "{error}");
    }
    assert_eq!(inspect(&stored).unwrap().unknown, [name]);
    let (_, accounting) = Adapter::load(base.as_ref(), &stored).unwrap();
    assert_eq!((accounting.refused.as_slice(), accounting.missing.len()), ([name.to_string()].as_slice(), 0));
}

/// Factors are the same in every tool's file, read again, also where ranks and scales differ from module to module.
#[test]
fn every_dialect_holds_the_same_factors() {
    let product = |low: &LowRank| (low.b.matmul(&low.a).unwrap() * low.scaling).unwrap();
    let distance = |a: &Tensor, b: &Tensor| {
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        difference.to_scalar::<f32>().unwrap()
    };
    for (name, alphas) in [
        ("lora", json!({})),
        ("rslora", json!({})),
        // The first module does nothing, and the others are scaled otherwise.
        ("rank_pattern", json!({ r"mlp\..*": 0, "q_proj": 3 })),
    ] {
        let mut stored = StoredAdapter::read(&goldens().join("adapters").join(name)).unwrap();
        stored.config.insert("alpha_pattern".into(), alphas);
        let before = low_ranks(&stored).unwrap();
        let out = tempfile::tempdir().unwrap();
        let path = |name: &str| out.path().join(name);
        write_safetensors(&stored, &KOHYA, &path("kohya.safetensors")).unwrap();
        write_safetensors(&stored, &DIFFUSERS, &path("diffusers.safetensors")).unwrap();
        write_mlx(&stored, &path("mlx")).unwrap();
        for file in ["kohya.safetensors", "diffusers.safetensors", "mlx/adapters.safetensors"] {
            let after = read_safetensors(&path(file)).unwrap();
            assert!(after.keys().eq(before.keys()), "{name} {file}");
            for (module, low) in &after {
                let d = distance(&product(low), &product(&before[module]));
                assert!(d < 1e-6, "{name} {file} {module}: {d:e}");
            }
            let (base, _) = base_of(&stored).unwrap();
            Adapter::load_whole(base.as_ref(), &to_peft(after, "tiny-llama").unwrap()).unwrap();
        }
        // mlx-lm: y + scale · (x a) b with a (inputs, rank) and b (rank, outputs), and one rank for all.
        let file = SafetensorsFile::open(&path("mlx/adapters.safetensors")).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(path("mlx/adapter_config.json")).unwrap()).unwrap();
        let (rank, scale) = (config["lora_parameters"]["rank"].as_u64(), config["lora_parameters"]["scale"].as_f64());
        for (module, low) in &before {
            let load = |end: &str| file.load(&format!("{module}.{end}")).unwrap().unwrap();
            let (a, b) = (load("lora_a"), load("lora_b"));
            assert_eq!(a.dims(), [low.a.dim(1).unwrap(), rank.unwrap() as usize], "{name}");
            let change = (a.matmul(&b).unwrap() * scale.unwrap()).unwrap().t().unwrap();
            assert!(distance(&change, &product(low)) < 1e-6, "{name} {module}");
        }
        assert_eq!((&config["num_layers"], &config["fine_tune_type"]), (&json!(-1), &json!("lora")));
    }
}

/// What a file of factors may not hold is refused in one sentence that names it.
#[test]
fn broken_files_of_factors_are_refused_by_name() {
    let stored = StoredAdapter::read(&goldens().join("adapters/lora")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("a.safetensors");
    let q = "lora_te_model_layers_0_self_attn_q_proj";
    let broken = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        write_safetensors(&stored, &KOHYA, &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let load = |name: String| (name.clone(), file.load(&name).unwrap().unwrap());
        let mut tensors: BTreeMap<String, Tensor> = file.names().into_iter().map(load).collect();
        change(&mut tensors);
        drop(file);
        std::fs::write(&path, safetensors_bytes(&tensors).unwrap()).unwrap();
        read_safetensors(&path).err().unwrap().to_string()
    };
    let matrix = || Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap();
    let narrow = || matrix().narrow(1, 0, 3).unwrap().contiguous().unwrap();
    let one = |name: &str| BTreeMap::from([(name.to_string(), matrix())]);
    let pair = |stem: &str, ends: [&str; 2]| BTreeMap::from(ends.map(|end| (format!("{stem}.{end}"), matrix())));
    for (error, says) in [
        (broken(&|t| drop(t.remove(&format!("{q}.lora_up.weight")))), "lacks lora_up.weight"),
        (broken(&|t| drop(t.remove(&format!("{q}.lora_down.weight")))), "lacks lora_down.weight"),
        (broken(&|t| drop(t.insert(format!("{q}.dora_scale"), matrix()))), "q_proj.dora_scale` has no name"),
        (broken(&|t| drop(t.insert(format!("{q}.alpha"), matrix()))), "should be one number"),
        (broken(&|t| drop(t.insert(format!("{q}.lora_up.weight"), narrow()))), "no rank in common"),
        (
            broken(&|t| t.extend(pair("lora_te1_layers_0_self_attn_q_proj", ["lora_down.weight", "lora_up.weight"]))),
            "is the second",
        ),
        (broken(&|t| *t = pair("lora_te_x", ["lora_down.weight", "lora_up.weight"])), "is no module"),
        (broken(&|t| *t = one("model.norm.weight")), "holds no factors"),
        (broken(&|t| *t = stored.tensors.clone()), "give the folder"),
        (broken(&|t| *t = pair("lm_head", ["lora_a", "lora_b"])), "is missing; mlx-lm"),
    ] {
        assert!(error.contains(says) && error.lines().count() == 1, "{error}");
    }
    for (config, says) in [
        (json!({ "fine_tune_type": "dora", "lora_parameters": { "scale": 2.0 } }), "`dora`"),
        (json!({ "lora_parameters": { "rank": 4 } }), "lora_parameters.scale"),
    ] {
        std::fs::write(out.path().join("adapter_config.json"), config.to_string()).unwrap();
        let error = read_safetensors(&path).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
}
