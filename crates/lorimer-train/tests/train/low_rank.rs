//! Low-rank gradients of attention (`--attention-grad lowrank`): in a step and in a run they are the exact ones within what is told, and where they would
//! not be, exact ones take their place.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lorimer_tensor::{GradientTotals, Gradients};
use lorimer_train::run::attention::{AttentionGradient, LowRankSettings};
use lorimer_train::run::log::Record;
use lorimer_train::run::schedule::Shape;
use lorimer_train::run::step::{StepInputs, StepOptions, accumulate};
use lorimer_train::run::trainer::Run;

use crate::prelude::*;
use crate::support;
use crate::tiny::{attach, distance, model_with_attention, move_all};

const SETTINGS: LowRankSettings = LowRankSettings { degree: 10, tolerance: 0.05, tile: 4, check_steps: 4 };

/// How large the weights of attention are for scores of up to about 1, in place of 6.
const SMALL: f64 = 0.25;

/// Rows of up to 30 tokens, of which two begin alike.
fn rows() -> Vec<Example> {
    let row = |n: u32, factor: u32| {
        let tokens: Vec<u32> = (0..n).map(|i| if i < 6 { i + 1 } else { (i * factor + 3) % 40 }).collect();
        Example {
            supervised: tokens.iter().enumerate().map(|(i, t)| i > 2 && t % 3 != 0).collect(),
            tokens,
            answer: None,
        }
    };
    vec![row(30, 7), row(19, 11), row(26, 3), row(3, 1)]
}

