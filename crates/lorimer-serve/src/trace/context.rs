//! W3C Trace Context, level 1: what `traceparent` and `tracestate` say of the caller of a request.
//!
//! A `traceparent` that is not as the specification has it counts as none, and its `tracestate` with it; a `tracestate` that is not counts as none alone.

use std::ops::Range;

use axum::http::HeaderMap;

/// Most members of a `tracestate`.
const MEMBERS: usize = 32;
/// Most bytes of a `tracestate` that are kept: as many as the specification asks to keep.
const STATE: usize = 512;
/// Members longer than this are left out first where a `tracestate` is too long.
const LONG_MEMBER: usize = 128;

/// The span that a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The trace; not zero.
    pub trace: u128,
    /// The span; not zero.
    pub span: u64,
    /// Whether the caller may have recorded it.
    pub sampled: bool,
    /// Its `tracestate`, members with a comma between two.
    pub state: String,
}

impl Parent {
    /// What the headers of a request say.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all("traceparent").iter();
        let (trace, span, flags) = traceparent(all.next()?.as_bytes())?;
        // Of two nobody knows which is right.
        if all.next().is_some() {
            return None;
        }
        Some(Self { trace, span, sampled: flags & 1 == 1, state: tracestate(headers).unwrap_or_default() })
    }
}

/// Trace, span and flags: `00-TRACE-SPAN-FLAGS`, in lower-case hexadecimal.
fn traceparent(text: &[u8]) -> Option<(u128, u64, u8)> {
    let hex = |range: Range<usize>| {
        let digits = text.get(range)?;
        let lower = digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        u128::from_str_radix(std::str::from_utf8(digits).ok().filter(|_| lower)?, 16).ok()
    };
    let (version, trace, span, flags) = (hex(0..2)?, hex(3..35)?, hex(36..52)?, hex(53..55)?);
    let dashes = [2, 35, 52].iter().all(|&at| text[at] == b'-');
    // A later version may go on after a dash.
    let ends = text.len() == 55 || version > 0 && text[55] == b'-';
    let valid = version != 0xff && dashes && ends && trace != 0 && span != 0;
    valid.then_some((trace, span as u64, flags as u8))
}

/// The members of all `tracestate` headers in their order; None where they are not as they should be.
fn tracestate(headers: &HeaderMap) -> Option<String> {
    let mut members: Vec<&str> = Vec::new();
    for header in headers.get_all("tracestate") {
        let all = header.to_str().ok()?.split(',').map(|member| member.trim_matches([' ', '\t']));
        members.extend(all.filter(|member| !member.is_empty()));
    }
    let mut keys = Vec::new();
    for member in &members {
        let (key, value) = member.split_once('=')?;
        if !is_key(key) || !is_value(value) || keys.contains(&key) || keys.len() == MEMBERS {
            return None;
        }
        keys.push(key);
    }
    let length = |members: &[&str]| members.iter().map(|m| m.len() + 1).sum::<usize>().saturating_sub(1);
    if length(&members) > STATE {
        members.retain(|member| member.len() <= LONG_MEMBER);
    }
    while length(&members) > STATE {
        members.pop();
    }
    Some(members.join(","))
}

/// `key`, or `tenant@system`.
fn is_key(key: &str) -> bool {
    let begins = |text: &str, digit: bool| {
        text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || digit && b.is_ascii_digit())
    };
    let letters = |text: &str| {
        text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-' | b'*' | b'/'))
    };
    match key.split_once('@') {
        None => key.len() <= 256 && begins(key, false) && letters(key),
        Some((tenant, system)) => {
            tenant.len() <= 241
                && system.len() <= 14
                && begins(tenant, true)
                && begins(system, false)
                && letters(tenant)
                && letters(system)
        }
    }
}

