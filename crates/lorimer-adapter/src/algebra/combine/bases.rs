//! Whether adapters belong to one base, as far as their files tell. Each value that is known is compared with the first parent that knows it, so
//! that a parent which says nothing stands between no others.

use std::collections::BTreeMap;
use std::path::Path;

use lorimer_model::files::read_bounded;
use sha2::{Digest, Sha256};

use super::parents::{Parent, Parents, Shape};
use crate::error::{Error, Result};
use crate::pruning::origin::BaseIdentity;

/// Largest `tokenizer.json` beside an adapter that is compared.
const MAX_TOKENIZER: u64 = 64 << 20;

/// Refuses adapters of different bases.
pub(super) fn check(parents: &Parents) -> Result<()> {
    let all = &parents.all;
    agree(
        all,
        |p| Ok(identity(p)),
        |a, b| a.fingerprint == b.fingerprint,
        |a, b| format!("their weights are {} ({}) and {} ({})", a.name, a.fingerprint, b.name, b.fingerprint),
    )?;
    check_names(all)?;
    agree(all, |p| Ok(template(p)), |a, b| a == b, |_, _| "they were trained with different chat templates".into())?;
    agree(all, |p| tokenizer(&p.stored().path), |a, b| a == b, |_, _| "the tokenizer.json beside them differ".into())?;
    check_sides(all)
}

/// The base's name by the first parent that knows one.
pub(super) fn name(parents: &Parents) -> Option<&str> {
    parents.all.iter().find_map(own_name)
}

/// A base's name as a configuration has it, else as `lorimer.json` does.
fn own_name(parent: &Parent) -> Option<&str> {
    let said = |name: &&str| !name.trim().is_empty();
    let identity = || identity(parent).map(|base| base.name.as_str());
    parent.text("base_model_name_or_path").filter(said).or_else(|| identity().filter(said))
}

fn identity(parent: &Parent) -> Option<&BaseIdentity> {
    parent.stored().manifest.as_ref().and_then(|m| m.base.as_ref())
}

fn template(parent: &Parent) -> Option<&str> {
    parent.stored().manifest.as_ref().and_then(|m| m.chat_template.as_deref())
}

/// The hash of the `tokenizer.json` beside an adapter, if there is one.
fn tokenizer(folder: &Path) -> Result<Option<Vec<u8>>> {
    let path = folder.join("tokenizer.json");
    match path.is_file() {
        true => Ok(Some(Sha256::digest(read_bounded(&path, MAX_TOKENIZER)?).to_vec())),
        false => Ok(None),
    }
}

fn differ(one: &Parent, two: &Parent, text: &str) -> Result<()> {
    let (one, two) = (one.shown(), two.shown());
    Err(Error::Mismatch(format!("`{one}` and `{two}` belong to different bases: {text}")))
}

/// Refuses parents of which one has another value than the first that has any.
fn agree<'a, T>(
    all: &'a [Parent],
    value: impl Fn(&'a Parent) -> Result<Option<T>>,
    equal: impl Fn(&T, &T) -> bool,
    text: impl Fn(&T, &T) -> String,
) -> Result<()> {
    let mut known: Option<(&Parent, T)> = None;
    for parent in all {
        let Some(own) = value(parent)? else { continue };
        match &known {
            Some((first, value)) if !equal(value, &own) => return differ(first, parent, &text(value, &own)),
            Some(_) => {}
            None => known = Some((parent, own)),
        }
    }
    Ok(())
}

/// Names count for parents without a fingerprint: one base may be here a hub's id and there a path, so the last part of it is compared.
fn check_names(all: &[Parent]) -> Result<()> {
    let end = |name: &str| name.trim().trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().map(str::to_lowercase);
    let Some((at, a)) =
        all.iter().enumerate().filter(|(_, p)| identity(p).is_none()).find_map(|(i, p)| Some((i, own_name(p)?)))
    else {
        return Ok(());
    };
    for (i, other) in all.iter().enumerate() {
        let Some(b) = own_name(other).filter(|b| end(a) != end(b)) else { continue };
        let (one, two, a, b) = if i < at { (other, &all[at], b, a) } else { (&all[at], other, a, b) };
        let text = "if that is one base, write the same name into both adapter_config.json";
        return differ(one, two, &format!("base_model_name_or_path is `{a}` and `{b}`; {text}"));
    }
    Ok(())
}

/// Refuses modules of one name whose sides differ.
fn check_sides(all: &[Parent]) -> Result<()> {
    let mut seen: BTreeMap<&str, (&Parent, &Shape)> = BTreeMap::new();
    for parent in all {
        for (module, shape) in &parent.modules {
            let (owner, own) = *seen.entry(module).or_insert((parent, shape));
            if (own.inputs, own.outputs) != (shape.inputs, shape.outputs) {
                let sides = |s: &Shape| format!("{} inputs and {} outputs", s.inputs, s.outputs);
                let text = format!("`{module}` has {} in one and {} in the other", sides(own), sides(shape));
                return differ(owner, parent, &text);
            }
        }
    }
    Ok(())
}
