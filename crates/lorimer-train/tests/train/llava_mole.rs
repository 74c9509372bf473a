//! LLaVA-MoLE: the golden numbers (tests/goldens/make_llava_mole.py, held against the authors' code), and what its card asks of routes and balance.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::file::convert::low_ranks;
use lorimer_adapter::file::export::to_lora;
use lorimer_adapter::{LowRank, RouteMeter, RouteTotals, UnitRoute};
use lorimer_model::weights::Weights;
use lorimer_model::{Decoder, KvCache};
use lorimer_tensor::{Gradients, Ops, Tape};
use lorimer_train::run::step::{StepInputs, StepLoss, StepOptions, accumulate, batch_loss};

use crate::prelude::*;
use crate::support::{self, Golden, folder};
use crate::tiny::{attach, distance, examples, logits, model, move_all};

fn largest(t: &Tensor) -> f64 {
    distance(&t.to_dtype(DType::F64).unwrap(), &t.zeros_like().unwrap().to_dtype(DType::F64).unwrap())
}

/// Loss, totals and gradients by name of one step over some rows: (Σ −log p)/supervised + weight · the mean balance.
fn step(
    model: &dyn BaseModel,
    adapter: &Adapter,
    rows: &[&Example],
    (weight, checkpointing): (f64, bool),
) -> (StepLoss, RouteTotals, BTreeMap<String, Tensor>) {
    let (parameters, mut gradients, mut totals) = (adapter.trainable(), Gradients::default(), RouteTotals::default());
    let supervised: usize = rows.iter().map(|e| e.targets().count()).sum();
    let inputs = StepInputs { routes: Some((&mut totals, weight / rows.len() as f64)), ..Default::default() };
    let options = StepOptions { checkpointing, ..Default::default() };
    let on = Attached::one(adapter).at(Step::training(4));
    let scale = 1.0 / supervised as f64;
    let loss = accumulate(model, &on, &parameters, rows, scale, options, inputs, &mut gradients).unwrap();
    let found = parameters.iter().map(|(name, var)| (name.clone(), gradients.remove(var).expect("a gradient")));
    (loss, totals, found.collect())
}

/// A tiny model that computes in f64: gradients through the smallest heads lose half of f32's digits.
fn precise(name: &str) -> Decoder {
    let (config, _) = lorimer_model::base::open_weights(&folder(name), LoadDtype::F32).unwrap();
    let all = candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let all = all.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F64).unwrap())).collect();
    let weights = Weights::from_memory(all).kept_as(LoadDtype::Stored);
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

fn golden_adapter(model: &dyn BaseModel, routing: &str) -> Adapter {
    let mut stored = StoredAdapter::read(&folder("llava_mole")).unwrap();
    stored.config.insert("routing".into(), routing.into());
    Adapter::load_whole(model, &stored).unwrap()
}

/// Logits, loss, balance, p and every gradient of all three routings, computed whole and layer by layer.
#[test]
fn it_is_the_goldens() {
    let (model, golden) = (precise("tiny-llama"), Golden::open("llava_mole"));
    let lengths = golden.get("lengths").to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let all = golden.tokens();
    let rows: Vec<Vec<u32>> = all.iter().zip(&lengths).map(|(t, &n)| t[..n as usize].to_vec()).collect();
    let examples: Vec<Example> =
        rows.iter().map(|t| Example { tokens: t.clone(), supervised: vec![true; t.len()], answer: None }).collect();
    let examples: Vec<&Example> = examples.iter().collect();
    let weight = f64::from(golden.get("weight").to_scalar::<f32>().unwrap());
    for routing in ["top1", "top1-st", "dense"] {
        let adapter = golden_adapter(&model, routing);
        let number = |key: &str| golden.get(&format!("{routing}.{key}")).to_scalar::<f32>().unwrap() as f64;
        let found = support::logits(&model, &Attached::one(&adapter), &rows);
        let expected: Vec<Tensor> = lengths
            .iter()
            .enumerate()
            .map(|(i, &n)| golden.get(&format!("{routing}.logits")).get(i).unwrap().narrow(0, 0, n as usize).unwrap())
            .collect();
        let d = support::distance(&found, &Tensor::cat(&expected, 0).unwrap());
        assert!(d < 1e-5, "{routing}: logits differ by {d:e}");
        for checkpointing in [false, true] {
            let (loss, totals, gradients) = step(&model, &adapter, &examples, (weight, checkpointing));
            assert!((loss.sum / loss.supervised as f64 - number("loss")).abs() < 1e-6, "{routing}");
            let balance = totals.balance / totals.samples as f64;
            assert!((balance - number("balance")).abs() < 1e-6, "{routing}: {balance}");
            for (name, g) in gradients {
                let key = match name.contains("router") {
                    true => format!("{routing}.grad.base_model.model.{name}"),
                    false => format!("{routing}.grad.base_model.model.{name}.weight"),
                };
                let expected = golden.get(&key);
                let d = support::distance(&g, &expected);
                assert!(d < 1e-5 * (1.0 + largest(&expected)), "{routing} {checkpointing} {name}: {d:e}");
            }
        }
    }
    // The golden batch, padded to another length there, is packed here without padding.
    let padded = f64::from(golden.get("padded.balance").to_scalar::<f32>().unwrap());
    let (_, totals, _) = step(&model, &golden_adapter(&model, "top1"), &examples, (weight, false));
    assert!((totals.balance / totals.samples as f64 - padded).abs() < 1e-6);
}

