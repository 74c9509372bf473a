//! Element-wise work in wide registers: AVX2 where the processor has it, chosen at run time, else what the target has.
//! Sums run in sixteen lanes, so that their order, and so the result, does not depend on the choice.

use crate::kernels::real::Real;
use crate::kernels::wide::wide;

/// eˣ within 2 units in the last place for x in −87..88, clamped outside: n = round(x/ln 2), a polynomial for the rest (the
/// coefficients are those of Cephes' `expf`), and n into the exponent's bits.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    /// Adding and taking away 1.5·2²³ rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_3e-1;
    let value = p * r * r + r + 1.0;
    value * f32::from_bits(((shifted.to_bits() as i32) << 23).wrapping_add(127 << 23) as u32)
}

/// The error function within 3e-7: Abramowitz and Stegun 1964, formula 7.1.26, and near zero, where that cancels, six terms of its series (7.1.5).
#[inline(always)]
pub(crate) fn erf_f32(x: f32) -> f32 {
    let size = x.abs();
    let t = (1.0 + 0.327_591_1 * size).recip();
    let mut p = 1.061_405_4;
    p = p * t - 1.453_152;
    p = p * t + 1.421_413_7;
    p = p * t - 0.284_496_74;
    p = p * t + 0.254_829_6;
    let far = (1.0 - p * t * exp_f32(-size * size)).copysign(x);
    let square = x * x;
    let mut near = -7.575_757_6e-4;
    near = near * square + 4.629_629_6e-3;
    near = near * square - 2.380_952_4e-2;
    near = near * square + 0.1;
    near = near * square - 0.333_333_34;
    near = near * square + 1.0;
    if size < 0.6 { near * x * std::f32::consts::FRAC_2_SQRT_PI } else { far }
}

/// The sum of sixteen lanes, by halves, so that no addition waits for fifteen others.
#[inline(always)]
fn sum_of<T: Real>(mut lanes: [T; 16]) -> T {
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ f(a, b) in sixteen lanes.
#[inline(always)]
pub(crate) fn sum2<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: T = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(&a, &b)| f(a, b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    sum_of(lanes) + tail
}

/// The largest of a row.
pub(crate) fn largest<T: Real>(row: &[T]) -> T {
    wide!({
        let mut lanes = [T::neg_infinity(); 16];
        let chunks = row.chunks_exact(16);
        let rest = chunks.remainder().iter().fold(T::neg_infinity(), |top, &v| if v > top { v } else { top });
        for chunk in chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane = if v > *lane { v } else { *lane };
            }
        }
        lanes.into_iter().fold(rest, num_traits::Float::max)
    })
}

/// Puts e^(v − top) in the place of every v; gives their sum.
pub(crate) fn exp_below<T: Real>(row: &mut [T], top: T) -> T {
    wide!({
        let mut lanes = [T::zero(); 16];
        let mut chunks = row.chunks_exact_mut(16);
        for chunk in &mut chunks {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *v = (*v - top).exp_fast();
                *lane += *v;
            }
        }
        let mut sum = T::zero();
        for v in chunks.into_remainder() {
            *v = (*v - top).exp_fast();
            sum += *v;
        }
        sum_of(lanes) + sum
    })
}

/// Puts e^(v − maximum) in the place of every v; gives the maximum and the sum of the new values.
#[inline(always)]
pub(crate) fn exp_in_place<T: Real>(row: &mut [T]) -> (T, T) {
    let mut lanes = [T::neg_infinity(); 16];
    for chunk in row.chunks(16) {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    let max = lanes.into_iter().fold(T::neg_infinity(), num_traits::Float::max);
    row.iter_mut().for_each(|v| *v = (*v - max).exp_fast());
    (max, sum2(row, row, |v, _| v))
}

/// The softmax of a row, in its place.
pub(crate) fn softmax<T: Real>(row: &mut [T]) {
    wide!({
        let (_, sum) = exp_in_place(row);
        let inverse = sum.recip();
        row.iter_mut().for_each(|v| *v *= inverse);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_is_within_rounding_of_one() {
        let worst = (-60_000..60_000).map(|i| {
            let x = i as f32 * 1e-4;
            (f64::from(erf_f32(x)) - libm::erf(f64::from(x))).abs()
        });
        assert!(worst.fold(0.0, f64::max) < 3e-7);
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + f64::from(i) * (175.0 / 2e6);
            let x = x as f32;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_f32(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert!(exp_f32(-1e9) < 1e-37 && exp_f32(1e9) > 1e38 && exp_f32(0.0) == 1.0);
    }

    #[test]
    fn a_softmax_sums_to_one_at_any_length() {
        for n in [1, 2, 15, 16, 17, 100] {
            let mut row: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
            softmax(&mut row);
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}
