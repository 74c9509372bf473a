//! Products in whole numbers of 16 bits, for processors with AVX2 that have no AVX-512 VNNI: both bytes of an activation are one number
//! `256 p + r`, codes are widened to 16 bits as well, and two products of such are added to each whole number of 32 bits at a time. The sums are the
//! whole numbers that [`super::vnni`] has, so the results are the same to the bit.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK, Form, Line, PANEL, Panels, Rounded};
use crate::kernels::cpu::{Level, level};

/// Bytes that are asked for ahead of those that are read.
const AHEAD: usize = 24 * size_of::<Line>();

/// The form of this file for the processor's level.
pub(super) fn best() -> Option<Form> {
    match level() {
        Level::Avx512 | Level::Vnni if is_x86_feature_detected!("avx512bw") => Some(in_512),
        Level::AvxVnni => Some(in_256_fused),
        Level::Plain => None,
        _ => Some(in_256),
    }
}

/// All forms of this file that the processor has.
#[cfg(test)]
pub(super) fn all() -> Vec<Form> {
    let mut all: Vec<Form> = Vec::new();
    if level() >= Level::Avx2 {
        all.push(in_256);
    }
    if level() >= Level::AvxVnni && is_x86_feature_detected!("avxvnni") {
        all.push(in_256_fused);
    }
    if level() >= Level::Avx512 && is_x86_feature_detected!("avx512bw") {
        all.push(in_512);
    }
    all
}

/// As [`super::multiply::plain`], in 256 bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn in_256(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe { run::<Half<false>>(x, weight, panels, out) }
}

/// As [`in_256`] with the sums of AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn in_256_fused(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe { run::<Half<true>>(x, weight, panels, out) }
}

/// As [`super::multiply::plain`], in 512 bits.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn in_512(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe { run::<Whole>(x, weight, panels, out) }
}

/// A register of outputs. The functions are those of the processor, to be called where it has them.
trait Register {
    /// Outputs.
    const LANES: usize;
    /// Most rows of a tile, whose sums in whole numbers stay in registers. Those in f32 are wanted once a block only.
    const TILE: usize;
    type Int: Copy;
    type Float: Copy;
    unsafe fn zero() -> Self::Int;
    unsafe fn zero_f32() -> Self::Float;
    /// Four codes of each output.
    unsafe fn load(from: *const u8) -> Self::Int;
    /// The numbers of 16 bits moved right by N bits, and of that the bits of `mask`.
    unsafe fn part<const N: u32>(codes: Self::Int, mask: i16) -> Self::Int;
    /// sum + codes · pair.
    unsafe fn add(sum: Self::Int, codes: Self::Int, pair: i32) -> Self::Int;
    /// Numbers in half precision.
    unsafe fn halves(from: *const u8) -> Self::Float;
    /// sum + m·offset + (d·s)·whole.
    unsafe fn finish(
        sum: Self::Float,
        whole: Self::Int,
        d: Self::Float,
        m: Self::Float,
        scale: [f32; 2],
    ) -> Self::Float;
    /// The first `count`.
    unsafe fn store(to: *mut f32, sum: Self::Float, count: usize);
}

/// 256 bits, with AVX-VNNI or without.
struct Half<const FUSED: bool>;

impl<const FUSED: bool> Register for Half<FUSED> {
    const LANES: usize = 8;
    const TILE: usize = 5;
    type Int = __m256i;
    type Float = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256i {
        // SAFETY: the caller's processor.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn zero_f32() -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        // SAFETY: the caller's pointer.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn part<const N: u32>(codes: __m256i, mask: i16) -> __m256i {
        // SAFETY: the caller's processor.
        unsafe { _mm256_and_si256(_mm256_srl_epi16(codes, _mm_cvtsi32_si128(N as i32)), _mm256_set1_epi16(mask)) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m256i, codes: __m256i, pair: i32) -> __m256i {
        // SAFETY: the caller's processor, which has AVX-VNNI where FUSED says so.
        unsafe {
            let pair = _mm256_set1_epi32(pair);
            match FUSED {
                true => _mm256_dpwssd_avx_epi32(sum, codes, pair),
                false => _mm256_add_epi32(sum, _mm256_madd_epi16(codes, pair)),
            }
        }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m256 {
        // SAFETY: the caller's pointer.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn finish(sum: __m256, whole: __m256i, d: __m256, m: __m256, [s, offset]: [f32; 2]) -> __m256 {
        // SAFETY: the caller's processor.
        unsafe {
            let sum = _mm256_fmadd_ps(m, _mm256_set1_ps(offset), sum);
            _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(s)), _mm256_cvtepi32_ps(whole), sum)
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, sum: __m256, count: usize) {
        // SAFETY: the caller's pointer holds `count` numbers.
        unsafe {
            if count == 8 {
                return _mm256_storeu_ps(to, sum);
            }
            let mut all = [0f32; 8];
            _mm256_storeu_ps(all.as_mut_ptr(), sum);
            std::ptr::copy_nonoverlapping(all.as_ptr(), to, count);
        }
    }
}

/// 512 bits.
struct Whole;

impl Register for Whole {
    const LANES: usize = 16;
    const TILE: usize = 8;
    type Int = __m512i;
    type Float = __m512;

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the caller's processor.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn zero_f32() -> __m512 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the caller's pointer.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn part<const N: u32>(codes: __m512i, mask: i16) -> __m512i {
        // SAFETY: the caller's processor.
        unsafe { _mm512_and_si512(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(N as i32)), _mm512_set1_epi16(mask)) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m512i, codes: __m512i, pair: i32) -> __m512i {
        // SAFETY: the caller's processor.
        unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(codes, _mm512_set1_epi32(pair))) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m512 {
        // SAFETY: the caller's pointer.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn finish(sum: __m512, whole: __m512i, d: __m512, m: __m512, [s, offset]: [f32; 2]) -> __m512 {
        // SAFETY: the caller's processor.
        unsafe {
            let sum = _mm512_fmadd_ps(m, _mm512_set1_ps(offset), sum);
            _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(s)), _mm512_cvtepi32_ps(whole), sum)
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, sum: __m512, count: usize) {
        // SAFETY: the caller's pointer holds `count` numbers.
        unsafe { _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as __mmask16, sum) }
    }
}

