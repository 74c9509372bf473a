//! Parts of training by name, as the command line and a run's record say them: `galore:rank=64,scale=0.25`.

use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::REGISTRY;
use super::entry::Part;
use crate::error::{Error, Result};
use crate::training::search::Search;
use crate::training::{Adam, ObjectiveKind, OptimizerKind};

/// An optimiser that was chosen, with its settings.
#[derive(Clone, Debug)]
pub struct OptimizerChoice(pub Arc<dyn OptimizerKind>);

/// An auxiliary loss that was chosen, with its settings.
#[derive(Clone, Debug)]
pub struct ObjectiveChoice(pub Arc<dyn ObjectiveKind>);

impl Default for OptimizerChoice {
    fn default() -> Self {
        Self(Arc::new(Adam::default()))
    }
}

/// `name:key=value,key=value`.
fn read(text: &str) -> Result<(&str, Map<String, Value>)> {
    let (name, rest) = text.split_once(':').unwrap_or((text, ""));
    let mut settings = Map::new();
    for pair in rest.split(',').filter(|p| !p.trim().is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            let pair: String = pair.chars().take(40).collect();
            Error::Config(format!("`{pair}` after `{name}:` should be key=value"))
        })?;
        let value = value.trim();
        settings.insert(key.trim().into(), serde_json::from_str(value).unwrap_or_else(|_| value.into()));
    }
    Ok((name.trim(), settings))
}

fn all() -> impl Iterator<Item = (&'static str, Part)> {
    REGISTRY.iter().flat_map(|entry| entry.parts.iter().copied())
}

/// The search of a method.
pub fn search(method: &str) -> Option<Search> {
    all().find_map(|(name, part)| match part {
        Part::Search(search) if name == method => Some(search),
        _ => None,
    })
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let name: String = name.chars().take(40).collect();
    let are = if known.len() == 1 { "there is" } else { "there are" };
    Error::Config(format!("there is no {what} `{name}`; {are} {}", known.join(", ")))
}

impl OptimizerChoice {
    /// By name and settings.
    fn named(name: &str, settings: &Map<String, Value>) -> Result<Self> {
        let adam = |eight_bit| match settings.keys().next() {
            Some(key) => Err(Error::Config(format!("`{name}` has no setting `{key}`"))),
            None => Ok(Self(Arc::new(Adam { eight_bit }))),
        };
        match name {
            "adamw" => return adam(false),
            "adamw-8bit" => return adam(true),
            _ => {}
        }
        let optimizers = all().filter_map(|(name, part)| match part {
            Part::Optimizer(build) => Some((name, build)),
            _ => None,
        });
        let optimizers: Vec<_> = optimizers.collect();
        match optimizers.iter().find(|(known, _)| *known == name) {
            Some((_, build)) => Ok(Self(build(settings)?)),
            None => {
                let known = optimizers.iter().map(|(name, _)| *name);
                Err(unknown("optimizer", name, &["adamw", "adamw-8bit"].into_iter().chain(known).collect::<Vec<_>>()))
            }
        }
    }

    /// Its name with its settings: what [`str::parse`] reads.
    pub fn spec(&self) -> String {
        let settings = self.0.settings();
        if settings.is_empty() {
            return self.0.name().into();
        }
        let show = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
        let pairs: Vec<String> = settings.iter().map(|(k, v)| format!("{k}={}", show(v))).collect();
        format!("{}:{}", self.0.name(), pairs.join(","))
    }

    /// Whether it is plain AdamW.
    pub fn is_adamw(&self) -> bool {
        self.0.name() == "adamw"
    }
}

impl ObjectiveChoice {
    fn named(name: &str, settings: &Map<String, Value>) -> Result<Self> {
        let objectives = all().filter_map(|(name, part)| match part {
            Part::Objective(build) => Some((name, build)),
            _ => None,
        });
        let objectives: Vec<_> = objectives.collect();
        match objectives.iter().find(|(known, _)| *known == name) {
            Some((_, build)) => Ok(Self(build(settings)?)),
            None => Err(unknown("objective", name, &objectives.iter().map(|(name, _)| *name).collect::<Vec<_>>())),
        }
    }
}