/// Up to 256 printable characters but `,` and `=`, of which the last is no space.
fn is_value(value: &str) -> bool {
    let printable = value.bytes().all(|b| matches!(b, b' '..=b'~') && b != b',' && b != b'=');
    (1..=256).contains(&value.len()) && printable && !value.ends_with(' ')
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const TRACE: u128 = 0x4bf92f3577b34da6a3ce929d0e0e4736;
    const SPAN: u64 = 0x00f067aa0ba902b7;

    fn parent(all: &[(&'static str, &str)]) -> Option<Parent> {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        Parent::of(&headers)
    }

    /// The examples of the specification. To be seen to fail: flags compared with 1.
    #[test]
    fn the_examples_of_the_specification_are_read() {
        let read = |text: &str| parent(&[("traceparent", text)]).map(|p| (p.trace, p.span, p.sampled));
        assert_eq!(read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), Some((TRACE, SPAN, true)));
        assert_eq!(read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"), Some((TRACE, SPAN, false)));
        let own = Some((0x0af7651916cd43dd8448eb211c80319c, 0xb7ad6b7169203331, true));
        assert_eq!(read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), own);
        // Flags that this version does not know.
        assert_eq!(read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff"), Some((TRACE, SPAN, true)));
        assert_eq!(read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02"), Some((TRACE, SPAN, false)));
        // Later versions, as far as they are known.
        for later in ["cc-{}", "cc-{}-what-the-future-will-be-like", "01-{}-", "fe-{}-."] {
            let text = later.replace("{}", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
            assert_eq!(read(&text), Some((TRACE, SPAN, true)), "{text}");
        }
    }

    /// The cases of the W3C's own test of implementations, and worse. To be seen to fail: `is_ascii_hexdigit`, no look at the length.
    #[test]
    fn what_is_no_traceparent_is_none() {
        let bad = [
            "",
            "-",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-001",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0X",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-.0",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.what-the-future",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-010",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "FF-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            ".0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "000-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00F067AA0BA902B7-01",
            "00-.bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47360-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b70-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01,00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
        ];
        for text in bad {
            assert_eq!(parent(&[("traceparent", text), ("tracestate", "a=1")]), None, "{text}");
        }
        assert_eq!(parent(&[("traceparent", &"00-".repeat(10_000))]), None);
        let good = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(parent(&[good, good]), None, "of two headers none counts");
        assert_eq!(parent(&[("tracestate", "a=1")]), None);
    }

    /// To be seen to fail: a bad `tracestate` that takes its `traceparent` with it, members of one header only.
    #[test]
    fn a_tracestate_is_kept_or_counts_as_none() {
        let state = |all: &[&str]| {
            let mut headers = vec![("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")];
            headers.extend(all.iter().map(|value| ("tracestate", *value)));
            parent(&headers).expect("its traceparent is good").state
        };
        assert_eq!(state(&["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"]), "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE");
        assert_eq!(state(&["foo=1", "bar=2"]), "foo=1,bar=2");
        assert_eq!(state(&["foo=1 \t , \t bar=2, ", "", ",baz=3"]), "foo=1,bar=2,baz=3");
        let value: String = (b' '..=b'~').map(char::from).filter(|c| !matches!(c, ',' | '=')).collect();
        assert_eq!(state(&[&format!("key={value}")]), format!("key={value}"));
        assert_eq!(
            state(&["abcdefghijklmnopqrstuvwxyz0123456789_-*/= 1"]),
            "abcdefghijklmnopqrstuvwxyz0123456789_-*/= 1"
        );
        for key in ["fw529a3039@dt", "0@a", &format!("{}@{}", "t".repeat(241), "v".repeat(14)), &"z".repeat(256)] {
            assert!(key.len() > 128 || state(&[&format!("{key}=1")]) == format!("{key}=1"), "{key}");
            assert!(is_key(key), "{key}");
        }
        let many = |n: usize| (0..n).map(|i| format!("bar{i:02}={i:02}")).collect::<Vec<_>>().join(",");
        assert_eq!(state(&[&many(32)]), many(32));
        let bad = [
            "foo",
            "foo=",
            "=1",
            "foo =1",
            "FOO=1",
            "foo.bar=1",
            "foo@=1,bar=2",
            "@foo=1",
            "foo@@bar=1",
            "foo@bar@baz=1",
            "foo@0=1",
            "0foo=1",
            "foo=bar=baz",
            "foo=é",
            "foo=1,foo=1",
            "foo=1;bar=2",
        ];
        for text in bad {
            assert_eq!(state(&[text]), "", "{text}");
        }
        for text in [many(33), format!("{}=1", "z".repeat(257)), format!("a={}", "v".repeat(257))] {
            assert_eq!(state(&[&text]), "", "{text}");
        }
        for key in [format!("{}@v", "t".repeat(242)), format!("t@{}", "v".repeat(15))] {
            assert_eq!(state(&[&format!("{key}=1")]), "", "{key}");
        }
        // What is too long loses its long members first, then its last ones.
        let long = format!("a=1,long={},{},last=1", "x".repeat(250), many(32 - 3));
        assert_eq!(state(&[&long]), format!("a=1,{},last=1", many(32 - 3)));
        let values: Vec<String> = (0..8).map(|i| format!("k{i}={}", "x".repeat(100))).collect();
        assert_eq!(state(&[&values.join(",")]), values[..4].join(","));
    }
}
