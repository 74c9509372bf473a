//! Methods of Python's texts, lists and dictionaries.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, State};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::bounds::{check_widths, refuse};

/// Longest text that a method fills up to.
const MAX_WIDTH: usize = 1 << 16;

/// A method that minijinja's values do not have themselves.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format"
        && let Some(text) = value.as_str()
    {
        check_widths(text)?;
    }
    let own = match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => of_text(text, name, args)?,
            None => None,
        },
        ValueKind::Seq => of_list(value, name, args)?,
        ValueKind::Map if name == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn of_list(list: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "copy" => {
            let () = from_args(args)?;
            list.clone()
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            Value::from(at.ok_or_else(|| refuse("index: the list does not hold the value"))?)
        }
        _ => return Ok(None),
    }))
}

/// What Python takes for blank.
fn blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The part of a text between two indices of characters, as Python's slices count them, and the byte at which it begins.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    let count = text.chars().count() as i64;
    let place = |index: i64| if index < 0 { (count + index).max(0) } else { index };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(count)).min(count));
    if start > end {
        return None;
    }
    let byte = |index: i64| text.char_indices().nth(index as usize).map_or(text.len(), |(at, _)| at);
    Some((&text[byte(start)..byte(end)], byte(start)))
}

fn texts<'a>(parts: impl IntoIterator<Item = &'a str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn of_text(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => strip(text, name, args)?,
        "split" | "rsplit" => split(text, name, args)?,
        "partition" | "rpartition" => partition(text, name, args)?,
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = if named.has("keepends") { named.get("keepends")? } else { keep };
            named.assert_all_used()?;
            split_lines(text, keep.unwrap_or(false))
        }
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            Value::from(slice(text, start, end).map_or(0, |(part, _)| part.matches(what).count()))
        }
        "find" | "rfind" | "index" | "rindex" => find(text, name, args)?,
        "startswith" | "endswith" if args.len() > 1 => starts_or_ends(text, name, args)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "ljust" | "rjust" | "center" | "zfill" => fill(text, name, args)?,
        "expandtabs" => expand_tabs(text, args)?,
        _ => match without_arguments(text, name) {
            Some(result) => {
                let () = from_args(args)?;
                result
            }
            None => return Ok(None),
        },
    }))
}

