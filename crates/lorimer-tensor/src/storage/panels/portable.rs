//! Products in whole numbers for every processor: loops over arrays, which the compiler puts into the vector registers of the target's baseline. The whole
//! numbers are those of the other forms.

use std::ops::Range;

use super::{BLOCK, Line, PANEL, Panels, Rounded};
use crate::kernels::portable::{half, multiply_add};

/// Most rows of a tile.
const TILE: usize = 2;
/// Outputs whose whole numbers are formed at a time: those of two rows, with the codes, lie in sixteen registers of four numbers.
const LANES: usize = PANEL / 2;

/// As [`super::multiply::plain`]: without `F` the same to the bit, with it to the bit what the forms for wide registers give.
///
/// # Safety
/// That of [`super::multiply::plain`].
pub(super) unsafe fn panels<const F: bool>(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    let (outputs, blocks) = (weight.shape.0, x.blocks);
    let rows = x.scales.len().checked_div(blocks).unwrap_or(0);
    let pairs = x.pairs().as_chunks().0;
    assert!(pairs.len() == rows * blocks, "product in whole numbers: activations in pairs");
    for panel in panels {
        let column = panel * PANEL;
        let count = PANEL.min(outputs - column);
        for row in (0..rows).step_by(TILE) {
            let sums = match rows - row {
                1 => {
                    let [sums] = tile::<1, F>(x, pairs, row, weight, panel);
                    [sums, sums]
                }
                _ => tile::<TILE, F>(x, pairs, row, weight, panel),
            };
            for (row, sums) in (row..rows).zip(&sums) {
                // SAFETY: the caller's shapes.
                unsafe { sums.as_ptr().copy_to_nonoverlapping(out.add(row * outputs + column), count) };
            }
        }
    }
}

/// M rows from `row` on by a panel.
fn tile<const M: usize, const F: bool>(
    x: &Rounded,
    pairs: &[[i16; BLOCK]],
    row: usize,
    weight: &Panels,
    panel: usize,
) -> [[f32; PANEL]; M] {
    let blocks = x.blocks;
    let mut sums = [[0f32; PANEL]; M];
    let mut bytes = [Line([0; 64]); 8];
    for b in 0..blocks {
        let (codes, last) = weight.block(panel, b).split_at(weight.codes);
        let codes = match codes.try_into() {
            Ok(codes) => codes,
            Err(_) => {
                halve(codes, &mut bytes);
                &bytes
            }
        };
        let (d, m) = last[0].0.as_chunks().0.split_at(PANEL);
        let rows: [usize; M] = std::array::from_fn(|i| (row + i) * blocks + b);
        for side in 0..2 {
            let whole = whole(codes, side, rows.map(|at| &pairs[at]));
            let lanes = side * LANES..(side + 1) * LANES;
            let numbers = |halves: &[[u8; 2]]| -> [f32; LANES] {
                let halves = &halves[lanes.clone()];
                std::array::from_fn(|lane| half(u16::from_le_bytes(halves[lane])))
            };
            let (d, m) = (numbers(d), numbers(m));
            for ((sums, whole), at) in sums.iter_mut().zip(whole).zip(rows) {
                let [s, offset] = x.scales[at];
                for (lane, sum) in sums[lanes.clone()].iter_mut().enumerate() {
                    *sum = multiply_add::<F>(m[lane], offset, *sum);
                    *sum = multiply_add::<F>(d[lane] * s, whole[lane] as f32, *sum);
                }
            }
        }
    }
    sums
}

/// Codes of 4 bits as bytes: the lower halves, then the upper ones.
#[inline(always)]
fn halve(codes: &[Line], bytes: &mut [Line; 8]) {
    let (low, high) = bytes.split_at_mut(4);
    for ((low, high), both) in low.iter_mut().zip(high).zip(codes) {
        (low.0, high.0) = (both.0.map(|code| code & 15), both.0.map(|code| code >> 4));
    }
}

/// The sums of M rows and half a panel over a block. A function of its own, of loops that are unrolled in one way: compiled into another the same loops
/// were not always put into vector registers.
#[inline(never)]
fn whole<const M: usize>(codes: &[Line; 8], side: usize, x: [&[i16; BLOCK]; M]) -> [[i32; LANES]; M] {
    let mut sums = [[0; LANES]; M];
    for (group, Line(line)) in codes.iter().enumerate() {
        let four = &line.as_chunks().0[side * LANES..][..LANES];
        let words: [u32; LANES] = std::array::from_fn(|lane| u32::from_le_bytes(four[lane]));
        // Pairs have the order 0, 2, 1, 3.
        for (byte, place) in [0, 2, 1, 3].into_iter().enumerate() {
            let codes = words.map(|word| (word >> (8 * byte) & 255) as i32);
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = i32::from(x[group * 4 + place]);
                for (sum, code) in sums.iter_mut().zip(codes) {
                    *sum += code * x;
                }
            }
        }
    }
    sums
}
