//! Requests that make the engine fail, or ask what cannot be.

use lorimer_serve::engine::Failure;

use super::*;

#[test]
fn requests_that_cannot_be_are_refused() {
    let model = model();
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes: 1 << 16, ..Default::default() }).unwrap();
    let adapter = hosted(&model, &moved(&model, "lora", r#"{"r": 2}"#), "a");
    let alone = hosted(&model, &moved(&model, "hydra", r#"{"r": 2}"#), "b");
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request(vec![1, 2], vec![], 3);
        change(&mut request);
        request
    };
    let refused = [
        (with(&|r| r.prompt.clear()), "empty"),
        (with(&|r| r.prompt.push(40)), "outside the vocabulary"),
        (with(&|r| r.max_tokens = Some(usize::MAX)), "longer than"),
        (with(&|r| r.sampling.top_p = -1.0), "top-p"),
        (with(&|r| r.adapters = vec![(adapter.clone(), f32::NAN)]), "finite"),
        (with(&|r| r.adapters = vec![(adapter.clone(), 1.0), (adapter.clone(), 1.0)]), "twice"),
        (with(&|r| r.adapters = vec![(adapter.clone(), 1.0), (alone.clone(), 1.0)]), "alone"),
        (with(&|r| r.adapters = vec![(alone.clone(), 0.5)]), "at weight 1"),
    ];
    for (request, why) in refused {
        let error = engine.submit(request, 0.0).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let large = with(&|r| r.prompt = vec![1; 1900]);
    assert_eq!(engine.submit(large, 0.0).unwrap(), Err(lorimer_serve::Refusal::TooLarge));
    assert!(engine.is_idle() && BaseModel::dtype(&model) == DType::F32);
}

/// An adapter whose account of itself is wrong: whatever computes with it panics.
fn broken(model: &dyn BaseModel, name: &str) -> Arc<Hosted> {
    let mut hosted = Hosted::new(model, &moved(model, "lora", r#"{"r": 2}"#), format!("sha256:{name}"), None).unwrap();
    hosted.places.values_mut().for_each(|place| place.a = 1 << 40);
    Arc::new(hosted)
}

/// A request that makes the engine fail is told so, and costs no other a token: those go on as if it had not been there.
#[test]
fn a_request_that_makes_the_engine_fail_harms_no_other() {
    let model = model();
    let good = hosted(&model, &moved(&model, "lora", r#"{"r": 3}"#), "good");
    let drawn = |i: u32| {
        let adapters = if i % 2 == 1 { vec![(good.clone(), 1.0)] } else { vec![] };
        Request {
            sampling: Sampling { temperature: 1.0, ..Default::default() },
            seed: u64::from(i),
            ..request((0..5 + 3 * i).map(|t| t * 7 % 40).collect(), adapters, 20)
        }
    };
    let settings = || EngineSettings {
        pool_bytes: 1 << 20,
        policy: Policy { batch_tokens: 32, ..Default::default() },
        ..Default::default()
    };
    let run = |bad: bool| {
        let mut engine = Engine::new(&model, settings()).unwrap();
        let ids: Vec<u64> = (0..8).map(|i| engine.submit(drawn(i), 0.0).unwrap().unwrap()).collect();
        let (mut answers, mut culprits) = (HashMap::<u64, Vec<u32>>::new(), Vec::new());
        for step in 0..20 {
            for event in engine.step(f64::from(step)) {
                let Event::Token(id, token, _) = event else { panic!("{event:?}") };
                answers.entry(id).or_default().push(token.token);
            }
        }
        if bad {
            for name in ["one", "two"] {
                let request = Request { adapters: vec![(broken(&model, name), 1.0)], ..drawn(2) };
                culprits.push(engine.submit(request, 20.0).unwrap().unwrap());
            }
        }
        let (rest, failures) = finish(&mut engine);
        rest.into_iter().for_each(|(id, mut tokens)| answers.entry(id).or_default().append(&mut tokens));
        assert_eq!(failures.len(), culprits.len());
        assert!(
            culprits.iter().all(|id| matches!(&failures[id], Failure::Defect(why) if !why.is_empty())),
            "{failures:?}"
        );
        let state = engine.state();
        assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
        ids.iter().map(|id| answers[id].clone()).collect::<Vec<_>>()
    };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = run(true);
    std::panic::set_hook(hook);
    assert_eq!(found, run(false));
}

/// What cannot be told as a probability is not told as a token: the request is refused with the adapters and weights that it asked for.
#[test]
fn logits_that_are_not_finite_are_refused_by_name() {
    let model = model();
    let adapter = hosted(&model, &moved(&model, "lora", r#"{"r": 3}"#), "a");
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes: 1 << 20, ..Default::default() }).unwrap();
    let with = |weight: f32| Request {
        names: vec!["large".into()],
        ..request(vec![1, 2, 3], vec![(adapter.clone(), weight)], 4)
    };
    let bad = engine.submit(with(1e30), 0.0).unwrap().unwrap();
    let good = engine.submit(with(1.0), 0.0).unwrap().unwrap();
    let base = engine.submit(request(vec![1, 2, 3], vec![], 4), 0.0).unwrap().unwrap();
    let (answers, failures) = finish(&mut engine);
    assert_eq!((answers[&good].len(), answers[&base].len(), failures.len()), (4, 4, 1));
    let Failure::NotFinite(why) = &failures[&bad] else { panic!("{failures:?}") };
    assert!(why.contains("`large` at weight 1000000000000000000000000000000"), "{why}");
    assert!(!answers.contains_key(&bad));
}
