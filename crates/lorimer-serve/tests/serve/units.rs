//! Routed units (LLaVA-MoLE) in the engine: what a sequence gives in the batch is what it gives alone.

use std::sync::Arc;

use candle_core::DType;
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, Hosted};

use crate::prelude::*;
use crate::requests::{answered, greedy, request};
use crate::tiny::{self, attach, move_all};

/// Prompts in parts beside the base's and another adapter's rows, from the prefix cache and after a full pool took pages back.
#[test]
fn routes_are_those_of_the_code_that_trains() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let tokens: Vec<u32> = (0..36).map(|i| (i * 7 + i * i) % 40).collect();
    let lengths = [33, 20, 17, 21, 3, 33];
    let some_layers =
        r#"{"r": 3, "experts": 4, "layers_to_transform": [1], "target_modules": ["down_proj", "v_proj"]}"#;
    for settings in [
        r#"{"r": 3, "experts": 3}"#,
        r#"{"r": 3, "experts": 2, "routing": "dense"}"#,
        r#"{"r": 2, "experts": 3, "routing": "top1-st", "lora_alpha": 1}"#,
        r#"{"r": 3, "experts": 1}"#,
        some_layers,
    ] {
        let (adapter, other) = (attach(&model, "llava-mole", settings), attach(&model, "lora", r#"{"r": 3}"#));
        move_all(&adapter);
        move_all(&other);
        let host = |adapter: &Adapter, id: &str| Arc::new(Hosted::new(&model, adapter, id.into(), None).unwrap());
        let (one, two) = (host(&adapter, "sha256:one"), host(&other, "sha256:two"));
        let geometry = Engine::new(&model, EngineSettings::default()).unwrap().geometry();
        assert_eq!((one.pages_per_block(geometry), one.conversion.error), (0, 0.0), "{settings}");
        for pool in [60, 24] {
            let policy = Policy { batch_tokens: 9, ..Default::default() };
            let own = EngineSettings { pool_bytes: pool * geometry.page_bytes(), policy, ..Default::default() };
            let mut engine = Engine::new(&model, own).unwrap();
            let asked = |i: usize| {
                let with = [Some(&one), None, Some(&one), Some(&two), Some(&one), None][i % 6];
                let adapters = with.map(|hosted| (hosted.clone(), 1.0)).into_iter().collect();
                request(tokens[..lengths[i % 6]].to_vec(), adapters, 9)
            };
            let answers = answered(&mut engine, &(0..12).map(asked).collect::<Vec<_>>(), 6);
            let count = answers.iter().flatten().count();
            assert!(count == 12 || (pool < 60 && count > 6), "{count}");
            for (i, found) in answers.into_iter().enumerate().filter_map(|(i, found)| Some((i % 6, found?))) {
                let (one, two) = (Attached::one(&adapter), Attached::one(&other));
                let on: [&dyn Adaptation; 6] = [&one, &Frozen, &one, &two, &one, &Frozen];
                assert_eq!(found, greedy(&model, on[i], &tokens[..lengths[i]], 9), "{settings}: request {i}");
            }
        }
    }
}
