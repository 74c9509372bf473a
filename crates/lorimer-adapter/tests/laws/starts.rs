//! Starts, their parameters and what calibration finds for them.

use crate::*;

#[test]
fn law_1_untouched_at_start() {
    each(|model, name, settings, tolerance| {
        let adapter = attach(model, name, settings);
        assert!(distance(&logits(model, &Attached::one(&adapter)), &logits(model, &Frozen)) <= tolerance);
        assert!(tolerance.is_infinite() || !adapter.has_effect(model).unwrap());
    });
}

/// The gradients that calibration finds layer by layer are those of the whole graph.
#[test]
fn calibration_finds_the_frozen_weights_gradients() {
    let model = model();
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let supervised = |rows: &[&Example]| rows.iter().map(|e| e.targets().count()).sum::<usize>() as f64;
    let all = r#"{"target_modules": ["lm_head"], "modules_to_save":
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}"#;
    let whole = attach(&model, "lora", all);
    for (batch, sum) in [(2, Sum::Plain), (2, Sum::Absolute), (1, Sum::Squares)] {
        let settings = serde_json::from_str::<Value>(r#"{"r": 4}"#).unwrap();
        let method = methods::build("lora-sb", settings.as_object().unwrap()).unwrap();
        let mut found = BTreeMap::new();
        let on_layer = |layer: Vec<(&Site, Tensor)>| {
            found.extend(layer.into_iter().map(|(site, t)| (site.path.clone(), t)));
            Ok(())
        };
        gradients(&model, method.as_ref(), &rows, (batch, sum), on_layer, |_, _| {}).unwrap();
        assert_eq!(found.len(), 14);
        let mut expected: BTreeMap<&str, Tensor> = BTreeMap::new();
        for some in rows.chunks(batch) {
            let count = supervised(if sum == Sum::Squares { some } else { &rows });
            let (loss, ..) = batch_loss(&model, &Attached::one(&whole), some).unwrap();
            let of = (loss / count).unwrap().backward().unwrap();
            for path in found.keys() {
                let g = of.get(whole.parameters()[&format!("{path}.weight")].as_tensor()).unwrap();
                let g = match sum {
                    Sum::Plain => g.clone(),
                    Sum::Absolute => g.abs().unwrap(),
                    Sum::Squares => g.sqr().unwrap(),
                };
                let before = expected.remove(path.as_str());
                expected.insert(path, before.map_or(g.clone(), |sum| (sum + g).unwrap()));
            }
        }
        for (path, gradient) in &found {
            let d = distance(gradient, &expected[path.as_str()]);
            assert!(d < 1e-12, "{sum:?}, {path}: {d:e}");
        }
    }
}

/// LoRA-SB's start is the best approximation of the first step of full fine-tuning, between orthonormal factors.
#[test]
fn lora_sb_catches_the_first_step() {
    let model = model();
    let adapter = attach(&model, "lora-sb", r#"{"r": 5, "samples": 3, "init_lr": 0.5}"#);
    let rows = examples();
    // The rows in the order of the test's calibration: as they are.
    let rows: Vec<&Example> = rows.iter().collect();
    let mut first = BTreeMap::new();
    let on_layer = |layer: Vec<(&Site, Tensor)>| {
        first.extend(layer.into_iter().map(|(site, t)| (site.path.clone(), t)));
        Ok(())
    };
    gradients(&model, adapter.method.as_ref(), &rows, (8, Sum::Plain), on_layer, |_, _| {}).unwrap();
    for (site, base, delta) in adapter.sites(&model) {
        let values = first[&site.path].flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let step = methods::lora_sb::first_step(&values, 0.5);
        let step = Tensor::from_vec(step, (site.outputs, site.inputs), &Device::Cpu).unwrap();
        let change = (delta.merged(base).unwrap().unwrap() - base.dense(DType::F64).unwrap()).unwrap();
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        let (_, s, _) = lorimer_tensor::linalg::svd(&step).unwrap();
        let tail: f64 = s.to_vec1::<f64>().unwrap()[5..].iter().map(|s| s * s).sum();
        let residual = norm(&(&change - &step).unwrap());
        // The factors are kept in bf16.
        assert!((residual - tail.sqrt()).abs() < 0.02 * norm(&step), "{}: {residual} {}", site.path, tail.sqrt());
        for (key, factor) in delta.frozen() {
            let gram =
                if key == "lora_A" { factor.matmul(&factor.t().unwrap()) } else { factor.t().unwrap().matmul(factor) };
            let eye = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap();
            assert!(distance(&gram.unwrap(), &eye) < 0.02, "{} {key}", site.path);
        }
    }
}

/// EVA's ranks add up to the budget, its directions are orthonormal, projections of one input share them, and what gets no rank is in
/// no file.
#[test]
fn eva_keeps_its_budget() {
    let model = model();
    let settings = r#"{"r": 3, "rho": 2, "use_label_mask": false, "batch_size": 3}"#;
    let adapter = attach(&model, "eva", settings);
    let stored = adapter.to_stored("tiny").unwrap();
    let mut total = 0;
    let a = |path: &str| stored.tensors.get(&format!("base_model.model.{path}.lora_A.weight")).cloned();
    for (site, _) in model.projections().into_iter().filter(|(s, _)| !s.is_head) {
        let Some(a) = a(&site.path) else {
            assert!(adapter.delta(&site.path).is_none());
            continue;
        };
        total += a.dim(0).unwrap();
        let eye = Tensor::eye(a.dim(0).unwrap(), DType::F64, &Device::Cpu).unwrap();
        assert!(distance(&a.matmul(&a.t().unwrap()).unwrap(), &eye) < 1e-6, "{}", site.path);
    }
    assert_eq!(total, 3 * 14);
    let (gate, up) = (a("model.layers.0.mlp.gate_proj").unwrap(), a("model.layers.0.mlp.up_proj").unwrap());
    let shared = gate.dim(0).unwrap().min(up.dim(0).unwrap());
    assert_eq!(distance(&gate.narrow(0, 0, shared).unwrap(), &up.narrow(0, 0, shared).unwrap()), 0.0);
    // A budget that one projection can take up leaves others without.
    let narrow = attach(&model, "eva", r#"{"r": 1, "rho": 8, "use_label_mask": false, "batch_size": 3}"#);
    let modules = account_of(&narrow.to_stored("tiny").unwrap()).unwrap().1.modules;
    assert!(modules.len() < 14 && !modules.is_empty());
    assert_eq!(modules.values().map(|t| t["lora_A.weight"].dim(0).unwrap()).sum::<usize>(), 14);
}

#[test]
fn law_7_trainable_parameters_are_those_of_the_formula() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        let sites = model.projections().into_iter().filter(|(s, _)| adapter.delta(&s.path).is_some());
        let formula: usize = sites.map(|(s, _)| adapter.method.parameters(s).unwrap()).sum();
        let blocks = adapter.blocks().map(|(block, _)| adapter.method.blocks().unwrap().parameters(block));
        let formula = formula + blocks.sum::<usize>();
        let whole: usize = adapter.parameters().values().map(|v| v.elem_count()).sum();
        assert_eq!(adapter.parameter_count(), formula + whole);
    });
}

#[test]
fn law_8_the_same_seed_gives_the_same_bytes() {
    each(|model, name, settings, _| {
        let bytes = || attach(model, name, settings).to_stored("tiny").unwrap().tensor_bytes().unwrap();
        assert_eq!(bytes(), bytes());
    });
}
