//! Numbers of 2, 3, 4 or 8 bits in a stream of bytes, the highest bit first: number i takes bits `i·b … i·b + b − 1` from the top of the first
//! byte. In 4 bits the first of two numbers is the upper half of a byte, as bitsandbytes has it.

/// Bytes of `count` numbers of `bits` bits.
pub fn bytes(count: usize, bits: usize) -> usize {
    (count * bits).div_ceil(8)
}

/// Number `at` of a stream.
#[inline]
pub fn get(stream: &[u8], bits: usize, at: usize) -> u8 {
    let bit = at * bits;
    let (byte, inside) = (bit / 8, bit % 8);
    let word = u16::from(stream[byte]) << 8 | u16::from(stream.get(byte + 1).copied().unwrap_or(0));
    ((word >> (16 - inside - bits)) & ((1 << bits) - 1)) as u8
}

/// Puts numbers into a stream that begins with the first of them; numbers keep their low `bits`.
pub fn pack(numbers: &[u8], bits: usize, stream: &mut [u8]) {
    let (mut word, mut held, mut out) = (0u32, 0, stream.iter_mut());
    for &number in numbers {
        word = word << bits | u32::from(number) & ((1 << bits) - 1);
        held += bits;
        if held >= 8 {
            held -= 8;
            if let Some(byte) = out.next() {
                *byte = (word >> held) as u8;
            }
        }
    }
    if held > 0
        && let Some(byte) = out.next()
    {
        *byte = (word << (8 - held)) as u8;
    }
}

/// Numbers from `at` on, each given to `put` with its place among them.
#[inline]
pub fn each(stream: &[u8], bits: usize, at: usize, count: usize, put: impl FnMut(usize, u8)) {
    match bits {
        2 => units::<2, 4, 1>(stream, at, count, put),
        3 => units::<3, 8, 3>(stream, at, count, put),
        4 => units::<4, 2, 1>(stream, at, count, put),
        _ => units::<8, 1, 1>(stream, at, count, put),
    }
}

/// 32 numbers of 4 bits.
#[inline(always)]
pub fn fours(bytes: &[u8; 16]) -> [u8; 32] {
    let mut numbers = [0; 32];
    for (two, &byte) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *two = [byte >> 4, byte & 15];
    }
    numbers
}

/// `UNIT` numbers fill `BYTES` bytes.
#[inline(always)]
fn units<const BITS: usize, const UNIT: usize, const BYTES: usize>(
    stream: &[u8],
    at: usize,
    count: usize,
    mut put: impl FnMut(usize, u8),
) {
    let first = at.next_multiple_of(UNIT).min(at + count);
    (at..first).for_each(|i| put(i - at, get(stream, BITS, i)));
    let whole = (at + count - first) / UNIT;
    let start = first / UNIT * BYTES;
    for (u, bytes) in stream[start.min(stream.len())..].chunks_exact(BYTES).take(whole).enumerate() {
        let word = bytes.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
        for i in 0..UNIT {
            put(first - at + u * UNIT + i, ((word >> (BYTES * 8 - BITS * (i + 1))) & ((1 << BITS) - 1)) as u8);
        }
    }
    (first + whole * UNIT..at + count).for_each(|i| put(i - at, get(stream, BITS, i)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To be seen to fail: `first` of [`units`] not rounded up.
    #[test]
    fn numbers_come_back_from_anywhere() {
        for bits in [2, 3, 4, 8] {
            let numbers: Vec<u8> = (0..67usize).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            let mut stream = vec![0; bytes(numbers.len(), bits)];
            pack(&numbers, bits, &mut stream);
            for at in 0..numbers.len() {
                assert_eq!(get(&stream, bits, at), numbers[at], "{bits} bits, {at}");
                for count in 0..=numbers.len() - at {
                    let mut found = vec![0; count];
                    each(&stream, bits, at, count, |i, v| found[i] = v);
                    assert_eq!(found, numbers[at..at + count], "{bits} bits, {count} from {at}");
                }
            }
        }
        let mut stream = [0; 2];
        pack(&[1, 2, 3], 4, &mut stream);
        assert_eq!(stream, [0x12, 0x30]);
    }
}
