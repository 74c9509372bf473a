//! The `lorimer` command line: one file a verb.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

mod common;
mod compare_report;
mod flags;
mod verbs;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Fine-tune, inspect, merge and run low-rank adapters (LoRA and its kin) on the machine you have
#[derive(Parser)]
#[command(name = "lorimer", version, propagate_version = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

/// Flags of every verb.
#[derive(Args, Clone, Copy)]
struct Global {
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Say less on stderr
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Say more on stderr
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    verbose: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Fetch a small model, fine-tune it on real text, and show what it learnt
    Quickstart(verbs::quickstart::Quickstart),
    /// Fetch a base model into the cache
    Pull(verbs::pull::Pull),
    /// Fine-tune an adapter
    Train(Box<verbs::train::Train>),
    /// Predict peak memory and time of a training run, and propose settings that fit
    Plan(Box<verbs::plan::PlanVerb>),
    /// Measure loss, perplexity, exact matches and choice accuracy
    Eval(verbs::eval::Eval),
    /// Answer a prompt
    Generate(verbs::generate::Generate),
    /// Serve a base and its adapters over HTTP
    Serve(Box<verbs::serve::Serve>),
    /// Merge adapters into the base's weights
    Merge(verbs::merge::Merge),
    /// Convert an adapter between PEFT, llama.cpp GGUF and kohya-style files
    Convert(verbs::convert::Convert),
    /// The nearest LoRA of a full tune
    Extract(verbs::extract::Extract),
    /// Cut a LoRA to its first ranks
    Resize(verbs::resize::Resize),
    /// Change sparse adapters under one base in memory, in milliseconds
    Switch(verbs::switch::Switch),
    /// Show what is in an adapter
    Inspect(verbs::inspect::Inspect),
    /// Check that an adapter fits its base, does something, and answers as it did when it was trained
    Check(verbs::check::Check),
    /// Measure speed and memory, alone or against a peer
    Bench(verbs::bench::Bench),
    /// Compare methods on tasks: sweeps, runs, tables and plots
    Compare(verbs::compare::Compare),
    /// One run of a comparison
    #[command(hide = true)]
    CompareRun(verbs::compare_run::CompareRun),
    /// List the methods
    Methods(verbs::methods::Methods),
}

fn main() -> ExitCode {
    lorimer::tensor::memory::keep_freed_pages();
    let arguments = match common::with_config_file(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error),
    };
    let cli = Cli::parse_from(arguments);
    common::start_log(cli.global.quiet, cli.global.verbose);
    if let Err(problem) = lorimer::tensor::kernels::cpu::check() {
        return fail(&anyhow::anyhow!(problem));
    }
    let result = match cli.verb {
        Verb::Quickstart(v) => v.run(cli.global),
        Verb::Pull(v) => v.run(cli.global),
        Verb::Train(v) => v.run(cli.global),
        Verb::Plan(v) => v.run(cli.global),
        Verb::Eval(v) => v.run(cli.global),
        Verb::Generate(v) => v.run(cli.global),
        Verb::Serve(v) => v.run(cli.global),
        Verb::Merge(v) => v.run(cli.global),
        Verb::Convert(v) => v.run(cli.global),
        Verb::Extract(v) => v.run(cli.global),
        Verb::Resize(v) => v.run(cli.global),
        Verb::Switch(v) => v.run(cli.global),
        Verb::Inspect(v) => v.run(cli.global),
        Verb::Check(v) => v.run(cli.global),
        Verb::Bench(v) => v.run(cli.global),
        Verb::Compare(v) => v.run(cli.global),
        Verb::CompareRun(v) => v.run(cli.global),
        Verb::Methods(v) => v.run(cli.global),
    };
    tracing::debug!("peak memory {} bytes", common::peak_bytes().unwrap_or_default());
    match result {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let text = format!("{error:#}");
    eprintln!("error: {}", text.lines().next().unwrap_or_default());
    ExitCode::from(1)
}
