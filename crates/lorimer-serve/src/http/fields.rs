//! Fields of a JSON body, taken out one by one: null is absent, a problem names its field, and what nobody takes is refused.

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::ApiError;

/// Longest part of a wrong value that is shown.
const SHOWN: usize = 60;

/// The fields of an object that have not been taken yet.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    map: Map<String, Value>,
    /// Where the object stands: empty for the body, `stream_options.` for a field's.
    within: String,
    /// A field that stood twice.
    repeated: Option<String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some((key, value)) = items.next_entry::<String, Value>()? {
                    if fields.map.contains_key(&key) {
                        fields.repeated = Some(key);
                    } else {
                        fields.map.insert(key, value);
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    /// Refuses an object in which a field stands twice, and takes out what is null.
    pub fn checked(mut self) -> Result<Self, ApiError> {
        if let Some(key) = self.repeated {
            let message = format!("`{}` stands twice in the body; give it once", shown(&key));
            return Err(ApiError::field(shown(&key), message));
        }
        self.map.retain(|_, value| !value.is_null());
        Ok(self)
    }

    /// The fields as one value.
    pub fn into_value(self) -> Value {
        Value::Object(self.map)
    }

    /// A field, where it is there.
    pub fn take<T: Field>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let value = self.map.shift_remove(name);
        value.map(|value| T::read(value, &format!("{}{name}", self.within))).transpose()
    }

    /// A field that has to be there.
    pub fn needed<T: Field>(&mut self, name: &str) -> Result<T, ApiError> {
        let at = format!("{}{name}", self.within);
        self.take(name)?.ok_or_else(|| ApiError::field(&at, format!("`{at}` is missing")))
    }

    /// What has not been taken, each with its place.
    pub fn rest(&self) -> impl Iterator<Item = (String, &Value)> {
        self.map.iter().map(|(key, value)| (format!("{}{}", self.within, shown(key)), value))
    }

    /// Refuses what has not been taken.
    pub fn done(self) -> Result<(), ApiError> {
        self.rest().next().map_or(Ok(()), |(name, _)| Err(unknown(&name)))
    }
}

/// A field that this server does not know.
pub fn unknown(name: &str) -> ApiError {
    let message =
        format!("this server knows no field `{name}`; take it out (docs/serving.md names those that there are)");
    ApiError::field(name, message)
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

/// Refuses a value that is not what it should be.
pub fn wrong(at: &str, what: &str, value: &Value) -> ApiError {
    let is = match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) => format!("{:?}", shown(text)),
        other => shown(&other.to_string()),
    };
    ApiError::field(at, format!("`{at}` should be {what}, not {is}"))
}

/// What a field can hold.
pub trait Field: Sized {
    /// From the value of the field at `at`.
    fn read(value: Value, at: &str) -> Result<Self, ApiError>;
}

/// A whole number, `5.0` included.
fn whole(value: &Value) -> Option<i128> {
    let float = |f: f64| (f.fract() == 0.0 && f.abs() <= 9e15).then_some(f as i128);
    let number = value.as_number()?;
    number.as_i128().or_else(|| number.as_f64().and_then(float))
}

impl Field for bool {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        value.as_bool().ok_or_else(|| wrong(at, "true or false", &value))
    }
}

impl Field for usize {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let number = whole(&value).and_then(|n| Self::try_from(n).ok());
        number.ok_or_else(|| wrong(at, "a whole number of 0 or more", &value))
    }
}

impl Field for i64 {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        whole(&value).and_then(|n| Self::try_from(n).ok()).ok_or_else(|| wrong(at, "a whole number", &value))
    }
}

impl Field for f64 {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        value.as_f64().ok_or_else(|| wrong(at, "a number", &value))
    }
}

impl Field for f32 {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let number = value.as_f64().map(|n| n as Self).filter(|n| n.is_finite());
        number.ok_or_else(|| wrong(at, "a number in single precision", &value))
    }
}

impl Field for String {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(wrong(at, "a text", &other)),
        }
    }
}

impl Field for Map<String, Value> {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(map),
            other => Err(wrong(at, "an object", &other)),
        }
    }
}

impl Field for Fields {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let map = Map::read(value, at)?;
        Self { map, within: format!("{at}."), repeated: None }.checked()
    }
}

/// Whatever the field holds.
impl Field for Value {
    fn read(value: Value, _: &str) -> Result<Self, ApiError> {
        Ok(value)
    }
}

impl<T: Field> Field for Vec<T> {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Array(items) => {
                let mut place = at.to_string();
                let read = |(i, item): (usize, Value)| {
                    use std::fmt::Write as _;
                    // One text for all places: lists of tokens are long.
                    place.truncate(at.len());
                    let _ = write!(place, "[{i}]");
                    T::read(item, &place)
                };
                items.into_iter().enumerate().map(read).collect()
            }
            other => Err(wrong(at, "a list", &other)),
        }
    }
}

impl Field for u32 {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let number = whole(&value).and_then(|n| Self::try_from(n).ok());
        number.ok_or_else(|| wrong(at, "a token's number", &value))
    }
}

/// One text or several.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Texts {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Texts {
    /// All of them.
    pub fn all(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

impl Field for Texts {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::String(one) => Ok(Self::One(one)),
            Value::Array(_) => Vec::read(value, at).map(Self::Many),
            other => Err(wrong(at, "a text or a list of texts", &other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(text: &str) -> Result<Fields, ApiError> {
        serde_json::from_str::<Fields>(text).unwrap().checked()
    }

    #[test]
    fn numbers_are_taken_in_every_way_of_writing_them() {
        for (text, is) in
            [("5", Some(5)), ("5.0", Some(5)), ("5e0", Some(5)), ("5.5", None), ("\"5\"", None), ("1e300", None)]
        {
            let mut fields = fields(&format!("{{\"n\": {text}}}")).unwrap();
            assert_eq!(fields.take::<usize>("n").ok().flatten(), is, "{text}");
        }
        assert_eq!(
            usize::read(json!(-1), "n").unwrap_err().message,
            "`n` should be a whole number of 0 or more, not -1"
        );
        assert_eq!(usize::read(json!(u64::MAX), "n").unwrap(), usize::MAX);
        assert_eq!(f32::read(json!(1e39), "scale").unwrap_err().param.as_deref(), Some("scale"));
    }

    #[test]
    fn null_is_absent_and_what_is_left_is_refused() {
        let mut f = fields(r#"{"a": null, "b": {"c": null, "d": 1}, "e": 2}"#).unwrap();
        assert_eq!(f.take::<bool>("a").unwrap(), None);
        let mut inner = f.take::<Fields>("b").unwrap().unwrap();
        assert_eq!(inner.take::<bool>("c").unwrap(), None);
        assert_eq!(inner.done().unwrap_err().param.as_deref(), Some("b.d"));
        assert_eq!(f.done().unwrap_err().param.as_deref(), Some("e"));
        assert_eq!(fields(r#"{"a": 1, "a": 1}"#).unwrap_err().param.as_deref(), Some("a"));
        assert_eq!(Vec::<String>::read(json!(["x", 1]), "stop").unwrap_err().param.as_deref(), Some("stop[1]"));
    }
}
