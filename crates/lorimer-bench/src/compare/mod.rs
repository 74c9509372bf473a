//! `lorimer compare`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use lorimer_adapter::methods;
use lorimer_model::files::{create_folder, read_json, write_atomic, write_json};

pub mod report;
pub mod run;
pub mod scatter;
pub mod spec;

use lorimer_cli::{Global, common};
use report::{Report, html, markdown};
use spec::{MethodSpec, RunResult, RunSpec, Spec, beyond, read_spec};

/// Compare methods on tasks: one run for each method, task and seed, learning rates swept first, then tables, plots and rank correlations.
/// Runs that are done are not done again
#[derive(Args)]
pub struct Compare {
    /// YAML file of methods, tasks and seeds (bench/compare.yaml is one)
    file: PathBuf,
    /// Folder for runs, table.md, report.html and results.json
    #[arg(long, short, default_value = "results")]
    output: PathBuf,
    /// Do at most so many runs now
    #[arg(long)]
    max_runs: Option<usize>,
    /// Runs at a time, which share the machine's threads. More than one is quicker over all (up to a fifth on two cores), but
    /// then the table's seconds are those of runs that disturb each other. No other figure depends on it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
}

impl Spec {
    /// Sweeps the rates of every method: first its grid, then beyond that while the best stands at an edge of what was tried.
    fn sweep<'a>(&'a self, runner: &Runner<'_>) -> Result<Vec<(Job<'a>, Option<RunResult>)>> {
        let of = |m: &'a MethodSpec, lr: f64| Some((m.name.as_str(), self.sweep_run(m, lr)?));
        let mut jobs: Vec<Job<'_>> =
            self.methods.iter().flat_map(|m| self.grid(m).iter().filter_map(move |&lr| of(m, lr))).collect();
        let mut all: Vec<(Job<'_>, Option<RunResult>)> = Vec::new();
        for further in (0..=self.sweep.as_ref().map_or(0, |s| s.extensions)).rev() {
            runner.progress.lock().expect("no run panics").total += jobs.len();
            let found = runner.results(&jobs)?;
            all.extend(jobs.into_iter().zip(found));
            let next = |m: &'a MethodSpec| -> Option<Job<'a>> {
                let mine = all.iter().filter(|((line, _), _)| *line == m.name);
                // Nothing is decided while runs of the method are missing.
                let tried: Option<Vec<_>> =
                    mine.map(|((_, run), found)| Some((run.lr, found.as_ref()?.loss))).collect();
                of(m, beyond(&tried?)?)
            };
            jobs = if further > 0 { self.methods.iter().filter_map(next).collect() } else { Vec::new() };
            if jobs.is_empty() {
                break;
            }
            for (line, run) in &jobs {
                tracing::info!(
                    "the best rate of `{line}` stands at the edge of what was tried; trying {:e} too",
                    run.lr
                );
            }
        }
        Ok(all)
    }
}

/// A run and the line of the table that it is for.
type Job<'a> = (&'a str, RunSpec);

/// Does runs that are not done, each in a process of its own.
struct Runner<'a> {
    folder: &'a Path,
    jobs: usize,
    stop: std::sync::Arc<AtomicBool>,
    global: Global,
    clock: Instant,
    progress: Mutex<Progress>,
}

/// How far a comparison is.
struct Progress {
    /// Runs that may still be begun now.
    left: Option<usize>,
    done: usize,
    made: usize,
    total: usize,
}

