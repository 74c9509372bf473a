//! NormalFloat-4 with double quantisation (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3 and appendix E).
//!
//! Blocks of 64 weights are divided by their largest absolute value and kept as the nearest of 16 quantiles of a normal distribution. The
//! scales, less their mean, are themselves kept in 8 bits, in blocks of 256 with one f32 scale: 4 + 8/64 + 32/(64·256) = 4.127 bits a weight.
//! The bytes are those of bitsandbytes.

use candle_core::Result;
use rayon::prelude::*;

use crate::storage::bits;
use crate::storage::blockwise::SIGNED;
use crate::storage::levels::{DoubleScales, Levels, ScaleType, Scales, check_count};

/// Weights in a block.
pub const BLOCK: usize = 64;
/// Scales that share one f32 scale.
pub const SCALES: usize = 256;

/// The sixteen values: QLoRA, appendix E.
pub const VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Bytes that a matrix (outputs, inputs) takes.
pub fn bytes((outputs, inputs): (usize, usize)) -> usize {
    let blocks = (outputs * inputs).div_ceil(BLOCK);
    bits::bytes(outputs * inputs, 4) + blocks + blocks.div_ceil(SCALES) * 4 + 4
}

/// Quantises row-major values.
///
/// # Errors
///
/// Fails if there are more or fewer values than the shape has.
pub fn quantise(values: &[f32], shape: (usize, usize)) -> Result<Levels> {
    check_count(values, shape)?;
    let blocks = values.len().div_ceil(BLOCK);
    let mut codes = vec![0u8; bits::bytes(values.len(), 4)];
    let mut largest = vec![0f32; blocks];
    let middles: [f32; 15] = std::array::from_fn(|i| (VALUES[i] + VALUES[i + 1]) / 2.0);
    let parts = codes.par_chunks_mut(BLOCK / 2).zip(&mut largest);
    parts.zip(values.par_chunks(BLOCK)).with_min_len(64).for_each(|((codes, largest), block)| {
        *largest = block.iter().fold(0f32, |max, v| max.max(v.abs()));
        let inverse = if *largest > 0.0 { largest.recip() } else { 0.0 };
        let code = |v: f32| middles.iter().filter(|&&m| m < v * inverse).count() as u8;
        for (byte, pair) in codes.iter_mut().zip(block.chunks(2)) {
            *byte = code(pair[0]) << 4 | pair.get(1).map_or(7, |&v| code(v));
        }
    });
    let mean = (largest.iter().map(|&v| f64::from(v)).sum::<f64>() / largest.len().max(1) as f64) as f32;
    largest.iter_mut().for_each(|v| *v -= mean);
    let mut scales = vec![0u8; blocks];
    let mut seconds = Vec::new();
    for (block, indices) in largest.chunks(SCALES).zip(scales.chunks_mut(SCALES)) {
        ScaleType::F32.encode(SIGNED.encode(block, indices), &mut seconds);
    }
    let scales = Scales::Double(DoubleScales {
        codes: scales,
        bits: 8,
        table: Some(Box::new(SIGNED.values())),
        block: SCALES,
        seconds,
        kind: ScaleType::F32,
        offset: mean,
    });
    Levels::new("nf4", (shape, 4), VALUES.to_vec(), (BLOCK, codes), scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::random;
    use candle_core::DType;

    #[test]
    fn values_come_back_within_half_a_step_and_the_scales_error() -> Result<()> {
        for shape in [(3usize, 64usize), (300, 128), (5, 100), (2, 7)] {
            let values = random(shape, 1, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let packed = quantise(&values, shape)?;
            let mut back = vec![0f32; shape.1];
            for row in 0..shape.0 {
                packed.expand(row, 0..shape.1, &mut back);
                for (a, b) in values[row * shape.1..].iter().zip(&back) {
                    assert!((a - b).abs() < 0.17, "{a} {b}");
                }
            }
            if shape.1 > BLOCK {
                let mut part = vec![0f32; shape.1 - BLOCK];
                packed.expand(shape.0 - 1, BLOCK..shape.1, &mut part);
                assert_eq!(part[..], back[BLOCK..]);
            }
        }
        Ok(())
    }

    #[test]
    fn it_takes_little_more_than_four_bits_a_weight() -> Result<()> {
        for shape in [(1024, 512), (3, 100)] {
            assert_eq!(quantise(&vec![0.5; shape.0 * shape.1], shape)?.bytes(), bytes(shape));
        }
        assert!(bytes((1024, 512)) as f64 * 8.0 / (1024.0 * 512.0) < 4.13);
        Ok(())
    }
}
