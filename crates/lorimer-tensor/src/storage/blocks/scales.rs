//! The scales of Q4_K's and Q5_K's blocks.

/// Scale and minimum of part `j` of a Q4_K or Q5_K block with its two halves, six bits each in twelve bytes.
#[inline(always)]
pub(super) fn scales(block: &[u8], [d, min]: [f32; 2], j: usize) -> [f32; 2] {
    let q = &block[4..16];
    let (scale, least) = match j < 4 {
        true => (q[j] & 63, q[j + 4] & 63),
        false => (q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4),
    };
    [d * f32::from(scale), min * f32::from(least)]
}
