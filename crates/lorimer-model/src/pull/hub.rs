//! The hub's calls that a download needs: the commit of a revision, its files with sizes and hashes, their bytes in pieces. What comes goes
//! into the layout of Python's `huggingface_hub`: `blobs/HASH`, `snapshots/COMMIT/NAME` pointing there, `refs/REVISION`.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::header::{LINK, RANGE};
use reqwest::{Response, StatusCode};
use serde_json::Value;

use super::cache::{HubId, cache_root};
use super::download::{bar, check_sha256};
use crate::error::{Error, Result, first_line};
use crate::files::{MAX_JSON_BYTES, create_folder, is_plain_file_name, write_atomic};

/// Bytes asked for at a time.
const PIECE: u64 = 16 << 20;
/// What is fetched of a hub repository.
const PATTERNS: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];
/// The folder of a sentence-transformers repository, and its file, that are fetched too.
const POOLING: (&str, &str) = ("1_Pooling", "1_Pooling/config.json");
/// How long the hub has for a connection, and between two pieces of an answer.
const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(30);
/// Listings are followed over so many pages (of up to a thousand files each).
const PAGES: usize = 100;

/// A file of a repository.
struct RemoteFile {
    name: String,
    size: u64,
    /// Its name among the blobs: the SHA-256 of a file that Git LFS keeps, the git hash of another.
    hash: String,
    /// Whether the hash is a SHA-256 of the content.
    large: bool,
}

/// What was fetched of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The commit that the revision stood for.
    pub commit: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// Their names.
    pub files: Vec<String>,
}

/// `HF_TOKEN`, or what `hf auth login` left in `HF_TOKEN_PATH` or `$HF_HOME/token`.
fn token() -> Option<String> {
    let var = |name| std::env::var(name).ok().filter(|v: &String| !v.is_empty());
    if var("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let file = || {
        let home = var("HF_HOME").map_or_else(|| cache_root().join("huggingface"), PathBuf::from);
        fs::read_to_string(var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from)).ok()
    };
    let token = var("HF_TOKEN").or_else(file)?.trim().to_string();
    (!token.is_empty()).then_some(token)
}

/// The first line of an error's innermost cause, which says the most.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    first_line(&cause.to_string()).to_string()
}

fn is_hash(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a name is one of [`PATTERNS`], of which each has at most one star.
fn wanted(name: &str) -> bool {
    let fits = |pattern: &str| match pattern.split_once('*') {
        Some((head, tail)) => name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
        None => name == pattern,
    };
    name == POOLING.1 || is_plain_file_name(name) && PATTERNS.iter().any(|p| fits(p))
}

struct Hub<'a> {
    id: &'a HubId,
    /// `HF_ENDPOINT`, or the hub itself.
    endpoint: String,
    token: Option<String>,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    /// When everything has to be there.
    deadline: Option<Instant>,
}

