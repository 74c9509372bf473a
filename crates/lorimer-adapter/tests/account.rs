//! Every way from a file's tensors to modules gives the same modules, for every adapter file of the goldens.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::algebra::resize::{largest_rank, resize};
use lorimer_adapter::file::account::FileAccount;
use lorimer_adapter::file::convert::low_ranks;
use lorimer_adapter::file::export::to_lora;
use lorimer_adapter::file::inspect::inspect;
use lorimer_adapter::file::load::account_of;
use lorimer_adapter::{Adapter, FileKeys, StoredAdapter};
use lorimer_model::base::open_weights;
use lorimer_model::{BaseModel, LoadDtype};

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
        let (_, account) = account_of(&stored).unwrap();
        assert!(account.unknown.is_empty(), "{name}: {:?}", account.unknown);
        let ours = modules(&stored);
        let report = inspect(&stored).unwrap();
        assert_eq!(report.modules.iter().map(|m| m.name.clone()).collect::<BTreeSet<_>>(), ours, "{name}");
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
