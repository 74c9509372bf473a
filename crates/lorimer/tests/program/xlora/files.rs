//! PEFT's numbers, the authors' folders, and files that hold a mixture.

use super::*;

/// λ, gates, logits, the head's gradients in each form that training has, and three steps of AdamW.
#[test]
fn mixtures_are_those_of_peft() {
    let model = tiny_llama();
    let sites: Vec<Value> = serde_json::from_slice(&std::fs::read(case("sites.json")).unwrap()).unwrap();
    for name in CASES {
        let golden = Golden::open(name);
        let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case(name)).unwrap()).unwrap();
        let order = adapter.mixture().unwrap().sites;
        assert!(order.iter().zip(&sites).all(|(own, golden)| golden["site"] == **own) && order.len() == sites.len());
        let rows = golden.tokens();
        let packed = batch(&rows);
        let shape = golden.get("scalings").dims().to_vec();
        let whole = |t: Tensor| t.reshape(shape.as_slice()).unwrap();
        let hidden = seen(&model, &adapter, &packed);
        golden.near(name, "hidden", &hidden.reshape(golden.get("hidden").dims()).unwrap(), 1e-5);
        golden.near(name, "scalings", &whole(scalings(&model, &adapter, &packed)), 1e-5);
        golden.near(name, "gates", &whole(gates(&model, &adapter, &packed)), 1e-5);
        golden.near(name, "logits", &logits(&model, &Attached::one(&adapter), &rows), 1e-5);

        let data = examples(&rows);
        let names: Vec<String> =
            adapter.trainable().iter().map(|(name, _)| name.replace("internal_xlora_classifier.", "grad.")).collect();
        for checkpointing in [false, true] {
            let options = StepOptions { checkpointing, ..Default::default() };
            let (_, gradients) = trained(&model, &adapter, &data, options);
            for (key, gradient) in names.iter().zip(&gradients) {
                golden.near(name, key, gradient, 1e-5);
            }
        }
        let refs: Vec<&Example> = data.iter().collect();
        let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter), &refs).unwrap();
        let found = (sum / count as f64).unwrap().backward().unwrap();
        for (key, (_, var)) in names.iter().zip(adapter.trainable()) {
            golden.near(name, key, found.get(var.as_tensor()).unwrap(), 1e-5);
        }

        let config = AdamWConfig { weight_decay: 0.01, ..Default::default() };
        let (mut optimizer, mut losses) = (AdamW::new(config, false), Vec::new());
        for _ in 0..3 {
            let (loss, gradients) = trained(&model, &adapter, &data, StepOptions::default());
            let gradients: Vec<Option<Tensor>> = gradients.into_iter().map(Some).collect();
            optimizer.step(&adapter.trainable(), &gradients, 1e-2).unwrap();
            losses.push(loss);
        }
        losses.push(trained(&model, &adapter, &data, StepOptions::default()).0);
        let losses = Tensor::new(losses, &Device::Cpu).unwrap();
        golden.near(name, "losses", &losses, 1e-5);
        for (key, (_, var)) in names.iter().zip(adapter.trainable()) {
            golden.near(name, &key.replace("grad.", "trained."), var.as_tensor(), 2e-4);
        }
    }
}

/// What PEFT 0.20 and 0.21 lose is missed, and what does not belong there is found.
#[test]
fn a_head_that_is_not_whole_is_refused() {
    let model = tiny_llama();
    let problem = |stored: &StoredAdapter| Adapter::load(&model, stored).err().unwrap().to_string();
    let lost = problem(&StoredAdapter::read(&case("lost")).unwrap());
    assert!(lost.contains("no `layers.0.bias`") && lost.contains("PEFT 0.20 and 0.21"), "{lost}");
    let mut stored = StoredAdapter::read(&case("depth3")).unwrap();
    stored.config.insert("xlora_depth".into(), 2.into());
    stored.config.insert("xlora_dropout_p".into(), json!(0.2));
    let more = problem(&stored);
    assert!(more.contains("`layers.6.bias`") && more.contains("depth 2"), "{more}");
    // Without dropout the layers have other numbers.
    let mut stored = StoredAdapter::read(&case("depth3")).unwrap();
    stored.config.insert("xlora_dropout_p".into(), 0.into());
    assert!(problem(&stored).contains("`layers.2.bias`"));
    let mut stored = StoredAdapter::read(&case("layerwise")).unwrap();
    stored.config.insert("layerwise_scalings".into(), false.into());
    let shape = problem(&stored);
    assert!(shape.contains("[36, 32]") && shape.contains("[3, 32]"), "{shape}");
}

