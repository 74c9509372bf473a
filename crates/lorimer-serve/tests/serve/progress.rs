//! Scheduler, prefix cache, adapters and pool together, without a model: whatever comes, in whatever pool, every request that is let in ends,
//! and no page is lost.
//!
//! As a test it is short. At length: `LORIMER_EVENTS=10000000 cargo test --release -p lorimer-serve --test serve progress`

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lorimer_serve::engine::batching::{Asked, Batching};
use lorimer_serve::engine::pool::{BLOCK, Geometry, Pages};
use lorimer_serve::engine::scheduler::{Policy, Refusal, Tenant};
use lorimer_tensor::KeyDtype;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Prompts that begin alike, however long: token `i` of text `text`.
fn token(text: u32, i: usize) -> u32 {
    // Two texts are alike for a while and then part; each goes in circles, so that something can be guessed.
    if i < 2 * BLOCK { i as u32 } else { (i % 23) as u32 * 8 + text }
}

/// A request that was let in: its text, tokens that it is to generate, and those that it has.
struct Expected {
    text: u32,
    output: usize,
    generated: usize,
    /// Pages of a block of its tokens beside a page a layer.
    pages_per_block: usize,
}

struct Run {
    batching: Batching,
    under: BTreeMap<u64, Expected>,
    /// Steps one after the other in which nothing was computed.
    idle: usize,
    now: f64,
    /// Tokens guessed, and those that stood.
    guesses: (usize, usize),
}

impl Run {
    /// One step; everyone who has come so far gets a token.
    fn step(&mut self, seed: u64) {
        self.now += 0.01;
        let step = self.batching.step(self.now);
        assert!(step.failed.is_empty(), "seed {seed}: {:?} were let in and found no room", step.failed);
        for (id, _) in &step.refused {
            assert!(self.under.remove(id).is_some(), "seed {seed}");
        }
        self.idle = if step.work.is_empty() && !self.under.is_empty() { self.idle + 1 } else { 0 };
        let (running, waiting) = (self.batching.scheduler().running(), self.batching.scheduler().waiting());
        assert!(self.idle < 50, "seed {seed}: nothing is computed, {running} run and {waiting} wait");
        let mut drafted = BTreeMap::new();
        for (id, most) in step.drafts {
            let s = self.batching.sequence(id).unwrap();
            assert!(s.guess.is_empty() && most > 0 && (s.tokens.len() + most).div_ceil(BLOCK) <= s.blocks.len());
            let count = (seed as usize + s.tokens.len()) % (most + 1);
            self.batching.drafted(id, vec![0; count]);
            drafted.insert(id, count);
        }
        for (id, rows) in step.work {
            let rows = rows + drafted.get(&id).copied().unwrap_or(0);
            let s = self.batching.sequence(id).unwrap();
            let guessed = s.guess.len();
            assert!(
                rows > guessed
                    && s.computed + rows <= s.tokens.len() + guessed
                    && (s.computed + rows).div_ceil(BLOCK) <= s.blocks.len()
            );
            self.batching.advance(id, rows - guessed);
            let s = self.batching.sequence(id).unwrap();
            if s.computed < s.tokens.len() {
                continue;
            }
            let expected = self.under.get_mut(&id).unwrap();
            let stood =
                ((seed as usize + s.tokens.len()) % (guessed + 1)).min(expected.output - expected.generated - 1);
            self.batching.stood(id, stood);
            self.guesses = (self.guesses.0 + guessed, self.guesses.1 + stood);
            for i in 0..=stood {
                self.batching.push(id, token(expected.text, self.batching.sequence(id).unwrap().tokens.len()));
                expected.generated += 1;
                if i < stood {
                    self.batching.advance(id, 1);
                }
            }
            assert!(expected.generated <= expected.output);
            if expected.generated == expected.output {
                self.batching.remove(id);
                self.under.remove(&id);
            }
        }
    }

