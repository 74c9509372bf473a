//! Eight-bit block-wise quantisation with a dynamic code (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization", arXiv:2110.02861): every block is divided by its largest absolute value and each quotient becomes the
//! index of the nearest of 256 code values, which lie close together near zero and wide apart near one.

use std::sync::LazyLock;

/// 256 ascending values in −1..1, or 0..1.
#[derive(Debug)]
pub struct Code {
    values: [f32; 256],
    /// Half-way points: a value above `middles[i]` and up to `middles[i + 1]` belongs to `values[i + 1]`.
    middles: [f32; 255],
}

/// For values of either sign.
pub static SIGNED: LazyLock<Code> = LazyLock::new(|| Code::dynamic(true));
/// For values that are not negative.
pub static UNSIGNED: LazyLock<Code> = LazyLock::new(|| Code::dynamic(false));

impl Code {
    /// The dynamic data type with up to seven exponent bits: for exponent i, 2ⁱ (unsigned 2ⁱ⁺¹) values in the middles of equal
    /// parts of 0.1..1, times 10^(i−6); and 0 and 1.
    fn dynamic(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for i in 0..7 {
            let parts = 1usize << if signed { i } else { i + 1 };
            let boundary = |j: usize| 0.1 + 0.9 * j as f64 / parts as f64;
            for j in 0..parts {
                let middle = (boundary(j) + boundary(j + 1)) / 2.0 * 10f64.powi(i - 6);
                values.push(middle as f32);
                if signed {
                    values.push(-middle as f32);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        Self {
            values: std::array::from_fn(|i| values.get(i).copied().unwrap_or(1.0)),
            middles: std::array::from_fn(|i| values.get(i..i + 2).map_or(1.0, |v| (v[0] + v[1]) / 2.0)),
        }
    }

    /// The index of the nearest value.
    #[inline]
    pub fn index(&self, value: f32) -> u8 {
        self.middles.partition_point(|&m| m < value) as u8
    }

    /// The value of an index.
    #[inline]
    pub fn value(&self, index: u8) -> f32 {
        self.values[index as usize]
    }

    /// All values, rising.
    pub fn values(&self) -> [f32; 256] {
        self.values
    }

    /// Quantises a block; gives its scale. NaN becomes the scale's own, so that it is not lost.
    pub fn encode(&self, block: &[f32], indices: &mut [u8]) -> f32 {
        let scale = block.iter().fold(0f32, |max, v| if v.is_nan() { f32::NAN } else { max.max(v.abs()) });
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        for (index, &v) in indices.iter_mut().zip(block) {
            *index = self.index(v * inverse);
        }
        scale
    }

    /// The values of a block.
    pub fn decode(&self, scale: f32, indices: &[u8], block: &mut [f32]) {
        for (v, &index) in block.iter_mut().zip(indices) {
            *v = self.value(index) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_has_256_values_and_finds_the_nearest() {
        for (code, lowest) in [(&*SIGNED, -0.992_968_74), (&*UNSIGNED, 0.0)] {
            assert!(code.values.windows(2).all(|v| v[0] < v[1]), "ascending, none twice");
            assert_eq!((code.values[0], code.values[255]), (lowest, 1.0));
            for i in 0..=10_000 {
                let v = lowest + (1.0 - lowest) * i as f32 / 10_000.0;
                let best = code.values.iter().map(|c| (c - v).abs()).fold(f32::MAX, f32::min);
                assert!((code.value(code.index(v)) - v).abs() <= best * 1.0001, "{v}");
            }
        }
    }

    #[test]
    fn a_block_comes_back_within_the_codes_step() {
        let block: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin() * 3e-4).collect();
        let (mut indices, mut back) = ([0u8; 256], [0f32; 256]);
        let scale = SIGNED.encode(&block, &mut indices);
        SIGNED.decode(scale, &indices, &mut back);
        for (a, b) in block.iter().zip(&back) {
            assert!((a - b).abs() <= 0.008 * scale, "{a} {b}");
        }
        assert_eq!(SIGNED.encode(&[0.0; 4], &mut indices[..4]), 0.0);
        SIGNED.decode(0.0, &indices[..4], &mut back[..4]);
        assert_eq!(back[..4], [0.0; 4]);
    }
}
