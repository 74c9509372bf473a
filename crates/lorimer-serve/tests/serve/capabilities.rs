//! What each method says of itself, held against what it does: a saying that is wrong either way fails.

use candle_core::{DType, Tensor};
use lorimer_adapter::Role;
use lorimer_adapter::methods::Served;
use lorimer_model::{Projection, Site};
use lorimer_serve::adapters::hosted::Hosted;
use lorimer_tensor::FrozenWeight;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::tiny::*;

use crate::prelude::*;

/// Every method with each of its settings, and how far the start may be from the base, moved away from the start or not.
fn each(moved: bool, law: impl Fn(&dyn BaseModel, &str, &Adapter, f64)) {
    let model = model();
    for entry in methods::REGISTRY {
        for (settings, tolerance) in entry.laws {
            let adapter = attach(&model, entry.name, settings);
            if moved {
                move_all(&adapter);
            }
            law(&model, &format!("{} {settings}", entry.name), &adapter, *tolerance);
        }
    }
}

/// Says that its start is elsewhere: the start moves the output. (That the others' does not is law 1.)
#[test]
fn a_start_elsewhere_is_elsewhere() {
    each(false, |model, what, adapter, tolerance| {
        if tolerance.is_infinite() {
            let apart = distance(&logits(model, &Attached::one(adapter)), &logits(model, &Frozen));
            assert!(apart > 1e-6 && adapter.has_effect(model).unwrap(), "{what}: {apart:e}");
        }
    });
}

/// Says that its changes add up: beside another adapter, each gives the change that it gives alone. Says that they do not: it is refused beside
/// others and at other weights, and its change of another weight is indeed another.
#[test]
fn what_adds_up_adds_up_and_what_does_not_does_not() {
    each(true, |model, what, adapter, _| {
        if !adapter.parameters().is_empty() {
            // Whole parameters are used at weight 1, whatever the method.
            assert!(Attached::weighted(vec![(adapter, 0.5)]).is_err(), "{what}");
            return;
        }
        let other = attach(model, "lora", r#"{"r": 2}"#);
        move_all(&other);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let both = Attached::weighted(vec![(adapter, 0.5), (&other, -2.0)]);
        if let Some(why) = adapter.method.not_additive() {
            assert!(both.err().expect(what).to_string().contains(why), "{what}");
            if adapter.blocks().next().is_some() {
                // A layer on a block is a change of no weight.
                return;
            }
            let differs = adapter.sites(model).into_iter().any(|(site, base, delta)| {
                let x = random(&[3, site.inputs], 1.0, &mut rng);
                let dense = base.dense(DType::F64).unwrap();
                let weight = (&dense + random(&[site.outputs, site.inputs], 1.0, &mut rng)).unwrap();
                let moved = Projection { weight: FrozenWeight::Dense(weight), bias: base.bias.clone() };
                let change = |base: &Projection| {
                    let y = x.matmul(&base.dense(DType::F64).unwrap().t().unwrap()).unwrap();
                    delta.forward(base, &x, &y, &Step::default()).unwrap()
                };
                distance(&change(base), &change(&moved)) > 1e-3
            });
            assert!(differs, "{what}: its change does not depend on the weight");
            return;
        }
        let both = both.unwrap();
        for (site, base, _) in adapter.sites(model) {
            let x = random(&[3, site.inputs], 1.0, &mut rng);
            let y = Frozen.project(site, base, &x).unwrap();
            let change = |a: &Adapter| (Attached::one(a).project(site, base, &x).unwrap() - &y).unwrap();
            let expected =
                ((&y + (change(adapter) * 0.5).unwrap()).unwrap() - (change(&other) * 2.0).unwrap()).unwrap();
            let apart = distance(&both.project(site, base, &x).unwrap(), &expected);
            assert!(apart < 1e-10, "{what}: {}: {apart:e}", site.path);
        }
    });
}

/// Says, of training, that a row's output depends on that row alone: the last row has the output that it has alone. Says that it does not: it has
/// another, or the rows are counted for a buffer or for the balance of routes.
#[test]
fn rows_are_as_independent_as_is_said() {
    each(true, |model, what, adapter, _| {
        let attached = Attached::one(adapter).at(Step::training(7));
        let rows = examples();
        let last = rows.len() - 1;
        let of = |rows: &[Example]| {
            let batch = Batch::pack(rows.iter().map(|e| e.tokens.as_slice()));
            model.hidden(&batch, &attached).unwrap()
        };
        let (together, alone) = (of(&rows), of(&rows[last..]));
        let (all, own) = (together.dim(0).unwrap(), alone.dim(0).unwrap());
        let apart = distance(&together.narrow(0, all - own, own).unwrap(), &alone);
        let counted = adapter.named().iter().any(|p| p.role == Role::Buffer) || attached.routes_units();
        let said = adapter.method.rows_are_independent();
        assert_eq!(said, attached.rows_are_independent(), "{what}: the method and its changes do not say the same");
        match said {
            true => assert!(apart < 1e-10, "{what}: {apart:e}"),
            false => assert!(apart > 1e-3 || counted, "{what}: rows do not depend on each other"),
        }
    });
}

/// Says how it is served: in the batch, exactly; or converted, to whole matrices or with an error that is told; or not at all.
#[test]
fn served_as_is_said() {
    each(true, |model, what, adapter, _| {
        let served = methods::entry(what.split(' ').next().unwrap()).unwrap().served;
        let hosted = Hosted::new(model, adapter, "id".into(), Some(2));
        if adapter.parameters().keys().any(|path| !path.ends_with(".bias")) {
            // Whole parameters are one in a batch, whatever the method.
            assert!(hosted.is_err(), "{what}");
            return;
        }
        match (served, hosted) {
            (Served::Batched, Ok(hosted)) => {
                // The saying is of a method's first form; bone's `bat` is another, which is converted.
                let exact = hosted.conversion.exact == hosted.conversion.modules;
                assert_eq!(exact, !what.contains("\"bat\""), "{what}");
            }
            (Served::Converted, Ok(hosted)) => {
                let full =
                    |(site, _, _): &(&Site, _, _)| hosted.places[&site.path].rank == site.inputs.min(site.outputs);
                let whole = adapter.sites(model).iter().all(full);
                assert!(hosted.conversion.error > 0.0 || whole, "{what}");
            }
            (Served::Refused, Err(_)) => {}
            (served, hosted) => panic!("{what} says {served:?}: {:?}", hosted.err()),
        }
    });
}

/// Parameters have keys of their own; those that gradients move get one, buffers do not, and all are checkpointed under one name each.
#[test]
fn parameters_are_what_their_roles_say() {
    each(true, |model, what, adapter, _| {
        let named = adapter.named();
        let names: std::collections::BTreeSet<&str> = named.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names.len(), named.len(), "{what}");
        let (x, mut rng) = (logits(model, &Attached::one(adapter)), ChaCha8Rng::seed_from_u64(6));
        let seed = random(x.dims(), 1.0, &mut rng);
        let gradients = (x * seed).unwrap().sum_all().unwrap().backward().unwrap();
        // The loss gives a router that only chooses nothing, nor an expert that no row goes to.
        let chooses = Attached::one(adapter).routes_units();
        for p in named.iter().filter(|p| !(chooses && (p.role == Role::Router || p.name.contains(".experts.")))) {
            let moved = gradients
                .get(p.var.as_tensor())
                .is_some_and(|g: &Tensor| g.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap() > 0.0);
            assert_eq!(moved, p.role.is_trained(), "{what}: {} is {:?}", p.name, p.role);
        }
    });
}
