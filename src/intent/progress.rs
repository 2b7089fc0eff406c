//! How far an attempt has come: its intents and phases.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{IntentError, Place};

/// Shared by all handles of an attempt.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Of each name without a discriminator, the intent that is not settled, or the last that was.
    current: HashMap<String, Current>,
    /// Intents whose call is being made.
    calling: HashSet<(String, Place)>,
    phases: HashSet<String>,
    phase_open: bool,
    contradicted: bool,
}

#[derive(Debug)]
struct Current {
    ordinal: u32,
    settled: bool,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with an intent. By order of calls, one that is not settled comes again.
    pub(super) fn enter(
        self: &Arc<Self>,
        name: &str,
        discriminator: Option<String>,
    ) -> Result<Entered, IntentError> {
        let mut state = self.state();
        if state.phase_open {
            return Err(IntentError::Misused(
                "an intent inside a phase would wait for it: make the call before or after",
            ));
        }
        let place = match discriminator {
            Some(discriminator) => Place::Discriminator(discriminator),
            None => {
                let first = Current { ordinal: 1, settled: false };
                let current = state.current.entry(name.to_owned()).or_insert(first);
                if current.settled {
                    *current = Current { ordinal: current.ordinal.saturating_add(1), settled: false };
                }
                Place::Ordinal(current.ordinal)
            }
        };
        let identity = (name.to_owned(), place);
        if !state.calling.insert(identity.clone()) {
            return Err(IntentError::Misused(
                "two intents of one name at once: tell them apart with IntentBuilder::of, or make one call after the other",
            ));
        }
        Ok(Entered { progress: Arc::clone(self), identity })
    }

    /// A call was asked for that contradicts an earlier attempt.
    pub(super) fn contradict(&self) {
        self.state().contradicted = true;
    }

    pub(crate) fn is_contradicted(&self) -> bool {
        self.state().contradicted
    }
}

/// An intent that the attempt is busy with, until it is dropped.
#[derive(Debug)]
pub(super) struct Entered {
    progress: Arc<Progress>,
    identity: (String, Place),
}

impl Entered {
    pub(super) fn name(&self) -> &str {
        &self.identity.0
    }

    pub(super) fn place(&self) -> &Place {
        &self.identity.1
    }

    /// The next intent of its name is another one.
    pub(super) fn settled(&self) {
        if let Some(current) = self.progress.state().current.get_mut(self.name())
            && self.place().ordinal() == current.ordinal
        {
            current.settled = true;
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.progress.state().calling.remove(&self.identity);
    }
}
