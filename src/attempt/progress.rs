//! The progress of an attempt: its intents and phases.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use tokio_util::task::TaskTracker;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
use tokio_util::task::task_tracker::TrackedFuture;

use crate::{
    attempt::error::IntentError,
    rejection::Rejection,
    stored::intent::{Place, UpstreamKey},
};

/// Shared by all handles of an attempt.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    state: Mutex<State>,
    /// The ends of phases, which may find out that the key must be held.
    ends_of_phases: OnceLock<TaskTracker>,
}

#[derive(Debug, Default)]
struct State {
    /// The latest intent of each name without a discriminator.
    current: HashMap<String, Current>,
    /// Intents whose call is being made.
    calling: HashSet<(String, Place)>,
    /// Intents that are not settled.
    open: HashMap<(String, Place), UpstreamKey>,
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    phases: HashSet<String>,
    phase_open: bool,
    /// An intent or a phase was asked for.
    begun: bool,
    held: Option<Rejection>,
}

const SETTLED: &str = "an intent of this name was settled in this attempt with the same arguments: keep its \
                       result instead of asking again, or tell the two apart with IntentBuilder::of";

const UNSETTLED: &str = "an intent of this name is open in this attempt: tell them apart with \
                         IntentBuilder::of, make one call after the other is settled, or give the arguments \
                         of a call that is tried again";

#[derive(Debug, Default)]
struct Current {
    ordinal: u32,
    arguments: Bytes,
    settled: bool,
    /// The arguments of those that are settled, if they have any.
    done: HashSet<Bytes>,
}

impl Current {
    /// The ordinal of an intent with these arguments.
    fn next(&mut self, arguments: &Bytes) -> Result<u32, IntentError> {
        if self.done.contains(arguments) {
            return Err(IntentError::Misused(SETTLED));
        }
        let asked_again = !arguments.is_empty() && self.arguments == *arguments;
        match self.ordinal == 0 || self.settled {
            true => self.ordinal = self.ordinal.saturating_add(1),
            false if asked_again => {}
            false => return Err(IntentError::Misused(UNSETTLED)),
        }
        (self.arguments, self.settled) = (arguments.clone(), false);
        Ok(self.ordinal)
    }

    fn settle(&mut self) {
        self.settled = true;
        if !self.arguments.is_empty() {
            self.done.insert(self.arguments.clone());
        }
    }
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with an intent. Without a discriminator, the order tells intents of one name apart:
    /// an intent that is not settled comes again if it has the same arguments. One that is settled
    /// does not: the call would be made twice.
    pub(super) fn enter(
        self: &Arc<Self>,
        name: &str,
        discriminator: Option<String>,
        arguments: &Bytes,
    ) -> Result<Entered, IntentError> {
        let mut state = self.state();
        if state.phase_open {
            return Err(IntentError::Misused(
                "an intent inside a phase would wait for it: make the call before or after",
            ));
        }
        let place = match discriminator {
            Some(discriminator) => Place::Discriminator(discriminator),
            None => Place::Ordinal(state.current.entry(name.to_owned()).or_default().next(arguments)?),
        };
        state.begun = true;
        let identity = (name.to_owned(), place);
        if !state.calling.insert(identity.clone()) {
            return Err(IntentError::Misused(UNSETTLED));
        }
        Ok(Entered { progress: Arc::clone(self), identity })
    }

    /// Has the key held, with this answer instead of the handler's. The first reason stays.
    pub(crate) fn hold(&self, rejection: Rejection) {
        self.state().held.get_or_insert(rejection);
    }

    /// Lets the end of the attempt wait for the end of a phase.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn track<F: Future>(&self, end: F) -> TrackedFuture<F> {
        self.ends_of_phases.get_or_init(TaskTracker::new).track_future(end)
    }

    pub(crate) async fn phases_ended(&self) {
        if let Some(ends) = self.ends_of_phases.get() {
            ends.close();
            ends.wait().await;
        }
    }

    /// An open phase has the record locked.
    pub(crate) fn is_phase_open(&self) -> bool {
        self.state().phase_open
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.state().begun
    }

    /// Name and upstream key of the intents that are not settled.
    pub(crate) fn open_intents(&self) -> Vec<(String, UpstreamKey)> {
        self.state().open.iter().map(|((name, _), key)| (name.clone(), *key)).collect()
    }

    pub(crate) fn held(&self) -> Option<Rejection> {
        self.state().held.clone()
    }
}

/// An open phase, until this is dropped.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
#[derive(Debug)]
pub(crate) struct InPhase(Arc<Progress>);

#[cfg(any(feature = "sqlite", feature = "postgres"))]
impl Progress {
    pub(crate) fn enter_phase(self: &Arc<Self>, name: &str) -> Result<InPhase, IntentError> {
        check_name(name)?;
        let mut state = self.state();
        if state.phase_open {
            let message =
                "two simultaneous phases would wait for each other: begin one after the other has ended";
            return Err(IntentError::Misused(message));
        }
        if !state.phases.insert(name.to_owned()) {
            let message =
                "a phase of this name has come before in this attempt: give each phase a name of its own";
            return Err(IntentError::Misused(message));
        }
        state.phase_open = true;
        state.begun = true;
        Ok(InPhase(Arc::clone(self)))
    }
}

#[cfg(any(feature = "sqlite", feature = "postgres"))]
impl Drop for InPhase {
    fn drop(&mut self) {
        self.0.state().phase_open = false;
    }
}

/// Refuses names that not every database can store.
pub(crate) fn check_name(name: &str) -> Result<(), IntentError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        return Err(IntentError::Misused(
            "names of intents and phases, and discriminators, have 1 to 255 bytes, without NUL",
        ));
    }
    Ok(())
}

const MAX_NAME_BYTES: usize = 255;

/// An intent on which the attempt works, until this is dropped.
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

    /// The intent is open, with this upstream key.
    pub(super) fn opened(&self, key: UpstreamKey) {
        self.progress.state().open.insert(self.identity.clone(), key);
    }

    /// From now on the next intent of its name is another one.
    pub(super) fn settled(&self) {
        let mut state = self.progress.state();
        state.open.remove(&self.identity);
        if let Some(current) = state.current.get_mut(self.name())
            && self.place().ordinal() == current.ordinal
        {
            current.settle();
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.progress.state().calling.remove(&self.identity);
    }
}
