//! TLS with a certificate out of files, which are read again when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lorimer_model::files::read_bounded;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// Largest file of certificates or of a key.
const MAX_FILE: u64 = 1 << 20;
/// For how long files are not looked at again.
const FRESH: Duration = Duration::from_secs(10);

/// What files were there: their times.
type Times = [Option<SystemTime>; 2];

struct Current {
    looked: Instant,
    times: Times,
    config: Arc<ServerConfig>,
}

/// A certificate with its chain and its key, PEM files.
pub struct Tls {
    files: [PathBuf; 2],
    current: Mutex<Current>,
}

fn times(files: &[PathBuf; 2]) -> Times {
    files.each_ref().map(|file| file.metadata().and_then(|m| m.modified()).ok())
}

fn config([certificate, key]: &[PathBuf; 2]) -> Result<Arc<ServerConfig>, String> {
    let read = |file: &Path| read_bounded(file, MAX_FILE).map_err(|e| e.to_string());
    let bytes = read(certificate)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain = chain.map_err(|e| format!("`{}` is no PEM file of certificates: {e}", certificate.display()))?;
    if chain.is_empty() {
        return Err(format!("`{}` holds no certificate in PEM", certificate.display()));
    }
    let own = PrivateKeyDer::from_pem_slice(&read(key)?);
    let own = own.map_err(|e| format!("`{}` holds no private key in PEM that can be read: {e}", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unfit = |e: rustls::Error| {
        format!("the certificate `{}` and the key `{}` cannot be used: {e}", certificate.display(), key.display())
    };
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(unfit)?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, own).map_err(unfit)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

impl Tls {
    /// Reads a certificate with its chain, and its key.
    ///
    /// # Errors
    ///
    /// Says which file cannot be read, is none, or does not belong to the other.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, String> {
        let files = [certificate.to_path_buf(), key.to_path_buf()];
        let times = times(&files);
        let config = config(&files)?;
        Ok(Self { files, current: Mutex::new(Current { looked: Instant::now(), times, config }) })
    }

    /// Takes a connection with the certificate of now. One that was renewed and cannot be used is told, and the one before stays.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= FRESH {
            current.looked = Instant::now();
            let now = times(&self.files);
            if now != current.times {
                current.times = now;
                match config(&self.files) {
                    Ok(config) => current.config = config,
                    Err(problem) => tracing::error!("the certificate is the one of before: {problem}"),
                }
            }
        }
        TlsAcceptor::from(current.config.clone())
    }
}
