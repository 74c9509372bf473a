//! Gradients, and savings that do not show in them.

use crate::*;

/// A gradient in candle's graph: zeros for an expert that no row went to, and for a router that only chooses.
fn gradient_of(adapter: &Adapter, var: &candle_core::Var, found: Option<&Tensor>) -> Option<Tensor> {
    let chosen = Attached::one(adapter).routes_units();
    found.cloned().or_else(|| chosen.then(|| var.zeros_like().unwrap()))
}

#[test]
fn law_5_gradients_equal_central_differences() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        let attached = Attached::one(&adapter);
        let rows = examples();
        let rows: Vec<&Example> = rows.iter().collect();
        let loss = || batch_loss(model, &attached, &rows).unwrap().0;
        // DoRA holds its norm constant in the gradient (section 4.3) and ALLoRA scales the gradient, so A and B have no plain
        // derivative there.
        let constant_norm = name == "dora" || name == "allora";
        // The gradient of a choice that the forward does not feel.
        if settings.contains("top1-st") {
            return;
        }
        let grads = loss().backward().unwrap();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        for (parameter, var) in adapter.trainable() {
            let grad =
                &gradient_of(&adapter, var, grads.get(var)).unwrap_or_else(|| panic!("no gradient for {parameter}"));
            if constant_norm && (parameter.ends_with("lora_A") || parameter.ends_with("lora_B")) {
                continue;
            }
            let direction = random(var.dims(), 1.0, &mut rng);
            let along = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let here = var.as_tensor().copy().unwrap();
            let at = |h: f64| {
                var.set(&(&here + (&direction * h).unwrap()).unwrap()).unwrap();
                loss().to_scalar::<f64>().unwrap()
            };
            let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
            var.set(&here).unwrap();
            assert!((numeric - along).abs() <= 1e-6 * (1.0 + along.abs()), "{parameter}: {numeric} against {along}");
        }
    });
}

/// The trainer's forward and backward (tape, shared prefixes, last layer and head in part, layers computed again) give
/// what candle's own graph gives.
#[test]
fn law_5_the_fast_gradients_equal_the_plain_ones() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        let mut rows = examples();
        // Rows that begin alike, one that begins another, one twice.
        let longer = Example {
            tokens: [&rows[0].tokens[..], &[7, 8, 9]].concat(),
            supervised: [&rows[0].supervised[..], &[true; 3]].concat(),
            answer: None,
        };
        rows.push(longer);
        rows.push(rows[0].clone());
        let rows: Vec<&Example> = rows.iter().collect();
        let parameters = adapter.trainable();
        for training in [None, Some(3)] {
            let attached = Attached::one(&adapter).at(training.map_or(Step::default(), Step::training));
            // With dropout, or where rows are counted, what they begin with is not shared.
            let dropout = !attached.rows_are_independent();
            assert!(dropout || training.is_none() || !settings.contains("_dropout"));
            let (sum, supervised, tokens) = batch_loss(model, &attached, &rows).unwrap();
            let expected = (&sum * 0.5).unwrap().backward().unwrap();
            let sum = sum.to_scalar::<f64>().unwrap();
            for share_prefixes in [false, true] {
                for checkpointing in [false, true] {
                    let options = StepOptions { share_prefixes, checkpointing, ..Default::default() };
                    let mut found = Gradients::default();
                    let loss =
                        accumulate_gradients(model, &attached, &parameters, &rows, 0.5, options, None, &mut found)
                            .unwrap();
                    assert_eq!((loss.supervised, loss.tokens), (supervised, tokens));
                    // Each row's last token is seen by nobody, so one row of each sequence is saved without sharing.
                    assert_eq!(loss.computed < tokens, !dropout);
                    assert_eq!(loss.computed < tokens - rows.len(), share_prefixes && !dropout);
                    assert!((loss.sum - sum).abs() < 1e-9 * sum.abs(), "{} against {sum}", loss.sum);
                    for (parameter, var) in &parameters {
                        let d = match (found.get(var), gradient_of(&adapter, var, expected.get(var))) {
                            (Some(a), Some(b)) => distance(a, &b),
                            (a, b) => panic!("{parameter}: {} and {}", a.is_some(), b.is_some()),
                        };
                        assert!(d < 1e-9, "{parameter} with {options:?}: {d:e}");
                    }
                }
            }
        }
    });
}

/// Gradients of the trainer's step in f32, in order, as numbers.
fn step_gradients(
    model: &dyn BaseModel,
    adapter: &Adapter,
    checkpointing: bool,
    lower: Option<&FrozenLower>,
) -> Vec<Vec<f32>> {
    let rows = examples();
    let places: Vec<usize> = (0..rows.len()).collect();
    let rows: Vec<&Example> = rows.iter().collect();
    let parameters = adapter.trainable();
    let attached = Attached::one(adapter).at(Step::training(3));
    let options = StepOptions { checkpointing, ..Default::default() };
    let lower = lower.map(|lower| (lower, places.as_slice()));
    let mut found = Gradients::default();
    accumulate_gradients(model, &attached, &parameters, &rows, 0.5, options, lower, &mut found).unwrap();
    let gradient =
        |var: &candle_core::Var| found.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    parameters.iter().map(|(_, var)| gradient(var)).collect()
}

