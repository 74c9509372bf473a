//! LQ-LoRA's decomposition, against its authors' formulas (see tests/goldens/make_lq_lora.py) and its own laws.

use candle_core::{DType, Device, Tensor};
use lorimer_model::weights::SafetensorsFile;
use lorimer_tensor::storage::levels::ScaleType;
use lorimer_tensor::storage::normal_float::NfConfig;
use lorimer_train::quantize::decompose::{Begin, Decomposed, Steps, Weighting, decompose};
use lorimer_train::quantize::{Format, Grid, Groups, Method, QuantizeSettings};
use rand::{Rng, SeedableRng};

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
