//! What a loss has in it beside the data.

use super::*;

/// Gradients of the whole loss with BA-LoRA's terms against central differences, and nothing changed where their weights are zero.
#[test]
fn the_regularised_loss_has_its_gradient() {
    let model = model();
    let rows = examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let supervised: usize = rows.iter().map(|e| e.targets().count()).sum();
    let run = |adapter: &Adapter, objective: Option<&dyn Objective>, checkpointing: bool| {
        let (parameters, mut sums) = (adapter.trainable(), Gradients::default());
        let inputs =
            StepInputs { objective: objective.map(|o| (o, 0.7, Moment::new(3, 4, 2.0))), ..Default::default() };
        let options = StepOptions { checkpointing, ..Default::default() };
        let attached = Attached::one(adapter);
        let found = accumulate(&model, &attached, &parameters, &rows, 0.1, options, inputs, &mut sums).unwrap();
        let all: Vec<Tensor> = parameters.iter().map(|(_, v)| sums.remove(v.as_tensor()).unwrap()).collect();
        (found.sum * 0.1 + found.auxiliary * 0.7, found.auxiliary, all)
    };
    for (version, task) in [(1, BaLoraTask::Nlg), (1, BaLoraTask::Nlu), (2, BaLoraTask::Nlg)] {
        let adapter = attach(&model, "ba-lora", r#"{"r": 3}"#);
        let settings = BaLora {
            version,
            lambda1: 0.5,
            lambda2: 0.4,
            lambda3: 0.3,
            k: 3,
            task,
            temperature: 2.0,
            top_k_entropy: 5 * (version - 1),
        };
        // Where nothing has moved, the consistency is zero.
        let only = Regularisers(BaLora { lambda2: 0.0, lambda3: 0.0, ..settings.clone() });
        assert!(run(&adapter, Some(&only), false).1.abs() < 1e-12);
        move_all(&adapter);
        let objective = Regularisers(settings);
        let (_, _, found) = run(&adapter, Some(&objective), false);
        let (_, _, again) = run(&adapter, Some(&objective), true);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for ((name, var), (g, again)) in adapter.trainable().into_iter().zip(found.iter().zip(&again)) {
            assert!(distance(g, again) < 1e-12, "{name}");
            let direction = random(var.dims(), 1.0, &mut rng);
            let along = (g * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let here = var.as_tensor().copy().unwrap();
            let at = |h: f64| {
                var.set(&(&here + (&direction * h).unwrap()).unwrap()).unwrap();
                run(&adapter, Some(&objective), false).0
            };
            let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
            var.set(&here).unwrap();
            assert!((numeric - along).abs() < 1e-6 * (1.0 + along.abs()), "{task:?} {name}: {numeric} against {along}");
        }
        let none = Regularisers(BaLora { lambda1: 0.0, lambda2: 0.0, lambda3: 0.0, ..Default::default() });
        let plain = run(&adapter, None, false).2;
        for (a, b) in run(&adapter, Some(&none), false).2.iter().zip(&plain) {
            assert!(distance(a, b) < 1e-14);
        }
    }
    assert!(supervised > 0);
}

/// All supervised positions take part, more than are looked at together too: the divergence over all of them at once.
#[test]
fn every_supervised_position_is_regularised() {
    let model = model();
    let row = |seed: u32| Example {
        tokens: (0..700).map(|i| (i * 7 + i * i * seed) % 40).collect(),
        supervised: (0..700).map(|i| i > 3).collect(),
        answer: None,
    };
    let rows = [row(1), row(3)];
    let rows: Vec<&Example> = rows.iter().collect();
    let positions: usize = rows.iter().map(|e| e.targets().count()).sum();
    assert!(positions > lorimer_adapter::training::objective::BLOCK_ROWS);
    let adapter = attach(&model, "lora", r#"{"r": 3}"#);
    move_all(&adapter);
    let attached = Attached::one(&adapter);
    let objective = Regularisers(BaLora { lambda1: 1.0, lambda2: 0.0, lambda3: 0.0, ..Default::default() });
    let parameters = adapter.trainable();
    let inputs = StepInputs { objective: Some((&objective, 1.0, Moment::new(0, 1, 1.0))), ..Default::default() };
    let options = StepOptions::default();
    let mut sums = Gradients::default();
    let found = accumulate(&model, &attached, &parameters, &rows, 1e-9, options, inputs, &mut sums).unwrap();
    let whole = |on: &dyn Adaptation| {
        let batch = Batch::pack(rows.iter().map(|e| e.tokens.as_slice()));
        let hidden = model.hidden(&batch, on).unwrap();
        let places: Vec<u32> =
            rows.iter().zip(&batch.rows).flat_map(|(e, at)| e.targets().map(|i| at[i - 1])).collect();
        let places = Tensor::from_vec(places, positions, &Device::Cpu).unwrap();
        model.logits(&hidden.index_select(&places, 0).unwrap(), on).unwrap()
    };
    let expected = ba_lora::divergence(&whole(&Frozen), &whole(&attached)).unwrap();
    let gradients = expected.backward().unwrap();
    let expected = expected.to_scalar::<f64>().unwrap();
    assert!((found.auxiliary - expected).abs() < 1e-9 * expected, "{} against {expected}", found.auxiliary);
    for (name, var) in &parameters {
        let (found, expected) = (sums.remove(var.as_tensor()).unwrap(), gradients.get(var.as_tensor()).unwrap());
        // The loss of the task is in it too, a thousand millionth of it.
        assert!(distance(&found, expected) < 1e-5 * norm(expected), "{name}");
    }
}
