//! What the ways to train promise: corrected gradients, sampled ranks, gates, searches, regularisers, sparse switching.

mod galore;
mod objectives;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::algebra::resize::resize;
use lorimer_adapter::algebra::switch::{Entries, Switcher};
use lorimer_adapter::methods::ba_lora::{self, BaLora, BaLoraTask, Regularisers};
use lorimer_adapter::methods::galore::{Galore, GaloreOptimizer, GaloreProjection};
use lorimer_adapter::methods::lora_pro::{self, LoraPro, LoraProOptimizer, Pair};
use lorimer_adapter::methods::sora::Update;
use lorimer_adapter::step::SampledRank;
use lorimer_adapter::training::callback::Idle;
use lorimer_adapter::training::{AdamW, AdamWConfig, Callback, Moment, Objective, Optimizer, ParamGroup, RunShape};
use lorimer_model::weights::LoadDtype;
use lorimer_tensor::Gradients;
use lorimer_train::run::schedule::Shape;
use lorimer_train::run::step::{StepInputs, StepOptions, accumulate, accumulate_gradients, batch_loss};
use lorimer_train::run::trainer::{Run, TrainSettings};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::prelude::*;
use crate::tiny::*;

fn goldens(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

fn norm(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// Loss and gradients of a step over the examples, by parameter name.
fn gradients(model: &dyn BaseModel, adapter: &Adapter, step: Step) -> (f64, BTreeMap<String, Tensor>) {
    let (rows, parameters, mut sums) = (examples(), adapter.trainable(), Gradients::default());
    let rows: Vec<&Example> = rows.iter().collect();
    let attached = Attached::one(adapter).at(step);
    let options = StepOptions::default();
    let found = accumulate_gradients(model, &attached, &parameters, &rows, 0.1, options, None, &mut sums).unwrap();
    let all = parameters.iter().filter_map(|(name, var)| Some((name.clone(), sums.remove(var.as_tensor())?)));
    (found.sum, all.collect())
}

fn step(model: &dyn BaseModel, adapter: &Adapter, optimizer: &mut dyn Optimizer, rate: f64) -> f64 {
    let (loss, mut found) = gradients(model, adapter, Step::default());
    let parameters = adapter.trainable();
    let gradients: Vec<_> = parameters.iter().map(|(name, _)| found.remove(name)).collect();
    let named = adapter.named();
    let shape = RunShape { seed: 0, steps: 1, peak: rate };
    let callback = adapter.method.training().callback;
    let callback = callback.map_or_else(|| Box::new(Idle) as Box<dyn Callback>, |kind| kind.build(shape, &named));
    let how = |name: &str| {
        let parameter = named.iter().find(|p| p.name == name).unwrap();
        Ok(ParamGroup { row_scale: callback.row_scale(parameter.role, parameter.var)?, ..Default::default() })
    };
    optimizer.step_with(&parameters, &gradients, &how, rate).unwrap();
    loss
}

/// ‖g̃ − G‖ at every step of a run, G from the whole weight's gradient at the merged point.
#[test]
fn lora_pros_step_is_nearer_to_the_full_gradient_than_loras() {
    let model = model();
    for full in [false, true] {
        let adapter = attach(&model, "lora", r#"{"r": 3}"#);
        let whole = attach(&model, "full", "{}");
        let pairs: Vec<Pair> =
            adapter.deltas().map(|(path, _)| Pair { module: path.to_string(), scaling: 2.0 }).collect();
        let settings = LoraPro { full, ..Default::default() };
        let mut optimizer = LoraProOptimizer::new(settings, AdamWConfig::default(), pairs.clone());
        let mut losses = Vec::new();
        for i in 0..40 {
            for (site, base, delta) in adapter.sites(&model) {
                let (_, var) = whole.delta(&site.path).unwrap().trainable()[0];
                var.set(&delta.merged(base).unwrap().unwrap()).unwrap();
            }
            let (_, plain) = gradients(&model, &adapter, Step::default());
            let (_, true_gradients) = gradients(&model, &whole, Step::default());
            for pair in &pairs {
                let at = |key: &str| format!("{}.{key}", pair.module);
                let parameters: BTreeMap<String, &Var> = adapter.trainable().into_iter().collect();
                let (a, b) = (parameters[&at("lora_A")].as_tensor(), parameters[&at("lora_B")].as_tensor());
                let (ga, gb) = (&plain[&at("lora_A")], &plain[&at("lora_B")]);
                let g = &true_gradients[&at("full_weight")];
                let s = pair.scaling;
                let (ha, hb) = lora_pro::corrected((a, b), (ga, gb), s, 1e-8, true).unwrap();
                let far =
                    |ga: &Tensor, gb: &Tensor| norm(&(lora_pro::equivalent((a, b), (ga, gb), s).unwrap() - g).unwrap());
                assert!(far(&ha, &hb) < far(ga, gb), "{} at step {i}", pair.module);
            }
            losses.push(step(&model, &adapter, &mut optimizer, 5e-3));
        }
        assert!(losses[39] < 0.7 * losses[0], "{losses:?}");
    }
}

#[test]
fn allora_scales_gradients_and_leaves_zero_sooner() {
    let model = model();
    let (lora, allora) =
        (attach(&model, "lora", r#"{"r": 3, "lora_alpha": 3}"#), attach(&model, "allora", r#"{"r": 3}"#));
    assert!(distance(&logits(&model, &Attached::one(&lora)), &logits(&model, &Attached::one(&allora))) == 0.0);
    let (_, plain) = gradients(&model, &lora, Step::default());
    let (_, scaled) = gradients(&model, &allora, Step::default());
    // At B = 0 every factor is η = 2.
    for (name, g) in plain.iter().filter(|(name, _)| name.ends_with("lora_B")) {
        assert!(distance(&scaled[name], &(g * 2.0).unwrap()) < 1e-12, "{name}");
    }
    let (mut grown, mut last) = (Vec::new(), Vec::new());
    for adapter in [&lora, &allora] {
        let mut optimizer = AdamW::new(AdamWConfig::default(), false);
        let losses: Vec<f64> = (0..20).map(|_| step(&model, adapter, &mut optimizer, 1e-3)).collect();
        let b = adapter.trainable().into_iter().filter(|(name, _)| name.ends_with("lora_B"));
        grown.push(b.map(|(_, v)| norm(v.as_tensor()).powi(2)).sum::<f64>().sqrt());
        last.push(losses[19]);
    }
    assert!(grown[1] > 1.5 * grown[0] && last[1] < last[0], "{grown:?} {last:?}");
    let stored = allora.to_stored("tiny").unwrap();
    assert_eq!((&stored.config["peft_type"], &stored.config["lora_alpha"]), (&"LORA".into(), &3.into()));
}

#[test]
fn a_sampled_rank_is_the_lora_of_its_slices() {
    let model = model();
    for (rank, scaling) in (1..=4).flat_map(|rank| [(rank, "fixed"), (rank, "rank")]) {
        let settings = format!(r#"{{"r": 4, "lora_alpha": 6, "scaling": "{scaling}"}}"#);
        let adapter = attach(&model, "dylora", &settings);
        move_all(&adapter);
        let stored = adapter.to_stored("tiny").unwrap();
        let at = Step { training: None, rank: Some(SampledRank { rank, frozen: false }) };
        let mut cut = stored.clone();
        // As a file that dylora wrote.
        cut.manifest = Some(
            serde_json::from_value(serde_json::json!({
                "format": 1, "content_id": "", "method": "dylora", "lorimer": "", "base": null, "chat_template": null,
                "training": {"method_settings": {"scaling": scaling}}, "golden": [], "frozen": {},
            }))
            .unwrap(),
        );
        let cut = resize(&cut, rank).unwrap();
        let lora = Adapter::load_whole(&model, &cut).unwrap();
        let expected = logits(&model, &Attached::one(&lora));
        assert!(distance(&logits(&model, &Attached::one(&adapter).at(at)), &expected) < 1e-12, "rank {rank}");
        for (name, t) in &cut.tensors {
            let axis = if name.ends_with("lora_A.weight") { 0 } else { 1 };
            assert_eq!(distance(t, &stored.tensors[name].narrow(axis, 0, rank).unwrap()), 0.0);
        }
        // Rows above learn nothing; frozen, only the last row does.
        for frozen in [false, true] {
            let (_, found) =
                gradients(&model, &adapter, Step { training: Some(1), rank: Some(SampledRank { rank, frozen }) });
            for (name, g) in found {
                let rows: Vec<f64> = (0..4).map(|i| norm(&g.get(i).unwrap())).collect();
                let learns = |i: usize| if frozen { i + 1 == rank } else { i < rank };
                assert!((0..4).all(|i| (rows[i] > 0.0) == learns(i)), "{name} at {rank}, frozen {frozen}: {rows:?}");
            }
        }
    }
    let stored = attach(&model, "dylora", r#"{"r": 4}"#).to_stored("tiny").unwrap();
    assert!(resize(&stored, 5).is_err() && resize(&stored, 0).is_err());
}

/// Rows that a step does not touch keep values, moments and counts.
#[test]
fn untouched_rows_are_not_stepped() {
    let var = Var::from_tensor(&Tensor::ones((3, 2), DType::F64, &Device::Cpu).unwrap()).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig { weight_decay: 0.1, ..Default::default() }, false);
    let g = Tensor::ones((3, 2), DType::F64, &Device::Cpu).unwrap();
    let mut rows = vec![vec![1.0, 1.0]; 3];
    for (i, range) in [0..3, 0..1, 0..2, 2..3].into_iter().enumerate() {
        let how = |_: &str| Ok(ParamGroup { rows: Some(range.clone()), ..Default::default() });
        optimizer.step_with(&[("x".into(), &var)], &[Some(g.clone())], &how, 0.1).unwrap();
        let now = var.to_vec2::<f64>().unwrap();
        for row in 0..3 {
            assert_eq!(now[row] != rows[row], range.contains(&row), "step {i}, row {row}");
        }
        rows = now;
    }
    let state: BTreeMap<String, Tensor> = optimizer.state().unwrap().into_iter().collect();
    assert_eq!(state["x.step"].to_vec1::<i64>().unwrap(), [3, 2, 2]);
    // A row that was stepped twice is where AdamW of its own would be after two steps.
    let own = Var::from_tensor(&Tensor::ones((1, 2), DType::F64, &Device::Cpu).unwrap()).unwrap();
    let mut alone = AdamW::new(AdamWConfig { weight_decay: 0.1, ..Default::default() }, false);
    for _ in 0..2 {
        alone.step(&[("x".into(), &own)], &[Some(g.narrow(0, 0, 1).unwrap())], 0.1).unwrap();
    }
    assert_eq!(own.to_vec2::<f64>().unwrap()[0], rows[1]);
}

#[test]
fn closed_gates_leave_the_file_and_nothing_else_changes() {
    let model = model();
    for settings in [r#"{"r": 4}"#, r#"{"r": 4, "use_rslora": true}"#] {
        let adapter = attach(&model, "sora", settings);
        move_all(&adapter);
        for (i, (_, var)) in adapter.trainable().into_iter().filter(|(name, _)| name.ends_with(".gate")).enumerate() {
            // One module loses all its ranks.
            let xi = if i == 3 { 100.0 } else { 0.6 };
            let gates: Vec<f64> = var.to_vec1::<f64>().unwrap().into_iter().map(|g| Update::Soft.of(g, xi)).collect();
            var.set(&Tensor::from_slice(&gates, gates.len(), &Device::Cpu).unwrap()).unwrap();
        }
        let stored = adapter.to_stored("tiny").unwrap();
        assert_eq!(lorimer_adapter::file::load::account_of(&stored).unwrap().1.modules.len(), 13);
        let pattern = stored.config["rank_pattern"].as_object().unwrap();
        assert!(!pattern.is_empty());
        let lora = Adapter::load_whole(&model, &stored).unwrap();
        assert!(lora.parameter_count() < adapter.parameter_count());
        let d = distance(&logits(&model, &Attached::one(&lora)), &logits(&model, &Attached::one(&adapter)));
        assert!(d < 1e-10, "{d:e}");
    }
}

/// `compare` counts a run as bad by this kind of error, whatever ran away.
#[test]
fn a_gradient_that_is_no_number_is_told_as_divergence() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gradients = [Some(Tensor::new(&[1.0, bad], &Device::Cpu).unwrap())];
        let told = lorimer_train::run::optimize::clip(&mut gradients, 1.0);
        assert!(matches!(told, Err(lorimer_train::Error::Diverged(_))), "{told:?}");
    }
}

#[test]
fn ten_thousand_switches_leave_the_base_as_it_was() {
    let mut model = model_as(DType::F32, LoadDtype::F32);
    let bytes = |model: &dyn BaseModel| -> Vec<u32> {
        let all = model.projections().into_iter().map(|(_, p)| p.dense(DType::F32).unwrap());
        all.flat_map(|w| w.flatten_all().unwrap().to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
    };
    let before = bytes(&model);
    let mut adapters = Vec::new();
    for (i, settings) in
        ["r\": 2", "r\": 3", "density\": 0.3, \"mask_type\": \"struct", "density\": 0.2, \"mask_type\": \"wm"]
            .iter()
            .enumerate()
    {
        let settings = format!("{{\"{settings}{}}}", if i < 2 { "" } else { "\"" });
        let adapter = attach(&model, "shira", &settings);
        move_all(&adapter);
        adapters.push(adapter);
    }
    let entries: Vec<Entries> = adapters.iter().map(|a| Entries::of(&model, a).unwrap()).collect();
    let expected: Vec<Vec<f32>> = adapters
        .iter()
        .map(|a| logits(&model, &Attached::one(a)).flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .collect();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut switcher = Switcher::new(&mut model);
    for round in 0..10_000 {
        let to = rng.random_range(0..entries.len());
        switcher.switch(&entries[to]).unwrap();
        if round % 500 == 0 {
            let found = logits(switcher.model(), &Frozen).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let apart = found.iter().zip(&expected[to]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{apart}");
        }
    }
    switcher.clear().unwrap();
    assert!(before == bytes(switcher.model()));
    // Two at once; without the first, what is left is the second alone, bit for bit.
    switcher.switch(&entries[1]).unwrap();
    let alone = bytes(switcher.model());
    switcher.switch(&entries[0]).unwrap();
    switcher.add(&entries[1], 1.0).unwrap();
    assert!(alone != bytes(switcher.model()));
    switcher.switch(&entries[1]).unwrap();
    assert!(alone == bytes(switcher.model()));
    drop(switcher);
    assert!(before == bytes(&model), "the base is handed back as it was");
    let overlap = entries[0].overlap(&entries[0]);
    assert_eq!((overlap.shared, overlap.share), (entries[0].len(), 1.0));
    let parts: Vec<Entries> = (0..2)
        .map(|part| {
            let adapter =
                attach(&model, "shira", &format!(r#"{{"r": 2, "random_seed": 1, "part": {part}, "parts": 2}}"#));
            move_all(&adapter);
            Entries::of(&model, &adapter).unwrap()
        })
        .collect();
    assert_eq!(parts[0].overlap(&parts[1]).shared, 0);
    // What is not sparse is refused.
    assert!(Entries::of(&model, &attach(&model, "lora", r#"{"r": 2}"#)).is_err());
    let rows = examples();
    batch_loss(&model, &Attached::one(&adapters[0]), &rows.iter().collect::<Vec<_>>()).unwrap();
}
