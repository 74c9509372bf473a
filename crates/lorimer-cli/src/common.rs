//! What the subcommands share: opening models and adapters, progress, results.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lorimer_adapter::pruning::check_record;
use lorimer_adapter::{Adapter, Attached, StoredAdapter};
use lorimer_model::pull::{PullOptions, Pulled, pull};
use lorimer_model::{Base, LoadDtype, OpenOptions, Prepared, TextModel};
use lorimer_train::{DataReport, EncodeOptions, Example};
use serde_json::{Map, Value};

use crate::{Global, host};

/// What is said unless more or less is asked for.
pub const LOGGED: &str = "off,lorimer=info,lorimer_model=info,lorimer_adapter=info,lorimer_train=info";

/// Logs go to stderr; `LORIMER_LOG` has the last word on what is said.
pub fn start_log(quiet: bool, verbose: bool) {
    let level = match (quiet, verbose) {
        (true, _) => "off,lorimer=error",
        (_, true) => "info,lorimer=debug,lorimer_model=debug,lorimer_train=debug",
        _ => LOGGED,
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("LORIMER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
}

/// Puts the settings of `--config FILE` (YAML or JSON; keys are flag names) before the flags, so that flags win.
pub fn with_config_file(arguments: Vec<OsString>) -> Result<Vec<OsString>> {
    let text: Vec<String> = arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let at = text.iter().position(|a| a == "--config" || a.starts_with("--config="));
    let Some(at) = at.filter(|&at| at >= 2) else { return Ok(arguments) };
    let path = match text[at].strip_prefix("--config=") {
        Some(path) => path.to_string(),
        None => text.get(at + 1).cloned().context("--config needs a file")?,
    };
    let bytes = lorimer_model::files::read_bounded(Path::new(&path), 1 << 20)?;
    let content = String::from_utf8(bytes).map_err(|_| anyhow!("`{path}` is not UTF-8 text"))?;
    let values: Value = serde_saphyr::from_str(&content).map_err(|e| {
        let reason = e.to_string();
        anyhow!("`{path}` is not readable YAML: {}", reason.lines().next().unwrap_or_default())
    })?;
    let Value::Object(values) = values else { bail!("`{path}` should hold `flag: value` lines") };
    let mut all = arguments;
    all.splice(2..2, flags_of(&values, &format!("`{path}`"))?);
    Ok(all)
}

/// Settings as flags: names may have underscores, `true` is a flag alone, `false` and `null` none, and of a list each is given. `place` says where they stand.
pub fn flags_of(values: &Map<String, Value>, place: &str) -> Result<Vec<OsString>> {
    let mut flags: Vec<OsString> = Vec::new();
    for (key, value) in values {
        let flag = format!("--{}", key.replace('_', "-"));
        let mut push = |v: &Value| -> Result<()> {
            let text = match v {
                Value::String(s) => s.clone(),
                Value::Number(n) => n.to_string(),
                Value::Object(_) => v.to_string(),
                other => bail!("{place}: `{key}` should be a text, a number or a list, found {other}"),
            };
            flags.push(format!("{flag}={text}").into());
            Ok(())
        };
        match &value {
            Value::Bool(true) => flags.push(flag.into()),
            Value::Bool(false) | Value::Null => {}
            Value::Array(items) if key == "set" || key == "adapter" => items.iter().try_for_each(push)?,
            Value::Object(map) if key == "set" => {
                for (name, v) in map {
                    push(&Value::String(format!(
                        "{name}={}",
                        v.as_str().map_or_else(|| v.to_string(), str::to_string)
                    )))?;
                }
            }
            Value::Array(items) => {
                let joined: Vec<_> =
                    items.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_string)).collect();
                push(&Value::String(joined.join(",")))?;
            }
            other => push(other)?,
        }
    }
    Ok(flags)
}

