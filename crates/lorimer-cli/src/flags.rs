//! Flags that several subcommands share: the adapter's, and those of memory and speed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use lorimer_adapter::methods::{self, Entry, OptimizerChoice};
use lorimer_adapter::training::Adam;
use lorimer_adapter::{Method, StoredAdapter};
use lorimer_model::{LoadDtype, Prepared};
use lorimer_train::run::attention::AttentionGradient;
use lorimer_train::run::frozen::FrozenCache;
use lorimer_train::run::plan::{Plan, Request, Work, plan};
use lorimer_train::run::step::StepOptions;
use serde_json::{Map, Value, json};

/// What is trained.
#[derive(Args, Clone)]
pub struct AdapterArgs {
    /// Method; `lorimer methods` lists them
    #[arg(long, default_value = "lora", help_heading = "Adapter")]
    pub method: String,
    /// Rank r [default: the method's own; 8 for lora]
    #[arg(long, short, help_heading = "Adapter", visible_aliases = ["lora-r", "lora-rank"])]
    pub rank: Option<usize>,
    /// Alpha; the change is multiplied by alpha/rank [default: the method's own; twice the rank for lora]
    #[arg(long, help_heading = "Adapter", visible_alias = "lora-alpha")]
    alpha: Option<f64>,
    /// Dropout before the adapter, in training
    #[arg(long, help_heading = "Adapter", visible_alias = "lora-dropout")]
    dropout: Option<f64>,
    /// all-linear, a list (q_proj,v_proj) or a regular expression over the whole path [default: the method's own; all-linear for
    /// all but hydra]
    #[arg(long, help_heading = "Adapter", visible_aliases = ["lora-target-modules", "lora-target"])]
    target_modules: Option<String>,
    /// Modules to leave out, as a list or a regular expression
    #[arg(long, help_heading = "Adapter")]
    exclude_modules: Option<String>,
    /// Only these layers, counted from 0
    #[arg(long, value_delimiter = ',', help_heading = "Adapter", visible_alias = "layers-to-transform")]
    layers: Vec<usize>,
    /// Modules to train whole and save beside the adapter (lm_head, embed_tokens, norm)
    #[arg(long, value_delimiter = ',', help_heading = "Adapter")]
    modules_to_save: Vec<String>,
    /// Start; for lora: true, gaussian, orthogonal, pissa, pissa_niter_N, olora, eva
    #[arg(long, help_heading = "Adapter", visible_alias = "init-lora-weights")]
    init: Option<String>,
    /// alpha/sqrt(rank) in place of alpha/rank
    #[arg(long, help_heading = "Adapter", visible_alias = "use-rslora")]
    rslora: bool,
    /// Biases that are trained: none, all, lora_only
    #[arg(long, help_heading = "Adapter")]
    bias: Option<String>,
    /// Adapter folder to begin from, with its method and settings; for xlora a trained LoRA that the new adapter mixes, repeatable, their
    /// order counts
    #[arg(long = "adapter", value_name = "FOLDER", help_heading = "Adapter")]
    experts: Vec<PathBuf>,
    /// Any field of the method's configuration: KEY=VALUE, the value in JSON or plain; repeatable
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Adapter")]
    set: Vec<String>,
}

/// `all-linear` or a regular expression stays a text; names with commas, or one plain name, are a list.
pub fn names(text: &str) -> Value {
    let plain = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.'));
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    match text != "all-linear" && parts.iter().all(|p| plain(p)) {
        true => json!(parts),
        false => json!(text),
    }
}

