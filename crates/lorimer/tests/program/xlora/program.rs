//! Served in the batch, and on the command line.

use super::*;

/// log p of a sequence's tokens after the first, by the code that trains.
fn log_probabilities(model: &dyn BaseModel, on: &dyn Adaptation, tokens: &[u32]) -> Vec<f64> {
    let all = logits(model, on, &[tokens.to_vec()]).to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let one = |(row, &token): (&Vec<f64>, &u32)| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row[token as usize] - largest - row.iter().map(|l| (l - largest).exp()).sum::<f64>().ln()
    };
    all.iter().zip(&tokens[1..]).map(one).collect()
}

/// Mixtures, one of their experts and the bare base in one batch, prompts in parts and beginning alike, through a pool that holds not all of
/// them: everyone's tokens have the log-probabilities that they have alone, and no page is lost.
#[test]
fn served_in_the_batch_is_alone() {
    // With 96 rows a step, rows of one adapter are computed in several parts.
    for batch_tokens in [24, 96] {
        served_in_steps_of(batch_tokens);
    }
}

fn served_in_steps_of(batch_tokens: usize) {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let parts = experts(&model, 3);
    let mut adapters: Vec<Adapter> = kinds()
        .iter()
        .map(|settings| {
            let adapter = mixture(&model, &parts, settings);
            tiny::move_all(&adapter);
            adapter
        })
        .collect();
    adapters.push(expert(&model, &parts[0]));
    let hosted: Vec<Arc<Hosted>> = adapters
        .iter()
        .enumerate()
        .map(|(i, a)| Arc::new(Hosted::new(&model, a, format!("sha256:{i}"), None).unwrap()))
        .collect();
    assert!(hosted[0].router.is_some() && hosted[8].router.is_none());
    assert!(hosted.iter().all(|h| h.conversion.exact == h.conversion.modules));
    let geometry = Geometry::of(model.shape());
    let largest = hosted.iter().map(|h| h.pages(geometry)).max().unwrap();
    let policy = Policy { batch_tokens, max_running: 9, ..Default::default() };
    let pool_bytes = (3 * largest + geometry.pages_of_tokens(400)) * geometry.page_bytes();
    let mut engine = Engine::new(&model, EngineSettings { pool_bytes, policy, ..Default::default() }).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(6..40)).collect();
    let mut asked = BTreeMap::new();
    let mut told: BTreeMap<u64, Vec<(u32, Option<f32>)>> = BTreeMap::new();
    let (mut now, mut submitted) = (0.0, 0);
    while submitted < 120 || !engine.is_idle() {
        for _ in 0..if submitted < 120 { rng.random_range(0..4) } else { 0 } {
            submitted += 1;
            let which = rng.random_range(0..=adapters.len());
            let mut prompt = shared[..rng.random_range(0..shared.len())].to_vec();
            prompt.extend((0..rng.random_range(1..30)).map(|_| rng.random_range(6..40u32)));
            let request = Request {
                prompt: prompt.clone(),
                adapters: hosted.get(which).map(|h| (h.clone(), 1.0)).into_iter().collect(),
                max_tokens: Some(rng.random_range(1..12)),
                sampling: Sampling { temperature: 1.0, ..Default::default() },
                seed: submitted,
                stop: vec![],
                log_probabilities: Some(0),
                of_prompt: rng.random_range(0..3) == 0,
                tenant: Tenant { client: "one".into(), user: format!("t{}", which % 3).into() },
                names: vec![],
                form: None,
            };
            let of_prompt = request.of_prompt;
            asked.insert(engine.submit(request, now).unwrap().unwrap(), (which, prompt, of_prompt));
        }
        now += 0.01;
        for event in engine.step(now) {
            match event {
                Event::Prompt(id, tokens, _) => {
                    told.entry(id).or_default().extend(tokens.iter().map(|t| (t.token, t.log_probability)));
                }
                Event::Token(id, token, _) => told.entry(id).or_default().push((token.token, token.log_probability)),
                other => panic!("{other:?}"),
            }
        }
    }
    let state = engine.state();
    assert_eq!(state.free_pages + state.adapter_pages + state.cached_pages, state.pages);
    assert!(state.adapter_evictions > 0 && state.cached_tokens > 0, "{state:?}");
    for (id, (which, prompt, of_prompt)) in &asked {
        let told = &told[id];
        let before: &[u32] = if *of_prompt { &[] } else { prompt };
        let tokens: Vec<u32> = before.iter().copied().chain(told.iter().map(|t| t.0)).collect();
        assert!(tokens.starts_with(prompt));
        let expected = match adapters.get(*which) {
            Some(adapter) => log_probabilities(&model, &Attached::one(adapter), &tokens),
            None => log_probabilities(&model, &Frozen, &tokens),
        };
        let found: Vec<f32> = told.iter().filter_map(|t| t.1).collect();
        for (found, expected) in found.iter().rev().zip(expected.iter().rev()) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "request {id} of {which}: {found} {expected}");
        }
    }
    // Alone and at weight 1 only.
    let mut request = Request {
        prompt: vec![7, 8],
        adapters: vec![(hosted[0].clone(), 0.5)],
        max_tokens: Some(1),
        sampling: Sampling::default(),
        seed: 0,
        stop: vec![],
        log_probabilities: None,
        of_prompt: false,
        tenant: Tenant::default(),
        names: vec![],
        form: None,
    };
    assert!(engine.submit(request.clone(), now).is_err());
    request.adapters = vec![(hosted[0].clone(), 1.0), (hosted[8].clone(), 1.0)];
    assert!(engine.submit(request, now).is_err());
}

