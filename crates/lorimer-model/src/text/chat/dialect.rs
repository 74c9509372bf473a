//! Filters, functions and tests as transformers' templates have them: jinja2's and Python's.

mod arguments;
mod json;

use std::fmt::Write as _;

use minijinja::formatting::{FormatStyle, format};
use minijinja::functions::namespace;
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, escape_formatter};
use minijinja_contrib::globals::{cycler, joiner};

use self::arguments::argument;
use self::json::{float, tojson};
use super::bounds::{MAX_DEPTH, MAX_INDENT, check_widths, refuse};
use super::methods::method;
use super::translate::{BOUNDED, BOUNDED_ATTRIBUTE, MARK, REMAINDER};

/// Characters around what stands in `{% generation %}`. Unicode keeps them for such uses; no text has them.
pub(super) const OPEN: char = '\u{FDD0}';
/// The second of them.
pub(super) const CLOSE: char = '\u{FDD1}';

/// Most values in such a value, each counted as often as it stands there.
const MAX_VALUES: usize = 500_000;

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
