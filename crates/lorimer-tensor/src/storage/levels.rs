//! Weights as indices of levels, scaled block by block: what bitsandbytes keeps (NF4, FP4), and LQ-LoRA's NormalFloat of 2, 3, 4 and 8 bits.
//!
//! Blocks run over the whole matrix row by row, as in both. A block's scale is a number, or itself an index: `table[q]·S + o` (bitsandbytes) or
//! `o + q·S/(2^b₀ − 1)` (LQ-LoRA), with one S for some blocks. Indices stand in streams of bits (see [`super::bits`]).

use std::ops::Range;

use candle_core::Result;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu;
use crate::storage::bits;

/// How the second scales S are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScaleType {
    /// 16 bits, of them 8 for the exponent.
    Bf16,
    /// 16 bits, of them 5 for the exponent.
    F16,
    /// 32 bits.
    F32,
}

impl ScaleType {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Little-endian bytes of the nearest number.
    pub(crate) fn encode(self, value: f32, out: &mut Vec<u8>) {
        match self {
            Self::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
            Self::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
            Self::F32 => out.extend(value.to_le_bytes()),
        }
    }

    /// Number `at` of many.
    #[inline]
    fn decode(self, bytes: &[u8], at: usize) -> f32 {
        let half = |at: usize| [bytes[at * 2], bytes[at * 2 + 1]];
        match self {
            Self::Bf16 => bf16::from_le_bytes(half(at)).to_f32(),
            Self::F16 => f16::from_le_bytes(half(at)).to_f32(),
            Self::F32 => f32::from_le_bytes(std::array::from_fn(|i| bytes[at * 4 + i])),
        }
    }
}

/// Scales that are indices themselves.
#[derive(Debug, Clone)]
pub struct DoubleScales {
    /// An index for each block.
    pub codes: Vec<u8>,
    /// Bits of an index: 2, 3, 4 or 8.
    pub bits: usize,
    /// What 8-bit indices stand for; without, an index is a whole number.
    pub table: Option<Box<[f32; 256]>>,
    /// Blocks that share S.
    pub block: usize,
    /// S of each such group, little-endian.
    pub seconds: Vec<u8>,
    /// How S is kept.
    pub kind: ScaleType,
    /// What is added.
    pub offset: f32,
}

/// Scales of blocks.
#[derive(Debug, Clone)]
pub enum Scales {
    /// A number a block.
    Plain(Vec<f32>),
    /// An index a block.
    Double(DoubleScales),
}

impl Scales {
    /// The scale of a block.
    #[inline]
    pub(crate) fn of(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Double(double) => {
                let q = bits::get(&double.codes, double.bits, block);
                let second = double.kind.decode(&double.seconds, block / double.block);
                match &double.table {
                    Some(table) => table[usize::from(q)] * second + double.offset,
                    None => double.offset + unsigned(q, second, double.bits),
                }
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len() * 4,
            Self::Double(double) => double.codes.len() + double.seconds.len() + 4,
        }
    }

    /// Whether there is a scale for each of so many blocks.
    fn check(&self, blocks: usize) -> Result<()> {
        let (found, wanted) = match self {
            Self::Plain(scales) => (scales.len(), blocks),
            Self::Double(double) => {
                if !matches!(double.bits, 2 | 3 | 4 | 8) || double.block == 0 {
                    candle_core::bail!("scales of {} bits in groups of {}", double.bits, double.block);
                }
                let wanted = blocks.div_ceil(double.block) * double.kind.bytes();
                if double.seconds.len() != wanted {
                    candle_core::bail!("{} bytes of second scales, {wanted} expected", double.seconds.len());
                }
                (double.codes.len(), bits::bytes(blocks, double.bits))
            }
        };
        match found == wanted {
            true => Ok(()),
            false => candle_core::bail!("{found} scales, {wanted} expected for {blocks} blocks"),
        }
    }
}

/// `q·S/(2^b − 1)`, computed as the authors of LQ-LoRA do; zero where S is.
#[inline]
pub(crate) fn unsigned(q: u8, second: f32, bits: usize) -> f32 {
    if second > 0.0 { f32::from(q) / (((1u32 << bits) - 1) as f32 / second) } else { 0.0 }
}

/// Refuses more or fewer values than a shape has.
pub(crate) fn check_count(values: &[f32], shape: (usize, usize)) -> Result<()> {
    match shape.0.checked_mul(shape.1) == Some(values.len()) {
        true => Ok(()),
        false => candle_core::bail!("{} values for a matrix of shape {shape:?}", values.len()),
    }
}

/// The levels of codes of 4 bits, and of both codes of a byte.
#[derive(Debug, Clone)]
struct Fours {
    levels: [f32; 16],
    pairs: [[f32; 2]; 256],
}

impl Fours {
    fn new(levels: [f32; 16]) -> Self {
        Self { levels, pairs: std::array::from_fn(|code| [levels[code >> 4], levels[code & 15]]) }
    }
}