impl std::str::FromStr for OptimizerChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, settings) = read(text)?;
        Self::named(name, &settings)
    }
}

impl std::str::FromStr for ObjectiveChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, settings) = read(text)?;
        Self::named(name, &settings)
    }
}

/// In a run's record: the name alone, or an object of one key with the settings.
fn record(name: &str, settings: Map<String, Value>) -> Value {
    match settings.is_empty() {
        true => name.into(),
        false => Value::Object(Map::from_iter([(name.to_string(), Value::Object(settings))])),
    }
}

fn recorded(value: &Value) -> Option<(String, Map<String, Value>)> {
    match value {
        Value::String(name) => Some((name.clone(), Map::new())),
        Value::Object(map) => {
            let (name, settings) = map.iter().next().filter(|_| map.len() == 1)?;
            Some((name.clone(), settings.as_object()?.clone()))
        }
        _ => None,
    }
}

macro_rules! recorded_as_name_and_settings {
    ($type:ty, $name:ident) => {
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                (self.0.name(), self.0.settings()) == (other.0.name(), other.0.settings())
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                record(self.0.$name(), self.0.settings()).serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = Value::deserialize(deserializer)?;
                let (name, settings) =
                    recorded(&value).ok_or_else(|| D::Error::custom("expected a name, or a name with its settings"))?;
                Self::named(&name, &settings).map_err(D::Error::custom)
            }
        }
    };
}

recorded_as_name_and_settings!(OptimizerChoice, family);
recorded_as_name_and_settings!(ObjectiveChoice, name);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_with_their_settings() {
        let g: OptimizerChoice = "galore-8bit:rank=4, proj_type=left".parse().unwrap();
        let settings = g.0.settings();
        assert_eq!(
            (&settings["rank"], &settings["proj_type"], &settings["bits"]),
            (&4.into(), &"left".into(), &8.into())
        );
        assert_eq!(g.spec().parse::<OptimizerChoice>().unwrap(), g);
        for bad in ["sgd", "adamw:x=1", "galore:rank", "galore:rank=0", "galore:speed=2", "lora-pro:delta=9"] {
            assert!(bad.parse::<OptimizerChoice>().is_err(), "{bad}");
        }
        for bad in ["k=0", "version=3", "temperature=2", "version=2,task=nlu", "version=2,temperature=0", "lambda4=1"] {
            assert!(format!("ba-lora:{bad}").parse::<ObjectiveChoice>().is_err(), "{bad}");
        }
        let second: ObjectiveChoice = "ba-lora:version=2,lambda3=0.1".parse().unwrap();
        let of = |key: &str| second.0.settings()[key].as_f64().unwrap();
        assert_eq!([of("lambda1"), of("lambda3"), of("k"), of("top_k_entropy")], [0.025, 0.1, 10.0, 20.0]);
    }

    /// What earlier versions wrote into a run's record.
    #[test]
    fn records_are_as_they_were() {
        for text in [r#""adamw""#, r#""adamw-8bit""#, r#"{"lora-pro":{"full":true,"delta":1e-8}}"#] {
            let choice: OptimizerChoice = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_value(&choice).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
        let galore = "galore-8bit:rank=4".parse::<OptimizerChoice>().unwrap();
        let written = serde_json::to_value(&galore).unwrap();
        assert_eq!((&written["galore"]["bits"], &written["galore"]["update_proj_gap"]), (&8.into(), &200.into()));
        assert_eq!(serde_json::from_value::<OptimizerChoice>(written).unwrap(), galore);
        assert!(serde_json::from_str::<OptimizerChoice>("7").is_err());
    }
}
