//! The curve that the theory of arXiv 2406.03136 is about: how many features the chained gradient needs, by the size of queries and keys and the
//! length of the sequence, and where it stops to pay.

use lorimer_tensor::ops::attention::chained::{Head, centred, feature_count, least_degree, operations};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WIDTH: usize = 4;
const TOLERANCE: f64 = 1e-3;
const MOST: usize = 256;
const LENGTHS: [usize; 6] = [128, 256, 512, 1024, 2048, 4096];

/// Numbers of one draw for the longest sequence, between −1 and 1.
fn draw(seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..LENGTHS[5] * WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |top, v| top.max(v.abs()))
}

/// Γ and the least k of the head of the first rows, entries `size` times those of the draw; None where no degree will do.
fn least((queries, keys): (&[f64], &[f64]), rows: usize, size: f64) -> (f64, Option<u64>) {
    let scaled = |values: &[f64]| values[..rows * WIDTH].iter().map(|v| v * size).collect::<Vec<f64>>();
    let (q, k) = (scaled(queries), scaled(keys));
    let gamma = largest(&q).max(largest(&k));
    let head = Head { q: &q, k: &k, v: &k, width: WIDTH, scale: 1.0 / (WIDTH as f64).sqrt() };
    let degree = least_degree(head.largest_score(), TOLERANCE, MOST);
    (gamma, degree.and_then(|degree| feature_count(WIDTH, degree)))
}

/// For L from 128 to 4,096: k never falls with Γ nor with L, rises from some to thousands within one order of Γ, and the chained gradient, cheaper than
/// the exact one where entries are small, costs more than it where they are large; at a longer L it pays up to a larger Γ. To be seen to fail: a
/// degree by Γ alone, or costs without the number of features.
#[test]
fn features_rise_with_the_size_of_entries() {
    let sizes: Vec<f64> = (0..12).map(|i| 0.1 * 1.5f64.powi(i)).collect();
    let (mut before, mut border) = (vec![0u64; sizes.len()], 0.0);
    let (queries, keys) = (draw(1), centred(&draw(2), WIDTH));
    for rows in LENGTHS {
        let curve: Vec<(f64, Option<u64>)> = sizes.iter().map(|size| least((&queries, &keys), rows, *size)).collect();
        let features: Vec<u64> = curve.iter().map(|(_, k)| k.unwrap_or(u64::MAX)).collect();
        assert!(features.windows(2).all(|pair| pair[0] <= pair[1]), "{rows}: {curve:?}");
        assert!(features.iter().zip(&before).all(|(now, then)| now >= then), "{rows}: {curve:?}");
        assert!(features[0] <= 15 && features[9] > 5_000, "{rows}: {curve:?}");
        let pays = |k: u64| {
            let (exact, chained) = operations(rows, WIDTH, k, true);
            k != u64::MAX && chained < exact
        };
        // Up to one border it pays, and never beyond.
        let first = features.iter().position(|k| !pays(*k)).expect("it does not pay at the largest entries");
        assert!(features[first..].iter().all(|k| !pays(*k)), "{rows}: {curve:?}");
        let gamma = first.checked_sub(1).map_or(0.0, |last| curve[last].0);
        assert!(gamma >= border, "{rows}: {gamma} after {border}");
        (before, border) = (features, gamma);
    }
    // At 4,096 tokens it pays for entries of some tenths, and far from √ln L = 2.9 not any more.
    assert!(border > 0.1 && border < (4096f64).ln().sqrt(), "{border}");
}
