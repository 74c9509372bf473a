//! Every method through the whole program on a tiny model: train, check, merge, export, and the comparison of some of them.

use std::path::Path;

use lorimer::prelude::*;

use crate::common::{Fixture, error, json, ok};

/// The first settings of every method that its line in the registry names, as flags.
fn every() -> Vec<(&'static str, Vec<String>)> {
    let flags = |settings: &str| -> Vec<String> {
        let map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(settings).unwrap();
        map.iter().map(|(key, value)| format!("--set={key}={value}")).collect()
    };
    let of = |e: &'static methods::Entry| e.laws.iter().take(2).map(move |(settings, _)| (e.name, flags(settings)));
    let more = [("lora", r#"{"r": 4, "init_lora_weights": "pissa"}"#), ("bone", r#"{"r": 8, "variant": "bat"}"#)];
    let more = more.into_iter().map(|(name, settings)| (name, flags(settings)));
    methods::REGISTRY.iter().flat_map(of).chain(more).collect()
}

#[test]
fn every_method_trains_checks_merges_and_becomes_a_lora() {
    let f = Fixture::new();
    let loss = |arguments: &[&str]| json(arguments)["loss"].as_f64().unwrap();
    let untrained = loss(&["eval", "--model", &f.model, "--data", &f.data]);
    for (i, (method, flags)) in every().iter().enumerate() {
        let name = |what: &str| f.path(&format!("{what}-{i}"));
        let (run, merged, lora) = (name("run"), name("merged"), name("lora"));
        let mut train = vec!["train", "--model", &f.model, "--data", &f.data, "--output", &run, "--method", method];
        train.extend(["--max-steps", "30"]);
        train.extend(flags.iter().map(String::as_str));
        json(&train);
        // At the rate that the method has by default.
        let own = loss(&["eval", "--model", &f.model, "--data", &f.data, "--adapter", &run]);
        assert!(own < untrained, "{method} {flags:?}: {own} after {untrained}");
        let checked = json(&["check", &run, "--model", &f.model]);
        assert_eq!(checked["ok"], true, "{method}: {checked}");
        assert!(checked["golden_difference"].as_f64().unwrap() < 1e-4, "{method}: {checked}");
        ok(&["inspect", &run]);
        let merge = ["merge", "--model", &f.model, "--adapter", &run, "--output", &merged];
        if !methods::entry(method).unwrap().mergeable {
            for refused in [&merge[..], &["convert", &run, "--to", "lora", "--model", &f.model, "--output", &lora]] {
                let told = error(refused);
                let why = ["its gates depend on the input", "it is a layer after each attention", "a router sends"];
                assert!(why.iter().any(|why| told.contains(why)), "{method}: {told}");
            }
            continue;
        }
        ok(&merge);
        let of_merged = loss(&["eval", "--model", &merged, "--data", &f.data]);
        assert!((own - of_merged).abs() < 1e-4 * (1.0 + own), "{method} {flags:?}: {own} merged {of_merged}");

        let told = json(&["convert", &run, "--to", "lora", "--model", &f.model, "--output", &lora]);
        let of_lora = loss(&["eval", "--model", &f.model, "--data", &f.data, "--adapter", &lora]);
        // The default rank is as large as the tiny model's matrices.
        assert!((own - of_lora).abs() < 1e-3 * (1.0 + own), "{method} {flags:?}: {own} as a LoRA {of_lora}");
        if told["exact"] == told["modules"] {
            let checked = json(&["check", &lora, "--model", &f.model]);
            assert!(checked["golden_difference"].as_f64().unwrap() < 1e-4, "{method}: {checked}");
        }
        let small = name("small");
        let told = json(&["convert", &run, "--to", "lora", "--rank", "1", "--model", &f.model, "--output", &small]);
        assert!(told["error"].as_f64().unwrap() > 1e-3 && told["rank"] == 1, "{method}: {told}");
    }
}

#[test]
fn what_does_not_fit_a_method_is_one_clear_sentence() {
    let f = Fixture::new();
    let out = f.path("x");
    let train = |more: &[&str]| error(&[&f.train(&out, &["--max-steps", "1"])[..], more].concat());
    assert!(train(&["--method", "bone", "--alpha", "4"]).contains("`bone` has no --alpha; it has --rank"));
    assert!(train(&["--method", "bone", "--rank", "7", "--set", "variant=bat"]).contains("nearest r that does is 8"));
    assert!(train(&["--method", "lora-xs", "--rank", "40"]).contains("it needs at most"));
    assert!(train(&["--method", "tlora", "--set", "factors=9"]).contains("2 or 3"));
    assert!(train(&["--method", "hydra", "--set", "variant=three"]).contains("both, parallel or sequential"));
    assert!(train(&["--method", "loldu", "--init", "high"]).contains("loldu"));
    assert!(train(&["--method", "lora", "--set", "eva_config={}"]).contains("eva_config"));
    // Two that cannot be summed.
    let runs = [f.path("a"), f.path("b")];
    for run in &runs {
        json(&f.train(run, &["--max-steps", "3", "--method", "hydra"]));
    }
    let told = error(&["eval", "--model", &f.model, "--data", &f.data, "--adapter", &runs[0], "--adapter", &runs[1]]);
    assert!(told.contains("only be used alone"), "{told}");
    let half = format!("{}=0.5", runs[0]);
    let told = error(&["merge", "--model", &f.model, "--adapter", &half, "--output", &out]);
    assert!(told.contains("only be used alone"), "{told}");
    // Frozen factors that another base does not give.
    let xs = f.path("xs");
    json(&f.train(&xs, &["--max-steps", "3", "--method", "lora-xs", "--rank", "4"]));
    let told = error(&["eval", "--model", &f.model, "--dtype", "nf4", "--data", &f.data, "--adapter", &xs]);
    assert!(told.contains("come out otherwise"), "{told}");
}

#[test]
fn a_comparison_goes_on_where_it_stopped() {
    let f = Fixture::new();
    let (file, out) = (f.path("compare.yaml"), f.path("results"));
    let general = f.path("general.jsonl");
    std::fs::write(&general, "{\"text\": \"up and down\"}\n").unwrap();
    let (model, data) = (&f.model, &f.data);
    let spec = format!(
        "model: {model}\nsteps: 4\nbatch_size: 4\nseeds: [0, 1]\ngeneral: {general}\n\
         tasks:\n  - {{ name: one, data: {data}, eval: {data} }}\n  - {{ name: two, data: {data}, eval: {data}, eval_limit: 6 }}\n\
         sweep: {{ task: one, steps: 3, rates: [1e-3, 1e-2], held_out: 6, extensions: 0 }}\n\
         methods:\n  - {{ name: lora, set: {{ r: 2 }} }}\n  - {{ name: bat, method: bone, set: {{ r: 8, variant: bat }} }}\n  - {{ name: eva, set: {{ r: 2 }}, lr: 1e-2 }}\n  \
         - {{ name: mixed, method: xlora, lr: 1e-2, experts: {{ tasks: [one, two], set: {{ r: 2 }}, steps: 3 }} }}\n"
    );
    std::fs::write(&file, &spec).unwrap();
    let first = json(&["compare", &file, "--output", &out, "--max-runs", "5"]);
    assert!(first["missing_runs"].as_u64().unwrap() > 0);
    let all = json(&["compare", &file, "--output", &out]);
    assert_eq!(all["missing_runs"], 0);
    let methods = all["methods"].as_array().unwrap();
    assert_eq!(methods.len(), 4);
    // Two experts for each seed stay beside the runs that mix them.
    let kept = std::fs::read_dir(Path::new(&out).join("runs")).unwrap();
    assert_eq!(kept.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "adapter")).count(), 4);
    for m in methods {
        assert_eq!(m["runs"], 4);
        for key in ["accuracy", "loss", "forgetting", "seconds", "peak_bytes", "trainable_parameters", "file_bytes"] {
            assert!(m[key].is_number(), "{key}: {m}");
        }
    }
    assert_eq!(all["sweeps"].as_array().unwrap().len(), 4);
    // Nothing is left to do, and what was done is read again, to the same table.
    let table = std::fs::read(Path::new(&out).join("table.md")).unwrap();
    let again = json(&["compare", &file, "--output", &out, "--max-runs", "0"]);
    assert_eq!(again["missing_runs"], 0);
    assert_eq!(std::fs::read(Path::new(&out).join("table.md")).unwrap(), table);
    let page = std::fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(page.matches("<svg").count() == 2 && page.contains("Pareto"));
    std::fs::write(&file, spec.replace("name: bat, method: bone", "name: bat, method: bones")).unwrap();
    assert!(error(&["compare", &file, "--output", &out]).contains("bones"));
    for (old, new, told) in [
        ("tasks: [one, two]", "tasks: [three]", "`three` is none of the tasks"),
        ("method: xlora", "method: lora", "`mixed` mixes no adapters"),
        (", experts: { tasks: [one, two], set: { r: 2 }, steps: 3 }", "", "name their tasks in `experts`"),
    ] {
        assert!(spec.contains(old));
        std::fs::write(&file, spec.replace(old, new)).unwrap();
        let found = error(&["compare", &file, "--output", &out]);
        assert!(found.contains(told), "{found}");
    }
    std::fs::write(&file, spec.replace("seeds: [0, 1]", "seed: [0]")).unwrap();
    assert!(error(&["compare", &file, "--output", &out]).contains("is no comparison"));
}

