//! LQ-LoRA's decomposition, against its authors' formulas (see tests/goldens/make_lq_lora.py) and its own laws.

use std::collections::{BTreeMap, HashSet};

use candle_core::{DType, Device, Tensor};
use lorimer_model::Site;
use lorimer_model::weights::SafetensorsFile;
use lorimer_tensor::storage::levels::ScaleType;
use lorimer_tensor::storage::normal_float::NfConfig;
use lorimer_train::calibrate::{Sum, gradients};
use lorimer_train::quantize::decompose::{Begin, Decomposed, Steps, Weighting, decompose};
use lorimer_train::quantize::{Format, Grid, Groups, Method, QuantizeSettings};
use lorimer_train::run::step::batch_loss;
use rand::{Rng, SeedableRng};

use crate::prelude::{Adapter, Attached, Example, Frozen, LoadDtype, methods};
use crate::support::{folder, json};

const STEPS: Steps = Steps { rank: 8, most: 100, tolerance: 0.0, begin: Begin::LowRank, seed: 0 };

fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    // Rows of different size, as weights have.
    let value = |i: usize| rng.random_range(-1.0..1.0f32) * (1.0 + (i / shape.1 % 7) as f32);
    Tensor::from_vec((0..shape.0 * shape.1).map(value).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

fn config(bits: usize) -> NfConfig {
    NfConfig { bits, scale_bits: 8, scale_type: ScaleType::F32, block: 16, scale_block: 16 }
}

fn dense(found: &Decomposed) -> (Tensor, Tensor) {
    let shape = found.quantised.shape();
    let q = Tensor::from_vec(found.quantised.expanded(), shape, &Device::Cpu).unwrap();
    let change = match &found.factors {
        Some((left, right)) => left.matmul(right).unwrap(),
        None => q.zeros_like().unwrap(),
    };
    (q, change)
}

fn norm(t: &Tensor) -> f64 {
    f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// The errors of the alternation are the authors' while rounding lets them, and what is kept is no worse than the best of theirs.
#[test]
fn errors_fall_as_the_authors_do() {
    let file = SafetensorsFile::open(&folder("lq_lora.safetensors")).unwrap();
    let get = |name: &str| file.load(name).unwrap().unwrap();
    for run in json(&folder("lq_lora.json"))["runs"].as_array().unwrap() {
        let n = |i: usize| run["config"][i].as_u64().unwrap() as usize;
        let scale_type = if run["config"][2] == "bf16" { ScaleType::Bf16 } else { ScaleType::F32 };
        let config = NfConfig { bits: n(0), scale_bits: n(1), scale_type, block: n(3), scale_block: n(4) };
        let weighting = match run["weighted"].as_bool().unwrap() {
            true => Weighting::new(&get("fisher")).unwrap(),
            false => None,
        };
        let steps = Steps { rank: run["rank"].as_u64().unwrap() as usize, ..STEPS };
        let found = decompose(&get("small"), &config, steps, weighting.as_ref()).unwrap();
        let expected: Vec<f64> = run["errors"].as_array().unwrap().iter().map(|e| e.as_f64().unwrap()).collect();
        // A rank of 22 leaves ten directions, all that there are; of 8 the randomised SVD is near. Later steps differ by weights that rounding puts
        // at another level.
        let first = if steps.rank == 22 { 1e-4 } else { 1e-2 };
        assert!((found.steps[0] - expected[0]).abs() <= first * expected[0], "{} for {}", found.steps[0], expected[0]);
        for (a, b) in found.steps.iter().zip(&expected).take(3) {
            assert!((a - b).abs() <= 2e-2 * b, "{a} for {b} in {run}");
        }
        let best = expected.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(found.error.sqrt() <= best * 1.02, "{} for {best}", found.error.sqrt());
        let own = found.steps.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(found.error.sqrt() <= own, "a worse pair was kept");
        let (q, change) = dense(&found);
        if weighting.is_none() {
            let error = norm(&(get("small") - q).unwrap().sub(&change).unwrap());
            assert!((error - found.error.sqrt()).abs() < 1e-3 * error);
        }
    }
}

/// To be seen to fail: the last pair kept in the place of the best; `Begin::Quantised` without the first pair.
#[test]
fn a_change_repairs_more_than_quantising_alone_leaves() {
    for (shape, seed) in [((24, 40), 1), ((64, 33), 2), ((48, 48), 3)] {
        let w = random(shape, seed);
        for bits in [2, 3, 4] {
            for begin in [Begin::LowRank, Begin::Quantised] {
                let with =
                    |rank, most| decompose(&w, &config(bits), Steps { rank, most, begin, ..STEPS }, None).unwrap();
                let alone = with(0, 1);
                assert!(alone.factors.is_none() && alone.error == alone.plain);
                let mut last = alone.error;
                for rank in [1, 4, 12] {
                    let found = with(rank, 100);
                    assert!(found.error < last, "{shape:?} at {bits} bits and rank {rank}: {} and {last}", found.error);
                    assert_eq!(found.plain, alone.error);
                    assert!(with(rank, 3).error >= found.error);
                    last = found.error;
                }
                let whole = with(shape.0.min(shape.1), 2);
                assert!(whole.error.sqrt() <= 1e-5 * norm(&w), "{}", whole.error.sqrt());
            }
        }
        assert!(decompose(&w, &config(3), Steps { rank: 99, ..STEPS }, None).is_err());
    }
}

#[test]
fn equal_weights_are_none_and_their_size_does_not_count() {
    let w = random((32, 48), 4);
    let plain = decompose(&w, &config(3), STEPS, None).unwrap();
    let ones = Weighting::new(&(w.ones_like().unwrap() * 3.0).unwrap()).unwrap();
    let weighted = decompose(&w, &config(3), STEPS, ones.as_ref()).unwrap();
    assert!((weighted.error - 3.0 * plain.error).abs() < 1e-3 * weighted.error);
    let (a, b) = (dense(&plain), dense(&weighted));
    assert!(norm(&(a.0 - b.0).unwrap()) < 1e-5 && norm(&(a.1 - b.1).unwrap()) < 1e-4);
    // F times seven, its rows very different, one of them without gradients.
    let rows: Vec<f32> = (0..32).map(|i| if i == 5 { 0.0 } else { 4f32.powi(i % 5) }).collect();
    let fisher = random((32, 48), 5).sqr().unwrap();
    let fisher = fisher.broadcast_mul(&Tensor::from_vec(rows, (32, 1), &Device::Cpu).unwrap()).unwrap();
    let of = |f: &Tensor| decompose(&w, &config(3), STEPS, Weighting::new(f).unwrap().as_ref()).unwrap();
    let (one, seven) = (of(&fisher), of(&(&fisher * 7.0).unwrap()));
    assert!((seven.error - 7.0 * one.error).abs() < 1e-2 * seven.error, "{} {}", one.error, seven.error);
    // What matters is repaired better than without.
    let error = |found: &Decomposed| {
        let (q, change) = dense(found);
        let d = (&w - q).unwrap().sub(&change).unwrap().sqr().unwrap().mul(&fisher).unwrap();
        d.sum_all().unwrap().to_scalar::<f32>().unwrap()
    };
    assert!(error(&one) < error(&plain), "{} {}", error(&one), error(&plain));
    assert!(Weighting::new(&fisher.zeros_like().unwrap()).unwrap().is_none());
    assert!(Weighting::new(&(&fisher * -1.0).unwrap()).is_err());
    assert!(Weighting::new(&Tensor::full(f32::NAN, (2, 2), &Device::Cpu).unwrap()).is_err());
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let w = Tensor::full(f32::INFINITY, (16, 16), &Device::Cpu).unwrap();
    assert!(decompose(&w, &config(3), STEPS, None).is_err());
    let zero = Tensor::zeros((16, 16), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(decompose(&zero, &config(3), STEPS, None).unwrap().error, 0.0);
}

#[test]
fn grids_and_settings() {
    assert_eq!((Grid::Small.configs().len(), Grid::Paper.configs().len()), (13, 432));
    let good = QuantizeSettings {
        method: Method::LqLora,
        bits: 2.75,
        rank: 8,
        alpha: 16.0,
        grid: Grid::Small,
        steps: 10,
        seed: 0,
        format: Format::LorimerNf,
        groups: None,
    };
    good.check().unwrap();
    QuantizeSettings { method: Method::Nf, bits: 4.0, rank: 0, format: Format::Bitsandbytes, ..good }.check().unwrap();
    let groups = |size, symmetric| Some(Groups { size, symmetric });
    let grouped = QuantizeSettings {
        method: Method::Rtn,
        bits: 4.0,
        rank: 0,
        format: Format::Gptq,
        groups: groups(Some(64), true),
        ..good
    };
    grouped.check().unwrap();
    QuantizeSettings { method: Method::Gptq, groups: groups(None, false), ..grouped }.check().unwrap();
    QuantizeSettings { format: Format::Awq, groups: groups(Some(8), false), ..grouped }.check().unwrap();
    for bad in [
        QuantizeSettings { bits: f64::NAN, ..good },
        QuantizeSettings { bits: -1.0, ..good },
        QuantizeSettings { rank: 0, ..good },
        QuantizeSettings { alpha: f64::INFINITY, ..good },
        QuantizeSettings { alpha: 0.0, ..good },
        QuantizeSettings { steps: 0, ..good },
        QuantizeSettings { method: Method::Loftq, ..good },
        QuantizeSettings { method: Method::Nf, bits: 3.0, ..good },
        QuantizeSettings { format: Format::Bitsandbytes, ..good },
        QuantizeSettings { method: Method::Nf, rank: 0, bits: 3.0, format: Format::Bitsandbytes, ..good },
        QuantizeSettings { groups: groups(Some(64), true), ..good },
        QuantizeSettings { format: Format::Gptq, ..good },
        QuantizeSettings { bits: 3.0, ..grouped },
        QuantizeSettings { rank: 4, ..grouped },
        QuantizeSettings { groups: None, ..grouped },
        QuantizeSettings { groups: groups(Some(0), true), ..grouped },
        QuantizeSettings { groups: groups(Some(12), true), ..grouped },
        QuantizeSettings { format: Format::LorimerNf, ..grouped },
        QuantizeSettings { format: Format::Bitsandbytes, ..grouped },
        QuantizeSettings { format: Format::Awq, ..grouped },
    ] {
        let told = bad.check().unwrap_err().to_string();
        assert!(told.lines().count() == 1 && !told.is_empty(), "{bad:?}");
    }
}

/// F is the sum over rows of each row's squared gradient of its own mean loss, whatever rows are beside it; the oracle is candle's own graph over
/// trained copies of all weights. To be seen to fail: the square of the sum, or the mean over all tokens.
#[test]
fn squares_are_those_of_each_rows_gradient() {
    let model = crate::tiny::model();
    let rows = crate::tiny::examples();
    let rows: Vec<&Example> = rows.iter().collect();
    let all = serde_json::json!({ "target_modules": "all-linear" });
    let lora = methods::build("lora", all.as_object().unwrap()).unwrap();
    let mut found = BTreeMap::new();
    let add = |layer: Vec<(&Site, Tensor)>| {
        layer.into_iter().for_each(|(site, squares)| drop(found.insert(site.path.clone(), squares)));
        Ok(())
    };
    gradients(&model, lora.as_ref(), &rows, (1, Sum::Squares), add, |_, _| {}).unwrap();
    let full = Adapter::attach(&model, methods::build("full", all.as_object().unwrap()).unwrap(), 0).unwrap();
    let mut expected: BTreeMap<String, Tensor> = BTreeMap::new();
    for row in &rows {
        let (sum, supervised, _) = batch_loss(&model, &Attached::one(&full), &[row]).unwrap();
        let gradients = (sum / supervised as f64).unwrap().backward().unwrap();
        for (name, var) in full.trainable() {
            let path = name.rsplit_once('.').unwrap().0.to_string();
            let square = gradients.get(var.as_tensor()).unwrap().sqr().unwrap();
            let sum = match expected.remove(&path) {
                Some(sum) => (sum + square).unwrap(),
                None => square,
            };
            expected.insert(path, sum);
        }
    }
    assert_eq!((found.len(), expected.len()), (14, 14));
    for (path, squares) in &found {
        let own = expected[path].to_dtype(DType::F64).unwrap();
        let largest = crate::tiny::distance(&own, &own.zeros_like().unwrap());
        assert!(largest > 0.0 && crate::tiny::distance(squares, &own) < 1e-10 * largest, "{path}");
    }
}

/// Training on a base in few bits has gradients of the adapter's parameters and of nothing else, and the base is afterwards what it was, bit for bit.
#[test]
fn a_quantised_base_has_no_gradient() {
    for name in ["lorimer-nf", "bnb-nf4-double", "gptq-act-order-v2"] {
        let (config, weights) =
            lorimer_model::base::open_weights(&folder("packed").join(name), LoadDtype::Stored).unwrap();
        let model = config.load(&weights).unwrap();
        let model = model.as_ref();
        let rows = crate::tiny::examples();
        let rows: Vec<&Example> = rows.iter().collect();
        let tokens: Vec<Vec<u32>> = rows.iter().map(|row| row.tokens.clone()).collect();
        let before = crate::support::logits(model, &Frozen, &tokens).to_vec2::<f32>().unwrap();
        let all = serde_json::json!({ "r": 2, "target_modules": "all-linear" });
        let adapter = Adapter::attach(model, methods::build("lora", all.as_object().unwrap()).unwrap(), 0).unwrap();
        let parameters = adapter.trainable();
        let mut weights: HashSet<Vec<usize>> =
            model.projections().iter().map(|(site, _)| vec![site.outputs, site.inputs]).collect();
        weights.insert(vec![model.shape().vocabulary, model.shape().hidden]);
        let own: HashSet<_> = parameters.iter().map(|(_, var)| var.as_tensor().id()).collect();
        for _ in 0..2 {
            let (sum, supervised, _) = batch_loss(model, &Attached::one(&adapter), &rows).unwrap();
            let found = (sum / supervised as f64).unwrap().backward().unwrap();
            assert_eq!(found.get_ids().filter(|id| own.contains(id)).count(), parameters.len(), "{name}");
            // What else there is belongs to rows, and nothing has the shape of a weight.
            for id in found.get_ids().filter(|id| !own.contains(id)) {
                let shape = found.get_id(*id).unwrap().dims();
                assert!(!weights.contains(shape), "{name}: a gradient of shape {shape:?}");
            }
            for (_, var) in &parameters {
                let moved = (var.as_tensor() - (found.get(var.as_tensor()).unwrap() * 0.5).unwrap()).unwrap();
                var.set(&moved.detach()).unwrap();
            }
        }
        let trained = crate::support::logits(model, &Attached::one(&adapter), &tokens).to_vec2::<f32>().unwrap();
        assert_ne!(trained, before, "{name}");
        assert_eq!(crate::support::logits(model, &Frozen, &tokens).to_vec2::<f32>().unwrap(), before, "{name}");
    }
}
