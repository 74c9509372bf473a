//! The filter `tojson`, as Python's `json.dumps` writes.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::arguments::argument;
use crate::text::chat::bounds::{MAX_DEPTH, MAX_INDENT, refuse};

/// transformers' `tojson`: Python's `json.dumps` with its `ensure_ascii`, `indent`, `separators` and `sort_keys`, in this order
/// or by name.
pub(super) fn tojson(state: &State, value: Value, options: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let mut given: [Option<Value>; 4] = Default::default();
    if options.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    for (i, (slot, name)) in given.iter_mut().zip(NAMES).enumerate() {
        *slot = argument(options.get(i).cloned(), &named, name)?;
    }
    named.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = given.map(|v| v.filter(|v| !v.is_none()));
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_string),
        Some(width) if width.kind() == ValueKind::Bool => Some(" ".repeat(usize::from(width.is_true()))),
        Some(width) => {
            let width = i64::try_from(width)?.max(0);
            Some(" ".repeat(usize::try_from(width).unwrap_or(usize::MAX).min(MAX_INDENT + 1)))
        }
    };
    if indent.as_ref().is_some_and(|text| text.len() > MAX_INDENT) {
        return Err(refuse(format!("tojson: an indentation is at most {MAX_INDENT} bytes long")));
    }
    let (between_items, after_key) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.take(3).collect();
            match pair.as_slice() {
                [a, b] if a.as_str().is_some() && b.as_str().is_some() => (a.to_string(), b.to_string()),
                _ => return Err(refuse("tojson: `separators` should be two texts")),
            }
        }
    };
    let truth = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let mut json = Json {
        state,
        out: String::new(),
        paid: 0,
        ensure_ascii: truth(ensure_ascii),
        indent,
        between_items,
        after_key,
        sort_keys: truth(sort_keys),
    };
    json.value(&value, 0)?;
    Ok(Value::from_safe_string(json.out))
}

/// A JSON text as it is written.
struct Json<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    /// Bytes of the text that fuel was taken for.
    paid: usize,
    ensure_ascii: bool,
    indent: Option<String>,
    between_items: String,
    after_key: String,
    sort_keys: bool,
}

impl Json<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refuse(format!("tojson: a value is nested deeper than {MAX_DEPTH} levels")));
        }
        // A value may hold the same part many times, so that its text is far larger than it is.
        self.state.consume_fuel(1 + (self.out.len() - self.paid) as u64 / 64)?;
        self.paid = self.out.len();
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.items(['[', ']'], items, depth)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let mut items = Vec::with_capacity(keys.len());
                for key in keys {
                    let item = value.get_item(&key)?;
                    let text = match key.as_str() {
                        Some(text) => text.to_string(),
                        None => scalar(&key)?,
                    };
                    items.push((Some(text), item));
                }
                self.items(['{', '}'], items.into_iter(), depth)
            }
            ValueKind::String => {
                self.text(value.as_str().unwrap_or_default());
                Ok(())
            }
            _ => {
                self.out.push_str(&scalar(value)?);
                Ok(())
            }
        }
    }

    fn items(
        &mut self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut some = false;
        for (key, item) in items {
            if std::mem::replace(&mut some, true) {
                let between = self.between_items.clone();
                self.out.push_str(&between);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.text(&key);
                let after = self.after_key.clone();
                self.out.push_str(&after);
            }
            self.value(&item, depth + 1)?;
        }
        if some {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// A new line, where lines are indented.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// JSON of a value without parts.
pub(super) fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(match float(f64::try_from(value.clone())?).as_str() {
            "nan" => "NaN".into(),
            "inf" => "Infinity".into(),
            "-inf" => "-Infinity".into(),
            text => text.to_string(),
        }),
        kind => Err(refuse(format!("tojson: a value of kind {kind} has no JSON"))),
    }
}

/// A float as Python writes it: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".into()
        } else if value > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        exponent if value == 0.0 || (-4..16).contains(&exponent) => {
            let text = value.to_string();
            if text.contains('.') { text } else { text + ".0" }
        }
        exponent => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}
