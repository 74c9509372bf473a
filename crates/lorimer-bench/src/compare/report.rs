//! What a comparison's runs come to: means, forgetting, rank correlations, tables and a page with plots.

use std::collections::BTreeMap;

use crate::compare::scatter::{Point, scatter};
use anyhow::{Result, anyhow};
use serde::Serialize;
use serde_json::{Value, json};

use crate::compare::spec::{RunResult, Spec, beyond};
use lorimer_cli::flags::show_bytes;

/// Mean and standard deviation (n − 1) of some runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figure {
    mean: f64,
    deviation: f64,
    runs: usize,
}

impl Figure {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.collect();
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
        Some(Self { mean, deviation: if n > 1 { (squares / (n - 1) as f64).sqrt() } else { 0.0 }, runs: n })
    }
}

/// One method on one task.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    accuracy: Option<Figure>,
    loss: Option<Figure>,
    train_loss: Option<Figure>,
    forgetting: Option<Figure>,
    seconds: Option<Figure>,
    /// Runs that gave no figures because they ran away.
    diverged: usize,
}

/// One method over all tasks.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Line {
    name: String,
    method: String,
    lr: Option<f64>,
    /// Rates that the sweep tried beyond its grid.
    beyond_grid: Vec<f64>,
    /// Whether the best rate of the sweep is the lowest or the highest that was tried.
    at_edge: bool,
    accuracy: Option<f64>,
    loss: Option<f64>,
    forgetting: Option<f64>,
    seconds: Option<f64>,
    start_seconds: Option<f64>,
    peak_bytes: Option<u64>,
    trainable_parameters: Option<usize>,
    file_bytes: Option<u64>,
    runs: usize,
    tasks: BTreeMap<String, Cell>,
}

/// All of it.
#[derive(Default)]
pub struct Report {
    /// The base on each task.
    pub base: Vec<RunResult>,
    /// The sweeps' runs by line.
    pub sweeps: Vec<(String, RunResult)>,
    /// The runs by line.
    pub runs: Vec<(String, RunResult)>,
    lines: Vec<Line>,
    /// Spearman's correlation of the methods' losses between two tasks.
    correlations: Vec<(String, String, f64)>,
}

/// Ranks from 1, ties sharing their mean.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut at = 0;
    while at < order.len() {
        let same = order[at..].iter().take_while(|&&i| values[i] == values[order[at]]).count();
        order[at..at + same].iter().for_each(|&i| ranks[i] = at as f64 + (same as f64 + 1.0) / 2.0);
        at += same;
    }
    ranks
}

/// Spearman's rank correlation; None for fewer than three pairs or where one side does not vary.
fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len() as f64;
    if a.len() < 3 {
        return None;
    }
    let mean = (n + 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    (scale > 0.0).then(|| product(&a, &b) / scale)
}

