//! A draft model changes no token: one that is always right, one that is seldom, and one whose layers have other shapes.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use lorimer_model::decoder::config::DecoderConfig;
use lorimer_model::weights::Weights;
use lorimer_serve::engine::pool::{Geometry, shares};
use lorimer_serve::engine::scheduler::Policy;
use lorimer_serve::{Engine, EngineSettings, EngineState, Event, Hosted, Request, Token};
use lorimer_tensor::KeyDtype;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::prelude::*;
use crate::requests::request;
use crate::shapes::shaped;
use crate::tiny;

fn hosted(model: &dyn BaseModel, name: &str, settings: &str) -> Arc<Hosted> {
    let adapter = tiny::attach(model, name, settings);
    tiny::move_all(&adapter);
    Arc::new(Hosted::new(model, &adapter, format!("sha256:{name} {settings}"), None).unwrap())
}

/// Answers of requests that come one after the other, some at a time.
fn answers(
    model: &dyn BaseModel,
    draft: Option<&dyn BaseModel>,
    requests: &[Request],
    settings: EngineSettings,
) -> (Vec<Vec<Token>>, EngineState, usize) {
    let mut engine = Engine::with_draft(model, draft, settings).unwrap();
    let mut all = vec![Vec::new(); requests.len()];
    let (mut submitted, mut steps) = (0, 0);
    while submitted < requests.len() || !engine.is_idle() {
        if steps % 2 == 0 && submitted < requests.len() {
            engine.submit(requests[submitted].clone(), steps as f64).unwrap().unwrap();
            submitted += 1;
        }
        steps += 1;
        assert!(steps < 10_000, "{:?}", engine.state());
        for event in engine.step(steps as f64) {
            let Event::Token(id, token, _) = event else { panic!("{event:?}") };
            all[id as usize].push(token);
        }
    }
    let state = engine.state();
    assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
    (all, state, steps)
}

/// Requests with adapters and without, for the likeliest tokens and for drawn ones, with penalties and stops.
fn requests(adapters: &[Arc<Hosted>], n: usize) -> Vec<Request> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(0..40)).collect();
    let one = |i: usize| {
        let mut prompt = shared[..rng.random_range(0..shared.len())].to_vec();
        prompt.extend((0..rng.random_range(1..20)).map(|_| rng.random_range(0..40u32)));
        let with = adapters.get(i % (adapters.len() + 1)).map(|a| (a.clone(), 1.0)).into_iter().collect();
        let asked = request(prompt, with, rng.random_range(1..40));
        let temperature = [0.0, 0.8][i % 2];
        let sampling = Sampling { temperature, top_p: 0.9, presence_penalty: 0.3, ..asked.sampling.clone() };
        Request { sampling, seed: i as u64, log_probabilities: Some(2), stop: vec![5], ..asked }
    };
    (0..n).map(one).collect()
}

fn assert_same(plain: &[Vec<Token>], found: &[Vec<Token>], what: &str) {
    for (i, (plain, found)) in plain.iter().zip(found).enumerate() {
        let tokens = |all: &[Token]| all.iter().map(|t| t.token).collect::<Vec<_>>();
        assert_eq!(tokens(plain), tokens(found), "{what}, request {i}");
        for (a, b) in plain.iter().zip(found) {
            assert!((a.log_probability.unwrap() - b.log_probability.unwrap()).abs() < 1e-4, "{what}, request {i}");
        }
    }
}

/// To be seen to fail: a draft whose keys are not taken back where its guess was wrong is right less often.
#[test]
fn a_draft_that_is_the_base_is_always_right() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let all: Vec<Request> = requests(&[], 24).into_iter().map(|r| Request { stop: vec![], ..r }).collect();
    let settings = |draft_tokens| {
        let policy = Policy { draft_tokens, max_running: 6, ..Default::default() };
        EngineSettings { pool_bytes: 1 << 22, policy, ..Default::default() }
    };
    let (plain, none, steps) = answers(&model, Some(&model), &all, settings(0));
    assert_eq!(none.guessed_tokens, 0);
    let (found, state, fewer) = answers(&model, Some(&model), &all, settings(5));
    assert_same(&plain, &found, "itself");
    assert!(state.accepted_tokens == state.guessed_tokens && state.guessed_tokens > 300, "{state:?}");
    assert!(3 * fewer < 2 * steps, "{fewer} steps and {steps}");
    // Without a draft none is guessed, whatever the policy says.
    assert_eq!(answers(&model, None, &all, settings(5)).1.guessed_tokens, 0);
}

