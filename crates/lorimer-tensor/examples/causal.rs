//! Seconds of the exact and the low-rank backward of one causal attention head on one thread, for doubling lengths: docs/limits.md.
//!
//! cargo run --release -p lorimer-tensor --example causal [WIDTH] [DEGREE] [LONGEST]

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use lorimer_tensor::{AttentionForm, CheckedGradient, GradientMeter, Gradients, LowRankGradient, Ops, Segment, Tape};
use rand::{Rng, SeedableRng};

/// dQ and the seconds of a backward, the better of two.
fn backward(inputs: [&Tensor; 4], form: &AttentionForm, how: Option<&CheckedGradient>) -> Result<(Tensor, f64)> {
    let [q, k, v, upstream] = inputs;
    let mut best: Option<(Tensor, f64)> = None;
    for _ in 0..2 {
        let (tape, segments) = (Tape::new([q, k, v]), [Segment::plain(0, q.dim(0)?)]);
        let ops = Ops::recorded(&tape);
        let y = match how {
            Some(how) => ops.attention_low_rank((q, k, v), (&segments, form), how, 0)?,
            None => ops.attention((q, k, v), &segments, form)?,
        };
        let (mut gradients, clock) = (Gradients::default(), Instant::now());
        tape.backward(&y, upstream.clone(), &mut gradients)?;
        let seconds = clock.elapsed().as_secs_f64();
        if let Some(dq) = gradients.remove(q).filter(|_| best.as_ref().is_none_or(|(_, least)| seconds < *least)) {
            best = Some((dq, seconds));
        }
    }
    best.ok_or_else(|| candle_core::Error::Msg("no gradient arrived".into()))
}

fn main() -> Result<()> {
    let given: Vec<usize> = std::env::args().skip(1).filter_map(|n| n.parse().ok()).collect();
    let (width, degree, longest) = match given[..] {
        [] => (64, 2, 8192),
        [width] => (width, 2, 8192),
        [width, degree] => (width, degree, 8192),
        [width, degree, longest, ..] => (width, degree, longest),
    };
    let (scale, mut rng) = ((width as f64).powf(-0.5), rand_chacha::ChaCha8Rng::seed_from_u64(0));
    let form = AttentionForm::causal(width, scale);
    println!("{:>8}{:>12}{:>14}{:>10}{:>16}", "L", "exact, s", "low-rank, s", "ratio", "relative error");
    let mut length = 1024;
    while length <= longest {
        let mut draw = |size: f64| {
            let data: Vec<f64> = (0..length * width).map(|_| rng.random_range(-size..size)).collect();
            Tensor::from_vec(data, (length, width), &Device::Cpu)?.to_dtype(DType::F32)
        };
        // Scores of up to 0.2 or so, with which degree 2 is within 0.01.
        let size = (0.1f64).sqrt() * (width as f64).powf(-0.25);
        let (q, k, v, upstream) = (draw(size)?, draw(size)?, draw(1.0)?, draw(1.0)?);
        let rule = LowRankGradient { degree, tolerance: 0.5, tile: 64 };
        let how = CheckedGradient { rule, meter: Arc::new(GradientMeter::new(None)) };
        let (exact, first) = backward([&q, &k, &v, &upstream], &form, None)?;
        let (near, second) = backward([&q, &k, &v, &upstream], &form, Some(&how))?;
        if how.meter.totals().low_rank == 0 {
            candle_core::bail!("the scores are too large for degree {degree}");
        }
        let largest = |t: &Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
        let error = largest(&(&near - &exact)?)? / largest(&exact)?;
        println!("{length:>8}{first:>12.4}{second:>14.4}{:>10.1}{error:>16.1e}", second / first);
        length *= 2;
    }
    Ok(())
}
