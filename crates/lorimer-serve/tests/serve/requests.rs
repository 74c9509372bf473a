//! Requests of the engine, and what they are held against.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;
use lorimer_serve::engine::Failure;
use lorimer_serve::engine::scheduler::Tenant;
use lorimer_serve::{Engine, Event, Hosted, Refusal, Request};

use crate::prelude::*;

/// The logits of a sequence, by a whole forward.
pub fn logits_of(model: &dyn BaseModel, on: &dyn Adaptation, tokens: &[u32]) -> Tensor {
    model.logits(&model.hidden(&Batch::pack([tokens]), on).unwrap(), on).unwrap()
}

/// A request for `n` of the likeliest tokens, which nothing ends earlier.
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
        form: None,
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

/// Steps until all have ended: tokens and failures by request.
pub fn finish(engine: &mut Engine<'_>) -> (HashMap<u64, Vec<u32>>, HashMap<u64, Failure>) {
    let (mut answers, mut failures, mut steps) = (HashMap::<u64, Vec<u32>>::new(), HashMap::new(), 0);
    while !engine.is_idle() {
        steps += 1;
        assert!(steps < 100_000, "{:?}", engine.state());
        for event in engine.step(f64::from(steps) / 100.0) {
            match event {
                Event::Token(id, token, _) => answers.entry(id).or_default().push(token.token),
                Event::Failed(id, failure) => assert!(failures.insert(id, failure).is_none()),
                other => panic!("{other:?}"),
            }
        }
    }
    (answers, failures)
}

/// The tokens of every request; None for one that is too large for the pool. So many are submitted together, and the next when these have ended, which
/// then finds what they left in the prefix cache.
pub fn answered(engine: &mut Engine<'_>, requests: &[Request], together: usize) -> Vec<Option<Vec<u32>>> {
    let mut all = Vec::new();
    for some in requests.chunks(together) {
        let submitted: Vec<_> = some.iter().map(|request| engine.submit(request.clone(), 0.0).unwrap()).collect();
        let (mut answers, failures) = finish(engine);
        assert!(failures.is_empty(), "{failures:?}");
        all.extend(submitted.into_iter().map(|one| match one {
            Ok(id) => Some(answers.remove(&id).unwrap()),
            Err(refusal) => {
                assert_eq!(refusal, Refusal::TooLarge);
                None
            }
        }));
    }
    all
}
