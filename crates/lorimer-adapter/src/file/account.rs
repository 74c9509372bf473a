//! What each tensor of an adapter file is: the one route from a file's tensors to the modules of a model, with a model at hand or without.

use std::collections::{BTreeMap, HashSet};

use candle_core::Tensor;
use lorimer_model::{BaseModel, LayerShape, Site};

use crate::error::{Error, Result};
use crate::file::dialects::peft;
use crate::file::keys::FileKeys;
use crate::file::store::StoredAdapter;
use crate::targets::Matcher;

/// What one tensor is, by its name.
enum Place {
    /// A method's, on a projection.
    Module { module: String, key: String },
    /// A method's, on a block.
    Block { block: String, key: String },
    /// A method's, of the whole adapter.
    Adapter,
    /// A parameter in the place of the base's.
    Whole { path: String, frozen: bool },
    /// Nothing that the method or PEFT knows.
    Unknown,
}

/// Whether a name is one of a method's.
fn named(keys: &[&str], name: &str) -> bool {
    keys.iter().any(|key| name == *key || (key.ends_with('.') && name.starts_with(key)))
}

fn place(name: &str, keys: &FileKeys) -> Place {
    if named(keys.adapter, name) {
        return Place::Adapter;
    }
    let Some(path) = name.strip_prefix(peft::PREFIX) else { return Place::Unknown };
    let module = |key: &&&str| path.strip_suffix(**key)?.strip_suffix('.').filter(|m| !m.is_empty());
    let longest = keys.module.iter().filter(|key| module(key).is_some()).max_by_key(|key| key.len());
    if let Some((module, key)) = longest.and_then(|key| Some((module(&key)?, key)))
        && !peft::is_under_adapter(path)
    {
        return Place::Module { module: module.to_string(), key: key.to_string() };
    }
    if let Some((block, key)) = split_block(path)
        && named(keys.block, key)
    {
        return Place::Block { block: block.to_string(), key: key.to_string() };
    }
    match peft::whole_parameter(path) {
        Some((path, frozen)) => Place::Whole { path, frozen },
        None => Place::Unknown,
    }
}

/// `model.layers.3.a.b` → (`model.layers.3`, `a.b`).
fn split_block(path: &str) -> Option<(&str, &str)> {
    let dots = path.match_indices('.').map(|(at, _)| at);
    let block = |at: &usize| path[..*at].rsplit('.').next().is_some_and(|part| part.parse::<usize>().is_ok());
    let at = dots.into_iter().find(block)?;
    Some((&path[..at], &path[at + 1..]))
}

/// A tensor that takes the place of a parameter of the base: a bias, or what `modules_to_save` names.
#[derive(Clone, Debug)]
pub struct WholeParameter {
    /// The tensor's name in the file.
    pub name: String,
    /// The parameter's on-disk name in the base: `model.norm.weight`.
    pub path: String,
    /// Whether it is the frozen weight under an adapter, which PEFT saves with an adapted head or embedding.
    pub frozen: bool,
    /// Its values.
    pub tensor: Tensor,
}

/// Every tensor of an adapter file under what it belongs to.
#[derive(Clone, Debug, Default)]
pub struct FileAccount {
    /// Tensors of the method by module and by key below the module's path.
    pub modules: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// Tensors of the method that belong to a block, by block and by key below the block's path.
    pub blocks: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// Tensors of the method that belong to the whole adapter, by full name.
    pub shared: BTreeMap<String, Tensor>,
    /// Parameters in the place of the base's, in the order of their names.
    pub parameters: Vec<WholeParameter>,
    /// Names of tensors that the method does not know.
    pub unknown: Vec<String>,
}

impl FileAccount {
    /// Of a file, given its method's names.
    pub fn new(stored: &StoredAdapter, keys: &FileKeys) -> Self {
        let mut account = Self::default();
        for (name, tensor) in &stored.tensors {
            let tensor = tensor.clone();
            match place(name, keys) {
                Place::Module { module, key } => drop(account.modules.entry(module).or_default().insert(key, tensor)),
                Place::Block { block, key } => drop(account.blocks.entry(block).or_default().insert(key, tensor)),
                Place::Adapter => drop(account.shared.insert(name.clone(), tensor)),
                Place::Whole { path, frozen } => {
                    account.parameters.push(WholeParameter { name: name.clone(), path, frozen, tensor });
                }
                Place::Unknown => account.unknown.push(name.clone()),
            }
        }
        account
    }