impl Runner<'_> {
    /// The results of the runs, in their order; None for those that are not to be made now.
    fn results(&self, jobs: &[Job<'_>]) -> Result<Vec<Option<RunResult>>> {
        let mut found: Vec<Option<RunResult>> = jobs.iter().map(|job| self.kept(job)).collect();
        let to_do: Vec<usize> = (0..jobs.len()).filter(|&i| found[i].is_none()).collect();
        self.progress.lock().expect("no run panics").done += jobs.len() - to_do.len();
        let next = Mutex::new(to_do.into_iter());
        let made = Mutex::new(Vec::new());
        let work = || -> Result<()> {
            while !self.stop.load(Ordering::Relaxed) {
                let Some(i) = next.lock().expect("no run panics").next() else { break };
                {
                    let mut progress = self.progress.lock().expect("no run panics");
                    match &mut progress.left {
                        Some(0) => break,
                        Some(left) => *left -= 1,
                        None => (),
                    }
                }
                if let Some(result) = self.make(&jobs[i])? {
                    made.lock().expect("no run panics").push((i, result));
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.jobs).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        for (i, result) in made.into_inner().expect("no run panics") {
            found[i] = Some(result);
        }
        Ok(found)
    }

    fn path(&self, (line, spec): &Job<'_>, end: &str) -> PathBuf {
        self.folder.join(format!("{}.{end}", spec.name(line)))
    }

    /// What was found before.
    fn kept(&self, job: &Job<'_>) -> Option<RunResult> {
        let path = self.path(job, "json");
        let found = path.is_file().then(|| read_json::<RunResult>(&path, 16 << 20).ok()).flatten()?;
        let whole = !job.1.is_expert || found.error.is_some() || self.folder.join(job.1.adapter(job.0)).is_dir();
        (found.spec == job.1 && whole).then_some(found)
    }

    /// Makes a run. None where it was interrupted.
    fn make(&self, job: &Job<'_>) -> Result<Option<RunResult>> {
        let (given, work, path) = (self.path(job, "spec"), self.path(job, "work"), self.path(job, "json"));
        let name = job.1.name(job.0);
        write_json(&given, &job.1)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("compare-run").arg(&given).arg("--work").arg(&work).arg("--result").arg(&path);
        if !self.global.verbose {
            command.arg("--quiet");
        }
        if self.jobs > 1 {
            command.env("RAYON_NUM_THREADS", (rayon::current_num_threads() / self.jobs).max(1).to_string());
        }
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot start a run")?;
        if self.stop.load(Ordering::Relaxed) || status.code() == Some(130) {
            self.stop.store(true, Ordering::Relaxed);
            return Ok(None);
        }
        if !status.success() || !path.is_file() {
            // The others end what they are at, and begin nothing new.
            self.progress.lock().expect("no run panics").left = Some(0);
            bail!("the run `{name}` failed ({status}); its error stands above");
        }
        let _ = std::fs::remove_file(&given);
        let found: RunResult = read_json(&path, 16 << 20)?;
        if job.1.is_expert && found.error.is_none() {
            let adapter = self.folder.join(job.1.adapter(job.0));
            let _ = std::fs::remove_dir_all(&adapter);
            std::fs::rename(&work, &adapter).with_context(|| format!("cannot write `{}`", adapter.display()))?;
        }
        let _ = std::fs::remove_dir_all(&work);
        let mut progress = self.progress.lock().expect("no run panics");
        (progress.done, progress.made) = (progress.done + 1, progress.made + 1);
        let (done, total) = (progress.done, progress.total);
        let each = self.clock.elapsed().as_secs_f64() / progress.made as f64;
        let rest = each * total.saturating_sub(done) as f64 / 60.0;
        let figure = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.4}"));
        match &found.error {
            Some(error) => tracing::info!("{done}/{total} {name}: {error}; {rest:.0} min left"),
            None => {
                let (loss, accuracy) = (figure(found.loss), figure(found.accuracy));
                tracing::info!("{done}/{total} {name}: loss {loss}, accuracy {accuracy}; {rest:.0} min left");
            }
        }
        Ok(Some(found))
    }
}

impl Compare {
    /// Does the runs that are missing and writes the report.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let spec = read_spec(&self.file)?;
        let folder = self.output.join("runs");
        create_folder(&folder)?;
        let mut experts: Vec<(String, RunSpec)> = Vec::new();
        for &seed in &spec.seeds {
            let wanted = spec.methods.iter().flat_map(|m| spec.expert_runs(Some(m), seed));
            wanted.for_each(|job| {
                if !experts.contains(&job) {
                    experts.push(job)
                }
            });
        }
        let runs = spec.methods.len() * spec.tasks.len() * spec.seeds.len();
        let total = spec.tasks.len() + experts.len() + runs;
        let runner = Runner {
            folder: &folder,
            jobs: self.jobs.into(),
            stop: common::stop_flag(),
            global,
            clock: Instant::now(),
            progress: Mutex::new(Progress { left: self.max_runs, done: 0, made: 0, total }),
        };
        let bases: Vec<Job<'_>> = spec.tasks.iter().map(|task| ("base", spec.run(task, None, 1.0, 0))).collect();
        let mut report = Report::default();
        report.base = runner.results(&bases)?.into_iter().flatten().collect();
        // Before the runs that mix them, which are not begun while one is missing.
        let experts: Vec<Job<'_>> = experts.iter().map(|(line, run)| (line.as_str(), run.clone())).collect();
        let experts = runner.results(&experts)?.into_iter().flatten().count();
        let sweeps = spec.sweep(&runner)?;
        let mut rates: BTreeMap<&str, f64> = BTreeMap::new();
        for method in &spec.methods {
            let mine = || sweeps.iter().filter(|((line, _), _)| *line == method.name);
            if mine().any(|(_, found)| found.is_none()) {
                continue;
            }
            let losses = mine().filter_map(|((_, run), found)| Some((run.lr, found.as_ref()?.loss?)));
            let best = losses.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(lr, _)| lr);
            let shipped = methods::learning_rate(method.method(), &method.set)?;
            rates.insert(&method.name, method.lr.or(best).unwrap_or(shipped));
        }
        report.sweeps = sweeps.into_iter().filter_map(|((line, _), run)| Some((line.to_string(), run?))).collect();
        // Seeds outside, so that an unfinished comparison has every method at least once.
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for &seed in &spec.seeds {
            for task in &spec.tasks {
                let known = spec.methods.iter().filter_map(|m| Some((m, *rates.get(m.name.as_str())?)));
                jobs.extend(known.map(|(m, lr)| (m.name.as_str(), spec.run(task, Some(m), lr, seed))));
            }
        }
        let found = runner.results(&jobs)?;
        report.runs = jobs.iter().zip(found).filter_map(|((line, _), run)| Some((line.to_string(), run?))).collect();
        let total = runner.progress.lock().expect("no run panics").total;
        let missing = total - report.base.len() - experts - report.sweeps.len() - report.runs.len();
        report.finish(&spec, &rates);
        let text = markdown(&spec, &report);
        write_json(&self.output.join("results.json"), &report.json())?;
        write_atomic(&self.output.join("table.md"), text.as_bytes())?;
        write_atomic(&self.output.join("report.html"), html(&spec, &report)?.as_bytes())?;
        let mut json = report.json();
        json["missing_runs"] = missing.into();
        let output = self.output.display();
        common::print(global, &json, || {
            let rest = match missing {
                0 => String::new(),
                n => format!("\n{n} runs are missing; the same command goes on with them.\n"),
            };
            format!("{text}{rest}\nTables, plots and results: {output}/table.md, report.html, results.json")
        })?;
        Ok(if runner.stop.load(Ordering::Relaxed) { ExitCode::from(130) } else { ExitCode::SUCCESS })
    }
}
