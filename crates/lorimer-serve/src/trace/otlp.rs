//! Spans as OTLP has them: `ExportTraceServiceRequest` of opentelemetry-proto 1.x, in protobuf, the encoding that every collector takes.

use lorimer_model::protobuf::{bytes, fixed32, fixed64, number};

use super::span::{Span, Value};

/// `SPAN_KIND_SERVER`.
const SERVER: u64 = 2;
/// `STATUS_CODE_ERROR`.
const ERROR: u64 = 2;
/// `SpanFlags`: the trace's own flag `sampled`; that it is known whether the parent is in another process; that it is.
const SAMPLED: u32 = 0x01;
const KNOWN: u32 = 0x100;
const REMOTE: u32 = 0x200;

fn any(value: &Value) -> Vec<u8> {
    match value {
        Value::Text(text) => bytes(1, text.as_bytes()),
        Value::Int(n) => number(3, *n as u64),
        Value::Double(x) => fixed64(4, x.to_bits()),
        Value::Texts(all) => {
            bytes(5, &all.iter().flat_map(|text| bytes(1, &bytes(1, text.as_bytes()))).collect::<Vec<_>>())
        }
    }
}

fn attribute(field: u32, key: &str, value: &Value) -> Vec<u8> {
    bytes(field, &[bytes(1, key.as_bytes()), bytes(2, &any(value))].concat())
}

fn span(span: &Span) -> Vec<u8> {
    let mut out = [bytes(1, &span.trace.to_be_bytes()), bytes(2, &span.id.to_be_bytes())].concat();
    if !span.state.is_empty() {
        out.extend(bytes(3, span.state.as_bytes()));
    }
    if let Some(parent) = span.parent {
        out.extend(bytes(4, &parent.to_be_bytes()));
    }
    out.extend(bytes(5, span.name.as_bytes()));
    out.extend(number(6, SERVER));
    out.extend(fixed64(7, span.time.0));
    out.extend(fixed64(8, span.time.1));
    for (key, value) in &span.attributes {
        out.extend(attribute(9, key, value));
    }
    if span.failed {
        out.extend(bytes(15, &number(3, ERROR)));
    }
    out.extend(fixed32(16, SAMPLED | KNOWN | if span.parent.is_some() { REMOTE } else { 0 }));
    out
}

/// The body that tells spans of what `resource` describes.
pub fn request(resource: &[(String, String)], spans: &[Span]) -> Vec<u8> {
    let of = |(key, value): &(String, String)| attribute(1, key, &Value::Text(value.clone()));
    let resource: Vec<u8> = resource.iter().flat_map(of).collect();
    let scope = [bytes(1, b"lorimer"), bytes(2, env!("CARGO_PKG_VERSION").as_bytes())].concat();
    let spans = spans.iter().flat_map(|one| bytes(2, &span(one)));
    let scoped: Vec<u8> = bytes(1, &scope).into_iter().chain(spans).collect();
    bytes(1, &[bytes(1, &resource), bytes(2, &scoped)].concat())
}

/// Spans that a collector did not take of those that it was sent: `ExportTraceServiceResponse { partial_success = 1 { rejected_spans = 1 } }`. An
/// answer that is something else tells of none.
pub fn rejected(answer: &[u8]) -> u64 {
    let Some(Field::Bytes(partial)) = field(answer, 1 << 3 | 2) else { return 0 };
    match field(partial, 1 << 3) {
        Some(Field::Number(n)) => n,
        _ => 0,
    }
}

/// The first field of a message with a tag.
fn field(message: &[u8], wanted: u64) -> Option<Field<'_>> {
    fields(message).into_iter().find(|(tag, _)| *tag == wanted).map(|(_, field)| field)
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Fields with their tags, up to one that is neither a number nor has a length, or is cut off.
fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut all = Vec::new();
    while let Some(tag) = read_varint(&mut message) {
        let Some(n) = read_varint(&mut message) else { break };
        let field = match tag & 7 {
            0 => Field::Number(n),
            2 => {
                let Some((bytes, rest)) = usize::try_from(n).ok().and_then(|n| message.split_at_checked(n)) else {
                    break;
                };
                message = rest;
                Field::Bytes(bytes)
            }
            _ => break,
        };
        all.push((tag, field));
    }
    all
}

fn read_varint(message: &mut &[u8]) -> Option<u64> {
    let end = message.iter().take(10).position(|b| b & 0x80 == 0)? + 1;
    let (number, rest) = message.split_at(end);
    *message = rest;
    Some(number.iter().rev().fold(0, |n, b| n << 7 | u64::from(b & 0x7f)))
}

#[cfg(test)]
mod tests {
    use lorimer_model::protobuf::varint;

    use super::*;

    /// The bytes that the schema gives by hand. That all of a request are read by the official schema, `tests/clients/check.py` holds.
    #[test]
    fn a_span_is_written_as_the_schema_has_it() {
        let one = Span {
            trace: 1,
            id: 2,
            parent: Some(3),
            state: "a=1".into(),
            name: "n".into(),
            time: (4, 5),
            attributes: vec![("k", Value::Int(-1)), ("l", Value::Texts(vec!["x".into()])), ("d", Value::Double(1.0))],
            failed: true,
        };
        let expected = [
            &[0x0a, 16][..],
            &[0; 15],
            &[1],
            &[0x12, 8],
            &[0; 7],
            &[2],
            b"\x1a\x03a=1",
            b"\x22\x08",
            &[0; 7],
            &[3],
            b"\x2a\x01n\x30\x02",
            b"\x39",
            &4u64.to_le_bytes(),
            b"\x41",
            &5u64.to_le_bytes(),
            b"\x4a\x10\x0a\x01k\x12\x0b\x18",
            &[0xff; 9],
            &[1],
            b"\x4a\x0c\x0a\x01l\x12\x07\x2a\x05\x0a\x03\x0a\x01x",
            b"\x4a\x0e\x0a\x01d\x12\x09\x21",
            &1f64.to_le_bytes(),
            b"\x7a\x02\x18\x02\x85\x01\x01\x03\x00\x00",
        ]
        .concat();
        assert_eq!(span(&one), expected);
    }

    /// Whatever a collector answers is read to its end. To be seen to fail: a length that is not looked at.
    #[test]
    fn what_a_collector_rejects_is_counted() {
        assert_eq!(rejected(b""), 0);
        assert_eq!(rejected(b"\x0a\x02\x08\x05"), 5);
        assert_eq!(rejected(b"\x0a\x06\x12\x02no\x08\x05"), 5);
        assert_eq!(rejected(b"\x0a\x05\x08\xac\x02\x12\x00"), 300);
        for odd in [
            &b"\x0a"[..],
            b"\x0a\xff",
            b"\x0a\x05\x08",
            b"{}",
            &[0xff; 40],
            b"\x0d\x01\x02\x03\x04",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        ] {
            assert_eq!(rejected(odd), 0, "{odd:?}");
        }
        assert_eq!(read_varint(&mut &varint(u64::MAX)[..]), Some(u64::MAX));
    }
}