fn lora(model: &dyn BaseModel) -> Adapter {
    let adapter = attach(model, "lora", r#"{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}"#);
    move_all(&adapter);
    adapter
}

/// Gradients by name of one step, and what was counted.
fn step(
    model: &dyn BaseModel,
    adapter: &Adapter,
    low_rank: Option<LowRankSettings>,
    options: StepOptions,
) -> (BTreeMap<String, Tensor>, GradientTotals) {
    let (rows, parameters, mut sums) = (rows(), adapter.trainable(), Gradients::default());
    let rows: Vec<&Example> = rows.iter().collect();
    let how = low_rank.unwrap_or(SETTINGS).at_step(0, 5);
    let attached = Attached::one(adapter);
    let on = if low_rank.is_some() { attached.with_low_rank_attention(&how) } else { attached.clone() };
    accumulate(model, &on, &parameters, &rows, 0.1, options, StepInputs::default(), &mut sums).unwrap();
    let all = parameters.iter().map(|(name, var)| (name.clone(), sums.remove(var.as_tensor()).unwrap()));
    (all.collect(), how.meter.totals())
}

/// The largest difference of an entry over the largest entry, of all parameters.
fn relative(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> f64 {
    let of = |(name, a): (&String, &Tensor)| distance(a, &b[name]) / distance(&b[name], &b[name].zeros_like().unwrap());
    a.iter().map(of).fold(0.0, f64::max)
}

/// A step's gradients are near the exact ones, nearer with the degree, in every way to take a step; layers that are computed again change no bit.
#[test]
fn a_step_has_the_exact_gradients_within_what_is_told() {
    let model = model_with_attention(SMALL);
    let adapter = lora(&model);
    let (exact, counted) = step(&model, &adapter, None, StepOptions::default());
    assert_eq!(counted, GradientTotals::default());
    let mut before = f64::INFINITY;
    for degree in [1, 2, 4, 10] {
        let own = LowRankSettings { degree, tolerance: 0.999, ..SETTINGS };
        let (found, totals) = step(&model, &adapter, Some(own), StepOptions::default());
        let off = relative(&found, &exact);
        assert!(totals.low_rank > 0, "degree {degree}: {totals:?}");
        if totals.low_rank == totals.heads {
            let told = totals.checked.unwrap();
            assert!(off < 0.5 * before && told.share_of_bound <= 1.0, "degree {degree}: {off:e} after {before:e}");
            before = off;
        }
        for (share_prefixes, checkpointing) in [(true, true), (false, false), (false, true)] {
            let options = StepOptions { share_prefixes, checkpointing, ..Default::default() };
            let (again, counted) = step(&model, &adapter, Some(own), options);
            match share_prefixes {
                true => assert!(found.iter().all(|(name, g)| distance(g, &again[name]) == 0.0) && counted == totals),
                // Other segments have other means of keys and other groups within the tolerance.
                false => assert!(relative(&again, &exact) < 0.2),
            }
        }
    }
    assert!(before < 1e-5, "{before:e}");
}

/// With scores beyond the tolerance everywhere, a step is the exact one to the bit.
#[test]
fn a_step_beyond_the_tolerance_is_exact() {
    let model = model_with_attention(8.0);
    let adapter = lora(&model);
    let (exact, _) = step(&model, &adapter, None, StepOptions::default());
    let (found, totals) = step(&model, &adapter, Some(SETTINGS), StepOptions::default());
    assert!(totals.heads > 0 && totals.low_rank == 0 && totals.checked.is_none(), "{totals:?}");
    assert!(found.iter().all(|(name, g)| distance(g, &exact[name]) == 0.0));
}

/// Losses and log of a run of 12 steps, or why there is none; and whether a log was begun.
fn run(model: &dyn BaseModel, rows: &[Example], how: AttentionGradient) -> (Result<Vec<Record>, String>, bool) {
    let adapter = attach(model, "lora", r#"{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}"#);
    let settings = TrainSettings {
        learning_rate: 2e-2,
        max_steps: Some(12),
        batch_size: 2,
        gradient_accumulation: 2,
        schedule: Shape::Constant,
        attention_gradient: how,
        ..Default::default()
    };
    let text = TextModel::from_folder(&support::folder("tiny-llama")).unwrap();
    let (folder, stop) = (tempfile::tempdir().unwrap(), Default::default());
    let run = Run {
        model,
        text: &text,
        base_name: "tiny",
        adapter: &adapter,
        beneath: &[],
        train: rows,
        eval: &[],
        choices: &[],
        settings: &settings,
        identity: serde_json::Value::Null,
        folder: folder.path(),
        save_steps: None,
        save_limit: 1,
        resume: false,
        stop: &stop,
    };
    let found = run.train(|_| {}).map(|outcome| outcome.history).map_err(|e| e.to_string());
    (found, folder.path().join("log.jsonl").exists())
}

/// The loss of every step is within 1e-3 of that with exact gradients, though not equal, and the log tells shares, bounds, and errors at checked steps.
#[test]
fn a_run_has_the_exact_run_s_losses_within_a_thousandth() {
    let (model, rows) = (model_with_attention(SMALL), rows());
    let exact = run(&model, &rows, AttentionGradient::Exact).0.unwrap();
    let own = LowRankSettings { degree: 2, tolerance: 0.9, ..SETTINGS };
    let found = run(&model, &rows, AttentionGradient::LowRank(own)).0.unwrap();
    let losses = |all: &[Record]| all.iter().map(|r| r.loss.unwrap()).collect::<Vec<f64>>();
    let (exact_losses, losses) = (losses(&exact), losses(&found));
    assert!(exact_losses[11] < 0.9 * exact_losses[0], "{exact_losses:?}");
    let off = exact_losses.iter().zip(&losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-3 && off > 1e-9, "{off:e}");
    assert!(exact.iter().all(|r| r.low_rank_heads.is_none() && r.low_rank_error.is_none()));
    // Scores grow as it learns, and heads go over to exact gradients.
    assert!(found[0].low_rank_heads > found[11].low_rank_heads && found[0].low_rank_score < found[11].low_rank_score);
    for (i, record) in found.iter().enumerate() {
        assert!(record.low_rank_heads.is_some_and(|share| share > 0.1), "{record:?}");
        assert!(record.low_rank_score.is_some_and(|tau| tau > 0.0));
        let (error, bound) = (record.low_rank_error, record.low_rank_bound);
        assert_eq!((error.is_some(), bound.is_some()), (i % 4 == 0, i % 4 == 0), "step {}", i + 1);
        assert!(error.is_none_or(|e| e > 0.0 && e < 0.1) && bound.is_none_or(|b| b > 0.0 && b <= 1.0), "{record:?}");
    }
}

/// A run that would have exact gradients only is refused before its log is begun.
#[test]
fn a_run_with_nothing_to_approximate_is_refused() {
    let (model, rows) = (model_with_attention(SMALL), rows());
    let refused = |how: LowRankSettings| match run(&model, &rows, AttentionGradient::LowRank(how)) {
        (Err(said), false) => said,
        (found, log) => panic!("{found:?}, with a log: {log}"),
    };
    let said = refused(LowRankSettings { tile: 64, ..SETTINGS });
    assert!(said.contains("more than a tile of 64 tokens"), "{said}");
    let said = refused(LowRankSettings { degree: 0, tolerance: 1e-3, ..SETTINGS });
    assert!(said.contains("raise degree or tolerance"), "{said}");
    let said = refused(LowRankSettings { degree: 64, ..SETTINGS });
    assert!(said.contains("smaller degree or tile"), "{said}");
}
