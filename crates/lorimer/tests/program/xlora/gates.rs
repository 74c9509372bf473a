//! What gates are over rows, and adapters with fixed gates in their place: X-LoRA's by PEFT's numbers, and those of routed experts and ranks.

use lorimer::adapter::file::export::{FixedGates, to_lora_with_gates};
use lorimer::adapter::gates::{Gated, gated_by};
use lorimer::adapter::{Gates, Role};

use super::*;

fn over(model: &dyn BaseModel, adapter: &Adapter, rows: &[Vec<u32>]) -> Gates {
    Gates::over(model, adapter, rows.iter().map(Vec::as_slice)).unwrap()
}

/// The logits of an adapter with fixed gates, by way of its folder.
fn fixed(model: &dyn BaseModel, adapter: &Adapter, gates: FixedGates<'_>, rows: &[Vec<u32>]) -> Tensor {
    let (lora, exported) = to_lora_with_gates(model, adapter, gates, "tiny").unwrap();
    assert_eq!(exported.exact, exported.modules);
    assert_eq!(lora.config["peft_type"], "LORA");
    let out = tempfile::tempdir().unwrap();
    lora.write(out.path(), None).unwrap();
    let read = Adapter::load_whole(model, &StoredAdapter::read(out.path()).unwrap()).unwrap();
    assert_eq!(read.method.name(), "lora");
    logits(model, &Attached::one(&read), rows)
}

/// Means over tokens are those of PEFT's gates, projection by projection.
#[test]
fn mean_gates_are_those_of_peft() {
    let model = tiny_llama();
    for name in CASES {
        let golden = Golden::open(name);
        let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case(name)).unwrap()).unwrap();
        let found = over(&model, &adapter, &golden.tokens());
        assert_eq!((found.of, found.count, found.rows), (Gated::Experts, 3, 22), "{name}");
        let (_, _, sites, n) = golden.get("gates").dims4().unwrap();
        let gates = golden.get("gates").reshape((22, sites, n)).unwrap().to_dtype(DType::F64).unwrap();
        let used = gates.ne(0.0).unwrap().to_dtype(DType::F64).unwrap();
        let order = adapter.mixture().unwrap().sites;
        assert!(found.modules.iter().map(|m| &m.name).eq(&order), "{name}");
        let of = |gates: &Tensor| gates.mean(0).unwrap().to_vec2::<f64>().unwrap();
        for ((own, mean), used) in found.modules.iter().zip(of(&gates)).zip(of(&used)) {
            let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(near(&own.mean, &mean) && near(&own.used, &used), "{name}: {} {mean:?}", own.name);
        }
        // A group's mean is its projections'.
        let all = found.grouped(|_| "all".into());
        let mean = |i: usize| found.modules.iter().map(|m| m.mean[i]).sum::<f64>() / found.modules.len() as f64;
        assert!(all.len() == 1 && (0..3).all(|i| (all[0].mean[i] - mean(i)).abs() < 1e-12), "{name}");
    }
}

/// Where PEFT's λ is the same for every token, the LoRA is PEFT's mixture: experts that lack projections, other ranks and scalings, a weight of all.
#[test]
fn fixed_gates_give_what_peft_gives_with_a_constant_head() {
    let model = tiny_llama();
    let golden = Golden::open("constant");
    let rows = golden.tokens();
    let adapter = Adapter::load_whole(&model, &StoredAdapter::read(&case("constant")).unwrap()).unwrap();
    let means = over(&model, &adapter, &rows);
    golden.near("constant", "logits", &fixed(&model, &adapter, FixedGates::Means(&means), &rows), 1e-5);
    let (lora, _) = to_lora_with_gates(&model, &adapter, FixedGates::Means(&means), "tiny-llama").unwrap();
    assert!(lora.config["rank_pattern"].as_object().unwrap().values().any(|rank| rank == &json!(9)));
}

