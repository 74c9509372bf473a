//! Weights in 8 or 4 bits for products in whole numbers.
//!
//! A weight is `d·q + m` with q a whole number and d, m half-precision numbers of a block of 32 inputs of one output: GGUF's Q4_0, Q4_1 and
//! Q8_0 are kept exactly (q in 4, 4 and 8 bits), everything else is rounded to 8 bits. In a product every block of 32 activations is rounded
//! to `s·(p + r/256)`, s its largest absolute value over 127, p and r bytes with a sign. Then
//! `Σ w x ≈ Σ_blocks d·s·(Σ q p + Σ q r / 256) + m·s·(Σ p + Σ r / 256)`, the inner sums exact in whole numbers. The error is that of the
//! activations' rounding (about s/512 each, 1.5e-5 of the block's largest; one byte, as llama.cpp takes it, gives s/2) and, where the weight was
//! rounded, of that.
//!
//! Sixteen outputs stand next to each other, so that a product reads one stream of memory and forms no sums across a register.

mod multiply;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub(crate) use multiply::products;

use std::ops::Range;

use candle_core::Result;
use half::f16;
use rayon::prelude::*;

use crate::kernels::wide::wide;

/// Inputs that share d and m, and activations that share s.
pub(crate) const BLOCK: usize = 32;
/// Outputs of a panel: the lanes of a register.
const PANEL: usize = 16;

/// A line of the cache.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix (outputs, inputs) in panels of 16 outputs. A block of a panel is 8 (or 4) lines of codes, four inputs of each output to a line
/// (in 4 bits: inputs 4i … 4i+3 in the lower and 16+4i … in the upper halves), and a line of sixteen d and sixteen m.
#[derive(Debug)]
pub struct Panels {
    lines: Vec<Line>,
    shape: (usize, usize),
    /// Lines of codes in a block: 8, or 4 for 4 bits.
    codes: usize,
}

/// 32 weights of an output.
pub(crate) struct Block {
    pub codes: [u8; BLOCK],
    pub d: f16,
    pub m: f16,
}

impl Block {
    /// The nearest in 8 bits; fewer than 32 values leave the rest zero. What is not finite makes m so.
    pub(crate) fn of(values: &[f32]) -> Self {
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let m = if values.iter().all(|v| v.is_finite()) { f16::from_f32(low) } else { f16::NAN };
        let d = f16::from_f32((high - m.to_f32()).max(0.0) / 255.0);
        let inverse = if d.to_f32() > 0.0 { d.to_f32().recip() } else { 0.0 };
        let mut codes = [0; BLOCK];
        codes.iter_mut().zip(values).for_each(|(code, v)| *code = ((v - m.to_f32()) * inverse).round() as u8);
        Self { codes, d, m }
    }
}

/// Bytes that a matrix (outputs, inputs) takes, in 4 bits or in 8.
pub fn bytes((outputs, inputs): (usize, usize), four_bits: bool) -> usize {
    outputs.div_ceil(PANEL) * inputs.div_ceil(BLOCK) * (if four_bits { 4 } else { 8 } + 1) * size_of::<Line>()
}

impl Panels {
    /// Packs the blocks that `block(output, block of inputs)` gives. Fails where a d or m is not finite.
    pub(crate) fn pack(
        (outputs, inputs): (usize, usize),
        four_bits: bool,
        block: impl Fn(usize, usize) -> Block + Sync,
    ) -> Result<Self> {
        let codes = if four_bits { 4 } else { 8 };
        let (panels, blocks) = (outputs.div_ceil(PANEL), inputs.div_ceil(BLOCK));
        let mut lines = vec![Line([0; 64]); panels * blocks * (codes + 1)];
        let finite = lines.par_chunks_mut((blocks * (codes + 1)).max(1)).enumerate().map(|(panel, lines)| {
            let mut finite = true;
            for (b, lines) in lines.chunks_exact_mut(codes + 1).enumerate() {
                for lane in 0..PANEL.min(outputs - panel * PANEL) {
                    let Block { codes: values, d, m } = block(panel * PANEL + lane, b);
                    finite &= d.is_finite() && m.is_finite();
                    for (i, code) in values.into_iter().enumerate() {
                        let (group, inside) = (i / 4, i % 4);
                        let shift = if group < codes { 0 } else { 4 };
                        lines[group % codes].0[lane * 4 + inside] |= code << shift;
                    }
                    lines[codes].0[lane * 2..][..2].copy_from_slice(&d.to_le_bytes());
                    lines[codes].0[32 + lane * 2..][..2].copy_from_slice(&m.to_le_bytes());
                }
            }
            finite
        });
        if !finite.reduce(|| true, |a, b| a && b) {
            candle_core::bail!("a weight is not finite, or beyond half precision, and cannot be kept in 8 bits");
        }
        Ok(Self { lines, shape: (outputs, inputs), codes })
    }

