//! The command line: subcommands, one file each, and how they are begun.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use lorimer_cli::{Global, common, host};
use serde_json::json;

use crate::subcommands;

/// Fine-tune, inspect, merge and run low-rank adapters (LoRA and its kin) on the machine you have
#[derive(Parser)]
#[command(name = "lorimer", version, propagate_version = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    subcommand: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch a small model, fine-tune it on real text, and show what it learned
    Quickstart(subcommands::quickstart::Quickstart),
    /// Fetch a base model into the cache
    Pull(subcommands::pull::Pull),
    /// Fine-tune an adapter
    Train(Box<subcommands::train::Train>),
    /// Predict peak memory and time of a training run, and propose settings that fit
    Plan(Box<subcommands::plan::PlanRun>),
    /// Measure loss, perplexity, exact matches and choice accuracy
    Eval(subcommands::eval::Eval),
    /// Answer a prompt
    Generate(subcommands::generate::Generate),
    /// Turn texts into vectors
    Embed(subcommands::embed::Embed),
    /// Serve a base and its adapters over HTTP
    Serve(Box<subcommands::serve::Serve>),
    /// Put a base into 2 to 8 bits a weight, with an adapter that begins as its repair
    Quantize(subcommands::quantize::Quantize),
    /// Merge adapters into the base's weights, or combine them into one adapter
    Merge(Box<subcommands::merge::Merge>),
    /// Convert an adapter between the files of PEFT, llama.cpp, mlx-lm, kohya and diffusers
    Convert(subcommands::convert::Convert),
    /// The nearest LoRA of a full tune
    Extract(subcommands::extract::Extract),
    /// Cut a LoRA to its first ranks
    Resize(subcommands::resize::Resize),
    /// Take heads and channels out of a base
    Prune(Box<subcommands::prune::Prune>),
    /// Make an adapter of a pruned model one of the whole base
    Recover(subcommands::recover::Recover),
    /// Train one adapter with many clients that keep their rows
    Federate(subcommands::federate::Federate),
    /// Change sparse adapters under one base in memory, in milliseconds
    Switch(subcommands::switch::Switch),
    /// Show what is in an adapter
    Inspect(subcommands::inspect::Inspect),
    /// Check that an adapter fits its base, does something, and answers as it did when it was trained
    Check(subcommands::check::Check),
    /// Measure speed and memory, alone or against a peer
    Bench(lorimer_bench::Bench),
    /// Compare methods on tasks: sweeps, runs, tables and plots
    Compare(lorimer_bench::compare::Compare),
    /// Measure the norms of attention heads that decide what their gradient may cost
    Limits(lorimer_bench::limits::Limits),
    /// One run of a comparison
    #[command(hide = true)]
    CompareRun(lorimer_bench::compare::run::CompareRun),
    /// List the methods
    Methods(subcommands::methods::Methods),
}

/// The program `lorimer`.
pub fn main() -> ExitCode {
    crate::tensor::memory::keep_freed_pages();
    let arguments = match common::with_config_file(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error),
    };
    let cli = Cli::parse_from(arguments);
    set_threads(cli.global.threads);
    common::start_log(cli.global.quiet, cli.global.verbose);
    if let Err(problem) = crate::tensor::kernels::cpu::check() {
        return fail(&anyhow::anyhow!(problem));
    }
    let result = cli.run();
    let (threads, peak) = (rayon::current_num_threads(), common::peak_bytes().unwrap_or_default());
    tracing::debug!("{threads} threads, peak memory {peak} bytes");
    match result {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

impl Cli {
    fn run(self) -> Result<ExitCode> {
        match self.subcommand {
            Command::Quickstart(v) => v.run(self.global),
            Command::Pull(v) => v.run(self.global),
            Command::Train(v) => v.run(self.global),
            Command::Plan(v) => v.run(self.global),
            Command::Eval(v) => v.run(self.global),
            Command::Generate(v) => v.run(self.global),
            Command::Embed(v) => v.run(self.global),
            Command::Serve(v) => v.run(self.global),
            Command::Quantize(v) => v.run(self.global),
            Command::Merge(v) => v.run(self.global),
            Command::Convert(v) => v.run(self.global),
            Command::Extract(v) => v.run(self.global),
            Command::Resize(v) => v.run(self.global),
            Command::Prune(v) => v.run(self.global),
            Command::Recover(v) => v.run(self.global),
            Command::Federate(v) => v.run(self.global),
            Command::Switch(v) => v.run(self.global),
            Command::Inspect(v) => v.run(self.global),
            Command::Check(v) => v.run(self.global),
            Command::Bench(v) => v.run(self.global),
            Command::Compare(v) => v.run(self.global),
            Command::Limits(v) => v.run(self.global),
            Command::CompareRun(v) => v.run(self.global),
            Command::Methods(v) => v.run(self.global),
        }
    }
}

/// Runs a subcommand inside another program (see [`host`]), with the words of a command line; whether it gave what was asked for. The result is the host's.
///
/// # Errors
///
/// Fails as the subcommand does, or where the words are none.
pub fn call(arguments: Vec<OsString>) -> Result<bool> {
    let cli = match Cli::try_parse_from(common::with_config_file(arguments)?) {
        Ok(cli) => cli,
        Err(asked) if matches!(asked.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            host::keep(json!(asked.to_string()));
            return Ok(true);
        }
        Err(problem) => {
            let text = problem.to_string();
            let lines = text.lines().map(|line| line.trim().trim_start_matches("error: "));
            // What is wrong, and the names that it is about, which stand on lines of their own.
            let said: Vec<&str> = lines.take_while(|line| !line.is_empty()).collect();
            return Err(anyhow!(said.join(" ")));
        }
    };
    if cli.global.threads.is_some() {
        return Err(anyhow!("threads are the program's around; set RAYON_NUM_THREADS before it begins"));
    }
    cli.run().map(|code| code == ExitCode::SUCCESS)
}

/// Says to rayon, to the tensor library and to every process that is started here how many threads they have. The tensor library, which is not told,
/// reads /proc/cpuinfo at each of its products (30 µs on two processors, and more on many).
fn set_threads(given: Option<u16>) {
    let usable = |text: String| text.parse().ok().filter(|n| (1..=1024).contains(n));
    let threads = given
        .or_else(|| std::env::var("RAYON_NUM_THREADS").ok().and_then(usable))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(1024) as u16));
    // SAFETY: no other thread has begun.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", threads.to_string())
    };
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let text = format!("{error:#}");
    eprintln!("error: {}", text.lines().next().unwrap_or_default());
    ExitCode::from(1)
}
