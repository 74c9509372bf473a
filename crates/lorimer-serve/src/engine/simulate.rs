//! The scheduler in simulated time: what a machine of given speed would do with a workload, in seconds for hours of it.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::engine::batching::{Asked, Batching};
use crate::engine::pool::{Geometry, Pages};
use crate::engine::scheduler::Policy;
use crate::engine::workload::{Arrival, Workload};

/// How long a step takes on a machine, in seconds: `step + row · rows + adapter · adapters + load · pages of adapters loaded`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What every step takes.
    pub step: f64,
    /// What each token row adds.
    pub row: f64,
    /// What each adapter in the batch adds.
    pub adapter: f64,
    /// What each page of an adapter that is copied into the pool adds.
    pub load: f64,
    /// Bytes of the pool.
    pub pool_bytes: usize,
}

/// What came of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Requests that came.
    pub requests: usize,
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that were refused.
    pub refused: usize,
    /// Answered requests a second.
    pub requests_per_second: f64,
    /// Tokens of answers a second.
    pub tokens_per_second: f64,
    /// Mean seconds from arrival to the last token.
    pub latency: f64,
    /// Mean seconds from arrival to the first token.
    pub first_token: f64,
    /// Share of all requests whose first token came within the objective.
    pub attainment: f64,
    /// Mean reward of all requests: 1 within the objective, falling to 0 at twice that, 0 if refused.
    pub satisfaction: f64,
    /// Adapters copied into the pool.
    pub loads: u64,
    /// Requests that were preempted because the pool was full after all.
    #[serde(rename = "put_back")]
    pub preempted: u64,
    /// Largest share of the pool that requests and their adapters took.
    pub fullest: f64,
    /// Simulated seconds.
    pub seconds: f64,
}

/// Seconds to the first token that S-LoRA's evaluation asks for.
pub const OBJECTIVE: f64 = 6.0;

/// One request under way.
struct InFlight {
    adapter: Arc<str>,
    arrived: f64,
    generated: usize,
    output: usize,
    first: Option<f64>,
}

impl Outcome {
    fn first_token_after(&mut self, waited: f64) {
        self.first_token += waited;
        self.attainment += f64::from(u8::from(waited <= OBJECTIVE));
        self.satisfaction += (2.0 - waited / OBJECTIVE).clamp(0.0, 1.0);
    }

    /// From sums to means and rates.
    fn finish(&mut self, seconds: f64, tokens: usize) {
        let (answered, all) = (self.answered.max(1) as f64, self.requests.max(1) as f64);
        self.latency /= answered;
        self.first_token /= answered;
        self.attainment /= all;
        self.satisfaction /= all;
        self.seconds = seconds;
        self.requests_per_second = self.answered as f64 / seconds.max(1e-9);
        self.tokens_per_second = tokens as f64 / seconds.max(1e-9);
    }
}

/// A simulation under way.
struct Simulation {
    batching: Batching,
    in_flight: HashMap<u64, InFlight>,
    outcome: Outcome,
    /// Simulated seconds.
    now: f64,
    /// Tokens of answers.
    tokens: usize,
}

impl Simulation {
    fn submit(&mut self, id: u64, arrival: &Arrival, adapter: &Arc<str>, adapter_pages: usize) {
        let asked = Asked {
            prompt: vec![0; arrival.input],
            max_tokens: arrival.output,
            adapters: vec![(adapter.clone(), adapter_pages)],
            content: adapter.to_string(),
            ..Default::default()
        };
        match self.batching.submit(id, asked, arrival.at) {
            Ok(()) => {
                let (adapter, arrived, output) = (adapter.clone(), arrival.at, arrival.output);
                self.in_flight.insert(id, InFlight { adapter, arrived, generated: 0, output, first: None });
            }
            Err(_) => self.outcome.refused += 1,
        }
    }

