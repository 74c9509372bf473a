//! Many clients and one adapter.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use lorimer::adapter::{Adapter, Attached, StoredAdapter, methods};
use lorimer::model::{Base, Batch, OpenOptions};
use lorimer::train::federate::Aggregate;
use lorimer::train::federate::privacy::Privacy;
use lorimer::train::federate::simulate::{Client, Entry, Federation, Told};
use lorimer::train::run::beneath::Beneath;
use lorimer::train::{Event, Example, TrainSettings};
use serde_json::{Map, json};

use crate::common::{Fixture, error, goldens, json as run_json};

fn base() -> Base {
    Base::open(&goldens("tiny-llama"), &OpenOptions::default()).unwrap()
}

fn rows(from: u32, count: u32) -> Vec<Example> {
    let row = |k: u32| {
        let tokens: Vec<u32> = (0..9 + k % 4).map(|i| 3 + (from * 31 + k * 7 + i * i) % 200).collect();
        Example { supervised: vec![true; tokens.len()], tokens, answer: None }
    };
    (0..count).map(row).collect()
}

fn client(k: u32, rank: usize, count: u32) -> Client {
    let method =
        json!({ "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"] });
    Client { name: format!("client_{k}"), rows: rows(k, count), method: method.as_object().unwrap().clone() }
}

struct Set<'a> {
    base: &'a Base,
    clients: &'a [Client],
    output: &'a Path,
}

impl Set<'_> {
    /// Runs a federation; stopped after so many steps of all clients together.
    fn run(
        &self,
        change: impl FnOnce(&mut Federation<'_>),
        stop_after: Option<usize>,
    ) -> Result<Option<Vec<Entry>>, String> {
        let stop = AtomicBool::new(false);
        let mut federation = Federation {
            base: self.base,
            base_name: "tiny",
            clients: self.clients,
            eval: &[],
            settings: TrainSettings {
                max_steps: Some(2),
                batch_size: 3,
                learning_rate: 1e-2,
                seed: 5,
                ..Default::default()
            },
            rounds: 2,
            fraction: 1.0,
            aggregate: Aggregate::Stack,
            energy: None,
            privacy: None,
            output: self.output.to_path_buf(),
            resume: false,
            stop: &stop,
        };
        change(&mut federation);
        let mut steps = 0;
        let found = federation.run(|told| {
            if let Told::Training(Event::Step { .. }) = told {
                steps += 1;
                stop.fetch_or(stop_after == Some(steps), Ordering::Relaxed);
            }
        });
        found.map_err(|e| e.to_string())
    }
}

