//! Pruning as a user sees it: LoRAPrune with `merge --slice`, and LoRAM's `prune`, `recover` and `plan`.

use std::path::Path;

use lorimer::prelude::*;
use serde_json::json as value;

use crate::common::{Fixture, error, json, ok};

fn tensors(folder: &str) -> std::collections::BTreeMap<String, Vec<f32>> {
    let stored = StoredAdapter::read(Path::new(folder)).unwrap();
    let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    stored.tensors.iter().map(|(name, t)| (name.clone(), flat(t))).collect()
}

/// One run ends in a smaller dense model that gives what the masked one gives; without pruning it is plain LoRA, bit for bit.
#[test]
fn one_run_ends_in_a_smaller_model() {
    let f = Fixture::new();
    let (out, small) = (f.path("masked"), f.path("small"));
    let prune = ["--method", "loraprune", "--max-steps", "40", "--set", "prune_every=2", "--set", "protect=0"];
    ok(&f.train(&out, &prune));
    let (base, data) = (["--model", f.model.as_str()], ["--data", f.data.as_str()]);
    let sliced = json(&[&["merge", "--slice", "--adapter", &out, "--output", &small], &base[..]].concat());
    // ⌊0.5 · 2⌋ groups and ⌊0.5 · 48⌋ channels of every layer.
    assert_eq!((&sliced["heads_pruned"], &sliced["channels_pruned"]), (&value!(0.5), &value!(0.5)));
    assert!(sliced["uniform"] == true && sliced["merged"]["merged_tensors"].as_u64() > Some(0));
    let masked = json(&[&["eval", "--adapter", &out], &base[..], &data[..]].concat());
    let alone = json(&[&["eval", "--model", &small], &data[..]].concat());
    let loss = |v: &serde_json::Value| v["loss"].as_f64().unwrap();
    assert!((loss(&masked) - loss(&alone)).abs() < 1e-4, "{masked} {alone}");
    assert!(loss(&alone) < loss(&json(&[&["eval"], &base[..], &data[..]].concat())));
    ok(&["generate", "--model", &small, "--prompt", "up 3", "--max-tokens", "4"]);
    // Written once, and from a masked adapter only.
    let again = error(&[&["merge", "--slice", "--adapter", &out, "--output", &small], &base[..]].concat());
    assert!(again.contains("exists"), "{again}");

    let (plain, none) = (f.path("plain"), f.path("none"));
    ok(&f.train(&plain, &["--max-steps", "12"]));
    ok(&f.train(&none, &["--method", "loraprune", "--max-steps", "12", "--set", "prune_ratio=0"]));
    let (plain_tensors, mut with_masks) = (tensors(&plain), tensors(&none));
    with_masks.retain(|name, _| !name.ends_with("lora_mask"));
    assert_eq!(plain_tensors, with_masks);
    let other = f.path("other");
    let refused = error(&[&["merge", "--slice", "--adapter", &plain, "--output", &other], &base[..]].concat());
    assert!(refused.contains("no masks") && !Path::new(&other).exists(), "{refused}");

    for (more, says) in [
        (vec!["--target-modules", "q_proj,v_proj"], "by all projections of a layer"),
        (vec!["--target-modules", "lm_head"], "would prune nothing: no layer is adapted"),
        (vec!["--target-modules", "all-linear", "--layers", "1"], "would prune nothing: protect=0.1 keeps all 1"),
        (vec!["--set", "protect=1"], "would prune nothing: protect=1 keeps all 2"),
        (vec!["--set", "prune_ratio=0.02"], "would prune nothing: prune_ratio=0.02 of at most 48 units"),
        (vec!["--set", "prune_ratio=1"], "below 1"),
        (vec!["--set", "prune_every=0"], "at least 1"),
        (vec!["--set", "warmup=0.9", "--set", "cooldown=0.2"], "between them"),
        (vec!["--bias", "all"], "without trained biases"),
        (vec!["--keep-best", "--eval-data", &f.data], "--keep-best would take an earlier one"),
    ] {
        let told = error(&f.train(&other, &[&["--method", "loraprune", "--max-steps", "4"], &more[..]].concat()));
        assert!(told.contains(says) && !Path::new(&other).join("adapter_config.json").exists(), "{told}");
    }
}