    /// A step of the scheduler, which takes the machine its time. False: nothing ran, and no time has passed.
    fn step(&mut self, machine: &Machine) -> Result<bool, String> {
        let step = self.batching.step(self.now);
        for (id, _) in &step.refused {
            self.in_flight.remove(id);
            self.outcome.refused += 1;
        }
        if !step.failed.is_empty() {
            return Err("a request that was let in does not fit".into());
        }
        let pages = self.batching.pages();
        let taken = pages.count() - pages.free();
        self.outcome.fullest = self.outcome.fullest.max(taken as f64 / (pages.count() as f64).max(1.0));
        let rows: usize = step.work.iter().map(|(_, n)| n).sum();
        if rows == 0 {
            return Ok(false);
        }
        // Those with the same adapter are next to each other.
        let running = step.work.iter().filter_map(|(id, _)| Some(&self.in_flight.get(id)?.adapter));
        let mut adapters: Vec<_> = running.collect();
        adapters.dedup();
        let copied: usize = step.loads.iter().map(|(_, pages)| pages.len()).sum();
        let distinct = adapters.len() as f64;
        self.now +=
            machine.step + machine.row * rows as f64 + machine.adapter * distinct + machine.load * copied as f64;
        for (id, n) in step.work {
            self.advance(id, n);
        }
        Ok(true)
    }

    /// A request has got so many rows further: with the last of its prompt's, or with one of its answer's, comes a token.
    fn advance(&mut self, id: u64, rows: usize) {
        self.batching.advance(id, rows);
        let Some(request) = self.in_flight.get_mut(&id) else { return };
        if self.batching.sequence(id).is_none_or(|s| s.computed < s.tokens.len()) {
            return;
        }
        request.generated += 1;
        self.tokens += 1;
        self.batching.push(id, 0);
        if request.first.is_none() {
            request.first = Some(self.now);
            self.outcome.first_token_after(self.now - request.arrived);
        }
        if request.generated >= request.output {
            self.outcome.answered += 1;
            self.outcome.latency += self.now - request.arrived;
            self.batching.remove(id);
            self.in_flight.remove(&id);
        }
    }
}