/// The authors' own folders.
#[test]
fn the_authors_folders_are_read() {
    let model = tiny_llama();
    let tokens = Golden::open("depth3").tokens();
    for (folder, golden) in
        [("authors", "depth3"), ("authors_linear", "authors_linear"), ("authors_default", "authors_default")]
    {
        let golden = Golden::open(golden);
        let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case(folder)).unwrap()).unwrap();
        let found = scalings(&model, &adapter, &batch(&tokens)).reshape(golden.get("scalings").dims()).unwrap();
        golden.near(folder, "scalings", &found, 1e-5);
        golden.near(folder, "logits", &logits(&model, &Attached::one(&adapter), &tokens), 1e-5);
    }
    let out = tempfile::tempdir().unwrap();
    for file in ["xlora_config.json", "xlora_classifier.safetensors"] {
        std::fs::copy(case("authors").join(file), out.path().join(file)).unwrap();
    }
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(case("authors").join("xlora_config.json")).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(out.path().join("xlora_config.json"), config.to_string()).unwrap();
        StoredAdapter::read(out.path()).err().unwrap().to_string()
    };
    assert!(with(&|_| ()).contains("expert 0 should be at `chemistry`"));
    assert!(with(&|c| c["adapters"] = Value::Null).contains("in the order of the head's columns"));
    assert!(with(&|c| c["adapters"] = json!(["../experts/0"])).contains("in the order of the head's columns"));
    assert!(with(&|c| c["xlora_depth"] = 4.into()).contains("its head has no `inner.6.weight`"));
    assert!(with(&|c| c["xlora_depth"] = 2.into()).contains("its head holds `inner.3.bias`"));
    assert!(with(&|c| c["xlora_depth"] = "3".into()).contains("xlora_depth should be a number"));
    assert!(with(&|c| c["enable_relu_and_dropout"] = 1.into()).contains("`enable_relu_and_dropout`"));
    // Left out or null it is false, as in the authors' package, whose head then has its layers one after another.
    assert!(with(&|c| c["enable_relu_and_dropout"] = Value::Null).contains("its head has no `inner.1.weight`"));
    let numbers = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let head = [("inner.0.weight", numbers((16, 32))), ("last.weight", numbers((36, 15)))];
    let head: std::collections::HashMap<&str, Tensor> = head.into_iter().collect();
    candle_core::safetensors::save(&head, out.path().join("xlora_classifier.safetensors")).unwrap();
    let unfit = with(&|c| {
        (c["xlora_depth"], c["use_bias"], c["enable_relu_and_dropout"]) = (2.into(), false.into(), false.into());
    });
    assert!(unfit.contains("layer 0 of its head has 16 outputs, and layer 1 after it 15 inputs"), "{unfit}");
    std::fs::rename(out.path().join("xlora_classifier.safetensors"), out.path().join("xlora_classifier.pt")).unwrap();
    assert!(with(&|_| ()).contains("pickle"));
}