impl Report {
    /// Works out lines and correlations from the runs.
    pub fn finish(&mut self, spec: &Spec, rates: &BTreeMap<&str, f64>) {
        for method in &spec.methods {
            let own: Vec<&RunResult> =
                self.runs.iter().filter(|(name, _)| *name == method.name).map(|(_, r)| r).collect();
            let swept = self.sweeps.iter().filter(|(name, _)| *name == method.name);
            let swept: Vec<(f64, Option<f64>)> = swept.map(|(_, r)| (r.spec.lr, r.loss)).collect();
            let grid = spec.grid(method);
            let mut line = Line {
                name: method.name.clone(),
                method: method.method().to_string(),
                lr: rates.get(method.name.as_str()).copied(),
                beyond_grid: swept.iter().map(|(lr, _)| *lr).filter(|lr| !grid.contains(lr)).collect(),
                at_edge: beyond(&swept).is_some(),
                runs: own.len(),
                ..Default::default()
            };
            for task in &spec.tasks {
                let here: Vec<&&RunResult> = own.iter().filter(|r| r.spec.task.name == task.name).collect();
                let base = self.base.iter().find(|r| r.spec.task.name == task.name).and_then(|r| r.general_loss);
                let forgot = |r: &RunResult| Some(r.general_loss? - base?);
                line.tasks.insert(
                    task.name.clone(),
                    Cell {
                        accuracy: Figure::of(here.iter().filter_map(|r| r.accuracy)),
                        loss: Figure::of(here.iter().filter_map(|r| r.loss)),
                        train_loss: Figure::of(here.iter().filter_map(|r| r.train_loss)),
                        forgetting: Figure::of(here.iter().filter_map(|r| forgot(r))),
                        seconds: Figure::of(here.iter().filter_map(|r| r.seconds)),
                        diverged: here.iter().filter(|r| r.error.is_some()).count(),
                    },
                );
            }
            // A mean over tasks is one only where every task has been run.
            let over = |of: &dyn Fn(&Cell) -> Option<Figure>| -> Option<f64> {
                let all: Option<Vec<f64>> = line.tasks.values().map(|c| of(c).map(|f| f.mean)).collect();
                all.map(|v| v.iter().sum::<f64>() / v.len() as f64)
            };
            (line.accuracy, line.loss) = (over(&|c| c.accuracy), over(&|c| c.loss));
            (line.forgetting, line.seconds) = (over(&|c| c.forgetting), over(&|c| c.seconds));
            line.start_seconds = Figure::of(own.iter().filter_map(|r| r.start_seconds)).map(|f| f.mean);
            line.peak_bytes = own.iter().filter_map(|r| r.peak_bytes).max();
            line.trainable_parameters = own.iter().filter_map(|r| r.trainable_parameters).max();
            line.file_bytes = own.iter().filter_map(|r| r.file_bytes).max();
            self.lines.push(line);
        }
        for (i, a) in spec.tasks.iter().enumerate() {
            for b in &spec.tasks[i + 1..] {
                let loss = |line: &Line, task: &str| line.tasks.get(task)?.loss.map(|f| f.mean);
                let pairs = self.lines.iter().filter_map(|l| Some((loss(l, &a.name)?, loss(l, &b.name)?)));
                let (x, y): (Vec<f64>, Vec<f64>) = pairs.unzip();
                if let Some(r) = spearman(&x, &y) {
                    self.correlations.push((a.name.clone(), b.name.clone(), r));
                }
            }
        }
    }

    /// As an object.
    pub fn json(&self) -> Value {
        let base: Vec<Value> = self
            .base
            .iter()
            .map(|r| json!({ "task": r.spec.task.name, "loss": r.loss, "accuracy": r.accuracy, "general_loss": r.general_loss }))
            .collect();
        let sweeps: Vec<Value> = self
            .sweeps
            .iter()
            .map(|(name, r)| json!({ "name": name, "lr": r.spec.lr, "loss": r.loss, "error": r.error }))
            .collect();
        let correlations: Vec<Value> =
            self.correlations.iter().map(|(a, b, r)| json!({ "tasks": [a, b], "spearman": r })).collect();
        json!({ "methods": self.lines, "base": base, "sweeps": sweeps, "rank_correlations": correlations })
    }
}

fn percent(v: Option<f64>) -> String {
    v.map_or("-".into(), |v| format!("{:.1}", 100.0 * v))
}

fn number(v: Option<f64>, digits: usize) -> String {
    v.map_or("-".into(), |v| format!("{v:.digits$}"))
}

fn rate(v: f64) -> String {
    format!("{v:.0e}")
}

/// Rows of text, the first of them the heads.
type Table = Vec<Vec<String>>;

fn whole_table(report: &Report) -> Table {
    let heads = "method|learning rate|accuracy, %|loss|forgetting|seconds|start, s|peak memory|parameters|file";
    let mut table: Table = vec![heads.split('|').map(str::to_string).collect()];
    let mean = |of: &dyn Fn(&RunResult) -> Option<f64>| Figure::of(report.base.iter().filter_map(of)).map(|f| f.mean);
    let mut base = vec!["base".to_string(), "-".into()];
    base.extend([percent(mean(&|r| r.accuracy)), number(mean(&|r| r.loss), 4)]);
    base.resize(10, "-".into());
    table.push(base);
    for l in &report.lines {
        table.push(vec![
            l.name.clone(),
            l.lr.map_or("-".into(), |lr| rate(lr) + if l.at_edge { " (edge)" } else { "" }),
            percent(l.accuracy),
            number(l.loss, 4),
            number(l.forgetting, 3),
            number(l.seconds, 0),
            number(l.start_seconds, 1),
            l.peak_bytes.map_or("-".into(), show_bytes),
            l.trainable_parameters.map_or("-".into(), lorimer_cli::common::short),
            l.file_bytes.map_or("-".into(), show_bytes),
        ]);
    }
    table
}

