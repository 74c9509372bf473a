//! Which modules of a base an adapter touches, with PEFT's keys and rules.

use std::collections::HashSet;

use fancy_regex::{Regex, RegexBuilder};
use indexmap::IndexMap;
use lorimer_model::Site;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest pattern and longest list that is accepted from a file.
const MAX_PATTERN: usize = 10_000;
const MAX_LIST: usize = 10_000;
/// Most steps that one match may take: a path has about forty characters.
const MAX_STEPS: usize = 100_000;
/// Most patterns of ranks or α that are more than names.
const MAX_PATTERNS: usize = 1_000;

/// A regular expression over the whole path, or a list of names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// `all-linear`, or a regular expression of Python's `re` that must match the whole module path.
    Pattern(String),
    /// Names that are the path or its end after a dot.
    List(Vec<String>),
}

/// One number or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Indices {
    /// One layer.
    One(usize),
    /// Several layers.
    Many(Vec<usize>),
}

/// PEFT's keys that choose modules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Targeting {
    /// Projections to adapt: `all-linear` (all but the head), a list, or a regular expression.
    pub target_modules: Names,
    /// Projections to leave out though they match.
    pub exclude_modules: Option<Names>,
    /// Only these layers (counted from 0); for lists of names.
    pub layers_to_transform: Option<Indices>,
    /// Name of the list of layers that `layers_to_transform` counts in.
    pub layers_pattern: Option<Names>,
    /// Modules that are trained whole and saved beside the adapter, by the end of their path.
    pub modules_to_save: Option<Vec<String>>,
}

impl Default for Targeting {
    fn default() -> Self {
        Self {
            target_modules: Names::Pattern("all-linear".into()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: None,
        }
    }
}

impl Targeting {
    /// Refuses what PEFT refuses: a pattern of layers without layers.
    pub fn check(&self) -> Result<()> {
        let some = |names: &Names| match names {
            Names::Pattern(p) => !p.is_empty(),
            Names::List(list) => !list.is_empty(),
        };
        match self.layers_to_transform.is_none() && self.layers_pattern.as_ref().is_some_and(some) {
            true => {
                Err(Error::Config("layers_pattern is of use with layers_to_transform only, which is not set".into()))
            }
            false => Ok(()),
        }
    }
}

/// A regular expression of Python's `re`, with look-around and back-references.
pub struct Pattern {
    regex: Regex,
    shown: String,
}

impl Pattern {
    /// What matches as `re.fullmatch` does.
    pub fn whole(pattern: &str) -> Result<Self> {
        Self::new(pattern, "(?:", r")\z")
    }

    /// What matches as `re.match` does, from the beginning on, between two other patterns.
    fn beginning(before: &str, pattern: &str, after: &str) -> Result<Self> {
        Self::new(pattern, before, after)
    }

    fn new(pattern: &str, before: &str, after: &str) -> Result<Self> {
        if pattern.len() > MAX_PATTERN {
            let length = pattern.len();
            return Err(Error::Config(format!("a pattern of {length} characters, at most {MAX_PATTERN} are read")));
        }
        let shown: String = pattern.chars().take(60).collect();
        let shown = shown.escape_debug().to_string();
        let mut builder = RegexBuilder::new(&format!(r"\A(?:{before}{}{after})", plain_classes(pattern)));
        let builder = builder.backtrack_limit(MAX_STEPS).delegate_size_limit(1 << 20).delegate_dfa_size_limit(1 << 20);
        match builder.build() {
            Ok(regex) => Ok(Self { regex, shown }),
            Err(e) => {
                let reason = e.to_string();
                let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
                // Positions count what stands around the pattern here.
                let parsing = reason.strip_prefix("Parsing error at position ").and_then(|rest| rest.split_once(": "));
                let reason = parsing.map_or(reason, |(_, reason)| reason);
                Err(Error::Config(format!("`{shown}` is not a regular expression that can be used: {reason}")))
            }
        }
    }