/// Two LoRAs and a head on top, on the command line: only the head is written, nothing else changes, and what the program says of it.
#[test]
fn a_mixture_on_the_command_line() {
    let fixture = common::Fixture::new();
    let (a, b, mixed) = (fixture.path("a"), fixture.path("b"), fixture.path("mixed"));
    common::ok(&fixture.train(&a, &["-q", "--max-steps", "6", "--rank", "2"]));
    common::ok(
        &fixture.train(
            &b,
            &["-q", "--max-steps", "6", "--rank", "3", "--seed", "1", "--target-modules", "q_proj,down_proj"],
        ),
    );
    let bytes = || {
        let files = [&a, &b].map(|folder| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap());
        (files, std::fs::read(goldens("tiny-llama").join("model.safetensors")).unwrap())
    };
    let before = bytes();
    let own = ["--method", "xlora", "--adapter", &a, "--adapter", &b, "--set", "layerwise_scalings=true"];
    let head = [&own[..], &["--set", "xlora_depth=2", "--set", "xlora_size=4", "--max-steps", "5"]].concat();
    let said = common::json(&fixture.train(&mixed, &head));
    // (32 + 1)·4 + (4 + 1)·2·14.
    assert_eq!(said["trainable_parameters"], 272);
    assert!(before == bytes(), "the experts or the base changed");
    let config: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&mixed).join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["adapters"], json!({ "0": "../a", "1": "../b" }));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&mixed).join("lorimer.json")).unwrap()).unwrap();
    assert_eq!(manifest["xlora"]["sites"].as_array().unwrap().len(), 14);
    // The same run gives the same bytes, wherever the experts are.
    let moved = fixture.path("moved");
    std::fs::create_dir(&moved).unwrap();
    for name in ["a", "b"] {
        std::fs::create_dir(Path::new(&moved).join(name)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(Path::new(&fixture.path(name)).join(file), Path::new(&moved).join(name).join(file)).unwrap();
        }
    }
    let (a2, b2, again) = (format!("{moved}/a"), format!("{moved}/b"), format!("{moved}/mixed"));
    let head = head
        .iter()
        .map(|&f| {
            if f == a {
                a2.as_str()
            } else if f == b {
                b2.as_str()
            } else {
                f
            }
        })
        .collect::<Vec<_>>();
    common::ok(&fixture.train(&again, &[&head[..], &["-q", "--checkpointing", "on"]].concat()));
    let weights = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(weights(&mixed) == weights(&again));
    let of = |folder: &str| common::json(&["inspect", folder]);
    assert_eq!(of(&mixed)["content_id"], of(&again)["content_id"]);
    assert_eq!(
        (&of(&mixed)["experts"][1]["content_matches"], of(&mixed)["experts"].as_array().unwrap().len()),
        (&json!(true), 2)
    );

    let check = common::json(&["check", &mixed, "--model", &fixture.model]);
    assert!(check["golden_difference"].as_f64().unwrap() < 1e-4 && check["ok"] == true, "{check}");
    let eval = |adapter: &str| {
        common::json(&["eval", "--model", &fixture.model, "--data", &fixture.data, "--adapter", adapter])["loss"]
            .as_f64()
            .unwrap()
    };
    assert!(eval(&mixed) <= eval(&a).max(eval(&b)));
    let generated = common::json(&[
        "generate",
        "--model",
        &fixture.model,
        "--adapter",
        &mixed,
        "--prompt",
        "up 3",
        "--max-tokens",
        "4",
    ]);
    assert!(generated["tokens"].as_u64().unwrap() > 0);
    let plan =
        |more: &[&str]| common::json(&[&["plan", "--model", &fixture.model, "--data", &fixture.data], more].concat());
    let (mixture, lora) = (plan(&own), plan(&["--rank", "5"]));
    assert!(mixture["flops"].as_f64().unwrap() > 1.4 * lora["flops"].as_f64().unwrap());
    assert_eq!(mixture["trainable_parameters"], 33 * 28);

    let error = |arguments: &[&str]| common::error(arguments);
    let out = fixture.path("out");
    let merge = error(&["merge", "--model", &fixture.model, "--adapter", &mixed, "--output", &out]);
    assert!(merge.contains("no fixed weight does, so it cannot be merged"), "{merge}");
    for to in ["lora", "gguf", "kohya"] {
        let convert = error(&["convert", &mixed, "--to", to, "--model", &fixture.model, "--output", &out]);
        assert!(convert.contains("no fixed weight does"), "{convert}");
    }
    assert!(
        error(&["eval", "--model", &fixture.model, "--data", &fixture.data, "--adapter", &format!("{mixed}=0.5")])
            .contains("alone and at weight 1")
    );
    let none = error(&fixture.train(&out, &["--method", "xlora"]));
    assert!(none.contains("at least one with --adapter"), "{none}");
    let several = error(&fixture.train(&out, &["--adapter", &a, "--adapter", &b]));
    assert!(several.contains("`--method xlora` mixes several"), "{several}");
    let other = error(&fixture.train(&out, &["--method", "bone", "--adapter", &a]));
    assert!(other.contains("is an adapter of `lora`; pass --method lora"), "{other}");
    let galore = error(&fixture.train(&out, &[&own[..], &["--optimizer", "galore"]].concat()));
    assert!(galore.contains("belongs to no projection"), "{galore}");
    let nested = error(&fixture.train(&out, &["--method", "xlora", "--adapter", &mixed]));
    assert!(nested.contains("XLORA"), "{nested}");
}

