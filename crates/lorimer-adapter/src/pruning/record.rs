//! `pruning.json`: which units of a base a smaller model keeps.

use std::path::{Path, PathBuf};

use lorimer_model::decoder::DecoderConfig;
use lorimer_model::decoder::config::sites_of;
use lorimer_model::files::read_json;
use lorimer_model::weights::hex;
use lorimer_model::{LayerShape, Site};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::origin::{BaseIdentity, PrunedFrom};
use super::units::KeptLayer;
use crate::error::{Error, Result};
use crate::file::store::StoredAdapter;
use crate::part::Part;

/// The file beside the smaller model.
pub const PRUNING_FILE: &str = "pruning.json";
/// Largest such file: 1024 layers of some ten thousand channels.
const MAX_BYTES: u64 = 256 << 20;
/// Most layers.
const MAX_LAYERS: usize = 1024;
/// Widest hidden state, and the largest vocabulary.
const MAX_HIDDEN: usize = 1 << 20;
const MAX_VOCABULARY: usize = 1 << 24;
/// Most rows of queries, keys, values or channels for each number of the hidden state; models have up to about 8. One factor of an adapter is as
/// wide as the hidden state, so that what a record makes of an adapter is bounded by the adapter's own size.
const MAX_WIDTH: usize = 64;
/// Version of the format.
const FORMAT: u32 = 1;

/// Shape of a layer before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WholeLayer {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Channels.
    pub channels: usize,
}

impl WholeLayer {
    /// What is wrong beside a hidden state of this width, in words.
    fn check(&self, hidden: usize) -> std::result::Result<(), String> {
        let Self { heads, kv_heads, head_dim, channels } = *self;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!("{heads} query heads do not divide into {kv_heads} key-value heads"));
        }
        let fits = |rows: usize| rows > 0 && rows <= MAX_WIDTH * hidden;
        if !fits(heads.saturating_mul(head_dim)) || !fits(channels) {
            return Err(format!(
                "{heads} heads of {head_dim} and {channels} channels beside a hidden state of {hidden}; both should be between 1 and {MAX_WIDTH} times as wide"
            ));
        }
        Ok(())
    }
}

impl From<&LayerShape> for WholeLayer {
    fn from(s: &LayerShape) -> Self {
        Self { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim, channels: s.inner }
    }
}

impl From<&WholeLayer> for LayerShape {
    fn from(s: &WholeLayer) -> Self {
        Self { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim, inner: s.channels }
    }
}

/// Which units of a base a smaller model keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pruning {
    /// Version of this file's format.
    pub format: u32,
    /// `sha256:…` over all the rest.
    pub id: String,
    /// The whole base.
    pub base: BaseIdentity,
    /// `rand`, `stru` or `loraprune`.
    pub method: String,
    /// How the units were chosen: ratio, seed, layers left whole.
    pub settings: Value,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Number of tokens known.
    pub vocabulary: usize,
    /// Whether q, k, v are one projection, and gate and up another.
    pub fused: bool,
    /// The base's layers.
    pub whole: Vec<WholeLayer>,
    /// What is kept of each.
    pub kept: Vec<KeptLayer>,
}

impl Pruning {
    /// The record of a choice.
    ///
    /// # Errors
    ///
    /// Fails if the choice is none of the base's units.
    pub fn new(
        config: &DecoderConfig,
        base: BaseIdentity,
        (method, settings): (&str, Value),
        kept: Vec<KeptLayer>,
    ) -> Result<Self> {
        let mut pruning = Self {
            format: FORMAT,
            id: String::new(),
            base,
            method: method.to_string(),
            settings,
            hidden: config.hidden_size,
            vocabulary: config.vocab_size,
            fused: config.fused,
            whole: config.layers.iter().map(WholeLayer::from).collect(),
            kept,
        };
        pruning.id = pruning.own_id();
        pruning.check().map_err(Error::Config)?;
        Ok(pruning)
    }

    /// What its id should be: `sha256:…` over all the rest.
    pub fn own_id(&self) -> String {
        let bare = Self { id: String::new(), ..self.clone() };
        format!("sha256:{}", hex(&Sha256::digest(serde_json::to_vec(&bare).unwrap_or_default())))
    }

