//! What the authors' code of the ways to train computes (tests/goldens/make_training.py).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor, Var};
use lorimer_adapter::method::{CalibrationStats, ParameterSource};
use lorimer_adapter::methods::lora_pro::{LoraPro, LoraProOptimizer, Pair};
use lorimer_adapter::methods::sora::{Rise, SoftThreshold, SoraConfig, Update};
use lorimer_adapter::methods::{ObjectiveChoice, OptimizerChoice};
use lorimer_adapter::step::SampledRank;
use lorimer_adapter::training::{AdamW, AdamWConfig, CallbackKind, Moment, Optimizer, ParamGroup, RunShape};
use lorimer_adapter::{Named, Role};
use lorimer_model::{Projection, Site};
use lorimer_tensor::FrozenWeight;
use lorimer_train::calibrate::{Data, calibrate};
use lorimer_train::run::schedule::{Schedule, Shape};
use lorimer_train::run::step::batch_loss;

use crate::prelude::*;

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
    let (config, weights) = lorimer_model::base::open_weights(&folder("tiny-llama"), LoadDtype::F32).unwrap();
    let model = config.load(&weights).unwrap();
    let model = model.as_ref();
    let prompt = golden.number("prompt") as usize;
    let tokens: Vec<Vec<u32>> = golden.get("tokens").to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let rows: Vec<Example> = tokens
        .into_iter()
        .map(|tokens| Example { supervised: (0..tokens.len()).map(|i| i >= prompt).collect(), tokens, answer: None })
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
    let stats = calibrate(model, method.as_ref(), &data, |_, _| {}).unwrap();
    let adapter = Adapter::attach_calibrated(model, method, &stats, 0).unwrap();
    let mut compared = 0;
    for (site, base, delta) in adapter.sites(model) {
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
        let (sum, count, _) = batch_loss(model, &Attached::one(&adapter), &rows).unwrap();
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
        let named: Vec<Named<'_>> =
            parameters.iter().map(|(name, var)| Named { name: name.clone(), var, role: Role::Gate }).collect();
        let settings = SoftThreshold {
            stages: SoraConfig::default().thresholds(),
            of_rate: true,
            lr_scaled: false,
            update,
            gate_lr: None,
            penalty: 10.0,
            random_keep: None,
        };
        let callback = settings.build(RunShape { seed: 0, steps, peak }, &named);
        let mut optimizer = AdamW::new(AdamWConfig::default(), false);
        for step in 0..steps {
            let slope = |i: usize| golden.get(&format!("slope.{i}")).get(step).unwrap();
            let gradient = |(i, p): (usize, &Named<'_>)| Some(callback.gradient(p.role, p.var, slope(i)).unwrap());
            let gradients: Vec<_> = named.iter().enumerate().map(gradient).collect();
            optimizer.step(&parameters, &gradients, schedule.rate(step)).unwrap();
            callback.after(step, schedule.rate(step) / peak, &named).unwrap();
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
        let objective = spec.parse::<ObjectiveChoice>().unwrap().0.build();
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

/// Eight steps of LoRA-Pro's variants, from B = 0 and from elsewhere; `light` with weight decay.
#[test]
fn lora_pros_variants_step_as_their_authors_code_does() {
    // The full variant's rate is their script's, and not that of the light one, which takes AdamW's steps in A and B.
    for (variant, expected) in [("full", 2e-5), ("light", 1e-3)] {
        let settings = serde_json::json!({ "variant": variant });
        assert_eq!(methods::learning_rate("lora-pro", settings.as_object().unwrap()).unwrap(), expected);
    }
    assert_eq!("lora-pro-full".parse::<OptimizerChoice>().unwrap().0.learning_rate(), Some(2e-5));
    for (file, full) in [("lora_pro", true), ("lora_pro_light", false)] {
        let golden = Golden::open(file);
        let (target, scaling, rate) = (golden.get("target"), golden.number("scaling"), golden.number("rate"));
        let weight_decay = if full { 0.0 } else { golden.number("decay") };
        let how = |_: &str| Ok(ParamGroup::default());
        for kind in ["zero", "moved"] {
            let a = Var::from_tensor(golden.get("a")).unwrap();
            let b = Var::from_tensor(golden.get(&format!("{kind}.b"))).unwrap();
            let settings = LoraPro { full, ..Default::default() };
            let pairs = vec![Pair { module: "m".into(), scaling }];
            let config = AdamWConfig { weight_decay, ..Default::default() };
            let mut optimizer = LoraProOptimizer::new(settings, config, pairs);
            let parameters = [("m.lora_A".to_string(), &a), ("m.lora_B".to_string(), &b)];
            for step in 1..9 {
                let g = ((b.matmul(&a).unwrap() * scaling).unwrap() - target).unwrap();
                let plain = [b.t().unwrap().matmul(&g).unwrap(), g.matmul(&a.t().unwrap()).unwrap()];
                let gradients = plain.map(|t| Some((t * scaling).unwrap()));
                optimizer.step_with(&parameters, &gradients, &how, rate).unwrap();
                for (name, var) in [("a", &a), ("b", &b)] {
                    let d = distance(var.as_tensor(), golden.get(&format!("{kind}.{step}.{name}")));
                    assert!(d < 1e-6, "{file}, {kind}: {name} differs by {d:e} after step {step}");
                }
            }
        }
    }
}

/// A rank's forward and gradients, of all its rows or of the last one alone.
#[test]
fn dyloras_ranks_compute_what_its_authors_code_computes() {
    let golden = Golden::open("dylora");
    let (a, b, x) = (golden.get("a"), golden.get("b"), golden.get("x"));
    let ((r, inputs), outputs) = (a.dims2().unwrap(), b.dim(0).unwrap());
    let weight = Tensor::zeros((outputs, inputs), DType::F64, &candle_core::Device::Cpu).unwrap();
    let base = Projection { weight: FrozenWeight::Dense(weight), bias: None };
    let site = Site::new("p", (outputs, inputs));
    let settings = serde_json::json!({ "r": r, "lora_alpha": golden.number("alpha") });
    let method = methods::build("dylora", settings.as_object().unwrap()).unwrap();
    let stats = CalibrationStats::new();
    let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats)).unwrap();
    for (key, var) in delta.trainable() {
        // B is kept as its transpose.
        var.set(&if key == "lora_A" { a.clone() } else { b.t().unwrap().contiguous().unwrap() }).unwrap();
    }
    let nothing = base.forward(x).unwrap();
    for rank in 1..=r {
        for frozen in [false, true] {
            let step = Step { training: Some(1), rank: Some(SampledRank { rank, frozen }) };
            let y = delta.forward(&base, x, &nothing, &step).unwrap();
            let name = format!("{rank}.{}", if frozen { "frozen" } else { "all" });
            let d = distance(&y, golden.get(&format!("{name}.y")));
            assert!(d < 1e-12, "{name}: {d:e}");
            let found = (&y * golden.get("direction")).unwrap().sum_all().unwrap().backward().unwrap();
            for (key, var) in delta.trainable() {
                let gradient = found.get(var.as_tensor()).unwrap();
                let (gradient, end) =
                    if key == "lora_A" { (gradient.clone(), "a") } else { (gradient.t().unwrap(), "b") };
                let d = distance(&gradient, golden.get(&format!("{name}.{end}")));
                assert!(d < 1e-12, "{name}: the gradient of {end} differs by {d:e}");
            }
        }
    }
}

/// bitsandbytes' own AdamW8bit: its code, every index of its first step, and forty steps; small parameters keep 32 bits.
#[test]
fn adam_in_eight_bits_is_that_of_bitsandbytes() {
    use lorimer_tensor::storage::blockwise::{SIGNED, UNSIGNED};
    let golden = Golden::open("adam8bit");
    for (name, code) in [("signed", &*SIGNED), ("unsigned", &*UNSIGNED)] {
        for (i, expected) in golden.numbers(name).into_iter().enumerate() {
            let found = f64::from(code.value(i as u8));
            assert!((found - expected).abs() <= 3e-7 * expected.abs(), "{name} {i}: {found} against {expected}");
        }
    }
    let vars = ["large", "small"].map(|name| Var::from_tensor(golden.get(name)).unwrap());
    let parameters = [("large".to_string(), &vars[0]), ("small".to_string(), &vars[1])];
    let mut optimizer = AdamW::new(AdamWConfig { weight_decay: 0.01, ..Default::default() }, true);
    for (step, expected) in golden.numbers("losses").into_iter().enumerate() {
        let part =
            |var: &Var, goal: &str| (var.as_tensor() - golden.get(goal)).unwrap().sqr().unwrap().mean_all().unwrap();
        let loss = (part(&vars[0], "goal") + part(&vars[1], "near")).unwrap();
        let grads = loss.backward().unwrap();
        let gradients: Vec<_> = vars.iter().map(|v| grads.get(v.as_tensor()).cloned()).collect();
        optimizer.step(&parameters, &gradients, 1e-2).unwrap();
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((loss - expected).abs() < 1e-3 * expected, "step {step}: {loss} against {expected}");
        if step == 0 {
            let state: BTreeMap<String, Tensor> = optimizer.state().unwrap().into_iter().collect();
            assert!(distance(vars[0].as_tensor(), golden.get("first.large")) < 1e-6);
            let scales = &state["large.exp_avg.scales"];
            assert!(distance(scales, &golden.get("first.scales").reshape(scales.dims()).unwrap()) < 1e-9);
            let (found, expected) = (state["large.exp_avg"].to_vec1::<u8>().unwrap(), golden.numbers("first.indices"));
            let moment = (gradients[0].as_ref().unwrap() * (1.0 - 0.9)).unwrap().flatten_all().unwrap();
            let mut other = 0;
            for (b, block) in moment.to_vec1::<f32>().unwrap().chunks(256).enumerate() {
                let scale = block.iter().fold(0f32, |most, m| most.max(m.abs()));
                for (i, m) in (b * 256..).zip(block) {
                    // Its kernel for processors rounds to one of 65536 values first and takes that one's nearest; those for GPUs, and ours, do not.
                    let rounded = (f64::from(m * scale.recip()) + 1.0) * 32767.5;
                    let rounded = (rounded.round() / 32767.5 - 1.0) as f32;
                    assert_eq!(f64::from(SIGNED.index(rounded)), expected[i], "index {i}");
                    assert_eq!(SIGNED.index(m * scale.recip()), found[i], "index {i}");
                    other += usize::from(f64::from(found[i]) != expected[i]);
                }
            }
            assert_eq!(other, 7, "of {} indices", found.len());
            assert_eq!(state["small.exp_avg"].dtype(), DType::F32);
        }
    }
    for (name, var) in &parameters {
        let (found, expected) = (var.as_tensor(), golden.get(&format!("last.{name}")));
        let apart = norm(&(found - expected).unwrap()) / norm(expected);
        assert!(apart < if name == "small" { 1e-5 } else { 5e-3 }, "{name}: {apart}");
    }
}

/// transformers' LabelSmoother, which sums over the vocabulary in f32.
#[test]
fn smoothed_labels_are_those_of_transformers() {
    let golden = Golden::open("label_smoothing");
    let logits = Var::from_tensor(golden.get("logits")).unwrap();
    let targets: Vec<u32> = golden.numbers("targets").into_iter().map(|t| t as u32).collect();
    let loss = lorimer_tensor::smoothed_cross_entropy(logits.as_tensor(), &targets, 0.1).unwrap().mean_all().unwrap();
    let found = loss.to_scalar::<f64>().unwrap();
    // Its definition in f64 throughout, computed with torch.
    assert!((found - 6.796456022168043).abs() < 1e-12, "{found}");
    assert!((found - golden.number("loss")).abs() < 1e-6, "{found} against {}", golden.number("loss"));
    let gradient = loss.backward().unwrap().remove(logits.as_tensor()).unwrap();
    let d = distance(&gradient, golden.get("gradient"));
    assert!(d < 1e-9, "{d:e}");
}
