//! Filters, functions and tests as transformers' templates have them: jinja2's and Python's.

use std::fmt::Write as _;

use minijinja::formatting::{FormatStyle, format};
use minijinja::functions::namespace;
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, escape_formatter};
use minijinja_contrib::globals::{cycler, joiner};

use super::bounds::{check_widths, refuse};
use super::methods::method;
use super::translate::{BOUNDED, BOUNDED_ATTRIBUTE, MARK, REMAINDER};

/// Characters around what stands in `{% generation %}`. Unicode keeps them for such uses; no text has them.
pub(super) const OPEN: char = '\u{FDD0}';
/// The second of them.
pub(super) const CLOSE: char = '\u{FDD1}';
/// Deepest nesting of a value that is assigned, printed or written as JSON.
const MAX_DEPTH: usize = 200;
/// Most values in such a value, each counted as often as it stands there.
const MAX_VALUES: usize = 500_000;
/// Longest indentation of `tojson`, in bytes.
const MAX_INDENT: usize = 64;

/// Puts everything into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() => Ok(out.write_str(&float(number))?),
        _ => escape_formatter(out, state, &bounded(state, value.clone())?),
    });

    environment.add_filter(MARK, |text: &str| format!("{OPEN}{text}{CLOSE}"));
    environment.add_filter("tojson", tojson);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("int", int);
    environment.add_filter("float", |value: Value, default: Option<Value>, named: Kwargs| -> Result<Value, Error> {
        let default = argument(default, &named, "default")?;
        named.assert_all_used()?;
        Ok(number(&value).map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from))
    });
    environment.add_filter("indent", indent);
    environment.add_filter("center", |state: &mut State, value: Value, width: Option<i64>| -> Result<Value, Error> {
        method(state, &Value::from(value.to_string()), "center", &[Value::from(width.unwrap_or(80))])
    });
    environment.add_filter("wordcount", |value: Value| {
        let text = value.to_string();
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
    // Python's dictionaries have items and no attributes; minijinja's own filter takes one for the other.
    environment.add_filter("attr", |value: Value, name: &str| match value.kind() {
        ValueKind::Map => Ok(Value::UNDEFINED),
        _ => value.get_attr(name),
    });
    // It lays a value out otherwise than Python's.
    environment.remove_filter("pprint");

    environment.add_test("iterable", |value: Value| match value.kind() {
        ValueKind::Undefined => true,
        ValueKind::None => false,
        _ => value.try_iter().is_ok(),
    });
    environment.add_test("sequence", |value: Value| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        // A slice of a list and a range know their length; what is made as it is gone through does not.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    });
    environment.add_test("callable", |value: Value| value.kind() == ValueKind::Plain);

    // minijinja's own filters that jinja2 has not; these hold values in values.
    for name in ["chain", "zip"] {
        environment.remove_filter(name);
    }

    environment.add_function(BOUNDED, |state: &State, value: Value| bounded(state, value));
    // A namespace that holds one could hold itself.
    environment.add_function(BOUNDED_ATTRIBUTE, |state: &State, value: Value| match is_namespace(&value) {
        true => Err(refuse(NO_NAMESPACE)),
        false => bounded(state, value),
    });
    environment.add_function(REMAINDER, remainder);
    environment.add_function("dict", |given: Option<Value>, named: Kwargs| dict(given, &named));
    let of_one = Value::from_function(namespace);
    environment.add_function("namespace", move |state: &mut State, given: Option<Value>, named: Kwargs| {
        of_one.call(state, &[dict(given, &named)?])
    });
    environment.add_function("cycler", |items: Rest<Value>| cycler(items.to_vec()));
    environment.add_function("joiner", joiner);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(refuse(message)) });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(&format))
            .map_err(|_| refuse(format!("strftime_now: bad format `{format}`")))?;
        Ok(text)
    });
}

/// An argument by its place or its name.
fn argument(given: Option<Value>, named: &Kwargs, name: &str) -> Result<Option<Value>, Error> {
    if named.has(name) { named.get(name) } else { Ok(given) }
}

/// A new dictionary of another or of pairs, and of named values.
fn dict(given: Option<Value>, named: &Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    if let Some(given) = given {
        let is_map = given.kind() == ValueKind::Map;
        for item in given.try_iter()? {
            let pair = if is_map {
                let value = given.get_item(&item)?;
                (item, value)
            } else {
                match item.try_iter()?.take(3).collect::<Vec<_>>().as_slice() {
                    [key, value] => (key.clone(), value.clone()),
                    _ => return Err(refuse("dict: should be given pairs")),
                }
            };
            pairs.push(pair);
        }
    }
    for name in named.args() {
        pairs.push((Value::from(name), named.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}

fn default(value: Value, other: Option<Value>, lax: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let other = argument(other, &named, "default_value")?;
    let lax = argument(lax, &named, "boolean")?.is_some_and(|lax| lax.is_true());
    named.assert_all_used()?;
    let missing = value.is_undefined() || (lax && !value.is_true());
    Ok(if missing { other.unwrap_or_else(|| Value::from("")) } else { value })
}

fn dictsort(
    value: Value,
    case_sensitive: Option<Value>,
    by: Option<Value>,
    reverse: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let truth = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let case_sensitive = truth(argument(case_sensitive, &named, "case_sensitive")?);
    let by = argument(by, &named, "by")?;
    let reverse = truth(argument(reverse, &named, "reverse")?);
    named.assert_all_used()?;
    let by_value = match by.as_ref().map(|by| by.as_str()) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        Some(_) => return Err(refuse("dictsort: `by` should be `key` or `value`")),
    };
    if value.kind() != ValueKind::Map {
        return Err(refuse(format!("dictsort: takes a dictionary, found a {}", value.kind())));
    }
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        let sorted_by = if by_value { &item } else { &key };
        let sorted_by = match sorted_by.as_str() {
            Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
            _ => sorted_by.clone(),
        };
        pairs.push((sorted_by, Value::from(Tuple::from([key, item]))));
    }
    pairs.sort_by(|(a, _), (b, _)| if reverse { b.cmp(a) } else { a.cmp(b) });
    Ok(pairs.into_iter().map(|(_, pair)| pair).collect())
}

/// The number that a value is or that its text writes.
fn number(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::String => value.as_str()?.trim().replace('_', "").parse().ok(),
        ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        _ => f64::try_from(value.clone()).ok(),
    }
}

