//! GaLore's steps.

use super::*;

/// AdamW goes number by number, so that a rotation of the numbers changes it: GaLore of full rank is AdamW exactly in the coordinates of its
/// space.
#[test]
fn galore_of_full_rank_is_adamw_in_its_space() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let config = AdamWConfig::default();
    for (shape, proj_type) in [
        ([9, 6], GaloreProjection::Std),
        ([6, 9], GaloreProjection::Std),
        ([7, 7], GaloreProjection::Full),
        ([6, 9], GaloreProjection::Left),
        ([9, 6], GaloreProjection::Right),
    ] {
        let (start, target) = (random(&shape, 1.0, &mut rng), random(&shape, 1.0, &mut rng));
        let var = Var::from_tensor(&start).unwrap();
        let settings = Galore { rank: 99, update_proj_gap: 1000, scale: 1.0, proj_type, ..Default::default() };
        let mut galore = GaloreOptimizer::new(settings, config);
        let mut plain = AdamW::new(config, false);
        let mut inside: Option<(Var, Tensor, Tensor)> = None;
        for step in 0..20 {
            let gradient = (var.as_tensor() - &target).unwrap().detach();
            let g = gradient.clone();
            galore.step(&[("w".into(), &var)], &[Some(gradient)], 1e-2).unwrap();
            let state: BTreeMap<String, Tensor> = galore.state().unwrap().into_iter().collect();
            let eye = |n: usize| Tensor::eye(n, DType::F64, &Device::Cpu).unwrap();
            let left = state.get("w.galore_left").cloned().unwrap_or(eye(shape[0]));
            let right = state.get("w.galore_right").cloned().unwrap_or(eye(shape[1]));
            for (p, n) in [
                (left.t().unwrap().matmul(&left).unwrap(), left.dim(1).unwrap()),
                (right.matmul(&right.t().unwrap()).unwrap(), right.dim(0).unwrap()),
            ] {
                assert!(distance(&p, &eye(n)) < 1e-10, "orthonormal");
            }
            let into = |t: &Tensor| left.t().unwrap().matmul(t).unwrap().matmul(&right.t().unwrap()).unwrap();
            let (own, ..) =
                inside.get_or_insert_with(|| (Var::from_tensor(&into(&start)).unwrap(), left.clone(), right.clone()));
            plain.step(&[("w".into(), &*own)], &[Some(into(&g))], 1e-2).unwrap();
            let back = left.matmul(own.as_tensor()).unwrap().matmul(&right).unwrap();
            assert!(distance(var.as_tensor(), &back) < 1e-9, "{shape:?} {proj_type:?} at step {step}");
        }
    }
}