/// One row a method, one column a task.
fn task_table(
    spec: &Spec,
    report: &Report,
    show: &dyn Fn(&Cell) -> String,
    base: &dyn Fn(&RunResult) -> String,
) -> Table {
    let mut table: Table =
        vec![std::iter::once("method".into()).chain(spec.tasks.iter().map(|t| t.name.clone())).collect()];
    let of_base =
        spec.tasks.iter().map(|t| report.base.iter().find(|r| r.spec.task.name == t.name).map_or("-".into(), base));
    table.push(std::iter::once("base".to_string()).chain(of_base).collect());
    for l in &report.lines {
        let cells = spec.tasks.iter().map(|t| l.tasks.get(&t.name).map_or("-".into(), show));
        table.push(std::iter::once(l.name.clone()).chain(cells).collect());
    }
    table
}

/// Mean and deviation of the runs that gave figures, and how many ran away.
fn with_deviation(cell: &Cell, of: impl Fn(&Cell) -> Option<Figure>, scale: f64, digits: usize) -> String {
    let figure = match of(cell) {
        None if cell.diverged > 0 => return "diverged".into(),
        None => return "-".into(),
        Some(f) if f.runs < 2 => format!("{:.digits$}", scale * f.mean),
        Some(f) => format!("{:.digits$} ± {:.digits$}", scale * f.mean, scale * f.deviation),
    };
    if cell.diverged > 0 { format!("{figure} ({} diverged)", cell.diverged) } else { figure }
}

fn sweep_table(report: &Report) -> Table {
    let mut rates: Vec<f64> = report.sweeps.iter().map(|(_, r)| r.spec.lr).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let heads = rates.iter().map(|r| rate(*r)).chain(["remark".to_string()]);
    let mut table: Table = vec![std::iter::once("method".into()).chain(heads).collect()];
    for l in &report.lines {
        let at = |lr: &f64| {
            let found = report.sweeps.iter().find(|(name, r)| *name == l.name && r.spec.lr == *lr);
            found.map_or("-".to_string(), |(_, r)| r.loss.map_or("diverged".into(), |v| format!("{v:.4}")))
        };
        let further = match &l.beyond_grid[..] {
            [] => String::new(),
            some => format!("beyond its grid: {}", some.iter().map(|r| rate(*r)).collect::<Vec<_>>().join(", ")),
        };
        let edge = if l.at_edge { "best at the edge of what was tried" } else { "" };
        let remark: Vec<&str> = [further.as_str(), edge].into_iter().filter(|s| !s.is_empty()).collect();
        table.push(std::iter::once(l.name.clone()).chain(rates.iter().map(at)).chain([remark.join("; ")]).collect());
    }
    table
}

fn sections(spec: &Spec, report: &Report) -> Vec<(String, Table)> {
    let mut all = vec![
        ("All tasks".to_string(), whole_table(report)),
        (
            "Accuracy, %".into(),
            task_table(spec, report, &|c| with_deviation(c, |c| c.accuracy, 100.0, 1), &|r| percent(r.accuracy)),
        ),
        ("Loss".into(), task_table(spec, report, &|c| with_deviation(c, |c| c.loss, 1.0, 4), &|r| number(r.loss, 4))),
        (
            "Forgetting (rise of the loss on the general text)".into(),
            task_table(spec, report, &|c| with_deviation(c, |c| c.forgetting, 1.0, 3), &|_| "0".into()),
        ),
        (
            "Training loss, last ten steps".into(),
            task_table(spec, report, &|c| with_deviation(c, |c| c.train_loss, 1.0, 4), &|_| "-".into()),
        ),
    ];
    if !report.correlations.is_empty() {
        let mut table: Table = vec![vec!["tasks".into(), "Spearman's ρ of the methods' losses".into()]];
        table.extend(report.correlations.iter().map(|(a, b, r)| vec![format!("{a}, {b}"), format!("{r:.2}")]));
        all.push(("Do the tasks agree on the order?".into(), table));
    }
    if !report.sweeps.is_empty() {
        all.push(("Sweep of learning rates (loss on held-out training rows)".into(), sweep_table(report)));
    }
    all
}