/// Where gate and up are one projection, or norms stand around the unit: one expert is LoRA in values and gradients, equal experts need no router, and a
/// cache gives the whole forward.
#[test]
fn units_of_other_families_are_routed_alike() {
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    for (name, projections) in [("tiny-phi3", 2), ("tiny-gemma2", 3), ("tiny-gemma3", 3)] {
        let model = precise(name);
        let one = attach(&model, "llava-mole", r#"{"r": 3, "lora_alpha": 6, "experts": 1, "lora_dropout": 0.0}"#);
        let lora = attach(&model, "lora", r#"{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}"#);
        move_all(&one);
        for ((_, from), (_, to)) in one.trainable().into_iter().zip(lora.trainable()) {
            to.set(from.as_tensor()).unwrap();
        }
        let (a, b) = (Attached::one(&one), Attached::one(&lora));
        assert!(distance(&logits(&model, &a), &logits(&model, &b)) < 1e-12, "{name}");
        let of = |on: &Attached<'_>, adapter: &Adapter| -> Vec<Tensor> {
            let (loss, ..) = batch_loss(&model, on, &rows).unwrap();
            let found = loss.backward().unwrap();
            adapter.trainable().iter().map(|(_, var)| found.get(var).unwrap().clone()).collect()
        };
        for (ours, expected) in of(&a, &one).iter().zip(of(&b, &lora)) {
            assert!(distance(ours, &expected) < 1e-10 * (1.0 + largest(&expected)), "{name}");
        }
        for routing in ["top1", "top1-st", "dense"] {
            let settings = format!(r#"{{"r": 3, "experts": 3, "lora_dropout": 0.0, "routing": "{routing}"}}"#);
            let adapter = attach(&model, "llava-mole", &settings);
            move_all(&adapter);
            // Every projection of a unit has its three experts, and each unit one router.
            let layers = model.shape().layers.len();
            assert_eq!(experts_of(&adapter, "lora_A").len(), layers * 3 * projections, "{name}");
            let routers = adapter.trainable().iter().filter(|(name, _)| name.ends_with("router.weight")).count();
            assert_eq!(routers, layers, "{name}");
            // One route a block: whole and layer by layer it gives the same balance and gradients, which are autograd's.
            let (_, totals, whole) = step(&model, &adapter, &rows, (1.0, false));
            let (_, same, layered) = step(&model, &adapter, &rows, (1.0, true));
            assert_eq!(totals, same, "{name} {routing}");
            for (key, g) in &whole {
                assert!(distance(g, &layered[key]) < 1e-10 * (1.0 + largest(g)), "{name} {routing} {key}");
            }
            let tokens: Vec<u32> = (0..30).map(|i| (i * 7 + i * i) % 40).collect();
            let on = Attached::one(&adapter);
            let all = support::logits(&model, &on, std::slice::from_ref(&tokens));
            let mut cache = KvCache::default();
            for span in [0..11, 11..12, 12..30] {
                let hidden = model.hidden_cached(&tokens[span.clone()], &mut cache, &on).unwrap();
                let found = model.logits(&hidden, &on).unwrap();
                assert!(distance(&found, &all.narrow(0, span.start, span.len()).unwrap()) < 1e-10, "{name} {routing}");
            }
            for end in ["lora_A", "lora_B"] {
                let all: BTreeMap<String, &Var> = experts_of(&adapter, end).into_iter().collect();
                for (name, var) in &all {
                    let first = name.split("experts.").next().unwrap();
                    var.set(&all[&format!("{first}experts.0.{end}")].copy().unwrap().detach()).unwrap();
                }
            }
            let before = logits(&model, &Attached::one(&adapter));
            for (_, var) in adapter.trainable().into_iter().filter(|(name, _)| name.contains("router")) {
                let turned = (var.as_tensor() * -2.0).unwrap().detach();
                var.set(&turned).unwrap();
            }
            assert!(distance(&before, &logits(&model, &Attached::one(&adapter))) < 1e-10, "{name} {routing}");
        }
    }
}

/// With one expert: logits, gradients, the merged weight and the exported LoRA are LoRA's, and there is no router.
#[test]
fn with_one_expert_it_is_lora() {
    let model = model();
    let one = attach(&model, "llava-mole", r#"{"r": 3, "lora_alpha": 6, "experts": 1, "lora_dropout": 0.0}"#);
    let lora = attach(&model, "lora", r#"{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}"#);
    assert!(one.blocks().next().is_none());
    move_all(&one);
    for ((_, from), (_, to)) in one.trainable().into_iter().zip(lora.trainable()) {
        to.set(from.as_tensor()).unwrap();
    }
    let (a, b) = (Attached::one(&one), Attached::one(&lora));
    assert_eq!(distance(&logits(&model, &a), &logits(&model, &b)), 0.0);
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let of = |on: &Attached<'_>, adapter: &Adapter| -> Vec<Tensor> {
        let (loss, ..) = batch_loss(&model, on, &rows).unwrap();
        let found = loss.backward().unwrap();
        adapter.trainable().iter().map(|(_, var)| found.get(var).unwrap().clone()).collect()
    };
    assert!(of(&a, &one).iter().zip(of(&b, &lora)).all(|(a, b)| distance(a, &b) < 1e-12));
    let stored = one.to_stored("tiny").unwrap();
    assert!(stored.tensors.contains_key("base_model.model.model.layers.0.mlp.up_proj.experts.0.lora_A.weight"));
    let (exported, _) = to_lora(&model, &one, None, "tiny").unwrap();
    let again = Adapter::load_whole(&model, &exported).unwrap();
    assert!(distance(&logits(&model, &Attached::one(&again)), &logits(&model, &a)) < 1e-12);
    assert_eq!(low_ranks(&stored).unwrap().len(), 14);
}

fn experts_of<'a>(adapter: &'a Adapter, end: &str) -> Vec<(String, &'a Var)> {
    adapter.trainable().into_iter().filter(|(name, _)| name.contains("experts") && name.ends_with(end)).collect()
}

/// Where all experts are the same, R changes nothing, and they are the one LoRA, under dropout too; where they differ it does.
#[test]
fn equal_experts_need_no_router() {
    let model = model();
    for routing in ["top1", "top1-st", "dense"] {
        let adapter = attach(
            &model,
            "llava-mole",
            &format!(r#"{{"r": 3, "experts": 3, "lora_dropout": 0.3, "routing": "{routing}"}}"#),
        );
        move_all(&adapter);
        let turn = |adapter: &Adapter| {
            let before = logits(&model, &Attached::one(adapter));
            for (_, var) in adapter.trainable().into_iter().filter(|(name, _)| name.contains("router")) {
                let turned = (var.as_tensor() * -2.0).unwrap().detach();
                var.set(&turned).unwrap();
            }
            distance(&before, &logits(&model, &Attached::one(adapter)))
        };
        assert!(turn(&adapter) > 1e-4, "{routing}");
        for end in ["lora_A", "lora_B"] {
            let all: BTreeMap<String, &Var> = experts_of(&adapter, end).into_iter().collect();
            for (name, var) in &all {
                let first = name.split("experts.").next().unwrap();
                var.set(&all[&format!("{first}experts.0.{end}")].copy().unwrap().detach()).unwrap();
            }
        }
        assert!(turn(&adapter) < 1e-12, "{routing}");
        let one = attach(&model, "llava-mole", r#"{"r": 3, "experts": 1, "lora_dropout": 0.3}"#);
        let all: BTreeMap<String, &Var> = adapter.trainable().into_iter().collect();
        one.trainable().into_iter().for_each(|(name, var)| var.set(&all[&name].copy().unwrap().detach()).unwrap());
        for step in [Step::default(), Step::training(5)] {
            let of = |adapter: &Adapter| logits(&model, &Attached::one(adapter).at(step));
            assert!(distance(&of(&adapter), &of(&one)) < 1e-12, "{routing}");
        }
    }
}

/// The language loss gives R no gradient with top1, and one with the others; with one p of nearly 1 dense is top1.
#[test]
fn what_the_router_learns_from() {
    let model = model();
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let of = |routing: &str, weight: f64| {
        let adapter = attach(&model, "llava-mole", &format!(r#"{{"r": 3, "experts": 3, "routing": "{routing}"}}"#));
        move_all(&adapter);
        let (_, totals, gradients) = step(&model, &adapter, &rows, (weight, false));
        let router = gradients.iter().filter(|(name, _)| name.contains("router"));
        (adapter, totals, router.map(|(_, g)| largest(g)).fold(0.0, f64::max))
    };
    assert_eq!(of("top1", 0.0).2, 0.0);
    assert!(of("top1", 1.0).2 > 1e-6 && of("top1-st", 0.0).2 > 1e-6 && of("dense", 0.0).2 > 1e-6);
    let (top, dense) = (of("top1", 0.0).0, of("dense", 0.0).0);
    assert!(distance(&logits(&model, &Attached::one(&top)), &logits(&model, &Attached::one(&dense))) > 1e-3);
    for adapter in [&top, &dense] {
        for (_, var) in adapter.trainable().into_iter().filter(|(name, _)| name.ends_with("router.bias")) {
            var.set(&Tensor::new(&[0f64, 50.0, 0.0], &Device::Cpu).unwrap()).unwrap();
        }
    }
    assert!(distance(&logits(&model, &Attached::one(&top)), &logits(&model, &Attached::one(&dense))) < 1e-5);
    // Nobody goes to the other experts: their gradients are zeros, the one's are not.
    let (_, totals, gradients) = step(&model, &top, &rows, (1.0, true));
    assert_eq!(totals.shares(), BTreeMap::from([(0, vec![0.0, 1.0, 0.0]), (1, vec![0.0, 1.0, 0.0])]));
    for (name, g) in gradients.iter().filter(|(name, _)| name.contains("experts")) {
        assert_eq!(largest(g) == 0.0, !name.contains("experts.1."), "{name}");
    }
    assert!(gradients.values().all(|g| !largest(g).is_nan()));
}

/// The grouped product is the loop over experts, in values and gradients, on a tape and without; an expert may have no row.
#[test]
fn groups_are_a_loop_over_experts() {
    let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(1);
    let mut random = |shape: &[usize]| Var::from_tensor(&crate::tiny::random(shape, 1.0, &mut rng)).unwrap();
    let (x, p) = (random(&[7, 5]), random(&[7, 4]));
    let pairs: Vec<(Var, Var)> = (0..4).map(|_| (random(&[2, 5]), random(&[6, 2]))).collect();
    let upstream = random(&[7, 6]).detach();
    let chosen = vec![3, 0, 3, 1, 1, 3, 0];
    let low = |(a, b): &(Var, Var)| LowRank { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scaling: 1.5 };
    let experts: Vec<LowRank> = pairs.iter().map(low).collect();
    let leaves: Vec<&Var> = pairs.iter().flat_map(|(a, b)| [a, b]).chain([&x, &p]).collect();
    for (factors, all) in [(false, false), (true, false), (true, true)] {
        let mut sum = upstream.zeros_like().unwrap();
        for (e, low) in experts.iter().enumerate() {
            let mask: Vec<f64> = chosen.iter().map(|&c| if all || c == e as u32 { 1.0 } else { 0.0 }).collect();
            let mut mask = Tensor::from_vec(mask, (7, 1), &Device::Cpu).unwrap();
            if factors {
                mask = (mask * p.narrow(1, e, 1).unwrap()).unwrap();
            }
            sum = (sum + low.apply(&x).unwrap().broadcast_mul(&mask).unwrap()).unwrap();
        }
        let expected = (&sum * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let route = match all {
            true => UnitRoute::All(p.as_tensor().clone()),
            false => {
                UnitRoute::One { chosen: chosen.clone(), factors: factors.then(|| p.as_tensor().clone()), experts: 4 }
            }
        };
        let plain = route.change(Ops::plain(), &x, &experts).unwrap();
        assert!(distance(&plain, &sum) < 1e-12);
        let found = (&plain * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let tape = Tape::new(leaves.iter().map(|v| v.as_tensor()));
        let taped = route.change(Ops::recorded(&tape), &x, &experts).unwrap();
        assert!(distance(&taped, &sum) < 1e-12);
        let mut gradients = Gradients::default();
        tape.backward(&taped, upstream.clone(), &mut gradients).unwrap();
        for leaf in &leaves {
            let zero = leaf.zeros_like().unwrap();
            let expected = expected.get(leaf).unwrap_or(&zero);
            assert!(distance(found.get(leaf).unwrap_or(&zero), expected) < 1e-12);
            assert!(distance(gradients.get(leaf).unwrap_or(&zero), expected) < 1e-12);
        }
    }
    let route = UnitRoute::One { chosen, factors: None, experts: 3 };
    assert!(route.change(Ops::plain(), &x, &experts).unwrap_err().to_string().contains("4 experts"));
}

/// Uniform p and choices have a balance of 1/E, all on one expert one of its p; a sample's balance does not depend on what is beside it, nor on
/// the layers being computed again; blocks are taken together.
#[test]
fn balance_is_that_of_each_sample() {
    let of = |shares: &[&[[f64; 2]]], samples: Vec<Vec<u32>>| {
        let meter = RouteMeter::new(samples, 1.0);
        for (layer, p) in shares.iter().enumerate() {
            meter.note(layer, &Tensor::from_vec(p.concat(), (p.len(), 2), &Device::Cpu).unwrap());
        }
        let mut totals = RouteTotals::default();
        meter.add_to(&mut totals).unwrap();
        let graph = meter.balance().unwrap().unwrap().to_scalar::<f64>().unwrap();
        assert!((graph - totals.balance).abs() < 1e-12);
        totals
    };
    let (up, down) = ([0.6, 0.4], [0.4, 0.6]);
    assert!((of(&[&[up, down]], vec![vec![0, 1]]).balance - 0.5).abs() < 1e-12);
    assert!((of(&[&[up, up]], vec![vec![0, 1]]).balance - 0.6).abs() < 1e-12);
    // Each block sends all to one expert, and together they look even; the shares by block tell.
    let collapsed = of(&[&[up, up], &[down, down]], vec![vec![0, 1]]);
    assert!((collapsed.balance - 0.5).abs() < 1e-12);
    assert_eq!(collapsed.shares(), BTreeMap::from([(0, vec![1.0, 0.0]), (1, vec![0.0, 1.0])]));
    // Equal p go to the lowest expert.
    assert_eq!(of(&[&[[0.5, 0.5]]], vec![vec![0]]).chosen[&0], [1, 0]);
    assert!((of(&[&[up, down, up]], vec![vec![0, 2], vec![1]]).balance - 1.2).abs() < 1e-12);

    let model = model();
    let rows = examples();
    let adapter = attach(&model, "llava-mole", r#"{"r": 3, "experts": 3, "lora_dropout": 0.0}"#);
    move_all(&adapter);
    let alone: f64 = rows.iter().map(|row| step(&model, &adapter, &[row], (1.0, false)).1.balance).sum();
    let rows: Vec<&Example> = rows.iter().collect();
    let (loss, totals, whole) = step(&model, &adapter, &rows, (1.0, false));
    assert!((totals.balance - alone).abs() < 1e-12 && totals.samples == 3);
    assert_eq!(totals.chosen[&0].iter().sum::<u64>(), 14);
    let (again, same, layered) = step(&model, &adapter, &rows, (1.0, true));
    assert!(same == totals && (loss.sum - again.sum).abs() < 1e-12);
    // Autograd over both losses is the oracle of both ways.
    let meter = RouteMeter::new(Batch::pack(rows.iter().map(|e| e.tokens.as_slice())).rows, 1.0);
    let on = Attached::one(&adapter).at(Step::training(4));
    let (sum, supervised, _) = batch_loss(&model, &on.watched(&meter), &rows).unwrap();
    let all = ((sum / supervised as f64).unwrap() + (meter.balance().unwrap().unwrap() / 3.0).unwrap()).unwrap();
    let found = all.backward().unwrap();
    for (name, var) in adapter.trainable() {
        let zero = var.zeros_like().unwrap();
        let expected = found.get(var).unwrap_or(&zero);
        assert!(distance(&whole[&name], expected) < 1e-10, "{name}");
        assert!(distance(&layered[&name], expected) < 1e-10, "{name}");
    }
}

/// A sequence computed in parts over a cache, and in pieces of one token, is the whole forward.
#[test]
fn decoding_with_a_cache_is_the_whole_forward() {
    let model = model();
    let tokens: Vec<u32> = (0..30).map(|i| (i * 7 + i * i) % 40).collect();
    for routing in ["top1", "dense"] {
        let adapter = attach(&model, "llava-mole", &format!(r#"{{"r": 3, "routing": "{routing}"}}"#));
        move_all(&adapter);
        let on = Attached::one(&adapter);
        let whole = support::logits(&model, &on, std::slice::from_ref(&tokens));
        let mut cache = KvCache::default();
        for span in [0..11, 11..12, 12..13, 13..30] {
            let hidden = model.hidden_cached(&tokens[span.clone()], &mut cache, &on).unwrap();
            let found = model.logits(&hidden, &on).unwrap();
            assert!(distance(&found, &whole.narrow(0, span.start, span.len()).unwrap()) < 1e-12, "{routing}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let build = |settings: serde_json::Value| methods::build("llava-mole", settings.as_object().unwrap());
    for (settings, says) in [
        (serde_json::json!({ "r": 0 }), "r = 0"),
        (serde_json::json!({ "experts": 0 }), "experts"),
        (serde_json::json!({ "experts": 33 }), "experts"),
        (serde_json::json!({ "balance": -1 }), "balance"),
        (serde_json::json!({ "routing": "top2" }), "top2"),
        (serde_json::json!({ "lora_dropout": 1 }), "lora_dropout"),
        (serde_json::json!({ "lora_alpha": "x" }), "llava-mole"),
        (serde_json::json!({ "vision_tower": "clip" }), "vision_tower"),
    ] {
        let problem = build(settings.clone()).err().expect("refused").to_string();
        assert!(problem.contains(says) && !problem.contains('\n'), "{settings}: {problem}");
    }
    let model = model();
    let attention = build(serde_json::json!({ "target_modules": ["q_proj"] })).unwrap();
    let problem = Adapter::attach(&model, attention, 0).err().expect("refused").to_string();
    assert!(problem.contains("it is `lora`"), "{problem}");
    let adapter = attach(&model, "llava-mole", r#"{"r": 2}"#);
    move_all(&adapter);
    let stored = adapter.to_stored("tiny").unwrap();
    let says = |problem: String, what: &str| {
        assert!(problem.contains("llava-mole") && problem.contains(what) && !problem.contains('\n'), "{problem}");
    };
    says(to_lora(&model, &adapter, None, "tiny").expect_err("refused").to_string(), "a router sends each token");
    says(low_ranks(&stored).expect_err("refused").to_string(), "converted");
    let out = tempfile::tempdir().unwrap().path().join("m");
    let merged = merge_to_folder(&folder("tiny-llama"), &[(stored.clone(), 1.0)], &out, LoadDtype::F32, |_| {});
    says(merged.expect_err("refused").to_string(), "merged");
    assert!(!out.exists());
    says(Attached::weighted(vec![(&adapter, 0.5)]).err().expect("refused").to_string(), "weight 1");
    // The attention's part alone has a plain weight.
    let sites = adapter.sites(&model);
    for (site, base, delta) in sites {
        assert_eq!(delta.merged(base).unwrap().is_ok(), site.path.contains("attn"), "{}", site.path);
    }
    let fails = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut other = stored.clone();
        change(&mut other.tensors);
        Adapter::load_whole(&model, &other).err().expect("refused").to_string()
    };
    let name = |rest: &str| format!("base_model.model.model.layers.0.mlp.{rest}");
    let missing = fails(&|t| drop(t.remove(&name("router.bias"))));
    assert!(missing.contains("router.bias` is missing"), "{missing}");
    let block = fails(&|t| t.retain(|key, _| !key.contains("layers.0.mlp.router")));
    assert!(block.contains("no tensors") && block.contains("layers.0.mlp.router"), "{block}");
    let expert = fails(&|t| drop(t.remove(&name("down_proj.experts.2.lora_B.weight"))));
    assert!(expert.contains("experts.2.lora_B.weight` is missing"), "{expert}");
    let more = fails(&|t| {
        let own = t[&name("down_proj.experts.2.lora_B.weight")].clone();
        t.insert(name("down_proj.experts.3.lora_B.weight"), own);
    });
    assert!(more.contains("experts.3"), "{more}");
    let shape =
        fails(&|t| drop(t.insert(name("router.weight"), Tensor::zeros((2, 16), DType::F64, &Device::Cpu).unwrap())));
    assert!(shape.contains("[2, 16]"), "{shape}");
}