/// A file gives the mixture again; another expert, another order or another base does not pass.
#[test]
fn files_hold_the_mixture_and_know_their_experts() {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let (out, rows) = (tempfile::tempdir().unwrap(), rows());
    // Twelve, since PEFT sorts their names as texts.
    let parts: Vec<Part> = experts(&model, 12)
        .into_iter()
        .enumerate()
        .map(|(i, part)| {
            let folder = out.path().join(format!("expert{i}"));
            let stored = expert(&model, &part).to_stored("tiny").unwrap();
            stored.write(&folder, None).unwrap();
            StoredAdapter::read(&folder).unwrap().into_part().unwrap()
        })
        .collect();
    let settings = json!({ "init": "peft", "layerwise_scalings": true, "xlora_depth": 2, "xlora_size": 4 });
    let adapter = mixture(&model, &parts, &settings);
    let expected = logits(&model, &Attached::one(&adapter), &rows);
    let folder = out.path().join("mixed");
    let mut stored = adapter.to_stored("tiny").unwrap();
    let id = stored.content_id().unwrap();
    let manifest = json!({
        "format": 1, "content_id": id, "method": "xlora", "lorimer": "0", "base": null, "chat_template": null,
        "xlora": adapter.mixture(),
    });
    stored.manifest = serde_json::from_value(manifest).unwrap();
    stored.write(&folder, None).unwrap();
    let names: BTreeMap<_, _> = SafetensorsFile::open(&folder.join("adapter_model.safetensors"))
        .map(|f| f.names().into_iter().map(|n| (n.clone(), n)).collect())
        .unwrap();
    assert!(
        names.keys().all(|name| name.starts_with("base_model.internal_xlora_classifier.layers.")) && names.len() == 4
    );
    let again = StoredAdapter::read(&folder).unwrap();
    assert_eq!(again.config["adapters"]["10"], "../expert10");
    assert!(again.config.get("init").is_none());
    assert_eq!(again.content_id().unwrap(), id);
    let loaded = Adapter::load_whole(&model, &again).unwrap();
    assert_eq!(distance(&logits(&model, &Attached::one(&loaded), &rows), &expected), 0.0);

    // As PEFT writes the map.
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let mut sorted: Value = serde_json::from_str(&config).unwrap();
    let map: BTreeMap<String, Value> = serde_json::from_value(sorted["adapters"].clone()).unwrap();
    sorted["adapters"] = Value::Object(map.into_iter().collect());
    std::fs::write(folder.join("adapter_config.json"), sorted.to_string()).unwrap();
    let loaded = Adapter::load_whole(&model, &StoredAdapter::read(&folder).unwrap()).unwrap();
    assert_eq!(distance(&logits(&model, &Attached::one(&loaded), &rows), &expected), 0.0);
    // A server reads experts below its root only.
    let root = out.path().canonicalize().unwrap();
    assert!(StoredAdapter::read_changing(&folder, 1 << 20, &root, None).is_ok());
    let outside = StoredAdapter::read_changing(&folder, 1 << 20, &root.join("mixed"), None).err().unwrap().to_string();
    assert!(outside.contains("expert 0 lies outside of the folder of adapters"), "{outside}");
    // Moved elsewhere it is the same content; with two experts exchanged it is another, which the manifest refuses.
    let moved = out.path().join("elsewhere");
    std::fs::create_dir(&moved).unwrap();
    for i in 0..12 {
        std::fs::rename(out.path().join(format!("expert{i}")), moved.join(format!("expert{i}"))).unwrap();
    }
    let missing = StoredAdapter::read(&folder).err().unwrap().to_string();
    assert!(missing.contains("expert 0 should be at `../expert0`"), "{missing}");
    std::fs::rename(&folder, moved.join("mixed")).unwrap();
    let folder = moved.join("mixed");
    assert_eq!(StoredAdapter::read(&folder).unwrap().content_id().unwrap(), id);
    std::fs::rename(moved.join("expert3"), moved.join("kept")).unwrap();
    std::fs::rename(moved.join("expert4"), moved.join("expert3")).unwrap();
    std::fs::rename(moved.join("kept"), moved.join("expert4")).unwrap();
    let other = Adapter::load(&model, &StoredAdapter::read(&folder).unwrap()).err().unwrap().to_string();
    assert!(
        other.contains("expert 3") && other.contains("is not the adapter that the head was trained with"),
        "{other}"
    );
}