/// A run that is stopped and goes on gives the bytes of one that is not, dropout in the head included.
#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let base = Base::open(&goldens("tiny-llama"), &OpenOptions::default()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let data =
        examples(&[vec![3, 70, 9, 31, 11, 12, 99], vec![3, 70, 8, 200], vec![4, 5, 39, 21, 7], vec![80, 81, 82, 83]]);
    let parts: Vec<Part> = (0..3)
        .map(|i| StoredAdapter::read(&case("experts").join(i.to_string())).unwrap().into_part().unwrap())
        .collect();
    let run = |folder: &str, stop_at: Option<usize>, resume: bool| {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let session = Session {
            base: &base,
            base_name: "tiny",
            train: &data,
            eval: &[],
            settings: TrainSettings { max_steps: Some(6), batch_size: 2, learning_rate: 1e-2, ..Default::default() },
            start: None,
            output: out.path().join(folder),
            save_steps: None,
            save_limit: 1,
            resume,
            overwrite: false,
            data_names: vec![],
            stop: &stop,
        };
        let settings = json!({ "layerwise_scalings": true, "xlora_depth": 3, "xlora_size": 8 });
        let mut method = methods::build("xlora", settings.as_object().unwrap()).unwrap();
        method.take_parts(&parts).unwrap();
        let (outcome, _) = session
            .run(method, |event| {
                if let lorimer::train::Event::Step { record, .. } = event {
                    stop.store(Some(record.step) == stop_at, std::sync::atomic::Ordering::Relaxed);
                }
            })
            .unwrap();
        assert_eq!(outcome.interrupted, stop_at.is_some());
    };
    run("whole", None, false);
    run("parts", Some(3), false);
    run("parts", None, true);
    let bytes = |folder: &str| std::fs::read(out.path().join(folder).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("whole") == bytes("parts"));
}