    /// (outputs, inputs).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Bits of a code: 4 or 8.
    pub fn bits(&self) -> usize {
        self.codes
    }

    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    fn blocks(&self) -> usize {
        self.shape.1.div_ceil(BLOCK)
    }

    /// Lines of a block of a panel.
    fn block(&self, panel: usize, block: usize) -> &[Line] {
        &self.lines[(panel * self.blocks() + block) * (self.codes + 1)..][..self.codes + 1]
    }

    /// d, m and the codes of a block of an output.
    fn unpack(&self, output: usize, block: usize) -> (f32, f32, [u8; BLOCK]) {
        let (lines, lane) = (self.block(output / PANEL, block), output % PANEL);
        let half = |at: usize| f16::from_le_bytes([lines[self.codes].0[at], lines[self.codes].0[at + 1]]).to_f32();
        let code = |i: usize| {
            let (group, byte) = (i / 4, lines[i / 4 % self.codes].0[lane * 4 + i % 4]);
            match (self.codes, group < self.codes) {
                (8, _) => byte,
                (_, true) => byte & 15,
                (_, false) => byte >> 4,
            }
        };
        (half(lane * 2), half(32 + lane * 2), std::array::from_fn(code))
    }

    /// Columns of a row as f32; the first column is a multiple of [`BLOCK`].
    pub(crate) fn expand(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        for (i, out) in out[..columns.len()].chunks_mut(BLOCK).enumerate() {
            let (d, m, codes) = self.unpack(row, columns.start / BLOCK + i);
            out.iter_mut().zip(codes).for_each(|(out, q)| *out = f32::from(q) * d + m);
        }
    }
}

/// Computes panels of a product, as [`multiply`]'s reference form does.
type Form = unsafe fn(&Rounded, &Panels, Range<usize>, *mut f32);

/// Activations in two bytes, and s/256 and s·(Σp + Σr/256) of every block.
struct Rounded {
    values: Values,
    scales: Vec<[f32; 2]>,
    blocks: usize,
}

/// The two bytes p and r of activations.
enum Values {
    /// (rows, blocks, 2, 32): p and r of a block.
    Bytes(Vec<i8>),
    /// (rows, blocks, 32): 256 p + r, each four in the order 0, 2, 1, 3.
    Pairs(Vec<i16>),
}

impl Rounded {
    fn new(x: &[f32], inputs: usize, pairs: bool) -> Self {
        let (rows, blocks) = (x.len() / inputs.max(1), inputs.div_ceil(BLOCK));
        let mut scales = vec![[0.0; 2]; rows * blocks];
        let parts = scales.par_chunks_mut(blocks.max(1)).zip(x.par_chunks(inputs.max(1))).with_min_len(8);
        let values = if pairs {
            let mut values = vec![0; rows * blocks * BLOCK];
            parts.zip(values.par_chunks_mut((blocks * BLOCK).max(1))).for_each(|((scales, x), pairs)| {
                wide!({
                    for ((pairs, scale), x) in pairs.as_chunks_mut().0.iter_mut().zip(scales).zip(x.chunks(BLOCK)) {
                        let mut values = [0; 2 * BLOCK];
                        *scale = round_block(x, &mut values);
                        pair(&values, pairs);
                    }
                });
            });
            Values::Pairs(values)
        } else {
            let mut values = vec![0; rows * blocks * 2 * BLOCK];
            parts.zip(values.par_chunks_mut((blocks * 2 * BLOCK).max(1))).for_each(|((scales, x), values)| {
                wide!({
                    for ((values, scale), x) in values.chunks_exact_mut(2 * BLOCK).zip(scales).zip(x.chunks(BLOCK)) {
                        *scale = round_block(x, values);
                    }
                });
            });
            Values::Bytes(values)
        };
        Self { values, scales, blocks }
    }