/// In which type the base is kept in memory.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum DtypeFlag {
    /// 4 bytes a weight; fastest
    #[default]
    F32,
    /// 2 bytes a weight
    F16,
    /// 2 bytes a weight
    Bf16,
    /// As the file has it: 16-bit weights and GGUF blocks stay so
    Stored,
    /// NormalFloat-4 with double quantisation (QLoRA): about half a byte a weight; embedding and head as stored
    Nf4,
    /// 8 bits a weight, or the 4 of Q4_0 and Q4_1; `serve` multiplies in whole numbers: smallest and fastest there
    Int8,
}

impl From<DtypeFlag> for LoadDtype {
    fn from(flag: DtypeFlag) -> Self {
        match flag {
            DtypeFlag::F32 => Self::F32,
            DtypeFlag::F16 => Self::F16,
            DtypeFlag::Bf16 => Self::Bf16,
            DtypeFlag::Stored => Self::Stored,
            DtypeFlag::Nf4 => Self::Nf4,
            DtypeFlag::Int8 => Self::Int8,
        }
    }
}

/// The type of a name: `f32`, `nf4`, ….
pub fn dtype_of(name: &str) -> Result<LoadDtype> {
    DtypeFlag::from_str(name, false).map(Into::into).map_err(|_| {
        let all: Vec<_> = DtypeFlag::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
        let names: Vec<&str> = all.iter().map(|value| value.get_name()).collect();
        anyhow!("`{}` is no dtype; there are {}", name.escape_debug(), names.join(", "))
    })
}

/// Which base.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Base model: an alias (smollm2-135m), a Hugging Face hub id, a folder or a .gguf file
    #[arg(long, short, default_value = "smollm2-135m", visible_aliases = ["model-name-or-path", "base-model"])]
    pub model: String,
    /// Type that the base's weights are kept in; computation is in f32
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeFlag,
    /// Use this tokenizer.json instead of the model's own
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

/// Whether progress may be drawn.
pub fn draws(global: Global) -> bool {
    !global.quiet && !host::is_there() && std::io::stderr().is_terminal()
}

/// Finds (or fetches) the base and reads everything but its weights.
pub fn prepare_base(args: &ModelArgs, global: Global) -> Result<(Prepared, Pulled)> {
    let pulled = pull(&args.model, PullOptions { refresh: false, progress: draws(global) })?;
    let options = OpenOptions { dtype: args.dtype.into(), tokenizer: args.tokenizer.clone() };
    Ok((Base::prepare(&pulled.path, &options)?, pulled))
}

/// Reads the weights.
pub fn load_base(prepared: Prepared, pulled: &Pulled) -> Result<Base> {
    let base = prepared.load()?;
    tracing::info!(
        "base {} from {} ({:.0} MB in memory)",
        pulled.name,
        base.path.display(),
        base.model().bytes() as f64 / 1e6
    );
    Ok(base)
}

/// Reads the weights, unless the program around has them.
pub fn shared_base(prepared: Prepared, pulled: &Pulled) -> Result<Arc<Base>> {
    match host::base(prepared.weights.origin(), prepared.weights.load_dtype()) {
        Some(base) => Ok(base),
        None => load_base(prepared, pulled).map(Arc::new),
    }
}

/// Finds (or fetches) the base and loads it, unless the program around has it.
pub fn open_shared(args: &ModelArgs, global: Global) -> Result<(Arc<Base>, Pulled)> {
    let (prepared, pulled) = prepare_base(args, global)?;
    Ok((shared_base(prepared, &pulled)?, pulled))
}

/// Finds (or fetches) and loads the base.
pub fn open_base(args: &ModelArgs, global: Global) -> Result<(Base, Pulled)> {
    let (prepared, pulled) = prepare_base(args, global)?;
    Ok((load_base(prepared, &pulled)?, pulled))
}

/// `FOLDER` or `FOLDER=WEIGHT`.
pub fn parse_adapter(text: &str) -> Result<(PathBuf, f64), String> {
    if let Some((path, weight)) = text.rsplit_once('=')
        && !Path::new(text).exists()
    {
        let weight: f64 = weight.parse().map_err(|_| format!("the weight `{weight}` is not a number"))?;
        if !weight.is_finite() {
            return Err(format!("the weight {weight} should be a finite number"));
        }
        return Ok((PathBuf::from(path), weight));
    }
    Ok((PathBuf::from(text), 1.0))
}

