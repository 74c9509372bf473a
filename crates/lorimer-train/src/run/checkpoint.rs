//! Checkpoints: folders that appear whole or not at all, with a manifest of hashes written last.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_model::files::{
    MAX_JSON_BYTES, read_bounded, read_json, remove_folder, remove_leftovers, write_atomic, write_folder_atomic,
    write_json,
};
use lorimer_model::weights::{SafetensorsFile, hex};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::run::log::Record;

/// What a run needs to go on as if it had never stopped. Data order and dropout follow from seed and step.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Progress and history.
    pub state: State,
    /// Trainable parameters by name.
    pub parameters: BTreeMap<String, Tensor>,
    /// Optimiser state by name.
    pub optimizer: BTreeMap<String, Tensor>,
    /// Trainable parameters of the best evaluation so far.
    pub best: BTreeMap<String, Tensor>,
}

/// The part of a checkpoint that is JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: usize,
    /// Step and loss of the best evaluation.
    pub best: Option<(usize, f64)>,
    /// All log records so far.
    pub history: Vec<Record>,
    /// The settings that the run must be resumed with.
    pub settings: serde_json::Value,
}

const FILES: [&str; 4] = ["parameters.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"];
const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "checkpoint-";

impl Checkpoint {
    /// Writes `checkpoint-<step>` into the run's folder and then removes those of later steps, from which this run did not go on because they are damaged,
    /// and the oldest above `keep`.
    pub fn write(&self, run: &Path, keep: usize) -> Result<PathBuf> {
        let path = run.join(format!("{PREFIX}{}", self.state.step));
        if path.exists() && Self::read(&path).is_err() {
            remove_folder(&path)?;
        }
        if !path.exists() {
            let pieces = [
                safetensors_bytes(&self.parameters)?,
                safetensors_bytes(&self.optimizer)?,
                safetensors_bytes(&self.best)?,
                serde_json::to_vec(&self.state).map_err(|e| Error::Settings(e.to_string()))?,
            ];
            write_folder_atomic(&path, |folder| {
                let mut hashes = BTreeMap::new();
                for (name, bytes) in FILES.iter().zip(&pieces) {
                    write_atomic(&folder.join(name), bytes)?;
                    hashes.insert(*name, hex(&Sha256::digest(bytes)));
                }
                write_json(&folder.join(MANIFEST), &hashes)
            })?;
        }
        let (mut all, later): (Vec<_>, Vec<_>) =
            Self::list(run)?.into_iter().partition(|(step, _)| *step <= self.state.step);
        for (_, path) in later {
            remove_folder(&path)?;
        }
        while all.len() > keep.max(1) {
            let (_, oldest) = all.remove(0);
            remove_folder(&oldest)?;
        }
        Ok(path)
    }

    /// Checkpoints of a run, oldest first.
    fn list(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
        let entries = match fs::read_dir(run) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(lorimer_model::Error::io("read", run)(error).into()),
        };
        let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok();
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.map_err(lorimer_model::Error::io("read", run))?.path();
            all.extend(step(&path).map(|step| (step, path)));
        }
        all.sort();
        Ok(all)
    }

    /// Whether a run's folder holds any.
    pub fn any(run: &Path) -> Result<bool> {
        Ok(!Self::list(run)?.is_empty())
    }

    /// The newest checkpoint that is whole; damaged ones are passed over with a warning.
    pub fn newest(run: &Path) -> Result<Option<Self>> {
        remove_leftovers(run);
        for (_, path) in Self::list(run)?.into_iter().rev() {
            match Self::read(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => tracing::warn!("{error}; trying the one before"),
            }
        }
        Ok(None)
    }

    /// Removes all checkpoints of a run.
    pub fn clear(run: &Path) -> Result<()> {
        for (_, path) in Self::list(run)? {
            remove_folder(&path)?;
        }
        Ok(())
    }

    fn read(path: &Path) -> Result<Self> {
        let hashes: BTreeMap<String, String> = read_json(&path.join(MANIFEST), 1 << 20)?;
        for name in FILES {
            let bytes = read_bounded(&path.join(name), 1 << 40)?;
            if hashes.get(name) != Some(&hex(&Sha256::digest(&bytes))) {
                return Err(Error::data(&path.join(name), "is damaged: its hash differs from the manifest's"));
            }
        }
        let tensors = |name: &str| -> Result<BTreeMap<String, Tensor>> {
            let file = SafetensorsFile::open(&path.join(name))?;
            let mut all = BTreeMap::new();
            for name in file.names() {
                all.extend(file.load(&name)?.map(|t| (name, t)));
            }
            Ok(all)
        };
        Ok(Self {
            state: read_json(&path.join(FILES[3]), MAX_JSON_BYTES)?,
            parameters: tensors(FILES[0])?,
            // 8-bit moments are bytes, which adapter files do not hold.
            optimizer: candle_core::safetensors::load(path.join(FILES[1]), &candle_core::Device::Cpu)?
                .into_iter()
                .collect(),
            best: tensors(FILES[2])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: usize) -> Checkpoint {
        Checkpoint { state: State { step, ..Default::default() }, ..Default::default() }
    }

    fn steps(run: &Path) -> Vec<usize> {
        Checkpoint::list(run).unwrap().into_iter().map(|(step, _)| step).collect()
    }

    /// A damaged newest checkpoint is passed over, is written anew when its step comes again, and does not push a good one out.
    #[test]
    fn a_damaged_checkpoint_is_written_again_and_costs_no_good_one() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        at(10).write(run, 2).unwrap();
        at(20).write(run, 2).unwrap();
        std::fs::write(run.join("checkpoint-20/state.json"), "{}").unwrap();
        assert_eq!(Checkpoint::newest(run).unwrap().unwrap().state.step, 10);
        // The same step again.
        at(20).write(run, 2).unwrap();
        assert_eq!(Checkpoint::newest(run).unwrap().unwrap().state.step, 20);
        // Another step in between, with one that is kept.
        std::fs::write(run.join("checkpoint-20/state.json"), "{}").unwrap();
        at(15).write(run, 1).unwrap();
        assert_eq!(steps(run), [15]);
        assert_eq!(Checkpoint::newest(run).unwrap().unwrap().state.step, 15);
        at(16).write(run, 2).unwrap();
        at(17).write(run, 2).unwrap();
        assert_eq!(steps(run), [16, 17]);
    }

    /// A folder that cannot be listed is an error, and not one that holds no run.
    #[test]
    fn a_run_that_cannot_be_listed_is_an_error() {
        let run = tempfile::tempdir().unwrap();
        let file = run.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(Checkpoint::any(&file).is_err() && Checkpoint::newest(&file).is_err());
        assert!(!Checkpoint::any(&run.path().join("nothing")).unwrap());
    }
}
