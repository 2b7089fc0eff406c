//! The log of a test whose tasks run on one thread.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing::subscriber::DefaultGuard;

/// The lines that are logged on this thread, until this is dropped.
#[derive(Debug)]
pub struct Logged {
    lines: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Logged {
    #[must_use]
    pub fn start() -> Self {
        let lines = Arc::<Mutex<Vec<u8>>>::default();
        let shared = Arc::clone(&lines);
        let make = move || Writer(Arc::clone(&shared));
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(make).finish();
        Self { lines, _guard: tracing::subscriber::set_default(subscriber) }
    }

    /// The lines of this level that hold the text.
    #[must_use]
    pub fn lines(&self, level: &str, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.lines.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(level) && line.contains(text)).map(str::to_owned).collect()
    }
}
