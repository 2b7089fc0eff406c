//! What the crate logs, as a test reads it.

use std::{
    fmt::{Debug, Write},
    sync::{Arc, Mutex},
};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
};

/// The events of the crate on this thread: level, message and fields in one line each.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Vec<String>>>);

impl Events {
    /// Reads along until the guard is dropped.
    pub fn read() -> (Self, DefaultGuard) {
        let events = Self::default();
        let subscriber = tracing_subscriber::registry().with(events.clone());
        (events, tracing::subscriber::set_default(subscriber))
    }

    /// Those that have all of these parts.
    pub fn with(&self, parts: &[&str]) -> Vec<String> {
        let events = self.0.lock().unwrap();
        events.iter().filter(|event| parts.iter().all(|part| event.contains(part))).cloned().collect()
    }

    /// The only one that has all of these parts.
    #[track_caller]
    pub fn one(&self, parts: &[&str]) -> String {
        let found = self.with(parts);
        assert_eq!(found.len(), 1, "{parts:?} in {:#?}", self.0.lock().unwrap());
        found.into_iter().next().unwrap()
    }
}

impl<S: Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "tower_idempotency" {
            let mut line = Line(event.metadata().level().to_string());
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}
