//! Adapters that are fetched from the Hugging Face hub when they are first asked for, into the folder of adapters, each under its hub id.
//!
//! What was fetched stays as the adapter of the folder that it is then, whatever its branch becomes on the hub. Its folder has a note of where it came from.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lorimer_adapter::file::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use lorimer_model::files::{read_bounded, write_json};
use lorimer_model::pull::{fetch_files, is_hub_id};
use lorimer_model::{BaseModel, Error};
use serde::{Deserialize, Serialize};

use super::hosted::Hosted;
use super::names::{Code, StoreError, check_name, refuse};
use super::store::{Put, Store};

/// The note in the folder of an adapter that was fetched.
const NOTE: &str = ".lorimer-hub.json";
/// Largest configuration, manifest and note.
const TEXT: u64 = 16 << 20;
/// For how long an adapter may be on its way.
const LONGEST: Duration = Duration::from_secs(600);

/// Where an adapter came from.
#[derive(Serialize, Deserialize)]
struct Note {
    id: String,
    commit: String,
    bytes: u64,
}

/// The hub, as far as it is let in.
pub struct Hub {
    /// Bytes that all that is fetched may take, and does.
    space: u64,
    used: Mutex<u64>,
}

/// Whether a name may be fetched.
pub fn is_fetchable(name: &str) -> bool {
    check_name(name).is_ok() && is_hub_id(name)
}

impl Hub {
    /// The hub for a store, with the bytes that all adapters of it may take.
    ///
    /// # Errors
    ///
    /// Fails if the folders of the store cannot be listed.
    pub fn new(store: &Store, space: u64) -> Result<Self, StoreError> {
        let bytes = |folder: &Path| {
            let note = read_bounded(&store.root().join(folder).join(NOTE), TEXT).ok()?;
            serde_json::from_slice::<Note>(&note).ok().map(|note| note.bytes)
        };
        let used = store.folders()?.iter().filter_map(|folder| bytes(folder)).fold(0, u64::saturating_add);
        Ok(Self { space, used: Mutex::new(used) })
    }

    /// Fetches the adapter of a hub id, and gives it that name once it was read and found good.
    ///
    /// # Errors
    ///
    /// Fails if the hub does not have it or does not answer, if it or all together are too large, if the name is taken, or as [`Store::receive`] does.
    pub fn fetch(&self, store: &Store, model: &(dyn BaseModel + Sync), name: &str) -> Result<Arc<Hosted>, StoreError> {
        let room = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            let room = self.space.saturating_sub(*used).min(store.max_upload());
            *used += room;
            room
        };
        let mut taken = 0;
        let fetched = self.fetch_into(store, model, name, room, &mut taken);
        let kept = if fetched.is_ok() { taken } else { 0 };
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) -= room - kept.min(room);
        fetched
    }

    fn fetch_into(
        &self,
        store: &Store,
        model: &(dyn BaseModel + Sync),
        name: &str,
        room: u64,
        taken: &mut u64,
    ) -> Result<Arc<Hosted>, StoreError> {
        let shown = name;
        if room == 0 {
            let message =
                format!("adapters of the hub take all of the {} bytes that they may (--hub-space)", self.space);
            return refuse(Code::LimitExceeded, message);
        }
        let files = [(CONFIG_FILE, TEXT), (WEIGHTS_FILE, store.max_file()), (MANIFEST_FILE, TEXT)];
        let mut problem = None;
        let fill = |folder: &Path| {
            let mut told = |code, message: String| {
                problem = Some(StoreError { code, message: message.clone() });
                Error::Unsupported(message)
            };
            let fetched = fetch_files(name, &files, folder, (room, Instant::now() + LONGEST));
            let fetched = fetched.map_err(|e| {
                let code = if matches!(e, Error::Unsupported(_)) { Code::LimitExceeded } else { Code::StoreFailed };
                told(code, store.without_root(&e.to_string()))
            });
            let fetched = fetched?.ok_or_else(|| {
                let message =
                    format!("there is no adapter `{shown}`, neither here nor on the hub, as far as it shows it");
                told(Code::AdapterNotFound, message)
            })?;
            for needed in [CONFIG_FILE, WEIGHTS_FILE] {
                if !fetched.files.iter().any(|file| file == needed) {
                    let message =
                        format!("`{shown}` of the hub has no `{needed}`, so that it is no adapter that can be served");
                    return Err(told(Code::AdapterInvalid, message));
                }
            }
            *taken = fetched.bytes;
            write_json(&folder.join(NOTE), &Note { id: name.into(), commit: fetched.commit, bytes: fetched.bytes })
        };
        let received = store.receive(model, name, &Put::Create, fill);
        received.map_err(|error| problem.unwrap_or(error))
    }
}