impl AdapterArgs {
    /// The same flags for another process.
    pub fn to_flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--method={}", self.method)];
        let join = |list: Vec<String>| Some(list.join(",")).filter(|s| !s.is_empty());
        let optional = [
            ("--rank", self.rank.map(|r| r.to_string())),
            ("--alpha", self.alpha.map(|a| a.to_string())),
            ("--dropout", self.dropout.map(|d| d.to_string())),
            ("--target-modules", self.target_modules.clone()),
            ("--exclude-modules", self.exclude_modules.clone()),
            ("--layers", join(self.layers.iter().map(usize::to_string).collect())),
            ("--modules-to-save", join(self.modules_to_save.clone())),
            ("--init", self.init.clone()),
            ("--bias", self.bias.clone()),
        ];
        flags.extend(optional.into_iter().filter_map(|(flag, value)| Some(format!("{flag}={}", value?))));
        flags.extend(self.rslora.then(|| "--rslora".to_string()));
        flags.extend(self.set.iter().map(|pair| format!("--set={pair}")));
        flags.extend(self.experts.iter().map(|folder| format!("--adapter={}", folder.display())));
        flags
    }

    /// The method's line in the registry.
    pub fn entry(&self) -> Result<&'static Entry> {
        Ok(methods::entry(&self.method)?)
    }

    /// The learning rate that the method takes with its settings unless told otherwise.
    pub fn learning_rate(&self) -> Result<f64> {
        Ok(self.build(None)?.learning_rate().unwrap_or(self.entry()?.lr))
    }

    /// The adapter that training begins from, where `--adapter` names one and the method is not made of others.
    pub fn start(&self) -> Result<Option<StoredAdapter>> {
        if self.experts.is_empty() || methods::build(&self.method, &Map::new())?.mixes() {
            return Ok(None);
        }
        let [folder] = &self.experts[..] else {
            bail!(
                "training begins from one adapter, and --adapter names {}; `--method xlora` mixes several",
                self.experts.len()
            );
        };
        let own =
            self.to_flags().into_iter().find(|flag| !flag.starts_with("--method=") && !flag.starts_with("--adapter="));
        if let Some(flag) = own {
            let flag = flag.split('=').next().unwrap_or_default().to_string();
            bail!("`{}` brings its own settings; leave {flag} out", folder.display());
        }
        let stored = StoredAdapter::read(folder)?;
        let method = methods::from_adapter_config(&stored.config)?;
        if method.name() != self.method {
            bail!("`{}` is an adapter of `{}`; pass --method {}", folder.display(), method.name(), method.name());
        }
        Ok(Some(stored))
    }

    /// The method with its settings, in PEFT's keys. `first_rate`: the rate of the run's first step, which a method's start may depend on.
    pub fn build(&self, first_rate: Option<f64>) -> Result<Box<dyn Method>> {
        let entry = self.entry()?;
        if let Some(stored) = self.start()? {
            return Ok(methods::from_adapter_config(&stored.config)?);
        }
        let given = [
            ("rank", self.rank.map(|r| json!(r))),
            ("alpha", self.alpha.map(|a| json!(a))),
            ("dropout", self.dropout.map(|d| json!(d))),
            ("init", self.init.as_ref().map(|i| json!(i))),
            ("rslora", self.rslora.then(|| json!(true))),
            ("bias", self.bias.as_ref().map(|b| json!(b))),
        ];
        let mut map = Map::new();
        if let Some(targets) = &self.target_modules {
            map.insert("target_modules".into(), names(targets));
        }
        let key_of = |flag: &str| entry.flags.iter().find(|(f, _)| *f == flag).map(|(_, key)| key.to_string());
        for (flag, value) in given {
            let Some(value) = value else { continue };
            let key = key_of(flag).ok_or_else(|| {
                let known: Vec<String> = entry.flags.iter().map(|(f, _)| format!("--{f}")).collect();
                anyhow!("`{}` has no --{flag}; it has {}", entry.name, known.join(", "))
            })?;
            map.insert(key, value);
        }
        if let (Some(rate), Some(key)) = (first_rate, key_of("lr")) {
            map.insert(key, json!(rate));
        }
        if let Some(exclude) = &self.exclude_modules {
            map.insert("exclude_modules".into(), names(exclude));
        }
        if !self.layers.is_empty() {
            map.insert("layers_to_transform".into(), json!(self.layers));
        }
        if !self.modules_to_save.is_empty() {
            map.insert("modules_to_save".into(), json!(self.modules_to_save));
        }
        for pair in &self.set {
            let (key, value) = pair.split_once('=').ok_or_else(|| anyhow!("--set {pair} should be KEY=VALUE"))?;
            map.insert(key.to_string(), serde_json::from_str(value).unwrap_or_else(|_| json!(value)));
        }
        let mut method = methods::build(&self.method, &map)?;
        let part = |folder: &PathBuf| StoredAdapter::read(folder)?.into_part();
        method.take_parts(&self.experts.iter().map(part).collect::<Result<Vec<_>, _>>()?)?;
        Ok(method)
    }
}

