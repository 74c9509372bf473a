//! GGUF's blocks, as they lie in its files, and their numbers in f32. A product expands a few rows at a time, so this is what reading a weight costs:
//! in AVX2's registers where the processor has them, else in loops that the compiler vectorises (the rare types by candle).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scales;

use std::ops::Range;

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{BlockQ2K, BlockQ3K, BlockQ8_1, BlockQ8K, GgmlType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::panels;
use crate::kernels::cpu::{Level, level};
use crate::kernels::portable;
use crate::kernels::wide::wide;
use scales::scales;

/// GGUF blocks of a matrix, row by row.
#[derive(Debug)]
pub struct Blocks {
    bytes: Vec<u8>,
    shape: (usize, usize),
    dtype: GgmlDType,
}

impl Blocks {
    /// The raw bytes of an `(outputs, inputs)` matrix, whose rows hold whole blocks.
    pub(super) fn new(dtype: GgmlDType, bytes: Vec<u8>, shape: (usize, usize)) -> Result<Self> {
        let blocks = Self { bytes, shape, dtype };
        if blocks.bytes.len() != shape.0 * blocks.row_bytes() {
            let (row_bytes, found) = (blocks.row_bytes(), blocks.bytes.len());
            candle_core::bail!("{} rows of {row_bytes} bytes expected, found {found} bytes", shape.0);
        }
        Ok(blocks)
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(super) fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn row_bytes(&self) -> usize {
        self.shape.1 / self.dtype.block_size() * self.dtype.type_size()
    }

    /// Whether weights are 4 (or 8) bits with half-precision numbers for 32 of them, which [`panels::Panels`] keep exactly.
    pub(super) fn affine_bits(&self) -> Option<usize> {
        match self.dtype {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 => Some(4),
            GgmlDType::Q8_0 => Some(8),
            _ => None,
        }
    }

    /// A block of a matrix that has [`Self::affine_bits`].
    pub(super) fn affine(&self, row: usize, block: usize) -> panels::Block {
        let bytes = &self.bytes[row * self.row_bytes() + block * self.dtype.type_size()..][..self.dtype.type_size()];
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let d = half(0);
        let nibbles = |bytes: &[u8]| std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 });
        match self.dtype {
            GgmlDType::Q4_0 => panels::Block { codes: nibbles(&bytes[2..]), d, m: f16::from_f32(-8.0 * d.to_f32()) },
            GgmlDType::Q4_1 => panels::Block { codes: nibbles(&bytes[4..]), d, m: half(2) },
            _ => panels::Block {
                codes: std::array::from_fn(|i| bytes[2 + i].wrapping_add(128)),
                d,
                m: f16::from_f32(-128.0 * d.to_f32()),
            },
        }
    }

    /// Whether there are dot products of a row or two that need no expanded numbers. The processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_dots(&self) -> bool {
        avx2::has_dots(self.dtype)
    }

    /// Dot products of rows of the matrix with M rows of x, to the bit as those with expanded numbers.
    ///
    /// # Safety
    ///
    /// The processor has AVX2, FMA and F16C; `x` holds M rows as long as the matrix's, `stride` apart.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn dots<const M: usize>(
        &self,
        rows: [usize; avx2::COLUMNS],
        x: *const f32,
        stride: usize,
    ) -> [[f32; M]; avx2::COLUMNS] {
        let blocks = rows.map(|row| &self.bytes[row * self.row_bytes()..][..self.row_bytes()]);
        // SAFETY: the caller's; a row of x has as many numbers as these rows of blocks.
        unsafe { avx2::dots(self.dtype, blocks, x, stride) }
    }

    /// Columns of a row as f32; the first is a multiple of the block's size.
    pub(super) fn expand(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let start = row * self.row_bytes() + columns.start / self.dtype.block_size() * self.dtype.type_size();
        expand(self.dtype, &self.bytes[start..], &mut out[..columns.len()]);
    }
}

/// The numbers of as many blocks as `out` has room for.
fn expand(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor has AVX2 and F16C.
    if level() >= Level::Avx2 && unsafe { avx2::expand(dtype, bytes, out) } {
        return;
    }
    in_loops(dtype, bytes, out);
}