impl<'a> Hub<'a> {
    fn new(id: &'a HubId) -> Result<Self> {
        let failed = |what: String| Error::Network(format!("no request can be made: {what}"));
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|v| !v.trim().is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
        let client = crate::http::client().connect_timeout(CONNECT).read_timeout(SILENCE);
        let client = client.user_agent(concat!("lorimer/", env!("CARGO_PKG_VERSION")));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self {
            id,
            endpoint: endpoint.trim().trim_end_matches('/').to_string(),
            token: token(),
            client: client.build().map_err(|e| failed(deepest(&e)))?,
            runtime: runtime.map_err(|e| failed(e.to_string()))?,
            deadline: None,
        })
    }

    fn failed(&self, what: impl std::fmt::Display) -> Error {
        Error::Network(format!("cannot fetch `{}/{}` from the hub ({what})", self.id.owner, self.id.name))
    }

    /// Waits for what the hub answers, up to the deadline.
    fn wait<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(async {
            match self.deadline {
                None => answer.await,
                Some(deadline) => {
                    let late = |_| self.failed("it takes too long");
                    tokio::time::timeout_at(deadline.into(), answer).await.map_err(late)?
                }
            }
        })
    }

    /// Sends a request, a second time where the first one met what passes.
    async fn send(&self, url: &str, range: Option<&str>) -> Result<Response> {
        self.ask(url, range).await?.map_err(|status| self.refused(status))
    }

    fn refused(&self, status: StatusCode) -> Error {
        self.failed(format!("status {status}; is the name right, and does HF_TOKEN allow it?"))
    }

    /// The same; the status where it is one of failure.
    async fn ask(&self, url: &str, range: Option<&str>) -> Result<std::result::Result<Response, StatusCode>> {
        for last in [false, true] {
            let mut request = self.client.get(url);
            if let Some(token) = &self.token {
                request = request.bearer_auth(token);
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let problem = match request.send().await {
                Ok(answer) if answer.status().is_success() => return Ok(Ok(answer)),
                Ok(answer) => match answer.status() {
                    s if !last && (s.is_server_error() || matches!(s.as_u16(), 408 | 429)) => None,
                    s => return Ok(Err(s)),
                },
                Err(e) if !last && (e.is_connect() || e.is_timeout()) => None,
                Err(e) => Some(deepest(&e)),
            };
            if let Some(problem) = problem {
                return Err(self.failed(problem));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        Err(self.failed("no answer"))
    }

    /// The answer's bytes, of which there may be `most`.
    async fn bytes(&self, mut answer: Response, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|e| self.failed(deepest(&e)))? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > most {
                return Err(self.failed(format!("an answer has more than {most} bytes")));
            }
        }
        Ok(bytes)
    }

    /// A JSON answer, and the query of the page after it.
    fn json(&self, path: &str) -> Result<(Value, Option<String>)> {
        self.wait(async {
            let answer = self.send(&format!("{}/api/models/{path}", self.endpoint), None).await?;
            let link = answer.headers().get(LINK).and_then(|v| v.to_str().ok()).unwrap_or_default();
            let next = link.split(',').find(|l| l.contains("rel=\"next\""));
            let next = next.and_then(|l| Some(l.split_once('?')?.1.split_once('>')?.0.to_string()));
            let bytes = self.bytes(answer, MAX_JSON_BYTES).await?;
            let value = serde_json::from_slice(&bytes);
            Ok((value.map_err(|e| self.failed(format!("an answer is not JSON: {e}")))?, next))
        })
    }

    /// The commit that the revision stands for; the status where the hub does not tell.
    fn commit(&self) -> Result<std::result::Result<String, StatusCode>> {
        let HubId { owner, name, revision } = self.id;
        let url = format!("{}/api/models/{owner}/{name}/revision/{revision}", self.endpoint);
        let info = self.wait(async {
            match self.ask(&url, None).await? {
                Ok(answer) => self.bytes(answer, MAX_JSON_BYTES).await.map(Ok),
                Err(status) => Ok(Err(status)),
            }
        })?;
        let info: Value = match info {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| self.failed(format!("an answer is not JSON: {e}")))?
            }
            Err(status) => return Ok(Err(status)),
        };
        let sha = info["sha"].as_str().filter(|sha| is_hash(sha, 40));
        sha.map(|sha| Ok(sha.to_lowercase())).ok_or_else(|| self.failed("the answer names no commit"))
    }

    /// The files that are fetched of a commit.
    fn files(&self, commit: &str) -> Result<Vec<RemoteFile>> {
        let path = format!("{}/{}/tree/{commit}", self.id.owner, self.id.name);
        let (mut files, folders) = self.listing(&path, wanted)?;
        if folders.iter().any(|name| name == POOLING.0) {
            files.extend(self.listing(&format!("{path}/{}", POOLING.0), wanted)?.0);
        }
        Ok(files)
    }

    /// The files of a folder that are fetched, and its folders.
    fn listing(&self, path: &str, wanted: impl Fn(&str) -> bool) -> Result<(Vec<RemoteFile>, Vec<String>)> {
        let (mut files, mut folders, mut query) = (Vec::new(), Vec::new(), None);
        for _ in 0..PAGES {
            let page = query.as_ref().map_or_else(|| path.to_string(), |query| format!("{path}?{query}"));
            let (entries, next) = self.json(&page)?;
            let entries = entries.as_array().ok_or_else(|| self.failed("the listing is not a list"))?;
            for entry in entries {
                let name = entry["path"].as_str().unwrap_or_default();
                if entry["type"] == "directory" {
                    folders.push(name.to_string());
                }
                if entry["type"] != "file" || !wanted(name) {
                    continue;
                }
                let large = !entry["lfs"].is_null();
                let hash = if large { &entry["lfs"]["oid"] } else { &entry["oid"] };
                let hash = hash.as_str().filter(|hash| is_hash(hash, if large { 64 } else { 40 }));
                let (Some(hash), Some(size)) = (hash, entry["size"].as_u64()) else {
                    return Err(self.failed(format!("the listing gives no hash and size of `{name}`")));
                };
                files.push(RemoteFile { name: name.to_string(), size, hash: hash.to_lowercase(), large });
            }
            match next {
                None => return Ok((files, folders)),
                some => query = some,
            }
        }
        Err(self.failed(format!("the listing has more than {PAGES} pages")))
    }

    /// Some bytes of a file: those from `from` up to `to`.
    fn piece(&self, commit: &str, file: &RemoteFile, from: u64, to: u64) -> Result<Vec<u8>> {
        let url = format!("{}/{}/{}/resolve/{commit}/{}", self.endpoint, self.id.owner, self.id.name, file.name);
        self.wait(async {
            let answer = self.send(&url, Some(&format!("bytes={from}-{}", to - 1))).await?;
            if answer.status() != StatusCode::PARTIAL_CONTENT && (from, to) != (0, file.size) {
                return Err(self.failed(format!("it sends `{}` only whole", file.name)));
            }
            let piece = self.bytes(answer, to - from).await?;
            match piece.len() as u64 == to - from {
                true => Ok(piece),
                false => Err(self.failed(format!("{} bytes of `{}` instead of {}", piece.len(), file.name, to - from))),
            }
        })
    }

    /// Writes what comes after the first `done` bytes of a file, and tells how far it is.
    fn copy(
        &self,
        commit: &str,
        file: &RemoteFile,
        (out, path): (&mut fs::File, &Path),
        mut done: u64,
        told: impl Fn(u64),
    ) -> Result<()> {
        while done < file.size {
            let end = file.size.min(done + PIECE);
            let piece = self.piece(commit, file, done, end)?;
            out.write_all(&piece).map_err(Error::io("write", path))?;
            done = end;
            told(done);
        }
        Ok(())
    }

    /// Puts a file among the blobs, going on where another download stopped.
    fn blob(&self, commit: &str, file: &RemoteFile, progress: bool) -> Result<()> {
        let blobs = self.id.folder().join("blobs");
        let blob = blobs.join(&file.hash);
        create_folder(&blobs)?;
        let partial = blobs.join(format!("{}.incomplete", file.hash));
        let mut out = loop {
            if blob.is_file() {
                return Ok(());
            }
            let out = fs::OpenOptions::new().create(true).append(true).open(&partial);
            let out = out.map_err(Error::io("write", &partial))?;
            // Two processes that want the same file come one after the other; what the first did is seen after the wait.
            match out.lock() {
                Err(e) if e.kind() != ErrorKind::Unsupported => return Err(Error::io("lock", &partial)(e)),
                _ if !blob.is_file() && partial.is_file() => break out,
                _ => {}
            }
        };
        let mut done = out.metadata().map_err(Error::io("read", &partial))?.len();
        if done > file.size {
            out.set_len(0).map_err(Error::io("write", &partial))?;
            done = 0;
        }
        let bar = bar(file.size, &file.name, progress && file.size > PIECE);
        bar.set_position(done);
        self.copy(commit, file, (&mut out, &partial), done, |done| bar.set_position(done))?;
        out.sync_all().map_err(Error::io("sync", &partial))?;
        bar.finish_and_clear();
        if file.large {
            check_sha256(&partial, &file.hash)?;
        }
        fs::rename(&partial, &blob).map_err(Error::io("rename to", &blob))
    }
}