    /// Every page is held by as many as the account says.
    fn check(&self, geometry: Geometry, seed: u64) {
        let mut users: HashMap<u32, u32> = HashMap::new();
        for (id, expected) in &self.under {
            let Some(s) = self.batching.sequence(*id) else { continue };
            assert!(s.blocks.iter().all(|b| b.len() == geometry.layers + expected.pages_per_block));
            s.blocks.iter().flatten().for_each(|&page| *users.entry(page).or_default() += 1);
        }
        let pages = self.batching.pages();
        let (mut free, mut kept) = (0, 0);
        for page in 0..pages.count() as u32 {
            let held = users.get(&page).copied().unwrap_or(0);
            // The prefix cache holds a page once at most, and an adapter's are its own.
            assert!((held..=held + 1).contains(&pages.users(page)), "seed {seed}: page {page}");
            free += usize::from(pages.users(page) == 0);
            kept += usize::from(held == 0 && pages.users(page) == 1);
        }
        assert_eq!(free, pages.free());
        assert_eq!(kept, self.batching.cached_pages() + self.batching.adapters().figures().pages(), "seed {seed}");
    }
}

/// What may be asked of a pool.
struct Traffic {
    geometry: Geometry,
    adapters: Vec<(Arc<str>, usize)>,
    users: u32,
    texts: u32,
    /// Most tokens of a prompt.
    most: usize,
}

impl Traffic {
    /// A request, and the text that its prompt is of.
    fn asked(&self, rng: &mut ChaCha8Rng) -> (Asked, u32) {
        let prompt = match rng.random_range(0..3) {
            0 => rng.random_range(1..=self.most),
            1 => BLOCK * rng.random_range(1..=self.most.div_ceil(BLOCK)),
            _ => rng.random_range(1..=self.most.min(3 * BLOCK)),
        };
        let largest = [1, 8, self.most][rng.random_range(0..3)];
        let max_tokens = rng.random_range(1..=largest);
        let mut chosen = self.adapters.clone();
        chosen.retain(|_| rng.random_bool(0.2));
        let text = rng.random_range(0..self.texts);
        // Keys and values of the same content lie alike.
        let content: String = chosen.iter().map(|(a, _)| a.to_string()).collect();
        let pages_per_block = self.geometry.layers * (chosen.len() % 2) + chosen.len() % 3;
        let asked = Asked {
            prompt: (0..prompt).map(|i| token(text, i)).collect(),
            whole: rng.random_bool(0.1),
            max_tokens,
            // An answer may turn out longer than expected.
            expected: rng.random_bool(0.3).then(|| rng.random_range(0..=max_tokens)),
            adapters: chosen,
            pages_per_block,
            group: content.clone(),
            content,
            answered: rng.random_range(0..prompt),
            tenant: Tenant {
                client: format!("c{}", rng.random_range(0..2)).into(),
                user: format!("u{}", rng.random_range(0..1000u32) % self.users).into(),
            },
        };
        (asked, text)
    }
}