/// Whether layers are computed again in the backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Checkpointing {
    /// Keep what the backward needs; fastest
    Off,
    /// Keep the layers' inputs only, and compute each layer again in the backward
    On,
    /// On where the run would not fit into memory otherwise
    #[default]
    Auto,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum FrozenCacheFlag {
    /// In memory up to 1 GiB, else on disk up to 16 GiB, else nowhere
    #[default]
    Auto,
    /// Nowhere
    Off,
    /// In memory
    Memory,
    /// In a file in --output that is gone when the run ends
    Disk,
}

/// How steps are taken and what they may take.
#[derive(Args, Clone)]
pub struct StepArgs {
    /// adamw, adamw-8bit (2 bytes of state a parameter), galore, galore-8bit, lora-pro or lora-pro-full, with settings behind it:
    /// galore:rank=64,scale=0.25 [default: the method's own, else adamw]
    #[arg(long, value_name = "NAME[:KEY=VALUE,…]", help_heading = "Memory and speed", visible_alias = "optim")]
    optimizer: Option<OptimizerChoice>,
    /// Keep less in memory and compute layers again in the backward
    #[arg(
        long, value_enum, default_value_t, num_args = 0..=1, default_missing_value = "on",
        help_heading = "Memory and speed", visible_alias = "gradient-checkpointing"
    )]
    checkpointing: Checkpointing,
    /// Where the output of frozen lower layers is kept from epoch to epoch, if only upper layers are adapted
    #[arg(long, value_enum, default_value_t, help_heading = "Memory and speed")]
    frozen_cache: FrozenCacheFlag,
    /// Compute every row whole, even what rows of a batch begin with in common
    #[arg(long, help_heading = "Memory and speed")]
    no_share_prefixes: bool,
    /// Most memory that the run may take: 600MB, 4GiB, … [default: what the machine has free]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, help_heading = "Memory and speed")]
    pub memory_limit: Option<u64>,
}

/// `600MB`, `1.5 GiB`, `2000000`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        "tib" => 1024f64.powi(4),
        _ => return Err(format!("`{text}` should be a size such as 600MB or 4GiB")),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n * factor < 1e18 => Ok((n * factor) as u64),
        _ => Err(format!("`{text}` should be a size such as 600MB or 4GiB")),
    }
}

/// `1.15 GB`.
pub fn show_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// Memory that a new process can have, where the system tells: what Linux calls available, or what the control group leaves.
pub fn free_memory() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024;
    let group = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    let Some((most, used)) = group else { return Some(machine) };
    // Cached files count as used by the group, and are given up when memory is wanted.
    let statistics = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let cached = |name: &str| statistics.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cached = cached("active_file ").unwrap_or(0) + cached("inactive_file ").unwrap_or(0);
    Some(machine.min(most.saturating_sub(used.saturating_sub(cached))))
}

/// What to change so that a run fits.
pub struct Proposal {
    /// The flags.
    pub flags: String,
    /// What the run would then take.
    pub plan: Plan,
}