/// The scaled levels of codes of 4 bits: sixteen at a time where the processor has AVX2, else four, two a byte. How many were found.
fn look_up(fours: &Fours, scale: f32, codes: &[u8], out: &mut [f32]) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;

        #[target_feature(enable = "avx2")]
        fn avx2(table: &[f32; 16], codes: &[u8], out: &mut [f32]) -> usize {
            let (codes, outs) = (codes.as_chunks::<8>().0, out.as_chunks_mut::<16>().0);
            let nibble = _mm_set1_epi8(15);
            // SAFETY: the table has sixteen numbers.
            let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
            for (&codes, out) in codes.iter().zip(outs.iter_mut()) {
                let codes = _mm_cvtsi64_si128(i64::from_le_bytes(codes));
                let (first, second) = (_mm_and_si128(_mm_srli_epi16::<4>(codes), nibble), _mm_and_si128(codes, nibble));
                let codes = _mm_unpacklo_epi8(first, second);
                for (half, codes) in [codes, _mm_srli_si128::<8>(codes)].into_iter().enumerate() {
                    let codes = _mm256_cvtepu8_epi32(codes);
                    let (below, above) = (_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes));
                    let eight = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    // SAFETY: inside of sixteen numbers.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), _mm256_blendv_ps(below, above, eight)) };
                }
            }
            codes.len().min(outs.len()) * 16
        }
        if cpu::level() >= cpu::Level::Avx2 {
            // SAFETY: the processor has it.
            return unsafe { avx2(&fours.levels.map(|v| v * scale), codes, out) };
        }
    }
    let (codes, outs) = (codes.as_chunks::<2>().0, out.as_chunks_mut::<4>().0);
    for (&[first, second], out) in codes.iter().zip(outs.iter_mut()) {
        let ([a, b], [c, d]) = (fours.pairs[usize::from(first)], fours.pairs[usize::from(second)]);
        *out = [a * scale, b * scale, c * scale, d * scale];
    }
    codes.len().min(outs.len()) * 4
}

/// A matrix (outputs, inputs) of levels.
#[derive(Debug, Clone)]
pub struct Levels {
    name: &'static str,
    shape: (usize, usize),
    bits: usize,
    levels: Vec<f32>,
    /// Where codes have 4 bits.
    fours: Option<Box<Fours>>,
    block: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl Levels {
    /// Puts the parts together. `name`: how it is shown (`nf4`); `levels`: 2^bits values; `block`: weights that share a scale.
    ///
    /// # Errors
    ///
    /// Fails if `bits` is not 2, 3, 4 or 8, or if the lengths do not fit the shape and each other.
    pub fn new(
        name: &'static str,
        (shape, bits): ((usize, usize), usize),
        levels: Vec<f32>,
        (block, codes): (usize, Vec<u8>),
        scales: Scales,
    ) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) || levels.len() != 1 << bits || block == 0 {
            candle_core::bail!("{} levels of {bits} bits in blocks of {block}", levels.len());
        }
        let Some(count) = shape.0.checked_mul(shape.1).filter(|count| count.checked_mul(8).is_some()) else {
            candle_core::bail!("a weight of shape {shape:?} is too large");
        };
        if codes.len() != bits::bytes(count, bits) {
            let expected = bits::bytes(count, bits);
            candle_core::bail!("{} bytes of {bits}-bit codes, {expected} expected for {shape:?}", codes.len());
        }
        scales.check(count.div_ceil(block))?;
        let fours = <[f32; 16]>::try_from(levels.as_slice()).ok().map(|levels| Box::new(Fours::new(levels)));
        Ok(Self { name, shape, bits, levels, fours, block, codes, scales })
    }

    /// (outputs, inputs).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// `nf4`, `fp4`, `nf3`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Bytes taken, the levels not counted.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The values that codes stand for.
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// Weights that share a scale.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The stream of codes.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// All values, row by row.
    pub fn expanded(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.shape.0 * self.shape.1];
        self.expand_flat(0, &mut values);
        values
    }

    /// Columns of a row as f32.
    pub(crate) fn expand(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let start = row * self.shape.1 + columns.start;
        self.expand_flat(start, &mut out[..columns.len()]);
    }

    fn expand_flat(&self, start: usize, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let at = start + done;
            let count = (self.block - at % self.block).min(out.len() - done);
            let scale = self.scales.of(at / self.block);
            let out = &mut out[done..][..count];
            match &self.fours {
                Some(fours) => {
                    // The first of two codes begins a byte.
                    let done = match at.is_multiple_of(2) {
                        true => look_up(fours, scale, &self.codes[(at / 2).min(self.codes.len())..], out),
                        false => 0,
                    };
                    let rest = &mut out[done..];
                    bits::each(&self.codes, 4, at + done, count - done, |i, code| {
                        rest[i] = fours.levels[usize::from(code & 15)] * scale
                    });
                }
                None => bits::each(&self.codes, self.bits, at, count, |i, code| {
                    out[i] = self.levels[usize::from(code)] * scale;
                }),
            }
            done += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From any column on, any number of values of any width. To be seen to fail: [`look_up`] with the halves of a byte exchanged, or from odd places.
    #[test]
    fn values_are_found_from_anywhere() -> Result<()> {
        let (shape, block) = ((3, 101), 37);
        let count = shape.0 * shape.1;
        for bits in [2, 3, 4, 8] {
            let numbers: Vec<u8> = (0..count).map(|i| ((i * 29 + i / 7) % (1 << bits)) as u8).collect();
            let mut codes = vec![0; bits::bytes(count, bits)];
            bits::pack(&numbers, bits, &mut codes);
            let levels: Vec<f32> = (0..1 << bits).map(|i| (i as f32 - 3.3) * 0.7).collect();
            let scales: Vec<f32> = (0..count.div_ceil(block)).map(|i| 0.5 + i as f32).collect();
            let found =
                Levels::new("test", (shape, bits), levels.clone(), (block, codes), Scales::Plain(scales.clone()))?;
            for row in 0..shape.0 {
                for columns in [0..101, 0..64, 1..101, 2..101, 5..6, 30..95] {
                    let mut out = vec![0f32; columns.len()];
                    found.expand(row, columns.clone(), &mut out);
                    for (column, out) in columns.zip(out) {
                        let at = row * shape.1 + column;
                        assert_eq!(
                            out,
                            levels[usize::from(numbers[at])] * scales[at / block],
                            "{bits} bits, {row} {column}"
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
