//! GGUF's blocks in registers of 256 bits: their numbers, to the bit as the loops beside it give them, and dot products with them, to the bit as those with
//! expanded numbers.
//!
//! Both read a block in one way, which gives its numbers as bytes with scales and addends to whatever takes them ([`Sink`]). For a row or two, numbers that are
//! multiplied out of registers save what storing and loading them takes, which is half of it; for more it is shared.

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::scales::scales;

/// Rows of the matrix that are multiplied at a time: while one's sum waits for its last addition the others' go on.
pub(super) const COLUMNS: usize = 3;

/// The numbers of as many blocks as `out` has room for, if the type is one of those here. The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn expand(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) -> bool {
    // What follows is not asked for.
    let bytes = &bytes[..out.len() / dtype.block_size() * dtype.type_size()];
    let mut sink = Numbers { out: out.as_chunks_mut().0.iter_mut() };
    // SAFETY: the sink has room for so many.
    unsafe { each(dtype, bytes, &mut sink) }
}

/// Whether [`dots`] knows the type: those with blocks of 32. The numbers of longer ones come too many of a row together.
pub(super) fn has_dots(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 | GgmlDType::Q8_0)
}

/// Dot products of three rows of blocks with M rows of x. The type [`has_dots`], rows of x, `stride` apart, are as long as those of blocks, which are equally
/// long, and the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dots<const M: usize>(
    dtype: GgmlDType,
    blocks: [&[u8]; COLUMNS],
    x: *const f32,
    stride: usize,
) -> [[f32; M]; COLUMNS] {
    let mut sinks = [(); COLUMNS].map(|()| Dots { x, stride, products: [_mm256_setzero_ps(); M] });
    macro_rules! each {
        ($bytes:literal, $one:ident) => {{
            let [a, b, c] = blocks.map(|row| row.as_chunks::<$bytes>().0);
            let [first, second, third] = &mut sinks;
            for ((a, b), c) in a.iter().zip(b).zip(c) {
                // SAFETY: the caller's.
                unsafe {
                    $one(a, first);
                    $one(b, second);
                    $one(c, third);
                }
            }
        }};
    }
    match dtype {
        GgmlDType::Q4_0 => each!(18, q4_0),
        GgmlDType::Q4_1 => each!(20, q4_1),
        GgmlDType::Q5_0 => each!(22, q5_0),
        GgmlDType::Q5_1 => each!(24, q5_1),
        GgmlDType::Q8_0 => each!(34, q8_0),
        _ => {}
    }
    sinks.map(|sink| sink.products.map(|lanes| sum(lanes)))
}

/// The sum of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// What takes numbers, 32 at a time.
trait Sink {
    /// `codes · scale`, with `add` if `ADD`: 32 numbers of a byte with a sign, a scale and an addend for 16 of them.
    ///
    /// # Safety
    ///
    /// The processor has AVX2, FMA and F16C, and the sink can take so many.
    unsafe fn put<const ADD: bool>(&mut self, codes: __m256i, scale: [f32; 2], add: [f32; 2]);
}

/// The numbers, rounded twice where there is an addend.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn numbers<const ADD: bool>(codes: __m256i, scale: [f32; 2], add: [f32; 2]) -> [__m256; 4] {
    let (low, high) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
    let codes = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
    std::array::from_fn(|i| {
        let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes[i]));
        let scaled = _mm256_mul_ps(codes, _mm256_set1_ps(scale[i / 2]));
        if ADD { _mm256_add_ps(scaled, _mm256_set1_ps(add[i / 2])) } else { scaled }
    })
}

/// The numbers themselves.
struct Numbers<'a> {
    out: std::slice::IterMut<'a, [f32; 32]>,
}

impl Sink for Numbers<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put<const ADD: bool>(&mut self, codes: __m256i, scale: [f32; 2], add: [f32; 2]) {
        let Some(out) = self.out.next() else { return };
        for (numbers, out) in numbers::<ADD>(codes, scale, add).into_iter().zip(out.as_chunks_mut::<8>().0) {
            // SAFETY: eight numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), numbers) };
        }
    }
}

/// Dot products with M rows of x, in lanes.
struct Dots<const M: usize> {
    x: *const f32,
    stride: usize,
    products: [__m256; M],
}