    /// The bytes; none if these are pairs.
    #[cfg(any(target_arch = "x86_64", test, doc))]
    fn bytes(&self) -> &[i8] {
        match &self.values {
            Values::Bytes(values) => values,
            Values::Pairs(_) => &[],
        }
    }

    /// The pairs; none if these are bytes.
    fn pairs(&self) -> &[i16] {
        match &self.values {
            Values::Pairs(values) => values,
            Values::Bytes(_) => &[],
        }
    }
}

/// Puts the two bytes of each of 32 activations together.
#[inline(always)]
fn pair(values: &[i8; 2 * BLOCK], pairs: &mut [i16; BLOCK]) {
    let (first, second) = values.split_at(BLOCK);
    let mut all = [0i16; BLOCK];
    for ((all, &p), &r) in all.iter_mut().zip(first).zip(second) {
        *all = i16::from(p) * 256 + i16::from(r);
    }
    for (pairs, four) in pairs.as_chunks_mut::<4>().0.iter_mut().zip(all.as_chunks::<4>().0) {
        *pairs = [four[0], four[2], four[1], four[3]];
    }
}

/// [`round`], compiled for whole blocks and for parts of one.
#[inline(always)]
fn round_block(x: &[f32], values: &mut [i8]) -> [f32; 2] {
    match <&[f32; BLOCK]>::try_from(x) {
        Ok(x) => round(x, values),
        Err(_) => round(x, values),
    }
}