/// Rows are cut into tiles as like each other as can be.
#[inline(always)]
unsafe fn run<R: Register>(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    let (outputs, blocks) = (weight.shape.0, x.blocks);
    let rows = x.scales.len().checked_div(blocks).unwrap_or(0);
    assert!(x.pairs().len() == rows * blocks * BLOCK, "product in whole numbers: activations in pairs");
    let tiles = rows.div_ceil(R::TILE);
    let (height, higher) = (rows / tiles.max(1), rows % tiles.max(1));
    for panel in panels {
        let column = panel * PANEL;
        let count = PANEL.min(outputs - column);
        let mut row = 0;
        for i in 0..tiles {
            let m = height + usize::from(i < higher);
            // SAFETY: the rows are inside of x, the panel inside of the weight, the tile inside of the result.
            unsafe {
                let pairs = x.pairs().as_ptr().add(row * blocks * BLOCK);
                let scales = x.scales.as_ptr().add(row * blocks);
                let lines = weight.lines.as_ptr().add(panel * blocks * (weight.codes + 1)).cast::<u8>();
                let out = (out.add(row * outputs + column), outputs);
                macro_rules! tiles {
                    ($($m:literal)*) => {
                        match (m, weight.codes, R::LANES == PANEL) {
                            $(
                                ($m, 8, true) => tile::<R, $m, 1, 8>(blocks, pairs, scales, lines, out, count),
                                ($m, _, true) => tile::<R, $m, 1, 4>(blocks, pairs, scales, lines, out, count),
                                ($m, 8, _) => tile::<R, $m, 2, 8>(blocks, pairs, scales, lines, out, count),
                                ($m, _, _) => tile::<R, $m, 2, 4>(blocks, pairs, scales, lines, out, count),
                            )*
                            _ => {}
                        }
                    };
                }
                match R::TILE {
                    5 => tiles!(1 2 3 4 5),
                    _ => tiles!(1 2 3 4 5 6 7 8),
                }
            }
            row += m;
        }
    }
}

/// M rows by the W registers of a panel, of which `count` outputs are written; CODES lines of codes a block.
#[inline(always)]
unsafe fn tile<R: Register, const M: usize, const W: usize, const CODES: usize>(
    blocks: usize,
    pairs: *const i16,
    scales: *const [f32; 2],
    mut lines: *const u8,
    (out, stride): (*mut f32, usize),
    count: usize,
) {
    // SAFETY: the caller's pointers hold M rows of `blocks` blocks, a panel of as many, and M rows of `count` results.
    unsafe {
        let mut sums = [[R::zero_f32(); W]; M];
        for b in 0..blocks {
            let mut whole = [[R::zero(); W]; M];
            macro_rules! add {
                ($codes:ident, $shift:literal, $mask:literal, $group:expr, $odd:literal) => {
                    let mut part = $codes;
                    for part in &mut part {
                        *part = R::part::<$shift>(*part, $mask);
                    }
                    let at = pairs.add(b * BLOCK + $group * 4 + $odd * 2);
                    for i in 0..M {
                        let pair = at.add(i * blocks * BLOCK).cast::<i32>().read_unaligned();
                        for w in 0..W {
                            whole[i][w] = R::add(whole[i][w], part[w], pair);
                        }
                    }
                };
            }
            for line in 0..CODES {
                let at = lines.add(line * size_of::<Line>());
                // A hint: an address outside of memory is ignored.
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                let mut codes = [R::zero(); W];
                for (w, codes) in codes.iter_mut().enumerate() {
                    *codes = R::load(at.add(w * R::LANES * 4));
                }
                if CODES == 8 {
                    add!(codes, 0, 0xff, line, 0);
                    add!(codes, 8, 0xff, line, 1);
                } else {
                    add!(codes, 0, 0xf, line, 0);
                    add!(codes, 4, 0xf, line + 4, 0);
                    add!(codes, 8, 0xf, line, 1);
                    add!(codes, 12, 0xf, line + 4, 1);
                }
            }
            for w in 0..W {
                let halves = lines.add(CODES * size_of::<Line>() + w * R::LANES * 2);
                let (d, m) = (R::halves(halves), R::halves(halves.add(PANEL * 2)));
                for i in 0..M {
                    sums[i][w] = R::finish(sums[i][w], whole[i][w], d, m, *scales.add(i * blocks + b));
                }
            }
            lines = lines.add((CODES + 1) * size_of::<Line>());
        }
        for (i, sums) in sums.iter().enumerate() {
            for (w, &sum) in sums.iter().enumerate() {
                let column = w * R::LANES;
                if column < count {
                    R::store(out.add(i * stride + column), sum, (count - column).min(R::LANES));
                }
            }
        }
    }
}
