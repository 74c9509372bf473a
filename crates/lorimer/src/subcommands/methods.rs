//! `lorimer methods`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::methods::{Entry, REGISTRY, Served, build, learning_rate};
use lorimer::model::files::{create_folder, write_atomic};
use serde_json::{Map, json};

use lorimer_cli::{Global, common};

/// List the methods that `--method` takes
#[derive(Args)]
pub struct Methods {
    /// Write a page on each method, out of the header of its source, and an index into this folder
    #[arg(long, value_name = "FOLDER")]
    docs: Option<PathBuf>,
}

fn served(entry: &Entry) -> &'static str {
    match entry.served {
        Served::Batched => "batched",
        Served::Converted => "converted",
        Served::Refused => "refused",
    }
}

fn rate(lr: f64) -> String {
    format!("{lr:.0e}")
}

/// The learning rate of a method, and of those of its variants that have another.
fn rates(entry: &Entry) -> Result<String> {
    let mut out = rate(entry.lr);
    for variant in entry.variants {
        let set = Map::from_iter([("variant".to_string(), json!(variant))]);
        let own = learning_rate(entry.name, &set)?;
        if own != entry.lr {
            out += &format!("; `{variant}`: {}", rate(own));
        }
    }
    Ok(out)
}

/// The settings of a method's configuration with their comments, as its source has them.
fn comments(source: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut inside = false;
    let mut comment = String::new();
    for line in source.lines() {
        let text = line.trim();
        if text.starts_with("pub struct") {
            inside = text.contains("Config {");
        } else if text == "}" {
            inside = false;
        } else if let Some(more) = text.strip_prefix("///").filter(|_| inside) {
            comment = format!("{comment} {}", more.trim()).trim().to_string();
        } else if let Some(field) = text.strip_prefix("pub ").filter(|_| inside) {
            let name = field.split(':').next().unwrap_or_default();
            found.insert(name.to_string(), std::mem::take(&mut comment));
        }
    }
    found
}

/// The page of a method.
fn page(entry: &Entry) -> Result<String> {
    let header: Vec<&str> = entry.source.lines().map_while(|l| l.strip_prefix("//!")).collect();
    let mut out = String::new();
    let mut code = false;
    for line in header {
        let line = line.strip_prefix(' ').unwrap_or(line);
        if line.starts_with("```") {
            code = !code;
            out += if code { "```rust\n" } else { "```\n" };
        } else {
            out += &format!("{line}\n");
        }
    }
    out += "\n## On the command line\n\n";
    out += &format!("`lorimer train --method {} --data my.jsonl`\n\n", entry.name);
    let flags: Vec<String> = entry
        .flags
        .iter()
        .map(|(flag, key)| {
            if *flag == "lr" {
                format!("`--lr` over the steps of the warm-up (`{key}`)")
            } else {
                format!("`--{flag}` (`{key}`)")
            }
        })
        .collect();
    let mut rows = vec![
        ("learning rate unless told otherwise", rates(entry)?),
        ("flags", flags.join(", ")),
        ("`peft_type` of its files", entry.peft_type.to_string()),
        ("merges into a plain weight", if entry.mergeable { "yes" } else { "no" }.into()),
        ("served", served(entry).into()),
    ];
    if !entry.variants.is_empty() {
        let variants: Vec<String> = entry.variants.iter().map(|v| format!("`{v}`")).collect();
        rows.insert(1, ("`--set variant=…`", variants.join(", ")));
    }
    out += "| | |\n|---|---|\n";
    rows.iter().for_each(|(name, value)| out += &format!("| {name} | {value} |\n"));
    let comments = comments(entry.source);
    let config = build(entry.name, &Map::new())?.config();
    let settings: Vec<String> = config
        .iter()
        .filter_map(|(key, value)| {
            let what = comments.get(key).filter(|c| !c.is_empty())?;
            Some(format!("| `{key}` | `{value}` | {} |\n", what.replace('|', "\\|")))
        })
        .collect();
    if !settings.is_empty() {
        out += "\n## Settings (`--set key=value`)\n\n| key | default | meaning |\n|---|---|---|\n";
        settings.iter().for_each(|row| out += row);
    }
    Ok(out)
}

/// The list of all pages.
fn index() -> String {
    let mut out = String::from(
        "# Methods\n\nWritten by `lorimer methods --docs docs/methods`; each page is the header of the method's source.\n\n\
         | method | what | paper | variants | files |\n|---|---|---|---|---|\n",
    );
    for e in REGISTRY {
        out += &format!(
            "| [{}]({}.md) | {} | {} | {} | {} |\n",
            e.name,
            e.name,
            e.title,
            e.paper,
            e.variants.join(", "),
            e.peft_type
        );
    }
    out
}

impl Methods {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if let Some(folder) = &self.docs {
            create_folder(folder)?;
            for entry in REGISTRY {
                write_atomic(&folder.join(format!("{}.md", entry.name)), page(entry)?.as_bytes())?;
            }
            write_atomic(&folder.join("README.md"), index().as_bytes())?;
        }
        let rows: Vec<_> = REGISTRY
            .iter()
            .map(|e| {
                json!({
                    "name": e.name, "title": e.title, "paper": e.paper, "kind": e.kind, "variants": e.variants,
                    "peft_type": e.peft_type, "mergeable": e.mergeable, "served": e.served, "lr": e.lr,
                    "flags": e.flags.iter().map(|(flag, _)| *flag).collect::<Vec<_>>(),
                })
            })
            .collect();
        common::print(global, &rows, || {
            let head = format!("{:10} {:58} {:17} {:10} {:6} variants\n", "method", "what", "paper", "files", "lr");
            let line = |e: &Entry| {
                let variants = e.variants.join(", ");
                format!("{:10} {:58} {:17} {:10} {:6} {variants}", e.name, e.title, e.paper, e.peft_type, rate(e.lr))
            };
            head + &REGISTRY.iter().map(line).map(|l| l.trim_end().to_string()).collect::<Vec<_>>().join("\n")
        })
    }
}
