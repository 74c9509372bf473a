//! What the authors' code of the ways to train computes (tests/goldens/make_training.py).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor, Var};
use lorimer::adapter::methods::sora::{Rise, SoraConfig};
use lorimer::adapter::training::{Control, SoftThreshold, Update};
use lorimer::prelude::*;
use lorimer::train::calibrate::{Data, calibrate};
use lorimer::train::control;
use lorimer::train::objective::{self, Moment};
use lorimer::train::optimizer::{AdamW, AdamWConfig, Optimizer};
use lorimer::train::schedule::{Schedule, Shape};
use lorimer::train::step::batch_loss;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

/// A golden file.
struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    fn open(name: &str) -> Self {
        let path = folder("training").join(format!("{name}.safetensors"));
        Self(candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap().into_iter().collect())
    }
    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("golden `{name}`"))
    }
    fn number(&self, name: &str) -> f64 {
        self.get(name).to_dtype(DType::F64).unwrap().to_scalar().unwrap()
    }
    fn numbers(&self, name: &str) -> Vec<f64> {
        self.get(name).to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

fn norm(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    d.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

/// The start from two batches' gradients at the first step's rate, and eight steps of the middle.
#[test]
fn lora_sb_starts_and_steps_as_its_authors_code_does() {
    let golden = Golden::open("lora_sb");
    let (config, weights) = lorimer::model::base::open_weights(&folder("tiny-llama"), LoadDtype::F32).unwrap();
    let model = Llama::load(config, &weights).unwrap();
    let prompt = golden.number("prompt") as usize;
    let tokens: Vec<Vec<u32>> = golden.get("tokens").to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let rows: Vec<Example> = tokens
        .into_iter()
        .map(|tokens| Example { learnt: (0..tokens.len()).map(|i| i >= prompt).collect(), tokens, answer: None })
        .collect();
    let rows: Vec<&Example> = rows.iter().collect();
    let settings = TrainSettings {
        learning_rate: golden.number("lr"),
        max_steps: Some(40),
        warmup_ratio: 0.1,
        ..Default::default()
    };
    let eta = settings.first_rate(rows.len());
    assert!((eta - golden.number("eta")).abs() < 1e-15, "{eta}");
    let given = serde_json::json!({ "r": 6, "samples": 6, "init_lr": eta, "target_modules": ["q_proj", "v_proj", "down_proj"] });
    let method = methods::build("lora-sb", given.as_object().unwrap()).unwrap();
    let data = Data { rows: rows.clone(), base: String::new(), cache: None };
    let findings = calibrate(&model, method.as_ref(), &data, |_, _| {}).unwrap();
    let adapter = Adapter::attach_calibrated(&model, method, &findings, 0).unwrap();
    let mut compared = 0;
    for (site, base, delta) in adapter.sites(&model) {
        let plain = base.dense(DType::F32).unwrap();
        let change = (delta.merged(base).unwrap().unwrap() - plain).unwrap();
        let expected = golden.get(&format!("{}.change", site.path));
        // Their factors and ours are kept in bf16, and rounded at other places.
        let apart = norm(&(&change - expected).unwrap()) / norm(expected);
        assert!(apart < 0.01, "{}: {apart}", site.path);
        compared += 1;
    }
    assert_eq!(compared, 6);
    let parameters = adapter.trainable();
    let mut optimizer = AdamW::new(AdamWConfig::default(), false);
    let schedule = Schedule { peak: golden.number("lr"), warmup: settings.warmup(6), total: 40, shape: Shape::Linear };
    for (step, expected) in golden.numbers("losses").into_iter().enumerate() {
        let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter), &rows).unwrap();
        let loss = (sum / count as f64).unwrap();
        let found = loss.backward().unwrap();
        let gradients: Vec<_> = parameters.iter().map(|(_, v)| found.get(v.as_tensor()).cloned()).collect();
        optimizer.step(&parameters, &gradients, schedule.rate(step)).unwrap();
        let loss = loss.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
        assert!((loss - expected).abs() < 2e-4, "step {step}: {loss} against {expected}");
    }
}

