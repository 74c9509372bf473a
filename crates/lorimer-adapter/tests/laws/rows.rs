//! Rows: alone, in a batch, and learnt.

use crate::*;

#[test]
fn law_9_batched_equals_alone() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        let attached = Attached::one(&adapter);
        let together = logits(model, &attached);
        let mut at = 0;
        for e in examples() {
            let hidden = model.hidden(&Batch::pack([e.tokens.as_slice()]), &attached).unwrap();
            let alone = model.logits(&hidden, &attached).unwrap();
            assert!(distance(&together.narrow(0, at, e.tokens.len()).unwrap(), &alone) < 1e-10);
            let mut cache = KvCache::default();
            let steps: Result<Vec<Tensor>> =
                e.tokens.iter().map(|t| model.hidden_cached(&[*t], &mut cache, &attached)).collect();
            let cached = model.logits(&Tensor::cat(&steps.unwrap(), 0).unwrap(), &attached).unwrap();
            assert!(distance(&cached, &alone) < 1e-10);
            at += e.tokens.len();
        }
    });
}

#[test]
fn law_10_a_tiny_task_is_learnt() {
    let failed = std::cell::RefCell::new(Vec::new());
    each(|model, name, settings, _| {
        let rows = examples();
        let rows: Vec<&Example> = rows.iter().collect();
        // At the rate and with the optimiser that `train` takes unless told otherwise.
        let given = serde_json::from_str::<Value>(settings).unwrap();
        let rate = methods::learning_rate(name, given.as_object().unwrap()).unwrap();
        let adapter = attach(model, name, settings);
        let attached = Attached::one(&adapter);
        let parameters = adapter.trainable();
        let kind = adapter.method.training().optimizer.map(OptimizerChoice).unwrap_or_default();
        let mut optimizer = optimize::build(&kind, AdamWConfig::default(), model, &adapter).unwrap();
        let mut losses = Vec::new();
        for _ in 0..100 {
            let (loss, _, _) = batch_loss(model, &attached, &rows).unwrap();
            let grads = loss.backward().unwrap();
            let gradients: Vec<_> = parameters.iter().map(|(_, v)| grads.get(v.as_tensor()).cloned()).collect();
            optimizer.step(&parameters, &gradients, rate).unwrap();
            losses.push(loss.to_scalar::<f64>().unwrap());
        }
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        println!("at {rate}: loss went from {first} to {last}: {:.4}", last / first);
        if last.is_nan() || last >= 0.97 * first {
            failed.borrow_mut().push(format!("{name} {settings} at {rate}: {first} to {last}"));
        }
    });
    assert!(failed.borrow().is_empty(), "{}", failed.borrow().join("\n"));
}

#[test]
fn dropout_depends_on_the_step_only_and_keeps_the_mean() {
    let model = model();
    let adapter = attach(&model, "lora", r#"{"r": 4, "lora_dropout": 0.5}"#);
    move_all(&adapter);
    let attached = Attached::one(&adapter);
    let at = |seed: u64| logits(&model, &attached.at(Step::training(seed)));
    assert_eq!(distance(&at(1), &at(1)), 0.0);
    assert!(distance(&at(1), &at(2)) > 1e-3);
    let (site, base) = model.projections()[0];
    let x = Tensor::ones((4000, site.inputs), DType::F64, &Device::Cpu).unwrap();
    let mean = |a: &Attached<'_>| a.project(site, base, &x).unwrap().mean(0).unwrap();
    assert!(distance(&mean(&attached.at(Step::training(9))), &mean(&attached)) < 0.05);
}