/// The same from candle's own graph, in the model's type.
fn loss_gradients(model: &dyn BaseModel, adapter: &Adapter) -> Vec<Vec<f32>> {
    let (rows, attached) = (examples(), Attached::one(adapter).at(Step::training(3)));
    let (sum, ..) = batch_loss(model, &attached, &rows.iter().collect::<Vec<_>>()).unwrap();
    let found = (sum * 0.5).unwrap().backward().unwrap();
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    adapter.trainable().iter().map(|(_, v)| flat(&gradient_of(adapter, v, found.get(v)).unwrap())).collect()
}

/// An adapter with the numbers of another, on a model in f64.
fn widened(model: &dyn BaseModel, of: &Adapter, name: &str, settings: &str) -> Adapter {
    let wide = attach(model, name, settings);
    for ((a, from), (b, to)) in of.trainable().iter().zip(wide.trainable()) {
        assert_eq!(*a, b);
        to.set(&from.as_tensor().to_dtype(DType::F64).unwrap()).unwrap();
    }
    wide
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let values = |v: &[Vec<f32>]| v.concat();
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Computing layers again changes no bit; neither threads nor the storage of the frozen weights change more than rounding does.
#[test]
fn savings_do_not_show_in_f32() {
    for load in [LoadDtype::F32, LoadDtype::Bf16, LoadDtype::Nf4] {
        let (model, wide) = (model_as(DType::F32, load), model_as(DType::F64, load));
        for (name, settings, _) in matrix() {
            let adapter = attach(&model, name, settings);
            move_all(&adapter);
            let plain = step_gradients(&model, &adapter, false, None);
            let again = step_gradients(&model, &adapter, true, None);
            assert!(plain == again, "{name} {settings}: {:e}", worst(&plain, &again));
            for threads in [1, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let found = pool.install(|| step_gradients(&model, &adapter, false, None));
                let (d, scale) = (worst(&plain, &found), plain.concat().iter().fold(1f32, |top, g| top.max(g.abs())));
                assert!(d < 1e-5 * scale, "{name} {settings}, {threads} threads: {d:e} of {scale}");
            }
            let oracle = loss_gradients(&model, &adapter);
            let (d, scale) = (worst(&plain, &oracle), oracle.concat().iter().fold(1f32, |top, g| top.max(g.abs())));
            // Nyström's pseudo-inverse of a slice of W multiplies rounding by the slice's condition.
            let tolerance = if name == "nlora" { 5e-4 } else { 2e-5 };
            if d < tolerance * scale.max(10.0) {
                continue;
            }
            // Rounding or an error? In f64 with the same weights, the step may be a few times as far from the truth as candle is.
            assert!(load == LoadDtype::Nf4, "{name} {settings} in {load:?}: {d:e} of {scale}");
            let exact = loss_gradients(&wide, &widened(&wide, &adapter, name, settings));
            let (own, candle) = (worst(&plain, &exact), worst(&oracle, &exact));
            assert!(own < 4.0 * candle, "{name} {settings} in {load:?}: {own:e} of {scale}, candle {candle:e}");
        }
    }
}

/// What frozen lower layers give may be read from memory or disk in place of being computed.
#[test]
fn frozen_lower_layers_may_be_kept() {
    let model = model_as(DType::F32, LoadDtype::F32);
    let folder = tempfile::tempdir().unwrap();
    let rows = examples();
    let build = |adapter: &Adapter, cache| {
        let mut done = 0;
        let attached = Attached::one(adapter);
        let lower = FrozenLower::build(&model, &attached, &rows, 2, cache, folder.path(), |n| done = n).unwrap();
        assert!(lower.is_none() || done == rows.len());
        lower
    };
    let upper = attach(&model, "lora", r#"{"r": 4, "layers_to_transform": [1]}"#);
    move_all(&upper);
    let plain = step_gradients(&model, &upper, false, None);
    for cache in [FrozenCache::Auto, FrozenCache::Memory, FrozenCache::Disk] {
        let lower = build(&upper, cache).unwrap();
        assert_eq!(lower.layers(), 1);
        for checkpointing in [false, true] {
            let d = worst(&plain, &step_gradients(&model, &upper, checkpointing, Some(&lower)));
            assert!(d < 1e-5, "{cache:?}: {d:e}");
        }
    }
    assert!(build(&upper, FrozenCache::Off).is_none());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file is left");
    let all = attach(&model, "lora", r#"{"r": 4}"#);
    let embedding =
        attach(&model, "lora", r#"{"layers_to_transform": [1], "modules_to_save": ["model.embed_tokens"]}"#);
    for adapter in [all, embedding] {
        assert!(build(&adapter, FrozenCache::Memory).is_none(), "nothing below is frozen");
    }
}