/// A run that is to be planned.
pub struct Planned<'a> {
    /// The base's files.
    pub prepared: &'a Prepared,
    /// The method.
    pub method: &'a dyn Method,
    /// Rows of a step.
    pub batch_size: usize,
    /// Whether there is a further term of the loss.
    pub objective: bool,
    /// How gradients of attention are computed.
    pub attention_gradient: AttentionGradient,
    /// The work with so many rows in a micro-batch.
    pub work: Box<dyn Fn(usize) -> Work + 'a>,
}

impl StepArgs {
    /// The options, with checkpointing as it was decided.
    pub fn options(&self, checkpointing: bool) -> StepOptions {
        StepOptions { share_prefixes: !self.no_share_prefixes, checkpointing, frozen_cache: self.frozen_cache() }
    }

    /// What was asked for, if anything.
    pub fn optimizer(&self) -> Option<OptimizerChoice> {
        self.optimizer.clone()
    }

    /// The optimiser of a run.
    pub fn optimizer_of(&self, method: &dyn Method) -> OptimizerChoice {
        self.optimizer().or(method.training().optimizer.map(OptimizerChoice)).unwrap_or_default()
    }

    /// Where the output of frozen lower layers is kept.
    pub fn frozen_cache(&self) -> FrozenCache {
        match self.frozen_cache {
            FrozenCacheFlag::Auto => FrozenCache::Auto,
            FrozenCacheFlag::Off => FrozenCache::Off,
            FrozenCacheFlag::Memory => FrozenCache::Memory,
            FrozenCacheFlag::Disk => FrozenCache::Disk,
        }
    }

