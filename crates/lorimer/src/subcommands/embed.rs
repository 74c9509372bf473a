//! `lorimer embed`

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use clap::Args;
use lorimer::model::embed::embed;
use lorimer::model::files::{read_bounded, write_atomic};
use serde_json::{Value, json};

use lorimer_cli::common::{ModelArgs, parse_adapter};
use lorimer_cli::pooling::PoolingArgs;
use lorimer_cli::{Global, common};

/// Largest file of texts.
const MAX_INPUT: u64 = 1 << 30;
/// Texts between two looks at whether to stop.
const PART: usize = 256;

/// Turn texts into vectors with an encoder (or a decoder, with --pooling), with or without adapters
#[derive(Args)]
pub struct Embed {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable, their changes add up
    #[arg(long, value_parser = parse_adapter)]
    adapter: Vec<(PathBuf, f64)>,
    /// Texts; `-` reads them from stdin, one a line
    text: Vec<String>,
    /// File of texts: one a line, or `.jsonl` with the key `text`
    #[arg(long, short, value_name = "FILE", conflicts_with = "text")]
    input: Option<PathBuf>,
    /// Write the vectors to a file: `.safetensors` (one tensor `embeddings`) or `.jsonl`
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    pooling: PoolingArgs,
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_string).collect()
}

fn read_input(path: &Path) -> Result<Vec<String>> {
    let bytes = read_bounded(path, MAX_INPUT)?;
    let Ok(text) = String::from_utf8(bytes) else { bail!("`{}` is not UTF-8 text", path.display()) };
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(lines(&text));
    }
    let row = |(i, line): (usize, &str)| {
        let value: Value = serde_json::from_str(line).ok()?;
        Some((i, value.get("text")?.as_str()?.to_string()))
    };
    let rows = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    rows.map(|(i, line)| {
        let found = row((i, line)).map(|(_, text)| text);
        found.with_context(|| format!("`{}`: line {} is not an object with a text `text`", path.display(), i + 1))
    })
    .collect()
}

impl Embed {
    fn texts(&self) -> Result<Vec<String>> {
        let texts = match (&self.input, self.text.as_slice()) {
            (Some(path), _) if path != Path::new("-") => read_input(path)?,
            (None, given) if !given.is_empty() && given != ["-"] => given.to_vec(),
            (None, []) => bail!("there is no text; give one, --input FILE, or `-` for stdin"),
            _ => {
                let mut text = String::new();
                std::io::stdin().take(MAX_INPUT).read_to_string(&mut text).context("stdin cannot be read as text")?;
                lines(&text)
            }
        };
        match texts.is_empty() {
            true => bail!("there is no text to embed"),
            false => Ok(texts),
        }
    }

    pub fn run(self, global: Global) -> Result<ExitCode> {
        let tensors = match self.output.as_ref().and_then(|path| path.extension()?.to_str()) {
            _ if self.output.is_none() => false,
            Some("safetensors") => true,
            Some("jsonl") => false,
            _ => bail!("--output should end in .safetensors or .jsonl"),
        };
        let texts = self.texts()?;
        let (base, pulled) = common::open_base(&self.model, global)?;
        let options = self.pooling.options(&base)?;
        let adapters = common::open_adapters(&base, &self.adapter)?;
        let attached = common::attached(&adapters)?;
        let stop = common::stop_flag();
        let mut vectors = Vec::with_capacity(texts.len());
        for part in texts.chunks(PART) {
            vectors.extend(match adapters.is_empty() {
                true => embed(&base, &lorimer::model::Frozen, part, &options)?,
                false => embed(&base, &attached, part, &options)?,
            });
            if stop.load(Ordering::Relaxed) {
                bail!("stopped after {} of {} texts; nothing was written", vectors.len(), texts.len());
            }
        }
        let width = vectors.first().map_or(0, Vec::len);
        let rows = || {
            let row = |(i, vector): (usize, &Vec<f32>)| json!({ "index": i, "embedding": vector }).to_string() + "\n";
            vectors.iter().enumerate().map(row).collect::<String>()
        };
        let Some(path) = &self.output else {
            // A reader that has gone away (a closed pipe) wants no more.
            let _ = std::io::stdout().lock().write_all(rows().as_bytes());
            return Ok(ExitCode::SUCCESS);
        };
        match tensors {
            true => {
                let all = Tensor::from_vec(vectors.concat(), (vectors.len(), width), &Device::Cpu)?;
                let bytes = safetensors::serialize(HashMap::from([("embeddings", &all)]), None)?;
                write_atomic(path, &bytes)?;
            }
            false => write_atomic(path, rows().as_bytes())?,
        }
        let json = json!({ "model": pulled.name, "texts": vectors.len(), "width": width, "output": path });
        common::print(global, &json, || format!("{} vectors of {width} are in {}", vectors.len(), path.display()))
    }
}
