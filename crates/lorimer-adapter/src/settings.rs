//! Settings of methods: over their defaults, and from and to `adapter_config.json`.

use lorimer_model::Site;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// All of a configuration, with PEFT's type and what PEFT expects of every file beside it.
pub fn peft_json<T: Serialize>(peft_type: &str, config: &T) -> Map<String, Value> {
    let mut all = Map::new();
    for (key, value) in [
        ("peft_type", peft_type.into()),
        ("task_type", "CAUSAL_LM".into()),
        ("auto_mapping", Value::Null),
        ("inference_mode", true.into()),
    ] {
        all.insert(key.into(), value);
    }
    if let Ok(Value::Object(fields)) = serde_json::to_value(config) {
        all.extend(fields);
    }
    all
}

/// Settings by name.
pub fn settings_of<T: Serialize>(settings: &T) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// What becomes of those keys of a PEFT configuration that a method's own configuration does not have. Any other key is refused while
/// it is set.
pub struct PeftKeys {
    /// Keys that change nothing in what the file's tensors say.
    pub inert: &'static [&'static str],
    /// Keys that are refused while set, with what they ask for.
    pub refused: &'static [(&'static str, &'static str)],
}

/// Keys of every PEFT configuration that say where a file comes from, or what linear layers do not have.
pub const INERT: &[&str] = &[
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "fan_in_fan_out",
];

impl PeftKeys {
    /// Of a method whose configuration has all of PEFT's keys but those of [`INERT`].
    pub const NONE: Self = Self { inert: &[], refused: &[] };
}

/// The targets that PEFT takes for the model types of this family where a configuration names none.
pub const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

/// Refuses a file that names no targets where those that PEFT would take are no modules of the model: PEFT has none for it then.
pub fn check_targets<'a>(
    config: &Map<String, Value>,
    model_type: &str,
    mut sites: impl Iterator<Item = &'a Site>,
) -> Result<()> {
    let named = config.get("target_modules").is_some_and(|targets| !targets.is_null());
    if named || sites.any(|site| DEFAULT_TARGETS.contains(&site.role.as_str())) {
        return Ok(());
    }
    Err(Error::Config(format!(
        "adapter_config.json has no `target_modules`, and PEFT has no defaults for `{model_type}` models; name the modules that the adapter changes"
    )))
}

/// Whether a value of a configuration asks for anything.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
        _ => true,
    }
}

/// A configuration out of `adapter_config.json`: every key is one that `T` has, inert, or refused by name while set.
pub fn from_peft_json<T: Default + Serialize + serde::de::DeserializeOwned>(
    method: &str,
    config: &Map<String, Value>,
    keys: &PeftKeys,
) -> Result<T> {
    let known = match serde_json::to_value(T::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    for (key, _) in config.iter().filter(|(key, value)| !known.contains_key(*key) && is_set(value)) {
        let inert = |list: &[&str]| list.contains(&key.as_str());
        if inert(INERT) || inert(keys.inert) {
            continue;
        }
        let shown: String = key.chars().take(60).collect();
        let shown = shown.escape_debug();
        return Err(Error::Config(match keys.refused.iter().find(|(name, _)| name == key) {
            Some((_, why)) => format!("adapter_config.json sets `{shown}`, which is not understood here: it {why}"),
            None => format!(
                "adapter_config.json sets `{shown}`, which is no setting of `{method}` that is known here; take it out if the adapter is the same without it"
            ),
        }));
    }
    let given = config.iter().filter(|(k, v)| known.contains_key(*k) && !v.is_null());
    let mut given: Map<String, Value> = given.map(|(k, v)| (k.clone(), v.clone())).collect();
    if known.contains_key("target_modules") {
        as_peft_targets(config, &mut given)?;
    }
    configure(method, &given)
}

/// PEFT's rules for the keys that choose modules, which differ a little from method to method.
fn as_peft_targets(config: &Map<String, Value>, given: &mut Map<String, Value>) -> Result<()> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    given.entry("target_modules").or_insert_with(|| DEFAULT_TARGETS.as_slice().into());
    let layers = ["layers_to_transform", "layers_pattern"];
    let pattern = given.get("target_modules").and_then(Value::as_str);
    let Some(pattern) = pattern.filter(|_| layers.iter().any(|key| given.contains_key(*key))) else { return Ok(()) };
    if matches!(kind, "LORA" | "MISS" | "BONE") {
        return Err(Error::Config(
            "adapter_config.json has layers_to_transform or layers_pattern beside a target_modules that is a text, which PEFT refuses; name the modules in a list".into(),
        ));
    }
    // Others of PEFT's methods leave the layers out of account where the targets are a regular expression.
    if !pattern.eq_ignore_ascii_case("all-linear") {
        layers.iter().for_each(|key| drop(given.shift_remove(*key)));
    }
    Ok(())
}

/// `given` over the serialised defaults of a configuration; a key that is in neither is an error that lists the known.
pub fn configure<T: Default + serde::Serialize + serde::de::DeserializeOwned>(
    method: &str,
    given: &Map<String, Value>,
) -> Result<T> {
    let broken = |e: serde_json::Error| Error::Config(format!("the configuration of `{method}` is not valid: {e}"));
    let mut all = match serde_json::to_value(T::default()).map_err(broken)? {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    for (key, value) in given {
        if !all.contains_key(key) {
            let known: Vec<_> = all.keys().map(String::as_str).collect();
            let key: String = key.chars().take(60).collect();
            return Err(Error::Config(format!("`{method}` has no setting `{key}`; it has {}", known.join(", "))));
        }
        all.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(all)).map_err(broken)
}

/// Takes those of the settings that a configuration `T` has.
pub fn split_off<T: Default + Serialize>(settings: &mut Map<String, Value>) -> Map<String, Value> {
    let known = match serde_json::to_value(T::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    known.keys().filter_map(|key| Some((key.clone(), settings.remove(key)?))).collect()
}