/// Runs the scheduler over a workload. `numbers` tells how many numbers an adapter of a rank has.
pub fn simulate(
    workload: &Workload,
    machine: &Machine,
    policy: Policy,
    geometry: Geometry,
    numbers: impl Fn(usize) -> usize,
) -> Result<Outcome, String> {
    let arrivals = workload.arrivals()?;
    let pages = machine.pool_bytes / geometry.page_bytes().max(1);
    let pages = u32::try_from(pages).map_err(|_| format!("a pool of {pages} pages is too large"))?;
    let mut simulation = Simulation {
        batching: Batching::new(policy, geometry, Pages::new(pages), false),
        in_flight: HashMap::new(),
        outcome: Outcome { requests: arrivals.len(), ..Default::default() },
        now: 0.0,
        tokens: 0,
    };
    let names: Vec<Arc<str>> = (0..workload.adapters).map(|i| i.to_string().into()).collect();
    let mut next = 0;
    while next < arrivals.len() || !simulation.in_flight.is_empty() {
        if simulation.in_flight.is_empty() && next < arrivals.len() {
            simulation.now = f64::max(simulation.now, arrivals[next].at);
        }
        while let Some(a) = arrivals.get(next).filter(|a| a.at <= simulation.now) {
            let pages = geometry.pages_of_numbers(numbers(workload.rank(a.adapter)));
            simulation.submit(next as u64, a, &names[a.adapter], pages);
            next += 1;
        }
        if !simulation.step(machine)? {
            // Nothing runs: the next arrival, or a waiting request that is refused with time.
            let now = simulation.now;
            let arrival = arrivals.get(next).map_or(now + 1.0, |a| a.at);
            simulation.now = f64::max(arrival.min(now + 1.0), now + 1e-3);
        }
    }
    let Simulation { batching, mut outcome, now, tokens, .. } = simulation;
    outcome.finish(now, tokens);
    outcome.loads = batching.adapters().figures().loads;
    outcome.preempted = batching.counted().preempted;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use lorimer_tensor::KeyDtype;

    use super::*;

    /// SmolLM2-135M: keys of 3 · 64 numbers in 30 layers; an adapter on q, k, v and o has 3840 numbers a rank and layer.
    const GEOMETRY: Geometry = Geometry { row: 192, layers: 30, dtype: KeyDtype::F32 };

    fn numbers(rank: usize) -> usize {
        rank * 3840 * 30
    }

    fn machine() -> Machine {
        Machine { step: 0.025, row: 0.0012, adapter: 2e-4, load: 1e-5, pool_bytes: 2 << 30 }
    }

    fn run(workload: &Workload, machine: &Machine, policy: Policy) -> Outcome {
        simulate(workload, machine, policy, GEOMETRY, numbers).unwrap()
    }

    /// Three times as many requests come as can be served, so that what is compared is what the machine gives. To be seen to fail: a bound on
    /// adapters, as slots are one, which the last assertion has.
    #[test]
    fn throughput_hardly_depends_on_the_number_of_adapters() {
        let at = |adapters: usize, policy: Policy| {
            let workload = Workload { adapters, rate: 8.0, duration: 60.0, output: (8, 128), ..Default::default() };
            let outcome = run(&workload, &machine(), policy);
            assert_eq!(outcome.answered, outcome.requests);
            assert!(outcome.requests_per_second < 0.7 * workload.rate, "the machine is not full: {outcome:?}");
            outcome
        };
        let few = at(5, Policy::default());
        assert_eq!(few.loads, 5);
        for n in [100, 2000, 100_000] {
            let many = at(n, Policy::default());
            assert!(many.requests_per_second > 0.9 * few.requests_per_second, "{n}: {many:?} against {few:?}");
        }
        let slots = at(2000, Policy { max_adapters: Some(8), ..Default::default() });
        assert!(slots.requests_per_second < 0.9 * few.requests_per_second, "{slots:?} against {few:?}");
    }

    /// An adapter is in the pool once, however many requests use it. To be seen to fail: [`Scheduler`] that counts its pages for each request.
    #[test]
    fn requests_of_one_adapter_share_its_pages() {
        let workload = Workload { adapters: 1, rate: 8.0, duration: 60.0, ranks: vec![64], ..Default::default() };
        let roomy = run(&workload, &machine(), Policy::default());
        let adapter = numbers(64) * 4;
        let tight = run(&workload, &Machine { pool_bytes: 2 * adapter + (1500 << 20), ..machine() }, Policy::default());
        assert!(tight.requests_per_second > 0.95 * roomy.requests_per_second, "{tight:?} against {roomy:?}");
    }

    #[test]
    fn the_pool_is_never_more_than_full_and_all_are_answered() {
        for seed in 0..4 {
            let workload = Workload {
                adapters: 300,
                rate: 3.0,
                cv: 2.0,
                duration: 60.0,
                ranks: vec![64, 32, 16, 8],
                seed,
                ..Default::default()
            };
            let small = Machine { pool_bytes: 150 << 20, ..machine() };
            let outcome = run(&workload, &small, Policy::default());
            assert_eq!(outcome.answered + outcome.refused, outcome.requests, "{outcome:?}");
            assert!(outcome.fullest <= 1.0 && outcome.fullest > 0.5, "{outcome:?}");
            // The test of admission holds but for slow prefills.
            assert!(outcome.preempted * 20 <= outcome.requests as u64, "{outcome:?}");
        }
    }

    #[test]
    fn refusing_early_keeps_the_objective_for_more() {
        let workload = Workload { adapters: 200, rate: 6.0, duration: 120.0, ..Default::default() };
        let plain = run(&workload, &machine(), Policy::default());
        let early = run(&workload, &machine(), Policy { first_token: Some(OBJECTIVE), ..Default::default() });
        assert!(early.refused > 0 && early.answered + early.refused == early.requests);
        assert!(early.attainment > plain.attainment + 0.1, "{early:?} against {plain:?}");
        assert!(early.satisfaction > plain.satisfaction, "{early:?} against {plain:?}");
    }

    #[test]
    fn clustering_lets_more_run_where_adapters_are_bounded() {
        let workload = Workload { adapters: 50, rate: 8.0, duration: 60.0, output: (8, 64), ..Default::default() };
        let policy = Policy { max_adapters: Some(8), ..Default::default() };
        let with = run(&workload, &machine(), policy.clone());
        let without = run(&workload, &machine(), Policy { cluster: false, ..policy });
        assert_eq!((with.answered, without.answered), (with.requests, without.requests));
        assert!(with.requests_per_second > without.requests_per_second, "{with:?} against {without:?}");
    }
}