/// Forty steps of gates with the penalty, the reference's three updates and the paper's one; and the three ways in which ξ rises.
#[test]
fn soras_gates_go_the_way_of_its_authors_code() {
    let golden = Golden::open("sora");
    let (steps, peak) = (40, 0.05);
    let schedule = Schedule { peak, warmup: 4, total: steps, shape: Shape::Linear };
    for (name, update) in [("masked", Update::Masked), ("soft", Update::Soft)] {
        let gates: Vec<Var> = (0..3).map(|i| Var::from_tensor(golden.get(&format!("gate.{i}"))).unwrap()).collect();
        let parameters: Vec<(String, &Var)> =
            gates.iter().enumerate().map(|(i, var)| (format!("{i}.gate"), var)).collect();
        let settings = SoftThreshold {
            stages: SoraConfig::default().thresholds(),
            of_rate: true,
            lr_scaled: false,
            update,
            gate_lr: None,
            penalty: 10.0,
            random_keep: None,
        };
        let control = control::build(Some(&Control::SoftThreshold(settings)), (0, steps, peak), &parameters);
        let mut optimizer = AdamW::new(AdamWConfig::default(), false);
        for step in 0..steps {
            let slope = |i: usize| golden.get(&format!("slope.{i}")).get(step).unwrap();
            let gradient =
                |(i, (name, var)): (usize, &(String, &Var))| Some(control.gradient(name, var, slope(i)).unwrap());
            let gradients: Vec<_> = parameters.iter().enumerate().map(gradient).collect();
            optimizer.step(&parameters, &gradients, schedule.rate(step)).unwrap();
            control.after(step, schedule.rate(step) / peak, &parameters).unwrap();
            let now = Tensor::cat(&gates.iter().map(Var::as_tensor).collect::<Vec<_>>(), 0).unwrap();
            let d = distance(&now, &golden.get(&format!("{name}.path")).get(step).unwrap());
            assert!(d < 1e-6, "{name}: step {step} differs by {d:e}");
        }
    }
    for (name, schedule, xi_min, xi, stages) in [
        ("linear", Rise::Linear, 1e-4, 7e-4, 7),
        ("log_linear", Rise::LogLinear, 1e-4, 7e-4, 7),
        ("exp_linear", Rise::ExpLinear, 1e-4, 7e-4, 7),
        ("log_linear.wide", Rise::LogLinear, 0.5, 3.0, 5),
        ("linear.zero", Rise::Linear, 0.0, 7e-4, 7),
    ] {
        let found = SoraConfig { schedule, xi_min, xi: Some(xi), stages, ..Default::default() }.thresholds();
        let expected = golden.numbers(name);
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-12, "{name}: {found:?} against {expected:?}");
        }
    }
}

/// Values and gradients of BA-LoRA's terms in both versions of its authors' code.
#[test]
fn ba_loras_terms_have_their_values_and_gradients() {
    let golden = Golden::open("ba_lora");
    let (logits, base) = (golden.get("logits"), golden.get("base"));
    let per_row = logits.dim(0).unwrap() as f64 / golden.number("rows");
    let steps = [0, 19, 20, 22, 25, 70, 99];
    let second = steps.map(|step| (format!("second.{step}"), "ba-lora:version=2,k=5".to_string(), step));
    let first = ["nlg", "nlu"].map(|task| (task.to_string(), format!("ba-lora:task={task}"), 0));
    for (name, spec, step) in first.into_iter().chain(second) {
        let objective = objective::build(&spec.parse().unwrap());
        let leaf = Var::from_tensor(logits).unwrap();
        let value = objective.value(leaf.as_tensor(), base, &Moment::new(step, 100, per_row)).unwrap();
        let found = value.to_scalar::<f64>().unwrap();
        let expected = golden.number(&format!("{name}.value"));
        assert!((found - expected).abs() < 1e-9, "{name}: {found} against {expected}");
        let gradient = value.backward().unwrap().remove(leaf.as_tensor()).unwrap();
        let d = distance(&gradient, golden.get(&format!("{name}.gradient")));
        assert!(d < 1e-9, "{name}: its gradient differs by {d:e}");
    }
}
