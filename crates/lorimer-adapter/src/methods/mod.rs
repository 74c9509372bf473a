//! The methods, one file each, and the one registry from which command line, documentation and law matrix come.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::method::Method;

pub mod allora;
pub mod ba_lora;
pub mod bone;
pub mod diffora;
pub mod dora;
pub mod dylora;
pub mod entry;
pub mod eva;
pub mod flylora;
pub mod full;
pub mod galore;
pub mod hydra;
mod largest;
pub mod llava_mole;
pub mod loldu;
pub mod lora;
pub mod lora_pro;
pub mod lora_sb;
pub mod lora_xs;
pub mod loraprune;
pub mod mt19937;
pub mod nlora;
pub mod parts;
pub mod randlora;
pub mod random;
mod routing;
pub mod shira;
pub mod slices;
pub mod smora;
pub mod sora;
pub mod sparse_gin;
pub mod tlora;
pub mod vera;
pub mod xlora;

pub use entry::{Build, Entry, Part, Served};
pub use parts::{ObjectiveChoice, OptimizerChoice};

/// Every method, in the order of `lorimer methods`.
pub const REGISTRY: &[Entry] = &[
    lora::ENTRY,
    dora::ENTRY,
    bone::ENTRY,
    randlora::ENTRY,
    lora_xs::ENTRY,
    lora_sb::ENTRY,
    eva::ENTRY,
    loldu::ENTRY,
    nlora::ENTRY,
    tlora::ENTRY,
    flylora::ENTRY,
    smora::ENTRY,
    sparse_gin::ENTRY,
    xlora::ENTRY,
    llava_mole::ENTRY,
    hydra::ENTRY,
    vera::ENTRY,
    full::ENTRY,
    shira::ENTRY,
    lora_pro::ENTRY,
    galore::ENTRY,
    allora::ENTRY,
    dylora::ENTRY,
    sora::ENTRY,
    loraprune::ENTRY,
    diffora::ENTRY,
    ba_lora::ENTRY,
];

fn names() -> String {
    REGISTRY.iter().map(|e| e.name).collect::<Vec<_>>().join(", ")
}

/// The registry's line for a name.
pub fn entry(name: &str) -> Result<&'static Entry> {
    REGISTRY.iter().find(|e| e.name == name).ok_or_else(|| {
        let name: String = name.chars().take(40).collect();
        Error::Config(format!("there is no method `{name}`; there are {}", names()))
    })
}

/// A method by name with its settings.
pub fn build(name: &str, settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    (entry(name)?.build)(settings)
}

/// The rate that training takes for a method with these settings unless told otherwise.
pub fn learning_rate(name: &str, settings: &Map<String, Value>) -> Result<f64> {
    let line = entry(name)?;
    Ok((line.build)(settings)?.learning_rate().unwrap_or(line.lr))
}

/// The method that an `adapter_config.json` describes.
pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    match REGISTRY.iter().find(|e| (e.recognises)(config)) {
        Some(entry) => (entry.from_file)(config),
        None => {
            let kind: String = kind.chars().take(40).collect();
            Err(Error::Config(format!("peft_type `{kind}` in adapter_config.json is none of the methods {}", names())))
        }
    }
}
