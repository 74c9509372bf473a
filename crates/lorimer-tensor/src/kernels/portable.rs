//! Arithmetic for loops over arrays that the compiler puts into the vector registers which every processor of the target has: SSE2's on x86-64, NEON's on
//! AArch64. The kernels for processors without wider ones are made of it; the tests run the same code on x86-64.

/// Whether every processor of the target multiplies and adds in one instruction, rounded once. With it results are to the bit those of x86-64's wide
/// registers.
pub(crate) const FUSED: bool = cfg!(any(target_feature = "fma", target_feature = "neon"));

/// `a·b + c`, rounded once if `F`: slow where [`FUSED`] is false.
#[inline(always)]
pub(crate) fn multiply_add<const F: bool>(a: f32, b: f32, c: f32) -> f32 {
    if F { a.mul_add(b, c) } else { a * b + c }
}

/// The number that the bits of a half stand for. NaNs become quiet. Nothing is subnormal in f32 on the way, which is slow on some processors.
#[inline(always)]
pub(crate) fn half(bits: u16) -> f32 {
    let (sign, size) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let normal = (size << 13) + ((127 - 15) << 23);
    let special = if size < 0x7c00 { 0 } else { 0x7f80_0000 };
    let quiet = if size > 0x7c00 { 0x0040_0000 } else { 0 };
    let subnormal = (size as i32 as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    f32::from_bits(sign | if size < 0x0400 { subnormal } else { normal | special | quiet })
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// To be seen to fail: `quiet` left out, or `size < 0x03ff`.
    #[test]
    fn halves_are_what_they_stand_for() {
        for bits in 0..=u16::MAX {
            assert_eq!(half(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits(), "{bits:x}");
        }
    }
}