impl<const M: usize> Sink for Dots<M> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put<const ADD: bool>(&mut self, codes: __m256i, scale: [f32; 2], add: [f32; 2]) {
        let numbers = numbers::<ADD>(codes, scale, add);
        for (i, products) in self.products.iter_mut().enumerate() {
            for (j, &numbers) in numbers.iter().enumerate() {
                // SAFETY: rows of x are as long as the row of blocks.
                let x = unsafe { _mm256_loadu_ps(self.x.add(i * self.stride + j * 8)) };
                *products = _mm256_fmadd_ps(x, numbers, *products);
            }
        }
        self.x = self.x.wrapping_add(32);
    }
}

/// Gives all whole blocks to a sink, if the type is one of those here.
///
/// # Safety
///
/// The processor has AVX2, FMA and F16C, and the sink can take so many numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn each<S: Sink>(dtype: GgmlDType, bytes: &[u8], sink: &mut S) -> bool {
    macro_rules! each {
        ($bytes:literal, $numbers:literal, $one:ident) => {
            for block in bytes.as_chunks::<$bytes>().0 {
                // SAFETY: the caller's.
                unsafe { $one(block, sink) };
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

/// Two half-precision numbers. Read together: what reads one alone waits for the register that it leaves the rest of.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bytes: &[u8], at: usize) -> [f32; 2] {
    let bits = i32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let both = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
    [_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both))]
}

/// A half-precision number with others behind it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(bytes: &[u8], at: usize) -> f32 {
    halves(bytes, at)[0]
}

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(bytes: &[u8]) -> __m256i {
    // SAFETY: so many are there.
    unsafe { _mm256_loadu_si256(bytes[..32].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn every(byte: u8) -> __m256i {
    _mm256_set1_epi8(byte as i8)
}

/// The bits of `mask` of every byte after a shift to the right.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(bytes: __m256i, shift: usize, mask: u8) -> __m256i {
    _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32)), every(mask))
}

/// `value` in every byte that has a bit of `mask`, else 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn where_set(bytes: __m256i, mask: __m256i, value: u8) -> __m256i {
    let none = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), _mm256_setzero_si256());
    _mm256_andnot_si256(none, every(value))
}

/// 32 numbers of 4 bits: the lower halves of 16 bytes, then the upper ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fours(bytes: &[u8]) -> __m256i {
    // SAFETY: sixteen bytes are there.
    let low = unsafe { _mm_loadu_si128(bytes[..16].as_ptr().cast()) };
    _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(low), low), every(15))
}