    fn failed(&self, text: &str) -> Error {
        let text: String = text.chars().take(60).collect();
        let shown = &self.shown;
        Error::Config(format!(
            "the regular expression `{shown}` takes too many steps on `{text}`; write it without nested repetitions"
        ))
    }

    /// Whether it matches; an error where that takes too long to find out.
    pub fn matches(&self, text: &str) -> Result<bool> {
        self.regex.is_match(text).map_err(|_| self.failed(text))
    }

    /// What its group `idx` holds: None where it does not match, Some(None) where the group takes no part in the match.
    fn index(&self, text: &str) -> Result<Option<Option<String>>> {
        let found = self.regex.captures(text).map_err(|_| self.failed(text))?;
        Ok(found.map(|groups| groups.name("idx").map(|m| m.as_str().to_string())))
    }
}

/// A pattern in which classes of characters (`[…]`) hold no classes and no operations of sets: Python takes `[`, `&&` and `~~` there
/// as they stand.
fn plain_classes(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let (mut inside, mut chars) = (false, pattern.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                out.push(c);
                out.extend(chars.next());
                continue;
            }
            '[' if !inside => {
                inside = true;
                out.push('[');
                out.extend(chars.next_if_eq(&'^'));
                // A bracket that comes first does not close.
                if chars.next_if_eq(&']').is_some() {
                    out.push_str(r"\]");
                }
                continue;
            }
            ']' if inside => inside = false,
            '[' | '&' | '~' if inside => out.push('\\'),
            _ => {}
        }
        out.push(c);
    }
    out
}