    /// What is wrong, in words.
    fn check(&self) -> std::result::Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("has format {}, {FORMAT} is known", self.format));
        }
        if self.kept.len() != self.whole.len() || self.whole.is_empty() || self.whole.len() > MAX_LAYERS {
            return Err(format!("keeps units of {} layers where the base has {}", self.kept.len(), self.whole.len()));
        }
        if !(1..=MAX_HIDDEN).contains(&self.hidden) || !(1..=MAX_VOCABULARY).contains(&self.vocabulary) {
            return Err(format!(
                "has a hidden state of {} and {} tokens, which cannot be; up to {MAX_HIDDEN} and {MAX_VOCABULARY} are read",
                self.hidden, self.vocabulary
            ));
        }
        for (i, (whole, kept)) in self.whole.iter().zip(&self.kept).enumerate() {
            whole.check(self.hidden).map_err(|problem| format!("has a layer {i} that cannot be: {problem}"))?;
            kept.check(&whole.into()).map_err(|problem| format!("layer {i}: {problem}"))?;
        }
        match self.id == self.own_id() {
            true => Ok(()),
            false => Err("is not what was written: its id is another than that of its content".into()),
        }
    }

    /// Reads the record.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, is too large, is no such record, or was changed.
    pub fn read(path: &Path) -> Result<Self> {
        let pruning: Self = read_json(path, MAX_BYTES)?;
        pruning.check().map_err(|problem| lorimer_model::Error::invalid(path, problem))?;
        Ok(pruning)
    }

    /// The record beside a model in a folder, where there is one.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::read`] does.
    pub fn of_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(PRUNING_FILE);
        if path.is_file() { Self::read(&path).map(Some) } else { Ok(None) }
    }

    /// The base's layers.
    pub fn layers(&self) -> Vec<LayerShape> {
        self.whole.iter().map(LayerShape::from).collect()
    }

    /// The smaller model's layers.
    pub fn kept_layers(&self) -> Vec<LayerShape> {
        self.whole.iter().zip(&self.kept).map(|(whole, kept)| kept.shape(&whole.into())).collect()
    }

    /// The base's projections.
    pub fn sites(&self) -> Vec<Site> {
        sites_of(self.hidden, self.vocabulary, self.fused, &self.layers())
    }

    /// The smaller model's projections.
    pub fn kept_sites(&self) -> Vec<Site> {
        sites_of(self.hidden, self.vocabulary, self.fused, &self.kept_layers())
    }

    /// What an adapter's `lorimer.json` says of it.
    pub fn identity(&self) -> PrunedFrom {
        PrunedFrom {
            pruning: self.id.clone(),
            name: self.base.name.clone(),
            fingerprint: self.base.fingerprint.clone(),
            layers: triples(&self.kept_layers()),
        }
    }
}

fn triples(layers: &[LayerShape]) -> Vec<[usize; 3]> {
    layers.iter().map(|layer| [layer.heads, layer.kv_heads, layer.inner]).collect()
}

/// The record beside the model of a folder whose layers are these.
///
/// # Errors
///
/// Fails if there is one that cannot be read, or that is of other layers.
pub fn record_beside(folder: &Path, layers: &[LayerShape]) -> Result<Option<Pruning>> {
    let found = Pruning::of_folder(folder)?;
    match &found {
        Some(pruning) if pruning.kept_layers() != layers => Err(Error::Mismatch(format!(
            "`{}` is of a model with other layers than the one beside it",
            folder.join(PRUNING_FILE).display()
        ))),
        _ => Ok(found),
    }
}

/// An adapter, or one that another is made of, and the base that it was trained on.
type OnBase<'a> = (&'a Path, &'a BaseIdentity);

fn of_parts(parts: &[Part]) -> impl Iterator<Item = OnBase<'_>> {
    parts.iter().filter_map(|part| Some((part.path.as_path(), part.base.as_ref()?)))
}

