//! A span: what is told of a request when it is over.

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A text.
    Text(String),
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// Texts.
    Texts(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(cut(text))
    }
}

impl From<usize> for Value {
    fn from(n: usize) -> Self {
        Self::Int(i64::try_from(n).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Self {
        Self::Double(x)
    }
}

/// Most letters of a text in a span, and most texts of a list: a queue of spans has a bound in bytes too.
const LETTERS: usize = 256;
const TEXTS: usize = 32;

/// The beginning of a text.
pub fn cut(text: &str) -> String {
    text.chars().take(LETTERS).collect()
}

/// Texts of a list.
pub fn list<'a>(all: impl Iterator<Item = &'a str>) -> Value {
    Value::Texts(all.take(TEXTS).map(cut).collect())
}

/// A request of a client, from its arrival to the end of its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The trace.
    pub trace: u128,
    /// Its number in it.
    pub id: u64,
    /// The caller's span; none where the trace begins here.
    pub parent: Option<u64>,
    /// `tracestate` of the caller.
    pub state: String,
    /// What it is called.
    pub name: String,
    /// When it began and ended, in nanoseconds since 1970.
    pub time: (u64, u64),
    /// What is told of it.
    pub attributes: Vec<(&'static str, Value)>,
    /// Whether it failed through no fault of the client.
    pub failed: bool,
}
