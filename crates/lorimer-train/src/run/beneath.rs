//! Adapters that are at work and stay as they are while another is trained on top of them.

use std::path::Path;

use lorimer_adapter::pruning::check_record;
use lorimer_adapter::{Adapter, Attached, Calibration, StoredAdapter};
use lorimer_model::Base;

use crate::error::{Error, Result};

/// An adapter that stays as it is.
pub struct Beneath {
    /// The adapter.
    pub adapter: Adapter,
    /// Its weight.
    pub weight: f64,
    /// `sha256:…` over its configuration and tensors.
    pub content_id: String,
}

impl Beneath {
    /// Reads an adapter folder.
    ///
    /// # Errors
    ///
    /// Fails if the folder holds no adapter that fits the base, is whole and does something.
    pub fn read(base: &Base, folder: &Path, weight: f64) -> Result<Self> {
        let stored = StoredAdapter::read(folder)?;
        check_record(&stored, &base.path, &base.model().shape().layers)?;
        let content_id = stored.content_id()?;
        Ok(Self { adapter: Adapter::load_whole(base.model(), &stored)?, weight, content_id })
    }
}

/// The adapter in training over those that stay.
///
/// # Errors
///
/// Fails if they cannot be at work together, or if the method of the one in training changes others as it goes.
pub fn over<'a>(adapter: &'a Adapter, beneath: &'a [Beneath]) -> Result<Attached<'a>> {
    if beneath.is_empty() {
        return Ok(Attached::one(adapter));
    }
    let method = adapter.method.as_ref();
    if method.training().callback.is_some() || !matches!(method.calibration(), Calibration::Nothing) {
        return Err(Error::Settings(format!(
            "`{}` looks at the base or at all adapters while it is trained, and is not trained on top of another adapter",
            method.name()
        )));
    }
    let mut all = vec![(adapter, 1.0)];
    all.extend(beneath.iter().map(|below| (&below.adapter, below.weight)));
    Ok(Attached::weighted(all)?)
}