fn ends_with_name(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// Which of a base's projections a [`Targeting`] names.
pub struct Matcher {
    targeted: HashSet<String>,
    save: Vec<String>,
}

enum NamesMatcher {
    AllLinear,
    Pattern(Pattern),
    List(Vec<String>),
}

impl NamesMatcher {
    fn new(names: &Names) -> Result<Self> {
        Ok(match names {
            Names::Pattern(p) => Self::Pattern(Pattern::whole(p)?),
            Names::List(list) if list.len() > MAX_LIST => {
                return Err(Error::Config(format!("a list of {} modules, at most {MAX_LIST} are read", list.len())));
            }
            Names::List(list) => Self::List(list.clone()),
        })
    }

    fn target(names: &Names) -> Result<Self> {
        match names {
            Names::Pattern(p) if p.eq_ignore_ascii_case("all-linear") => Ok(Self::AllLinear),
            // Older PEFT also took `["all-linear"]`.
            Names::List(list) if list.iter().any(|n| n == "all-linear") => Ok(Self::AllLinear),
            names => Self::new(names),
        }
    }

    fn matches(&self, site: &Site) -> Result<bool> {
        match self {
            Self::AllLinear => Ok(!site.is_head),
            Self::Pattern(pattern) => pattern.matches(&site.path),
            Self::List(list) => Ok(list.iter().any(|name| ends_with_name(&site.path, name))),
        }
    }

    /// Whether the whole path stands in a list, which as in PEFT goes before a choice of layers.
    fn holds(&self, site: &Site) -> bool {
        matches!(self, Self::List(list) if list.contains(&site.path))
    }
}

/// A choice of layers.
struct Layers {
    chosen: Vec<usize>,
    patterns: Vec<Pattern>,
}

impl Layers {
    fn new(t: &Targeting) -> Result<Option<Self>> {
        let chosen = match &t.layers_to_transform {
            Some(Indices::One(i)) => vec![*i],
            Some(Indices::Many(list)) if !list.is_empty() => list.clone(),
            _ => return Ok(None),
        };
        let patterns = match &t.layers_pattern {
            None => Vec::new(),
            Some(Names::Pattern(p)) => vec![p.clone()],
            Some(Names::List(list)) => list.clone(),
        };
        let patterns = patterns.iter().filter(|p| !p.is_empty());
        let patterns = patterns.map(|p| Pattern::beginning(r"(?:^|.*?\.)", p, r"\.(?P<idx>\d+)\."));
        Ok(Some(Self { chosen, patterns: patterns.collect::<Result<_>>()? }))
    }

    fn hold(&self, site: &Site) -> Result<bool> {
        if self.patterns.is_empty() {
            return Ok(site.layer.is_some_and(|i| self.chosen.contains(&i)));
        }
        for pattern in &self.patterns {
            if let Some(index) = pattern.index(&site.path)? {
                return Ok(index.and_then(|i| i.parse().ok()).is_some_and(|i| self.chosen.contains(&i)));
            }
        }
        Ok(false)
    }
}

impl Matcher {
    /// Asks of each projection of a base whether it gets an adapter.
    ///
    /// # Errors
    /// Patterns that are none, or take too long.
    pub fn new<'a>(t: &Targeting, sites: impl IntoIterator<Item = &'a Site>) -> Result<Self> {
        let target = NamesMatcher::target(&t.target_modules)?;
        let exclude = t.exclude_modules.as_ref().map(NamesMatcher::new).transpose()?;
        let layers = Layers::new(t)?;
        let save = t.modules_to_save.clone().unwrap_or_default();
        if save.len() > MAX_PATTERNS {
            return Err(Error::Config(format!("{} modules to save, at most {MAX_PATTERNS} are read", save.len())));
        }
        let around = |name: &String| Pattern::beginning(r"(^|.*\.)", name, r"($|\..*)");
        let saved = save.iter().map(around).collect::<Result<Vec<_>>>()?;
        let mut matcher = Self { targeted: HashSet::new(), save };
        for site in sites {
            let any = |patterns: &[Pattern]| -> Result<bool> {
                for pattern in patterns {
                    if pattern.matches(&site.path)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            };
            if exclude.as_ref().map_or(Ok(false), |e| e.matches(site))? || matcher.saves(&site.path) || any(&saved)? {
                continue;
            }
            let wanted = target.matches(site)?;
            if wanted && (target.holds(site) || layers.as_ref().map_or(Ok(true), |l| l.hold(site))?) {
                matcher.targeted.insert(site.path.clone());
            }
        }
        Ok(matcher)
    }

    /// Whether a projection gets an adapter.
    pub fn targets(&self, site: &Site) -> bool {
        self.targeted.contains(&site.path)
    }

    /// Whether a module is trained whole. As in PEFT, `norm` also means `input_layernorm`.
    pub fn saves(&self, module: &str) -> bool {
        self.save.iter().any(|name| module.ends_with(name.as_str()))
    }

    /// Names of `modules_to_save` that no module of the list ends with.
    pub fn unknown_saves<'a>(&'a self, modules: &[String]) -> Vec<&'a str> {
        let known = |name: &&String| modules.iter().any(|m| m.ends_with(name.as_str()));
        self.save.iter().filter(|n| !known(n)).map(String::as_str).collect()
    }
}

