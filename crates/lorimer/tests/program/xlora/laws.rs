//! What a mixture obeys: weights, gradients, caches, frozen layers.

use super::*;

/// What a mixture is where its weights are known.
#[test]
fn known_weights_give_known_models() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let (rows, settings) = (rows(), json!({ "layerwise_scalings": true }));
    // One expert and the softmax: that adapter.
    for n in 0..3 {
        let one = mixture(&model, &parts[n..n + 1], &json!({ "init": "peft" }));
        let alone = expert(&model, &parts[n]);
        let d = distance(&logits(&model, &Attached::one(&one), &rows), &logits(&model, &Attached::one(&alone), &rows));
        assert!(d < 1e-10, "expert {n} alone: {d:e}");
    }
    let all: Vec<Adapter> = parts.iter().map(|part| expert(&model, part)).collect();
    // A last layer of zeros: 1/n each, whatever the depth.
    for settings in [settings.clone(), json!({ "xlora_depth": 3, "xlora_size": 5 })] {
        let uniform = mixture(&model, &parts, &settings);
        let fixed = Attached::weighted(all.iter().map(|a| (a, 1.0 / 3.0)).collect()).unwrap();
        let d = distance(&logits(&model, &Attached::one(&uniform), &rows), &logits(&model, &fixed, &rows));
        assert!(d < 1e-10, "the uniform mixture: {d:e}");
        assert!(distance(&logits(&model, &fixed, &rows), &logits(&model, &Frozen, &rows)) > 0.1);
    }
    // A bias of 50 on one expert: that adapter.
    for (j, alone) in all.iter().enumerate() {
        let mixed = mixture(&model, &parts, &settings);
        let trainable = mixed.trainable();
        let (_, bias) = trainable.iter().find(|(name, _)| name.ends_with("bias")).unwrap();
        let numbers: Vec<f64> = (0..bias.elem_count()).map(|i| if i % 3 == j { 50.0 } else { 0.0 }).collect();
        bias.set(&Tensor::new(numbers, &Device::Cpu).unwrap()).unwrap();
        let d = distance(&logits(&model, &Attached::one(&mixed), &rows), &logits(&model, &Attached::one(alone), &rows));
        assert!(d < 1e-9, "a bias on expert {j}: {d:e}");
    }
}

#[test]
fn weights_sum_to_one_and_at_most_k_count() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let packed = batch(&rows());
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let sums = |t: &Tensor| t.sum(2).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let counts = |t: &Tensor| sums(&t.ne(0.0).unwrap().to_dtype(DType::F64).unwrap());
        let (scalings, gates) = (scalings(&model, &adapter, &packed), gates(&model, &adapter, &packed));
        if settings.get("enable_softmax") != Some(&json!(false)) {
            assert!(sums(&scalings).iter().all(|s| (s - 1.0).abs() < 1e-12), "{settings}");
            assert!(sums(&gates).iter().all(|&s| s <= 1.0 + 1e-12), "{settings}");
        }
        let k = settings.get("top_k_lora").and_then(Value::as_f64).unwrap_or(3.0);
        assert!(counts(&gates).iter().all(|&count| count == k), "{settings}");
        if settings.get("enable_softmax_topk").is_some() {
            assert!(sums(&gates).iter().all(|s| (s - 1.0).abs() < 1e-12), "{settings}");
        }
    }
}

/// The head's gradients against differences, the recorded forms against candle's graph, and the number of parameters.
#[test]
fn gradients_of_the_head_are_right_in_every_form() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let data = tiny::examples();
    let refs: Vec<&Example> = data.iter().collect();
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let (sites, config) = (adapter.mixture().unwrap().sites.len(), adapter.method.config());
        let depth = config["xlora_depth"].as_u64().unwrap() as usize;
        let m = 3 * if config["layerwise_scalings"] == json!(true) { sites } else { 1 };
        let (h, z) = (16, 7);
        let formula = if depth == 1 { (h + 1) * m } else { (h + 1) * z + (depth - 2) * (z + 1) * z + (z + 1) * m };
        assert_eq!(adapter.parameter_count(), formula, "{settings}");
        assert_eq!(adapter.method.router_parameters(h, sites), Some(formula));
        let loss = || {
            let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter), &refs).unwrap();
            (sum / count as f64).unwrap()
        };
        // With dropout, which goes by the element, in training.
        let step = Step::training(3);
        let (sum, count, _) = batch_loss(&model, &Attached::one(&adapter).at(step), &refs).unwrap();
        let graph = (sum / count as f64).unwrap().backward().unwrap();
        for checkpointing in [false, true] {
            let options = StepOptions { checkpointing, ..Default::default() };
            let mut sums = Gradients::default();
            let (parameters, on, scale) = (adapter.trainable(), Attached::one(&adapter).at(step), 1.0 / count as f64);
            accumulate_gradients(&model, &on, &parameters, &refs, scale, options, None, &mut sums).unwrap();
            for (name, var) in &parameters {
                let found = sums.get(var.as_tensor()).unwrap_or_else(|| panic!("no gradient of {name}"));
                let d = distance(found, graph.get(var.as_tensor()).unwrap());
                assert!(d < 1e-12, "{settings}: {name} in training differs by {d:e}");
            }
        }
        let graph = loss().backward().unwrap();
        for (share_prefixes, checkpointing) in [(true, false), (false, true)] {
            let options = StepOptions { share_prefixes, checkpointing, ..Default::default() };
            let (_, found) = trained(&model, &adapter, &data, options);
            for ((name, var), found) in adapter.trainable().iter().zip(&found) {
                let d = distance(found, graph.get(var.as_tensor()).unwrap());
                assert!(d < 1e-12, "{settings}: {name} differs by {d:e}");
            }
        }
        let number = |t: Tensor| t.to_scalar::<f64>().unwrap();
        for (name, var) in adapter.trainable() {
            let own: &Var = var;
            let (dims, before) = (own.dims().to_vec(), own.as_tensor().copy().unwrap());
            let flat = before.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let gradient = graph.get(own.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for i in [0, flat.len() / 2, flat.len() - 1] {
                let at = |by: f64| {
                    let mut moved = flat.clone();
                    moved[i] += by;
                    own.set(&Tensor::from_vec(moved, dims.as_slice(), &Device::Cpu).unwrap()).unwrap();
                    number(loss())
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (difference - gradient[i]).abs() < 1e-8,
                    "{settings}: {name} {i}: {difference} {}",
                    gradient[i]
                );
            }
            own.set(&before).unwrap();
        }
    }
}