fn int(value: Value, default: Option<Value>, base: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let default = argument(default, &named, "default")?.unwrap_or_else(|| Value::from(0));
    let base = argument(base, &named, "base")?.map_or(Ok(10), u32::try_from)?;
    named.assert_all_used()?;
    if value.is_integer() {
        return Ok(value);
    }
    if let Some(text) = value.as_str() {
        let text = text.trim().replace('_', "");
        let prefix = match base {
            16 => "0x",
            8 => "0o",
            2 => "0b",
            _ => "",
        };
        let digits = text.strip_prefix(prefix).unwrap_or(&text);
        if (2..=36).contains(&base)
            && let Ok(whole) = i128::from_str_radix(digits, base)
        {
            return Ok(Value::from(whole));
        }
    }
    Ok(match number(&value) {
        Some(number) if number.is_finite() && number.abs() < 1e30 => Value::from(number.trunc() as i128),
        _ => default,
    })
}

fn indent(state: &State, text: String, options: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    if options.len() > 3 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |at: usize, name: &str| argument(options.get(at).cloned(), &named, name);
    let truth = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let (width, first, blank) = (option(0, "width")?, truth(option(1, "first")?), truth(option(2, "blank")?));
    named.assert_all_used()?;
    let margin = match width {
        None => "    ".to_string(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(usize::try_from(width)?.min(MAX_INDENT + 1)),
        },
    };
    if margin.len() > MAX_INDENT {
        return Err(refuse(format!("indent: a margin is at most {MAX_INDENT} bytes long")));
    }
    state.consume_fuel((text.split('\n').count() * margin.len() + text.len()) as u64 / 64)?;
    let mut out = if first { margin.clone() } else { String::new() };
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&margin);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Why a namespace cannot stand in another value.
const NO_NAMESPACE: &str = "a namespace cannot be held by a list, a dictionary or another namespace";

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// A value as it is, where it is neither nested too deeply nor holds too many. Looking costs fuel.
fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    fn count(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
        let too_many = || refuse(format!("a value holds more than {MAX_VALUES} others"));
        if value.len().is_some_and(|length| length > *left) && value.as_str().is_none() {
            return Err(too_many());
        }
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
            return Ok(());
        }
        if depth > MAX_DEPTH {
            return Err(refuse(format!("a value is nested deeper than {MAX_DEPTH} levels")));
        }
        if depth > 0 && is_namespace(value) {
            return Err(refuse(NO_NAMESPACE));
        }
        for item in value.try_iter()? {
            *left = left.checked_sub(1).ok_or_else(too_many)?;
            match value.kind() {
                ValueKind::Map => count(&value.get_item(&item)?, depth + 1, left)?,
                _ => count(&item, depth + 1, left)?,
            }
        }
        Ok(())
    }
    let mut left = MAX_VALUES;
    count(&value, 0, &mut left)?;
    state.consume_fuel((MAX_VALUES - left) as u64)?;
    Ok(value)
}

/// Python's `%`: the remainder of numbers, with the sign of the second, or a text with its `%s` filled.
fn remainder(left: Value, right: Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        check_widths(text)?;
        let given: Vec<Value> = if right.is_tuple() { right.try_iter()?.collect() } else { vec![right] };
        return format(FormatStyle::Printf, text, &given).map(Value::from);
    }
    let number = |v: &Value| matches!(v.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(&left) || !number(&right) {
        return Err(refuse(format!("`%` stands between a {} and a {}", left.kind(), right.kind())));
    }
    let whole = |v: &Value| {
        if v.kind() == ValueKind::Bool {
            Some(i128::from(v.is_true()))
        } else {
            v.is_integer().then(|| i128::try_from(v.clone()).ok())?
        }
    };
    if let (Some(a), Some(b)) = (whole(&left), whole(&right)) {
        let rest = a.checked_rem(b).ok_or_else(|| refuse("`%` by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let (a, b) = (f64::try_from(left)?, f64::try_from(right)?);
    if b == 0.0 {
        return Err(refuse("`%` by zero"));
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
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

/// transformers' `tojson`: Python's `json.dumps` with its `ensure_ascii`, `indent`, `separators` and `sort_keys`, in this order
/// or by name.
fn tojson(state: &State, value: Value, options: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
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
fn scalar(value: &Value) -> Result<String, Error> {
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
