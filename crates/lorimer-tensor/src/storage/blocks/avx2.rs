//! GGUF's blocks expanded in registers of 256 bits, to the bit as the loops beside it do.
//!
//! The floor is the memory: a number of Q4_1 takes 5/8 of a byte, and 32 of them some twenty-five instructions.

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::scales::scales;

/// The numbers of as many blocks as `out` has room for, if the type is one of those here. The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn expand(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) -> bool {
    macro_rules! each {
        ($bytes:literal, $numbers:literal, $one:ident) => {
            for (block, out) in bytes.as_chunks::<$bytes>().0.iter().zip(out.as_chunks_mut::<$numbers>().0) {
                $one(block, out.as_chunks_mut::<32>().0);
            }
        };
    }
    match dtype {
        GgmlDType::Q4_0 => each!(18, 32, q4_0),
        GgmlDType::Q4_1 => each!(20, 32, q4_1),
        GgmlDType::Q5_0 => each!(22, 32, q5_0),
        GgmlDType::Q5_1 => each!(24, 32, q5_1),
        GgmlDType::Q8_0 => each!(34, 32, q8_0),
        GgmlDType::Q8_1 => each!(36, 32, q8_1),
        GgmlDType::Q2K => each!(84, 256, q2k),
        GgmlDType::Q3K => each!(110, 256, q3k),
        GgmlDType::Q4K => each!(144, 256, q4k),
        GgmlDType::Q5K => each!(176, 256, q5k),
        GgmlDType::Q6K => each!(210, 256, q6k),
        GgmlDType::Q8K => each!(292, 256, q8k),
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => return false,
    }
    true
}

/// `codes · scale`, or `codes · scale + add` if `ADD`, rounded twice: 32 numbers of a byte with a sign, a scale and an addend for 16 of them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn put<const ADD: bool>(codes: __m256i, scale: [f32; 2], add: [f32; 2], out: &mut [f32; 32]) {
    let halves = [_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes)];
    for (((codes, scale), add), out) in halves.into_iter().zip(scale).zip(add).zip(out.as_chunks_mut::<16>().0) {
        let (scale, add) = (_mm256_set1_ps(scale), _mm256_set1_ps(add));
        for (codes, out) in [codes, _mm_srli_si128::<8>(codes)].into_iter().zip(out.as_chunks_mut::<8>().0) {
            let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale);
            // SAFETY: eight numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), if ADD { _mm256_add_ps(scaled, add) } else { scaled }) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half(bytes: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load(bytes: &[u8]) -> __m256i {
    // SAFETY: so many are there.
    unsafe { _mm256_loadu_si256(bytes[..32].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn every(byte: u8) -> __m256i {
    _mm256_set1_epi8(byte as i8)
}

/// The bits of `mask` of every byte after a shift to the right.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn bits(bytes: __m256i, shift: usize, mask: u8) -> __m256i {
    _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32)), every(mask))
}

/// `value` in every byte that has a bit of `mask`, else 0.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn where_set(bytes: __m256i, mask: __m256i, value: u8) -> __m256i {
    let none = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), _mm256_setzero_si256());
    _mm256_andnot_si256(none, every(value))
}

/// 32 numbers of 4 bits: the lower halves of 16 bytes, then the upper ones.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn fours(bytes: &[u8]) -> __m256i {
    // SAFETY: sixteen bytes are there.
    let low = unsafe { _mm_loadu_si128(bytes[..16].as_ptr().cast()) };
    _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(low), low), every(15))
}