/// Prune, align, train on the smaller model, recover, run on the whole one; each piece is refused where it does not belong.
#[test]
fn an_adapter_of_a_pruned_model_runs_on_the_whole_one() {
    let f = Fixture::new();
    let (small, aligned, full) = (f.path("small"), f.path("aligned"), f.path("full"));
    let prune = |output: &str, more: &[&str]| -> Vec<String> {
        let keep = ["--keep-first", "0", "--keep-last", "1"];
        let all = [&["prune", "--model", &f.model, "--ratio", "0.5", "--output", output], &keep[..], more].concat();
        all.into_iter().map(str::to_string).collect()
    };
    let call = |flags: &[String]| json(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let told = call(&prune(&small, &["--method", "rand", "--seed", "1"]));
    assert_eq!(
        (&told["heads_pruned"], &told["channels_pruned"], &told["uniform"]),
        (&value!(0.25), &value!(0.25), &value!(false))
    );
    let again = f.path("again");
    call(&prune(&again, &["--method", "rand", "--seed", "1"]));
    let bytes = |folder: &str, file: &str| std::fs::read(Path::new(folder).join(file)).unwrap();
    for file in ["model.safetensors", "pruning.json", "config.json"] {
        assert!(bytes(&small, file) == bytes(&again, file), "{file}");
    }
    // Alignment is a full tune, merged; it stays a pruned model of the same base.
    let train = |model: &str, output: &str, more: &[&str]| {
        ok(&[&["train", "--model", model, "--data", &f.data, "--output", output], more].concat());
    };
    train(&small, &full, &["--method", "full", "--max-steps", "20", "--lr", "1e-3"]);
    ok(&["merge", "--model", &small, "--adapter", &full, "--output", &aligned]);
    assert!(bytes(&small, "pruning.json") == bytes(&aligned, "pruning.json"));
    let (own, recovered) = (f.path("own"), f.path("recovered"));
    train(&aligned, &own, &["--max-steps", "60", "--lr", "1e-2", "--target-modules", "all-linear"]);
    let pruning = format!("{small}/pruning.json");
    let told = json(&["recover", "--adapter", &own, "--pruning", &pruning, "--output", &recovered]);
    assert!(told["parameters"].as_u64() > told["trained_parameters"].as_u64());
    let loss = |more: &[&str]| {
        json(&[&["eval", "--model", &f.model, "--data", &f.data], more].concat())["loss"].as_f64().unwrap()
    };
    let (before, after) = (loss(&[]), loss(&["--adapter", &recovered]));
    assert!(after < before, "{after} against {before}");
    let manifest: serde_json::Value = serde_json::from_slice(&bytes(&recovered, "lorimer.json")).unwrap();
    assert_eq!(manifest["training"]["trained_on"]["pruned"]["name"], f.model.as_str());
    ok(&["check", &recovered, "--model", &f.model]);

    // Where it does not belong.
    let whole = ["--model", f.model.as_str(), "--data", f.data.as_str()];
    assert!(error(&[&["eval", "--adapter", &own], &whole[..]].concat()).contains("lorimer recover"));
    let merged = f.path("merged");
    assert!(
        error(&["merge", "--model", &f.model, "--adapter", &own, "--output", &merged]).contains("lorimer recover")
            && !Path::new(&merged).exists()
    );
    let other = f.path("other");
    call(&prune(&other, &["--method", "rand", "--seed", "2"]));
    assert!(
        error(&["eval", "--model", &other, "--adapter", &own, "--data", &f.data])
            .contains("ids of pruning.json differ")
    );
    // Whoever uses an adapter looks: to be seen to fail where one does not.
    let (wrong, out) = (format!("{other}/pruning.json"), f.path("out"));
    for used in [
        vec!["convert", &own, "--to", "lora", "--model", &other, "--output", &out],
        vec!["extract", &own, "--model", &other, "--rank", "4", "--output", &out],
        vec!["eval", "--model", &other, "--adapter", &own, "--data", &f.data, "--rank", "all"],
        vec!["train", "--model", &other, "--adapter", &own, "--data", &f.data, "--output", &out, "--max-steps", "1"],
        vec!["inspect", &own, "--text", "up", "--model", &other],
    ] {
        let told = error(&used);
        assert!(told.contains("ids of pruning.json differ"), "{used:?}: {told}");
        assert!(!Path::new(&out).join("adapter_config.json").exists(), "{used:?}");
    }
    let refused = error(&["recover", "--adapter", &own, "--pruning", &wrong, "--output", &out]);
    assert!(refused.contains("another pruned model") && !Path::new(&out).exists(), "{refused}");
    let plain = f.path("plain");
    ok(&f.train(&plain, &["--max-steps", "2"]));
    let refused = error(&["recover", "--adapter", &plain, "--pruning", &pruning, "--output", &out]);
    assert!(refused.contains("no pruned model") && !Path::new(&out).exists(), "{refused}");
    assert!(error(&["recover", "--adapter", &own, "--pruning", &pruning, "--output", &recovered]).contains("exists"));
    // By importance.
    let by = f.path("by-importance");
    let told = call(&prune(&by, &["--method", "stru", "--data", &f.data, "--samples", "8"]));
    assert_eq!(told["channels_pruned"], value!(0.25));
    train(&by, &f.path("quantised"), &["--max-steps", "2", "--dtype", "nf4"]);
    for (more, says) in [
        (vec!["--method", "stru"], "give them with --data"),
        (vec!["--method", "rand", "--data", &f.data], "leave it out"),
        (vec!["--method", "rand", "--samples", "8"], "--samples is for --method stru"),
        (vec!["--method", "stru", "--data", &f.data, "--seed", "0"], "--seed is for --method rand"),
        (vec!["--method", "stru", "--data", &f.data, "--samples", "0"], "at least 1"),
        (vec!["--method", "rand", "--ratio", "1"], "below 1"),
        (vec!["--method", "rand", "--ratio", "0.999"], "leaves nothing"),
        (vec!["--method", "rand", "--keep-first", "1"], "leave none"),
        (vec!["--method", "rand", "--dtype", "nf4"], "not written in nf4"),
    ] {
        let flags = prune(&out, &more);
        let told = error(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(told.contains(says) && !Path::new(&out).exists(), "{told}");
    }
    let encoder = crate::common::goldens("tiny-bert").display().to_string();
    let told = error(&["prune", "--model", &encoder, "--method", "rand", "--ratio", "0.5", "--output", &out]);
    assert!(told.contains("encoder") && !Path::new(&out).exists(), "{told}");
}

/// Where nothing is pruned: training on the pruned model is training on the base, bit for bit, and so is what is recovered.
#[test]
fn a_ratio_of_nothing_trains_as_the_base_does() {
    let f = Fixture::new();
    let (same, plain, own, recovered) = (f.path("same"), f.path("plain"), f.path("own"), f.path("recovered"));
    let prune = ["prune", "--model", &f.model, "--method", "rand", "--ratio", "0", "--output", &same];
    let told = json(&[&prune[..], &["--keep-first", "0", "--keep-last", "0"]].concat());
    assert_eq!((&told["heads_pruned"], &told["channels_pruned"]), (&value!(0.0), &value!(0.0)));
    let more = ["--max-steps", "12", "--target-modules", "all-linear"];
    ok(&f.train(&plain, &more));
    let train = ["train", "--model", &same, "--data", &f.data, "--output", &own, "--lr", "1e-2"];
    ok(&[&train[..], &more].concat());
    let pruning = format!("{same}/pruning.json");
    ok(&["recover", "--adapter", &own, "--pruning", &pruning, "--output", &recovered]);
    assert_eq!(tensors(&own), tensors(&plain));
    assert_eq!(tensors(&recovered), tensors(&plain));
}

/// Records whose sizes no adapter has are refused in a sentence, though their ids are those of their content: nothing is allocated for them and
/// nothing written.
#[test]
fn hostile_records_are_refused() {
    let f = Fixture::new();
    let small = f.path("small");
    let keep = ["--ratio", "0.5", "--keep-first", "0", "--keep-last", "1"];
    ok(&[&["prune", "--model", &f.model, "--method", "rand", "--output", &small], &keep[..]].concat());
    let (own, bare, out) = (f.path("own"), f.path("bare"), f.path("out"));
    ok(&["train", "--model", &small, "--data", &f.data, "--output", &own, "--max-steps", "1"]);
    std::fs::create_dir(&bare).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(&own).join(file), Path::new(&bare).join(file)).unwrap();
    }
    let path = f.path("pruning.json");
    let recover = ["recover", "--adapter", &bare, "--pruning", &path, "--output", &out, "--unverified"];
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Path::new(&small).join("pruning.json")).unwrap()).unwrap();
    let write = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = record.clone();
        change(&mut changed);
        let mut pruning: lorimer::adapter::Pruning = serde_json::from_value(changed).unwrap();
        pruning.id = pruning.own_id();
        std::fs::write(&path, serde_json::to_vec(&pruning).unwrap()).unwrap();
    };
    let large = 1u64 << 20;
    type Change = (&'static str, Box<dyn Fn(&mut serde_json::Value)>);
    let changes: [Change; 5] = [
        // 2⁴⁰ rows, each number possible for itself.
        (
            "heads of",
            Box::new(move |v| {
                (v["whole"][0]["heads"], v["whole"][0]["kv_heads"]) = (large.into(), large.into());
                v["whole"][0]["head_dim"] = large.into();
                (v["kept"][0]["heads"], v["kept"][0]["kv_heads"]) = (value!([0]), value!([0]));
            }),
        ),
        // 2³² rows: numbers of rows that 32 bits do not hold.
        ("heads of", Box::new(|v| v["whole"][0]["head_dim"] = (1u64 << 30).into())),
        ("channels", Box::new(move |v| v["whole"][0]["channels"] = large.into())),
        ("hidden state", Box::new(|v| v["hidden"] = (1u64 << 40).into())),
        // Within bounds, but of no model that this adapter was trained on.
        ("has shape", Box::new(move |v| v["hidden"] = large.into())),
    ];
    for (says, change) in changes {
        write(&*change);
        let told = error(&recover);
        assert!(told.contains(says) && !Path::new(&out).exists(), "{told}");
    }
    write(&|_| ());
    ok(&recover);
}

