//! Products in whole numbers with AVX-512 VNNI, which adds four products of bytes to each of sixteen whole numbers at a time.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK, Line, PANEL, Panels, Rounded};

/// Most rows of a tile in the 32 registers: 12 sums in whole numbers, 12 in f32, and some for the weight.
const TILE: usize = 12;

/// Whether the processor can.
pub(super) fn available() -> bool {
    crate::kernels::cpu::level() >= crate::kernels::cpu::Level::Vnni
}

/// As [`super::multiply::plain`]. Rows are cut into tiles as like each other as can be.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn panels(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    let (outputs, blocks) = (weight.shape.0, x.blocks);
    let rows = x.scales.len().checked_div(blocks).unwrap_or(0);
    assert!(x.bytes().len() == rows * blocks * 2 * BLOCK, "product in whole numbers: activations in bytes");
    let tiles = rows.div_ceil(TILE);
    let (height, higher) = (rows / tiles.max(1), rows % tiles.max(1));
    let mut row = 0;
    for i in 0..tiles {
        let m = height + usize::from(i < higher);
        for panel in panels.clone() {
            let column = panel * PANEL;
            let count = PANEL.min(outputs - column);
            // SAFETY: the rows are inside of x, the panel inside of the weight, the tile inside of the result.
            unsafe {
                let values = x.bytes().as_ptr().add(row * blocks * 2 * BLOCK);
                let scales = x.scales.as_ptr().add(row * blocks);
                let lines = weight.lines.as_ptr().add(panel * blocks * (weight.codes + 1));
                let out = out.add(row * outputs + column);
                macro_rules! tiles {
                    ($($m:literal)*) => {
                        match (m, weight.codes) {
                            $(
                                ($m, 8) => tile::<$m, 8>(blocks, values, scales, lines, (out, outputs), count),
                                ($m, _) => tile::<$m, 4>(blocks, values, scales, lines, (out, outputs), count),
                            )*
                            _ => {}
                        }
                    };
                }
                tiles!(1 2 3 4 5 6 7 8 9 10 11 12);
            }
        }
        row += m;
    }
}

/// M rows by a panel, of which `count` outputs are written; CODES lines of codes a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn tile<const M: usize, const CODES: usize>(
    blocks: usize,
    values: *const i8,
    scales: *const [f32; 2],
    mut lines: *const Line,
    (out, stride): (*mut f32, usize),
    count: usize,
) {
    // SAFETY: the caller's pointers hold M rows of `blocks` blocks, a panel of as many, and M rows of `count` results.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let mut sums = [_mm512_setzero_ps(); M];
        for b in 0..blocks {
            let mut whole = [_mm512_setzero_si512(); M];
            for byte in 0..2 {
                for line in 0..CODES {
                    let codes = _mm512_loadu_si512(lines.add(line).cast());
                    let (first, second) = match CODES {
                        8 => (codes, codes),
                        _ => (_mm512_and_si512(codes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low)),
                    };
                    for (i, whole) in whole.iter_mut().enumerate() {
                        let four = |group: usize| {
                            let at = values.add(((i * blocks + b) * 2 + byte) * BLOCK + group * 4);
                            _mm512_set1_epi32(at.cast::<i32>().read_unaligned())
                        };
                        *whole = _mm512_dpbusd_epi32(*whole, first, four(line));
                        if CODES == 4 {
                            *whole = _mm512_dpbusd_epi32(*whole, second, four(line + 4));
                        }
                    }
                }
                if byte == 0 {
                    whole.iter_mut().for_each(|whole| *whole = _mm512_slli_epi32::<8>(*whole));
                }
            }
            let halves = lines.add(CODES).cast::<__m256i>();
            let (d, m) =
                (_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(1))));
            for (i, (sum, &whole)) in sums.iter_mut().zip(&whole).enumerate() {
                let [s, offset] = *scales.add(i * blocks + b);
                *sum = _mm512_fmadd_ps(m, _mm512_set1_ps(offset), *sum);
                *sum = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(s)), _mm512_cvtepi32_ps(whole), *sum);
            }
            lines = lines.add(CODES + 1);
        }
        let mask = ((1u32 << count) - 1) as __mmask16;
        for (i, &sum) in sums.iter().enumerate() {
            _mm512_mask_storeu_ps(out.add(i * stride), mask, sum);
        }
    }
}
