//! The background task.

use std::sync::{Arc, Weak};

use super::Reconciler;
use crate::{
    IdempotencyHandle, ReconcilerPass, StoreError, TRACING_TARGET, backoff::jittered, shared::Shared,
};

impl IdempotencyHandle {
    /// Starts a task that looks up what became of dangling intents: at once, and then in the reconciler's interval. It
    /// survives errors of the store and of the look-ups. It ends when the layer is drained, after the look-ups that are under
    /// way, or dropped.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::StoreErrorKind::Misconfigured) if the store keeps no intents.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn start_reconciler(&self, reconciler: Reconciler) -> Result<(), StoreError> {
        let shared = self.shared();
        shared.recovery()?;
        shared.background.spawn(run(Arc::downgrade(shared), reconciler));
        Ok(())
    }

    /// One pass of a reconciler, for jobs and tests: takes intents that are due until there are none, and looks each of
    /// them up. After [`drain`](Self::drain) it begins no look-up any more.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if intents could not be taken; what was looked up before that is recorded.
    pub async fn reconcile(&self, reconciler: &Reconciler) -> Result<ReconcilerPass, StoreError> {
        let (shared, reconciler) = (Arc::clone(self.shared()), reconciler.clone());
        self.shared().in_background(async move { reconciler.pass(&shared).await }).await
    }
}

async fn run(shared: Weak<Shared>, reconciler: Reconciler) {
    let mut failures = 0;
    while let Some(running) = shared.upgrade() {
        failures = match reconciler.pass(&running).await {
            Ok(_) => 0,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(target: TRACING_TARGET, error, "dangling intents could not be taken; trying again later");
                MAX_DOUBLINGS.min(failures + 1)
            }
        };
        let draining = running.draining.clone();
        drop(running);
        let pause = jittered(reconciler.settings.interval.saturating_mul(1 << failures));
        if tokio::time::timeout(pause, draining.cancelled()).await.is_ok() {
            return;
        }
    }
}

const MAX_DOUBLINGS: u32 = 3;