    /// Tensors of the layers called `module` that follow blocks, by the layer's path and by key below it.
    pub fn layers(&self, module: &str) -> BTreeMap<String, BTreeMap<String, Tensor>> {
        let mut layers: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
        for (block, tensors) in &self.blocks {
            for (key, tensor) in tensors {
                let Some(key) = key.strip_prefix(module).and_then(|key| key.strip_prefix('.')) else { continue };
                layers.entry(format!("{block}.{module}")).or_default().insert(key.to_string(), tensor.clone());
            }
        }
        layers
    }

    /// The tensors of the method that belong to no projection, by full name.
    pub fn beside_modules(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let blocks = self.blocks.iter().flat_map(|(block, tensors)| {
            tensors.iter().map(move |(key, tensor)| (peft::tensor_name(block, key), tensor))
        });
        self.shared.iter().map(|(name, tensor)| (name.clone(), tensor)).chain(blocks)
    }

    /// Number of values that a module has in the file, with the parameters of the base under its adapter.
    pub fn values_of(&self, module: &str) -> usize {
        let own = self.modules.get(module).into_iter().flat_map(BTreeMap::values).map(Tensor::elem_count);
        let of = |p: &&WholeParameter| p.path.rsplit_once('.').is_some_and(|(of, _)| of == module);
        own.chain(self.parameters.iter().filter(of).map(|p| p.tensor.elem_count())).sum()
    }

    /// Refuses a file with tensors that the method does not know, for what works on a file without its base.
    ///
    /// # Errors
    ///
    /// Fails if there is such a tensor.
    pub fn refuse_unknown(&self, method: &str) -> Result<()> {
        let account = Accounting { method: method.to_string(), unknown: self.unknown.clone(), ..Default::default() };
        match account.unknown_tensors() {
            None => Ok(()),
            Some(problem) => Err(Error::Mismatch(problem)),
        }
    }

    /// Refuses low-rank changes of the embedding, which has no projection's form.
    ///
    /// # Errors
    ///
    /// Fails if there is one.
    pub fn refuse_embedding(&self, stored: &StoredAdapter) -> Result<()> {
        match self.unknown.iter().find(|name| name.contains(".lora_embedding_")) {
            None => Ok(()),
            Some(name) => Err(Error::Refused(format!(
                "`{}`: `{name}` is a low-rank change of the embedding, which is not read here; merge the adapter into its base with PEFT",
                stored.path.display()
            ))),
        }
    }

    /// Holds the file against a base: takes out the tensors that have no place there or that the configuration does not name, and says so.
    /// What is left counts as used.
    pub fn fit(&mut self, base: &BaseNames, matcher: &Matcher, method: &str) -> Accounting {
        let unknown = std::mem::take(&mut self.unknown);
        let (mut used, mut refused) = (Vec::new(), unknown.clone());
        // What the configuration does not name would be left out by others who read the file.
        let targeted: HashSet<&str> =
            base.sites.iter().filter(|site| matcher.targets(site)).map(|site| site.path.as_str()).collect();
        let blocks: HashSet<&str> = base.sites.iter().filter_map(|site| Some(split_block(&site.path)?.0)).collect();
        for (of, known) in [(&mut self.modules, targeted), (&mut self.blocks, blocks)] {
            of.retain(|path, tensors| {
                let fits = known.contains(path.as_str());
                let names = tensors.keys().map(|key| peft::tensor_name(path, key));
                if fits {
                    used.extend(names)
                } else {
                    refused.extend(names)
                }
                fits
            });
        }
        self.parameters.retain(|p| {
            let fits = base.parameters.contains(&p.path);
            if fits {
                used.push(p.name.clone())
            } else {
                refused.push(p.name.clone())
            }
            fits
        });
        used.extend(self.shared.keys().cloned());
        let missing = base.sites.iter().filter(|site| matcher.targets(site) && !self.modules.contains_key(&site.path));
        let missing = missing.map(|site| site.path.clone()).collect();
        Accounting { used, refused, missing, unknown, method: method.to_string() }
    }
}

/// The names of a base: what a file's tensors may belong to.
pub struct BaseNames {
    /// Its `model_type`.
    pub model_type: String,
    /// Its projections.
    pub sites: Vec<Site>,
    /// On-disk names of all its parameters.
    pub parameters: HashSet<String>,
    /// Shapes of its layers.
    pub layers: Vec<LayerShape>,
}