/// The value of the first pattern that matches a module, as PEFT's `rank_pattern` and `alpha_pattern` work: a regular expression
/// for the module's path or its end after a dot.
pub fn pattern_value<T: Copy>(patterns: &IndexMap<String, T>, module: &str) -> Result<Option<T>> {
    if patterns.len() > MAX_LIST || patterns.keys().filter(|p| !is_name(p)).count() > MAX_PATTERNS {
        return Err(Error::Config(format!("{} patterns of modules, at most {MAX_PATTERNS} are read", patterns.len())));
    }
    for (pattern, value) in patterns {
        let matches = match is_name(pattern) {
            true => ends_as_name(module, pattern),
            false => Pattern::beginning(r"(.*\.)?(", pattern, r")$")?.matches(module)?,
        };
        if matches {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Whether a pattern is a plain name, in which a dot stands for any character.
fn is_name(pattern: &str) -> bool {
    pattern.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
}

/// Whether a path or its end after a dot is a name.
fn ends_as_name(path: &str, name: &str) -> bool {
    let Some(rest) = path.len().checked_sub(name.len()) else { return false };
    let same = path.bytes().skip(rest).zip(name.bytes()).all(|(p, n)| p == n || n == b'.');
    same && (rest == 0 || path.as_bytes().get(rest - 1) == Some(&b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q0: &str = "model.layers.0.self_attn.q_proj";
    const Q1: &str = "model.layers.1.self_attn.q_proj";
    const K1: &str = "model.layers.1.self_attn.k_proj";

    /// Which of some paths are targeted.
    fn targeted(json: serde_json::Value) -> Vec<&'static str> {
        let paths =
            [Q0, Q1, K1, "model.layers.1.mlp.up_proj", "model.blocks.0.xq_proj", "model.blocks.0.q_proj", "lm_head"];
        let sites = paths.map(|path| Site::new(path, (4, 4)));
        let matcher = Matcher::new(&serde_json::from_value(json).unwrap(), &sites).unwrap();
        paths.into_iter().zip(&sites).filter(|(_, site)| matcher.targets(site)).map(|(path, _)| path).collect()
    }

    #[test]
    fn lists_match_path_ends_and_patterns_whole_paths() {
        assert_eq!(targeted(serde_json::json!({ "target_modules": ["q_proj"] })), [Q0, Q1, "model.blocks.0.q_proj"]);
        assert_eq!(targeted(serde_json::json!({ "target_modules": r".*layers\.[01]\..*q_proj" })), [Q0, Q1]);
        let all = targeted(serde_json::json!({ "target_modules": "all-linear" }));
        assert!(all.len() == 6 && !all.contains(&"lm_head"));
        // PEFT knows no shorthand among what is left out.
        assert_eq!(
            targeted(serde_json::json!({ "target_modules": ["lm_head"], "exclude_modules": "all-linear" })),
            ["lm_head"]
        );
    }

    #[test]
    fn excludes_layers_and_saved_modules_narrow() {
        let json = serde_json::json!({ "exclude_modules": ["k_proj"], "layers_to_transform": [1] });
        assert_eq!(targeted(json), [Q1, "model.layers.1.mlp.up_proj"]);
        let json = serde_json::json!({ "layers_to_transform": 0, "layers_pattern": "blocks" });
        assert_eq!(targeted(json), ["model.blocks.0.xq_proj", "model.blocks.0.q_proj"]);
        // A whole path in the list is meant whatever the layers are, as in PEFT.
        let json = serde_json::json!({ "target_modules": ["q_proj", "lm_head", K1], "layers_to_transform": [0] });
        assert_eq!(targeted(json), [Q0, K1, "model.blocks.0.q_proj", "lm_head"]);
        let json =
            serde_json::json!({ "target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head", "layers.1"] });
        assert_eq!(targeted(json), [Q0, "model.blocks.0.q_proj"]);
    }

    #[test]
    fn the_first_matching_pattern_gives_the_value() {
        let patterns = [("q_proj", 4), (r"layers\.0\..*", 2), ("layers.1.mlp.up_proj", 3), (r"(?=.*\.1\.).*k_proj", 5)];
        let patterns = patterns.map(|(p, v)| (p.to_string(), v)).into_iter().collect();
        let value = |module: &str| pattern_value(&patterns, module).unwrap();
        assert_eq!(value(Q0), Some(4));
        assert_eq!(value("model.layers.0.mlp.up_proj"), Some(2));
        assert_eq!(value("model.layers.1.mlp.up_proj"), Some(3));
        assert_eq!(value("model.layers.1.mlp.xup_proj"), None);
        assert_eq!(value(K1), Some(5));
        assert_eq!(value("model.layers.11.mlp.up_proj"), None);
    }

    #[test]
    fn a_bad_pattern_is_one_sentence_and_an_endless_one_ends() {
        for pattern in ["(", "(?<!a*", "(a{1000}){1000}", "a**"] {
            let error = Pattern::whole(pattern).err().unwrap_or_else(|| panic!("{pattern} is taken")).to_string();
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let start = std::time::Instant::now();
        let endless = Pattern::whole(r"(?=(.*)*\.x)((a|b|.)*)*\1(.*)*y").unwrap();
        let error = endless.matches(&Q0.repeat(3)).unwrap_err().to_string();
        assert!(error.contains("too many steps") && start.elapsed().as_secs() < 2, "{error}");
    }
}
