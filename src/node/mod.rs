//! One process over a store: its attempts, its leases and its tasks, which must not be cut off.

mod claims;
pub(crate) mod ends;
pub(crate) mod errand;
pub(crate) mod leases;
pub(crate) mod reaper;
pub(crate) mod running;
pub(crate) mod tasks;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use self::{leases::Renewer, running::Running, tasks::Tasks};
use crate::{
    error::{StoreError, StoreErrorKind},
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
    reaper_runs: AtomicBool,
}

impl Node {
    pub(crate) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        let tasks = Tasks::default();
        let running = Arc::<Running>::default();
        let renewer = Renewer::new(Arc::clone(&store), tasks.clone(), Arc::clone(&running));
        Arc::new(Self { store, codec: Codec, tasks, renewer, running, reaper_runs: AtomicBool::new(false) })
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
