//! What is merged, exported or added up computes what the adapters compute.

use crate::*;

#[test]
fn laws_2_3_and_6_merged_equals_unmerged_and_the_base_never_changes() {
    each(|model, name, settings, _| {
        let before = base_bytes(model);
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        let attached = Attached::one(&adapter);
        let stored = adapter.to_stored("tiny").unwrap();
        let (of_file, account) = account_of(&stored).unwrap();
        // The file alone says the same of every tensor as the adapter that wrote it.
        assert!(account.unknown.is_empty(), "{name}: {:?}", account.unknown);
        let written = adapter.deltas().filter(|(_, delta)| !delta.stored().unwrap().is_empty()).map(|(path, _)| path);
        assert_eq!(
            account.modules.keys().map(String::as_str).collect::<Vec<_>>(),
            written.collect::<Vec<_>>(),
            "{name}"
        );
        let whole = account.parameters.iter().map(|p| &p.path).collect::<BTreeSet<_>>();
        assert_eq!(whole, adapter.parameters().keys().collect(), "{name}");
        let files = account.modules;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (site, base) in model.projections() {
            let Some(delta) = adapter.delta(&site.path) else { continue };
            let x = random(&[5, site.inputs], 1.0, &mut rng);
            let bias = adapter.parameters().get(&site.bias_path()).map(|v| v.as_tensor()).or(base.bias.as_ref());
            let Ok(merged) = delta.merged(base).unwrap() else {
                assert!(!methods::entry(name).unwrap().mergeable, "{name} says that it can be merged");
                continue;
            };
            let mut y = x.matmul(&merged.t().unwrap()).unwrap();
            if let Some(bias) = bias {
                y = y.broadcast_add(bias).unwrap();
            }
            if let Some(change) = delta.bias_change(base).unwrap() {
                y = y.broadcast_add(&change).unwrap();
            }
            assert!(distance(&attached.project(site, base, &x).unwrap(), &y) < 1e-10, "{}", site.path);
            // Taking the change away gives the base: the change as the file holds it, where its factors need no base (fails where
            // `low_rank` or `merged` scales otherwise than the other), else as the forward adds it to the frozen output.
            let dense = base.dense(DType::F64).unwrap();
            let tensors = files.get(&site.path).cloned().unwrap_or_default();
            let change = match of_file
                .low_rank(&site.path, &tensors)
                .unwrap()
                .filter(|_| !matches!(delta.change(base, 0, &Step::default()).unwrap(), Change::RowScaled(..)))
            {
                Some(low) => (low.b.matmul(&low.a).unwrap() * low.scaling).unwrap(),
                None => {
                    let (one, y) = (Tensor::eye(site.inputs, DType::F64, &Device::Cpu).unwrap(), dense.t().unwrap());
                    delta.forward(base, &one, &y.contiguous().unwrap(), &Step::default()).unwrap().t().unwrap()
                }
            };
            assert!(distance(&(merged - change).unwrap(), &dense) < 1e-10, "{}", site.path);
            assert!(delta.has_effect(base).unwrap());
        }
        let rows = examples();
        let (loss, _, _) = batch_loss(model, &attached, &rows.iter().collect::<Vec<_>>()).unwrap();
        loss.backward().unwrap();
        assert_eq!(before, base_bytes(model));
    });
}

/// What says that it cannot be merged differs from every fixed weight: its change is no linear function of its input. It is not merged, and not
/// exported as a LoRA.
#[test]
fn what_cannot_be_merged_is_no_fixed_weight() {
    let mut checked = 0;
    each(|model, name, settings, _| {
        if methods::entry(name).unwrap().mergeable {
            return;
        }
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        assert!(to_lora(model, &adapter, None, "tiny").is_err(), "{name} {settings}");
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (site, base, delta) in adapter.sites(model) {
            // In a routed unit the change is that of a route; beside it are plain LoRAs.
            if Attached::one(&adapter).routes_units() {
                assert_eq!(delta.merged(base).unwrap().is_err(), !delta.experts().is_empty());
                assert!(delta.has_effect(base).unwrap());
                continue;
            }
            assert!(delta.merged(base).unwrap().is_err() && delta.has_effect(base).unwrap());
            let change = |x: &Tensor| {
                let y = x.matmul(&base.dense(DType::F64).unwrap().t().unwrap()).unwrap();
                delta.forward(base, x, &y, &Step::default()).unwrap()
            };
            let [a, b] = [0; 2].map(|_| random(&[40, site.inputs], 1.0, &mut rng));
            let both = (change(&a) + change(&b)).unwrap();
            let size = distance(&both, &both.zeros_like().unwrap());
            assert!(distance(&change(&(a + b).unwrap()), &both) > 1e-3 * size, "{name} {settings}: {}", site.path);
        }
    });
    for entry in methods::REGISTRY.iter().filter(|e| !e.mergeable) {
        checked += entry.laws.len();
    }
    assert!(checked >= 4);
}

/// The LoRA that an export writes gives the adapter's output: exactly where it says so, and at full rank always.
#[test]
fn law_11_exported_equals_unexported() {
    each(|model, name, settings, _| {
        let adapter = attach(model, name, settings);
        move_all(&adapter);
        if !methods::entry(name).unwrap().mergeable {
            return;
        }
        let expected = logits(model, &Attached::one(&adapter));
        let (_, told) = to_lora(model, &adapter, None, "tiny").unwrap();
        for rank in [None, Some(64)] {
            if rank.is_none() && told.exact < told.modules {
                continue;
            }
            let (stored, told) = to_lora(model, &adapter, rank, "tiny").unwrap();
            assert!(told.error < 1e-9, "{name} {settings}: {}", told.error);
            let again = Adapter::load_whole(model, &stored).unwrap();
            let d = distance(&logits(model, &Attached::one(&again)), &expected);
            assert!(d < 1e-8, "{name} {settings}, rank {rank:?}: {d:e}");
        }
    });
}

#[test]
fn weighted_adapters_add_up() {
    let model = model();
    let (a, b) = (attach(&model, "lora", r#"{"r": 3}"#), attach(&model, "dora", r#"{"r": 2}"#));
    move_all(&a);
    move_all(&b);
    let both = Attached::weighted(vec![(&a, 0.5), (&b, -2.0)]).unwrap();
    let (site, base) = model.projections()[0];
    let x = random(&[3, site.inputs], 1.0, &mut rand_chacha::ChaCha8Rng::seed_from_u64(4));
    let y = base.forward(&x).unwrap();
    let change = |adapter: &Adapter| (Attached::one(adapter).project(site, base, &x).unwrap() - &y).unwrap();
    let expected = ((&y + (change(&a) * 0.5).unwrap()).unwrap() - (change(&b) * 2.0).unwrap()).unwrap();
    assert!(distance(&both.project(site, base, &x).unwrap(), &expected) < 1e-12);
}
