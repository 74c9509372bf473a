//! Segmented projections against their reference form.

use candle_core::DType;
use proptest::prelude::*;

use super::*;
use crate::check::{assert_close, random};

const PAGE: usize = 48;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    random((1, n), seed, DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Adapters of any rank (0 too) on any rows, rows without any, sums of two, scales of the output.
    #[test]
    fn equals_the_reference(
        groups in prop::collection::vec((0usize..3, 1usize..80, prop::collection::vec((0usize..9, any::<bool>()), 0..3)), 0..5),
        (inputs, outputs) in (1usize..40, 1usize..70),
    ) {
        let pool = numbers(64 * PAGE, 1);
        let pages: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % 64).collect();
        let paged = |start: usize, count: usize, length: usize| {
            Paged { pool: &pool, page: PAGE, pages: &pages, start: start % PAGE, count, length }
        };
        let mut rows = 0;
        let mut parts = Vec::new();
        for (before, n, additions) in groups {
            let start = rows + before;
            rows = start + n;
            let additions = additions.into_iter().enumerate().map(|(i, (rank, scaled))| Addition {
                a: paged(7 * i, rank, inputs),
                b: paged(11 * i + 1, rank, outputs),
                output_scale: scaled.then(|| paged(3 * i, 1, outputs)),
                bias: (rank % 2 == 1).then(|| paged(5 * i, 1, outputs)),
                gate: None,
                weight: 0.5 + i as f32,
            });
            parts.push(Group { rows: start..rows, additions: additions.collect() });
        }
        let x = random((rows + 2, inputs), 2, DType::F32).unwrap();
        let weights = [3, 4].map(|seed| FrozenWeight::Dense(random((outputs, inputs), seed, DType::F32).unwrap()));
        let bias = random((1, outputs), 5, DType::F32).unwrap().squeeze(0).unwrap();
        let part = |(i, weight)| Segmented { weight, bias: (i == 1).then_some(&bias), groups: parts.clone() };
        let all: Vec<_> = weights.iter().enumerate().map(part).collect();
        let fast = project_segmented(&x, &all).unwrap();
        let slow = project_segmented_reference(&x, &all).unwrap();
        for (fast, slow) in fast.iter().zip(&slow) {
            assert_close(fast, slow, 1e-4).unwrap();
        }
    }
}

/// Beside a weight of another kind, weights in 8 bits are expanded and activations not rounded: that is within the rounding of f32 of the product in
/// f64 with the same weights, hundreds of times nearer than the product in whole numbers. To be seen to fail: only the first weight asked.
#[test]
fn weights_in_8_bits_are_expanded_beside_others() -> Result<()> {
    let (rows, outputs, inputs) = (7, 33, 96);
    let x = numbers(rows * inputs, 1);
    let packed = FrozenWeight::Dense(random((outputs, inputs), 2, DType::F32)?).to_panels()?;
    let dense = FrozenWeight::Dense(packed.dense(DType::F32)?);
    let w = packed.dense(DType::F32)?.to_vec2::<f32>()?;
    let exact = |row: usize, output: usize| -> f64 {
        x[row * inputs..][..inputs].iter().zip(&w[output]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let furthest = |weights: &[Guard<'_>]| -> Result<f64> {
        let y = frozen(&x, (rows, inputs), weights)?.remove(0);
        let apart = y.iter().enumerate().map(|(i, y)| (f64::from(*y) - exact(i / outputs, i % outputs)).abs());
        Ok(apart.fold(0.0, f64::max))
    };
    let (expanded, whole) = (furthest(&[packed.guard(), dense.guard()])?, furthest(&[packed.guard()])?);
    assert!(expanded < 1e-5 && whole > 1e-5 && whole < 1e-2, "{expanded:e} expanded, {whole:e} in whole numbers");
    Ok(())
}

#[test]
fn what_lies_outside_is_refused() -> Result<()> {
    let pool = numbers(4 * PAGE, 1);
    let weight = FrozenWeight::Dense(random((6, 5), 3, DType::F32)?);
    let x = random((3, 5), 2, DType::F32)?;
    let with = |pages: &[u32], rank: usize, rows: Range<usize>| {
        let paged = |length| Paged { pool: &pool, page: PAGE, pages, start: 0, count: rank, length };
        let addition = Addition { a: paged(5), b: paged(6), output_scale: None, bias: None, gate: None, weight: 1.0 };
        let groups = vec![Group { rows, additions: vec![addition] }];
        project_segmented(&x, &[Segmented { weight: &weight, bias: None, groups }])
    };
    assert!(with(&[0], 8, 0..3).is_ok());
    assert!(with(&[0], 9, 0..3).is_err());
    assert!(with(&[4], 1, 0..3).is_err());
    assert!(with(&[0], 1, 0..4).is_err());
    let mut pool = vec![0.0; 20];
    store_rows((&mut pool, x.dim(1)?), &x, [3, 0, 1].into_iter())?;
    assert_eq!(pool[15..20], x.get(0)?.to_vec1::<f32>()?);
    assert!(store_rows((&mut pool, x.dim(1)?), &x, [4, 0, 1].into_iter()).is_err());
    assert!(store_rows((&mut pool, x.dim(1)?), &x, [0, 1].into_iter()).is_err());
    Ok(())
}
