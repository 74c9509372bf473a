//! The search for projections that deserve an adapter.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::prelude::*;
use crate::tiny::*;

/// The base with a random change of rank 2 in some projections, each so large that alone it moves the output by the same divergence.
fn plant(model: &dyn BaseModel, planted: &[String], rng: &mut ChaCha8Rng) -> Adapter {
    let teacher = attach(model, "lora", r#"{"r": 2, "lora_alpha": 2}"#);
    let rows: Vec<Vec<u32>> = (0..64).map(|_| (0..12).map(|_| rng.random_range(0..40)).collect()).collect();
    let batch = Batch::pack(rows.iter().map(Vec::as_slice));
    let logits =
        |adaptation: &dyn Adaptation| model.logits(&model.hidden(&batch, adaptation).unwrap(), adaptation).unwrap();
    let base = logits(&Frozen);
    let starts: BTreeMap<String, Tensor> =
        teacher.trainable().into_iter().map(|(n, v)| (n, random(v.dims(), 1.0, rng))).collect();
    let put = |path: &str, size: f64| {
        for (name, var) in teacher.trainable().into_iter().filter(|(name, _)| name.starts_with(path)) {
            let size = if name.ends_with("lora_B") { size } else { 1.0 };
            var.set(&(&starts[&name] * size).unwrap()).unwrap();
        }
    };
    teacher.deltas().for_each(|(path, _)| put(path, 0.0));
    let mut sizes = Vec::new();
    for path in planted {
        let (mut low, mut high) = (0.0, 64.0);
        for _ in 0..30 {
            let middle = 0.5 * (low + high);
            put(path, middle);
            let moved =
                lorimer_adapter::methods::ba_lora::divergence(&base, &logits(&Attached::one(&teacher))).unwrap();
            if moved.to_scalar::<f64>().unwrap() < 0.3 { low = middle } else { high = middle }
        }
        put(path, 0.0);
        sizes.push((path, low));
    }
    sizes.into_iter().for_each(|(path, size)| put(path, size));
    teacher
}

/// Rows that a model wrote, all of them a token at a time.
fn written(model: &dyn BaseModel, teacher: &Adapter, rng: &mut ChaCha8Rng) -> Vec<Example> {
    let attached = Attached::one(teacher);
    let mut written: Vec<Vec<u32>> = (0..1024).map(|_| vec![rng.random_range(0..40)]).collect();
    for _ in 1..12 {
        let batch = Batch::pack(written.iter().map(Vec::as_slice));
        let all = model.logits(&model.hidden(&batch, &attached).unwrap(), &attached).unwrap().to_vec2::<f64>().unwrap();
        let ends: Vec<usize> = written
            .iter()
            .scan(0, |end, row| {
                *end += row.len();
                Some(*end - 1)
            })
            .collect();
        for (row, end) in written.iter_mut().zip(ends) {
            let odds: Vec<f64> = all[end].iter().map(|z| z.exp()).collect();
            let mut left = rng.random_range(0.0..odds.iter().sum::<f64>());
            let next = odds.iter().position(|o| {
                left -= o;
                left < 0.0
            });
            row.push(next.unwrap_or(0) as u32);
        }
    }
    let supervised = |row: &Vec<u32>| (0..row.len()).map(|i| i > 0).collect();
    written.into_iter().map(|tokens| Example { supervised: supervised(&tokens), tokens, answer: None }).collect()
}

/// A teacher is the base with low-rank changes in two projections of each layer, any of the seven; the search sees rows that the teacher wrote,
/// and should keep those in the half that it chooses. What a search finds that looks at nothing is measured too: the choice for
/// one teacher against what was planted in another. (A search that always leaves out the projections that hardly count does no better than that,
/// however often it is right.) The defaults find hardly more than chance.
#[test]
fn the_search_finds_planted_projections() {
    use lorimer_adapter::methods::diffora::{DifforaConfig, Sharing};
    use lorimer_train::calibrate::search::SearchRows;
    let model = model_with_attention(2.0);
    let paths: Vec<String> = model.projections().into_iter().map(|(site, _)| site.path.clone()).collect();
    let long = DifforaConfig {
        search_steps: 150,
        search_lr: 0.02,
        search_r: 2,
        sharing: Sharing::None,
        search_batch_size: 32,
        ..Default::default()
    };
    let mut found = Vec::new();
    for seed in 0..12 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let planted: Vec<String> = (0..2)
            .flat_map(|layer| {
                let own = format!(".layers.{layer}.");
                let here: Vec<&String> = paths.iter().filter(|p| p.contains(&own)).collect();
                assert_eq!(here.len(), 7);
                let two = rand::seq::index::sample(&mut rng, here.len(), 2);
                two.into_iter().map(|i| here[i].clone()).collect::<Vec<_>>()
            })
            .collect();
        let teacher = plant(&model, &planted, &mut rng);
        let rows = written(&model, &teacher, &mut rng);
        let rows: Vec<&Example> = rows.iter().collect();
        let choose = |search: &DifforaConfig| -> Vec<String> {
            let method = methods::build("diffora", serde_json::json!({ "r": 4 }).as_object().unwrap()).unwrap();
            let find = methods::parts::search("diffora").unwrap();
            let look = || {
                find(
                    &SearchRows { model: &model, rows: &rows },
                    method.targeting(),
                    &serde_json::json!(search),
                    &mut |_, _| {},
                )
                .unwrap()
            };
            let stats = look();
            if seed == 0 {
                let again = look();
                for (path, found) in &stats {
                    assert_eq!(distance(&found["gamma"], &again[path]["gamma"]), 0.0);
                }
            }
            let adapter = Adapter::attach_calibrated(&model, method, &stats, 1).unwrap();
            let chosen: Vec<String> = adapter.deltas().map(|(path, _)| path.to_string()).collect();
            // ⌈7/2⌉ of each layer.
            assert_eq!(chosen.len(), 8);
            chosen
        };
        let chosen = [choose(&long), choose(&DifforaConfig::default())];
        found.push((planted, chosen));
    }
    for (which, name, least, more) in [(0, "a long search", 0.8, 0.25), (1, "the defaults", 0.6, 0.05)] {
        let share = |planted: &[String], chosen: &[String]| {
            planted.iter().filter(|p| chosen.contains(p)).count() as f64 / planted.len() as f64
        };
        let own = found.iter().map(|(planted, chosen)| share(planted, &chosen[which])).sum::<f64>() / 12.0;
        let others = (0..12).flat_map(|i| (0..12).filter(move |j| *j != i).map(move |j| (i, j)));
        let chance = others.map(|(i, j)| share(&found[j].0, &found[i].1[which])).sum::<f64>() / (12.0 * 11.0);
        println!("{name}: {own:.3} of what was planted is in the chosen half, by chance {chance:.3}");
        assert!(own >= least && own - chance > more, "{name}: {own} by chance {chance}");
    }
}
