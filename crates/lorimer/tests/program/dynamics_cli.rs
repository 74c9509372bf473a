//! Ways to train and the subcommands around them, as a user sees them.

use std::path::Path;

use lorimer::prelude::*;

use crate::common::{self, Fixture, error, json, ok};

#[test]
fn every_rank_of_one_run_is_an_adapter() {
    let f = Fixture::new();
    let out = f.path("every-rank");
    ok(&f.train(&out, &["--method", "dylora", "--rank", "4", "--max-steps", "40"]));
    let base = ["--model", f.model.as_str(), "--data", f.data.as_str()];
    let curve = json(&[&["eval", "--adapter", &out, "--rank", "all", "--rank-for-loss", "10"], &base[..]].concat());
    let rows = curve["ranks"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["rank"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(curve["rank_for_loss"], 1);
    let cut = f.path("rank-2");
    ok(&["resize", &out, "--rank", "2", "--output", &cut]);
    let own = json(&[&["eval", "--adapter", &cut], &base[..]].concat());
    assert_eq!(own["loss"], rows[1]["loss"]);
    let (whole, part) = (StoredAdapter::read(Path::new(&out)).unwrap(), StoredAdapter::read(Path::new(&cut)).unwrap());
    assert_eq!(
        (&part.config["r"], &part.config["lora_alpha"], &whole.config["lora_alpha"]),
        // α stays, so that it is over the rank that is left.
        (&2.into(), &8.into(), &8.into())
    );
    for (name, t) in &part.tensors {
        let axis = usize::from(name.ends_with("lora_B.weight"));
        let expected = whole.tensors[name].narrow(axis, 0, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(t.to_vec2::<f32>().unwrap(), expected);
    }
    assert!(
        error(&["resize", &out, "--rank", "9", "--output", &f.path("x")]).contains("between 1 and the adapter's 4")
    );
    // A LoRA that was trained at one rank keeps what is left as it was: α shrinks with the rank.
    let plain = f.path("plain");
    ok(&f.train(&plain, &["--rank", "4", "--max-steps", "3"]));
    let half = f.path("half");
    ok(&["resize", &plain, "--rank", "2", "--output", &half]);
    let half = StoredAdapter::read(Path::new(&half)).unwrap();
    assert_eq!((&half.config["r"], &half.config["lora_alpha"]), (&2.into(), &4.into()));
}

#[test]
fn whole_tunes_become_loras_and_models() {
    let f = Fixture::new();
    let (out, lora, merged) = (f.path("whole"), f.path("as-lora"), f.path("merged"));
    ok(&f.train(&out, &["--method", "galore", "--rank", "4", "--max-steps", "20", "--set", "update_proj_gap=5"]));
    let base = ["--model", f.model.as_str()];
    let told = json(&[&["extract", &out, "--rank", "64", "--output", &lora], &base[..]].concat());
    assert!(told["error"].as_f64().unwrap() < 1e-4, "{told}");
    let data = [&base[..], &["--data", f.data.as_str()]].concat();
    let loss = |more: &[&str]| json(&[&["eval"], more, &data[..]].concat())["loss"].as_f64().unwrap();
    let whole = loss(&["--adapter", &out]);
    assert!((whole - loss(&["--adapter", &lora])).abs() < 1e-3 && whole < loss(&[]) - 0.1);
    // From the merged model beside its base, the same.
    ok(&[&["merge", "--adapter", &out, "--output", &merged], &base[..]].concat());
    let again = f.path("again");
    ok(&[&["extract", &merged, "--rank", "64", "--output", &again], &base[..]].concat());
    assert!((whole - loss(&["--adapter", &again])).abs() < 2e-2);
    let narrow = json(&[&["extract", &out, "--rank", "2", "--output", &f.path("narrow")], &base[..]].concat());
    assert!(narrow["error"].as_f64().unwrap() > 1e-3);
    assert!(
        error(&[&["extract", &f.model, "--output", &f.path("none")], &base[..]].concat()).contains("equals the base")
    );
}

/// Stepping layer by layer gives the same bytes as all at once, where no norm is limited.
#[test]
fn layers_may_be_stepped_one_by_one() {
    let f = Fixture::new();
    let (at_once, one_by_one) = (f.path("a"), f.path("b"));
    let more = [
        "--method",
        "galore",
        "--rank",
        "4",
        "--max-steps",
        "6",
        "--max-grad-norm",
        "0",
        "--modules-to-save",
        "model.norm",
    ];
    ok(&f.train(&at_once, &more));
    ok(&f.train(&one_by_one, &[&more[..], &["--set", "per_layer=true"]].concat()));
    let read = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(read(&at_once) == read(&one_by_one));
}

#[test]
fn gates_leave_a_smaller_lora_and_a_stage_each() {
    let f = Fixture::new();
    let out = f.path("sora");
    let more = [
        "--method",
        "sora",
        "--rank",
        "8",
        "--max-steps",
        "30",
        "--set",
        "xi=0.05",
        "--set",
        "xi_min=0.005",
        "--set",
        "stages=3",
    ];
    ok(&f.train(&out, &more));
    let ranks = |folder: &str| -> usize {
        let report = json(&["inspect", folder]);
        report["modules"].as_array().unwrap().iter().map(|m| m["rank"].as_u64().unwrap() as usize).sum()
    };
    let stages: Vec<usize> = (1..=3).map(|i| ranks(&format!("{out}/stages/{i}"))).collect();
    assert!(stages[0] >= stages[1] && stages[1] >= stages[2] && stages[2] < 8 * 14, "{stages:?}");
    assert_eq!(stages[2], ranks(&out));
    assert_eq!(json(&["check", &out, "--model", &f.model])["ok"], true);
}

#[test]
fn sparse_adapters_switch_and_change_their_form() {
    let f = Fixture::new();
    let (a, b) = (f.path("a"), f.path("b"));
    ok(&f.train(&a, &["--method", "shira", "--rank", "4", "--max-steps", "30"]));
    ok(&f.train(
        &b,
        &["--method", "shira", "--rank", "4", "--max-steps", "30", "--seed", "1", "--set", "mask_type=snip"],
    ));
    let report = json(&["switch", &a, &b, "--model", &f.model, "--prompt", "up 3", "--rounds", "50"]);
    assert_eq!(report["base_identical"], true);
    let texts: Vec<&str> = report["switches"].as_array().unwrap().iter().map(|s| s["text"].as_str().unwrap()).collect();
    let alone = json(&["generate", "--model", &f.model, "--adapter", &a, "--prompt", "up 3", "--max-tokens", "32"]);
    assert_eq!(alone["text"], texts[0]);
    let both = json(&["switch", &a, &b, "--fuse", "--model", &f.model, "--rounds", "1"]);
    assert!(both["overlaps"][0]["overlap"]["share"].as_f64().unwrap() < 1.0);
    // PEFT's form, compact, and back.
    let (small, smaller, back) = (f.path("compact"), f.path("compact-f16"), f.path("back"));
    ok(&["convert", &a, "--to", "compact", "--output", &small, "--model", &f.model]);
    ok(&["convert", &small, "--to", "peft", "--output", &back, "--model", &f.model]);
    ok(&["convert", &a, "--to", "compact-f16", "--output", &smaller, "--model", &f.model]);
    let tensors = |folder: &str| StoredAdapter::read(Path::new(folder)).unwrap().tensor_bytes().unwrap();
    assert_eq!(tensors(&a), tensors(&back));
    let bytes = |folder: &str| std::fs::metadata(Path::new(folder).join("adapter_model.safetensors")).unwrap().len();
    assert!(bytes(&smaller) < bytes(&small) && bytes(&small) < bytes(&a));
    for folder in [&small, &back, &a] {
        let apart = json(&["check", folder, "--model", &f.model])["golden_difference"].as_f64().unwrap();
        assert!(apart < 1e-4, "{folder}: {apart}");
    }
    let lora = f.path("lora");
    ok(&f.train(&lora, &["--max-steps", "2"]));
    assert!(error(&["switch", &lora, "--model", &f.model]).contains("only sparse ones"));
    assert!(error(&["switch", &a, "--model", &f.model, "--dtype", "nf4"]).contains("--dtype f32"));
}

#[test]
fn what_does_not_combine_says_why() {
    let f = Fixture::new();
    let refused =
        |more: &[&str]| error(&f.train(&f.path("refused"), &[more, &["--max-steps", "2", "--overwrite"]].concat()));
    for (more, expected) in [
        (&["--optimizer", "galore"][..], "--method full"),
        (&["--method", "bone", "--rank", "8", "--optimizer", "lora-pro"], "LoRA's A and B"),
        (&["--method", "dylora", "--optimizer", "adamw-8bit"], "use adamw"),
        (&["--method", "allora", "--optimizer", "adamw-8bit"], "use adamw"),
        (&["--method", "full", "--loraplus-lr-ratio", "16"], "LoRA's B"),
        (
            &["--method", "galore", "--set", "per_layer=true", "--gradient-accumulation", "2"],
            "--gradient-accumulation 1",
        ),
        (&["--loraplus-lr-ratio", "0"], "above 0"),
        (&["--method", "shira", "--rank", "5000"], "lower r or density"),
        (&["--method", "allora", "--alpha", "4"], "no --alpha"),
        (&["--method", "sora", "--set", "xi=1e9"], "every gate is closed"),
    ] {
        let said = refused(more);
        assert!(said.contains(expected), "{more:?}: {said}");
    }
    // Unknown names are the flag's own errors.
    let out = common::run(&f.train(&f.path("x"), &["--optimizer", "sgd"]));
    assert_eq!(out.status.code(), Some(2));
    assert!(common::text(&out.stderr).contains("lora-pro-full"));
}

/// Weight decay leaves norms alone, and label smoothing changes the loss.
#[test]
fn decay_spares_norms_and_smoothing_changes_the_loss() {
    let f = Fixture::new();
    let tensors = |folder: &str| StoredAdapter::read(Path::new(folder)).unwrap().tensors;
    let (plain, decayed) = (f.path("plain"), f.path("decayed"));
    let more = ["--max-steps", "1", "--modules-to-save", "model.norm"];
    let losses = |flags: &[&str]| -> Vec<f64> {
        serde_json::from_value(json(&[&f.train(&plain, &more)[..], &["--overwrite"], flags].concat())["losses"].clone())
            .unwrap()
    };
    let (smoothed, told) = (losses(&["--label-smoothing", "0.2"]), losses(&[]));
    assert!(smoothed[0] != told[0], "{smoothed:?} {told:?}");
    ok(&[&f.train(&decayed, &more)[..], &["--weight-decay", "5"]].concat());
    let (plain, decayed) = (tensors(&plain), tensors(&decayed));
    let mut norms = 0;
    for (name, t) in &plain {
        let same = (t - &decayed[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() == 0.0;
        // B starts at zero, of which nothing can be taken.
        match name {
            name if name.contains("lora_A") => assert!(!same, "{name}"),
            name if name.contains("norm") => {
                norms += 1;
                assert!(same, "{name}");
            }
            _ => {}
        }
    }
    assert_eq!(norms, 1);
    for (flags, expected) in [
        (&["--label-smoothing", "1"][..], "below 1"),
        (&["--warmup-ratio", "0.1", "--warmup-steps", "3"], "twice"),
        (&["--warmup-ratio", "1.5"], "between 0 and 1"),
    ] {
        let said = error(&[&f.train(&f.path("refused"), &more)[..], flags].concat());
        assert!(said.contains(expected), "{flags:?}: {said}");
    }
}

/// Embeddings keep moments of 32 bits, as in bitsandbytes under transformers.
#[test]
fn eight_bit_moments_leave_embeddings_out() {
    let f = Fixture::new();
    let base = Base::open(Path::new(&f.model), &OpenOptions::default()).unwrap();
    let row = Example { tokens: (1..20).collect(), supervised: vec![true; 19], answer: None };
    let given = serde_json::json!({ "r": 2, "modules_to_save": ["embed_tokens", "lm_head"] });
    let output = Path::new(&f.path("eight")).to_path_buf();
    let session = Session {
        base: &base,
        base_name: "tiny",
        train: &[row],
        eval: &[],
        settings: TrainSettings {
            max_steps: Some(2),
            optimizer: Some("adamw-8bit".parse().unwrap()),
            ..Default::default()
        },
        start: None,
        output: output.clone(),
        save_steps: None,
        save_limit: 1,
        resume: false,
        overwrite: false,
        data_names: Vec::new(),
        // Stopped after its first step, so that there is a checkpoint to look at.
        stop: &std::sync::atomic::AtomicBool::new(true),
    };
    session.run(methods::build("lora", given.as_object().unwrap()).unwrap(), |_| {}).unwrap();
    let state =
        candle_core::safetensors::load(output.join("checkpoint-1/optimizer.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    let kind = |name: &str| state[&format!("{name}.weight.exp_avg")].dtype();
    assert_eq!(kind("model.embed_tokens"), candle_core::DType::F32);
    assert_eq!(kind("lm_head"), candle_core::DType::U8);
}

/// A run moves what a rule moves, by so much a step: each bias of each module by a multiple of the rate, and some of them.
#[test]
fn buffers_move_in_a_run() {
    let f = Fixture::new();
    for (method, key) in [("flylora", "lora_topk_bias"), ("smora", "lora_biases")] {
        let out = f.path(method);
        let settings: &[&str] = match method {
            "flylora" => &["--set", "top_k=2", "--set", "bias_u=0.25"],
            _ => &["--set", "activate_r=2", "--set", "bias_update_rate=0.25"],
        };
        ok(&f.train(&out, &[&["--method", method, "--rank", "4", "--max-steps", "3"], settings].concat()));
        let stored = StoredAdapter::read(Path::new(&out)).unwrap();
        let biases: Vec<f32> = stored
            .tensors
            .iter()
            .filter(|(name, _)| name.ends_with(key))
            .flat_map(|(_, t)| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect();
        assert!(biases.iter().any(|b| *b != 0.0), "{method}: no bias moved");
        assert!(biases.iter().all(|b| (b / 0.25).fract() == 0.0 && b.abs() <= 0.75), "{method}: {biases:?}");
    }
}