/// 32 numbers of 5 bits: four bytes of fifth bits, then the others as in Q4.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fives(bytes: &[u8]) -> __m256i {
    let high = _mm256_set1_epi32(i32::from_le_bytes(std::array::from_fn(|i| bytes[i])));
    // The byte of a number's fifth bit, and its bit there.
    let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_or_si256(fours(&bytes[4..]), where_set(_mm256_shuffle_epi8(high, byte), bit, 16))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_0<S: Sink>(b: &[u8; 18], sink: &mut S) {
    // SAFETY: the caller's.
    unsafe { sink.put::<false>(_mm256_sub_epi8(fours(&b[2..]), every(8)), [half(b, 0); 2], [0.0; 2]) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_1<S: Sink>(b: &[u8; 20], sink: &mut S) {
    let [d, m] = halves(b, 0);
    // SAFETY: the caller's.
    unsafe { sink.put::<true>(fours(&b[4..]), [d; 2], [m; 2]) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q5_0<S: Sink>(b: &[u8; 22], sink: &mut S) {
    // SAFETY: the caller's.
    unsafe { sink.put::<false>(_mm256_sub_epi8(fives(&b[2..]), every(16)), [half(b, 0); 2], [0.0; 2]) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q5_1<S: Sink>(b: &[u8; 24], sink: &mut S) {
    let [d, m] = halves(b, 0);
    // SAFETY: the caller's.
    unsafe { sink.put::<true>(fives(&b[4..]), [d; 2], [m; 2]) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_0<S: Sink>(b: &[u8; 34], sink: &mut S) {
    // SAFETY: the caller's.
    unsafe { sink.put::<false>(load(&b[2..]), [half(b, 0); 2], [0.0; 2]) };
}

/// The second half-precision number is for products: the scaled sum of the codes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_1<S: Sink>(b: &[u8; 36], sink: &mut S) {
    // SAFETY: the caller's.
    unsafe { sink.put::<false>(load(&b[4..]), [half(b, 0); 2], [0.0; 2]) };
}

/// Scales and minima of 16 numbers, four bits each; 64 bytes of codes; d and dmin.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q2k<S: Sink>(b: &[u8; 84], sink: &mut S) {
    let [d, min] = halves(b, 80);
    for i in 0..8 {
        let codes = bits(load(&b[16 + i / 4 * 32..]), i % 4 * 2, 3);
        let pair = [b[2 * i], b[2 * i + 1]];
        let scale = pair.map(|scale| d * f32::from(scale & 15));
        // SAFETY: the caller's.
        unsafe { sink.put::<true>(codes, scale, pair.map(|scale| -(min * f32::from(scale >> 4)))) };
    }
}

/// 32 bytes of third bits, unset where 4 is taken away; 64 bytes of codes; sixteen scales of six bits; d.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q3k<S: Sink>(b: &[u8; 110], sink: &mut S) {
    let (third, [_, d]) = (load(b), halves(b, 106));
    let packed: &[u8; 12] = &std::array::from_fn(|i| b[96 + i]);
    // Lower four bits in the first eight bytes, upper two in the last four.
    let scale = |i: usize| {
        let (low, high) = (packed[i % 8] >> (i / 8 * 4) & 15, packed[8 + i % 4] >> (i / 4 * 2) & 3);
        d * (f32::from(low | high << 4) - 32.0)
    };
    for i in 0..8 {
        let codes = bits(load(&b[32 + i / 4 * 32..]), i % 4 * 2, 3);
        let codes = _mm256_sub_epi8(_mm256_or_si256(codes, where_set(third, every(1 << i), 4)), every(4));
        // SAFETY: the caller's.
        unsafe { sink.put::<false>(codes, [scale(2 * i), scale(2 * i + 1)], [0.0; 2]) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4k<S: Sink>(b: &[u8; 144], sink: &mut S) {
    let halves = halves(b, 0);
    for i in 0..8 {
        let [scale, min] = scales(b, halves, i);
        // SAFETY: the caller's.
        unsafe { sink.put::<true>(bits(load(&b[16 + i / 2 * 32..]), i % 2 * 4, 15), [scale; 2], [-min; 2]) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q5k<S: Sink>(b: &[u8; 176], sink: &mut S) {
    let (halves, fifth) = (halves(b, 0), load(&b[16..]));
    for i in 0..8 {
        let [scale, min] = scales(b, halves, i);
        let codes = bits(load(&b[48 + i / 2 * 32..]), i % 2 * 4, 15);
        let codes = _mm256_or_si256(codes, where_set(fifth, every(1 << i), 16));
        // SAFETY: the caller's.
        unsafe { sink.put::<true>(codes, [scale; 2], [-min; 2]) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q6k<S: Sink>(b: &[u8; 210], sink: &mut S) {
    let [_, d] = halves(b, 206);
    for i in 0..8 {
        let (part, quarter) = (i / 4, i % 4);
        let low = bits(load(&b[part * 64 + quarter % 2 * 32..]), quarter / 2 * 4, 15);
        let high = _mm256_slli_epi16::<4>(bits(load(&b[128 + part * 32..]), quarter * 2, 3));
        let codes = _mm256_sub_epi8(_mm256_or_si256(low, high), every(32));
        let scale = [b[192 + 2 * i], b[192 + 2 * i + 1]].map(|scale| d * f32::from(scale as i8));
        // SAFETY: the caller's.
        unsafe { sink.put::<false>(codes, scale, [0.0; 2]) };
    }
}

/// A scale in f32, then bytes; what follows is for products.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8k<S: Sink>(b: &[u8; 292], sink: &mut S) {
    let d = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    for i in 0..8 {
        // SAFETY: the caller's.
        unsafe { sink.put::<false>(load(&b[4 + 32 * i..]), [d; 2], [0.0; 2]) };
    }
}