/// Attaches an adapter, which must belong to this base where it says to which, fit, be whole and do something.
pub fn attach(base: &Base, stored: &StoredAdapter) -> Result<Adapter> {
    check_record(stored, &base.path, &base.model().shape().layers)?;
    Ok(Adapter::load_whole(base.model(), stored)?)
}

/// Reads and attaches adapters, each of which must fit, be whole and do something.
pub fn open_adapters(base: &Base, adapters: &[(PathBuf, f64)]) -> Result<Vec<(Adapter, f64)>> {
    let open = |(path, weight): &(PathBuf, f64)| -> Result<(Adapter, f64)> {
        let stored = StoredAdapter::read(path)?;
        if let Some(template) = stored.manifest.as_ref().and_then(|m| m.chat_template.as_ref())
            && base.text.template_source().is_none_or(|t| t != template)
        {
            tracing::warn!(
                "`{}` was trained with another chat template than the base's; answers may differ",
                path.display()
            );
        }
        Ok((attach(base, &stored)?, *weight))
    };
    adapters.iter().map(open).collect()
}

/// The adapters at work together.
pub fn attached(adapters: &[(Adapter, f64)]) -> Result<Attached<'_>> {
    Ok(Attached::weighted(adapters.iter().map(|(a, w)| (a, *w)).collect())?)
}

/// Reads and encodes a data file and says what became of its rows.
pub fn load_data(path: &Path, text: &TextModel, options: &EncodeOptions) -> Result<(Vec<Example>, DataReport)> {
    let (examples, report) = lorimer_train::data::encode::load(path, text, options)?;
    let mut notes = Vec::new();
    for (count, what) in
        [(report.skipped, "bad rows skipped"), (report.cut, "cut to the length limit"), (report.dropped, "dropped")]
    {
        if count > 0 {
            notes.push(format!("{count} {what}"));
        }
    }
    let notes = if notes.is_empty() { String::new() } else { format!("; {}", notes.join(", ")) };
    tracing::info!(
        "{}: {} format, {} rows, {:.1} tokens each of which {:.1} are supervised{notes}",
        path.display(),
        report.format,
        report.examples,
        report.tokens as f64 / report.examples as f64,
        report.supervised_tokens as f64 / report.examples as f64,
    );
    Ok((examples, report))
}

/// A bar on stderr where that is a terminal.
pub fn bar(length: u64, template: &str, global: Global) -> ProgressBar {
    if !draws(global) {
        return ProgressBar::hidden();
    }
    ProgressBar::new(length)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A flag that Ctrl-C or SIGTERM sets; a second one ends the program at once.
pub fn stop_flag() -> Arc<AtomicBool> {
    if let Some(stop) = host::stop() {
        return stop;
    }
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    let handler = ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; press Ctrl-C again to stop at once");
    });
    if let Err(error) = handler {
        tracing::warn!("Ctrl-C cannot be caught ({error}); it will end the run at once");
    }
    flag
}

/// Says that a run was interrupted, and how it goes on; a program around says so itself.
pub fn interrupted(text: &str) -> ExitCode {
    if !host::is_there() {
        eprintln!("{text}");
    }
    ExitCode::from(130)
}

/// Prints a result: JSON with `--json`, else the text.
pub fn print(global: Global, json: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<ExitCode> {
    use std::io::Write;
    if host::is_there() {
        host::keep(serde_json::to_value(json)?);
        return Ok(ExitCode::SUCCESS);
    }
    let out = if global.json { serde_json::to_string(json)? } else { text() };
    let mut stdout = std::io::stdout().lock();
    // A reader that has gone away (a closed pipe) wants no more.
    let _ = writeln!(stdout, "{}", out.trim_end()).and_then(|()| stdout.flush());
    Ok(ExitCode::SUCCESS)
}

/// Peak resident bytes of this process, where the system tells.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// `1234567` as `1.23 M`.
pub fn short(n: usize) -> String {
    match n {
        0..1000 => n.to_string(),
        1000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        _ => format!("{:.2} M", n as f64 / 1e6),
    }
}