/// A cache for each pass gives what computing everything again gives.
#[test]
fn two_caches_are_exact() {
    let model = tiny::model();
    let parts = experts(&model, 3);
    let tokens = [1u32, 7, 9, 3, 11, 12, 30, 8, 2];
    for settings in kinds() {
        let adapter = mixture(&model, &parts, &settings);
        tiny::move_all(&adapter);
        let attached = Attached::one(&adapter);
        let whole = logits(&model, &attached, &[tokens.to_vec()]);
        for cuts in [vec![4, 5, 6, 7, 8, 9], vec![1, 3, 9]] {
            let (mut cache, mut from) = (KvCache::default(), 0);
            let mut found = Vec::new();
            for to in cuts {
                let hidden = model.hidden_cached(&tokens[from..to], &mut cache, &attached).unwrap();
                found.push(model.logits(&hidden, &attached).unwrap());
                from = to;
            }
            assert_eq!(cache.len(), tokens.len());
            let d = distance(&Tensor::cat(&found, 0).unwrap(), &whole);
            assert!(d < 1e-12, "{settings}: {d:e}");
        }
        // Alone and packed with others, whatever begins alike.
        let rows = [tokens.to_vec(), vec![1, 7, 9, 4], vec![5]];
        let shared = Batch::share(rows.iter().map(Vec::as_slice));
        let hidden = model.hidden(&shared, &attached).unwrap();
        let index = Tensor::new(shared.rows[0].as_slice(), &Device::Cpu).unwrap();
        let own = model.logits(&hidden.index_select(&index, 0).unwrap(), &attached).unwrap();
        assert!(distance(&own, &whole) < 1e-12, "{settings}");
    }
}

/// Where only upper layers have experts, what the lower ones give may be kept.
#[test]
fn frozen_lower_layers_are_the_same_in_both_passes() {
    let model = tiny::model_as(DType::F32, LoadDtype::F32);
    let upper = tiny::attach(&model, "lora", r#"{"r": 2, "layers_to_transform": [1]}"#);
    tiny::move_all(&upper);
    let part = upper.to_stored("tiny").unwrap().into_part().unwrap();
    let settings =
        json!({ "init": "peft", "layerwise_scalings": true, "scaling_pass_value": 0.5, "enable_softmax": false });
    let adapter = mixture(&model, &[part.clone(), part], &settings);
    let (data, folder) = (tiny::examples(), tempfile::tempdir().unwrap());
    let attached = Attached::one(&adapter);
    let cache = FrozenCache::Memory;
    let lower = FrozenLower::build(&model, &attached, &data, 2, cache, folder.path(), |_| ()).unwrap().unwrap();
    assert_eq!(lower.layers(), 1);
    let (refs, parameters): (Vec<&Example>, _) = (data.iter().collect(), adapter.trainable());
    let of = |lower: Option<&FrozenLower>| {
        let (mut sums, places) = (Gradients::default(), [0, 1, 2]);
        let lower = lower.map(|lower| (lower, places.as_slice()));
        let options = StepOptions::default();
        accumulate_gradients(&model, &attached, &parameters, &refs, 1.0, options, lower, &mut sums).unwrap();
        sums.remove(parameters[0].1.as_tensor()).unwrap()
    };
    assert!(distance(&of(None), &of(Some(&lower))) < 1e-6);
}

/// Outside of a pass there are no routes, and a projection that would go without them is an error.
#[test]
fn no_projection_goes_without_routes() {
    let model = tiny::model();
    let adapter = mixture(&model, &experts(&model, 2), &kinds()[0]);
    let (site, base, _) = adapter.sites(&model)[0];
    let x = tiny::random(&[3, site.inputs], 1.0, &mut rand_chacha::ChaCha8Rng::seed_from_u64(1));
    let error = Attached::one(&adapter).project(site, base, &x).unwrap_err().to_string();
    assert!(error.contains("takes two passes"), "{error}");
}
