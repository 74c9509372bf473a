//! Keys and values in 8 bits: more tokens in the same pool, answers close to those in f32, and the same alone as among others.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use lorimer_model::base::open_weights;
use lorimer_serve::engine::pool::Geometry;
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, EngineState, Event, Hosted, Refusal, Request, Token};
use lorimer_tensor::KeyDtype;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::prelude::*;
use crate::requests::request;
use crate::tiny;

fn settings(pool_bytes: usize, kv_cache_dtype: KeyDtype) -> EngineSettings {
    EngineSettings { pool_bytes, kv_cache_dtype, ..Default::default() }
}

/// What requests that are submitted together are told: prompt and answer, one after the other.
fn told(model: &dyn BaseModel, requests: &[Request], settings: EngineSettings) -> (Vec<Vec<Token>>, EngineState) {
    let mut engine = Engine::new(model, settings).unwrap();
    let mut all = vec![Vec::new(); requests.len()];
    requests.iter().for_each(|request| _ = engine.submit(request.clone(), 0.0).unwrap().unwrap());
    let mut steps = 0;
    while !engine.is_idle() {
        steps += 1;
        assert!(steps < 10_000, "{:?}", engine.state());
        for event in engine.step(f64::from(steps)) {
            match event {
                Event::Token(id, token, _) => all[id as usize].push(token),
                Event::Prompt(id, tokens, _) => all[id as usize].extend(tokens),
                other => panic!("{other:?}"),
            }
        }
    }
    let state = engine.state();
    assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
    (all, state)
}

/// Every request is told what it is told alone. Rounding to 8 bits makes a step of what is rounding in f32 where a number is half-way between two, and
/// so a choice between tokens that are as good as equally likely may be another: that happens to `most` of the requests.
fn same_as_alone(model: &dyn BaseModel, requests: &[Request], settings: EngineSettings, most: usize) -> EngineState {
    let (together, state) = told(model, requests, settings);
    let mut others = 0;
    for (i, (request, together)) in requests.iter().zip(&together).enumerate() {
        let alone = told(model, std::slice::from_ref(request), self::settings(1 << 24, KeyDtype::Int8)).0.remove(0);
        assert_eq!(alone.len(), together.len(), "request {i}");
        let mut pairs = alone.iter().zip(together);
        let same = pairs.by_ref().take_while(|(a, b)| a.token == b.token);
        let apart = same.map(|(a, b)| (a.log_probability.unwrap_or(0.0) - b.log_probability.unwrap_or(0.0)).abs());
        let apart = apart.fold(0.0, f32::max);
        assert!(apart < 0.02, "request {i}: {apart}");
        others += usize::from(alone.iter().zip(together).any(|(a, b)| a.token != b.token));
    }
    assert!(others <= most, "{others} of {} answers are others", requests.len());
    state
}

/// To be seen to fail: pages of 8 bits that are counted as those of f32 are.
#[test]
fn the_same_pool_holds_almost_four_times_the_tokens() {
    let model = tiny::model_sized(DType::F32, LoadDtype::Stored, (192, 256));
    let state = |dtype| Engine::new(&model, settings(1 << 20, dtype)).unwrap().state();
    let (whole, rounded) = (state(KeyDtype::F32).pages as f64, state(KeyDtype::Int8).pages as f64);
    assert!((3.5..3.8).contains(&(rounded / whole)), "{rounded} pages and {whole}");
    let geometry = |dtype| Geometry::with(model.shape(), dtype);
    let (whole, rounded) = (geometry(KeyDtype::F32), geometry(KeyDtype::Int8));
    assert_eq!((whole.row, rounded.row), (96, 26));
    assert_eq!(rounded.tokens_of_pages(rounded.pages_of_tokens(37)), 48);
    // What is too long for a pool in f32 is answered in 8 bits.
    let bytes = whole.pages_of_tokens(64) * whole.page_bytes();
    let asked = request((0..200).map(|i| i % 40).collect(), vec![], 8);
    let refused = Engine::new(&model, settings(bytes, KeyDtype::F32)).unwrap().submit(asked.clone(), 0.0).unwrap();
    assert_eq!(refused, Err(Refusal::TooLarge));
    assert_eq!(told(&model, &[asked], settings(bytes, KeyDtype::Int8)).0[0].len(), 8);
}

/// The error of 8 bits, told by the log-probabilities of prompts' tokens. To be seen to fail: fewer bits.
#[test]
fn log_probabilities_are_close_to_those_in_f32() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let asked = |n: usize| {
        let prompt = (0..n).map(|_| rng.random_range(0..40)).collect();
        Request { of_prompt: true, log_probabilities: Some(0), ..request(prompt, vec![], 0) }
    };
    let requests: Vec<Request> = [2, 17, 300, 600].map(asked).into();
    let all = |dtype| told(&model, &requests, settings(8 << 20, dtype)).0.concat();
    let (whole, rounded) = (all(KeyDtype::F32), all(KeyDtype::Int8));
    let pairs = whole.iter().zip(&rounded).filter_map(|(a, b)| Some(a.log_probability? - b.log_probability?));
    let apart: Vec<f32> = pairs.map(f32::abs).collect();
    let (most, mean) = (apart.iter().copied().fold(0.0, f32::max), apart.iter().sum::<f32>() / apart.len() as f32);
    println!("{mean:.1e} on average, {most:.1e} at most, of {}", apart.len());
    assert!(apart.len() == 915 && most > 0.0 && most < 0.05 && mean < 4e-3, "{most} {mean}");
}

