//! SoRA's updates, thresholds and lots.

use candle_core::Device;

use super::*;
use crate::training::callback::open_gates;

fn thresholds(settings: SoftThreshold, total: usize, count: usize) -> Gates {
    Gates { settings, total, peak: 2e-3, lot: (0..count).rev().collect() }
}

fn settings(stages: Vec<f64>) -> SoftThreshold {
    SoftThreshold {
        stages,
        of_rate: false,
        lr_scaled: false,
        update: Update::Soft,
        gate_lr: None,
        penalty: 0.0,
        random_keep: None,
    }
}

#[test]
fn updates_are_exact() {
    let g = [-2.0, -0.75, -0.5, -0.1, 0.0, 0.3, 0.5, 0.75, 1.0, 3.0];
    let soft = g.map(|g| Update::Soft.of(g, 0.5));
    assert_eq!(soft, [-1.5, -0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 2.5]);
    // What is at ξ stays, and all else below 2ξ is closed.
    let masked = g.map(|g| Update::Masked.of(g, 0.5));
    assert_eq!(masked, [-1.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 2.5]);
    assert_eq!(g.map(|g| Update::Masked.of(g, 0.0)), g);
}

#[test]
fn the_threshold_is_the_stages_or_a_share_of_the_gates_rate() {
    let of = |settings, rate| thresholds(settings, 4, 1).threshold(3, rate);
    assert_eq!(of(settings(vec![1e-4, 7e-4]), 0.25), 7e-4);
    assert_eq!(of(SoftThreshold { lr_scaled: true, ..settings(vec![4e-4]) }, 0.25), 1e-4);
    let relative = SoftThreshold { of_rate: true, ..settings(vec![0.375]) };
    assert_eq!(of(relative.clone(), 0.25), 0.375 * 2e-3);
    let own = SoftThreshold { gate_lr: Some(2e-2), ..relative };
    assert_eq!(of(own.clone(), 0.25), 0.375 * 2e-2);
    assert_eq!((thresholds(own.clone(), 4, 1).rate(Role::Gate), thresholds(own, 4, 1).rate(Role::A)), (10.0, 1.0));
}

#[test]
fn a_lot_closes_gates_step_by_step() {
    let first = Var::new(&[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6], &Device::Cpu).unwrap();
    let second = Var::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap();
    let of = |name: &str, var, role| Named { name: name.into(), var, role };
    let parameters =
        [of("a.gate", &first, Role::Gate), of("a.lora_A", &second, Role::A), of("b.gate", &second, Role::Gate)];
    let callback = thresholds(SoftThreshold { random_keep: Some(0.6), ..settings(vec![9.0]) }, 8, 10);
    let mut open = Vec::new();
    for step in 0..8 {
        callback.after(step, 1.0, &parameters).unwrap();
        open.push(open_gates(&parameters).unwrap().unwrap().0);
    }
    assert_eq!(open, [9, 9, 8, 8, 7, 7, 6, 6]);
    assert_eq!(second.to_vec1::<f32>().unwrap(), [0.0; 4]);
    let kind = SoftThreshold { random_keep: Some(0.5), ..settings(vec![0.0]) };
    let drawn = |seed| {
        let gate = Var::ones(100, DType::F32, &Device::Cpu).unwrap();
        let parameters = [Named { name: "a.gate".into(), var: &gate, role: Role::Gate }];
        kind.build(RunShape { seed, steps: 1, peak: 1e-3 }, &parameters).after(0, 1.0, &parameters).unwrap();
        gate.to_vec1::<f32>().unwrap()
    };
    assert_eq!(drawn(1).iter().sum::<f32>(), 50.0);
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

#[test]
fn stages_rise_in_equal_parts() {
    let own = thresholds(settings(vec![0.1]), 9, 0);
    assert!(!own.decays(Role::Gate) && own.decays(Role::A) && own.decays(Role::B));
    let gates = thresholds(settings(vec![0.1, 0.2, 0.3]), 9, 0);
    assert_eq!((0..9).map(|s| gates.stage(s)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
    let ends: Vec<_> = (0..9).map(|s| gates.stage_ended(s)).collect();
    assert_eq!(ends.iter().flatten().collect::<Vec<_>>(), [&1, &2, &3]);
    assert_eq!((ends[2], ends[8]), (Some(1), Some(3)));
}