/// What cannot be is refused by name.
#[test]
fn what_cannot_be_mixed_is_refused() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let built = |settings: Value, parts: &[Part]| -> String {
        let method = methods::build("xlora", settings.as_object().unwrap());
        let attached = method.and_then(|mut method| {
            method.take_parts(parts)?;
            Adapter::attach(&model, method, 3)
        });
        attached.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(built(json!({}), &parts), "");
    for (settings, expected) in [
        (json!({ "use_trainable_adapters": true }), "use_trainable_adapters"),
        (json!({ "xlora_depth": 0 }), "xlora_depth = 0"),
        (json!({ "xlora_size": 0 }), "xlora_size = 0"),
        (json!({ "softmax_temperature": 0 }), "softmax_temperature = 0"),
        (json!({ "top_k_lora": 0 }), "top_k_lora = 0"),
        (json!({ "top_k_lora": 4 }), "top_k_lora = 4"),
        (json!({ "top_k_lora": 2, "scaling_pass_value": 0.5 }), "scaling_pass_value"),
        (json!({ "hidden_size": 4096 }), "hidden_size = 4096"),
        (json!({ "xlora_dropout_p": 1.0 }), "xlora_dropout_p = 1"),
        (json!({ "enable_softmax": false }), "set init=peft"),
        (json!({ "adapters": { "0": "a" } }), "--adapter"),
        (json!({ "layerwise": true }), "no setting `layerwise`"),
    ] {
        let problem = built(settings.clone(), &parts);
        assert!(problem.contains(expected), "{settings}: {problem:?}");
    }
    assert!(built(json!({}), &[]).contains("at least one with --adapter"));
    let with = |change: &dyn Fn(&mut Part)| {
        let mut parts = parts.clone();
        change(&mut parts[1]);
        built(json!({}), &parts)
    };
    let set = |key: &'static str, value: Value| with(&|part| drop(part.config.insert(key.into(), value.clone())));
    assert!(set("use_dora", true.into()).contains("DoRA"));
    assert!(set("peft_type", "RANDLORA".into()).contains("RANDLORA"));
    assert!(set("bias", "all".into()).contains("biases"));
    assert!(set("modules_to_save", json!(["lm_head"])).contains("whole modules"));
    assert!(set("init_lora_weights", "pissa".into()).contains("init_lora_weights"));
    assert!(set("lora_bias", true.into()).contains("lora_bias"));
    assert!(set("r", 5.into()).contains("at rank 5"));
    assert!(set("target_modules", json!(["q_proj", "k_proj", "down_proj"])).contains("k_proj"));
    assert!(set("target_modules", json!(["q_proj"])).contains("does not name"));
    let tensor = |name: &'static str, shape: (usize, usize)| {
        with(&|part| {
            let t = Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
            part.tensors.insert(format!("base_model.model.{name}"), t);
        })
    };
    assert!(tensor("model.layers.0.self_attn.q_proj.lora_A.bias", (3, 16)).contains("no part of a plain LoRA"));
    assert!(tensor("model.layers.7.self_attn.q_proj.lora_A.weight", (3, 16)).contains("only one of A and B"));
    // The head of the base.
    let head = tiny::attach(&model, "lora", r#"{"r": 2, "target_modules": ["lm_head"]}"#);
    let head = head.to_stored("tiny").unwrap().into_part().unwrap();
    assert!(built(json!({}), &[head]).contains("`lm_head`, the head"));
    // Not beside others, nor at another weight; and nobody else is made of parts.
    let (adapter, other) = (mixture(&model, &parts, &json!({})), expert(&model, &parts[0]));
    assert!(Attached::weighted(vec![(&adapter, 1.0), (&other, 1.0)]).is_err());
    assert!(Attached::weighted(vec![(&adapter, 0.5)]).is_err());
    let mut lora = methods::build("lora", &Default::default()).unwrap();
    assert!(lora.take_parts(&parts).unwrap_err().to_string().contains("leave --adapter out"));
    // A forward that knows one pass only does not run without its weights.
    let (site, base) = model.projections()[0];
    let x = Tensor::zeros((2, 16), DType::F64, &Device::Cpu).unwrap();
    assert!(Attached::one(&adapter).project(site, base, &x).is_err());
}

/// An expert that is named by its hub id is found in the hub's cache; one that is not there is named with what fetches it.
#[test]
fn experts_are_found_in_the_hubs_cache() {
    let home = tempfile::tempdir().unwrap();
    let (mixture, cache) = (home.path().join("mixture"), home.path().join("hub/models--owner--zero"));
    std::fs::create_dir_all(&mixture).unwrap();
    std::fs::copy(case("constant").join("adapter_model.safetensors"), mixture.join("adapter_model.safetensors"))
        .unwrap();
    let config = std::fs::read(case("constant").join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for number in ["1", "2"] {
        config["adapters"][number] = case("experts").join(number).canonicalize().unwrap().display().to_string().into();
    }
    config["adapters"]["0"] = "owner/zero".into();
    std::fs::write(mixture.join("adapter_config.json"), config.to_string()).unwrap();
    let inspect = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lorimer"));
        command.env("HF_HOME", home.path()).env_remove("HF_HUB_CACHE").arg("inspect").arg(&mixture).output().unwrap()
    };
    let before = inspect();
    let told = String::from_utf8_lossy(&before.stderr).into_owned();
    assert!(!before.status.success() && told.contains("`hf download owner/zero` fetches it"), "{told}");
    // The layout of Python's huggingface_hub, whose snapshots are links.
    let snapshot = cache.join("snapshots/0123");
    for folder in ["refs", "blobs", "snapshots/0123"] {
        std::fs::create_dir_all(cache.join(folder)).unwrap();
    }
    std::fs::write(cache.join("refs/main"), "0123\n").unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let blob = cache.join("blobs").join(file);
        std::fs::copy(case("experts").join("0").join(file), &blob).unwrap();
        std::os::unix::fs::symlink(&blob, snapshot.join(file)).unwrap();
    }
    let after = inspect();
    let told = String::from_utf8_lossy(&after.stdout).into_owned();
    assert!(after.status.success() && told.contains("snapshots/0123"), "{told}{after:?}");
}
