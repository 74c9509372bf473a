//! What the engine says while it works, through Python's `logging`, under the name `lorimer`.

use std::io::{self, Write};

use pyo3::prelude::*;
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

struct ToLogging;

/// One line on its way.
struct Line(Level, Vec<u8>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let level = match self.0 {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            _ => 10,
        };
        let text = String::from_utf8_lossy(&self.1).trim_end().to_string();
        // Nothing is said where the interpreter is on its way out, or where a handler raises.
        let _ = Python::try_attach(|py| -> PyResult<()> {
            let logger = py.import("logging")?.call_method1("getLogger", ("lorimer",))?;
            logger.call_method1("log", (level, "%s", text))?;
            Ok(())
        });
    }
}

impl<'a> MakeWriter<'a> for ToLogging {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Level::INFO, Vec::new())
    }

    fn make_writer_for(&'a self, metadata: &tracing::Metadata<'_>) -> Line {
        Line(*metadata.level(), Vec::new())
    }
}

/// Begins once a process.
pub fn start() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LORIMER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(lorimer_cli::common::LOGGED));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(ToLogging)
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(false)
        .try_init();
}