/// Seventy billion parameters are planned from a config.json alone.
#[test]
fn a_pruned_model_is_planned_from_its_configuration() {
    let f = Fixture::new();
    let config = value!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 32000,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": false,
    });
    std::fs::write(f.folder.path().join("config.json"), config.to_string()).unwrap();
    let model = f.folder.path().display().to_string();
    let plan = [
        "plan",
        "--model",
        &model,
        "--max-length",
        "512",
        "--batch-size",
        "1",
        "--checkpointing",
        "on",
        "--dtype",
        "nf4",
    ];
    let told = json(&[&plan[..], &["--prune-ratio", "0.85"]].concat());
    assert_eq!(told["whole"]["parameters"], 68_976_648_192u64);
    assert_eq!(told["pruned"]["parameters"], 16_272_924_672u64);
    let peak = |v: &serde_json::Value| v["pruned"]["peak_bytes"].as_u64().unwrap();
    let less = json(&[&plan[..], &["--prune-ratio", "0.65"]].concat());
    assert!(peak(&told) < peak(&less) && peak(&less) < told["whole"]["peak_bytes"].as_u64().unwrap());
    assert!(ok(&[&plan[..], &["--prune-ratio", "0.85"]].concat()).contains("16272924672"));
    // A limit between both: one fits, and the other does not, even if layers are computed again.
    let limit = ((peak(&told) + told["whole"]["peak_bytes"].as_u64().unwrap()) / 2).to_string();
    let bounded = json(&[&plan[..], &["--prune-ratio", "0.85", "--memory-limit", &limit]].concat());
    assert_eq!((&bounded["pruned"]["fits"], &bounded["whole"]["fits"]), (&value!(true), &value!(false)));
    assert_eq!(told["pruned"]["fits"], serde_json::Value::Null);
    assert!(ok(&[&plan[..], &["--prune-ratio", "0.85", "--memory-limit", &limit]].concat()).contains("fits into"));
    // Without a word on checkpointing it is taken where the limit asks for it, as in a plan of one model.
    let auto: Vec<&str> = plan.iter().map(|flag| if *flag == "on" { "auto" } else { flag }).collect();
    let free = json(&[&auto[..], &["--prune-ratio", "0.85"]].concat());
    let bounded = json(&[&auto[..], &["--prune-ratio", "0.85", "--memory-limit", &limit]].concat());
    assert_eq!((&free["whole"]["checkpointing"], &bounded["whole"]["checkpointing"]), (&value!(false), &value!(true)));
    for (more, says) in [
        (vec!["--prune-ratio", "1.5"], "below 1"),
        (vec!["--prune-ratio", "0.5", "--keep-first", "90"], "leave none"),
        (vec!["--prune-ratio", "0.5", "--dtype", "int8"], "no size"),
    ] {
        assert!(error(&[&plan[..], &more[..]].concat()).contains(says));
    }
}
