//! What all downloads share: a bar, and the check of what came.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::weights::hex;

pub(super) fn bar(length: u64, message: &str, show: bool) -> ProgressBar {
    if !show {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:30} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(message.to_string());
    bar
}

/// Removes the file and fails if its SHA-256 is not the expected one.
pub(super) fn check_sha256(path: &Path, expected: &str) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let found = hex(&hash.finalize());
    if found != expected.to_lowercase() {
        let _ = fs::remove_file(path);
        return Err(Error::invalid(path, format!("SHA-256 is {found}, expected {expected}; removed, fetch it again")));
    }
    Ok(())
}
