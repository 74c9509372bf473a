//! The projections that a method targets in a model.

use lorimer_adapter::Method;
use lorimer_adapter::targets::Matcher;
use lorimer_model::{BaseModel, Projection, Site};

use crate::error::Result;

/// Which projections a method targets, in the order of the model.
pub(super) fn targeted<'a>(model: &'a dyn BaseModel, method: &dyn Method) -> Result<Vec<(&'a Site, &'a Projection)>> {
    let projections = model.projections();
    let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
    Ok(projections.into_iter().filter(|(site, _)| matcher.targets(site)).collect())
}
