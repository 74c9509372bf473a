//! Which modules of a base an adapter touches, with PEFT's keys and rules.

use lorimer_model::Site;
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest pattern and longest list that is accepted from a file.
const MAX_PATTERN: usize = 10_000;
const MAX_LIST: usize = 10_000;

/// A regular expression over the whole path, or a list of names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// `all-linear`, or a regular expression that must match the whole module path.
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

/// Python's `re.fullmatch` for the patterns that Rust's `regex` knows.
pub fn full_match(pattern: &str) -> Result<Regex> {
    if pattern.len() > MAX_PATTERN {
        return Err(Error::Config(format!(
            "a pattern of {} characters, at most {MAX_PATTERN} are read",
            pattern.len()
        )));
    }
    regex::RegexBuilder::new(&format!("^(?:{pattern})$")).size_limit(1 << 20).build().map_err(|e| {
        let reason = e.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string();
        let shown: String = pattern.chars().take(60).collect();
        Error::Config(format!("`{}` is not a regular expression that can be used: {reason}", shown.escape_debug()))
    })
}

fn ends_with_name(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// A [`Targeting`] ready to be asked.
pub struct Matcher {
    target: NamesMatcher,
    exclude: Option<NamesMatcher>,
    layers: Option<Vec<usize>>,
    layers_pattern: Vec<Regex>,
    save: Vec<String>,
}

enum NamesMatcher {
    AllLinear,
    Pattern(Regex),
    List(Vec<String>),
}

impl NamesMatcher {
    fn new(names: &Names) -> Result<Self> {
        Ok(match names {
            Names::Pattern(p) if p.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            Names::Pattern(p) => Self::Pattern(full_match(p)?),
            Names::List(list) if list.len() > MAX_LIST => {
                return Err(Error::Config(format!("a list of {} modules, at most {MAX_LIST} are read", list.len())));
            }
            // PEFT also takes `["all-linear"]`.
            Names::List(list) if list.iter().any(|n| n == "all-linear") => Self::AllLinear,
            Names::List(list) => Self::List(list.clone()),
        })
    }

    fn matches(&self, site: &Site) -> bool {
        match self {
            Self::AllLinear => !site.is_head,
            Self::Pattern(regex) => regex.is_match(&site.path),
            Self::List(list) => list.iter().any(|name| ends_with_name(&site.path, name)),
        }
    }
}

impl Matcher {
    /// Compiles the patterns.
    pub fn new(t: &Targeting) -> Result<Self> {
        let exclude = t.exclude_modules.as_ref().map(NamesMatcher::new).transpose()?;
        let layers = t.layers_to_transform.as_ref().map(|l| match l {
            Indices::One(i) => vec![*i],
            Indices::Many(list) => list.clone(),
        });
        let patterns = match &t.layers_pattern {
            None => Vec::new(),
            Some(Names::Pattern(p)) => vec![p.clone()],
            Some(Names::List(list)) => list.clone(),
        };
        let layers_pattern = patterns
            .iter()
            .filter(|p| !p.is_empty())
            .map(|p| full_match(&format!(r"(?:.*?\.)?(?:{p})\.(\d+)\..*")))
            .collect::<Result<_>>()?;
        let save = t.modules_to_save.clone().unwrap_or_default();
        Ok(Self {
            target: NamesMatcher::new(&t.target_modules)?,
            exclude,
            layers: layers.filter(|l| !l.is_empty()),
            layers_pattern,
            save,
        })
    }

    /// Whether a projection gets an adapter.
    pub fn targets(&self, site: &Site) -> bool {
        if self.exclude.as_ref().is_some_and(|e| e.matches(site)) || self.saves(&site.path) {
            return false;
        }
        if !self.target.matches(site) {
            return false;
        }
        // As in PEFT, layers narrow lists of names (and `all-linear`, which becomes one), not regular expressions.
        match (&self.layers, &self.target) {
            (None, _) | (_, NamesMatcher::Pattern(_)) => true,
            (Some(layers), _) => self.layer_of(site).is_some_and(|i| layers.contains(&i)),
        }
    }

    fn layer_of(&self, site: &Site) -> Option<usize> {
        if self.layers_pattern.is_empty() {
            return site.layer;
        }
        self.layers_pattern.iter().find_map(|p| p.captures(&site.path)?.get(1)?.as_str().parse().ok())
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

/// The value of the first pattern that matches a module, as PEFT's `rank_pattern` and `alpha_pattern` work.
pub fn pattern_value<T: Copy>(patterns: &indexmap::IndexMap<String, T>, module: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if ends_with_name(module, pattern) || full_match(&format!(r"(?:.*\.)?(?:{pattern})"))?.is_match(module) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(path: &str) -> Site {
        Site::new(path, (4, 4))
    }
    fn matcher(json: serde_json::Value) -> Matcher {
        Matcher::new(&serde_json::from_value(json).unwrap()).unwrap()
    }
    const Q0: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn lists_match_path_ends_and_patterns_whole_paths() {
        let list = matcher(serde_json::json!({ "target_modules": ["q_proj"] }));
        assert!(list.targets(&site(Q0)) && !list.targets(&site("model.layers.0.self_attn.xq_proj")));
        let pattern = matcher(serde_json::json!({ "target_modules": r".*layers\.[01]\..*q_proj" }));
        assert!(pattern.targets(&site(Q0)) && !pattern.targets(&site("model.layers.2.self_attn.q_proj")));
        let all = matcher(serde_json::json!({ "target_modules": "all-linear" }));
        assert!(all.targets(&site(Q0)) && !all.targets(&site("lm_head")));
    }

    #[test]
    fn excludes_layers_and_saved_modules_narrow() {
        let m = matcher(serde_json::json!({ "exclude_modules": ["k_proj"], "layers_to_transform": [1] }));
        assert!(!m.targets(&site(Q0)) && m.targets(&site("model.layers.1.self_attn.q_proj")));
        assert!(!m.targets(&site("model.layers.1.self_attn.k_proj")));
        let m = matcher(serde_json::json!({ "layers_to_transform": 0, "layers_pattern": "blocks" }));
        assert!(!m.targets(&site(Q0)) && m.targets(&site("model.blocks.0.q_proj")));
        let m = matcher(serde_json::json!({ "target_modules": ["lm_head"], "modules_to_save": ["lm_head"] }));
        assert!(!m.targets(&site("lm_head")) && m.saves("lm_head"));
    }

    #[test]
    fn the_first_matching_pattern_gives_the_value() {
        let patterns = [("q_proj".to_string(), 4), (r"layers\.0\..*".to_string(), 2)].into_iter().collect();
        assert_eq!(pattern_value(&patterns, Q0).unwrap(), Some(4));
        assert_eq!(pattern_value(&patterns, "model.layers.0.mlp.up_proj").unwrap(), Some(2));
        assert_eq!(pattern_value(&patterns, "model.layers.1.mlp.up_proj").unwrap(), None);
    }

    #[test]
    fn a_bad_pattern_is_one_sentence() {
        let error = full_match("(").unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