/// [`expand`] for every processor.
fn in_loops(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        GgmlDType::F32 => {
            let numbers = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            out.iter_mut().zip(numbers).for_each(|(out, v)| *out = v);
        }
        GgmlDType::F16 if level() == Level::Plain => {
            let numbers = bytes.as_chunks().0.iter().map(|&b| portable::half(u16::from_le_bytes(b)));
            out.iter_mut().zip(numbers).for_each(|(out, v)| *out = v);
        }
        GgmlDType::F16 => {
            // A row of a file's bytes need not be aligned.
            for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                let mut halves = [f16::ZERO; 64];
                halves.iter_mut().zip(bytes.as_chunks().0).for_each(|(h, &b)| *h = f16::from_le_bytes(b));
                halves[..out.len()].convert_to_f32_slice(out);
            }
        }
        GgmlDType::BF16 => wide!({
            let numbers = bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b));
            out.iter_mut().zip(numbers).for_each(|(out, v)| *out = f32::from_bits(u32::from(v.to_bits()) << 16));
        }),
        GgmlDType::Q4_0 => each::<18, 32>(bytes, out, |b, out| {
            let (d, codes) = (half(b, 0), fours(&b[2..]));
            out.iter_mut().zip(codes).for_each(|(out, q)| *out = f32::from(q as i8 - 8) * d);
        }),
        GgmlDType::Q4_1 => each::<20, 32>(bytes, out, |b, out| {
            let (d, m, codes) = (half(b, 0), half(b, 2), fours(&b[4..]));
            out.iter_mut().zip(codes).for_each(|(out, q)| *out = f32::from(q) * d + m);
        }),
        GgmlDType::Q5_0 => each::<22, 32>(bytes, out, |b, out| {
            let (d, codes) = (half(b, 0), fives(&b[2..]));
            out.iter_mut().zip(codes).for_each(|(out, q)| *out = f32::from(q as i8 - 16) * d);
        }),
        GgmlDType::Q5_1 => each::<24, 32>(bytes, out, |b, out| {
            let (d, m, codes) = (half(b, 0), half(b, 2), fives(&b[4..]));
            out.iter_mut().zip(codes).for_each(|(out, q)| *out = f32::from(q) * d + m);
        }),
        GgmlDType::Q8_0 => each::<34, 32>(bytes, out, |b, out| {
            let d = half(b, 0);
            out.iter_mut().zip(&b[2..]).for_each(|(out, &q)| *out = f32::from(q as i8) * d);
        }),
        GgmlDType::Q4K => each::<144, 256>(bytes, out, |b, out| {
            let halves = [half(b, 0), half(b, 2)];
            for (part, (out, q)) in out.as_chunks_mut::<64>().0.iter_mut().zip(b[16..].as_chunks::<32>().0).enumerate()
            {
                let ([d1, m1], [d2, m2]) = (scales(b, halves, 2 * part), scales(b, halves, 2 * part + 1));
                let (low, high) = out.split_at_mut(32);
                for ((low, high), &q) in low.iter_mut().zip(high).zip(q) {
                    *low = d1 * f32::from(q & 15) - m1;
                    *high = d2 * f32::from(q >> 4) - m2;
                }
            }
        }),
        GgmlDType::Q5K => each::<176, 256>(bytes, out, |b, out| {
            let (halves, (qh, ql)) = ([half(b, 0), half(b, 2)], b[16..].split_at(32));
            for (part, (out, ql)) in out.as_chunks_mut::<64>().0.iter_mut().zip(ql.as_chunks::<32>().0).enumerate() {
                let ([d1, m1], [d2, m2]) = (scales(b, halves, 2 * part), scales(b, halves, 2 * part + 1));
                let (low, high) = out.split_at_mut(32);
                for (((low, high), &ql), &qh) in low.iter_mut().zip(high).zip(ql).zip(qh) {
                    let qh = qh >> (2 * part);
                    *low = d1 * f32::from(ql & 15 | (qh & 1) << 4) - m1;
                    *high = d2 * f32::from(ql >> 4 | (qh & 2) << 3) - m2;
                }
            }
        }),
        GgmlDType::Q6K => each::<210, 256>(bytes, out, |b, out| {
            let d = half(b, 208);
            for (part, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (ql, qh) = (&b[part * 64..][..64], &b[128 + part * 32..][..32]);
                let scale = |i: usize| d * f32::from(b[192 + part * 8 + i] as i8);
                for (quarter, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (ql, shift) = (&ql[quarter % 2 * 32..][..32], quarter / 2 * 4);
                    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                        let scale = scale(quarter * 2 + i);
                        for ((out, &ql), &qh) in out.iter_mut().zip(&ql[i * 16..]).zip(&qh[i * 16..]) {
                            let q = ql >> shift & 15 | (qh >> (quarter * 2) & 3) << 4;
                            *out = scale * f32::from(q as i8 - 32);
                        }
                    }
                }
            }
        }),
        GgmlDType::Q8_1 => by_candle::<BlockQ8_1>(bytes, out),
        GgmlDType::Q2K => by_candle::<BlockQ2K>(bytes, out),
        GgmlDType::Q3K => by_candle::<BlockQ3K>(bytes, out),
        GgmlDType::Q8K => by_candle::<BlockQ8K>(bytes, out),
    }
}