/// A pool of its own with requests that fit and some that do not; how many events there were.
fn run(seed: u64, events: u64) -> u64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let geometry = Geometry { row: 1, layers: rng.random_range(1..=2), dtype: KeyDtype::F32 };
    let count = rng.random_range(2..=64u32);
    let policy = Policy {
        max_running: rng.random_range(1..=8),
        batch_tokens: [1, 3, 16, 40, 512][rng.random_range(0..5)],
        shared_tokens: [1, 2, 7, 64][rng.random_range(0..4)],
        guesses: [0, 1, 9][rng.random_range(0..3)],
        draft_tokens: [0, 1, 5][rng.random_range(0..3)],
        max_waiting: rng.random_range(1..=24),
        max_adapters: [None, Some(1), Some(2)][rng.random_range(0..3)],
        cluster: rng.random(),
        starvation: [0.0, 0.05, 1.0][rng.random_range(0..3)],
        fair: rng.random(),
        first_token: rng.random_bool(0.1).then_some(0.5),
    };
    let batching = Batching::new(policy, geometry, Pages::new(count), rng.random_bool(0.9));
    let mut run = Run { batching, under: BTreeMap::new(), idle: 0, now: 0.0, guesses: (0, 0) };
    let adapters: Vec<(Arc<str>, usize)> =
        (0..4).map(|i| (format!("a{i}").into(), rng.random_range(1..=count as usize / 2))).collect();
    let users = [1, 3, 1000][rng.random_range(0..3)];
    let (texts, busy) = (rng.random_range(1..=3u32), rng.random_range(0.05..0.9));
    let most = count as usize / geometry.layers * BLOCK;
    let traffic = Traffic { geometry, adapters, users, texts, most };
    let (mut next, mut done) = (0, 0);
    while done < events {
        done += 1;
        if rng.random_bool(busy) {
            run.step(seed);
            if done % 16 == 0 {
                run.check(geometry, seed);
            }
        } else if rng.random_bool(0.1) && !run.under.is_empty() {
            let at = rng.random_range(0..run.under.len());
            let id = *run.under.keys().nth(at).unwrap();
            run.batching.remove(id);
            run.under.remove(&id);
        } else {
            let (asked, text) = traffic.asked(&mut rng);
            let (max_tokens, pages_per_block) = (asked.max_tokens, asked.pages_per_block);
            let fits = asked.adapters.iter().map(|(_, pages)| pages).sum::<usize>()
                + geometry.pages_with(asked.prompt.len() + max_tokens, pages_per_block)
                <= count as usize;
            match run.batching.submit(next, asked, run.now) {
                Ok(()) => {
                    assert!(fits);
                    let output = rng.random_range(1..=max_tokens);
                    run.under.insert(next, Expected { text, output, generated: 0, pages_per_block });
                }
                Err(refusal) => assert_eq!(refusal == Refusal::TooLarge, !fits, "seed {seed}"),
            }
            next += 1;
        }
    }
    // Nothing more comes: all end.
    let tokens: usize = run.under.keys().filter_map(|id| Some(run.batching.sequence(*id)?.tokens.len())).sum();
    let steps = 1000 + 20 * (tokens + run.under.values().map(|e| e.output).sum::<usize>());
    for _ in 0..steps {
        if run.under.is_empty() {
            break;
        }
        done += 1;
        run.step(seed);
    }
    assert!(run.under.is_empty() && run.batching.is_idle(), "seed {seed}: {:?} do not end", run.under.keys());
    run.check(geometry, seed);
    done
}

#[test]
fn every_request_that_is_let_in_ends() {
    let events = std::env::var("LORIMER_EVENTS").map_or(300_000, |n| n.parse().expect("LORIMER_EVENTS is a number"));
    let (mut done, mut seed) = (0, 0);
    while done < events {
        done += run(seed, 2000);
        seed += 1;
    }
    eprintln!("{done} events in {seed} pools");
}