/// One expert's gate is 1 and the others' 0: that expert. Gates of 1/n: the sum of the experts, each times 1/n. What has gate 0 is left out.
#[test]
fn given_gates_are_weights_of_the_experts() {
    let model = tiny::model();
    let (parts, rows) = (experts(&model, 3), rows());
    let adapter =
        mixture(&model, &parts, &json!({ "init": "peft", "layerwise_scalings": true, "global_scaling_weight": 0.7 }));
    let all: Vec<Adapter> = parts.iter().map(|part| expert(&model, part)).collect();
    for weights in [vec![1.0, 0.0, 0.0], vec![0.0, 0.0, 1.0], vec![1.0 / 3.0; 3], vec![0.5, -2.0, 0.25]] {
        let expected = Attached::weighted(all.iter().zip(&weights).map(|(a, w)| (a, 0.7 * w)).collect()).unwrap();
        let found = fixed(&model, &adapter, FixedGates::Experts(&weights), &rows);
        let d = distance(&found, &logits(&model, &expected, &rows));
        assert!(d < 1e-10, "{weights:?}: {d:e}");
        let (lora, exported) = to_lora_with_gates(&model, &adapter, FixedGates::Experts(&weights), "tiny").unwrap();
        assert_eq!(lora.tensors.len(), 2 * exported.modules, "{weights:?}");
    }
    let third = to_lora_with_gates(&model, &adapter, FixedGates::Experts(&[0.0, 0.0, 1.0]), "tiny").unwrap();
    assert!(
        third.1.modules < adapter.deltas().count() && third.0.tensors.keys().all(|name| name.contains("layers.1."))
    );
    for (weights, says) in [
        (vec![1.0, 0.0], "2 gates are given, the adapter has 3 experts"),
        (vec![0.0; 3], "all gates are 0"),
        (vec![1.0, f64::NAN, 0.0], "finite"),
    ] {
        let error =
            to_lora_with_gates(&model, &adapter, FixedGates::Experts(&weights), "tiny").err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// Methods whose gates can be the same for every token are then the LoRA of these gates, to rounding; their means are what the route says.
#[test]
fn routed_adapters_with_constant_gates_are_their_fixed_ones() {
    let model = tiny::model();
    let rows = rows();
    let cases = [
        ("llava-mole", json!({ "r": 2, "lora_alpha": 4, "experts": 3, "routing": "dense" }), Gated::Experts, 3),
        ("llava-mole", json!({ "r": 2, "experts": 2, "lora_dropout": 0.0 }), Gated::Experts, 2),
        ("smora", json!({ "r": 6, "activate_r": 4, "rank_partition": 2 }), Gated::Ranks, 6),
        ("flylora", json!({ "r": 4, "top_k": 4, "input_gradient": "cut" }), Gated::Ranks, 4),
    ];
    for (name, settings, of, count) in cases {
        let adapter = Adapter::attach(&model, methods::build(name, settings.as_object().unwrap()).unwrap(), 3).unwrap();
        tiny::move_all(&adapter);
        assert_eq!(gated_by(&model, &adapter).unwrap(), (of, count), "{name}");
        // Routers that see nothing.
        for p in adapter.named().iter().filter(|p| p.role == Role::Router && !p.name.ends_with("bias")) {
            p.var.set(&p.var.zeros_like().unwrap()).unwrap();
        }
        let found = over(&model, &adapter, &rows);
        assert_eq!((found.of, found.count, found.rows), (of, count, 14), "{name}");
        let modules = if of == Gated::Experts { 6 } else { 14 };
        assert_eq!(found.modules.len(), modules, "{name}");
        let same = fixed(&model, &adapter, FixedGates::Means(&found), &rows);
        let d = distance(&same, &logits(&model, &Attached::one(&adapter), &rows));
        assert!(d < 1e-10, "{name} {settings}: {d:e}");
        let numbers = vec![0.5; count];
        let given = to_lora_with_gates(&model, &adapter, FixedGates::Experts(&numbers), "tiny");
        assert_eq!(given.is_ok(), of == Gated::Experts, "{name}");
    }
    // What is chosen by the token counts as often as it is chosen.
    let settings = json!({ "r": 6, "top_k": 2 });
    let adapter =
        Adapter::attach(&model, methods::build("flylora", settings.as_object().unwrap()).unwrap(), 3).unwrap();
    tiny::move_all(&adapter);
    let found = over(&model, &adapter, &rows);
    for own in &found.modules {
        assert_eq!(own.mean, own.used, "{}", own.name);
        assert!((own.mean.iter().sum::<f64>() - 2.0).abs() < 1e-12, "{}", own.name);
    }
    // No gates, no means; nor of no tokens.
    let plain = expert(&model, &experts(&model, 1)[0]);
    assert!(Gates::over(&model, &plain, [&[1u32, 2][..]]).unwrap_err().to_string().contains("the same to every token"));
    assert!(Gates::over(&model, &adapter, []).unwrap_err().to_string().contains("no token"));
}

/// `inspect --text` and `convert --gates` as a user sees them.
#[test]
fn gates_on_the_command_line() {
    let f = common::Fixture::new();
    let (a, b, mixed) = (f.path("a"), f.path("b"), f.path("mixed"));
    common::ok(&f.train(&a, &["-q", "--max-steps", "6", "--rank", "2"]));
    common::ok(
        &f.train(&b, &["-q", "--max-steps", "6", "--rank", "3", "--seed", "1", "--target-modules", "q_proj,down_proj"]),
    );
    let own = [
        "--method",
        "xlora",
        "--adapter",
        &a,
        "--adapter",
        &b,
        "--set",
        "layerwise_scalings=true",
        "--set",
        "init=peft",
    ];
    common::ok(&f.train(&mixed, &[&own[..], &["-q", "--max-steps", "5"]].concat()));
    let base = ["--model", f.model.as_str()];

    let told = common::json(&[&["inspect", &mixed, "--text", "up 3", "--text", "down"], &base[..]].concat());
    let gates = &told["gates"];
    assert_eq!((&gates["of"], &gates["count"]), (&json!("experts"), &json!(2)));
    let lists = ["modules", "layers", "projections"].map(|key| gates[key].as_array().unwrap().clone());
    assert_eq!(lists.each_ref().map(Vec::len), [14, 2, 7]);
    for own in lists.iter().flatten() {
        let sum: f64 = own["mean"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{own}");
    }
    assert_eq!(lists[1][1]["name"], "1");
    let shown = common::ok(&[&["inspect", &mixed, "--text", "up 3"], &base[..]].concat());
    assert!(
        shown.contains("expert 1") && shown.contains("down_proj") && shown.contains("gates of 2 experts"),
        "{shown}"
    );
    // Without a text nothing is new, and the base's flags are refused.
    assert!(common::json(&["inspect", &mixed]).get("gates").is_none());
    let alone = common::run(&["inspect", &mixed, "--model", &f.model]);
    assert!(!alone.status.success() && common::text(&alone.stderr).contains("--text"));
    assert!(common::error(&[&["inspect", &a, "--text", "up"], &base[..]].concat()).contains("the same to every token"));

    let convert = |output: &str, more: &[&str]| {
        let how = ["convert", &mixed, "--to", "lora", "--output", output];
        [&how[..], &base[..], more].concat().into_iter().map(str::to_string).collect::<Vec<_>>()
    };
    let call = |flags: Vec<String>| common::json(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let (mean, uniform, numbers) = (f.path("mean"), f.path("uniform"), f.path("numbers"));
    let told = call(convert(&mean, &["--gates", "mean", "--data", &f.data]));
    let eval = |adapter: &str| {
        common::json(&["eval", "--model", &f.model, "--data", &f.data, "--adapter", adapter])["loss"].as_f64().unwrap()
    };
    for (key, folder) in [("adapter", &mixed), ("fixed", &mean)] {
        assert!((told["loss"][key].as_f64().unwrap() - eval(folder)).abs() < 1e-6, "{told}");
    }
    assert_eq!((&told["modules"], &told["exact"], &told["rank"]), (&json!(14), &json!(14), &json!(5)));
    common::ok(&["check", &mean, "--model", &f.model]);
    let manifest = StoredAdapter::read(Path::new(&mean)).unwrap().manifest.unwrap();
    assert_eq!(manifest.training["gates"]["mean"]["rows"], 24);
    assert_eq!(manifest.training["parts"].as_array().unwrap().len(), 2);
    // Numbers are those of `merge --method cat`, and uniform ones are numbers.
    let told = call(convert(&uniform, &["--gates", "uniform"]));
    assert_eq!((&told["gates"], &told["loss"]), (&json!([0.5, 0.5]), &Value::Null));
    call(convert(&numbers, &["--gates", "0.5,0.5"]));
    let cat = f.path("cat");
    common::ok(&["merge", &a, &b, "--method", "cat", "--weights", "0.5,0.5", "--output", &cat]);
    let change = |folder: &str| {
        let lora = StoredAdapter::read(Path::new(folder)).unwrap();
        lorimer::adapter::file::convert::low_ranks(&lora).unwrap()
    };
    let (expected, found) = (change(&cat), change(&uniform));
    assert!(expected.keys().eq(found.keys()));
    for (path, low) in &found {
        assert!(distance(&low.weight().unwrap(), &expected[path].weight().unwrap()) < 1e-6, "{path}");
    }
    let files = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(files(&uniform) == files(&numbers));

    let (out, fly) = (f.path("out"), f.path("fly"));
    for (more, says) in [
        (vec!["--gates", "mean"], "give them with --data"),
        (vec!["--gates", "1,2,3"], "3 gates are given, the adapter has 2 experts"),
        (vec!["--gates", "0,0"], "all gates are 0"),
        (vec!["--gates", "uniform", "--rank", "2"], "--method svd"),
        (vec![], "--gates writes it with fixed gates"),
    ] {
        let flags = convert(&out, &more);
        let told = common::error(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(told.contains(says) && !Path::new(&out).exists(), "{more:?}: {told}");
    }
    let peft = common::error(&["convert", &mixed, "--to", "kohya", "--gates", "uniform", "--output", &out]);
    assert!(peft.contains("--gates is for --to lora") && !Path::new(&out).exists(), "{peft}");
    let plain =
        common::error(&[&["convert", &a, "--to", "lora", "--gates", "uniform", "--output", &out], &base[..]].concat());
    assert!(plain.contains("the same to every token") && !Path::new(&out).exists(), "{plain}");
    common::ok(&f.train(&fly, &["-q", "--method", "flylora", "--rank", "4", "--set", "top_k=2", "--max-steps", "3"]));
    let of_ranks = common::error(
        &[&["convert", &fly, "--to", "lora", "--gates", "uniform", "--output", &out], &base[..]].concat(),
    );
    assert!(of_ranks.contains("those of its ranks") && !Path::new(&out).exists(), "{of_ranks}");
    let told = common::json(
        &[&["convert", &fly, "--to", "lora", "--gates", "mean", "--data", &f.data, "--output", &out], &base[..]]
            .concat(),
    );
    assert_eq!(told["gates"]["of"], "ranks");
    let shown = common::ok(&[&["inspect", &fly, "--text", "up 3"], &base[..]].concat());
    assert!(shown.contains("gates of 4 ranks") && shown.contains("most used"), "{shown}");
}