/// Makes a snapshot's name for a blob: a relative link, or a copy on systems where links need rights.
fn name_blob(snapshot: &Path, file: &RemoteFile) -> Result<()> {
    let path = snapshot.join(&file.name);
    path.parent().map_or(Ok(()), create_folder)?;
    #[cfg(unix)]
    let made = {
        let up = if file.name.contains('/') { "../../../blobs" } else { "../../blobs" };
        std::os::unix::fs::symlink(Path::new(up).join(&file.hash), &path)
    };
    #[cfg(not(unix))]
    let made = match path.is_file() {
        true => Ok(()),
        false => fs::copy(snapshot.join("../../blobs").join(&file.hash), &path).map(|_| ()),
    };
    match made {
        // A commit's file is always the same.
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(Error::io("create", &path)(e)),
        _ => Ok(()),
    }
}

/// Fetches files of a repository by their names, each of so many bytes at most and all of `most` at most, into a folder that has none of them. What
/// came; None where the hub has no such repository, or shows it to others only.
pub(super) fn fetch_files(
    id: &HubId,
    names: &[(&str, u64)],
    folder: &Path,
    (most, deadline): (u64, Instant),
) -> Result<Option<Fetched>> {
    let hub = Hub { deadline: Some(deadline), ..Hub::new(id)? };
    let commit = match hub.commit()? {
        Ok(commit) => commit,
        // Without a token the hub does not tell what is hidden from what is not there.
        Err(status) if matches!(status.as_u16(), 401 | 403 | 404) => return Ok(None),
        Err(status) => return Err(hub.failed(format!("status {status}"))),
    };
    let bound = |name: &str| names.iter().find(|(known, _)| *known == name).map(|(_, bound)| *bound);
    let path = format!("{}/{}/tree/{commit}", id.owner, id.name);
    let (files, _) = hub.listing(&path, |name| bound(name).is_some())?;
    let large = |what: &str, size: u64, most: u64| {
        let HubId { owner, name, .. } = id;
        Error::Unsupported(format!("{what} of `{owner}/{name}` on the hub has {size} bytes, at most {most} are taken"))
    };
    if let Some(file) = files.iter().find(|file| bound(&file.name).is_none_or(|most| file.size > most)) {
        return Err(large(&format!("`{}`", file.name), file.size, bound(&file.name).unwrap_or(0)));
    }
    let bytes = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.size));
    if bytes > most {
        return Err(large("the whole", bytes, most));
    }
    for file in &files {
        let path = folder.join(&file.name);
        let mut out = fs::File::create_new(&path).map_err(Error::io("write", &path))?;
        hub.copy(&commit, file, (&mut out, &path), 0, |_| ())?;
        out.sync_all().map_err(Error::io("sync", &path))?;
        if file.large {
            check_sha256(&path, &file.hash)?;
        }
    }
    Ok(Some(Fetched { commit, bytes, files: files.into_iter().map(|file| file.name).collect() }))
}

/// Fetches what is missing of a model; the folder of its files.
pub(super) fn fetch(id: &HubId, progress: bool) -> Result<PathBuf> {
    let hub = Hub::new(id)?;
    let commit = hub.commit()?.map_err(|status| hub.refused(status))?;
    let files = hub.files(&commit)?;
    for file in &files {
        hub.blob(&commit, file, progress)?;
    }
    let snapshot = id.folder().join("snapshots").join(&commit);
    create_folder(&snapshot)?;
    files.iter().try_for_each(|file| name_blob(&snapshot, file))?;
    if id.revision != commit {
        write_atomic(&id.folder().join("refs").join(&id.revision), commit.as_bytes())?;
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_model_needs_is_fetched() {
        for name in ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"] {
            assert!(wanted(name), "{name}");
        }
        for name in ["README.md", "model.bin", "xmodel.safetensors", "onnx/model.safetensors", "model/../x.safetensors"]
        {
            assert!(!wanted(name), "{name}");
        }
    }
}
