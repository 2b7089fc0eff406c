//! What the crate logs while a test runs.

use std::{
    io,
    process::Command,
    sync::{Arc, Mutex},
};

use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that were logged on this thread since it was made.
#[derive(Clone, Debug, Default)]
pub struct Logged(Arc<Mutex<Vec<u8>>>);

impl Logged {
    /// Listens for as long as the guard lives.
    pub fn listen() -> (Self, DefaultGuard) {
        let logged = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_ansi(false)
            .with_writer(logged.clone())
            .finish();
        (logged, tracing::subscriber::set_default(subscriber))
    }

    /// The lines of this level.
    pub fn lines(&self, level: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).expect("lines are text");
        text.lines()
            .filter(|line| line.contains(&format!(" {level} tower_idempotency")))
            .map(str::to_owned)
            .collect()
    }
}

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Logged {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Runs the body of a test in a process of its own, for what happens once in the life of a process. `name` is the test's.
pub fn in_a_process_of_its_own(name: &str, body: impl Future<Output = ()>) {
    if std::env::var(ALONE).is_ok_and(|alone| alone == name) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(body);
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let output = Command::new(test).args(["--exact", name, "--nocapture"]).env(ALONE, name).output().unwrap();
    let shown = [output.stdout, output.stderr].concat();
    let shown = String::from_utf8_lossy(&shown);
    assert!(output.status.success() && shown.contains("1 passed"), "{name}: {shown}");
}

const ALONE: &str = "TEST_ALONE";
