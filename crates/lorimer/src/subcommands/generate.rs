//! `lorimer generate`

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::serve::{Sampling, generate};
use serde_json::json;

use lorimer_cli::common::{ModelArgs, parse_adapter};
use lorimer_cli::{Global, common};

/// Answer a prompt, with or without adapters; text appears as it is made
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable, their changes add up
    #[arg(long, value_parser = parse_adapter)]
    adapter: Vec<(PathBuf, f64)>,
    /// The user's message; `-` reads it from stdin
    #[arg(long, short)]
    prompt: String,
    /// A system message before it
    #[arg(long)]
    system: Option<String>,
    /// Take the prompt as plain text, without chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// Most tokens to generate
    #[arg(long, default_value_t = 256, visible_alias = "max-new-tokens")]
    max_tokens: usize,
    /// 0 takes the likeliest token each time (greedy); higher is more random
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the k likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens at least this times as likely as the likeliest
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Above 1 makes tokens that were seen less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Seed of the random choices
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop when this text appears; repeatable
    #[arg(long)]
    stop: Vec<String>,
}

impl Generate {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            ..Default::default()
        };
        if let Err(problem) = sampling.check() {
            bail!("{problem}");
        }
        let mut prompt = self.prompt;
        if prompt == "-" {
            prompt.clear();
            std::io::stdin().take(16 << 20).read_to_string(&mut prompt)?;
        }
        let (base, _) = common::open_shared(&self.model, global)?;
        base.config.decoder("`lorimer generate`")?;
        let adapters = common::open_adapters(&base, &self.adapter)?;
        let tokens = match self.raw {
            true => base.text.encode(&prompt, true)?.ids,
            false => {
                let mut messages = Vec::new();
                messages.extend(self.system.map(|s| json!({ "role": "system", "content": s })));
                messages.push(json!({ "role": "user", "content": prompt }));
                let text = base.text.needed_template()?.render(&messages, None, true)?;
                base.text.encode(&text, false)?.ids
            }
        };
        let clock = Instant::now();
        let attached = common::attached(&adapters)?;
        let show = |piece: &str| {
            if !global.json {
                let mut out = std::io::stdout().lock();
                let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
            }
        };
        let g = generate(
            base.model(),
            &base.text,
            &attached,
            &tokens,
            self.max_tokens,
            &sampling,
            self.seed,
            &self.stop,
            show,
        )?;
        let seconds = clock.elapsed().as_secs_f64();
        tracing::debug!("{} tokens in {seconds:.2} s", g.tokens);
        let mut json = serde_json::to_value(&g)?;
        json["seconds"] = seconds.into();
        common::print(global, &json, String::new)
    }
}
