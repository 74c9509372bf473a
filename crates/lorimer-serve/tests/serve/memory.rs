//! Adapters are in host memory once.

use std::sync::Arc;

use lorimer_serve::engine::Failure;
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, Event, Hosted, Refusal, Request};

use crate::prelude::*;
use crate::requests::request;
use crate::tiny;

fn hosted(model: &dyn BaseModel, name: &str) -> Arc<Hosted> {
    let adapter = tiny::attach(model, "lora", r#"{"r": 3}"#);
    tiny::move_all(&adapter);
    Arc::new(Hosted::new(model, &adapter, format!("sha256:{name}"), None).unwrap())
}

/// However a request ends, the engine gives its adapter back: what it keeps is the copy in its pool, and whoever lets the adapter go has its
/// memory. To be seen to fail: an engine that holds on to the adapters that it has loaded.
#[test]
fn an_engine_holds_no_adapter_but_its_requests() {
    let model = tiny::model_as(candle_core::DType::F32, LoadDtype::Stored);
    let all: Vec<_> = ["answered", "cancelled", "waiting", "refused", "invalid", "failed"]
        .into_iter()
        .map(|name| hosted(&model, name))
        .collect();
    let [answered, cancelled, waiting, refused, invalid, failed] = &all[..] else { panic!() };
    let ask = |adapter: &Arc<Hosted>, weight: f32| request(vec![1, 2, 3], vec![(adapter.clone(), weight)], 4);
    let policy = Policy { max_running: 3, ..Default::default() };
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes: 1 << 20, policy, ..Default::default() }).unwrap();
    for adapter in [answered, answered] {
        engine.submit(ask(adapter, 1.0), 0.0).unwrap().unwrap();
    }
    let gone = engine.submit(ask(cancelled, 1.0), 0.0).unwrap().unwrap();
    let late = engine.submit(ask(waiting, 1.0), 0.0).unwrap().unwrap();
    let large = Request { prompt: vec![1; 1900], ..ask(refused, 1.0) };
    let mut tight = Engine::new(&model, EngineSettings { pool_bytes: 1 << 16, ..Default::default() }).unwrap();
    assert_eq!(tight.submit(large, 0.0).unwrap(), Err(Refusal::TooLarge));
    assert!(engine.submit(ask(invalid, f32::NAN), 0.0).is_err());
    let bad = engine.submit(ask(failed, 1e30), 0.0).unwrap().unwrap();
    assert!(Arc::strong_count(answered) == 3 && Arc::strong_count(waiting) == 2, "each request holds its own");
    engine.step(0.0);
    engine.cancel(gone);
    engine.cancel(late);
    let (mut ended, mut steps) = (0, 0);
    while !engine.is_idle() {
        steps += 1;
        assert!(steps < 100);
        for event in engine.step(f64::from(steps)) {
            match event {
                Event::Token(_, _, reason) => ended += usize::from(reason.is_some()),
                Event::Failed(id, Failure::NotFinite(_)) => assert_eq!(id, bad),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(ended, 2);
    assert!(engine.state().adapters >= 2, "they are in the pool still");
    for adapter in &all {
        assert_eq!(Arc::strong_count(adapter), 1, "{}", adapter.content_id);
        // Nor is there room beside its numbers.
        assert_eq!(adapter.numbers.capacity(), adapter.numbers.len());
    }
}