/// 32 numbers of 5 bits: four bytes of fifth bits, then the others as in Q4.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn fives(bytes: &[u8]) -> __m256i {
    let high = _mm256_set1_epi32(i32::from_le_bytes(std::array::from_fn(|i| bytes[i])));
    // The byte of a number's fifth bit, and its bit there.
    let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_or_si256(fours(&bytes[4..]), where_set(_mm256_shuffle_epi8(high, byte), bit, 16))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q4_0(b: &[u8; 18], out: &mut [[f32; 32]]) {
    put::<false>(_mm256_sub_epi8(fours(&b[2..]), every(8)), [half(b, 0); 2], [0.0; 2], &mut out[0]);
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q4_1(b: &[u8; 20], out: &mut [[f32; 32]]) {
    put::<true>(fours(&b[4..]), [half(b, 0); 2], [half(b, 2); 2], &mut out[0]);
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q5_0(b: &[u8; 22], out: &mut [[f32; 32]]) {
    put::<false>(_mm256_sub_epi8(fives(&b[2..]), every(16)), [half(b, 0); 2], [0.0; 2], &mut out[0]);
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q5_1(b: &[u8; 24], out: &mut [[f32; 32]]) {
    put::<true>(fives(&b[4..]), [half(b, 0); 2], [half(b, 2); 2], &mut out[0]);
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q8_0(b: &[u8; 34], out: &mut [[f32; 32]]) {
    put::<false>(load(&b[2..]), [half(b, 0); 2], [0.0; 2], &mut out[0]);
}

/// The second half-precision number is for products: the scaled sum of the codes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q8_1(b: &[u8; 36], out: &mut [[f32; 32]]) {
    put::<false>(load(&b[4..]), [half(b, 0); 2], [0.0; 2], &mut out[0]);
}

/// Scales and minima of 16 numbers, four bits each; 64 bytes of codes; d and dmin.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q2k(b: &[u8; 84], out: &mut [[f32; 32]]) {
    let (d, min) = (half(b, 80), half(b, 82));
    for (i, out) in out.iter_mut().enumerate() {
        let codes = bits(load(&b[16 + i / 4 * 32..]), i % 4 * 2, 3);
        let pair = [b[2 * i], b[2 * i + 1]];
        let scale = pair.map(|scale| d * f32::from(scale & 15));
        put::<true>(codes, scale, pair.map(|scale| -(min * f32::from(scale >> 4))), out);
    }
}

/// 32 bytes of third bits, unset where 4 is taken away; 64 bytes of codes; sixteen scales of six bits; d.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q3k(b: &[u8; 110], out: &mut [[f32; 32]]) {
    let (third, d) = (load(b), half(b, 108));
    let packed: &[u8; 12] = &std::array::from_fn(|i| b[96 + i]);
    // Lower four bits in the first eight bytes, upper two in the last four.
    let scale = |i: usize| {
        let (low, high) = (packed[i % 8] >> (i / 8 * 4) & 15, packed[8 + i % 4] >> (i / 4 * 2) & 3);
        d * (f32::from(low | high << 4) - 32.0)
    };
    for (i, out) in out.iter_mut().enumerate() {
        let codes = bits(load(&b[32 + i / 4 * 32..]), i % 4 * 2, 3);
        let codes = _mm256_sub_epi8(_mm256_or_si256(codes, where_set(third, every(1 << i), 4)), every(4));
        put::<false>(codes, [scale(2 * i), scale(2 * i + 1)], [0.0; 2], out);
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q4k(b: &[u8; 144], out: &mut [[f32; 32]]) {
    let halves = [half(b, 0), half(b, 2)];
    for (i, out) in out.iter_mut().enumerate() {
        let [scale, min] = scales(b, halves, i);
        put::<true>(bits(load(&b[16 + i / 2 * 32..]), i % 2 * 4, 15), [scale; 2], [-min; 2], out);
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q5k(b: &[u8; 176], out: &mut [[f32; 32]]) {
    let (halves, fifth) = ([half(b, 0), half(b, 2)], load(&b[16..]));
    for (i, out) in out.iter_mut().enumerate() {
        let [scale, min] = scales(b, halves, i);
        let codes = bits(load(&b[48 + i / 2 * 32..]), i % 2 * 4, 15);
        let codes = _mm256_or_si256(codes, where_set(fifth, every(1 << i), 16));
        put::<true>(codes, [scale; 2], [-min; 2], out);
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q6k(b: &[u8; 210], out: &mut [[f32; 32]]) {
    let d = half(b, 208);
    for (i, out) in out.iter_mut().enumerate() {
        let (part, quarter) = (i / 4, i % 4);
        let low = bits(load(&b[part * 64 + quarter % 2 * 32..]), quarter / 2 * 4, 15);
        let high = _mm256_slli_epi16::<4>(bits(load(&b[128 + part * 32..]), quarter * 2, 3));
        let codes = _mm256_sub_epi8(_mm256_or_si256(low, high), every(32));
        let scale = [b[192 + 2 * i], b[192 + 2 * i + 1]].map(|scale| d * f32::from(scale as i8));
        put::<false>(codes, scale, [0.0; 2], out);
    }
}

/// A scale in f32, then bytes; what follows is for products.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn q8k(b: &[u8; 292], out: &mut [[f32; 32]]) {
    let d = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    for (i, out) in out.iter_mut().enumerate() {
        put::<false>(load(&b[4 + 32 * i..]), [d; 2], [0.0; 2], out);
    }
}