/// LoRA-SB's start is a step at the rate of the first step: the peak over the warm-up in `train`; in `compare` the same at all rates.
#[test]
fn lora_sbs_start_follows_the_warm_up_and_not_a_sweep() {
    let f = Fixture::new();
    let out = f.path("sb");
    let more =
        ["--method", "lora-sb", "--rank", "4", "--max-steps", "20", "--warmup-ratio", "0.21", "--set", "samples=4"];
    ok(&f.train(&out, &more));
    let eta = |folder: &Path| {
        let bytes = std::fs::read(folder.join("adapter_config.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()["init_lr"].as_f64().unwrap()
    };
    // --lr 1e-2 over the five steps of the warm-up.
    assert!((eta(Path::new(&out)) - 2e-3).abs() < 1e-15);
    let (file, results) = (f.path("sb.yaml"), f.path("sb-results"));
    let (model, data) = (&f.model, &f.data);
    let spec = format!(
        "model: {model}\nsteps: 40\nbatch_size: 4\nseeds: [0]\nWARMUP\ntasks:\n  - {{ name: one, data: {data}, eval: {data} }}\n\
         sweep: {{ task: one, steps: 3, rates: [1e-4, 1e-3, 1e-2], held_out: 6 }}\n\
         methods:\n  - {{ name: lora-sb, set: {{ r: 4, samples: 4 }} }}\n  - {{ name: own, method: lora-sb, set: {{ r: 4, samples: 4, init_lr: 0.5 }}, lr: 1e-3 }}\n"
    );
    for (warmup, expected) in [("", 5e-4 / 2.0), ("warmup_ratio: 0.1", 5e-4 / 4.0)] {
        let results = format!("{results}{}", warmup.len());
        std::fs::write(&file, spec.replace("WARMUP", warmup)).unwrap();
        assert_eq!(json(&["compare", &file, "--output", &results])["missing_runs"], 0);
        let mut rates = std::collections::BTreeSet::new();
        for entry in std::fs::read_dir(Path::new(&results).join("runs")).unwrap() {
            let run: serde_json::Value =
                serde_json::from_slice(&std::fs::read(entry.unwrap().path()).unwrap()).unwrap();
            let (own, start) = (run["spec"]["lr"].to_string(), run["spec"]["set"]["init_lr"].as_f64());
            match start {
                Some(start) if start != 0.5 => {
                    assert!((start - expected).abs() < 1e-18, "{start} at {own}");
                    rates.insert(own);
                }
                _ => {}
            }
        }
        assert!(rates.len() >= 3, "{rates:?}");
    }
    std::fs::write(&file, spec.replace("WARMUP", "warmup_ratio: 2.0")).unwrap();
    assert!(error(&["compare", &file, "--output", &results]).contains("warmup_ratio"));
}

/// Where a method's settings want another learning rate than its line in the registry says, `train` takes that: NLoRA's trained middle factor alone
/// learns nothing at the rate of all three.
#[test]
fn variants_train_at_rates_of_their_own() {
    let f = Fixture::new();
    for (settings, rate) in [
        (vec!["--set", "variant=nlora"], 5e-6),
        (vec!["--set", "start=code"], 1e-3),
        (vec!["--set", "variant=slora"], 1e-3),
        (vec!["--set", "variant=inttune"], 1e-2),
        (vec!["--set", "variant=inttune", "--set", "start=code"], 1e-2),
        (vec!["--set", "variant=inttune", "--rank", "8"], 5e-3),
    ] {
        let run = f.path("run");
        let mut all = vec!["train", "--model", &f.model, "--data", &f.data, "--output", &run, "--overwrite"];
        all.extend(["--method", "nlora", "--max-steps", "1"]);
        all.extend(if settings.contains(&"--rank") { &[][..] } else { &["--rank", "4"][..] });
        all.extend(&settings);
        json(&all);
        let told: serde_json::Value =
            serde_json::from_slice(&std::fs::read(Path::new(&run).join("lorimer.json")).unwrap()).unwrap();
        assert_eq!(told["training"]["settings"]["learning_rate"], rate, "{settings:?}");
    }
    let page = ok(&["methods", "--docs", &f.path("docs")]);
    assert!(page.contains("nlora"));
    let page = std::fs::read_to_string(f.path("docs/nlora.md")).unwrap();
    assert!(page.contains("5e-6; `slora`: 1e-3; `inttune`: 5e-3"), "{page}");
}

/// A sweep goes on past the edges of its grid by itself, so often as it may, and says so; a rate that runs away is a result, in the sweep and in
/// the runs.
#[test]
fn a_comparison_looks_beyond_its_grid_and_bears_rates_that_run_away() {
    let f = Fixture::new();
    let (file, out) = (f.path("compare.yaml"), f.path("results"));
    let (model, data) = (&f.model, &f.data);
    let spec = format!(
        "model: {model}\nsteps: 4\nbatch_size: 4\nseeds: [0]\n\
         tasks:\n  - {{ name: one, data: {data}, eval: {data}, eval_limit: 6 }}\n\
         sweep: {{ task: one, steps: 3, rates: [1e-5, 2e-5], held_out: 6, extensions: 3 }}\n\
         methods:\n  - {{ name: low, method: lora, set: {{ r: 2 }} }}\n  - {{ name: wild, method: lora, set: {{ r: 2 }}, rates: [2e-2, 1e25, 1e30] }}\n\
         \x20 - {{ name: given, method: lora, set: {{ r: 2 }}, lr: 1e30 }}\n\
         \x20 - {{ name: routed, method: flylora, set: {{ r: 8, top_k: 2, lora_alpha: 8 }}, lr: 1e30 }}\n\
         \x20 - {{ name: layers, method: galore, set: {{ rank: 2, per_layer: true }}, lr: 1e30 }}\n\
         \x20 - {{ name: searched, method: diffora, set: {{ r: 2, search_steps: 4, search_lr: 1e30, gamma_lr: 1e30 }}, lr: 1e-3 }}\n\
         \x20 - {{ name: shut, method: sora, set: {{ r: 2, xi: 1e9 }}, lr: 1e-3 }}\n"
    );
    std::fs::write(&file, &spec).unwrap();
    let all = json(&["compare", &file, "--output", &out]);
    assert_eq!(all["missing_runs"], 0);
    let tried = |name: &str| -> Vec<(f64, bool)> {
        let mine = all["sweeps"].as_array().unwrap().iter().filter(|s| s["name"] == name);
        mine.map(|s| (s["lr"].as_f64().unwrap(), s["error"].is_null())).collect()
    };
    let line = |name: &str| all["methods"].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap();
    // Three steps at such rates are better the higher they are; after three more rates the sweep ends, and the best is an edge still.
    assert_eq!(tried("low"), [1e-5, 2e-5, 5e-5, 1e-4, 2e-4].map(|lr| (lr, true)));
    assert_eq!(line("low")["lr"], 2e-4);
    assert_eq!(line("low")["at_edge"], true);
    assert_eq!(line("low")["beyond_grid"], serde_json::json!([5e-5, 1e-4, 2e-4]));
    // What ran away is no edge to go beyond, but the rate below it is.
    assert_eq!(tried("wild")[..4], [(2e-2, true), (1e25, false), (1e30, false), (1e-2, true)]);
    assert!(line("wild")["lr"].as_f64().unwrap() <= 2e-2);
    // However it shows: in the loss, in scores that choose ranks, in a matrix that is decomposed, in a search, in an adapter of which nothing is left.
    for name in ["given", "routed", "layers", "searched", "shut"] {
        assert_eq!(line(name)["tasks"]["one"]["diverged"], 1, "{name}");
    }
    let told = std::fs::read_to_string(Path::new(&out).join("table.md")).unwrap();
    assert!(told.contains("| low | 2e-4 (edge) |"), "{told}");
    assert!(told.contains("beyond its grid: 5e-5, 1e-4, 2e-4; best at the edge of what was tried"), "{told}");
    assert!(told.contains("| given | diverged |"), "{told}");
    // Nothing is left to do, and the same is told.
    let again = json(&["compare", &file, "--output", &out, "--max-runs", "0"]);
    assert_eq!(again, all);
}

/// The pages in `docs/methods` are what the sources say; `lorimer methods --docs docs/methods` writes them anew.
#[test]
fn the_methods_pages_are_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    ok(&["methods", "--docs", &folder.path().display().to_string()]);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/methods");
    let mut pages = 0;
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |folder: &Path| std::fs::read_to_string(folder.join(&name)).unwrap_or_default();
        assert_eq!(read(folder.path()), read(&committed), "{name:?}: run `lorimer methods --docs docs/methods`");
        pages += 1;
    }
    assert_eq!(pages, lorimer::adapter::methods::REGISTRY.len() + 1);
    assert_eq!(std::fs::read_dir(&committed).unwrap().count(), pages, "a page of no method");
}

/// Files hold what was trained and at most 64 KB more, on the real model.
#[test]
fn files_hold_only_what_was_trained() {
    let pulled = pull("smollm2-135m", PullOptions::default()).unwrap();
    let base = Base::open(&pulled.path, &OpenOptions::default()).unwrap();
    let bytes = |method: &str, r: usize| {
        let settings = serde_json::json!({ "r": r });
        let method = methods::build(method, settings.as_object().unwrap()).unwrap();
        let adapter = Adapter::attach(base.model(), method, 0).unwrap();
        let file = adapter.to_stored("base").unwrap().tensor_bytes().unwrap().len();
        (file, 4 * adapter.parameter_count())
    };
    let (lora, _) = bytes("lora", 8);
    for (method, r, share) in [("randlora", 32, 1.0), ("lora-xs", 64, 0.4), ("loldu", 8, 0.01)] {
        let (file, trained) = bytes(method, r);
        assert!(file <= trained + 65_536, "{method}: {file} bytes for {trained} trained");
        assert!(file as f64 <= share * lora as f64, "{method}: {file} of LoRA's {lora}");
    }
}