/// Who names a new user with each request takes nothing from other clients, and keeps none of his own users waiting for ever.
#[test]
fn naming_ever_new_users_starves_nobody() {
    let policy = Policy { max_running: 1, ..Default::default() };
    let geometry = Geometry { row: 1, layers: 1, dtype: KeyDtype::F32 };
    let mut batching = Batching::new(policy, geometry, Pages::new(64), false);
    let ask = |batching: &mut Batching, id: u64, client: &str, user: String, now: f64| {
        let tenant = Tenant { client: client.into(), user: user.into() };
        let asked = Asked { prompt: vec![1; 64], max_tokens: 1, tenant, ..Default::default() };
        batching.submit(id, asked, now).unwrap();
    };
    // Of client 0 floods of new users, of the same client one user, of client 1 another; whose the requests are.
    let mut whose: HashMap<u64, usize> = HashMap::new();
    let (mut next, mut served, mut waiting) = (0, [0usize; 3], [0usize; 3]);
    for step in 0..600 {
        let now = f64::from(step);
        for _ in 0..2 {
            ask(&mut batching, next, "0", format!("new {next}"), now);
            whose.insert(next, 0);
            next += 1;
        }
        for (i, client) in [(1, "0"), (2, "1")] {
            while waiting[i] < 3 {
                ask(&mut batching, next, client, "steady".into(), now);
                whose.insert(next, i);
                (next, waiting[i]) = (next + 1, waiting[i] + 1);
            }
        }
        for (id, rows) in batching.step(now).work {
            batching.advance(id, rows);
            batching.remove(id);
            let i = whose[&id];
            served[i] += 1;
            waiting[i] = waiting[i].saturating_sub(1);
        }
    }
    // With the queue full, whoever has most of it gives way.
    let policy = Policy { max_running: 1, max_waiting: 20, ..Default::default() };
    let mut batching = Batching::new(policy, geometry, Pages::new(64), false);
    let ask = |batching: &mut Batching, id: u64, client: &str| {
        let tenant = Tenant { client: client.into(), user: format!("new {id}").into() };
        batching.submit(id, Asked { prompt: vec![1; 64], max_tokens: 1, tenant, ..Default::default() }, 0.0)
    };
    (0..20).for_each(|id| ask(&mut batching, id, "0").unwrap());
    assert_eq!(ask(&mut batching, 20, "0"), Err(Refusal::QueueFull));
    (21..30).for_each(|id| ask(&mut batching, id, "1").unwrap());
    let gave_way: Vec<u64> = batching.step(0.0).refused.into_iter().map(|(id, _)| id).collect();
    assert_eq!(gave_way, (11..20).rev().collect::<Vec<_>>());
    // The other client has its half; the steady user is served as his turn among all who came before him comes.
    assert!(served[2] >= 290, "{served:?}");
    assert!(served[1] >= 3, "{served:?}");
}

/// While one client's long prompt is computed, another client's short one is taken in with the next step, and steps stay short; alone, a
/// client has the whole step.
#[test]
fn a_long_prompt_holds_nobody_up() {
    let geometry = Geometry { row: 1, layers: 1, dtype: KeyDtype::F32 };
    let policy = Policy { batch_tokens: 512, shared_tokens: 64, ..Default::default() };
    let mut batching = Batching::new(policy, geometry, Pages::new(4096), false);
    let asked = |client: &str, n: usize| Asked {
        prompt: vec![5; n],
        max_tokens: 4,
        tenant: Tenant { client: client.into(), user: "".into() },
        ..Default::default()
    };
    batching.submit(0, asked("a", 5_000), 0.0).unwrap();
    let step = batching.step(0.1);
    assert_eq!(step.work, [(0, 512)]);
    batching.advance(0, 512);
    batching.submit(1, asked("b", 24), 0.15).unwrap();
    batching.submit(2, asked("c", 300), 0.15).unwrap();
    let mut step = batching.step(0.2);
    step.work.sort_unstable();
    // Twenty-one each of sixty-four; the one that is left over goes to who was there first.
    assert_eq!(step.work, [(0, 22), (1, 21), (2, 21)]);
    step.work.iter().for_each(|&(id, rows)| batching.advance(id, rows));
    let step = batching.step(0.3);
    assert!(step.work.contains(&(1, 3)), "{:?}", step.work);
    assert_eq!(step.work.iter().map(|(_, rows)| rows).sum::<usize>(), 64);
    // The others have gone: steps stay short for some seconds, and then are long again.
    batching.remove(1);
    batching.remove(2);
    assert_eq!(batching.step(0.4).work, [(0, 64)]);
    batching.advance(0, 64);
    assert_eq!(batching.step(6.0).work, [(0, 512)]);
}