fn preamble(spec: &Spec) -> String {
    format!(
        "{} methods × {} tasks × {} seeds on `{}`, {} steps of {} rows each, target modules {}.",
        spec.methods.len(),
        spec.tasks.len(),
        spec.seeds.len(),
        spec.model,
        spec.steps,
        spec.batch_size,
        spec.target_modules.as_str().map_or_else(|| spec.target_modules.to_string(), str::to_string),
    )
}

/// The tables as Markdown.
pub fn markdown(spec: &Spec, report: &Report) -> String {
    let mut out = preamble(spec) + "\n";
    for (title, table) in sections(spec, report) {
        out += &format!("\n## {title}\n\n");
        for (i, row) in table.iter().enumerate() {
            out += &format!("| {} |\n", row.join(" | "));
            if i == 0 {
                out += &format!("|{}\n", "---|".repeat(row.len()));
            }
        }
    }
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Whether no other point is at least as good on both sides and better on one: less of x, more of y.
fn on_the_front(points: &[(f64, f64)], i: usize) -> bool {
    let (x, y) = points[i];
    !points.iter().any(|&(a, b)| a <= x && b >= y && (a < x || b > y))
}

fn plot(report: &Report, x_name: &str, log: bool, of: &dyn Fn(&Line) -> Option<f64>) -> Result<String> {
    let found: Vec<(&Line, (f64, f64))> =
        report.lines.iter().filter_map(|l| Some((l, (of(l)?, 100.0 * l.accuracy?)))).collect();
    let places: Vec<(f64, f64)> = found.iter().map(|(_, p)| *p).collect();
    let points: Vec<Point> = found
        .iter()
        .enumerate()
        .map(|(i, (l, (x, y)))| Point { x: *x, y: *y, name: l.name.clone(), front: on_the_front(&places, i) })
        .collect();
    scatter(&points, x_name, "accuracy, %", log).map_err(|e| anyhow!("{e}"))
}

/// A page with tables and plots, complete in itself.
pub fn html(spec: &Spec, report: &Report) -> Result<String> {
    let mut out = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Comparison of methods</title><style>\
         body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}\
         table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}td,th{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd}\
         td:first-child,th:first-child{text-align:left}h2{margin-top:2.5rem}svg{max-width:100%;height:auto}</style>",
    );
    out += &format!("<h1>Comparison of methods</h1><p>{}</p>", escaped(&preamble(spec)));
    out += "<p>Filled points are on the Pareto front: no other method is at least as good on both axes.</p>";
    let seconds = |l: &Line| l.seconds;
    let parameters = |l: &Line| l.trainable_parameters.map(|p| p as f64);
    out += &plot(report, "seconds of training", false, &seconds)?;
    out += &plot(report, "trainable parameters", true, &parameters)?;
    for (title, table) in sections(spec, report) {
        out += &format!("<h2>{}</h2><table>", escaped(&title));
        for (i, row) in table.iter().enumerate() {
            let cell = if i == 0 { "th" } else { "td" };
            out += "<tr>";
            row.iter().for_each(|c| out += &format!("<{cell}>{}</{cell}>", escaped(c)));
            out += "</tr>";
        }
        out += "</table>";
    }
    Ok(out + "</html>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation_by_hand() {
        assert_eq!(ranks(&[3.0, 1.0, 1.0, 9.0]), [3.0, 1.5, 1.5, 4.0]);
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 30.0]), Some(1.0));
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), Some(-1.0));
        // 1 − 6 Σd²/(n(n² − 1)) with d = (0, 1, −1, 0).
        assert!((spearman(&[1.0, 2.0, 3.0, 4.0], &[1.0, 3.0, 2.0, 4.0]).unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(spearman(&[1.0, 2.0], &[1.0, 2.0]), None);
    }

    #[test]
    fn the_front_holds_what_nothing_beats() {
        let points = [(1.0, 5.0), (2.0, 4.0), (3.0, 9.0), (1.0, 5.0)];
        let front: Vec<bool> = (0..4).map(|i| on_the_front(&points, i)).collect();
        assert_eq!(front, [true, false, true, true]);
    }
}
