//! Files of every method.

use crate::*;

#[test]
fn law_4_load_after_save_is_the_identity() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        let stored = adapter.to_stored("tiny").unwrap();
        let folder = tempfile::tempdir().unwrap();
        stored.write(folder.path(), None).unwrap();
        let read = StoredAdapter::read(folder.path()).unwrap();
        assert_eq!(read.content_id().unwrap(), stored.content_id().unwrap());
        let again = Adapter::load_whole(model, &read).unwrap();
        let expected = logits(model, &Attached::one(&adapter));
        assert!(distance(&logits(model, &Attached::one(&again)), &expected) < 1e-10);
        assert_eq!(again.to_stored("tiny").unwrap().tensor_bytes().unwrap(), stored.tensor_bytes().unwrap());
    });
}

#[test]
fn an_adapter_without_effect_or_with_foreign_tensors_is_refused() {
    let model = model();
    let adapter = attach(&model, "lora", r#"{"r": 3}"#);
    let error = |stored: &StoredAdapter| Adapter::load_whole(&model, stored).err().expect("refused").to_string();
    let stored = adapter.to_stored("tiny").unwrap();
    assert!(error(&stored).contains("changes nothing"));
    move_all(&adapter);
    let mut stored = adapter.to_stored("tiny").unwrap();
    let tensors: BTreeMap<String, Tensor> = stored.tensors.clone();
    stored.tensors.insert(
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight".into(),
        tensors.values().next().unwrap().clone(),
    );
    assert!(error(&stored).contains("belong to no module"));
    stored.tensors = tensors.into_iter().filter(|(n, _)| !n.contains("layers.1.mlp.up_proj")).collect();
    assert!(error(&stored).contains("no tensors"));
}

/// Files are such as PEFT's configurations can say: modules one by one where a key that narrows them is unknown there or stands beside a
/// regular expression, and as many sparse entries as r says. Read again, they give the same outputs.
#[test]
fn peft_can_read_what_is_written() {
    let model = model();
    let pattern = r#""target_modules": ".*(?<!o)_proj", "layers_to_transform": [1]"#;
    let narrowed = r#""exclude_modules": ["k_proj", "o_proj"]"#;
    for (name, settings) in [
        ("lora", format!(r#"{{"r": 2, {pattern}}}"#)),
        ("bone", format!(r#"{{"r": 2, {pattern}}}"#)),
        ("vera", format!(r#"{{"r": 4, {pattern}}}"#)),
        ("vera", format!(r#"{{"r": 4, {narrowed}}}"#)),
        ("randlora", format!(r#"{{"r": 4, {narrowed}}}"#)),
        ("shira", format!(r#"{{"r": 1, {narrowed}}}"#)),
        ("shira", r#"{"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [0]}"#.to_string()),
        ("shira", r#"{"density": 0.2}"#.to_string()),
        ("shira", r#"{"density": 0.05, "random_seed": 3, "part": 1, "parts": 4}"#.to_string()),
    ] {
        let adapter = attach(&model, name, &settings);
        move_all(&adapter);
        let stored = adapter.to_stored("tiny").unwrap();
        let modules: Vec<&str> = adapter.deltas().map(|(path, _)| path).collect();
        let set = |key: &str| stored.config.get(key).is_some_and(|v| !v.is_null());
        if !settings.contains("density") {
            assert_eq!(stored.config["target_modules"], serde_json::json!(modules), "{name} {settings}");
            assert!(!set("exclude_modules") && !set("layers_to_transform"), "{name} {settings}");
        }
        if name == "shira" {
            let r = stored.config["r"].as_u64().unwrap() as usize;
            for (site, _) in model.projections().iter().filter(|(site, _)| adapter.delta(&site.path).is_some()) {
                let of = |key: &str| stored.tensors[&format!("base_model.model.{}.{key}", site.path)].dims().to_vec();
                let k = r * (site.inputs + site.outputs);
                assert_eq!((of("shira_weight"), of("shira_indices")), (vec![k], vec![2, k]), "{settings}");
            }
            assert!(!set("density"), "{settings}");
        }
        let again = Adapter::load_whole(&model, &stored).unwrap();
        let d = distance(&logits(&model, &Attached::one(&again)), &logits(&model, &Attached::one(&adapter)));
        assert!(d < 1e-12, "{name} {settings}: {d:e}");
    }
    let settings = serde_json::json!({ "density": 0.9 });
    let dense = Adapter::attach(&model, methods::build("shira", settings.as_object().unwrap()).unwrap(), 0);
    assert!(dense.err().expect("refused").to_string().contains("form=compact"));
    let compact = attach(&model, "shira", r#"{"density": 0.9, "form": "compact"}"#);
    move_all(&compact);
    let stored = compact.to_stored("tiny").unwrap();
    Adapter::load_whole(&model, &stored).unwrap();
    let form = lorimer_adapter::methods::shira::Form::Peft;
    assert!(lorimer_adapter::methods::shira::reform(&stored, form).unwrap_err().to_string().contains("density"));
    // A pattern of layers without layers is refused, as PEFT refuses it.
    let settings = serde_json::json!({ "r": 2, "layers_pattern": "layers" });
    let lone = Adapter::attach(&model, methods::build("lora", settings.as_object().unwrap()).unwrap(), 0);
    assert!(lone.err().expect("refused").to_string().contains("layers_to_transform"));
}