/// Rounds up to 32 activations to 32 bytes of p and as many of r; s/256 and s·(Σp + Σr/256). What is not finite makes both NaN.
#[inline(always)]
fn round(x: &[f32], values: &mut [i8]) -> [f32; 2] {
    /// Adding and taking away 1.5·2²³ rounds to a whole number, half to even; until then it is in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // Absolute values are ordered as their bits are, and what is not finite is above them.
    let largest = x.iter().map(|v| v.to_bits() & (u32::MAX >> 1)).max().unwrap_or(0);
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return [f32::NAN; 2];
    }
    // Where 1/s is beyond f32 the activations are as good as zero.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let (first, second) = values.split_at_mut(BLOCK);
    let mut sum = 0i32;
    for ((p, r), &x) in first.iter_mut().zip(second).zip(x) {
        let scaled = x * inverse;
        let shifted = scaled + ROUND;
        let rest = (scaled - (shifted - ROUND)) * 256.0;
        let rest = (rest.clamp(-127.0, 127.0) + ROUND).to_bits() as i8;
        (*p, *r) = (shifted.to_bits() as i8, rest);
        sum += i32::from(shifted.to_bits() as i8) * 256 + i32::from(rest);
    }
    let unit = largest / (127.0 * 256.0);
    [unit, unit * sum as f32]
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Device, Tensor};

    use super::multiply::{forms, products_by};
    use super::*;
    use crate::check::random;
    use crate::storage::FrozenWeight;

    fn numbers(shape: (usize, usize), seed: u64) -> Vec<f32> {
        random(shape, seed, DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("numbers")
    }

    fn panels(weight: &FrozenWeight) -> std::sync::Arc<Panels> {
        match weight.to_panels().expect("8 bits") {
            FrozenWeight::Panels(panels) => panels,
            other => panic!("{}", other.storage_name()),
        }
    }

    /// GGUF's 4 and 8 bits come back exactly, other weights within half a step of their block.
    #[test]
    fn weights_come_back() -> Result<()> {
        let shape = (37, 96);
        let dense = Tensor::from_vec(numbers(shape, 1), shape, &Device::Cpu)?;
        for (kind, bits) in [(GgmlDType::Q4_0, 4), (GgmlDType::Q4_1, 4), (GgmlDType::Q8_0, 8)] {
            let blocks = FrozenWeight::from_ggml(kind, &QTensor::quantize(&dense, kind)?.data()?, shape)?;
            let packed = panels(&blocks);
            assert_eq!((packed.bits(), packed.bytes()), (bits, bytes(shape, bits == 4)));
            let back = FrozenWeight::Panels(packed).dense(DType::F32)?;
            let difference = (back - blocks.dense(DType::F32)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference <= 1e-6, "{kind:?}: {difference:e}");
        }
        for inputs in [1, 31, 33, 96] {
            let values = numbers((5, inputs), 2);
            let packed = panels(&FrozenWeight::Dense(Tensor::from_slice(&values, (5, inputs), &Device::Cpu)?));
            let mut back = vec![0f32; inputs];
            for (row, values) in values.chunks(inputs).enumerate() {
                packed.expand(row, 0..inputs, &mut back);
                for (back, values) in back.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let range = most - values.iter().copied().fold(f32::INFINITY, f32::min);
                    let bound = range / 255.0 * 0.75 + most.abs().max(range) / 1024.0;
                    back.iter().zip(values).for_each(|(a, b)| assert!((a - b).abs() <= bound, "{a} for {b}"));
                }
            }
        }
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e6] {
            let weight = Tensor::from_slice(&[1e6f32, bad], (1, 2), &Device::Cpu)?;
            assert!(FrozenWeight::Dense(weight).to_panels().is_err(), "{bad}");
            let weight = Tensor::from_slice(&[1f32, bad], (1, 2), &Device::Cpu)?;
            assert_eq!(FrozenWeight::Dense(weight).to_panels().is_err(), bad != 1e6, "{bad}");
        }
        Ok(())
    }

    /// The reference form against the product in f64 with the same weights, within what rounding activations can do; the others that the processor
    /// has against it, and against each other to the bit. To be seen to fail: `whole` of [`plain`] without the second byte of activations,
    /// [`vnni`]'s `second` and `first` the other way round, [`pair`] in the order 0, 1, 2, 3, or `high` and `low` of [`portable`] exchanged.
    #[test]
    fn products_are_within_the_rounding_of_activations() -> Result<()> {
        for (rows, outputs, inputs) in [(1, 40, 64), (3, 17, 100), (13, 33, 576), (29, 70, 32), (64, 16, 7)] {
            let x = numbers((rows, inputs), 3);
            let dense =
                FrozenWeight::Dense(Tensor::from_vec(numbers((outputs, inputs), 4), (outputs, inputs), &Device::Cpu)?);
            let mut weights = vec![panels(&dense)];
            if inputs.is_multiple_of(32) {
                let w = dense.dense(DType::F32)?;
                let blocks = QTensor::quantize(&w, GgmlDType::Q4_1)?;
                weights.push(panels(&FrozenWeight::from_ggml(GgmlDType::Q4_1, &blocks.data()?, (outputs, inputs))?));
            }
            let all: Vec<&Panels> = weights.iter().map(|w| &**w).collect();
            let results: Vec<Vec<Vec<f32>>> =
                forms().into_iter().map(|form| products_by(&x, inputs, &all, form)).collect();
            let (slow, fast) = results.split_first().expect("the reference form");
            assert_eq!(slow, &fast[0]);
            for other in fast.iter().skip(2) {
                assert_eq!(other, &fast[1]);
            }
            for (i, weight) in all.iter().enumerate() {
                let mut w = vec![0f32; inputs];
                for output in 0..outputs {
                    weight.expand(output, 0..inputs, &mut w);
                    for row in 0..rows {
                        let x = &x[row * inputs..][..inputs];
                        let exact: f64 = x.iter().zip(&w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let bound: f64 = x
                            .chunks(BLOCK)
                            .zip(w.chunks(BLOCK))
                            .map(|(x, w)| {
                                let s = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                                w.iter().map(|w| f64::from(w.abs() * s) / 255.0).sum::<f64>()
                            })
                            .sum();
                        let slow = slow[i][row * outputs + output];
                        assert!((f64::from(slow) - exact).abs() <= bound + 1e-5, "{slow} for {exact}, bound {bound}");
                        for fast in fast {
                            let fast = fast[i][row * outputs + output];
                            assert!((fast - slow).abs() <= 1e-5 * (1.0 + slow.abs()), "{fast} for {slow}");
                        }
                    }
                }
            }
            // A row alone gives the same bits.
            for (together, form) in results.iter().zip(forms()) {
                for row in 0..rows {
                    let alone = products_by(&x[row * inputs..][..inputs], inputs, &all, form);
                    for (alone, together) in alone.iter().zip(together) {
                        assert_eq!(alone[..], together[row * outputs..][..outputs]);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let weight = FrozenWeight::Dense(Tensor::ones((3, 40), DType::F32, &Device::Cpu).expect("ones"));
        let weight = panels(&weight);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1f32; 80];
            x[3] = bad;
            let y = products(&x, 40, &[&weight]).remove(0);
            assert!(y[..3].iter().all(|v| v.is_nan()) && y[3..].iter().all(|v| (v - 40.0).abs() < 0.1), "{y:?}");
        }
    }
}
