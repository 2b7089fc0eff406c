//! Events that a test reads.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing::{Dispatch, Level, dispatcher, subscriber::DefaultGuard};

/// The lines that a subscriber has written, of DEBUG and above.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// The lines that are logged on this thread for as long as the guard lives.
    pub fn listen() -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = dispatcher::set_default(&log.subscriber());
        (log, guard)
    }

    /// A subscriber that writes here, for a task on any thread.
    pub fn subscriber(&self) -> Dispatch {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(Level::DEBUG);
        Dispatch::new(subscriber.with_writer(move || log.clone()).finish())
    }

    /// The lines that have all of these parts, such as a level and a text.
    pub fn lines(&self, parts: &[&str]) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
        log.lines().filter(has_all).map(str::to_owned).collect()
    }

    /// The only line that has all of these parts.
    #[track_caller]
    pub fn one(&self, parts: &[&str]) -> String {
        let found = self.lines(parts);
        assert_eq!(found.len(), 1, "{parts:?} in {:#?}", self.lines(&[]));
        found.into_iter().next().unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
