//! Serving many adapters of one base in one batch gives what each gives alone.

mod failures;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use lorimer_model::weights::LoadDtype;
use lorimer_model::{BaseModel, KvCache};
use lorimer_serve::engine::batched::{Batched, Rows, Used};
use lorimer_serve::engine::pool::{BLOCK, Geometry, pool};
use lorimer_serve::engine::scheduler::{Policy, Tenant};
use lorimer_serve::{Engine, EngineSettings, Event, FinishReason, Hosted, Request, Sampling};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::prelude::*;
use crate::requests::{answered, finish, greedy, logits_of, request};
use crate::tiny;

fn model() -> Decoder {
    tiny::model_as(DType::F32, LoadDtype::Stored)
}

fn hosted(model: &dyn BaseModel, adapter: &Adapter, name: &str) -> Arc<Hosted> {
    Arc::new(Hosted::new(model, adapter, format!("sha256:{name}"), None).unwrap())
}

/// An adapter of a method that does something.
fn moved(model: &dyn BaseModel, name: &str, settings: &str) -> Adapter {
    let adapter = tiny::attach(model, name, settings);
    tiny::move_all(&adapter);
    adapter
}

/// A sequence with its adapters and their weights.
type Asked = (Vec<u32>, Vec<(Arc<Hosted>, f32)>);

/// The logits of every sequence's rows, computed together.
fn together(model: &dyn BaseModel, sequences: &[Asked]) -> Vec<Tensor> {
    let geometry = Geometry::of(model.shape());
    let (mut free, mut numbers) = pool(geometry, 4000 * geometry.page_bytes()).unwrap();
    let mut residents: HashMap<&str, Vec<u32>> = HashMap::new();
    let mut blocks = Vec::new();
    for (tokens, adapters) in sequences {
        for (adapter, _) in adapters {
            residents.entry(&adapter.content_id).or_insert_with(|| {
                let pages = free.take(adapter.pages(geometry)).unwrap();
                numbers.write(&pages, &adapter.numbers);
                pages
            });
        }
        let more = adapters.iter().map(|(a, _)| a.pages_per_block(geometry)).sum();
        let pages = free.take(geometry.pages_with(tokens.len(), more)).unwrap();
        blocks.push(pages.chunks(geometry.layers + more).map(<[u32]>::to_vec).collect::<Vec<_>>());
    }
    let rows = sequences.iter().zip(&blocks).map(|((tokens, adapters), blocks)| Rows {
        count: tokens.len(),
        position: 0,
        blocks,
        adapters: adapters
            .iter()
            .map(|(hosted, weight)| Used { hosted, pages: &residents[hosted.content_id.as_str()], weight: *weight })
            .collect(),
    });
    let tokens: Vec<u32> = sequences.iter().flat_map(|(tokens, _)| tokens.clone()).collect();
    let needed: Vec<u32> = (0..tokens.len() as u32).collect();
    let batch = Batched::new(numbers.all(), geometry, rows.collect(), &needed);
    let logits = batch.logits(model, &tokens, &needed).unwrap().unwrap();
    let mut at = 0;
    let one = |(tokens, _): &(Vec<u32>, _)| {
        at += tokens.len();
        logits.narrow(0, at - tokens.len(), tokens.len()).unwrap()
    };
    sequences.iter().map(one).collect()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    tiny::distance(&a.to_dtype(DType::F64).unwrap(), &b.to_dtype(DType::F64).unwrap())
}

/// Law 9: every method and variant, all in one batch, beside rows of the bare base.
#[test]
fn batched_is_alone_for_every_method() {
    let model = model();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut adapters, mut sequences) = (Vec::new(), Vec::new());
    for entry in methods::REGISTRY {
        for (i, (settings, _)) in entry.laws.iter().enumerate() {
            let adapter = moved(&model, entry.name, settings);
            let name = format!("{} {settings}", entry.name);
            // On the tiny base the approximation's rank is that of the whole matrix, so that nothing is lost.
            match Hosted::new(&model, &adapter, format!("{}-{i}", entry.name), None) {
                Ok(hosted) => {
                    let tokens: Vec<u32> = (0..rng.random_range(1..40)).map(|_| rng.random_range(0..40)).collect();
                    sequences.push((tokens, vec![(Arc::new(hosted), 1.0)]));
                    adapters.push((name, Some(adapter)));
                }
                Err(error) => {
                    assert!(error.to_string().contains("merge it into the base"), "{name}: {error}");
                    assert!(settings.contains("modules_to_save"), "{name}: {error}");
                }
            }
            if i == 0 {
                sequences.push((vec![3, 1, 4, 1, 5], vec![]));
                adapters.push((format!("the base after {}", entry.name), None));
            }
        }
    }
    let served = methods::REGISTRY.iter().filter(|e| adapters.iter().any(|(name, _)| name.starts_with(e.name)));
    // X-LoRA needs experts: see xlora.rs.
    let alone_made = methods::REGISTRY.iter().filter(|e| e.name != "xlora");
    assert_eq!(served.count(), alone_made.count(), "every method is served in some form");
    let found = together(&model, &sequences);
    for (((name, adapter), (tokens, _)), found) in adapters.iter().zip(&sequences).zip(&found) {
        let expected = match adapter {
            Some(adapter) => logits_of(&model, &Attached::one(adapter), tokens),
            None => logits_of(&model, &Frozen, tokens),
        };
        let largest = expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let wrong = difference(found, &expected) / f64::from(largest);
        assert!(wrong < 1e-4, "{name}: {wrong:e}");
    }
}

