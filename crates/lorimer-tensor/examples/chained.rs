//! Seconds of the exact and the chained backward of one attention head of width 4, at degree 2, for doubling lengths: docs/limits.md.
//!
//! cargo run --release -p lorimer-tensor --example chained [LONGEST]

use std::time::Instant;

use lorimer_tensor::ops::attention::chained::Head;
use rand::{Rng, SeedableRng};

fn main() -> candle_core::Result<()> {
    let longest: usize = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(16_384);
    let (width, degree) = (4, 2);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut length = 2048;
    println!("{:>8}{:>12}{:>12}{:>14}", "L", "exact, s", "chained, s", "largest error");
    while length <= longest {
        let mut draw = |size: f64| (0..length * width).map(|_| rng.random_range(-size..size)).collect::<Vec<f64>>();
        let (q, k, v, upstream) = (draw(0.3), draw(0.3), draw(1.0), draw(1.0));
        let head = Head { q: &q, k: &k, v: &v, width, scale: 0.5 };
        let clock = Instant::now();
        let exact = head.exact(&upstream, 64)?;
        let (first, clock) = (clock.elapsed().as_secs_f64(), Instant::now());
        let chained = head.chained(&upstream, degree)?;
        let second = clock.elapsed().as_secs_f64();
        let error = exact.q.iter().zip(&chained.q).fold(0f64, |top, (a, b)| top.max((a - b).abs()));
        println!("{length:>8}{first:>12.4}{second:>12.4}{error:>14.1e}");
        length *= 2;
    }
    Ok(())
}