#[test]
fn answers_are_those_without_a_draft() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let adapters =
        [("lora", r#"{"r": 9}"#), ("dora", r#"{"r": 3}"#), ("sparse-gin", r#"{"gin_dim": 6, "gin_scale": "0.4:0.6"}"#)];
    let adapters = adapters.map(|(name, settings)| hosted(&model, name, settings));
    let all = requests(&adapters, 60);
    let (twin, other) = (tiny::model_sized(DType::F32, LoadDtype::Stored, (32, 24)), shaped());
    let drafts: [(&str, &dyn BaseModel); 3] =
        [("itself", &model), ("of other weights", &twin), ("of other shapes", &other)];
    let pages = 2 * adapters.iter().map(|a| a.pages(Geometry::of(model.shape()))).max().unwrap()
        + Geometry::of(model.shape()).pages_with(160, 2);
    for dtype in [KeyDtype::F32, KeyDtype::Int8] {
        let geometry = Geometry::with(model.shape(), dtype);
        let settings = |policy: Policy, pool_bytes| EngineSettings {
            pool_bytes,
            policy,
            kv_cache_dtype: dtype,
            ..Default::default()
        };
        let (plain, ..) = answers(&model, None, &all, settings(Policy::default(), 1 << 24));
        for (what, draft) in drafts {
            // With lookups beside it or not; a pool for everything, and one for some of the requests in steps of few rows.
            for (guesses, tight) in [(0, false), (6, false), (0, true), (3, true)] {
                let draft_geometry = Geometry::with(draft.shape(), dtype);
                let (own, with) =
                    (geometry.page_bytes() * geometry.layers, draft_geometry.page_bytes() * draft_geometry.layers);
                let small = pages * geometry.page_bytes() * (own + with) / own;
                let (rows, pool) = if tight { (5, small) } else { (512, 1 << 24) };
                let policy =
                    Policy { draft_tokens: 4, guesses, batch_tokens: rows, max_running: 7, ..Default::default() };
                let (found, state, _) = answers(&model, Some(draft), &all, settings(policy, pool));
                assert!(state.guessed_tokens > 0 && (!tight || state.adapter_evictions > 0), "{what}: {state:?}");
                match dtype {
                    KeyDtype::F32 => assert_same(&plain, &found, what),
                    // Where a number is half-way between two, other rows beside it may round it to the other.
                    KeyDtype::Int8 => {
                        let tokens = |all: &[Token]| all.iter().map(|t| t.token).collect::<Vec<_>>();
                        let others = plain.iter().zip(&found).filter(|(a, b)| tokens(a) != tokens(b)).count();
                        assert!(others <= 3, "{what}: {others} answers are others");
                    }
                }
            }
        }
    }
}

/// A model of one layer, so many positions and so many tokens.
fn cut(positions: usize, vocabulary: usize) -> Decoder {
    let json = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "vocab_size": vocabulary, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": positions, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let at = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_string(), vec![vocabulary, 8]),
        ("model.norm.weight".to_string(), vec![8]),
        (at("input_layernorm"), vec![8]),
        (at("post_attention_layernorm"), vec![8]),
        (at("self_attn.q_proj"), vec![8, 8]),
        (at("self_attn.k_proj"), vec![4, 8]),
        (at("self_attn.v_proj"), vec![4, 8]),
        (at("self_attn.o_proj"), vec![8, 8]),
        (at("mlp.gate_proj"), vec![12, 8]),
        (at("mlp.up_proj"), vec![12, 8]),
        (at("mlp.down_proj"), vec![8, 12]),
    ];
    let tensors = shapes.map(|(name, shape)| (name, tiny::random(&shape, 0.5, &mut rng).to_dtype(DType::F32).unwrap()));
    let config = DecoderConfig::from_json(&json, Path::new("config.json")).unwrap();
    Decoder::load(config, &Weights::from_memory(tensors.into_iter().collect())).unwrap()
}

/// A draft of a shorter context, and one of fewer tokens: there is no guess where it cannot be asked.
#[test]
fn a_draft_guesses_as_far_as_it_can() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let settings = || {
        let policy = Policy { draft_tokens: 3, ..Default::default() };
        EngineSettings { pool_bytes: 1 << 24, policy, ..Default::default() }
    };
    let long = [request((0..700).map(|i| i * i % 40).collect(), vec![], 40)]
        .map(|r| Request { log_probabilities: Some(0), ..r });
    let (plain, ..) = answers(&model, None, &long, settings());
    for (positions, vocabulary, guesses) in [(2048, 40, true), (720, 40, true), (300, 40, false), (2048, 3, false)] {
        let draft = cut(positions, vocabulary);
        let (found, state, _) = answers(&model, Some(&draft), &long, settings());
        assert_same(&plain, &found, "a small draft");
        assert_eq!(state.guessed_tokens > 0, guesses, "{positions} positions, {vocabulary} tokens: {state:?}");
    }
}

#[test]
fn the_pool_is_shared_by_tokens() {
    let model = tiny::model_as(DType::F32, LoadDtype::Stored);
    let own = Geometry::of(model.shape());
    let draft = Geometry { row: 3 * own.row, layers: own.layers, ..own };
    assert_eq!(shares(4000, own, Some(draft)), [1000, 3000]);
    assert_eq!(shares(4000, own, None), [4000, 0]);
    assert_eq!(shares(usize::MAX, own, Some(own)), [1 << 63, (1 << 63) - 1]);
    // What has no room for one token is refused.
    let settings = EngineSettings { pool_bytes: 6 * own.page_bytes(), ..Default::default() };
    assert!(Engine::new(&model, settings.clone()).is_ok());
    let problem =
        Engine::with_draft(&model, Some(&model), EngineSettings { pool_bytes: 4 * own.page_bytes(), ..settings }).err();
    assert!(problem.unwrap().to_string().contains("pages"));
}
