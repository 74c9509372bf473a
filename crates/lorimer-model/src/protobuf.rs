//! The wire format of protobuf, as far as our messages go: tags, whole numbers, fixed ones and what has a length.

/// A whole number in groups of seven bits.
pub fn varint(mut n: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out
}

/// A field of bytes, a text or a message.
pub fn bytes(number: u32, bytes: &[u8]) -> Vec<u8> {
    [&varint(u64::from(number) << 3 | 2)[..], &varint(bytes.len() as u64), bytes].concat()
}

/// A field of a whole number (negative ones by their two's complement, as `int64` has them), a truth value or an enumeration.
pub fn number(number: u32, value: u64) -> Vec<u8> {
    [varint(u64::from(number) << 3), varint(value)].concat()
}

/// A field of eight bytes: `fixed64`, or the bits of a `double`.
pub fn fixed64(number: u32, value: u64) -> Vec<u8> {
    [&varint(u64::from(number) << 3 | 1)[..], &value.to_le_bytes()].concat()
}

/// A field of four bytes: `fixed32`, or the bits of a `float`.
pub fn fixed32(number: u32, value: u32) -> Vec<u8> {
    [&varint(u64::from(number) << 3 | 5)[..], &value.to_le_bytes()].concat()
}
