//! The laws that every method obeys, run on all the settings that its line in the registry names.
//!
//! `LORIMER_LAWS=bone cargo test --release --workspace --test laws` runs them on the methods of one name only.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Result, Tensor};
use lorimer_adapter::Change;
use lorimer_adapter::file::export::to_lora;
use lorimer_adapter::file::load::account_of;
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::training::AdamWConfig;
use lorimer_model::Site;
use lorimer_model::weights::LoadDtype;
use lorimer_tensor::Gradients;
use lorimer_train::calibrate::{Sum, gradients};
use lorimer_train::run::frozen::{FrozenCache, FrozenLower};
use lorimer_train::run::optimize;
use lorimer_train::run::step::{StepOptions, accumulate_gradients, batch_loss};
use rand::SeedableRng;
use serde_json::Value;

#[path = "../../../../tests/support/tiny.rs"]
mod tiny;
use tiny::*;

use crate::prelude::*;

mod combining;
mod files;
mod gradients;
mod merging;
mod prelude;
mod rows;
mod starts;

/// Every method with each of its settings, and how far the start may be from the base.
fn matrix() -> impl Iterator<Item = (&'static str, &'static str, f64)> {
    let chosen = std::env::var("LORIMER_LAWS").ok();
    let chosen: Vec<_> =
        methods::REGISTRY.iter().filter(|e| chosen.as_ref().is_none_or(|name| e.name == name)).collect();
    assert!(!chosen.is_empty(), "LORIMER_LAWS names no method");
    chosen.into_iter().flat_map(|e| e.laws.iter().map(move |(settings, tolerance)| (e.name, *settings, *tolerance)))
}

fn base_bytes(model: &dyn BaseModel) -> Vec<f64> {
    let weights = model.projections().into_iter().map(|(_, p)| p.dense(DType::F64).unwrap());
    weights.flat_map(|w| w.flatten_all().unwrap().to_vec1::<f64>().unwrap()).collect()
}

fn each(law: impl Fn(&dyn BaseModel, &str, &str, f64)) {
    let model = model();
    for (name, settings, tolerance) in matrix() {
        println!("{name} {settings}");
        law(&model, name, settings, tolerance);
    }
}
