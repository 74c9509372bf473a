//! An engine whose account fails goes on.

use std::path::Path;

use lorimer_model::{Base, OpenOptions};

use super::fault::Fault;
use super::*;

/// Where the account of requests and pages fails with one of them, that one is found and told, and the others get the tokens that they
/// would have got, each once.
#[test]
fn requests_outlive_a_failing_account() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama");
    let base = Base::prepare(&path, &OpenOptions::default()).unwrap().load().unwrap();
    let request = |prompt: Vec<u32>, seed: u64| Request {
        prompt,
        adapters: vec![],
        max_tokens: Some(12),
        sampling: Sampling { temperature: 1.0, frequency_penalty: 0.5, ..Default::default() },
        seed,
        stop: vec![],
        log_probabilities: None,
        of_prompt: false,
        tenant: Tenant::default(),
        names: vec![],
        form: None,
    };
    let run = |fault: bool| {
        let settings = EngineSettings { pool_bytes: 1 << 20, ..Default::default() };
        let mut engine = Engine::new(base.model(), settings).unwrap();
        for i in 0..4u32 {
            engine.submit(request((3..12 + 9 * i).collect(), u64::from(i)), 0.0).unwrap().unwrap();
        }
        let (mut answers, mut failed, mut steps) = (vec![Vec::new(); 4], Vec::new(), 0);
        while !engine.is_idle() {
            if steps == 5 && fault {
                let id = engine.submit(request(Fault::Step.prompt(), 9), 5.0).unwrap().unwrap();
                assert_eq!(id, 4);
            }
            steps += 1;
            assert!(steps < 100);
            for event in engine.step(f64::from(steps)) {
                match event {
                    Event::Token(id, token, _) => answers[id as usize].push(token.token),
                    Event::Failed(id, Failure::Defect(why)) => failed.push((id, why)),
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(engine.batching.is_idle() && engine.again.is_empty());
        (answers, failed)
    };
    let (expected, none) = run(false);
    assert!(none.is_empty() && expected.iter().all(|answer| answer.len() == 12));
    let (found, failed) = run(true);
    assert_eq!(found, expected);
    assert_eq!(failed, [(4, "a seeded fault".to_string())]);
}