fn hosted(model: &dyn BaseModel, name: &str, settings: &str) -> Arc<Hosted> {
    let adapter = tiny::attach(model, name, settings);
    tiny::move_all(&adapter);
    Arc::new(Hosted::new(model, &adapter, format!("sha256:{name} {settings}"), None).unwrap())
}

/// Every method, drawn and likeliest tokens, with guesses and without.
#[test]
fn every_method_answers_as_alone() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut requests = Vec::new();
    for entry in methods::REGISTRY {
        let Some((settings, _)) = entry.laws.first() else { continue };
        let hosted = hosted(&model, entry.name, settings);
        for temperature in [0.0, 0.6] {
            let part: Vec<u32> = (0..rng.random_range(3..9)).map(|_| rng.random_range(0..40)).collect();
            let asked = request(part.repeat(4), vec![(hosted.clone(), 1.0)], 24);
            let sampling = Sampling { temperature, ..asked.sampling.clone() };
            requests.push(Request { sampling, seed: 3, log_probabilities: Some(0), ..asked });
        }
    }
    for guesses in [0, 6] {
        let policy = Policy { guesses, max_running: 7, ..Default::default() };
        let state = same_as_alone(&model, &requests, EngineSettings { policy, ..settings(1 << 24, KeyDtype::Int8) }, 3);
        assert_eq!(state.accepted_tokens > 100, guesses > 0, "{state:?}");
    }
}

/// A pool that holds some of the requests and adapters only, prompts that begin alike, and steps of few rows.
#[test]
fn what_is_cached_is_answered_as_alone() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let adapters =
        [("lora", r#"{"r": 9}"#), ("bone", r#"{"r": 4}"#), ("sparse-gin", r#"{"gin_dim": 6, "gin_scale": "0.4:0.6"}"#)];
    let adapters = adapters.map(|(name, settings)| hosted(&model, name, settings));
    let geometry = Geometry::with(model.shape(), KeyDtype::Int8);
    let largest = adapters.iter().map(|a| a.pages(geometry)).max().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(0..40)).collect();
    let mut requests = Vec::new();
    for i in 0..60 {
        let mut prompt = shared[..rng.random_range(0..shared.len())].to_vec();
        prompt.extend((0..rng.random_range(1..30)).map(|_| rng.random_range(0..40u32)));
        let with = adapters.get(i % 4).map(|a| (a.clone(), 1.0)).into_iter().collect();
        let asked = request(prompt, with, rng.random_range(1..40));
        let sampling = Sampling { temperature: [0.0, 0.8][i % 2], ..asked.sampling.clone() };
        requests.push(Request { sampling, seed: i as u64, log_probabilities: Some(0), ..asked });
    }
    for guesses in [0, 7] {
        let policy = Policy { batch_tokens: 3, max_running: 9, guesses, ..Default::default() };
        let pool_bytes = (2 * largest + geometry.pages_with(120, 2)) * geometry.page_bytes();
        let state =
            same_as_alone(&model, &requests, EngineSettings { policy, ..settings(pool_bytes, KeyDtype::Int8) }, 3);
        assert!(state.adapter_evictions > 0 && state.cached_tokens > 0, "{state:?}");
    }
}

/// Two rows a step: prompts take so long that requests which should have come to their ends one after the other overlap after all.
#[test]
fn what_is_preempted_is_answered_as_alone() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let asked = |(n, max_tokens): (u32, usize)| Request {
        sampling: Sampling { temperature: 1.0, ..Default::default() },
        seed: 7,
        log_probabilities: Some(0),
        ..request((0..n).map(|i| i * 7 % 40).collect(), vec![], max_tokens)
    };
    let requests = [(9, 60), (38, 9), (30, 12)].map(asked);
    let geometry = Geometry::with(model.shape(), KeyDtype::Int8);
    let policy = Policy { batch_tokens: 2, ..Default::default() };
    let pool_bytes = geometry.pages_of_tokens(96) * geometry.page_bytes();
    let settings = EngineSettings { policy, prefix_cache: false, ..settings(pool_bytes, KeyDtype::Int8) };
    let state = same_as_alone(&model, &requests, settings, 1);
    assert!(state.preempted > 0, "{state:?}");
}

/// Sliding windows, caps of scores, heads of other widths; prompts that are longer than a window and than a tile of keys.
#[test]
fn windows_and_long_prompts_are_answered_as_alone() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    let opened = |name: &str| {
        let (config, weights) = open_weights(&goldens.join(name), LoadDtype::F32).unwrap();
        Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
    };
    let models = [
        opened("tiny-gemma2"),
        opened("tiny-gemma3"),
        opened("tiny-phi3"),
        tiny::model_as(DType::F32, LoadDtype::Stored),
    ];
    for (which, model) in models.iter().enumerate() {
        let longest = model.shape().cached_positions().min(600) - 12;
        let vocabulary = model.shape().vocabulary as u32;
        let asked = |i: usize| {
            let n = [longest, 7, 21.min(longest), 1, longest / 2][i % 5];
            let prompt = (0..n as u32).map(|t| (t * t + 3 * t) % vocabulary.min(40)).collect();
            Request { log_probabilities: Some(0), ..request(prompt, vec![], 12) }
        };
        let requests: Vec<Request> = (0..10).map(asked).collect();
        for guesses in [0, 5] {
            let policy = Policy { batch_tokens: 40, guesses, ..Default::default() };
            let settings = EngineSettings { policy, ..settings(8 << 20, KeyDtype::Int8) };
            let state = same_as_alone(model, &requests, settings, 1);
            assert!(state.cached_tokens > 0, "model {which}: {state:?}");
        }
    }
}