    /// The same flags for another process.
    pub fn to_flags(&self) -> Vec<String> {
        let name =
            |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_string()).unwrap_or_default();
        let mut flags = vec![
            format!("--checkpointing={}", name(self.checkpointing.to_possible_value())),
            format!("--frozen-cache={}", name(self.frozen_cache.to_possible_value())),
        ];
        flags.extend(self.optimizer.as_ref().map(|o| format!("--optimizer={}", o.spec())));
        flags.extend(self.no_share_prefixes.then(|| "--no-share-prefixes".to_string()));
        flags.extend(self.memory_limit.map(|limit| format!("--memory-limit={limit}")));
        flags
    }

    /// Whether checkpointing is asked for outright.
    pub fn checkpoints(&self) -> bool {
        self.checkpointing == Checkpointing::On
    }

    /// Whether layers may be computed again in the backward, where memory asks for it.
    pub fn may_checkpoint(&self) -> bool {
        self.checkpointing != Checkpointing::Off
    }

    fn plan_with(
        &self,
        run: &Planned<'_>,
        (checkpointing, dtype, batch_size, optimizer): (bool, LoadDtype, usize, OptimizerChoice),
    ) -> Result<Plan> {
        let Prepared { config, weights, .. } = run.prepared;
        Ok(plan(&Request {
            config,
            base_bytes: config.planned_bytes(weights, dtype)?,
            file_bytes: weights.file_bytes(),
            method: run.method,
            work: (run.work)(batch_size),
            checkpointing,
            optimizer,
            objective: run.objective,
            frozen_cache: self.frozen_cache(),
            attention_gradient: run.attention_gradient,
        })?)
    }

    /// The prediction and whether to checkpoint, under the limit.
    pub fn decide(&self, run: &Planned<'_>, limit: Option<u64>) -> Result<(Plan, bool)> {
        let dtype = run.prepared.weights.load_dtype();
        let optimizer = self.optimizer_of(run.method);
        let with = |checkpointing| self.plan_with(run, (checkpointing, dtype, run.batch_size, optimizer.clone()));
        match self.checkpointing {
            Checkpointing::Off => Ok((with(false)?, false)),
            Checkpointing::On => Ok((with(true)?, true)),
            Checkpointing::Auto => {
                let plan = with(false)?;
                match limit {
                    Some(limit) if plan.peak_bytes > limit => Ok((with(true)?, true)),
                    _ => Ok((plan, false)),
                }
            }
        }
    }

    /// Changes that make the run fit, the least costly first; the last is the smallest there is, if none fits.
    pub fn proposals(&self, run: &Planned<'_>, limit: u64) -> Result<Vec<Proposal>> {
        let now = run.prepared.weights.load_dtype();
        let batches = std::iter::successors(Some(run.batch_size), |b| Some(b / 2).filter(|&b| b > 0));
        let own = self.optimizer_of(run.method);
        let mut optimizers = vec![own.clone()];
        optimizers.extend(own.is_adamw().then(|| OptimizerChoice(Arc::new(Adam { eight_bit: true }))));
        let tries: Vec<(usize, OptimizerChoice)> =
            batches.flat_map(|b| optimizers.iter().map(move |o| (b, o.clone()))).collect();
        let smaller = [LoadDtype::Bf16, LoadDtype::Nf4].into_iter().filter(|_| now == LoadDtype::F32);
        let mut found: Vec<Proposal> = Vec::new();
        let mut smallest: Option<Proposal> = None;
        // For each way to keep the base, the largest batch that fits: smaller ones only cost time.
        for dtype in std::iter::once(now).chain(smaller) {
            for (batch, optimizer) in tries.clone() {
                let plan = self.plan_with(run, (true, dtype, batch, optimizer.clone()))?;
                let mut flags = vec!["--checkpointing on".to_string()];
                if batch != run.batch_size {
                    let steps = run.batch_size.div_ceil(batch);
                    flags.push(format!("--batch-size {batch} --gradient-accumulation {steps}"));
                }
                match dtype {
                    _ if dtype == now => {}
                    LoadDtype::Nf4 => flags.push("--dtype nf4".into()),
                    _ => flags.push("--dtype bf16".into()),
                }
                if optimizer != own {
                    flags.push("--optimizer adamw-8bit".into());
                }
                let proposal = Proposal { flags: flags.join(" "), plan };
                if plan.peak_bytes <= limit {
                    found.push(proposal);
                    break;
                }
                if smallest.as_ref().is_none_or(|s| plan.peak_bytes < s.plan.peak_bytes) {
                    smallest = Some(proposal);
                }
            }
        }
        if found.is_empty() {
            found.extend(smallest);
        }
        Ok(found)
    }

    /// [`Self::decide`], or a refusal with advice.
    pub fn check(&self, run: &Planned<'_>) -> Result<(Plan, bool)> {
        let limit = self.memory_limit.or_else(free_memory);
        let (plan, checkpointing) = self.decide(run, limit)?;
        let Some(limit) = limit.filter(|&limit| plan.peak_bytes > limit) else { return Ok((plan, checkpointing)) };
        let proposals = self.proposals(run, limit)?;
        let advice = match proposals.first() {
            Some(p) if p.plan.peak_bytes <= limit => format!("pass `{}` ({})", p.flags, show_bytes(p.plan.peak_bytes)),
            Some(p) => format!(
                "even `{}` takes {}; use a smaller base, a shorter --max-length or a smaller --rank",
                p.flags,
                show_bytes(p.plan.peak_bytes)
            ),
            None => "use a smaller base".to_string(),
        };
        let whose = if self.memory_limit.is_some() { "--memory-limit allows" } else { "are free" };
        bail!(
            "the run would take {} of memory and {} {whose}: {advice}; `lorimer plan` shows what takes it",
            show_bytes(plan.peak_bytes),
            show_bytes(limit)
        )
    }
}

/// A folder or file name without its path.
pub fn file_name(path: &Path) -> Option<String> {
    path.file_name().map(|n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("600MB"), Ok(600_000_000));
        assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("2000000"), Ok(2_000_000));
        for bad in ["", "GB", "-1GB", "4 apples", "1e30", "nan", "0"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