/// The methods that take no argument: changes of case, and tests of all characters.
fn without_arguments(text: &str, name: &str) -> Option<Value> {
    let only = |predicate: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(predicate));
    Some(match name {
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "title" => Value::from(title(text)),
        "istitle" => Value::from(is_title(text)),
        // Letters and other numbers have no digit's value; in other scripts digits of ten stand in a row.
        "isdecimal" => only(|c| c.is_numeric() && is_decimal(c)),
        "isdigit" => {
            only(|c| c.is_numeric() && (is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉')))
        }
        "isspace" => only(blank),
        "isidentifier" => {
            let begins = text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            Value::from(begins && text.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }
        "isprintable" => Value::from(text.chars().all(|c| c == ' ' || !(c.is_control() || c.is_whitespace()))),
        _ => return None,
    })
}

fn strip(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let cut = |c: char| chars.map_or_else(|| blank(c), |chars| chars.contains(c));
    let text = if name == "rstrip" { text } else { text.trim_start_matches(cut) };
    Ok(Value::from(if name == "lstrip" { text } else { text.trim_end_matches(cut) }))
}

fn split(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (sep, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let sep = if named.has("sep") { named.get("sep")? } else { sep };
    let most = if named.has("maxsplit") { named.get("maxsplit")? } else { most };
    named.assert_all_used()?;
    let most = usize::try_from(most.unwrap_or(-1)).unwrap_or(usize::MAX);
    let Some(sep) = sep.filter(|s| !s.is_none()) else {
        return Ok(split_blanks(text, most, name == "rsplit"));
    };
    let sep = sep.as_str().filter(|s| !s.is_empty());
    let sep = sep.ok_or_else(|| refuse(format!("{name}: the separator should be a text that is not empty")))?;
    if name == "split" {
        return Ok(texts(text.splitn(most.saturating_add(1), sep)));
    }
    let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), sep).collect();
    parts.reverse();
    Ok(texts(parts))
}

fn partition(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (sep,): (&str,) = from_args(args)?;
    if sep.is_empty() {
        return Err(refuse(format!("{name}: the separator is empty")));
    }
    let first = name == "partition";
    let parts = match if first { text.split_once(sep) } else { text.rsplit_once(sep) } {
        Some((before, after)) => [before, sep, after],
        None if first => [text, "", ""],
        None => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// `find` and `index`, from the left or the right.
fn find(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let first = matches!(name, "find" | "index");
    let part = slice(text, start, end);
    let at = part.and_then(|(part, from)| Some(from + if first { part.find(what) } else { part.rfind(what) }?));
    match at {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(refuse(format!("{name}: the text does not hold `{what}`"))),
    }
}

/// `startswith` and `endswith` of a part of the text, with one text or several.
fn starts_or_ends(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let has = |what: &Value| {
        let what = what.as_str().ok_or_else(|| refuse(format!("{name} takes a text or several")))?;
        let fits =
            |(part, _): (&str, usize)| if name == "startswith" { part.starts_with(what) } else { part.ends_with(what) };
        Ok::<_, Error>(slice(text, start, end).is_some_and(fits))
    };
    if what.as_str().is_some() {
        return Ok(Value::from(has(what)?));
    }
    let mut found = false;
    for one in what.try_iter()? {
        found |= has(&one)?;
    }
    Ok(Value::from(found))
}

/// `ljust`, `rjust`, `center` and `zfill`.
fn fill(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let fill = match fill.map(|f| (f.chars().next(), f.chars().count())) {
        None if name == "zfill" => '0',
        None => ' ',
        Some((Some(c), 1)) if name != "zfill" => c,
        Some(_) => return Err(refuse(format!("{name}: what it fills with should be one character"))),
    };
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    if missing > MAX_WIDTH {
        return Err(refuse(format!("{name}: the width is over {MAX_WIDTH}")));
    }
    let fill = |count: usize| fill.to_string().repeat(count);
    Ok(Value::from(match name {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => match text.strip_prefix(['-', '+']) {
            Some(digits) => format!("{}{}{digits}", &text[..1], fill(missing)),
            None => format!("{}{text}", fill(missing)),
        },
        // As Python divides what is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill(left), fill(missing - left))
        }
    }))
}

fn title(text: &str) -> String {
    let (mut out, mut inside) = (String::with_capacity(text.len()), false);
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

fn is_title(text: &str) -> bool {
    let (mut right, mut some, mut inside) = (true, false, false);
    for c in text.chars() {
        right &= !(c.is_uppercase() && inside || c.is_lowercase() && !inside);
        inside = c.is_uppercase() || c.is_lowercase();
        some |= inside;
    }
    right && some
}

fn expand_tabs(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (size,): (Option<i64>,) = from_args(args)?;
    let size = usize::try_from(size.unwrap_or(8)).unwrap_or(0);
    if size > 64 {
        return Err(refuse("expandtabs: the width is over 64"));
    }
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for c in text.chars() {
        match c {
            '\t' => {
                let step = if size == 0 { 0 } else { size - column % size };
                out.extend(std::iter::repeat_n(' ', step));
                column += step;
            }
            c => {
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                out.push(c);
            }
        }
    }
    Ok(Value::from(out))
}

/// Whether a numeric character is a digit of ten. Those outside ASCII that templates meet are full-width and Arabic ones.
fn is_decimal(c: char) -> bool {
    c.is_ascii_digit() || matches!(c, '٠'..='٩' | '۰'..='۹' | '०'..='९' | '０'..='９')
}

fn split_blanks(text: &str, most: usize, from_right: bool) -> Value {
    let mut parts = Vec::new();
    let mut rest = text.trim_matches(blank);
    while !rest.is_empty() {
        let cut = if parts.len() >= most {
            None
        } else if from_right {
            rest.rfind(blank)
        } else {
            rest.find(blank)
        };
        let Some(at) = cut else {
            // Blanks at the side that was not come to stay with the last part, as they do in Python.
            parts.push(rest);
            break;
        };
        let next = at + rest[at..].chars().next().map_or(1, char::len_utf8);
        let (part, remaining) = match from_right {
            true => (&rest[next..], rest[..at].trim_end_matches(blank)),
            false => (&rest[..at], rest[next..].trim_start_matches(blank)),
        };
        parts.push(part);
        rest = remaining;
    }
    if from_right {
        parts.reverse();
    }
    texts(parts)
}

fn split_lines(text: &str, keep: bool) -> Value {
    let end_of_line = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let Some(at) = rest.find(end_of_line) else {
            lines.push(rest);
            break;
        };
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..if keep { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    texts(lines)
}