/// An adapter and those that it is made of, as far as they say what their base was.
fn bases(stored: &StoredAdapter) -> impl Iterator<Item = OnBase<'_>> {
    let own = stored.manifest.as_ref().and_then(|m| m.base.as_ref());
    own.map(|base| (stored.path.as_path(), base)).into_iter().chain(of_parts(&stored.parts))
}

/// Refuses an adapter of a smaller model on a model of other layers: what it was trained on is not there.
///
/// # Errors
///
/// Fails if it is one.
pub(crate) fn refuse_elsewhere(stored: &StoredAdapter, layers: &[LayerShape]) -> Result<()> {
    let other = |(path, base): OnBase<'_>| match base.pruned.as_ref() {
        Some(pruned) if pruned.layers != triples(layers) => Err(elsewhere(path, pruned)),
        _ => Ok(()),
    };
    bases(stored).try_for_each(other)
}

fn elsewhere(adapter: &Path, pruned: &PrunedFrom) -> Error {
    let name: String = pruned.name.chars().take(80).collect();
    Error::Mismatch(format!(
        "`{}` was trained on a pruned model of `{}`, which this base is not; `lorimer recover` makes it an adapter for the whole one",
        adapter.display(),
        name.escape_debug()
    ))
}

/// The folder of a base and what the record in it says, for adapters to be held against: read once for many.
#[derive(Clone, Debug)]
pub struct BaseRecord {
    folder: PathBuf,
    /// None: the base is no pruned model, or says nothing of it.
    pruned: Option<PrunedFrom>,
}

impl BaseRecord {
    /// Of a base's folder or file, whose layers are these.
    ///
    /// # Errors
    ///
    /// Fails if there is a record that cannot be read, or that is of other layers.
    pub fn of(folder: &Path, layers: &[LayerShape]) -> Result<Self> {
        let pruned = match folder.is_dir() {
            true => record_beside(folder, layers)?.map(|pruning| pruning.identity()),
            false => None,
        };
        Ok(Self { folder: folder.to_path_buf(), pruned })
    }

    /// The base's folder or file.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Refuses an adapter of a smaller model beside a model whose record is another or none, and one of a whole base on a smaller model; so for the
    /// adapters that it is made of. An adapter without `lorimer.json` says nothing of its base.
    ///
    /// # Errors
    ///
    /// Fails if the two do not belong together.
    pub fn check(&self, stored: &StoredAdapter) -> Result<()> {
        bases(stored).try_for_each(|on| self.check_one(on))
    }

    fn check_one(&self, (adapter, base): OnBase<'_>) -> Result<()> {
        match (&base.pruned, &self.pruned) {
            (Some(own), Some(here)) if own.pruning != here.pruning => Err(Error::Mismatch(format!(
                "`{}` was trained on another pruned model than `{}`: the ids of pruning.json differ",
                adapter.display(),
                self.folder.display()
            ))),
            (Some(own), None) => Err(elsewhere(adapter, own)),
            (None, Some(here)) if base.fingerprint == here.fingerprint => Err(Error::Mismatch(format!(
                "`{}` was trained on the whole base, `{}` is a pruned model of it",
                adapter.display(),
                self.folder.display()
            ))),
            _ => Ok(()),
        }
    }
}

/// [`BaseRecord::check`] of one adapter.
///
/// # Errors
///
/// Fails if the two do not belong together, or if the record cannot be read.
pub fn check_record(stored: &StoredAdapter, folder: &Path, layers: &[LayerShape]) -> Result<()> {
    match bases(stored).next() {
        None => Ok(()),
        Some(_) => BaseRecord::of(folder, layers)?.check(stored),
    }
}

/// [`BaseRecord::check`] of adapters that a new one is to be made of.
///
/// # Errors
///
/// Fails if one does not belong to the base, or if the record cannot be read.
pub fn check_parts(parts: &[Part], folder: &Path, layers: &[LayerShape]) -> Result<()> {
    if of_parts(parts).next().is_none() {
        return Ok(());
    }
    let record = BaseRecord::of(folder, layers)?;
    of_parts(parts).try_for_each(|on| record.check_one(on))
}