impl BaseNames {
    /// Of a model.
    pub fn of(model: &dyn BaseModel) -> Self {
        let mut parameters: HashSet<String> = model.parameter_names().into_iter().collect();
        let mut sites = Vec::new();
        for (site, projection) in model.projections() {
            parameters.insert(site.weight_path());
            parameters.extend(projection.bias.is_some().then(|| site.bias_path()));
            sites.push(site.clone());
        }
        let shape = model.shape().clone();
        Self { model_type: shape.model_type, sites, parameters, layers: shape.layers }
    }
}

/// Every tensor of a file, accounted for.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Accounting {
    /// Tensors that are in use.
    pub used: Vec<String>,
    /// Tensors that belong to nothing in the base or the configuration.
    pub refused: Vec<String>,
    /// Modules that the configuration names and the file has nothing for.
    pub missing: Vec<String>,
    /// Those of the refused tensors that the method does not know.
    pub unknown: Vec<String>,
    /// The method's name.
    pub method: String,
}

/// The first two names of a list, and how many more there are.
fn some(names: &[String]) -> String {
    let shown: Vec<_> = names.iter().take(2).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > 2 { format!(" and {} more", names.len() - 2) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

impl Accounting {
    /// Counts tensors that were taken as used among the refused.
    pub(crate) fn refuse(&mut self, names: Vec<String>) {
        let refused: HashSet<&String> = names.iter().collect();
        self.used.retain(|used| !refused.contains(used));
        self.refused.extend(names);
    }

    /// Whether all is in use and nothing missing.
    pub fn complete(&self) -> bool {
        self.refused.is_empty() && self.missing.is_empty() && !self.used.is_empty()
    }

    fn unknown_tensors(&self) -> Option<String> {
        (!self.unknown.is_empty()).then(|| {
            format!(
                "the adapter holds {} tensors that `{}` does not know ({})",
                self.unknown.len(),
                self.method,
                some(&self.unknown)
            )
        })
    }

    /// One sentence on what is wrong.
    pub fn problem(&self) -> Option<String> {
        if let Some(problem) = self.unknown_tensors() {
            return Some(problem);
        }
        if !self.refused.is_empty() {
            return Some(format!(
                "the adapter does not fit the base: {} of its tensors belong to no module there ({})",
                self.refused.len(),
                some(&self.refused)
            ));
        }
        if !self.missing.is_empty() {
            return Some(format!(
                "the adapter is not whole: {} modules that its configuration names have no tensors ({})",
                self.missing.len(),
                some(&self.missing)
            ));
        }
        self.used.is_empty().then(|| "the adapter holds no tensors".to_string())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    const KEYS: FileKeys = FileKeys {
        module: &["lora_A.weight", "lora_B.weight"],
        block: &["sparse_gin."],
        adapter: &["base_model.internal_classifier.", "base_model.vera_A"],
    };

    fn account(names: &[&str]) -> FileAccount {
        let zero = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let tensors = names.iter().map(|name| (name.to_string(), zero.clone())).collect();
        let stored = StoredAdapter {
            path: "memory".into(),
            config: Default::default(),
            tensors,
            manifest: None,
            parts: Vec::new(),
        };
        FileAccount::new(&stored, &KEYS)
    }

    #[test]
    fn every_tensor_has_one_place() {
        let account = account(&[
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.base_layer.bias",
            "base_model.model.lm_head.base_layer.weight",
            "base_model.model.model.norm.weight",
            "base_model.model.model.layers.3.sparse_gin.mlp.0.weight",
            "base_model.internal_classifier.layers.0.weight",
            "base_model.vera_A",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_C.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.base_layer.lora_A.weight",
            "base_model.model.lora_A.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "model.norm.weight",
        ]);
        let q = "model.layers.3.self_attn.q_proj";
        assert_eq!(account.modules.keys().collect::<Vec<_>>(), [q]);
        assert_eq!(account.modules[q].keys().collect::<Vec<_>>(), ["lora_A.weight"]);
        assert_eq!(account.blocks["model.layers.3"].keys().collect::<Vec<_>>(), ["sparse_gin.mlp.0.weight"]);
        assert_eq!(account.shared.len(), 2);
        let whole: Vec<_> = account.parameters.iter().map(|p| (p.path.as_str(), p.frozen)).collect();
        let bias = format!("{q}.bias");
        assert_eq!(whole, [("lm_head.weight", true), (bias.as_str(), false), ("model.norm.weight", false)]);
        assert_eq!(account.unknown.len(), 5);
        // The bias counts with the module that it is under.
        assert_eq!(account.values_of(q), 6);
        let error = account.refuse_unknown("lora").unwrap_err().to_string();
        assert!(error.contains("`lora` does not know") && error.contains("and 3 more"), "{error}");
    }
}
