//! One process over a store: its attempts, its leases and its tasks, which must not be cut off.

mod begins;
pub(crate) mod cache;
mod claims;
pub(crate) mod ends;
pub(crate) mod errand;
mod joined;
pub(crate) mod leases;
pub(crate) mod lookups;
pub(crate) mod reaper;
pub(crate) mod running;
pub(crate) mod tasks;
pub(crate) mod work;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use self::{
    cache::Replays, joined::Joined, leases::Renewer, lookups::Lookups, running::Running, tasks::Tasks,
};
use crate::{
    consumer::Consumer,
    error::{StoreError, StoreErrorKind},
    key::IdempotencyKey,
    redact::{KeyLogging, TRACING_TARGET},
    retry::Backoff,
    store::{Store, recovery::RecoveryStore},
    stored::codec::Codec,
};

/// The part that a layer, its clones, its services and its handles share.
pub(crate) struct Node {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) codec: Codec,
    pub(crate) tasks: Tasks,
    pub(crate) renewer: Arc<Renewer>,
    pub(crate) running: Arc<Running>,
    pub(crate) replays: Arc<Replays>,
    joined: Joined,
    pub(crate) lookups: Lookups,
    reaper_runs: AtomicBool,
    nesting_warned: AtomicBool,
    redacts_keys: AtomicBool,
}

impl Node {
    pub(crate) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        let tasks = Tasks::default();
        let replays = Arc::clone(&tasks.replays);
        let running = Arc::<Running>::default();
        let renewer = Renewer::new(Arc::clone(&store), tasks.clone(), Arc::clone(&running));
        Arc::new(Self {
            store,
            codec: Codec,
            tasks,
            renewer,
            running,
            replays,
            joined: Joined::default(),
            lookups: Lookups::default(),
            reaper_runs: AtomicBool::new(false),
            nesting_warned: AtomicBool::new(false),
            redacts_keys: AtomicBool::new(false),
        })
    }

    /// Lets the next claim of a key that an operator has ended ask the store.
    pub(crate) fn forget(&self, consumer: &Consumer, key: &IdempotencyKey) {
        self.running.forget(consumer, key);
        self.replays.forget(consumer, key);
        self.joined.forget(consumer, key);
    }

    /// Tells once that a layer around guards the same requests with the same records.
    pub(crate) fn warn_of_nesting(&self) {
        if !self.nesting_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                target: TRACING_TARGET,
                "an IdempotencyLayer around this one has the same table: this one passes its requests \
                 through, at the cost of a claim each, and its settings do not apply; remove one of them"
            );
        }
    }

    /// Redacts keys in the log of operators and background tasks, which have no settings, if one of
    /// the layers redacts them.
    pub(crate) fn log_keys(&self, logging: KeyLogging) {
        self.redacts_keys.fetch_or(logging == KeyLogging::Redacted, Ordering::Relaxed);
    }

    pub(crate) fn key_logging(&self) -> KeyLogging {
        match self.redacts_keys.load(Ordering::Relaxed) {
            true => KeyLogging::Redacted,
            false => KeyLogging::Plain,
        }
    }

    /// The store of intents, phases and kept requests.
    pub(crate) fn recovery(&self) -> Result<Arc<dyn RecoveryStore>, StoreError> {
        self.store.recovery().ok_or_else(|| {
            let message = "this store keeps no intents, phases or requests: use a store of this crate";
            StoreError::new(StoreErrorKind::Misconfigured, message)
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.renewer.end_if_idle();
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("store", &self.store).field("tasks", &self.tasks).finish_non_exhaustive()
    }
}

/// The time in which a claim or an opened intent that is not used is undone here; then its lease or
/// the reconciler does it.
pub(crate) const UNDO_LIMIT: Duration = Duration::from_secs(10 * 60);
/// The first pause between two tries to undo a write that may still be carried out.
pub(crate) const FIRST_LATE_PAUSE: Duration = Duration::from_millis(100);
/// The pauses between two tries of a call to the store.
pub(crate) const RETRY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