#[test]
fn galore_keeps_the_state_that_it_says_and_renews_its_space_in_time() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let bytes = |optimizer: &dyn Optimizer| -> usize {
        let state = optimizer.state().unwrap();
        state
            .iter()
            .filter(|(n, _)| !n.ends_with(".step"))
            .map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes())
            .sum()
    };
    let weight = random(&[256, 192], 1.0, &mut rng).to_dtype(DType::F32).unwrap();
    let run = |bits: usize, rank: usize| {
        let var = Var::from_tensor(&weight).unwrap();
        let settings = Galore { rank, bits, update_proj_gap: 3, ..Default::default() };
        let mut optimizer = GaloreOptimizer::new(settings, AdamWConfig::default());
        let mut spaces = Vec::new();
        for i in 0..7 {
            let g = (var.as_tensor() * (1.0 + f64::from(i))).unwrap().sin().unwrap().detach();
            optimizer.step(&[("w".into(), &var)], &[Some(g)], 1e-3).unwrap();
            let state: BTreeMap<String, Tensor> = optimizer.state().unwrap().into_iter().collect();
            spaces.push(state["w.galore_right"].flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        let changed: Vec<bool> = spaces.windows(2).map(|w| w[0] != w[1]).collect();
        assert_eq!(changed, [false, false, true, false, false, true]);
        bytes(&optimizer)
    };
    // Moments (256, r) twice and a space (r, 192).
    assert_eq!(run(32, 16), 4 * (2 * 256 * 16 + 16 * 192));
    let eight = run(8, 16);
    assert!(eight < 2 * 256 * 16 + 2 * 256 * 16 / 32 + 4 * 16 * 192, "{eight}");
}

/// Stepping layer by layer, a gradient is limited by the norm of the step before, and the first not at all: the trainer's weights are
/// those of the optimiser on whole gradients that are scaled so. Limits by another norm, or none, give others.
#[test]
fn galore_layer_by_layer_limits_by_the_last_norm() {
    let settings = r#"{"rank": 3, "per_layer": true, "update_proj_gap": 2, "modules_to_save": ["model.norm"]}"#;
    let (model, rows, limit, steps) = (model(), examples(), 0.3, 4);
    let text = TextModel::from_folder(&goldens("tiny-llama")).unwrap();
    let adamw = AdamWConfig { weight_decay: 0.0, ..Default::default() };
    let trained = |max_grad_norm: f64| {
        let adapter = attach(&model, "galore", settings);
        let train = TrainSettings {
            learning_rate: 1e-2,
            max_steps: Some(steps),
            batch_size: rows.len(),
            schedule: Shape::Constant,
            max_grad_norm,
            shuffle: false,
            adamw,
            ..Default::default()
        };
        let (folder, stop) = (tempfile::tempdir().unwrap(), Default::default());
        let run = Run {
            model: &model,
            text: &text,
            base_name: "tiny",
            adapter: &adapter,
            beneath: &[],
            train: &rows,
            eval: &[],
            choices: &[],
            settings: &train,
            identity: serde_json::Value::Null,
            folder: folder.path(),
            save_steps: None,
            save_limit: 1,
            resume: false,
            stop: &stop,
        };
        let norms = run.train(|_| {}).unwrap().history.iter().filter_map(|r| r.gradient_norm).collect::<Vec<_>>();
        (adapter, norms)
    };
    // On whole gradients, limited by the norm that `which` takes of the steps' norms so far.
    let whole = |which: &dyn Fn(&[f64]) -> f64| {
        let adapter = attach(&model, "galore", settings);
        let Some(galore) = adapter.method.training().optimizer else { panic!("galore") };
        let galore: Galore = serde_json::from_value(galore.settings().into()).unwrap();
        let mut optimizer = GaloreOptimizer::new(galore, adamw);
        let parameters = adapter.trainable();
        let supervised = rows.iter().map(|e| e.targets().count()).sum::<usize>() as f64;
        let mut norms = Vec::new();
        for _ in 0..steps {
            let refs: Vec<&Example> = rows.iter().collect();
            let (sum, ..) = batch_loss(&model, &Attached::one(&adapter), &refs).unwrap();
            let grads = (sum / supervised).unwrap().backward().unwrap();
            let all: Vec<Tensor> = parameters.iter().map(|(_, v)| grads.get(v.as_tensor()).unwrap().clone()).collect();
            norms.push(all.iter().map(|g| norm(g).powi(2)).sum::<f64>().sqrt());
            let factor = (limit / (which(&norms) + 1e-6)).min(1.0);
            let limited: Vec<_> = all.iter().map(|g| Some((g * factor).unwrap())).collect();
            let how = |name: &str| {
                Ok(ParamGroup { projected: !adapter.parameters().contains_key(name), ..Default::default() })
            };
            optimizer.step_with(&parameters, &limited, &how, 1e-2).unwrap();
        }
        (adapter, norms)
    };
    let apart = |a: &Adapter, b: &Adapter| {
        let pairs = a.trainable().into_iter().zip(b.trainable());
        pairs.map(|((_, a), (_, b))| distance(a.as_tensor(), b.as_tensor())).fold(0.0, f64::max)
    };
    let (adapter, norms) = trained(limit);
    let (expected, all) = whole(&|norms| norms.iter().rev().nth(1).copied().unwrap_or(0.0));
    assert!(norms.iter().all(|n| *n > 2.0 * limit), "the limit acts at every step: {norms:?}");
    assert!(norms.iter().zip(&all).all(|(a, b)| (a - b).abs() < 1e-9 * b), "{norms:?} against {all:?}");
    let d = apart(&adapter, &expected);
    assert!(d < 1e-9, "{d:e}");
    // The seeded faults: this step's norm, no limit.
    assert!(apart(&adapter, &whole(&|norms| norms[norms.len() - 1]).0) > 1e-5);
    assert!(apart(&adapter, &trained(0.0).0) > 1e-5);
}