/// What the base computed of a prompt serves an adapter that changes nothing but what comes after the last block's keys and values, and the other way
/// round; any other adapter computes its own.
#[test]
fn a_prefix_is_shared_with_adapters_that_leave_keys_alone() {
    let model = model();
    let tokens: Vec<u32> = (0..3 * BLOCK as u32 + 1).map(|i| (i * 7 + i * i) % 40).collect();
    for (settings, shared) in [
        (
            r#"{"r": 2, "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers_to_transform": [1]}"#,
            true,
        ),
        (r#"{"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [0]}"#, false),
        (r#"{"r": 2, "target_modules": ["o_proj", "v_proj"], "layers_to_transform": [1]}"#, false),
        (r#"{"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1]}"#, false),
        (r#"{"r": 2, "target_modules": ["o_proj", "v_proj"]}"#, false),
    ] {
        let adapter = moved(&model, "lora", settings);
        let own = hosted(&model, &adapter, "own");
        assert_eq!(own.leaves_keys, shared, "{settings}");
        for base_first in [true, false] {
            let mut engine = Engine::new(&model, EngineSettings { prefix_cache: true, ..Default::default() }).unwrap();
            for (turn, with) in [!base_first, base_first].into_iter().enumerate() {
                let adapters = with.then(|| (own.clone(), 1.0)).into_iter().collect();
                let found = answered(&mut engine, &[request(tokens.clone(), adapters, 9)], 1);
                let on: &dyn Adaptation = if with { &Attached::one(&adapter) } else { &Frozen };
                assert_eq!(found, [Some(greedy(&model, on, &tokens, 9))], "{settings}");
                let cached = if turn == 1 && shared { 3 * BLOCK as u64 } else { 0 };
                assert_eq!(engine.state().cached_tokens, cached, "{settings}");
            }
        }
    }
}

/// Tokens that are drawn are those without guesses, with their log-probabilities, whatever an adapter keeps of each token.
#[test]
fn guesses_change_nothing_for_any_method() {
    let model = model();
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut requests = Vec::new();
    for entry in methods::REGISTRY {
        let Some((settings, _)) = entry.laws.first() else { continue };
        let adapter = moved(&model, entry.name, settings);
        let hosted = Arc::new(Hosted::new(&model, &adapter, entry.name.into(), None).unwrap());
        for temperature in [0.0, 0.6] {
            // Prompts that repeat themselves, so that there is something to guess.
            let part: Vec<u32> = (0..rng.random_range(3..9)).map(|_| rng.random_range(0..40)).collect();
            let asked = request(part.repeat(4), vec![(hosted.clone(), 1.0)], 24);
            let sampling = Sampling { temperature, ..asked.sampling.clone() };
            requests.push(Request { sampling, seed: 3, log_probabilities: Some(2), ..asked });
        }
    }
    let answers = |guesses: usize| {
        let policy = Policy { guesses, max_running: 7, ..Default::default() };
        let settings = EngineSettings { pool_bytes: 1 << 24, policy, ..Default::default() };
        let mut engine = Engine::new(&model, settings).unwrap();
        let mut answers: Vec<Vec<(u32, f32)>> = vec![Vec::new(); requests.len()];
        requests.iter().for_each(|request| _ = engine.submit(request.clone(), 0.0).unwrap().unwrap());
        while !engine.is_idle() {
            for event in engine.step(0.0) {
                let Event::Token(id, token, _) = event else { panic!("{event:?}") };
                answers[id as usize].push((token.token, token.log_probability.unwrap()));
            }
        }
        (answers, engine.state())
    };
    let ((plain, none), (guessed, some)) = (answers(0), answers(6));
    assert!(
        none.guessed_tokens == 0 && some.accepted_tokens > 100 && some.guessed_tokens > some.accepted_tokens,
        "{some:?}"
    );
    for (i, (plain, guessed)) in plain.iter().zip(&guessed).enumerate() {
        let tokens = |all: &[(u32, f32)]| all.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(plain), tokens(guessed), "request {i}");
        let apart = plain.iter().zip(guessed).map(|(a, b)| (a.1 - b.1).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "request {i}: {apart}");
    }
}

#[test]
fn sums_of_weighted_adapters_in_one_batch() {
    let model = model();
    let (one, two) = (moved(&model, "dora", r#"{"r": 3}"#), moved(&model, "bone", r#"{"r": 4}"#));
    let (a, b) = (hosted(&model, &one, "one"), hosted(&model, &two, "two"));
    let tokens = vec![7, 8, 9, 3, 2, 30, 12];
    let sequences = [
        (tokens.clone(), vec![(a.clone(), 0.5), (b.clone(), -1.25)]),
        (tokens.clone(), vec![(a.clone(), 2.0)]),
        (tokens.clone(), vec![(b, 1.0), (a, 1.0)]),
    ];
    let found = together(&model, &sequences);
    for (weights, found) in
        [[(&one, 0.5), (&two, -1.25)], [(&one, 2.0), (&two, 0.0)], [(&two, 1.0), (&one, 1.0)]].iter().zip(found)
    {
        let expected = logits_of(&model, &Attached::weighted(weights.to_vec()).unwrap(), &tokens);
        assert!(difference(&found, &expected) < 1e-3, "{weights:?}", weights = weights.map(|w| w.1));
    }
}

/// Greedy tokens of one request alone, token by token, by the code that trains.
fn answer(model: &dyn BaseModel, adaptation: &dyn Adaptation, prompt: &[u32], n: usize, stop: u32) -> (Vec<u32>, f32) {
    let mut cache = KvCache::default();
    let mut hidden = model.hidden_cached(prompt, &mut cache, adaptation).unwrap();
    let (mut tokens, mut closest) = (Vec::new(), f32::INFINITY);
    while tokens.len() < n {
        let last = hidden.narrow(0, hidden.dim(0).unwrap() - 1, 1).unwrap();
        let logits = model.logits(&last, adaptation).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        closest = closest.min(logits[order[0]] - logits[order[1]]);
        let token = order[0] as u32;
        tokens.push(token);
        if token == stop {
            break;
        }
        hidden = model.hidden_cached(&[token], &mut cache, adaptation).unwrap();
    }
    (tokens, closest)
}

/// Hundreds of requests over many adapters through a pool that holds only some of them: everyone gets what he would get alone, whatever
/// has to be preempted or thrown out meanwhile; at the end the account of the pool is exact.
#[test]
fn an_engine_answers_as_if_each_were_alone() {
    for guesses in [0, 7] {
        answers_as_if_each_were_alone(guesses);
    }
}

fn answers_as_if_each_were_alone(guesses: usize) {
    let model = model();
    let settings = [
        ("lora", r#"{"r": 2}"#),
        ("lora", r#"{"r": 9, "target_modules": ["q_proj", "o_proj"]}"#),
        ("dora", r#"{"r": 3}"#),
        ("bone", r#"{"r": 4}"#),
        ("lora-xs", r#"{"r": 4}"#),
        ("vera", r#"{"r": 5}"#),
    ];
    let adapters: Vec<_> = settings.iter().map(|(name, settings)| moved(&model, name, settings)).collect();
    let hosted: Vec<_> = adapters.iter().enumerate().map(|(i, a)| hosted(&model, a, &i.to_string())).collect();
    let geometry = Geometry::of(model.shape());
    let largest = hosted.iter().map(|h| h.pages(geometry)).max().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let policy = Policy { batch_tokens: 24, max_running: 9, guesses, ..Default::default() };
    let pool_bytes = (2 * largest + geometry.pages_of_tokens(260)) * geometry.page_bytes();
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes, policy, ..Default::default() }).unwrap();
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(0..40)).collect();
    let mut wanted = HashMap::new();
    let mut answers: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut cancelled = Vec::new();
    let (mut now, mut submitted) = (0.0, 0);
    while submitted < 300 || !engine.is_idle() {
        for _ in 0..rng.random_range(0..4) {
            if submitted == 300 {
                break;
            }
            submitted += 1;
            let which = rng.random_range(0..=settings.len());
            let mut prompt = shared[..rng.random_range(0..shared.len())].to_vec();
            prompt.extend((0..rng.random_range(1..30)).map(|_| rng.random_range(0..40u32)));
            let max_tokens = rng.random_range(1..30);
            let adapters = hosted.get(which).map(|h| (h.clone(), 1.0)).into_iter().collect();
            let request = Request {
                stop: vec![5],
                tenant: Tenant { client: "one".into(), user: format!("t{}", which % 3).into() },
                ..request(prompt.clone(), adapters, max_tokens)
            };
            let id = engine.submit(request, now).unwrap().unwrap();
            wanted.insert(id, (which, prompt, max_tokens));
            if rng.random_range(0..20) == 0 {
                cancelled.push(id);
            }
        }
        now += 0.01;
        for event in engine.step(now) {
            match event {
                Event::Token(id, token, reason) => {
                    answers.entry(id).or_default().push(token.token);
                    let n = answers[&id].len();
                    assert_eq!(reason == Some(FinishReason::Stop), token.token == 5);
                    assert_eq!(reason.is_some(), token.token == 5 || n == wanted[&id].2);
                }
                other => panic!("{other:?}"),
            }
        }
        if rng.random_range(0..6) == 0
            && let Some(id) = cancelled.pop()
        {
            engine.cancel(id);
            wanted.remove(&id);
        }
    }
    let state = engine.state();
    assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
    assert!(state.adapter_evictions > 0 && state.cached_tokens > 0, "{state:?}");
    assert_eq!((state.guessed_tokens > 300, state.accepted_tokens > 100), (guesses > 0, guesses > 0), "{state:?}");
    let mut compared = 0;
    for (id, (which, prompt, n)) in &wanted {
        let (expected, closest) = match adapters.get(*which) {
            Some(adapter) => answer(&model, &Attached::one(adapter), prompt, *n, 5),
            None => answer(&model, &Frozen, prompt, *n, 5),
        };
        // Where two tokens are as good as equally likely, rounding may choose.
        if closest > 1e-4 {
            assert_eq!(answers[id], expected, "request {id} with adapter {which}");
            compared += 1;
        }
    }
    assert!(compared > 250, "{compared}");
}

/// Prompts shorter and longer than a step's rows, alone and several at once: a step may then compute rows none of whose logits are wanted.
#[test]
fn prompts_of_any_length_in_steps_of_few_rows() {
    for load in [LoadDtype::Stored, LoadDtype::Int8] {
        let model = tiny::model_sized(DType::F32, load, (192, 256));
        let adapter = moved(&model, "lora", r#"{"r": 2}"#);
        let hosted = hosted(&model, &adapter, "a");
        let prompt = |n: usize| (0..n as u32).map(|i| i * i % 39).collect::<Vec<_>>();
        for lengths in [&[1usize][..], &[7], &[8], &[9], &[16], &[65], &[65, 1, 8, 30, 9]] {
            let policy = Policy { batch_tokens: 8, ..Default::default() };
            let settings = EngineSettings { pool_bytes: 1 << 24, policy, ..Default::default() };
            let mut engine = Engine::new(&model, settings).unwrap();
            for (i, &n) in lengths.iter().enumerate() {
                let adapters = (i % 2 == 0).then(|| (hosted.clone(), 1.0)).into_iter().collect();
                let request = request(prompt(n), adapters, 3);
                assert_eq!(engine.submit(request, 0.0).unwrap(), Ok(i as u64));
            }
            let (answers, failures) = finish(&mut engine);
            assert!(failures.is_empty(), "{failures:?}");
            for (i, &n) in lengths.iter().enumerate() {
                let (expected, closest) = match i % 2 {
                    0 => answer(&model, &Attached::one(&adapter), &prompt(n), 3, u32::MAX),
                    _ => answer(&model, &Frozen, &prompt(n), 3, u32::MAX),
                };
                // Products in whole numbers round activations, which a close choice may show.
                if closest > if load == LoadDtype::Int8 { 0.3 } else { 1e-3 } {
                    assert_eq!(answers[&(i as u64)], expected, "{lengths:?}, request {i}, {load:?}");
                }
                assert_eq!(answers[&(i as u64)].len(), 3);
            }
        }
    }
}

/// A request that was preempted half-way goes on where it was.
#[test]
fn a_request_that_was_preempted_loses_nothing() {
    let model = model();
    let geometry = Geometry::of(model.shape());
    let policy = Policy { batch_tokens: 2, ..Default::default() };
    let pool_bytes = geometry.pages_of_tokens(6 * BLOCK) * geometry.page_bytes();
    let mut engine =
        Engine::new(&model, EngineSettings { pool_bytes, policy, prefix_cache: false, ..Default::default() }).unwrap();
    let drawn = |prompt: Vec<u32>, max_tokens: usize| Request {
        sampling: Sampling { temperature: 1.0, ..Default::default() },
        seed: 7,
        log_probabilities: Some(2),
        ..request(prompt, vec![], max_tokens)
    };
    // Two rows a step: prompts take so long that requests which should have come to their ends one after the other overlap after all.
    let lengths = [(9usize, 60usize), (38, 9), (30, 12)];
    let prompt = |n: usize| (0..n as u32).map(|i| i * 7 % 40).collect::<Vec<_>>();
    let mut together: HashMap<u64, Vec<_>> = HashMap::new();
    for (n, max_tokens) in lengths {
        engine.submit(drawn(prompt(n), max_tokens), 0.0).unwrap().unwrap();
    }
    let mut steps = 0;
    while !engine.is_idle() {
        steps += 1;
        assert!(steps < 1000);
        for event in engine.step(f64::from(steps)) {
            let Event::Token(id, token, _) = event else { panic!("{event:?}") };
            together.entry(id).or_default().push(token);
        }
    }
    assert!(engine.state().preempted > 0, "{:?}", engine.state());
    for (id, (n, max_tokens)) in lengths.into_iter().enumerate() {
        let settings = EngineSettings { pool_bytes: 1 << 20, ..Default::default() };
        let mut engine = Engine::new(&model, settings).unwrap();
        engine.submit(drawn(prompt(n), max_tokens), 0.0).unwrap().unwrap();
        let mut alone = Vec::new();
        while !engine.is_idle() {
            for event in engine.step(0.0) {
                let Event::Token(_, token, _) = event else { panic!("{event:?}") };
                alone.push(token);
            }
        }
        assert_eq!(alone.len(), max_tokens);
        let together = &together[&(id as u64)];
        assert_eq!(
            alone.iter().map(|t| t.token).collect::<Vec<_>>(),
            together.iter().map(|t| t.token).collect::<Vec<_>>()
        );
        for (a, b) in alone.iter().zip(together) {
            assert!((a.log_probability.unwrap() - b.log_probability.unwrap()).abs() < 1e-4);
            assert_eq!(a.top[0].0, b.top[0].0);
        }
    }
}

/// Prompts from one token to the context's end, most of them longer than what a step takes, one by one and all together, with an adapter
/// and without.
#[test]
fn prompts_of_every_length_are_answered() {
    let model = model();
    let adapter = moved(&model, "lora", r#"{"r": 3}"#);
    let hosted = hosted(&model, &adapter, "a");
    let (context, batch_tokens) = (model.shape().max_positions, 24);
    let lengths = [1, 2, 15, 16, 17, 23, 24, 25, 47, 48, 49, 73, 96, 511, 1024, context - 1];
    let text = |n: usize| (0..n as u32).map(|i| (i * i + 3 * i) % 40).collect::<Vec<_>>();
    for prefix_cache in [false, true] {
        let policy = Policy { batch_tokens, ..Default::default() };
        let settings = EngineSettings { pool_bytes: 64 << 20, policy, prefix_cache, ..Default::default() };
        let mut together = Engine::new(&model, settings.clone()).unwrap();
        let mut expected = HashMap::new();
        for (i, &n) in lengths.iter().enumerate() {
            let max_tokens = 3.min(context - n);
            let with = i % 2 == 1;
            let adapters = if with { vec![(hosted.clone(), 1.0)] } else { vec![] };
            let request = request(text(n), adapters, max_tokens);
            let mut one = Engine::new(&model, settings.clone()).unwrap();
            let id = one.submit(request.clone(), 0.0).unwrap().unwrap();
            let (answers, failures) = finish(&mut one);
            assert!(failures.is_empty(), "{n} tokens alone: {failures:?}");
            let (wanted, closest) = match with {
                true => answer(&model, &Attached::one(&adapter), &text(n), max_tokens, u32::MAX),
                false => answer(&model, &Frozen, &text(n), max_tokens, u32::MAX),
            };
            // Where two tokens are as good as equally likely, rounding may choose.
            if closest > 1e-3 {
                assert_eq!(answers[&id], wanted, "{n} tokens alone");
            }
            assert_eq!(answers[&id].len(), max_tokens);
            let id = together.submit(request, 0.0).unwrap().unwrap();
            expected.insert(id, (n, wanted, closest));
        }
        let (answers, failures) = finish(&mut together);
        assert!(failures.is_empty(), "{failures:?}");
        for (id, (n, wanted, closest)) in expected {
            assert_eq!(answers[&id].len(), wanted.len());
            if closest > 1e-3 {
                assert_eq!(answers[&id], wanted, "{n} tokens among others");
            }
        }
    }
}
