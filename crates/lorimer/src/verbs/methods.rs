//! `lorimer methods`

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::methods::REGISTRY;
use serde_json::json;

use crate::{Global, common};

/// List the methods that `--method` takes
#[derive(Args)]
pub struct Methods {}

impl Methods {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let rows: Vec<_> = REGISTRY
            .iter()
            .map(|e| {
                json!({
                    "name": e.name, "title": e.title, "paper": e.paper, "kind": e.kind, "variants": e.variants,
                    "peft_type": e.peft_type, "mergeable": e.mergeable, "served": e.served,
                })
            })
            .collect();
        common::print(global, &rows, || {
            let line = |e: &lorimer::adapter::methods::Entry| format!("{:10} {:44} {}", e.name, e.title, e.paper);
            REGISTRY.iter().map(line).collect::<Vec<_>>().join("\n")
        })
    }
}