fn logits(base: &Base, adapters: Vec<(&Adapter, f64)>) -> Vec<f32> {
    let tokens: Vec<u32> = (5..40).collect();
    let batch = Batch::pack([tokens.as_slice()]);
    let attached = Attached::weighted(adapters).unwrap();
    let hidden: Tensor = base.model().hidden(&batch, &attached).unwrap();
    base.model().logits(&hidden, &attached).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn most_apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Unequal ranks over two rounds: the global adapter is the clients' weighted sum to rounding and the stack of the rounds, shares are of the rows, and the
/// ledger's bytes are those of the factors. To be seen to fail: shares of clients, not of rows.
#[test]
fn a_stack_is_the_weighted_sum_of_its_clients_over_rounds() {
    let (base, folder) = (base(), tempfile::tempdir().unwrap());
    let clients = [client(0, 4, 12), client(1, 2, 6), client(2, 1, 6)];
    let set = Set { base: &base, clients: &clients, output: &folder.path().join("run") };
    let ledger = set.run(|_| {}, None).unwrap().unwrap();
    let load = |path: &str| {
        Adapter::load_whole(base.model(), &StoredAdapter::read(&folder.path().join("run").join(path)).unwrap()).unwrap()
    };
    let global = load("global");
    let parts: Vec<(Adapter, f64)> = (1..3)
        .flat_map(|round| (0..3).map(move |k| (round, k)))
        .map(|(round, k)| (load(&format!("round_{round}/client_{k}")), [0.5, 0.25, 0.25][k]))
        .collect();
    let whole = logits(&base, vec![(&global, 1.0)]);
    assert!(most_apart(&whole, &logits(&base, parts.iter().map(|(a, w)| (a, *w)).collect())) < 1e-4);
    assert!(most_apart(&whole, &logits(&base, vec![(&load("round_1/global"), 1.0)])) > 1e-3);
    let updates = [load("round_1/update"), load("round_2/update")];
    assert!(most_apart(&whole, &logits(&base, updates.iter().map(|a| (a, 1.0)).collect())) < 1e-4);
    // Every round's factors: q_proj and v_proj of each layer, inputs and outputs times the rank.
    let sides: usize = base
        .model()
        .projections()
        .iter()
        .filter(|(site, _)| ["q_proj", "v_proj"].contains(&site.role.as_str()))
        .map(|(_, p)| p.weight.dims().unwrap())
        .map(|(outputs, inputs)| outputs + inputs)
        .sum();
    for (entry, round) in ledger.iter().zip(1..) {
        assert_eq!((entry.round, entry.rank, entry.down_bytes), (round, 7 * round, 4 * 7 * sides));
        let up: Vec<usize> = entry.clients.iter().map(|c| c.up_bytes).collect();
        assert_eq!(up, [4, 2, 1].map(|rank| 4 * rank * sides));
        assert_eq!(entry.clients.iter().map(|c| c.weight).collect::<Vec<_>>(), [0.5, 0.25, 0.25]);
        assert!(entry.error.unwrap() < 1e-6);
    }
    // Clients of the second round trained on top of the first.
    let second = StoredAdapter::read(&folder.path().join("run/round_2/client_0")).unwrap().manifest.unwrap();
    assert_eq!(second.training["beneath"][0]["weight"], 1.0);
}

/// Stopped anywhere, a federation goes on to the same bytes; with other settings it does not go on.
#[test]
fn an_interrupted_federation_goes_on_to_the_same_bytes() {
    let (base, folder) = (base(), tempfile::tempdir().unwrap());
    let clients = [client(0, 3, 9), client(1, 2, 7)];
    let bytes = |name: &str| std::fs::read(folder.path().join(name).join("global/adapter_model.safetensors")).unwrap();
    let set = |name: &str| folder.path().join(name);
    let whole = set("whole");
    let ledger = Set { base: &base, clients: &clients, output: &whole }.run(|_| {}, None).unwrap();
    for stop_after in [1, 2, 5, 7] {
        let output = set(&format!("parts-{stop_after}"));
        let parts = Set { base: &base, clients: &clients, output: &output };
        assert_eq!(parts.run(|_| {}, Some(stop_after)), Ok(None));
        let again = parts.run(|_| {}, None).unwrap_err();
        assert!(again.contains("already holds a federation"), "{again}");
        let other = parts.run(|f| (f.resume, f.rounds) = (true, 3), None).unwrap_err();
        assert!(other.contains("begun with other settings"), "{other}");
        assert_eq!(parts.run(|f| f.resume = true, None).unwrap(), ledger, "{stop_after}");
        assert_eq!(bytes("whole"), bytes(&format!("parts-{stop_after}")));
    }
}

/// Clients of FedIT go on from the mean of their factors; of one client every way is that client's adapter.
#[test]
fn fedavg_carries_its_adapter_and_one_client_is_itself() {
    let (base, folder) = (base(), tempfile::tempdir().unwrap());
    let two = [client(0, 2, 6), client(1, 2, 6)];
    let output = folder.path().join("two");
    let set = Set { base: &base, clients: &two, output: &output };
    set.run(|f| f.aggregate = Aggregate::Fedavg, None).unwrap().unwrap();
    let stored = |path: &str| StoredAdapter::read(&output.join(path)).unwrap();
    let (global, parts) = (stored("round_1/global"), [stored("round_1/client_0"), stored("round_1/client_1")]);
    for (name, mean) in &global.tensors {
        let sum = ((&parts[0].tensors[name] + &parts[1].tensors[name]).unwrap() / 2.0).unwrap();
        let apart = (mean - sum).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart < 1e-6, "{name}: {apart}");
    }
    assert_eq!(stored("round_2/client_0").config["r"], 2);
    let unequal = [client(0, 2, 6), client(1, 3, 6)];
    let refused = Set { base: &base, clients: &unequal, output: &folder.path().join("x") };
    assert!(refused.run(|f| f.aggregate = Aggregate::Fedavg, None).unwrap_err().contains("one rank"));
    let one = [client(0, 2, 6)];
    for aggregate in [Aggregate::Stack, Aggregate::Fedavg, Aggregate::ZeroPad] {
        let output = folder.path().join(format!("{aggregate:?}"));
        let set = Set { base: &base, clients: &one, output: &output };
        set.run(|f| (f.aggregate, f.rounds) = (aggregate, 1), None).unwrap();
        let load =
            |path: &str| Adapter::load_whole(base.model(), &StoredAdapter::read(&output.join(path)).unwrap()).unwrap();
        let (own, global) = (load("round_1/client_0"), load("global"));
        assert!(
            most_apart(&logits(&base, vec![(&own, 1.0)]), &logits(&base, vec![(&global, 1.0)])) < 1e-5,
            "{aggregate:?}"
        );
    }
}