/// Blocks of `BYTES` bytes that hold `N` numbers, one after the other.
fn each<const BYTES: usize, const N: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn(&[u8; BYTES], &mut [f32; N])) {
    for (bytes, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        one(bytes, out);
    }
}

#[inline(always)]
fn half(bytes: &[u8], at: usize) -> f32 {
    portable::half(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// 32 numbers of 4 bits: the lower halves of 16 bytes, then the upper ones. A function of its own: with what is done with the numbers the compiler
/// takes the bytes one by one.
#[inline(never)]
fn fours(bytes: &[u8]) -> [u8; 32] {
    let mut codes = [0; 32];
    let (first, second) = codes.split_at_mut(16);
    for ((first, second), &q) in first.iter_mut().zip(second).zip(bytes) {
        (*first, *second) = (q & 15, q >> 4);
    }
    codes
}

/// 32 numbers of 5 bits: four bytes of fifth bits, then the others as in Q4.
#[inline(always)]
fn fives(bytes: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes(std::array::from_fn(|i| bytes[i]));
    let mut codes = [0; 32];
    let (first, second) = codes.split_at_mut(16);
    for (j, ((first, second), &q)) in first.iter_mut().zip(second).zip(&bytes[4..20]).enumerate() {
        *first = q & 15 | ((high >> j & 1) << 4) as u8;
        *second = q >> 4 | ((high >> (j + 16) & 1) << 4) as u8;
    }
    codes
}

fn by_candle<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.chunks_exact(size_of::<B>()).zip(out.chunks_exact_mut(B::BLCK_SIZE)) {
        // SAFETY: `bytes` has the size of a block, and every pattern of bytes is one: blocks are `repr(C)` out of
        // integers and half-precision numbers.
        let block = unsafe { bytes.as_ptr().cast::<B>().read_unaligned() };
        B::to_float(&[block], out);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{
        BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
    };
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Blocks of any bytes, in every form that the processor has, to the bit as candle expands them (NaNs as NaNs). To be seen to fail: `high >> (j + 12)`
    /// in [`fives`], the two `>> 6` of [`scales`] exchanged, or any number of `avx2.rs` changed.
    #[test]
    fn blocks_are_expanded_as_candle_does() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut against = |dtype: GgmlDType, reference: fn(&[u8], &mut [f32])| {
            for blocks in [1, 2, 7, 300] {
                let bytes: Vec<u8> = (0..blocks * dtype.type_size()).map(|_| rng.random()).collect();
                let (mut own, mut theirs) =
                    (vec![0f32; blocks * dtype.block_size()], vec![1f32; blocks * dtype.block_size()]);
                reference(&bytes, &mut theirs);
                for form in [expand, in_loops] {
                    form(dtype, &bytes, &mut own);
                    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                    let bad = own.iter().zip(&theirs).position(|pair| !same(pair));
                    let at = bad.unwrap_or(0);
                    assert!(bad.is_none(), "{dtype:?}: number {at} is {:?} for {:?}", own[at], theirs[at]);
                }
            }
        };
        against(GgmlDType::F32, by_candle::<f32>);
        against(GgmlDType::F16, by_candle::<f16>);
        against(GgmlDType::BF16, by_candle::<bf16>);
        against(GgmlDType::Q4_0, by_candle::<BlockQ4_0>);
        against(GgmlDType::Q4_1, by_candle::<BlockQ4_1>);
        against(GgmlDType::Q5_0, by_candle::<BlockQ5_0>);
        against(GgmlDType::Q5_1, by_candle::<BlockQ5_1>);
        against(GgmlDType::Q8_0, by_candle::<BlockQ8_0>);
        against(GgmlDType::Q8_1, by_candle::<BlockQ8_1>);
        against(GgmlDType::Q2K, by_candle::<BlockQ2K>);
        against(GgmlDType::Q3K, by_candle::<BlockQ3K>);
        against(GgmlDType::Q8K, by_candle::<BlockQ8K>);
        against(GgmlDType::Q4K, by_candle::<BlockQ4K>);
        against(GgmlDType::Q5K, by_candle::<BlockQ5K>);
        against(GgmlDType::Q6K, by_candle::<BlockQ6K>);
    }
}
