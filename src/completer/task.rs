//! The completer as a task, and what jobs and operators call.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{Completer, CompleterPass};
use crate::{
    Fenced, IdempotencyHandle, KeptRequest, RecordId, RequestUpdate, StoreError, TRACING_TARGET,
    backoff::jittered, shared::Shared,
};

/// Abandoned requests.
impl IdempotencyHandle {
    /// Starts a task that sends abandoned requests again: at once, and then in the completer's interval. It survives errors
    /// of the store, and errors and panics of the application and of [`Restore`](crate::Restore). Any number of nodes may
    /// do so at once.
    ///
    /// It ends when the layer is [drained](Self::drain), after the requests that are under way, and not when the layer is
    /// dropped: the completer has the application, and the application has the layer.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::StoreErrorKind::Misconfigured) if the store keeps no requests.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn start_completer(&self, completer: Completer) -> Result<(), StoreError> {
        let shared = Arc::clone(self.shared());
        shared.recovery()?;
        self.shared().background.spawn(completer.run(shared));
        Ok(())
    }

    /// Looks once for abandoned requests, at most a [batch](Completer::with_batch), and sends them. For jobs; where
    /// [`start_completer`](Self::start_completer) was called it is not needed. After [`drain`](Self::drain) it sends none.
    /// It goes on to its end when its future is dropped.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be asked for them, or not for all of them.
    pub async fn complete_abandoned(&self, completer: &Completer) -> Result<CompleterPass, StoreError> {
        let (shared, completer) = (Arc::clone(self.shared()), completer.clone());
        self.shared().in_background(async move { completer.pass(&shared).await }).await
    }

    /// Lists the kept requests that wait for an operator, at most `limit`: each says
    /// [why](KeptRequest::attention).
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let recovery = self.shared.recovery()?;
        self.shared.run_to_end(async move { recovery.list_requests(limit).await }).await
    }

    /// Has a kept request that waits for an operator sent again, once what stood in its way is put right. Its tries begin
    /// anew. Returns whether there is such a request.
    ///
    /// [`evict`](Self::evict) discards a request together with its record.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn send_again(&self, record: RecordId) -> Result<bool, StoreError> {
        let recovery = self.shared.recovery()?;
        let update = RequestUpdate::SendAgain { after: Duration::ZERO, tried: false };
        let work = async move { recovery.update_request(record, None, &update).await };
        Ok(self.shared.run_to_end(work).await? == Fenced::Applied)
    }
}

impl Completer {
    async fn run(self, shared: Arc<Shared>) {
        loop {
            match self.pass(&shared).await {
                Ok(pass) if pass.taken > 0 => {
                    tracing::debug!(target: TRACING_TARGET, ?pass, "abandoned requests")
                }
                Ok(_) => {}
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(target: TRACING_TARGET, error, "abandoned requests could not be looked for; trying again later");
                }
            }
            if timeout(jittered(self.interval), shared.draining.cancelled()).await.is_ok() {
                return;
            }
        }
    }
}