/// The global adapter may be cut to what carries its energy, some clients may stay out of a round, and what is sent may be clipped and have noise.
#[test]
fn rounds_may_be_cut_partial_and_private() {
    let (base, folder) = (base(), tempfile::tempdir().unwrap());
    let clients = [client(0, 3, 6), client(1, 2, 6), client(2, 2, 6)];
    let run = |name: &str, change: &dyn Fn(&mut Federation<'_>)| {
        let output = folder.path().join(name);
        Set { base: &base, clients: &clients, output: &output }.run(change, None).unwrap().unwrap()
    };
    let cut = run("cut", &|f| f.energy = Some(0.8));
    assert!(cut[1].rank < 14, "{}", cut[1].rank);
    let some = run("some", &|f| f.fraction = 0.5);
    assert!(some.iter().all(|entry| entry.clients.len() == 2));
    assert!(some.iter().all(|entry| (entry.clients.iter().map(|c| c.weight).sum::<f64>() - 1.0).abs() < 1e-12));
    let open = run("open", &|_| {});
    let private = run("private", &|f| f.privacy = Some(Privacy { clip: 0.5, noise: 0.01 }));
    assert_ne!(open[0].clients[0].content_id, private[0].clients[0].content_id);
    assert!(folder.path().join("private/round_1/client_0/upload/adapter_config.json").is_file());
}

/// What is trained on top of another adapter is the change beyond it, and the adapter beneath stays as it was.
#[test]
fn training_on_top_leaves_what_is_beneath() {
    let (base, f) = (base(), Fixture::new());
    let (below, top) = (f.path("below"), f.path("top"));
    run_json(&f.train(&below, &["--max-steps", "8"]));
    let before = std::fs::read(Path::new(&below).join("adapter_model.safetensors")).unwrap();
    let alone = run_json(&f.train(&f.path("alone"), &["--max-steps", "1"]))["losses"][0].as_f64().unwrap();
    let first = run_json(&f.train(&top, &["--max-steps", "8", "--beneath", &below]))["losses"][0].as_f64().unwrap();
    // A fresh adapter changes nothing, so that the first loss is that of what is beneath.
    assert!(first < alone - 0.1, "{first} {alone}");
    assert_eq!(std::fs::read(Path::new(&below).join("adapter_model.safetensors")).unwrap(), before);
    let both = format!("--adapter={below}");
    let loss = |more: &[&str]| {
        let mut all = vec!["eval", "--model", &f.model, "--data", &f.data];
        all.extend_from_slice(more);
        run_json(&all)["loss"].as_f64().unwrap()
    };
    assert!(loss(&["--adapter", &top, &both]) < loss(&[&both]) - 0.01);
    let other = error(&f.train(&f.path("dylora"), &["--method", "dylora", "--beneath", &below]));
    assert!(other.contains("not trained on top of another adapter"), "{other}");
    let half = Beneath::read(&base, Path::new(&below), 0.5).unwrap();
    assert_eq!(half.weight, 0.5);
    assert!(methods::build("lora", &Map::new()).is_ok());
}

/// The command: a file shared out, the result as JSON, refusals.
#[test]
fn the_command_shares_a_file_out() {
    let f = Fixture::new();
    let out = f.path("federation");
    let common = [
        "federate",
        "simulate",
        "--model",
        &f.model,
        "--data",
        &f.data,
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--least-rows",
        "2",
    ];
    let with = |more: &[&str]| [&common[..], more].concat().into_iter().map(str::to_string).collect::<Vec<_>>();
    let all = with(&[
        "--clients",
        "3",
        "--split",
        "dirichlet:0.5",
        "--ranks",
        "4,2",
        "--rounds",
        "2",
        "--eval-data",
        &f.data,
        "--clip",
        "1",
        "--noise",
        "8",
        "-o",
        &out,
    ]);
    let result = run_json(&all.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(result["rounds"].as_array().unwrap().len(), 2);
    assert!(result["epsilon"].as_f64().unwrap() > 0.1 && result["rounds"][1]["loss"].as_f64().unwrap() > 0.0);
    assert!(result["up_bytes"].as_u64().unwrap() > 0 && Path::new(&out).join("ledger.jsonl").is_file());
    let refused = |more: &[&str]| error(&with(more).iter().map(String::as_str).collect::<Vec<_>>());
    assert!(refused(&["-o", &f.path("x")]).contains("--clients says"));
    assert!(refused(&["--clients", "20", "--least-rows", "8", "-o", &f.path("x")]).contains("too few"));
    assert!(refused(&["--clients", "2", "--clip", "1", "-o", &f.path("x")]).contains("--noise"));
    assert!(
        refused(&["--clients", "3", "--ranks", "4,2", "--aggregate", "fedavg", "-o", &f.path("x")])
            .contains("one rank")
    );
}
