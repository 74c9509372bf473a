//! Requests of the engine, and what they are held against.

use std::sync::Arc;

use candle_core::Tensor;
use lorimer_serve::engine::scheduler::Tenant;
use lorimer_serve::{Hosted, Request};

use crate::prelude::*;

/// The logits of a sequence, by a whole forward.
pub fn logits_of(model: &dyn BaseModel, on: &dyn Adaptation, tokens: &[u32]) -> Tensor {
    model.logits(&model.hidden(&Batch::pack([tokens]), on).unwrap(), on).unwrap()
}

/// A request for `n` of the likeliest tokens.
pub fn request(prompt: Vec<u32>, adapters: Vec<(Arc<Hosted>, f32)>, n: usize) -> Request {
    Request {
        prompt,
        adapters,
        max_tokens: Some(n),
        sampling: Sampling::default(),
        seed: 0,
        stop: vec![],
        log_probabilities: None,
        of_prompt: false,
        tenant: Tenant::default(),
        names: vec![],
    }
}

/// The likeliest tokens after a prompt, each from a whole forward.
pub fn greedy(model: &dyn BaseModel, on: &dyn Adaptation, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut seen = prompt.to_vec();
    for _ in 0..n {
        let last = logits_of(model, on, &seen).get(seen.len() - 1).unwrap();
        seen.push(last.argmax(0).unwrap().to_scalar::<u32>().unwrap());
    }
    seen.split_off(prompt.len())
}
